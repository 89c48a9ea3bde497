# SPDX-License-Identifier: Apache-2.0
"""A copy of a model's tensors, and of what upstream hangs on its modules, to go back to."""

from typing import Any

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vllm_plugin_tm.kernels import ops

_TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set")


class Backup:
    """Takes as much memory as the model's parameters and buffers have, and keeps their addresses:
    compiled code may hold them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules: list[tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]] = []
        # By address: tied parameters and views of one memory are copied once.
        self._bytes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for module in model.modules():
            tables = {name: module.__dict__[name].copy() for name in _TABLES}
            self._modules.append((module, module.__dict__.copy(), tables))
            for table in (module._parameters, module._buffers):
                for tensor in table.values():
                    if tensor is not None and not tensor.is_meta:
                        self._keep(tensor)

    def restore(self) -> None:
        """Puts the tensors back where they were, with the bits that they had, and ends whatever
        loading had begun."""
        for module, attributes, tables in self._modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in tables.items():
                # In place: others may hold the table.
                live = module.__dict__[name]
                live.clear()
                live.update(content)
            get_layerwise_info(module).reset()
        for live, kept in self._bytes.values():
            live.copy_(kept)

    def _keep(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._bytes:
            live = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            kept = torch.empty_like(live)
            ops.advise_huge_pages(kept)
            self._bytes[storage.data_ptr()] = (live, kept.copy_(live))
