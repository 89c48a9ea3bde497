# SPDX-License-Identifier: Apache-2.0
"""AMD's zentorch beside our kernel, in one process and in turns, in an environment of its own.

    python benchmarks/zentorch_peer.py --json zentorch.json --scheme w4a16,w4a8,w8a8 --m 1,16,256

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
    """zentorch's linear of the weights' scheme, prepared as vLLM's zentorch classes do it."""
    from vllm_plugin_tm.bench import peers

    make = {"w4a16": _w4a16, "w4a8": _dynamic, "w8a8": _dynamic}.get(weights.format.scheme)
    if make is None:
        title = weights.format.facts.title
        raise peers.UnavailableError(f"zentorch: {title}: vLLM has no zentorch kernel for it")
    return make(weights, llc_bytes)


def _w4a16(weights, llc_bytes):
    """As ZentorchWNA16LinearKernel without 8-bit activations."""
    from vllm_plugin_tm.kernels import reference

    repack, linear = _ops("zentorch_woq_repack_weight", "zentorch_woq_linear")
    codes, zero = reference.unpack(weights.codes, 4, weights.k), None
    if weights.zero_point is not None:
        zero = reference.unpack(weights.zero_point.t().contiguous(), 4, weights.n)
        # With zero points both are handed over unsigned.
        codes, zero = codes + 8, (zero + 8).contiguous()
    packed = repack(codes.contiguous())
    scale = weights.scale.t().contiguous()

    def copy():
        # The op wants the transposed view of a contiguous weight, so the copy is made before it.
        weight = packed.clone().t()
        return lambda x: linear(x, weight, scale, zero, None)

    return _peer(weights, (packed, scale, zero), copy, llc_bytes)


def _dynamic(weights, llc_bytes):
    """8-bit activations, a scale per row: as ZentorchInt8ScaledMMLinearKernel for 8-bit weights, as
    ZentorchWNA16LinearKernel with VLLM_CPU_INT4_W4A8 for 4-bit ones."""
    import torch

    from vllm_plugin_tm.bench import peers
    from vllm_plugin_tm.kernels import reference

    form = weights.format
    if not form.symmetric or form.dtype != "bf16":
        title = form.facts.title
        raise peers.UnavailableError(f"zentorch: {title}: bf16 and no zero points only")
    (linear,) = _ops("zentorch_dynamic_qlinear")
    if form.facts.grouped:
        (repack,) = _ops("zentorch_woq_repack_weight")
        codes = reference.unpack(weights.codes, 4, weights.k)
        # The words that the repacking makes hold two codes a byte in the order of K.
        packed = repack(codes.contiguous()).view(torch.int8)
        scale = weights.scale.t().contiguous()
    else:
        packed, scale = weights.codes, weights.scale.squeeze(1)
    scale = scale.to(torch.bfloat16)

    def copy():
        weight = packed.clone()
        return lambda x: linear(x, weight, scale, None)

    return _peer(weights, (packed, scale), copy, llc_bytes, peers.Rounding.OWN)


def _ops(*names):
    """The overloads that vLLM calls."""
    import torch

    from vllm_plugin_tm.bench import peers

    ops = torch.ops.zentorch
    for name in names:
        if not hasattr(ops, name):
            raise peers.UnavailableError(f"this zentorch has no {name}")
    return [getattr(ops, name).default for name in names]


def _peer(weights, tensors, copy, llc_bytes, rounding=None):
    """A peer of as many copies as it takes; lazy, as zentorch reorders a weight when it first sees
    it and keeps the result."""
    from vllm_plugin_tm.bench import peers
    from vllm_plugin_tm.bench.weights import copies_needed, tensor_bytes

    size = sum(tensor_bytes(tensor) for tensor in tensors)
    applies = tuple(copy() for _ in range(copies_needed(size, llc_bytes)))
    rounding = rounding or peers.Rounding.NONE
    return peers.Peer("zentorch", "", weights, size, applies, rounding, lazy=True)


if __name__ == "__main__":
    sys.exit(main())
