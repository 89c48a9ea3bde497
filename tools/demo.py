# SPDX-License-Identifier: Apache-2.0
"""`make demo` after set-up: asks a quantized model over HTTP with the plugin on, then off."""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tools import layout, setup_env
from tools.console import ToolError, run_main, say, step
from tools.make_model import PLAIN, is_made, w4a16_name
from tools.process import run
from tools.server import Server

PROMPT = "The capital of France is"
# What layer_table.TITLE prints; a test holds the two together (importing that one needs vLLM).
TABLE_TITLE = "vllm-plugin-tm layers"
GROUP_SIZE = 32
ANSWER_TOKENS = 24
# Long enough that one request's fixed costs do not count, short enough for a demo.
TOKENS = 128
REPEATS = 3
# On an idle machine the rates of one arm lie within a few percent of each other.
BUSY = 0.2
SERVE_ARGUMENTS = ("--max-model-len", "1024")
ONLINE_ARGUMENTS = ("--quantization", "tm_w4a16")
# The same for both arms. A gigabyte holds many contexts of a small model. Threads stay as vLLM sets
# them: with its core for the server taken away too (VLLM_CPU_NUM_OF_RESERVED_CPU=0), 2 threads on a
# busy two-core machine fell from 80 tokens/s to 10. What ahead-of-time compilation saves cannot be
# loaded again by vLLM 0.32 on a CPU ("no attribute 'finalize_loading'"): every start would compile.
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_AOT_COMPILE": "0"}

# What vLLM's own W4A16 kernel calls; its library for processors without AVX-512 does not have it,
# and vLLM then ends while it warms up.
UPSTREAM_OP = "cpu_gemm_wna16"


def make_model(*, online: bool = False) -> Path:
    """The W4A16 checkpoint of the demo, or the bf16 one where it is quantized while it is loaded;
    made when it is not there yet."""
    target = layout.MODELS / (PLAIN if online else w4a16_name(GROUP_SIZE, symmetric=True))
    if is_made(target):
        return target
    with step(f"making the model (SmolLM2-135M, {'bf16' if online else 'W4A16, group 32'})"):
        run(
            [
                *(layout.VENV / "bin" / "python", "-m", "tools.make_model"),
                *(["--plain"] if online else []),
            ],
            what="making the model",
            log=layout.LOGS / "make-model.log",
            cwd=layout.ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(layout.CACHE / "huggingface")},
        )
    return target


def server_for(model: Path, switch: str, more: Sequence[str] = ()) -> Server:
    """A server of `model` with the plugin's switch at "0" or "1", all else equal but for `more`
    arguments."""
    return Server(
        model,
        log=layout.LOGS / f"server-{'on' if switch == '1' else 'off'}.log",
        settings={**SETTINGS, "VLLM_PLUGIN_TM": switch},
        arguments=(*SERVE_ARGUMENTS, *more),
    )


def layer_table(log: str) -> list[str]:
    """The table's lines in a server log without the log's prefix on each; [] when there is none."""
    lines = log.splitlines()
    for index, line in enumerate(lines):
        prefix, found, _ = line.partition(TABLE_TITLE)
        if found:
            table = [line.removeprefix(prefix)]
            for row in lines[index + 1 :]:
                # Rows are indented; the next message of the log is not.
                text = row.removeprefix(prefix)
                if (text == row and prefix) or not text.startswith(" "):
                    break
                table.append(text)
            return table
    return []


def _table_of(server: Server) -> list[str]:
    """The layer table that this server logged. Raises ToolError where it logged none."""
    table = layer_table(server.log.read_text(errors="replace"))
    if not table:
        raise ToolError(
            f"the server runs, but {server.log} has no line {TABLE_TITLE!r}: the plugin was not "
            f"loaded (VLLM_PLUGINS is {os.environ.get('VLLM_PLUGINS', 'not set')!r})"
        )
    return table


def tokens_per_second(server: Server) -> tuple[float, float]:
    """Median and spread (largest minus smallest) of REPEATS requests of TOKENS tokens, one at a
    time over HTTP, after one warm-up request. The prompt's processing is part of the time."""
    server.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True)
    rates = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        answer = server.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True)
        elapsed = time.perf_counter() - started
        rates.append(answer["usage"]["completion_tokens"] / elapsed)
    return statistics.median(rates), max(rates) - min(rates)


def report(rates: Sequence[tuple[str, float, float]]) -> str:
    """The comparison as aligned text; each row is (switch, tokens/s, spread)."""
    lines = [f"Tokens per second, batch 1, {TOKENS} tokens, median of {REPEATS} (spread)"]
    for switch, rate, spread in rates:
        lines.append(f"  VLLM_PLUGIN_TM={switch}  {rate:7.1f}  ({spread:.1f})")
    by_switch = {switch: rate for switch, rate, _ in rates}
    if by_switch.keys() >= {"0", "1"}:
        lines.append(f"  on / off          {by_switch['1'] / by_switch['0']:7.2f}")
    if any(spread > BUSY * rate for _, rate, spread in rates):
        lines.append("  The spread is large: something else kept this machine busy. Measure again.")
    return "\n".join(lines)


def main() -> int:
    """`python3 -m tools.demo [--online]`"""
    parser = argparse.ArgumentParser(prog="tools.demo", description=__doc__)
    parser.add_argument("--online", action="store_true", help="quantize a bf16 model at load")
    online = parser.parse_args().online
    setup_env.ensure(["demo"])
    model = make_model(online=online)
    more = ONLINE_ARGUMENTS if online else ()
    rates = []
    with ExitStack() as stack:
        with step(" ".join(("starting VLLM_PLUGIN_TM=1 vllm serve", *more))):
            server = stack.enter_context(server_for(model, "1", more))
        say(f"\n{PROMPT}{server.complete(PROMPT, max_tokens=ANSWER_TOKENS)['choices'][0]['text']}")
        say("\n" + "\n".join(_table_of(server)) + "\n")
        with step("measuring with the switch on"):
            rates.append(("1", *tokens_per_second(server)))
    with ExitStack() as stack:
        try:
            with step("starting VLLM_PLUGIN_TM=0 vllm serve, for comparison"):
                server = stack.enter_context(server_for(model, "0"))
            with step("measuring with the switch off"):
                rates.append(("0", *tokens_per_second(server)))
        except ToolError as error:
            if UPSTREAM_OP not in str(error):
                raise
            say(f"vLLM alone cannot serve this model on this processor: no {UPSTREAM_OP}")
    say(f"\n{report(rates)}")
    return 0


if __name__ == "__main__":
    run_main(main)
