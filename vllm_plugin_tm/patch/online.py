# SPDX-License-Identifier: Apache-2.0
"""Patch: the names of quantization while loading in upstream's table of methods."""

from vllm.model_executor.layers import quantization
from vllm.platforms import current_platform

from vllm_plugin_tm.quantization.online.config import CLASSES
from vllm_plugin_tm.quantization.online.options import METHODS


def install() -> None:
    """Registers a config class for each name, as upstream offers it to plugins."""
    known = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    for config in CLASSES:
        if config.method not in known:
            quantization.register_quantization_config(config.method)(config)


def remove() -> None:
    """Takes the names out again."""
    for method in METHODS:
        quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.pop(method, None)
        for names in (quantization.QUANTIZATION_METHODS, current_platform.supported_quantization):
            if method in names:
                names.remove(method)


def installed() -> bool:
    """Whether every name is there."""
    return all(method in quantization.QUANTIZATION_METHODS for method in METHODS)
