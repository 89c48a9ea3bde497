# SPDX-License-Identifier: Apache-2.0
"""The quantization configs that `--quantization tm_…` names: which layers, by which method."""

from functools import cached_property
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.options import Options
from vllm_plugin_tm.quantization.convert.selection import matches, select
from vllm_plugin_tm.quantization.online.experts import online_experts
from vllm_plugin_tm.quantization.online.linear import OnlineLinearMethod
from vllm_plugin_tm.quantization.online.options import KEY, OnlineError, parse
from vllm_plugin_tm.quantization.online.scheme import compressed, scale_dtype, stored_dtype

# Any expert stands for all, and any projection of it for the others.
_EXPERT = "0.gate_proj"


class TMOnlineConfig(QuantizationConfig):
    """Base of the registered classes; `method` is the name of one."""

    method: str

    def __init__(self) -> None:
        super().__init__()
        self._matched: set[str] = set()

    def get_name(self) -> str:  # type: ignore[override]
        """As in `--quantization`."""
        return self.method

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Those of the kernels."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any: a CPU has no CUDA capability."""
        return -1

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """None: the options are vLLM's, not the checkpoint's."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TMOnlineConfig":
        """Raises OnlineError: a checkpoint that has a quantization is not for this."""
        raise OnlineError(_already(cls.method, config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Raises OnlineError where the user asks for this of a quantized checkpoint."""
        if user_quant == cls.method:
            raise OnlineError(_already(cls.method, hf_quant_cfg))

    @cached_property
    def options(self) -> Options:
        """What the user asked for; read when the first layer is built."""
        return parse(self.method, get_current_vllm_config().additional_config)

    @cached_property
    def _layers(self) -> int | None:
        model = get_current_vllm_config().model_config
        value = getattr(model.hf_text_config, "num_hidden_layers", None)
        return value if isinstance(value, int) else None

    @cached_property
    def _stored_dtype(self) -> torch.dtype | None:
        return stored_dtype(get_current_vllm_config().model_config)

    def scale_dtype(self, weight: torch.dtype) -> torch.dtype:
        """What scales of weights of that type are computed with."""
        return scale_dtype(weight, self._stored_dtype)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How the layer's weights are made and used; None leaves it to upstream.

        Raises OnlineError for wrong options, and where the modules that are fused in the layer
        would be treated differently.
        """
        _ = self._stored_dtype  # vLLM's configuration is at hand now, and not when weights arrive
        if isinstance(layer, LinearBase):
            reason = self.reason(prefix, self._members(prefix))
            if reason is not None:
                return _left(UnquantizedLinearMethod(), reason)
            return OnlineLinearMethod(self, prefix)
        if isinstance(layer, RoutedExperts):
            reason = self.reason(prefix, [f"{prefix}.{_EXPERT}"])
            if reason is not None:
                return _left(UnquantizedFusedMoEMethod(layer.moe_config), reason)
            inner = self.compressed(self.options.weight_group).get_quant_method(layer, prefix)
            return online_experts(inner, self, prefix)
        return None

    def reason(self, prefix: str, members: list[str]) -> str | None:
        """Why a layer that is made of these modules stays as it is; None for a quantized one."""
        options = self.options
        try:
            self._matched |= {
                pattern
                for pattern in (*options.ignore, *(options.targets or ()))
                if any(matches(member, pattern) for member in members)
            }
            choice = select(members, options, self._layers, lenient=True)
        except ConvertError as error:
            raise OnlineError(f"{prefix}: {error}") from None
        reasons = list(choice.kept.values())
        if reasons and choice.quantized:
            raise OnlineError(
                f"{prefix} is one layer in vLLM, but {choice.quantized[0]} would be quantized and "
                f"{next(iter(choice.kept))} would not ({reasons[0]}); quantize both or neither"
            )
        return reasons[0] if reasons else None

    def refuse_unmatched(self) -> None:
        """Raises OnlineError for a pattern that fitted no layer of the model that was built."""
        for option in ("ignore", "targets"):
            for pattern in getattr(self.options, option) or ():
                if pattern not in self._matched:
                    raise OnlineError(f"{KEY}.{option} pattern {pattern!r} matches no layer")

    def compressed(self, group_size: int) -> CompressedTensorsConfig:
        """Upstream's config of a checkpoint with such weights."""
        config = compressed(self.options, group_size)
        config.packed_modules_mapping = self.packed_modules_mapping
        return config

    def _members(self, prefix: str) -> list[str]:
        """The checkpoint's names of the modules that are fused in a layer."""
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{part}" if parent else part for part in parts]


def _left(method: Any, reason: str) -> Any:
    """A method of upstream's, with the reason for the layer table."""
    method.tm_note = reason
    return method


def _already(method: str, config: Any) -> str:
    found = config.get("quant_method") if isinstance(config, dict) else config
    return (
        f"--quantization {method} quantizes unquantized weights while they are loaded, but this "
        f"checkpoint is quantized already ({found}); serve it without --quantization"
    )


# Classes of the module, each under its name: a worker gets the config pickled.
class TMW4A16OnlineConfig(TMOnlineConfig):
    """--quantization tm_w4a16."""

    method = "tm_w4a16"


class TMW8A16OnlineConfig(TMOnlineConfig):
    """--quantization tm_w8a16."""

    method = "tm_w8a16"


class TMW4A8OnlineConfig(TMOnlineConfig):
    """--quantization tm_w4a8."""

    method = "tm_w4a8"


class TMW8A8OnlineConfig(TMOnlineConfig):
    """--quantization tm_w8a8."""

    method = "tm_w8a8"


class TMFp8OnlineConfig(TMOnlineConfig):
    """--quantization tm_fp8."""

    method = "tm_fp8"


class TMFp8BlockOnlineConfig(TMOnlineConfig):
    """--quantization tm_fp8_block."""

    method = "tm_fp8_block"


CLASSES: tuple[type[TMOnlineConfig], ...] = (
    TMW4A16OnlineConfig,
    TMW8A16OnlineConfig,
    TMW4A8OnlineConfig,
    TMW8A8OnlineConfig,
    TMFp8OnlineConfig,
    TMFp8BlockOnlineConfig,
)
"""One for each of METHODS."""
