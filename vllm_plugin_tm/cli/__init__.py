# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-tm`: its subcommands and nothing of what they do."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Protocol, cast

# subcommand -> what `vllm-tm --help` says of it. The module of the same name has the rest.
COMMANDS = {
    "doctor": "say what works on this machine; exit status 1 when something is broken",
    "convert": "quantize a checkpoint to compressed-tensors, streamed",
    "inspect": "say what a quantized checkpoint holds, and which kernel would run it here",
    "bench": "measure the kernels against upstream's and against the machine's limits",
}


class Command(Protocol):
    """What each module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the subcommand's options."""

    def run(self, args: argparse.Namespace) -> int:
        """Does it: the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vllm-tm` with the given arguments (the process's own when None): the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="vllm-tm", description="Quantized CPU kernels for vLLM: check and measure them."
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    modules: dict[str, Command] = {}
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if name in argv:  # the other modules, and what they import, are not needed
            modules[name] = cast(Command, importlib.import_module(f"{__name__}.{name}"))
            modules[name].add_arguments(subparser)
    args = parser.parse_args(argv)
    return modules[args.command].run(args)
