# SPDX-License-Identifier: Apache-2.0
"""AMD's zentorch beside our kernel, in one process and in turns, in an environment of its own.

    python benchmarks/zentorch_peer.py --json zentorch.json --m 1,16,128

takes the options of `vllm-tm bench` and writes the same rows. Run it with the Python that has the
plugin; the environment (--venv) borrows its torch, and zentorch's release for that torch is taken.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import peer_venv

_WORKER = "VLLM_TM_ZENTORCH_WORKER"


def main() -> int:
    """Exit status 0 when measured, 2 when zentorch cannot be had here."""
    if os.environ.get(_WORKER):
        return _measure(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--venv", type=Path, default=Path("build/peers/zentorch"))
    own, rest = parser.parse_known_args()
    import torch

    release = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    try:
        python = peer_venv.make(
            # zentorch asks for no torch version, but its library fits one release only;
            # `deprecated` and `wrapt` are what it needs beyond what torch brings.
            own.venv,
            [f"zentorch=={release}.*", "deprecated", "wrapt"],
            "zentorch",
            dependencies=False,
        )
    except peer_venv.PeerError as error:
        print(f"zentorch for torch {release} is not to be had: {error}", file=sys.stderr)
        return 2
    environment = {**os.environ, _WORKER: "1"}
    return subprocess.run([str(python), __file__, *rest], env=environment).returncode


def _measure(options: list[str]) -> int:
    import zentorch  # registers its ops

    from vllm_plugin_tm.cli import bench

    print(f"zentorch {zentorch.__version__}", file=sys.stderr)
    parser = argparse.ArgumentParser(prog="zentorch_peer.py")
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(options), more=(_zentorch,))


def _zentorch(weights, llc_bytes):
    """zentorch's W4A16 linear, prepared as vLLM's ZentorchWNA16LinearKernel does it."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    from vllm_plugin_tm.bench import peers

    ops = torch.ops.zentorch
    if not hasattr(ops, "zentorch_woq_linear"):
        raise peers.UnavailableError("this zentorch has no zentorch_woq_linear")
    n, k = weights.n, weights.k
    codes = unpack_from_int32(weights.weight_packed, 4, torch.Size((n, k))).to(torch.int8)
    zero = None
    if weights.zero_point is not None:
        zero = unpack_from_int32(
            weights.zero_point, 4, torch.Size(weights.scale.shape), packed_dim=0
        )
        # With zero points both are handed over unsigned.
        codes, zero = codes + 8, (zero.to(torch.int8) + 8).t().contiguous()
    packed = ops.zentorch_woq_repack_weight.default(codes.contiguous())
    scale = weights.scale.t().contiguous()
    size = sum(t.numel() * t.element_size() for t in (packed, scale, zero) if t is not None)
    linear = ops.zentorch_woq_linear.default

    def copy():
        # The op wants the transposed view of a contiguous weight, so the copy is made before it.
        weight = packed.clone().t()
        return lambda x: linear(x, weight, scale, zero, None)

    copies = peers.copies_needed(size, llc_bytes)
    return peers.Peer("zentorch", "", size, tuple(copy() for _ in range(copies)))


if __name__ == "__main__":
    sys.exit(main())
