# SPDX-License-Identifier: Apache-2.0
"""Patch: a backend for CPUs in upstream's registry of weight transfer."""

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from vllm_plugin_tm.updates.engine import BACKEND, SafetensorsTransferEngine


def install() -> None:
    """Registers the backend, as upstream offers it to plugins."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SafetensorsTransferEngine)


def remove() -> None:
    """Takes the name out again."""
    WeightTransferEngineFactory._registry.pop(BACKEND, None)


def installed() -> bool:
    """Whether the name is there."""
    return BACKEND in WeightTransferEngineFactory._registry
