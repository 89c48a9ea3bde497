# SPDX-License-Identifier: Apache-2.0
"""The linear CUDA kernels against torch's bf16 product and the memory's bandwidth, measured in one
run on the first GPU: `python -m benchmarks.gpu_linear --json FILE`, after `make cuda`. Where it has
wgmma, the tiles with mma.sync, which such a GPU is not sent to, are measured beside it, and whether
both give the same bits.

Needs torch and no vLLM. Weights are random bits in the kernel layout, in as many copies as do not
fit the GPU's cache; launches are captured into a graph, so that the host's time does not count.
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# The C interface in Python is the tests'.
sys.path.append(str(ROOT / "tests" / "cuda"))

from c_structs import Layout, Linear, LinearA8, Plan, QuantizeX  # noqa: E402
from cuda_device import DTYPES  # noqa: E402
from gpu_device import Gpu, gpu  # noqa: E402

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # N, K
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
GROUP_SIZE = 128
LAUNCHES = 32  # of a graph
REPEATS = 7


class Bench:
    """One shape of an op: its copies of the weights, and launches of them in turn."""

    def __init__(self, device: Gpu, op: str, n: int, k: int) -> None:
        self.device, self.op = device, op
        groups = 1 if op == "w8a8" else k // GROUP_SIZE
        self.layout = Layout(n, k, groups, 8 if op == "w8a8" else 4)
        padded = -(-n // 64) * 64
        dwords = padded * -(-k // 64) * 64 * self.layout.bits // 32
        self.bytes = 4 * dwords
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        copies = max(2, -(-3 * cache // self.bytes))
        self.weights = torch.randint(-(2**31), 2**31, (copies, dwords), dtype=torch.int32).cuda()
        dtype = torch.float32 if op == "w8a8" else torch.bfloat16
        self.scale = torch.full((padded * groups,), 2.0**-10, dtype=dtype).cuda()

    def launcher(self, x: Tensor, y: Tensor, wgmma: bool) -> Callable[[int], None]:
        """A function that launches the product with the i-th copy on torch's current stream, on
        tiles of one family."""
        device, rows, k = self.device, x.shape[0], x.shape[1]
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        plan = device.plan(self.layout, rows, processors, wgmma, self.op)
        sizes = (ctypes.byref(plan), ctypes.byref(self.layout), rows)
        library = device.library
        sums = torch.empty(library.tm_cuda_sums_bytes(*sizes), dtype=torch.uint8).cuda()
        arrived = torch.zeros(library.tm_cuda_arrived_words(*sizes), dtype=torch.int32).cuda()
        codes = torch.empty(library.tm_cuda_code_bytes(rows, k), dtype=torch.uint8).cuda()
        x_scale = torch.empty(rows, dtype=torch.float32).cuda()
        args = Linear(self.layout, DTYPES[x.dtype], rows, x.data_ptr(), k)
        args.scale, args.y, args.y_stride = self.scale.data_ptr(), y.data_ptr(), y.shape[1]
        args.sums = sums.data_ptr() if len(sums) else None
        args.arrived = arrived.data_ptr() if len(arrived) else None
        quantize = QuantizeX(DTYPES[x.dtype], rows, k, x.data_ptr(), k, None, None, True)
        quantize.codes, quantize.scale = codes.data_ptr(), x_scale.data_ptr()
        memory = (sums, arrived, codes, x_scale)

        def launch(i: int) -> None:
            assert memory
            args.weight = self.weights[i % len(self.weights)].data_ptr()
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            if self.op == "w4a16":
                self._start("tm_cuda_w4a16_linear", args, plan, stream)
                return
            args.x = codes.data_ptr()
            wide = LinearA8(args, DTYPES[self.scale.dtype], x_scale.data_ptr())
            self._start("tm_cuda_quantize_x", quantize, None, stream)
            self._start("tm_cuda_a8_linear", wide, plan, stream)

        return launch

    def _start(
        self, name: str, args: ctypes.Structure, plan: Plan | None, stream: ctypes.c_void_p
    ) -> None:
        """As Device.call, but without waiting for the kernels."""
        error = ctypes.create_string_buffer(4096)
        between = () if plan is None else (ctypes.byref(plan),)
        function = getattr(self.device.library, name)
        if function(ctypes.byref(args), *between, stream, error, ctypes.c_size_t(len(error))):
            raise RuntimeError(error.value.decode())


def seconds(launch: Callable[[int], None]) -> float:
    """The median time of one launch, of several graphs of LAUNCHES."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(LAUNCHES):
            launch(i)
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / LAUNCHES)
    return sorted(times[1:])[len(times[1:]) // 2]


def bandwidth() -> float:
    """Bytes per second that the GPU reads, in a sum over 2 GiB."""
    data = torch.ones(1 << 29, dtype=torch.float32).cuda()
    return data.numel() * 4 / seconds(lambda i: data.sum())


def torch_launcher(x: Tensor, n: int) -> Callable[[int], None]:
    """torch's product in bf16, with weights that do not stay in the cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, -(-3 * cache // (2 * n * x.shape[1])))
    weights = torch.randn(copies, n, x.shape[1], dtype=torch.bfloat16, device=x.device)
    return lambda i: torch.matmul(x, weights[i % copies].T)


def main() -> int:
    """Measures all shapes; prints a line for each and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="", help="the file to write")
    args = parser.parse_args()
    device = gpu(ROOT)
    rate = bandwidth()
    rows: list[dict[str, Any]] = []
    for n, k in SHAPES:
        benches = [Bench(device, op, n, k) for op in ("w4a16", "w4a8", "w8a8")]
        for m in ROWS:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
            row: dict[str, Any] = {"n": n, "k": k, "m": m}
            row["torch_bf16_us"] = 1e6 * seconds(torch_launcher(x, n))
            for bench in benches:
                launch = bench.launcher(x, y, device.wgmma)
                time = seconds(launch)
                row[f"{bench.op}_us"] = 1e6 * time
                row[f"{bench.op}_of_bandwidth"] = bench.bytes / time / rate
                row[f"{bench.op}_tflops"] = 2e-12 * m * n * k / time
                if device.wgmma:
                    launch(0)
                    bits = y.clone()
                    other = bench.launcher(x, y, wgmma=False)
                    row[f"{bench.op}_mma_us"] = 1e6 * seconds(other)
                    other(0)
                    row[f"{bench.op}_mma_same_bits"] = torch.equal(y, bits)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.json:
        result = {"bandwidth_gb_s": rate / 1e9, "group_size": GROUP_SIZE, "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
