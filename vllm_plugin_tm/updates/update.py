# SPDX-License-Identifier: Apache-2.0
"""One update of a model's weights: what arrives is looked at, and what fails is taken back.

Upstream reloads layer by layer into the tensors that serve, so that a tensor that is refused comes
too late: half of the model is new by then. Here the old weights are kept until all is well.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vllm_plugin_tm import heap, layer_table
from vllm_plugin_tm.quantization import load_check
from vllm_plugin_tm.updates.backup import Backup


class UpdateError(load_check.CheckpointError):
    """The update was refused; the weights are those from before it."""


@dataclass(frozen=True)
class Found:
    """What a checkpoint has under a name."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Found":
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}, shape {self.shape}"


# model -> what its first load found, by name: every update must bring as much. A model that began
# with dummy weights has none until its first update.
_expected: WeakKeyDictionary[torch.nn.Module, dict[str, Found]] = WeakKeyDictionary()
_running: WeakKeyDictionary[torch.nn.Module, "Update"] = WeakKeyDictionary()


def expect(model: torch.nn.Module, found: dict[str, Found]) -> None:
    """Keeps what the model's weights were loaded from."""
    _expected[model] = found


def running(model: torch.nn.Module) -> "Update | None":
    """The update that the model is in, for those who read its weights."""
    return _running.get(model)


@contextmanager
def update(model: torch.nn.Module) -> Iterator["Update"]:
    """Around the whole of an update; the weights must come through `Update.checked`.

    Whatever is raised inside takes the update back, in every worker of the model. Raises
    UpdateError for it, naming tensor and layer. Holds a second copy of the weights meanwhile.
    """
    with heap.reusing():
        old = Backup(model)
        current = _running[model] = Update(model)
        cause: Exception | None = None
        try:
            try:
                yield current
            except Exception as error:
                cause = error
            refuse_together(None if cause is None else current.reason(cause), cause)
            _expected[model] = current.found
        except BaseException:
            old.restore()
            raise
        finally:
            del _running[model], old


class Update:
    """What has arrived of an update so far."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._expected = _expected.get(model)
        self._places = _Places(model)
        self._layers = layer_table.watched(model)
        self._reading = ""
        self.found: dict[str, Found] = {}

    def checked(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes the tensors on, each looked at.

        Raises CheckpointError naming tensor and layer for another shape or kind of number than
        the weights before had, for what is infinite or not a number, and, at the end, for tensors
        that did not come.
        """
        sources = {source: layer for layer in self._layers for source, _ in layer.sources}
        for name, tensor in weights:
            found = Found.of(tensor)
            self._reading = f"{self._places.say(name)} ({found})"
            self._refuse_other(name, found)
            load_check.refuse_unfit(name, tensor, sources)
            self._refuse_no_numbers(name, tensor)
            self.found[name] = found
            yield name, tensor
        self._reading = ""
        self._refuse_missing()

    def reason(self, error: Exception) -> str:
        """`error` in the words that whoever asked for the update should read."""
        if self._reading and not isinstance(error, load_check.CheckpointError):
            # Upstream's loaders assert shapes and look names up without saying whose.
            return f"at {self._reading}: {type(error).__name__}: {error}"
        return str(error) or type(error).__name__

    def _refuse_other(self, name: str, found: Found) -> None:
        before = (self._expected or {}).get(name)
        if before is None:
            return
        exact = not before.dtype.is_floating_point or not found.dtype.is_floating_point
        if found.shape != before.shape or (exact and found.dtype != before.dtype):
            raise load_check.CheckpointError(
                f"{self._places.say(name)}: expected {before}, found {found}"
            )

    def _refuse_no_numbers(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            return
        # One pass and no mask: a sum with such a number in it is one itself.
        if torch.isfinite(tensor.sum()):
            return
        bad = (~torch.isfinite(tensor)).nonzero()
        if len(bad):
            place = tuple(bad[0].tolist())
            raise load_check.CheckpointError(
                f"{self._places.say(name)}: {len(bad)} of {tensor.numel()} numbers are infinite "
                f"or not a number, the first is {float(tensor[place])} at {list(place)}"
            )

    def _refuse_missing(self) -> None:
        if self._expected is None:
            self._refuse_half_loaded()
            return
        brought = {self._places.find(name) for name in self.found}
        missing = [name for name in self._expected if name not in self.found]
        needed = [
            name
            for name in missing
            if (place := self._places.find(name)) is not None and place not in brought
        ]
        if needed:
            load_check.raise_missing([self._places.say(name) for name in needed], "update")

    def _refuse_half_loaded(self) -> None:
        """Without names to compare: layers of ours that wait for more would keep what they have,
        or be made of unwritten memory."""
        infos = {
            name: get_layerwise_info(module)
            for name, module in self._model.named_modules()
            if layer_table.tm_kernel_of(module) is not None or layer_table.is_online(module)
        }
        if not any(info.load_numel or not info.can_load() for info in infos.values()):
            return  # a model whose loader reads everything before it loads anything
        lines = [
            f"layer {name}: {info.load_numel} of its {info.load_numel_total} weights came"
            for name, info in infos.items()
            if info.can_load() and info.load_numel < (info.load_numel_total or 0)
        ]
        if lines:
            load_check.raise_missing(lines, "update")


class _Places:
    """Where the tensors of a checkpoint go. To be made while the model serves."""

    def __init__(self, model: torch.nn.Module) -> None:
        fused = getattr(model, "packed_modules_mapping", None) or {}
        # Without removing duplicates: a tied module has two names.
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._fused: dict[str, str] = {}
        self._experts: dict[str, str] = {}
        for name, module in self._modules.items():
            parent, _, leaf = name.rpartition(".")
            for part in fused.get(leaf, ()):
                self._fused.setdefault(f"{parent}.{part}" if parent else part, name)
            if isinstance(module, RoutedExperts):
                self._experts[str(getattr(module, "layer_name", name))] = name
        self._params = {
            name: {**get_layerwise_info(module).restore_metadata[0], **module._parameters}
            for name, module in self._modules.items()
        }

    def find(self, name: str) -> object | None:
        """What the tensor fills: the same for two names of one parameter; None for a tensor that
        no parameter takes."""
        source, _, leaf = name.rpartition(".")
        layer = self._layer(source)
        if layer is None:
            return None
        if source != layer:
            return name
        param = self._params[layer].get(leaf)
        return None if param is None else id(param)

    def say(self, name: str) -> str:
        """The tensor's name, and that of its layer where it is another."""
        source = name.rpartition(".")[0]
        layer = self._layer(source)
        return f"{name} (layer {layer})" if layer not in (None, source) else name

    def _layer(self, source: str) -> str | None:
        if source in self._fused:
            return self._fused[source]
        if source in self._modules:
            return source
        while source:
            if source in self._experts:
                return self._experts[source]
            source = source.rpartition(".")[0]
        return None


def refuse_together(reason: str | None, cause: Exception | None) -> None:
    """Raises UpdateError where any of the workers that have a part of the model has a reason to
    refuse an update. Each of them must call it."""
    for group in (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            reasons: list[str | None] = [None] * group.world_size
            torch.distributed.all_gather_object(reasons, reason, group=group.cpu_group)
            reason = next((each for each in reasons if each is not None), None)
    if reason is not None:
        raise UpdateError(f"weights not updated, the old ones still serve: {reason}") from cause
