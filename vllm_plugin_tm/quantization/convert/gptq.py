# SPDX-License-Identifier: Apache-2.0
"""Calibrated conversion: the plan is ours, the calibration llm-compressor's, in its own process.

llm-compressor asks for versions of transformers and compressed-tensors that vLLM's do not meet, so
it may live in an environment of its own, which the options name.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vllm_plugin_tm.quantization.convert import gptq_worker
from vllm_plugin_tm.quantization.convert.config import output_config
from vllm_plugin_tm.quantization.convert.destination import other_files, translated
from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.plan import Plan

_MODULE = "llmcompressor"


def calibrate(plan: Plan, folder: Path) -> tuple[float, int]:
    """Quantizes the plan's checkpoint with GPTQ and writes it to `folder`.

    The whole model is held in memory by transformers, which must know its class. Returns seconds
    and the peak of resident bytes. Raises ConvertError where llm-compressor is missing or fails,
    the calibration text cannot be read or is too short, and for a folder that is there already.
    """
    options = plan.options
    assert options.calibration is not None
    if options.resume:
        raise ConvertError("method 'gptq' is done in one go and cannot be resumed")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConvertError(f"{folder} is there already and not empty; nothing is overwritten")
    text = Path(options.calibration)
    if not text.is_file():
        raise ConvertError(f"{text}: the calibration text is no file")
    python = options.calibration_python or sys.executable
    _require(python)
    start = time.monotonic()
    with translated(folder, "cannot be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        request = {
            "source": str(plan.checkpoint.folder.resolve()),
            "destination": str(work / "model"),
            "text": str(text.resolve()),
            "samples": options.calibration_samples,
            "length": options.calibration_length,
            "quantization": output_config(plan)["quantization_config"],
        }
        answer = _run(python, request)
        with translated(folder, "cannot be written"):
            _complete(plan, work / "model")
            if folder.is_dir():
                folder.rmdir()
            os.replace(work / "model", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return time.monotonic() - start, int(answer["peak_bytes"])


def _require(python: str) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({_MODULE!r}) is None)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, check=False)
    except OSError as error:
        raise ConvertError(f"{python} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ConvertError(
            f"method 'gptq' needs llm-compressor, which {python} has not. It wants other versions "
            "than vLLM does: `python3 -m venv ENV && ENV/bin/pip install llmcompressor`, then "
            "--calibration-python ENV/bin/python"
        )


def _run(python: str, request: dict) -> dict:
    """The worker's answer; its own words where it fails."""
    done = subprocess.run(
        [python, gptq_worker.__file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    reason = [line for line in lines if line.startswith(gptq_worker.REFUSED)]
    if reason:
        raise ConvertError(reason[-1].removeprefix(gptq_worker.REFUSED))
    tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
    raise ConvertError(f"llm-compressor failed (exit status {done.returncode}):\n{tail}")


def _complete(plan: Plan, folder: Path) -> None:
    """What the checkpoint has beside its weights; and our configuration, which names every module
    that stayed, for llm-compressor's."""
    for path in other_files(plan.checkpoint.folder):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(output_config(plan), indent=2) + "\n")
