# SPDX-License-Identifier: Apache-2.0
"""Which product a mixed-precision layer runs: kept activations, or activations rounded to int8.

Upstream's configuration of a mixed-precision layer is silent about activations; the layer's scheme
knows what the checkpoint asks for. The decision depends on the configuration only, never on x.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from vllm_plugin_tm import envs
from vllm_plugin_tm.quantization.support_matrix import (
    CHANNEL,
    WEIGHT_TYPES,
    Machine,
    Request,
    check,
    normalize_group_size,
)

Product = Literal["w4a16", "w8a16", "w4a8", "w8a8"]

# In shorter groups int8 dots wait for their scaling: there is no speed to be had for the accuracy.
SMALLEST_INT8_GROUP = 32

_IGNORED = "activations are not quantized (nor does upstream on a CPU): "


@dataclass(frozen=True)
class Asked:
    """What a checkpoint asks for: integers of `bits` for activations, one scale per "token" or per
    "group" of `group_size`."""

    bits: int
    strategy: str
    group_size: int | None
    symmetric: bool
    dynamic: bool


@dataclass(frozen=True)
class Plan:
    """What a layer runs: the product; for w4a8 whether x has a scale for each weight group; and
    what the layer table should say of it."""

    product: Product
    x_groups: bool = False
    note: str = ""


def asked_of(layer: torch.nn.Module) -> Asked | None:
    """What the scheme of a layer says of integer activations; None: to be kept.

    Schemes of packed weights keep compressed-tensors' arguments (`input_quant`), that of
    int-quantized 4-bit weights only whether they are symmetric: it takes dynamic ones per token.
    """
    scheme = getattr(layer, "scheme", None)
    arguments = getattr(scheme, "input_quant", None)
    if arguments is not None:
        return Asked(
            bits=int(arguments.num_bits),
            strategy=text(arguments.strategy),
            group_size=arguments.group_size,
            symmetric=bool(arguments.symmetric),
            dynamic=arguments.dynamic is True,
        )
    symmetric = getattr(scheme, "input_symmetric", None)
    if symmetric is None:
        return None
    static = bool(getattr(scheme, "is_static_input_scheme", False))
    return Asked(8, "token", None, symmetric=bool(symmetric), dynamic=not static)


def plan(request: Request, machine: Machine, asked: Asked | None) -> Plan:
    """What a layer that `check` has accepted runs.

    Asked for int8 activations that a kernel of ours rounds in that way: that kernel. Else
    activations are kept, with a note if that is not what was asked for, or rounded because the user
    wants W4A16 layers to be.
    """
    note = ""
    if asked is not None:
        product, reason = _asked_product(request, machine, asked)
        if product is not None:
            grouped = product == "w4a8" and asked.strategy == "group"
            per = "token and group" if grouped else "token"
            return Plan(product, grouped, f"int8 activations, per {per}")
        note = _IGNORED + reason
    if kept(request) == "w4a16" and envs.w4a16_int8_activations() and _long_groups(request):
        name = envs.INT8_ACTIVATIONS.name
        if machine.device == "cpu":
            return Plan("w4a8", True, f"int8 activations, per token and group: {name}=1")
        note = f"{name}=1 is for CPUs: activations are kept"
    return Plan(kept(request), note=note)


def kept(request: Request) -> Product:
    """The product that leaves activations as they are."""
    return "w4a16" if WEIGHT_TYPES[request.weight_type].bits <= 4 else "w8a16"


def _long_groups(request: Request) -> bool:
    group = normalize_group_size(request.group_size, request.k)
    return group == CHANNEL or group >= SMALLEST_INT8_GROUP


def _asked_product(
    request: Request, machine: Machine, asked: Asked
) -> tuple[Literal["w4a8", "w8a8"] | None, str]:
    """The kernel that rounds x as asked, or None and why there is none."""
    if asked.bits != 8:
        return None, f"no kernel for {asked.bits}-bit activations"
    if not asked.symmetric or not asked.dynamic:
        kind = f"symmetric={asked.symmetric}, dynamic={asked.dynamic}"
        return None, f"kernels round dynamically and symmetrically, asked for is {kind}"
    product: Literal["w4a8", "w8a8"] = "w4a8" if kept(request) == "w4a16" else "w8a8"
    verdict = check(request, machine, envs.schemes(), product)
    if not verdict.ok:
        return None, f"{product}: {verdict.reason}"
    if asked.strategy == "token":
        return product, ""
    weights = normalize_group_size(request.group_size, request.k)
    by_group = asked.strategy == "group" and product == "w4a8" and machine.device == "cpu"
    if by_group and asked.group_size == weights:
        return product, ""
    return None, (
        f"no {product} kernel on {machine.device} for activation scales per {asked.strategy} "
        f"of size {asked.group_size} with weight groups of {request.group_size}"
    )


def text(value: object) -> str:
    """The text of a str or of an enum of them."""
    return str(getattr(value, "value", value))
