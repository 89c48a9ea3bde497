# SPDX-License-Identifier: Apache-2.0
"""`make serve` after set-up: a server with the plugin on, left up until Ctrl-C."""

import argparse
import json
import time
from contextlib import ExitStack

from tools import demo, layout, setup_env
from tools.console import ToolError, run_main, say, step
from tools.server import Server


def main() -> int:
    """`python3 -m tools.serve [--model MODEL] [--port PORT] [-- VLLM-ARGUMENTS]`"""
    parser = argparse.ArgumentParser(prog="tools.serve", description=__doc__)
    parser.add_argument("--model", default="", help="a checkpoint folder (default: the demo's)")
    parser.add_argument("--port", default="", help="the loopback port (default: a free one)")
    parser.add_argument("arguments", nargs="*", help="passed on to vllm serve")
    args = parser.parse_args()
    if args.port and not args.port.isdigit():
        raise ToolError(f"PORT is {args.port!r}; a number from 1 to 65535 is allowed")
    setup_env.ensure(["demo"])
    model = args.model or demo.make_model()
    server = Server(
        model,
        log=layout.LOGS / "serve.log",
        settings={**demo.SETTINGS, "VLLM_PLUGIN_TM": "1"},
        arguments=args.arguments or demo.SERVE_ARGUMENTS,
        port=int(args.port) if args.port else None,
    )
    with ExitStack() as stack:
        with step(f"starting VLLM_PLUGIN_TM=1 vllm serve {model}"):
            stack.enter_context(server)
        say("\n".join(demo.layer_table(server.log.read_text(errors="replace"))))
        say(f"\n{server.url} serves until Ctrl-C; its log is {server.log}. Try:")
        say(f"  curl {server.url}/v1/completions -H 'Content-Type: application/json' \\")
        body = {"model": server.model, "prompt": demo.PROMPT, "max_tokens": demo.ANSWER_TOKENS}
        say(f"    -d '{json.dumps(body)}'")
        _until_interrupted(server)
    return 0


def _until_interrupted(server: Server) -> None:
    """Returns at Ctrl-C; raises ToolError when the server ends by itself."""
    try:
        while True:
            server.check_alive()
            time.sleep(1)
    except KeyboardInterrupt:
        say("\nstopping the server")


if __name__ == "__main__":
    run_main(main)
