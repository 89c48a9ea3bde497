# SPDX-License-Identifier: Apache-2.0
"""`scripts/gpu_check.sh`: builds the CUDA kernels, tests them on the GPU, runs NVIDIA's sanitizer
and the bench, and writes one file of results."""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

from tools import layout
from tools.console import ToolError, run_main, say, step

MODULES = ("torch", "pytest", "compressed_tensors")
SANITIZER = "compute-sanitizer"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
# Each kernel a few times: a sanitizer makes them some hundred times slower.
SANITIZED = "oracle and (M17 or T17)"
RESULTS = layout.ROOT / "benchmarks" / "results"
_LINES_KEPT = 40


def main() -> int:
    """`python3 -m tools.gpu_check [--json FILE] [--skip-bench]`; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="tools.gpu_check", description=__doc__)
    parser.add_argument("--json", default="", help="the file to write (default: by GPU and date)")
    parser.add_argument("--skip-bench", action="store_true", help="tests only")
    args = parser.parse_args()
    machine = describe_machine()
    say(", ".join(f"{name} {value}" for name, value in machine.items()))
    major, minor = machine["compute_capability"].split(".")
    # wgmma and bulk copies are 9.0's own, and compiled for 90a.
    architecture = f"{major}{minor}{'a' if major == '9' else ''}-real"
    _checked(
        [sys.executable, "-m", "tools.build_cuda", "--architectures", architecture], "the build"
    )
    results: dict[str, Any] = {"machine": machine, "tests": run_tests()}
    results["sanitizer"] = run_sanitizer()
    if not args.skip_bench:
        results["bench"] = run_bench()
    path = Path(args.json) if args.json else result_path(machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    say(f"{path}")
    return 0 if passed(results) else 1


def describe_machine() -> dict[str, str]:
    """GPU, driver, versions, date, commit. Raises ToolError with the cure for what is missing."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ToolError(f"{sys.executable} lacks {', '.join(missing)}: pip install them")
    import torch

    if not torch.cuda.is_available():
        raise ToolError(f"torch {torch.__version__} sees no GPU; this check needs one")
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "torch": torch.__version__,
        "nvcc": _output([os.environ.get("CUDACXX") or "nvcc", "--version"]).rpartition("\n")[2],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _output(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
    }


def result_path(machine: dict[str, str]) -> Path:
    """Where results go unless a file is named."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    return RESULTS / f"{gpu}-{machine['date']}.json"


def run_tests() -> dict[str, Any]:
    """The kernels' tests on the GPU: how many passed, failed and were skipped, and which failed."""
    with step("tests on the GPU"), tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/cuda", "--gpu", "-q", "-m", "not slow"]
        subprocess.run([*command, f"--junit-xml={report}"], cwd=layout.ROOT, check=False)
        if not report.is_file():
            raise ToolError("pytest wrote no report; its messages are above")
        return read_report(report.read_text())


def read_report(text: str) -> dict[str, Any]:
    """Counts of a JUnit report, and the names of what failed."""
    cases = list(xml.etree.ElementTree.fromstring(text).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
    }


def run_sanitizer() -> dict[str, Any]:
    """What each tool says of some tests: "clean", or its last lines."""
    if shutil.which(SANITIZER) is None:
        say(f"{SANITIZER} was not found: left out")
        return {}
    said: dict[str, Any] = {}
    # Its own memory for each array: else what lies beyond one is torch's, and no error.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZER_TOOLS:
        with step(f"{SANITIZER} --tool {tool}"):
            command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable]
            command += ["-m", "pytest", "tests/cuda", "--gpu", "-q", "-m", "not slow"]
            run = subprocess.run(
                [*command, "-k", SANITIZED],
                cwd=layout.ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            lines = (run.stdout + run.stderr).splitlines()[-_LINES_KEPT:]
            said[tool] = "clean" if run.returncode == 0 else lines
    return said


def run_bench() -> Any:
    """The rows of benchmarks.gpu_linear."""
    with step("bench"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        _checked([sys.executable, "-m", "benchmarks.gpu_linear", "--json", str(path)], "the bench")
        return json.loads(path.read_text())


def passed(results: dict[str, Any]) -> bool:
    """True if nothing failed, something was tested, and no sanitizer found anything."""
    tests = results["tests"]
    clean = all(said == "clean" for said in results["sanitizer"].values())
    return tests["passed"] > 0 and not tests["failed"] and clean


def _checked(command: list[str], what: str) -> None:
    if subprocess.run(command, cwd=layout.ROOT, check=False).returncode:
        raise ToolError(f"{what} failed; its messages are above")


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, cwd=layout.ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolError(f"{command[0]} does not answer: {error}") from error
    return run.stdout.strip()


if __name__ == "__main__":
    run_main(main)
