# SPDX-License-Identifier: Apache-2.0
"""Reads the JUnit files of two runs of one suite, switch off and on, and compares them."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED = "passed"
TORN = "passed, then failed at tear-down"
NO_RESULT = "no result"
# In the title of the table that our plugin logs of each model (vllm_plugin_tm.layer_table).
TM_LAYERS = "on TM kernels"
NO_TM_LAYERS = " 0 of "
# What a parent process says when the reason stands in its child's log.
DIED_ELSEWHERE = re.compile("(Engine core|WorkerProc) initialization failed")
ERROR = re.compile(r"\b\w*(Error|Exception): .+")
LONGEST_REASON = 300
WIDTH = 34  # of the column of statuses


@dataclass(frozen=True)
class Outcome:
    """How one test ended: passed, failed, error, skipped, no result, or passed with a failing
    tear-down; with the last line of the reason where it did not pass, and whether a model in it
    had layers on our kernels."""

    status: str
    reason: str = ""
    tm_layers: bool = False


@dataclass(frozen=True)
class Run:
    """One pytest process: outcome by test, seconds, and the state of the patches as the process
    itself reported it ("applied", "none", or "unknown" where every test was skipped)."""

    outcomes: Mapping[str, Outcome]
    patches: str = "unknown"
    seconds: float = 0.0


@dataclass
class Comparison:
    """Off against on. `regressions` are the tests that pass off and do not pass on."""

    counts: dict[str, dict[str, int]]
    regressions: dict[str, str] = field(default_factory=dict)
    gained: dict[str, str] = field(default_factory=dict)
    neither: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    on_tm_kernels: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data for the report file."""
        return dict(vars(self))


def read_junit(path: Path) -> Run:
    """The run that a JUnit file of pytest describes; a file that is missing or cut short, which a
    crash or a timeout leaves, is a run without outcomes."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return Run({})
    outcomes: dict[str, Outcome] = {}
    for case in root.iter("testcase"):
        name = "::".join(part for part in (case.get("classname"), case.get("name")) if part)
        outcome = _outcome(case)
        # A failing tear-down lists its test a second time; a failure of the test itself stays.
        if name not in outcomes or outcomes[name].status == PASSED:
            outcomes[name] = outcome
    properties = {p.get("name"): p.get("value") or "" for p in root.iter("property")}
    seconds = sum(float(suite.get("time") or 0) for suite in root.iter("testsuite"))
    return Run(outcomes, properties.get("patches", "unknown"), seconds)


def compare(off: Mapping[str, Outcome], on: Mapping[str, Outcome]) -> Comparison:
    """Compares outcome by outcome; a test that one arm lacks has no result there."""
    counts = {
        arm: dict(Counter(outcome.status for outcome in outcomes.values()))
        for arm, outcomes in (("off", off), ("on", on))
    }
    found = Comparison(counts)
    reasons: Counter[str] = Counter()
    for name in sorted(off.keys() | on.keys()):
        before, after = off.get(name, Outcome(NO_RESULT)), on.get(name, Outcome(NO_RESULT))
        if after.tm_layers:
            found.on_tm_kernels.append(name)
        if _worse(before.status, after.status):
            found.regressions[name] = f"{after.status}: {after.reason}"
        elif before.status == PASSED:
            continue
        elif after.status == PASSED:
            found.gained[name] = f"off {before.status}: {before.reason}"
        elif before.status == after.status == "skipped":
            reasons[before.reason] += 1
        else:
            found.neither[name] = f"off {before.status}: {before.reason}"
            if (before.status, before.reason) != (after.status, after.reason):
                found.neither[name] += f" | on {after.status}: {after.reason}"
    found.skipped = dict(reasons.most_common())
    return found


def render(found: Comparison, most: int = 40) -> str:
    """The comparison as text: counts, then every difference, then what ran in neither arm."""
    statuses = sorted(set(found.counts["off"]) | set(found.counts["on"]))
    lines = [f"{'':{WIDTH}}{'off':>8}{'on':>8}"]
    for status in statuses:
        row = [found.counts[arm].get(status, 0) for arm in ("off", "on")]
        lines.append(f"{status:{WIDTH}}{row[0]:8}{row[1]:8}")
    lines.append(f"with layers on TM kernels (on): {len(found.on_tm_kernels)}")
    for title, tests in (
        ("pass off, do not pass on", found.regressions),
        ("pass on only", found.gained),
        (
            "pass in neither arm: upstream's own limits here, nothing is shown by them",
            found.neither,
        ),
    ):
        lines += ["", f"{title}: {len(tests)}"]
        lines += [f"  {name}\n      {reason}" for name, reason in list(tests.items())[:most]]
        if len(tests) > most:
            lines.append(f"  and {len(tests) - most} more, see the report")
    lines += ["", f"skipped in both arms: {sum(found.skipped.values())}"]
    lines += [f"  {count:5}  {reason}" for reason, count in list(found.skipped.items())[:most]]
    return "\n".join(lines)


def _worse(before: str, after: str) -> bool:
    """Whether a test that passed off did not pass on, its tear-down taken for itself."""
    return (before == PASSED and after != PASSED) or (
        before == TORN and after not in (PASSED, TORN)
    )


def _outcome(case: ElementTree.Element) -> Outcome:
    output = "".join(part.text or "" for part in case if part.tag in ("system-out", "system-err"))
    tm_layers = any(TM_LAYERS in line and NO_TM_LAYERS not in line for line in output.splitlines())
    for status, tag in (("error", "error"), ("failed", "failure"), ("skipped", "skipped")):
        part = case.find(tag)
        if part is not None:
            if (part.get("message") or "").startswith("failed on teardown"):
                status = TORN
            return Outcome(status, _reason(part, output)[:LONGEST_REASON], tm_layers)
    return Outcome(PASSED, tm_layers=tm_layers)


def _reason(part: ElementTree.Element, output: str) -> str:
    """The message's last line; of a traceback the last line that pytest marks with "E". Where an
    engine process died, the last error that this process printed."""
    message = (part.get("message") or "").strip()
    text = (part.text or "").strip()
    if part.tag == "skipped":
        return ((message or text).splitlines() or [""])[-1]
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")]
    marked = [line for line in marked if line and not line.startswith("For further information")]
    lines = marked or (message or text).splitlines() or [""]
    if DIED_ELSEWHERE.search(lines[-1]):
        errors = [m.group() for m in ERROR.finditer(text + output)]
        lines += [line for line in errors if not DIED_ELSEWHERE.search(line)][-1:]
    return lines[-1]
