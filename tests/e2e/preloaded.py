# SPDX-License-Identifier: Apache-2.0
"""A process that has imported what engines need, and becomes one for each that is asked for.

Importing vLLM takes 18 s of a core, which an engine of a tiny model then uses for two. Whatever the
plugin does at the start of a process it still does in each: nothing of it is imported here.

Each line of standard input is a request: {"program", "arguments", "environment", "output"}. It is
answered by a line with the number of the process that runs the program, and one with its status.
"""

import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

MODULES = (
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)


def become(request: dict[str, Any]) -> None:
    """Runs the request's program in this process, as `python PROGRAM ARGUMENTS` does, and ends."""
    os.setsid()
    os.environ.update(request["environment"])
    sys.argv = [request["program"], *request["arguments"]]
    status: object = 0
    try:
        runpy.run_path(request["program"], run_name="__main__")
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def redirect(output: str) -> None:
    """Standard input is empty, standard output and errors go to a file."""
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(1, 2)


def main() -> None:
    """Until standard input ends."""
    sys.path.append(str(Path(__file__).parents[2]))
    from tools.process import die_with_parent

    sys.path.pop()  # programs are to find the plugin where it is installed
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in MODULES:
        importlib.import_module(name)
    assert "vllm_plugin_tm" not in sys.modules
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            die_with_parent()
            redirect(request["output"])
            become(request)
        answers.write(f"{child}\n")
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
    os._exit(0)  # taking apart all that was imported takes seconds


if __name__ == "__main__":
    main()
