# SPDX-License-Identifier: Apache-2.0
"""Patch: subclasses of upstream's methods for routed experts, under the same names in their
modules, from which upstream imports them when a layer is built."""

from importlib import import_module

from vllm_plugin_tm.quantization import auto_awq, auto_gptq
from vllm_plugin_tm.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a8_int8,
    compressed_tensors_moe_w8a8_int8,
    compressed_tensors_moe_wna16,
)
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod

_Q = "vllm.model_executor.layers.quantization"
_CT = f"{_Q}.compressed_tensors.compressed_tensors_moe"

# module of upstream's, name of the class, what goes before it
_MIXINS: tuple[tuple[str, str, type[TMExpertsMethod]], ...] = (
    (
        f"{_CT}.compressed_tensors_moe_wna16",
        "CompressedTensorsWNA16MoEMethod",
        compressed_tensors_moe_wna16.TMWNA16Experts,
    ),
    (
        f"{_CT}.compressed_tensors_moe_w8a8_int8",
        "CompressedTensorsW8A8Int8MoEMethod",
        compressed_tensors_moe_w8a8_int8.TMW8A8Int8Experts,
    ),
    (
        f"{_CT}.compressed_tensors_moe_w4a8_int8",
        "CompressedTensorsW4A8Int8MoEMethod",
        compressed_tensors_moe_w4a8_int8.TMW4A8Int8Experts,
    ),
    (f"{_Q}.auto_gptq", "AutoGPTQMoEMethod", auto_gptq.TMGPTQExperts),
    (f"{_Q}.auto_awq", "AutoAWQMoEMethod", auto_awq.TMAWQExperts),
)


def install() -> None:
    """Every class that is upstream's own becomes a subclass of it."""
    for module_name, name, mixin in _MIXINS:
        module = import_module(module_name)
        live = getattr(module, name)
        if not issubclass(live, TMExpertsMethod):
            # The loader compares the name of a method's class.
            setattr(module, name, type(name, (mixin, live), {"__module__": __name__}))


def remove() -> None:
    """Puts upstream's classes back."""
    for module_name, name, _ in _MIXINS:
        module = import_module(module_name)
        live = getattr(module, name)
        if issubclass(live, TMExpertsMethod):
            setattr(module, name, live.__bases__[-1])


def installed() -> bool:
    """Whether all classes are ours."""
    return all(
        issubclass(getattr(import_module(module_name), name), TMExpertsMethod)
        for module_name, name, _ in _MIXINS
    )
