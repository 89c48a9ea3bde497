# SPDX-License-Identifier: Apache-2.0
"""What a model's layers are fastest on, measured when it is first loaded, and read from a file when
it is loaded again."""

import logging
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.quantization.experts_kernel import TMExpertsKernel
from vllm_plugin_tm.tuning.choices import SCHEMES, Choice, Choices, Product, locked, read, write

logger = logging.getLogger("vllm.plugin_tm")

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Row counts that are measured; a choice holds from the one before it up to its own."""

_FAMILIES = ("mma", "wgmma")  # what cuda_tiles says
_MOST_TILES = 64
_WARM_UP, _MEASURED = 2, 7


class Device(Protocol):
    """Where kernels run, as measuring needs it."""

    name: str

    def tiles(self) -> dict[str, int]:
        """The tiles' names and numbers."""

    def seconds(self, run: Callable[[], object]) -> float:
        """The median time of a run."""


class Gpu:
    """The current GPU."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        self._cache = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")

    def tiles(self) -> dict[str, int]:
        return tiles(torch.cuda.current_device())

    def seconds(self, run: Callable[[], object]) -> float:
        """Each run finds its weights in memory, not in the cache, and is queued while that is
        cleared, so that the host's time does not count."""
        times = []
        for i in range(_WARM_UP + _MEASURED):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._cache.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            if i >= _WARM_UP:
                times.append(begin.elapsed_time(end) / 1000)
        return statistics.median(times)


def tiles(device: int) -> dict[str, int]:
    """Names and numbers of the tiles that a device runs."""
    out = torch.zeros(_MOST_TILES, 4, dtype=torch.int64)
    count = torch.ops.vllm_plugin_tm.cuda_tiles(device, out)
    return {
        f"{_FAMILIES[family]} {channels}x{rows}": number
        for number, family, channels, rows in out[:count].tolist()
    }


def tune(
    model: torch.nn.Module, path: Path, device: Device, rows: tuple[int, ...] = ROWS
) -> tuple[int, int]:
    """Chooses tiles for all layers of the model that run on kernels of ours: as the file says, and
    by measuring what it does not know, which is then written. How many products were measured, and
    how many there are. Workers do so one after another, and find what the first ones measured.

    Raises TuningError for a file that is none of ours or cannot be written.
    """
    numbers = device.tiles()
    with locked(path):
        devices = read(path)
        own = devices.get(device.name)
        if own is None or own.tiles != list(numbers):
            own = devices[device.name] = Choices(list(numbers))
        measured = set()
        seen = set()
        for run in _runs(model):
            product = _product(run)
            if product in seen:
                continue
            seen.add(product)
            if product not in own.products:
                own.products[product] = _measure(run, device, numbers, rows)
                measured.add(product)
            _choose(product, own.products[product], numbers)
        if measured:
            write(path, devices)
    return len(measured), len(seen)


def _runs(model: torch.nn.Module) -> Iterator[Callable[[int], object]]:
    """Of each layer on a kernel of ours: a function that runs it on so many random rows."""
    for module in model.modules():
        kernel = layer_table.tm_kernel_of(module)
        method: Any = getattr(module, "quant_method", None)
        if isinstance(kernel, TMExpertsKernel):
            yield _experts_run(module, method, kernel)
        elif kernel is not None and hasattr(module, "input_size_per_partition"):
            yield _linear_run(module, method)


def _linear_run(module: Any, method: Any) -> Callable[[int], object]:
    weight = next(module.parameters())

    def run(rows: int) -> object:
        size = (rows, module.input_size_per_partition)
        x = torch.randn(size, dtype=module.params_dtype, device=weight.device)
        return lambda: method.apply(module, x)

    return run


def _experts_run(module: Any, method: Any, kernel: TMExpertsKernel) -> Callable[[int], object]:
    weight = next(module.parameters())

    def run(rows: int) -> object:
        tokens, top_k = max(1, rows // module.top_k), module.top_k
        dtype = getattr(torch, kernel.request.act_dtype)
        x = torch.randn(tokens, kernel.request.hidden, dtype=dtype, device=weight.device)
        scores = torch.rand(tokens, module.global_num_experts, device=weight.device)
        ids = scores.topk(top_k).indices.int()
        weights = torch.full((tokens, top_k), 1 / top_k, device=weight.device)
        return lambda: method.apply(module, x, weights, ids, None, None)

    return run


def _product(run: Callable[[int], Any]) -> Product:
    """What a layer is for plans: they note it."""
    run(1)()
    out = torch.zeros(len(Product._fields), dtype=torch.int64)
    assert torch.ops.vllm_plugin_tm.cuda_last_product(out), "no plan was made"
    scheme, *sizes = out.tolist()
    return Product(SCHEMES[scheme], *sizes)


def _measure(
    run: Callable[[int], Any], device: Device, numbers: dict[str, int], rows: tuple[int, ...]
) -> list[Choice]:
    """The fastest tile for each number of rows; neighbours that are alike become one."""
    choices: list[Choice] = []
    for count in rows:
        call = run(count)
        times = {}
        for name, number in numbers.items():
            for apart in (True, False):
                torch.ops.vllm_plugin_tm.cuda_force_tile(number, apart)
                try:
                    times[name, apart] = device.seconds(call)
                finally:
                    torch.ops.vllm_plugin_tm.cuda_force_tile(-1, False)
        (tile, apart), seconds = min(times.items(), key=lambda item: item[1])
        if choices and (choices[-1].tile, choices[-1].apart) == (tile, apart):
            choices.pop()
        choices.append(Choice(count, tile, apart, round(1e6 * seconds, 2)))
    return choices


def _choose(product: Product, choices: list[Choice], numbers: dict[str, int]) -> None:
    table = [[choice.rows, numbers[choice.tile], choice.apart] for choice in choices]
    torch.ops.vllm_plugin_tm.cuda_choose_tiles(
        torch.tensor([SCHEMES.index(product.scheme), *product[1:]]),
        torch.tensor(table, dtype=torch.int64),
    )


def tune_loaded(model: torch.nn.Module, path: str) -> None:
    """As tune, on the current GPU, with a line in the log."""
    measured, known = tune(model, Path(path), Gpu())
    logger.info(
        "vllm-plugin-tm chose tiles for %d kinds of layers by %s, of which %d were measured now",
        known,
        path,
        measured,
    )
