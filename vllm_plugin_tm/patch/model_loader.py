# SPDX-License-Identifier: Apache-2.0
"""Patch: the loaders refuse incomplete and damaged checkpoints, and log the layer table."""

import logging
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any

import torch
from vllm.model_executor import model_loader
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload.layerwise import (
    get_layerwise_info,
    initialize_online_processing,
)

from vllm_plugin_tm import envs, heap, layer_table, machine
from vllm_plugin_tm.quantization import fused_parts, load_check
from vllm_plugin_tm.quantization.online.config import TMOnlineConfig
from vllm_plugin_tm.quantization.online.head import quantize_head
from vllm_plugin_tm.quantization.online.options import refuse_without_method
from vllm_plugin_tm.tuning.measure import tune_loaded
from vllm_plugin_tm.updates import update as updates

logger = logging.getLogger("vllm.plugin_tm")


class _LayerTable(BaseModelLoader):
    """Names the layer that could not be built; logs the layer table when a model is complete."""

    def load_model(
        self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        refuse_without_method(vllm_config.additional_config, model_config.quantization)
        try:
            with heap.reusing():
                model = super().load_model(vllm_config, model_config, *args, **kwargs)
        except load_check.CheckpointError:
            raise  # names everything already
        except ValueError as error:
            layer = _layer_in(error.__traceback__)
            if layer is None:
                raise
            which = "" if layer.prefix in str(error) else f"layer {layer.prefix}: "
            why = fused_parts.disagreement(vllm_config.quant_config, layer)
            if not which and not why:
                raise
            raise ValueError(f"{which}{error} {why}".rstrip()) from error
        rows = layer_table.collect(model)
        layer_table.remember(rows)
        logger.info("%s", layer_table.render(rows))
        if envs.cuda_tuning() and machine.device() == "cuda":
            most_rows = vllm_config.scheduler_config.max_num_batched_tokens
            tune_loaded(model, envs.cuda_tuning(), most_rows)
        return model

    def create_model(
        self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        model = super().create_model(vllm_config, model_config, *args, **kwargs)
        quantize_head(model, vllm_config, model_config)
        if isinstance(vllm_config.quant_config, TMOnlineConfig):
            vllm_config.quant_config.refuse_unmatched()
        fused_parts.refuse_schemes(model, vllm_config.quant_config)
        for module in model.modules():
            if layer_table.is_online(module):
                # Again: a bias is registered after the weight, and one that is loaded first would
                # not be counted, so that the layer waits for it until all others are loaded.
                initialize_online_processing(module)
        for layer in layer_table.watched(model):
            load_check.count_shapes(layer)
        return model


class _Checked(DefaultModelLoader):
    """Refuses damaged files before, misfits while, and missing tensors after reading weights."""

    _model: torch.nn.Module | None = None
    _reading = ""
    _sources: Mapping[str, load_check.Layer] = {}
    _found: dict[str, updates.Found]

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_weights(*args, **kwargs)
        _folder, files, use_safetensors, *_rest = found
        if use_safetensors:
            dtypes = load_check.refuse_damaged(files)
            if self._model is not None:
                fused_parts.refuse_tensors(self._model, dtypes)
        return found

    def get_all_weights(
        self, *args: Any, **kwargs: Any
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        model = kwargs["model"] if "model" in kwargs else args[1]
        weights = super().get_all_weights(*args, **kwargs)
        current = updates.running(model)
        if current is not None:
            yield from current.checked(weights)
            return
        self._found = {}
        for name, tensor in weights:
            found = self._found[name] = updates.Found.of(tensor)
            self._reading = f"{name} ({found})"
            load_check.refuse_unfit(name, tensor, self._sources)
            yield name, tensor

    def load_weights(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        layers = layer_table.watched(model)
        marked = load_check.mark(layers)
        self._sources = {source: layer for layer in layers for source, _ in layer.sources}
        self._reading = ""
        self._model = model
        try:
            super().load_weights(model, *args, **kwargs)
        except load_check.CheckpointError:
            raise
        except Exception as error:
            if not self._reading:
                raise
            # Upstream's loaders assert shapes and look names up without saying whose.
            raise load_check.CheckpointError(
                f"the checkpoint's tensor {self._reading} does not fit the model: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            self._sources = {}
            self._model = None
        load_check.refuse_missing(marked)
        _refuse_half_loaded(model)
        updates.expect(model, self._found)


class _Settled(DummyModelLoader):
    """Random numbers in the place of weights are brought into the range that weights have."""

    def load_weights(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().load_weights(model, *args, **kwargs)
        for module in model.modules():
            kernel = layer_table.tm_kernel_of(module)
            if kernel is not None:
                kernel.settle_dummy(module)


def _refuse_half_loaded(model: torch.nn.Module) -> None:
    """Layers that wait for weights when all have been read would be made of unwritten memory."""
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if not layer_table.is_online(module) or not info.can_load():
            continue
        if info.load_numel < (info.load_numel_total or 0):
            raise load_check.CheckpointError(
                f"layer {name}: the checkpoint has {info.load_numel} of its "
                f"{info.load_numel_total} weights; tensors are missing"
            )


def _layer_in(traceback: TracebackType | None) -> LinearBase | None:
    """The linear layer in whose construction an error arose. Upstream's "failed to find a
    kernel" does not name it, and at that time no model that could be asked exists."""
    layer = None
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, LinearBase) and getattr(owner, "prefix", None):
            layer = owner
        traceback = traceback.tb_next
    return layer


def _subclass(base: type[BaseModelLoader], *mixins: type[Any]) -> type[BaseModelLoader]:
    """A subclass of the live `base` under the name of `base`, which some code compares."""
    return type(base.__name__, (*mixins, base), {"__doc__": base.__doc__, "__module__": __name__})


# upstream's class -> ours
_REPLACEMENTS: dict[type[BaseModelLoader], type[BaseModelLoader]] = {
    DefaultModelLoader: _subclass(DefaultModelLoader, _LayerTable, _Checked),
    DummyModelLoader: _subclass(DummyModelLoader, _LayerTable, _Settled),
}


def install() -> None:
    """Every load format that names one of the two classes gets ours. Others stay."""
    _swap(_REPLACEMENTS)


def remove() -> None:
    """Puts upstream's classes back."""
    _swap({ours: upstream for upstream, ours in _REPLACEMENTS.items()})


def installed() -> bool:
    """Whether no load format names upstream's classes any more, and some name ours."""
    present = set(model_loader._LOAD_FORMAT_TO_MODEL_LOADER.values())
    return not present & set(_REPLACEMENTS) and set(_REPLACEMENTS.values()) <= present


def _swap(new: dict[type[BaseModelLoader], type[BaseModelLoader]]) -> None:
    # In place: upstream's chooser holds the table by its name, others may hold the object.
    table = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    for load_format, loader in table.items():
        table[load_format] = new.get(loader, loader)
