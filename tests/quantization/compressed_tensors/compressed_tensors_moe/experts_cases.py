# SPDX-License-Identifier: Apache-2.0
"""Routed experts as upstream's compressed-tensors methods make them, filled with seeded checkpoint
tensors, and what they must compute."""

from dataclasses import dataclass, replace
from importlib import import_module

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)

from vllm_plugin_tm.kernels import reference_moe
from vllm_plugin_tm.kernels.reference_moe import Activation, Experts

PREFIX = "model.layers.3.mlp.experts"
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 5, 2, 96, 64
SWIGLU = Activation()  # silu, as the oracle says it
_MODULES = (
    "vllm.model_executor.layers.quantization.compressed_tensors"
    ".compressed_tensors_moe.compressed_tensors_moe"
)


@dataclass(frozen=True)
class Format:
    """A kind of checkpoint: upstream's method and the weights' arguments. `group` -1: channel."""

    method: str
    bits: int
    group: int = -1
    asymmetric: bool = False

    @property
    def scheme(self):
        """The op that runs it."""
        if self.method == "WNA16":
            return "w4a16" if self.bits <= 4 else "w8a16"
        return {"W4A8Int8": "w4a8", "W8A8Int8": "w8a8"}[self.method]

    @property
    def codes(self):
        """The parameters' name of the weights."""
        return "weight_packed" if self.method == "WNA16" else "weight"

    def __str__(self):
        group = "channel" if self.group == -1 else self.group
        return f"{self.scheme}-{self.bits}-{group}{'-asymmetric' * self.asymmetric}"


FORMATS = [
    *(
        Format("WNA16", bits, group, asymmetric)
        for bits in range(2, 9)
        for group in (32, -1)
        for asymmetric in (False, True)
    ),
    Format("W4A8Int8", 4, 32),
    Format("W4A8Int8", 4),
    Format("W8A8Int8", 8),
]
# One for each op.
SOME = [Format("WNA16", 4, 32, True), Format("WNA16", 8, 32), *FORMATS[-3:]]


def method_class(name):
    """What stands in upstream's module now."""
    module = import_module(f"{_MODULES}_{name.lower().replace('a8int8', 'a8_int8')}")
    return getattr(module, f"CompressedTensors{name}MoEMethod")


def moe_config(dtype=torch.bfloat16, activation="silu", tp=1, **fields):
    """Upstream's description of a layer, `fields` on top."""
    values = {
        "num_experts": EXPERTS,
        "experts_per_token": TOP_K,
        "hidden_dim": HIDDEN,
        "intermediate_size": INTERMEDIATE * tp,
        "num_local_experts": EXPERTS,
        "num_logical_experts": EXPERTS,
        "activation": MoEActivation.SILU,
        "device": "cpu",
        "routing_method": RoutingMethodType.Renormalize,
        "moe_parallel_config": replace(FusedMoEParallelConfig.make_no_parallel(), tp_size=tp),
        "in_dtype": dtype,
    }
    config = FusedMoEConfig(**(values | fields))
    # Not through the constructor: on a CPU that refuses activations without gates.
    config.activation = MoEActivation(activation)
    return config


def weight_arguments(form):
    return QuantizationArgs(
        num_bits=form.bits,
        type="int",
        symmetric=not form.asymmetric,
        strategy="channel" if form.group == -1 else "group",
        group_size=None if form.group == -1 else form.group,
        dynamic=False,
    )


def activation_arguments(form, **fields):
    """Dynamic int8 per token, or None where the format keeps activations."""
    if form.method == "WNA16":
        return None
    values = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    return QuantizationArgs(**(values | {"strategy": "token"} | fields))


def make_method(form, config, **fields):
    """The class in upstream's module, constructed; `fields` are of the activations."""
    arguments = activation_arguments(form, **fields)
    return method_class(form.method)(weight_arguments(form), arguments, config)


class Layer(torch.nn.Module):
    """What upstream's methods and ours read of a RoutedExperts."""

    def __init__(self, config, expert_map=None, apply_router_weight_on_input=False):
        super().__init__()
        self.layer_name = PREFIX
        self.moe_config = config
        self.activation = config.activation
        self.ckpt_gate_proj_name, self.ckpt_down_proj_name = "gate_proj", "down_proj"
        self.ckpt_up_proj_name = "up_proj" if config.is_act_and_mul else None
        self.local_num_experts = config.num_local_experts
        self.global_num_experts = config.num_experts
        self.expert_map = expert_map
        self.apply_router_weight_on_input = apply_router_weight_on_input


def create(method, layer, dtype=None):
    """Unloaded parameters, as RoutedExperts has them created."""
    config = method.moe
    method.create_weights(
        layer=layer,
        num_experts=config.num_local_experts,
        hidden_size=config.hidden_dim,
        intermediate_size_per_partition=config.intermediate_size_per_partition,
        params_dtype=dtype or config.in_dtype,
        weight_loader=print,
        global_num_experts=config.num_experts,
    )


def fill(form, layer, seed=0):
    """Puts random checkpoint tensors into a layer: (w13, w2), what was put there.

    Results are about 1. Scales have both signs and one of them is zero: legal input.
    """
    generator = torch.Generator().manual_seed(seed)

    def experts(product):
        codes = getattr(layer, f"{product}_{form.codes}")
        scale = getattr(layer, f"{product}_weight_scale")
        zeros = getattr(layer, f"{product}_weight_zero_point", None)
        bias = getattr(layer, f"{product}_bias", None)
        if codes.dtype == torch.int8:
            most = 1 << (form.bits - 1)
            codes.data.random_(-most, most, generator=generator)
        for words in (codes, zeros):
            if words is not None and words.dtype == torch.int32:
                words.data.random_(-(2**31), 2**31, generator=generator)
        k = HIDDEN if product == "w13" else INTERMEDIATE
        steps = torch.randn(scale.shape, generator=generator) * 2 / (2**form.bits * k**0.5) * 2
        steps[0, 3, 0] = 0
        scale.data.copy_(steps)
        if bias is not None:
            bias.data.copy_(torch.randn(bias.shape, generator=generator))
        return Experts(
            codes.data.clone(),
            scale.data.clone(),
            None if zeros is None else zeros.data.clone(),
            None if bias is None else bias.data.clone(),
            form.bits,
        )

    return experts("w13"), experts("w2")


@dataclass
class Case:
    """A processed layer with its method, and the checkpoint tensors it was made from."""

    form: Format
    method: object
    layer: Layer
    w13: Experts
    w2: Experts
    activation: Activation = SWIGLU

    @property
    def kernel(self):
        """Ours."""
        return self.method.kernel


def loaded(form, seed=0, config=None, **layer_fields):
    """A layer that is filled and not processed."""
    config = config or moe_config()
    method = make_method(form, config)
    layer = Layer(config, **layer_fields)
    layer.quant_method = method
    create(method, layer)
    return Case(form, method, layer, *fill(form, layer, seed))


def processed(form, seed=0, config=None, activation=SWIGLU, **layer_fields):
    """A layer that is ready to run; `activation` is the oracle's word for the configuration's."""
    case = loaded(form, seed, config, **layer_fields)
    case.method.process_weights_after_loading(case.layer)
    case.activation = activation
    return case


def routing(tokens, dtype, experts=EXPERTS, top_k=TOP_K):
    """x [T, H], weights and ids [T, top_k]; no expert twice."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.to(torch.int32)
    return x, torch.rand(tokens, top_k, generator=generator) + 0.1, ids


def assert_right(case, dtype=torch.bfloat16, tokens=9, top_k=TOP_K, x_groups=False, scheme=None):
    """Every element of the method's result is within the oracle's bound, which would notice it if
    the scales of either product were wrong by a hundredth."""
    layer = case.layer
    x, weights, ids = routing(tokens, dtype, layer.global_num_experts, top_k)
    y = case.method.apply(layer, x, weights, ids, None, None)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    if layer.apply_router_weight_on_input:
        x, weights = x * weights.to(dtype), torch.ones_like(weights)
    head = (scheme or case.form.scheme, x, weights, ids)
    tail = (case.w2, case.activation, layer.expert_map, x_groups)
    want = reference_moe.moe(*head, case.w13, *tail)
    allowed = reference_moe.moe_tolerance(*head, case.w13, *tail)
    larger = replace(case.w13, scale=case.w13.scale.double() * 1.01)
    first_wrong = reference_moe.moe(*head, larger, *tail)
    assert bool(((y.double() - want).abs() <= allowed).all())
    assert bool(((y.double() - first_wrong).abs() > allowed).any())
    assert bool(((y.double() - 1.01 * want).abs() > allowed).any())
