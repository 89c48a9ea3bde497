# SPDX-License-Identifier: Apache-2.0
"""Patch: the worker's updates of weights are all or nothing for models with layers of ours, and
it serves no head of 16 bits where the options say otherwise."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_plugin_tm import layer_table, machine
from vllm_plugin_tm.patch.class_swap import ClassSwap
from vllm_plugin_tm.quantization.online.head import refuse_left
from vllm_plugin_tm.updates.update import UpdateError, update

logger = logging.getLogger("vllm.plugin_tm")

# What upstream changes in the model's config before it reads the first tensor.
_SOURCE = ("model", "model_weights", "revision")


class TMWorker:
    """Mixed in before the live worker class."""

    rank: int
    model_runner: Any
    vllm_config: Any
    weight_transfer_engine: Any
    _weight_update_active: bool

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """As upstream's. Raises OnlineError where the loader has left a head that the options would
        have quantized."""
        super().load_model(load_dummy_weights=load_dummy_weights)  # type: ignore[misc]
        refuse_left(self.model_runner.get_model(), self.vllm_config)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """As upstream's. Raises UpdateError, with the old weights in place, for whatever does not
        fit; that of the model's config which names where they are from is then as it was, too."""
        self._reload(*args, **kwargs)

    def _reload(
        self,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        arguments = (weights_path, is_checkpoint_format)
        model = self.model_runner.get_model()
        if not layer_table.has_tm_layers(model):
            super().reload_weights(weights_iterator, *arguments)  # type: ignore[misc]
            return
        config = self.vllm_config.model_config
        before = {name: getattr(config, name) for name in _SOURCE if hasattr(config, name)}
        with self._told_once():
            try:
                with update(model) as current:
                    if weights_iterator is not None and is_checkpoint_format:
                        weights_iterator = current.checked(weights_iterator)
                    super().reload_weights(weights_iterator, *arguments)  # type: ignore[misc]
            except BaseException:
                for name, value in before.items():
                    setattr(config, name, value)
                raise

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """As upstream's."""
        with self._told_once():
            super().update_weights(update_info)  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        """As upstream's, which would take a refused update for one that still goes on."""
        with self._told_once():
            try:
                super().finish_weight_update()  # type: ignore[misc]
            except UpdateError:
                self.weight_transfer_engine.reset_weight_update_target()
                self._weight_update_active = False
                raise

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        """All workers refuse an update together, and the last of them says so. vLLM's executor
        stops reading replies at the first error, and would take the replies of the workers behind
        it for those to its next call."""
        try:
            yield
        except UpdateError as error:
            if self.rank < self.vllm_config.parallel_config.world_size - 1:
                logger.warning("%s", error)
                return
            raise


SWAPS = {
    "cpu": ClassSwap("vllm.v1.worker.cpu_worker", "CPUWorker", TMWorker),
    "cuda": ClassSwap("vllm.v1.worker.gpu_worker", "Worker", TMWorker),
}


def install() -> None:
    """The worker of this process's device becomes a subclass of it."""
    SWAPS[machine.device()].install()


def remove() -> None:
    """Puts upstream's class back."""
    SWAPS[machine.device()].remove()


def installed() -> bool:
    """Whether upstream would find ours."""
    return SWAPS[machine.device()].installed()
