# SPDX-License-Identifier: Apache-2.0
"""A weight transfer backend for CPUs: the trainer writes safetensors files, the workers read them.

All of upstream's backends move tensors between GPUs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from vllm_plugin_tm.quantization import load_check
from vllm_plugin_tm.updates.update import UpdateError, refuse_together, update

BACKEND = "tm_safetensors"
"""As in --weight-transfer-config '{"backend": "tm_safetensors"}'."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed upon."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """`files`: paths of safetensors files with tensors under the checkpoint's names. They may be
    deleted when the call has returned, and must not be written to before the update is over."""

    files: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (
            not isinstance(self.files, list)
            or not self.files
            or not all(isinstance(file, str) for file in self.files)
        ):
            raise ValueError(
                f"update_info.files is {self.files!r}; a list of paths of safetensors files is "
                "allowed"
            )


class SafetensorsTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Collects files, and loads them when the update is finished: until then the model serves its
    old weights, so that requests may go on, and an update that is never finished changes nothing.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _files: dict[str, Any]
    """Name of a tensor -> the open file that has it."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Begins with no tensors."""
        self._files = {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Opens more files. Raises UpdateError, and drops those before, for a file that cannot be
        read or a tensor that was sent before."""
        # Upstream's own waits for an accelerator afterwards; there is none.
        cause: Exception | None = None
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            cause = error
        try:
            refuse_together(None if cause is None else str(cause), cause)
        except UpdateError:
            self._files = {}
            raise

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Opens the files; reads their headers only."""
        load_check.refuse_damaged(update_info.files)
        for file in update_info.files:
            opened = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                if name in self._files:
                    raise load_check.CheckpointError(f"{file}: {name} was sent before")
                self._files[name] = opened

    def finish_weight_update(self) -> None:
        """Loads all that was sent. Raises UpdateError, with the old weights in place, for whatever
        does not fit."""
        files, self._files = self._files, {}
        with update(self.model) as current:
            initialize_layerwise_reload(self.model)
            model: Any = self.model
            model.load_weights(current.checked(_tensors(files)))
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held between updates."""
        self._files = {}


def _tensors(files: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, file in files.items():
        yield name, file.get_tensor(name)
