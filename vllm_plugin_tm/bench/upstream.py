# SPDX-License-Identifier: Apache-2.0
"""vLLM's own CPU kernels as peers, each prepared and called by the class that vLLM would choose for
the scheme's checkpoints without this plugin."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vllm_plugin_tm.bench.cases import UPSTREAM, UPSTREAM_W8A8, Format
from vllm_plugin_tm.bench.peers import Apply, Peer, Rounding, UnavailableError
from vllm_plugin_tm.bench.weights import Weights, random_weights, repeated, tensor_bytes
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

# Upstream's W4A8 is a reference loop on x86: 16 ms for one row of 4096 x 4096, and linear in rows.
_W4A8_MOST_ROWS = 4

_PACKED = ("weight_packed", "weight_scale", "weight_zero_point")
_FP8 = ("weight", "weight_scale", "input_scale", "input_scale_ub")
_INT8 = ("weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj")

_NONE = "vLLM has no such kernel for a CPU and refuses such checkpoints"
_REFUSED = {
    "fp8-block": "of CPUs vLLM has kernels for AMX only, which are not measured",
    "fp8-w8a16": _NONE,
    "mxfp4": _NONE,
    "nvfp4": _NONE,
}


def upstream(weights: Weights, llc_bytes: int) -> Peer:
    """Upstream's kernel for the weights' scheme.

    Raises:
        UnavailableError: vLLM is missing, or its kernel does not take this format.
    """
    facts = weights.format.facts
    if facts.name in _REFUSED:
        raise UnavailableError(f"upstream: {facts.title}: {_REFUSED[facts.name]}")
    make = {
        "w4a16": _wna16,
        "w8a16": _wna16,
        "w4a8": _w4a8,
        "w8a8": _w8a8,
        "fp8-w8a8": _fp8,
    }[facts.name]
    try:
        return make(weights, llc_bytes)
    except ImportError as error:
        raise UnavailableError(f"upstream's kernel cannot be imported: {error}") from error


def upstream_w8a8(weights: Weights, llc_bytes: int) -> Peer:
    """Upstream's W8A8 kernel on random int8 weights of the same shape: what a user with 8-bit
    activations would run instead of W4A8.

    Raises:
        UnavailableError: as `upstream`.
    """
    form = Format(CHANNEL, True, weights.format.dtype, "w8a8")
    twin = random_weights(weights.n, weights.k, form)
    return replace(upstream(twin, llc_bytes), name=UPSTREAM_W8A8)


def _wna16(weights: Weights, llc_bytes: int) -> Peer:
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.scalar_type import scalar_types

    form = weights.format
    if form.dtype == "f32":
        # Its can_implement does not look at the dtype; the kernel then fails when called.
        raise UnavailableError(f"upstream's {form.facts.title} kernel takes bf16 and f16 only")
    types = {
        (4, True): scalar_types.uint4b8,
        (4, False): scalar_types.uint4,
        (8, True): scalar_types.uint8b128,
        (8, False): scalar_types.uint8,
    }
    config = _config(weights, types[form.facts.weight_bits, form.symmetric], form.group_size)
    kernel = _accepted(CPUWNA16LinearKernel, config, form)(config, *_PACKED)
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        # Its can_implement does not look: the op is in vLLM's AVX-512 library only.
        raise UnavailableError(
            f"upstream: {form.facts.title}: vLLM's library for this processor has no cpu_gemm_wna16"
        )
    layer = _layer(
        weight_packed=(weights.codes, {"input_dim": 1, "output_dim": 0, "packed_dim": 1}),
        weight_scale=(weights.scale, {"input_dim": 1, "output_dim": 0}),
        weight_zero_point=(
            weights.zero_point,
            {"input_dim": 1, "output_dim": 0, "packed_dim": 0},
        ),
    )
    kernel.process_weights_after_loading(layer)
    return _peer_of_layer(kernel, layer, _PACKED, weights, llc_bytes)


def _w4a8(weights: Weights, llc_bytes: int) -> Peer:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from vllm.model_executor.kernels.linear.mixed_precision.dynamic_4bit import (
        Dynamic4bitLinearKernel,
    )
    from vllm.scalar_type import scalar_types

    form, shape = weights.format, torch.Size((weights.n, weights.k))
    if not form.symmetric:
        # Its can_implement does not look at zero points; the kernel then ignores them.
        raise UnavailableError("upstream's W4A8 kernel takes symmetric weights only")
    group = weights.k if form.group_size == CHANNEL else form.group_size
    config = _config(weights, scalar_types.int4, group)
    kernel = _accepted(Dynamic4bitLinearKernel, config, form)(config, *_PACKED[:2], None)
    layer = _layer(
        weight_packed=(unpack_from_int32(weights.codes, 4, shape), {}),
        weight_scale=(weights.scale, {}),
    )
    kernel.process_weights_after_loading(layer)
    peer = _peer_of_layer(kernel, layer, _PACKED[:2], weights, llc_bytes)
    return replace(peer, rounding=Rounding.OWN, most_rows=_W4A8_MOST_ROWS)


def _w8a8(weights: Weights, llc_bytes: int) -> Peer:
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
        Int8ScaledMMLinearLayerConfig,
    )

    config = Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=False,
        is_channelwise=True,
        input_symmetric=weights.format.symmetric,
    )
    kernel_class = _accepted(CPUInt8ScaledMMLinearKernel, config, weights.format)
    supported, reason = kernel_class.is_supported()
    if not supported:
        raise UnavailableError(f"upstream: W8A8: {reason}")

    def prepared() -> tuple[Any, torch.nn.Module]:
        """The weights go into a handle that the kernel object owns, so a copy is a new pair."""
        kernel = kernel_class(config, _INT8)
        layer = _layer(
            weight=(weights.codes, {}),
            weight_scale=(weights.scale, {}),
            input_scale=(None, {}),
            input_zero_point=(None, {}),
            azp_adj=(None, {}),
        )
        setattr(layer, "logical_widths", [weights.n])  # noqa: B010 - no type that fits
        before = torch.get_default_dtype()
        torch.set_default_dtype(weights.dtype)  # as in service: it becomes the dtype of y
        try:
            kernel.process_weights_after_loading(layer)
        finally:
            torch.set_default_dtype(before)
        return kernel, layer

    kernel, layer = prepared()
    if weights.dtype is not torch.bfloat16 and kernel.linear_method == kernel._apply_weights_sgl:
        # Thrown on a thread of OpenMP, where nothing can catch it.
        raise UnavailableError("upstream: W8A8: its AMX kernel takes bf16 only or ends the process")
    # The handle keeps the int8 weights in a layout of its own, of the same size; where the class
    # keeps them in the layer, that is None no more and counted with the rest.
    held = 0 if layer.weight is not None else tensor_bytes(weights.codes)
    size = held + sum(tensor_bytes(getattr(layer, name)) for name in _INT8)
    pairs = [(kernel, layer), *repeated(prepared, size, llc_bytes)]
    applies = tuple(_apply(kernel, layer) for kernel, layer in pairs)
    # Each handle makes a product of oneDNN for each number of rows.
    return Peer(UPSTREAM, "", weights, size, applies, Rounding.OWN, lazy=True)


def _fp8(weights: Weights, llc_bytes: int) -> Peer:
    """The product of torch, with vLLM's rounding of x before it and both scales after it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels.linear.scaled_mm.pytorch import (
        ChannelWiseTorchFP8ScaledMMLinearKernel,
    )
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
        FP8ScaledMMLinearLayerConfig,
    )
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        kFp8DynamicTokenSym,
        kFp8StaticChannelSym,
    )

    config = FP8ScaledMMLinearLayerConfig(
        weight_quant_key=kFp8StaticChannelSym,
        activation_quant_key=kFp8DynamicTokenSym,
        weight_shape=(weights.n, weights.k),
        input_dtype=weights.dtype,
        out_dtype=weights.dtype,
    )
    kernel_class = _accepted(ChannelWiseTorchFP8ScaledMMLinearKernel, config, weights.format)
    supported, reason = kernel_class.is_supported()
    if not supported:
        raise UnavailableError(f"upstream: {weights.format.facts.title}: {reason}")
    # Its rounding of x is compiled by vLLM's default, as in service.
    with set_current_vllm_config(VllmConfig()):
        kernel = kernel_class(config, _FP8)
    layer = _layer(
        weight=(weights.codes.t(), {}),  # the scheme hands over this view of the rows
        weight_scale=(weights.scale, {}),
        input_scale=(None, {}),
        input_scale_ub=(None, {}),
    )
    kernel.process_weights_after_loading(layer)
    peer = _peer_of_layer(kernel, layer, _FP8, weights, llc_bytes)
    try:
        peer.applies[0](torch.zeros(1, weights.k, dtype=weights.dtype))
    except Exception as error:  # without a C++ compiler torch raises one of many
        first = str(error).strip().partition("\n")[0]
        raise UnavailableError(
            f"upstream: {weights.format.facts.title}: its rounding of activations cannot be "
            f"compiled here: {type(error).__name__}: {first}"
        ) from error
    # The rounding is compiled again for some batch sizes.
    return replace(peer, rounding=Rounding.CHECKPOINT, lazy=True)


def _config(weights: Weights, weight_type: Any, group_size: int) -> Any:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )

    return MPLinearLayerConfig(
        full_weight_shape=(weights.k, weights.n),
        partition_weight_shape=(weights.k, weights.n),
        weight_type=weight_type,
        act_type=weights.dtype,
        group_size=group_size,
        zero_points=not weights.format.symmetric,
    )


def _accepted(kernel_class: Any, config: Any, form: Format) -> Any:
    able, reason = kernel_class.can_implement(config)
    if not able:
        raise UnavailableError(f"upstream: {form.facts.title}: {reason}")
    return kernel_class


def _peer_of_layer(
    kernel: Any, layer: torch.nn.Module, names: tuple[str, ...], weights: Weights, llc_bytes: int
) -> Peer:
    """A peer whose prepared weights are parameters of its layer."""
    size = sum(tensor_bytes(getattr(layer, name, None)) for name in names)
    layers = [layer, *repeated(lambda: _copy_of(layer, names), size, llc_bytes)]
    return Peer(UPSTREAM, "", weights, size, tuple(_apply(kernel, layer) for layer in layers))


def _apply(kernel: Any, layer: torch.nn.Module) -> Apply:
    call: Callable[[torch.nn.Module, Tensor], Tensor] = kernel.apply_weights
    return lambda x: call(layer, x)


def _layer(**tensors: tuple[Tensor | None, dict[str, int]]) -> torch.nn.Module:
    """A layer as vLLM's compressed-tensors scheme leaves it for the kernel class: parameters with
    the attributes of its loader, None where a checkpoint has no such tensor, no bias."""
    layer = torch.nn.Module()
    for name, (tensor, attributes) in tensors.items():
        parameter = None
        if tensor is not None:
            parameter = torch.nn.Parameter(tensor.clone(), requires_grad=False)
            for attribute, value in attributes.items():
                setattr(parameter, attribute, value)
        layer.register_parameter(name, parameter)
    layer.register_parameter("bias", None)
    return layer


def _copy_of(layer: torch.nn.Module, names: tuple[str, ...]) -> torch.nn.Module:
    """A prepared layer's twin in other memory, whatever else the class has set on it."""
    twin = torch.nn.Module()
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            setattr(twin, name, value)
    for name in names:
        tensor = getattr(layer, name, None)
        twin.register_parameter(name, None if tensor is None else _cloned(tensor))
    twin.register_parameter("bias", None)
    return twin


def _cloned(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.data.clone(), requires_grad=False)
