# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm doctor`: the report and its two forms, text and JSON; the findings are in checks.py."""

import argparse
import contextlib
import json
import sys

from vllm_plugin_tm.cli.checks import Check, Report, gather

_MARKS = {"ok": "ok  ", "info": "    ", "warn": "WARN", "fail": "FAIL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --json."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the report"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report: 0 when nothing is broken, else 1."""
    # vLLM logs to standard output, which belongs to the report.
    with contextlib.redirect_stdout(sys.stderr):
        report = gather()
    print(to_json(report) if args.json else to_text(report))
    return 0 if report.ok else 1


def to_json(report: Report) -> str:
    """One JSON object: "ok", and under "sections" each section's checks in order."""
    sections = {
        title: [
            {"name": check.name, "state": check.state, "detail": check.detail} for check in checks
        ]
        for title, checks in report.sections.items()
    }
    return json.dumps({"ok": report.ok, "sections": sections}, indent=2)


def to_text(report: Report) -> str:
    """The report for people: a heading per section, a line per check, a verdict at the end."""
    lines: list[str] = []
    for title, checks in report.sections.items():
        lines += [title, *_lines(checks), ""]
    broken = [check.name for check in report.checks() if check.state == "fail"]
    lines.append(f"broken: {', '.join(broken)}" if broken else "Everything works.")
    return "\n".join(lines)


def _lines(checks: list[Check]) -> list[str]:
    width = max((len(check.name) for check in checks), default=0)
    indent = " " * (width + 10)
    return [
        f"  {_MARKS[check.state]}  {check.name:<{width}}  "
        + check.detail.replace("\n", "\n" + indent)
        for check in checks
    ]
