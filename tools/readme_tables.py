# SPDX-License-Identifier: Apache-2.0
"""Writes README.md's generated parts, between their markers, from the code that they describe."""

import argparse
import json

from tools import layout, vllm_versions
from tools.console import ToolError, run_main, say
from vllm_plugin_tm import envs, versions
from vllm_plugin_tm.quantization import support_matrix

README = layout.ROOT / "README.md"


def parts() -> dict[str, str]:
    """Marker name -> Markdown."""
    return {
        "support matrix": support_matrix.markdown(),
        "support matrix of routed experts": support_matrix.markdown(support_matrix.MOE_MATRIX),
        "versions": _versions(),
        "variables": _variables(),
    }


def updated(text: str) -> str:
    """The text with every part between its markers. Raises ToolError where a marker is missing."""
    for name, part in parts().items():
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        _old, closed, after = rest.partition(end)
        if not found or not closed:
            raise ToolError(f"README.md has no markers {start.strip()!r} and {end!r}")
        text = f"{before}{start}{part}\n{end}{after}"
    return text


def _list(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _versions() -> str:
    """What the last `make versions` ran, a row for each vLLM."""
    results = json.loads(vllm_versions.RESULTS.read_text())
    lines = [
        f"Models ran on vLLM {_list(versions.TESTED_VLLM)}",
        f"(`make versions`, {results['date']}, torch {results['torch']}). Every symbol that is",
        "patched or relied on is checked against their sources (`make compat`). The whole suite",
        f"runs with {versions.INSTALLED_VLLM}.",
        "",
    ]
    return "\n".join([*lines, vllm_versions.table(results)])


def _variables() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for variable in envs.VARIABLES:
        default = f"`{variable.default}`" if variable.default else "not set"
        lines.append(f"| `{variable.name}` | {default} | {variable.doc} |")
    return "\n".join(lines)


def main() -> int:
    """`python -m tools.readme_tables [--check]`"""
    parser = argparse.ArgumentParser(prog="tools.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    args = parser.parse_args()
    text = README.read_text()
    new = updated(text)
    if args.check and new != text:
        raise ToolError("README.md is not what the code says: run `make readme`")
    if new != text:
        README.write_text(new)
        say("README.md was written anew")
    return 0


if __name__ == "__main__":
    run_main(main)
