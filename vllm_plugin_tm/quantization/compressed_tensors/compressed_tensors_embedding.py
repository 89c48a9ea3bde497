# SPDX-License-Identifier: Apache-2.0
"""Input embeddings with packed weights. Upstream gathers their rows by a Triton kernel, which a CPU
has none of."""

from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none

from vllm_plugin_tm.quantization.support_matrix import WORD_BITS


class TMEmbeddingWNA16:
    """Mixed in before CompressedTensorsEmbeddingWNA16Int. The rows that are looked up are unpacked,
    no others."""

    num_bits: int

    def __init__(self, weight_quant: Any) -> None:
        if WORD_BITS % weight_quant.num_bits or not weight_quant.symmetric:
            raise ValueError(
                f"embeddings of {weight_quant.num_bits} bits, symmetric={weight_quant.symmetric}: "
                "supported are 2, 4 and 8 bits, symmetric"
            )
        if _tied():
            raise ValueError(
                "packed embeddings that the output head shares (tie_word_embeddings is true): the "
                "head multiplies by them in another layout; supported are checkpoints with an "
                "lm_head of its own, packed or not, and tie_word_embeddings false, or embeddings "
                "that are not packed"
            )
        super().__init__(weight_quant)  # type: ignore[call-arg]

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        """Rows input_ [...] of weight_packed int32 [V, H * bits / 32] times weight_scale [V, G]:
        [..., H] in the scales' dtype, multiplied in float32."""
        ids = input_.reshape(-1)
        scale = layer.weight_scale[ids].float()  # type: ignore[index]
        words = layer.weight_packed[ids]  # type: ignore[index]
        hidden = words.shape[1] * (WORD_BITS // self.num_bits)
        codes = unpack_from_int32(words, self.num_bits, torch.Size((ids.shape[0], hidden)))
        groups = codes.float().unflatten(1, (scale.shape[1], -1))
        rows = (groups * scale.unsqueeze(-1)).to(layer.weight_scale.dtype)
        return rows.reshape(*input_.shape, hidden)


def _tied() -> bool:
    """Whether the model that is being built uses its input embeddings as its output head, too."""
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return False
    return bool(getattr(config.model_config.hf_text_config, "tie_word_embeddings", False))
