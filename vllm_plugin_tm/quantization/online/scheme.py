# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of the weights that are made while loading would have said of them: upstream's
configuration, and the type of their scales."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from vllm_plugin_tm.quantization.convert.config import scheme_of
from vllm_plugin_tm.quantization.convert.options import Options


def compressed(
    options: Options, group_size: int, target: str = "Linear"
) -> CompressedTensorsConfig:
    """Upstream's config of a checkpoint with such weights in modules of that class or name."""
    scheme = scheme_of(options, group_size, [target])
    return CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": options.weight_format,
            "ignore": [],
            "config_groups": {"group_0": scheme.model_dump(mode="json")},
        }
    )


def stored_dtype(model_config: Any) -> torch.dtype | None:
    """The type that the checkpoint says its weights have; None where it does not say."""
    found = getattr(model_config.hf_text_config, "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else None


def scale_dtype(weight: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """What scales are computed with: the weights' own type, which the converter stores them in.
    A float32 model has its weights exactly as the checkpoint does, and so its scales."""
    return (stored or weight) if weight == torch.float32 else weight
