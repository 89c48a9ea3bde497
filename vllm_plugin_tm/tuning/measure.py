# SPDX-License-Identifier: Apache-2.0
"""What a model's layers are fastest on, measured when it is first loaded, and read from a file when
it is loaded again."""

import logging
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.quantization.experts_kernel import TMExpertsKernel
from vllm_plugin_tm.tuning.choices import (
    SCHEMES,
    Choice,
    Choices,
    Product,
    TuningError,
    locked,
    read,
    write,
)

logger = logging.getLogger("vllm.plugin_tm")

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of rows of x that are measured; a choice holds from the one before it up to its own."""

_FAMILIES = ("mma", "wgmma")  # what cuda_tiles says
_MOST_TILES = 64
_WARM_UP, _MEASURED = 2, 7
_AHEAD_CYCLES = 2_000_000  # about a millisecond, in which the host queues a run


class Device(Protocol):
    """Where kernels run, as measuring needs it."""

    name: str

    def tiles(self) -> dict[str, int]:
        """The tiles' names and numbers."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether kernels find the tensor in the device's own memory."""

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

    def holds(self, tensor: torch.Tensor) -> bool:
        """Not where vLLM has offloaded it: to the host, or to the host's memory in view."""
        return tensor.is_cuda and not getattr(tensor, "_vllm_is_uva_offloaded", False)

    def seconds(self, run: Callable[[], object]) -> float:
        """Each run finds its weights in memory, not in the cache, and is queued whole behind other
        work, so that the host's time does not count."""
        times = []
        for i in range(_WARM_UP + _MEASURED):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._cache.zero_()
            torch.cuda._sleep(_AHEAD_CYCLES)
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


@dataclass(frozen=True)
class Layer:
    """A layer on a kernel of ours. `call(rows)` makes a function that runs it on so many random
    rows; a plan counts each `times` as often: the choices of a token of experts."""

    call: Callable[[int], Callable[[], torch.Tensor]]
    times: int = 1


def tune(
    model: torch.nn.Module, path: Path, device: Device, rows: tuple[int, ...] = ROWS
) -> tuple[int, int]:
    """Chooses tiles for all layers of the model that run on kernels of ours: as the file says, and
    by measuring what it does not know, which is then written. How many kinds of layers were
    measured, and how many there are. Processes that measure do so one after another, and find what
    the first one measured; the file is written only then.

    Raises TuningError for a file that is none of ours, or that could not be written, before
    anything is measured; if writing fails after that, the log says so.
    """
    numbers = device.tiles()
    # Models are loaded where vLLM keeps weights, whose memory it may give away and take back.
    torch.ops.vllm_plugin_tm.cuda_pass_counters(True)
    try:
        layers: dict[Product, Layer] = {}
        for layer in _layers(model, device):
            layers.setdefault(_product(layer), layer)
        found = _own(read(path), device, numbers)
        measured = 0
        if not set(layers) <= set(found.products):
            with locked(path, logger):
                devices = read(path)
                found = devices[device.name] = _own(devices, device, numbers)
                for product, layer in layers.items():
                    if product not in found.products:
                        found.products[product] = _measure(product, layer, device, numbers, rows)
                        measured += 1
                try:
                    write(path, devices)
                except TuningError as error:
                    logger.warning("%s: what was measured holds for this process only", error)
        for product in layers:
            _choose(product, found.products[product], numbers)
    finally:
        torch.ops.vllm_plugin_tm.cuda_pass_counters(False)
    return measured, len(layers)


def _own(devices: dict[str, Choices], device: Device, numbers: dict[str, int]) -> Choices:
    """What is known of a device and its tiles."""
    found = devices.get(device.name)
    return found if found and found.tiles == list(numbers) else Choices(list(numbers))


def _layers(model: torch.nn.Module, device: Device) -> Iterator[Layer]:
    """Layers on kernels of ours whose weights are where they are run."""
    elsewhere = 0
    for module in model.modules():
        kernel = layer_table.tm_kernel_of(module)
        if kernel is None:
            continue
        if not all(map(device.holds, module.parameters(recurse=False))):
            elsewhere += 1
        elif isinstance(kernel, TMExpertsKernel):
            yield _experts(module, kernel)
        elif isinstance(module, LinearBase | VocabParallelEmbedding):
            yield _linear(module)
    if elsewhere:
        logger.info("%d layers are not in the GPU's memory: their tiles are reckoned", elsewhere)


def _linear(module: Any) -> Layer:
    method, (weight, *_) = module.quant_method, module.parameters(recurse=False)
    # A layer that is not split has no size of its own for a part.
    columns = getattr(module, "input_size_per_partition", None) or module.input_size

    def call(rows: int) -> Callable[[], torch.Tensor]:
        x = torch.randn(rows, columns, dtype=module.params_dtype, device=weight.device)
        return lambda: method.apply(module, x)

    return Layer(call)


def _experts(module: Any, kernel: TMExpertsKernel) -> Layer:
    method, (weight, *_), top_k = (
        module.quant_method,
        module.parameters(recurse=False),
        module.top_k,
    )
    dtype, device = getattr(torch, kernel.request.act_dtype), weight.device

    def call(rows: int) -> Callable[[], torch.Tensor]:
        x = torch.randn(rows, kernel.request.hidden, dtype=dtype, device=device)
        ids = torch.rand(rows, module.global_num_experts, device=device).topk(top_k).indices.int()
        weights = torch.full((rows, top_k), 1 / top_k, device=device)
        return lambda: method.apply(module, x, weights, ids, None, None)

    return Layer(call, top_k)


def _product(layer: Layer) -> Product:
    """What a layer is for plans: they note it."""
    layer.call(1)()
    out = torch.zeros(len(Product._fields), dtype=torch.int64)
    if not torch.ops.vllm_plugin_tm.cuda_take_product(out):
        raise TuningError("a layer on a kernel of ours ran without one")
    scheme, *sizes = out.tolist()
    return Product(SCHEMES[scheme], *sizes)


def _measure(
    product: Product, layer: Layer, device: Device, numbers: dict[str, int], rows: tuple[int, ...]
) -> list[Choice]:
    """The fastest tile for each number of rows; neighbours that are alike become one. Where the
    memory is not enough for so many rows, plans reckon."""
    choices: list[Choice] = []
    for count in rows:
        times = {}
        try:
            call = layer.call(count)
            for name, number in numbers.items():
                # Experts have no slices.
                for apart in (False,) if product.experts else (False, True):
                    torch.ops.vllm_plugin_tm.cuda_force_tile(number, apart)
                    times[name, apart] = device.seconds(call)
        except torch.OutOfMemoryError:
            break
        finally:
            torch.ops.vllm_plugin_tm.cuda_force_tile(-1, False)
        (tile, apart), seconds = min(times.items(), key=lambda item: item[1])
        if choices and (choices[-1].tile, choices[-1].apart) == (tile, apart):
            choices.pop()
        choices.append(Choice(count * layer.times, tile, apart, round(1e6 * seconds, 2)))
    return choices


def _choose(product: Product, choices: list[Choice], numbers: dict[str, int]) -> None:
    table = [[choice.rows, numbers[choice.tile], choice.apart] for choice in choices]
    torch.ops.vllm_plugin_tm.cuda_choose_tiles(
        torch.tensor([SCHEMES.index(product.scheme), *product[1:]]),
        torch.tensor(table, dtype=torch.int64).reshape(len(table), 3),
    )


def tune_loaded(model: torch.nn.Module, path: str, most_rows: int) -> None:
    """As tune, on the current GPU, for as many rows as the engine has at most, with a line in the
    log."""
    rows = (*(count for count in ROWS if count < most_rows), most_rows)
    measured, known = tune(model, Path(path), Gpu(), rows)
    logger.info(
        "vllm-plugin-tm chose tiles for %d kinds of layers by %s, of which %d were measured now",
        known,
        path,
        measured,
    )
