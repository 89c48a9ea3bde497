# SPDX-License-Identifier: Apache-2.0
"""Routed experts of compressed-tensors checkpoints: what the methods share. The files are named as
upstream names its methods."""

from abc import abstractmethod
from typing import Any

from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod
from vllm_plugin_tm.quantization.support_matrix import MoeRequest


class TMCompressedTensorsExperts(TMExpertsMethod):
    """Mixed in before a subclass of CompressedTensorsMoEMethod."""

    def __init__(
        self, weight_quant: Any, input_quant: Any, moe: Any, layer_name: str | None = None
    ) -> None:
        def upstream() -> None:
            super(TMCompressedTensorsExperts, self).__init__(  # type: ignore[call-arg]
                weight_quant, input_quant, moe, layer_name
            )

        self.per_token = input_quant is not None
        if self._begin(moe, self._request(weight_quant, input_quant, moe), upstream):
            self.weight_quant, self.input_quant = weight_quant, input_quant
            self._adopt(weight_quant, moe)

    @abstractmethod
    def _request(self, weight_quant: Any, input_quant: Any, moe: Any) -> MoeRequest | str:
        """What the checkpoint's arguments ask for, or why it is nothing of ours."""

    @abstractmethod
    def _adopt(self, weight_quant: Any, moe: Any) -> None:
        """Sets the attributes that upstream's create_weights reads."""
