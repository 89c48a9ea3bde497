# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as a peer: an environment with llama-cpp-python, and a Q4_0 file of the same shapes.

    python benchmarks/llamacpp_peer.py --json llamacpp.json

measures it alone; end_to_end.py measures it beside vLLM. Weights are random. Every matrix is Q4_0
(4-bit codes, one fp16 scale per 32 weights), the embedding that is also the head included.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import llama_1b
import peer_venv
from workers import (
    ASK_DECODE,
    ASK_PREFILL,
    Engine,
    Worker,
    WorkerError,
    end_with_this_process,
    serve,
)

_BATCH = 512
_WORKER_OPTION = "--worker"


def main() -> int:
    """Exit status 0 when measured, 1 when it failed, 2 when llama.cpp cannot be had."""
    if sys.argv[1:2] == [_WORKER_OPTION]:
        serve(_load)
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("build/peers/llamacpp"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    end_with_this_process()
    args.directory.mkdir(parents=True, exist_ok=True)
    rates: dict[str, list[float]] = {ASK_DECODE: [], ASK_PREFILL: []}
    try:
        peer = engine("llama.cpp", args.directory, args.threads)
        with Worker(peer, args.directory / "log") as worker:
            for _ in range(args.repeats):
                rates[ASK_DECODE].append(worker.ask(ASK_DECODE, 128))
                rates[ASK_PREFILL].append(worker.ask(ASK_PREFILL, _BATCH))
    except peer_venv.PeerError as error:
        print(f"llama.cpp is not to be had: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(rates, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"engine": "llama.cpp Q4_0", "rates": rates}) + "\n")
    return 0


def engine(name: str, directory: Path, threads: int) -> Engine:
    """The worker's command; makes environment and model file in `directory` where missing.

    Raises:
        peer_venv.PeerError: pip cannot install llama-cpp-python.
    """
    python = Path(sys.executable)
    if not all(importlib.util.find_spec(module) for module in ("llama_cpp", "gguf")):
        requirements = ["llama-cpp-python", "gguf"]
        python = peer_venv.make(
            directory / "venv-llamacpp", requirements, "llama_cpp, gguf", dependencies=True
        )
    command = [str(python), __file__, _WORKER_OPTION, str(directory / "llama-1b-q4_0.gguf")]
    return Engine(name, [*command, str(threads)], {})


def write_model(path: Path) -> None:
    """A GGUF file of the shapes in llama_1b with random Q4_0 weights; needs gguf and numpy."""
    import gguf
    import numpy

    random = numpy.random.default_rng(0)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(llama_1b.HIDDEN)
    writer.add_block_count(llama_1b.LAYERS)
    writer.add_feed_forward_length(llama_1b.INTERMEDIATE)
    writer.add_head_count(llama_1b.HEADS)
    writer.add_head_count_kv(llama_1b.KV_HEADS)
    writer.add_rope_freq_base(llama_1b.ROPE_THETA)
    writer.add_rope_dimension_count(llama_1b.HEAD_SIZE)
    writer.add_layer_norm_rms_eps(llama_1b.NORM_EPS)
    writer.add_vocab_size(llama_1b.VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    # llama.cpp wants a vocabulary; the worker speaks in token numbers and never looks at it.
    writer.add_tokenizer_model("no_vocab")

    def norm(name: str) -> None:
        writer.add_tensor(name, numpy.ones(llama_1b.HIDDEN, dtype=numpy.float32))

    def matrix(name: str, n: int, k: int) -> None:
        blocks = n * k // 32
        data = numpy.empty((blocks, 18), dtype=numpy.uint8)  # a Q4_0 block: fp16 scale, 32 codes
        scale = random.uniform(0.5e-2, 1e-2, blocks).astype(numpy.float16)
        data[:, :2] = scale.view(numpy.uint8).reshape(blocks, 2)
        data[:, 2:] = random.integers(0, 256, (blocks, 16), dtype=numpy.uint8)
        writer.add_tensor(
            name, data.reshape(n, k // 32 * 18), raw_dtype=gguf.GGMLQuantizationType.Q4_0
        )

    hidden, inner = llama_1b.HIDDEN, llama_1b.INTERMEDIATE
    kv = llama_1b.KV_HEADS * llama_1b.HEAD_SIZE
    matrix("token_embd.weight", llama_1b.VOCABULARY, hidden)
    norm("output_norm.weight")
    for layer in range(llama_1b.LAYERS):
        prefix = f"blk.{layer}."
        norm(prefix + "attn_norm.weight")
        norm(prefix + "ffn_norm.weight")
        matrix(prefix + "attn_q.weight", hidden, hidden)
        matrix(prefix + "attn_k.weight", kv, hidden)
        matrix(prefix + "attn_v.weight", kv, hidden)
        matrix(prefix + "attn_output.weight", hidden, hidden)
        matrix(prefix + "ffn_gate.weight", inner, hidden)
        matrix(prefix + "ffn_up.weight", inner, hidden)
        matrix(prefix + "ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


def _load() -> Callable[[int, int], None]:
    import numpy
    from llama_cpp import Llama

    path, threads = Path(sys.argv[2]), int(sys.argv[3])
    if not path.exists():
        write_model(path)
    model = Llama(
        str(path),
        n_ctx=1024,
        n_batch=_BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=True,
    )
    random = numpy.random.default_rng(0)

    def generate(prompt_tokens: int, new_tokens: int) -> None:
        model.reset()
        model.eval(random.integers(3, llama_1b.VOCABULARY, prompt_tokens).tolist())
        for _ in range(new_tokens - 1):
            model.eval([model.sample(temp=0.0)])
        model.sample(temp=0.0)

    return generate


if __name__ == "__main__":
    sys.exit(main())
