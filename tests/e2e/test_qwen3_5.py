# SPDX-License-Identifier: Apache-2.0
"""Seeded Qwen3.5 models, dense and with experts, whose layers are held differently, in vLLM against
transformers with the dequantized weights: what runs where, whole models, and layer by layer.

vLLM's Gated DeltaNet on CPUs knows bf16 only, so whole models with it are compared as far as bf16
goes, and a scale error of 1 % is looked for in models without it, in float32, and in the layers.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from mixed_models import FP8, W8A8, Awq, Kind, Mixture
from qwen3_5_mixtures import AWQ, KEPT, ROUNDED
from qwen3_5_wrapper import wrapped

from vllm_plugin_tm import machine
from vllm_plugin_tm.kernels import reference_float
from vllm_plugin_tm.quantization.convert.inspection import inspect

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = [[7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250], [5], [400 - i for i in range(70)]]
DENSE, MOE = "qwen3_5_text", "qwen3_5_moe_text"
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
}


@dataclass(frozen=True)
class Model:
    """A tiny model; `exact` ones have full attention only, and run in float32."""

    architecture: str
    mixture: Mixture | Awq | None
    exact: bool = False

    def __str__(self) -> str:
        how = self.mixture.name if self.mixture else "plain"
        return f"{self.architecture}-{how}{'-exact' if self.exact else ''}"

    def checkpoint(self, folder: Path) -> Path:
        """Made once."""
        changes = {"layer_types": ["full_attention"] * 4} if self.exact else {}
        plain = e2e_models.tiny(folder, self.architecture, **changes)
        return self.mixture.write(plain) if self.mixture else plain

    def reference(
        self, folder: Path, dtype: torch.dtype = torch.float32, **factors: Any
    ) -> torch.Tensor:
        """transformers' log-probabilities after every token of the prompts."""
        assert self.mixture is not None
        path = self.checkpoint(folder)
        model = e2e_models.transformers_model_of(
            path, self.mixture.dequantized(path, **factors), dtype
        )
        return torch.cat([e2e_models.log_probabilities(model, prompt) for prompt in PROMPTS])


EXACT = [Model(name, KEPT, exact=True) for name in (DENSE, MOE)]
HYBRID = [Model(name, mixture) for name in (DENSE, MOE) for mixture in (KEPT, AWQ, ROUNDED)]
WRAPPED = [Model(DENSE, KEPT), Model(MOE, AWQ)]
"""Those that are also served as published, beside a vision tower and under other names."""


def _job(model: Model, folder: Path, **engine: Any) -> dict[str, Any]:
    job = e2e_models.job(
        model.checkpoint(folder), "float32" if model.exact else "bfloat16", PROMPTS[0]
    )
    job["engine"] |= engine
    return job | {"prompts": PROMPTS}


@pytest.fixture(scope="module")
def results(
    models: Path, run_engines: Callable[..., list[dict[str, Any]]], torchvision: dict[str, str]
) -> dict[str, Any]:
    """All models, one after the other, in one process of vLLM."""
    every = [*EXACT, *HYBRID]
    jobs = [_job(model, models) | {"layers": True, "modules": True} for model in every]
    for model in WRAPPED:
        job = _job(model, models, language_model_only=True)
        job["engine"]["model"] = str(wrapped(model.checkpoint(models)))
        jobs.append(job | {"modules": True})
    names = [*map(str, every), *(f"{model}-wrapped" for model in WRAPPED)]
    return dict(zip(names, run_engines("qwen3_5", jobs, **torchvision), strict=True))


def _logprobs(result: dict[str, Any]) -> torch.Tensor:
    return torch.cat(result["answers"][0]["logprobs"])


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("model", EXACT, ids=str)
def test_full_attention_equals_transformers(
    results: dict[str, Any], models: Path, model: Model
) -> None:
    """Heads of 256, a quarter of them rotated, gated outputs, layers of different kinds: float32
    sums in another order, as in test_models.py, through twice as many layers."""
    want = model.reference(models)
    got = _logprobs(results[str(model)])
    assert _distance(got, want) <= 5e-6
    assert isinstance(model.mixture, Mixture)
    for kind in dict.fromkeys(
        kind for pattern, kind in model.mixture.rules if "linear_attn" not in pattern
    ):
        off = model.reference(models, factors={kind: 1.01})
        assert _distance(got, off) > 1e-3, "a scale error of 1 % must be seen"


@pytest.mark.parametrize("model", HYBRID, ids=str)
def test_gated_delta_net_is_as_near_as_bf16_goes(
    results: dict[str, Any], models: Path, model: Model
) -> None:
    """transformers itself is off by what rounding of activations and weights to bf16 does; our
    weights are exact, so that we are about as near. With experts half of it is routers near a tie,
    for which one run's luck is a fair part. Activations of 8 bits cost each layer 1 % more."""
    want = model.reference(models)
    rounding = _distance(model.reference(models, torch.bfloat16), want)
    allowed = 0.1 if model.mixture is ROUNDED else 1.25 * rounding
    assert rounding < 0.05
    assert _distance(_logprobs(results[str(model)]), want) <= allowed
    if model in WRAPPED:
        # Upstream rotates there by other code, so that bf16 falls otherwise.
        whole = results[f"{model}-wrapped"]
        assert _distance(_logprobs(whole), want) <= allowed
        modules = results[str(model)]["modules"].items()
        assert whole["modules"] == {f"language_model.{name}": how for name, how in modules}


@pytest.mark.parametrize("model", HYBRID, ids=str)
def test_layers_on_what_the_model_feeds_them(
    results: dict[str, Any], models: Path, model: Model
) -> None:
    """Every quantized layer's output on its input, times the dequantized weights in float64.

    The output is rounded to bf16 once, and between the products of an expert once more: 2**-9 at
    most, 0.3 of that on average. A scale off by 1 % gives 0.01.
    """
    path, mixture = model.checkpoint(models), model.mixture
    assert mixture is not None
    weights = mixture.dequantized(path)
    layers = results[str(model)]["layers"]
    assert len(layers) == (10 if model.architecture == DENSE else 13)
    for layer, (x, *routing, y) in layers.items():
        parent, _, last = layer.rpartition(".")
        if routing:
            want = _experts(parent, x, *routing, weights, _kind(mixture, f"{parent}.0.up_proj"))
        else:
            parts = [f"{parent}.{part}" for part in FUSED.get(last, (last,))]
            weight = torch.cat([weights[f"{part}.weight"] for part in parts]).double()
            want = _rounded(x, _kind(mixture, parts[0])) @ weight.T
        error = float((y.double() - want).norm() / want.norm())
        assert error < 4e-3, f"{layer}: {error}"


def _kind(mixture: Mixture | Awq, module: str) -> Kind | None:
    return mixture.kind(module) if isinstance(mixture, Mixture) else None


def _rounded(x: torch.Tensor, kind: Kind | None) -> torch.Tensor:
    """x as the layer's activations are rounded, in float64."""
    x = x.float()
    if kind is W8A8:
        args = QuantizationArgs(**W8A8.activations)
        scale, zero = calculate_qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), args)
        return fake_quantize(x, scale, zero, args).double()
    if kind is FP8:
        made = reference_float.round_x(x, "token")
        return made.values.double() * made.scale.double()
    return x.double()


def _experts(
    name: str,
    x: torch.Tensor,
    shares: torch.Tensor,
    ids: torch.Tensor,
    weights: dict[str, torch.Tensor],
    kind: Kind | None,
) -> torch.Tensor:
    """The chosen experts' outputs in float64, summed with their shares."""
    rows = _rounded(x, kind)
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, place in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        gate, up, down = (
            weights[f"{name}.{ids[token, place]}.{part}_proj.weight"].double()
            for part in ("gate", "up", "down")
        )
        inner = torch.nn.functional.silu(gate @ rows[token]) * (up @ rows[token])
        y[token] += shares[token, place] * (down @ _rounded(inner[None], kind)[0])
    return y


GOLDEN = {
    "0.linear_attn.in_proj_qkvz": None,
    "0.linear_attn.out_proj": None,
    "0.mlp.experts.routed_experts": None,
    "0.mlp.shared_expert.gate_up_proj": None,
    "0.mlp.shared_expert.down_proj": None,
    "1.self_attn.qkv_proj": None,
    "1.self_attn.o_proj": ("CompressedTensorsWNA16", "TMWNA16LinearKernel"),
    "1.mlp.experts.routed_experts": ("CompressedTensorsWNA16MoEMethod", "TMExpertsKernel"),
    "1.mlp.shared_expert.gate_up_proj": ("CompressedTensorsW8A8Int8", "TMInt8ScaledMMLinearKernel"),
    "1.mlp.shared_expert.down_proj": ("CompressedTensorsW8A8Fp8", "TMFp8LinearKernel"),
    "2.linear_attn.in_proj_qkvz": ("CompressedTensorsW8A8Int8", "TMInt8ScaledMMLinearKernel"),
    "2.linear_attn.out_proj": ("CompressedTensorsW8A8Fp8", "TMFp8LinearKernel"),
    "2.mlp.experts.routed_experts": ("CompressedTensorsW8A8Int8MoEMethod", "TMExpertsKernel"),
    "2.mlp.shared_expert.gate_up_proj": ("CompressedTensorsW8A8Int8", "TMInt8ScaledMMLinearKernel"),
    "2.mlp.shared_expert.down_proj": ("CompressedTensorsW8A8Fp8", "TMFp8LinearKernel"),
    "3.self_attn.qkv_proj": None,
    "3.self_attn.o_proj": ("CompressedTensorsWNA16", "TMWNA16LinearKernel"),
    "3.mlp.experts.routed_experts": ("CompressedTensorsW8A8Fp8MoEMethod", "TMFloatExpertsKernel"),
    "3.mlp.shared_expert.gate_up_proj": ("CompressedTensorsW8A8Int8", "TMInt8ScaledMMLinearKernel"),
    "3.mlp.shared_expert.down_proj": ("CompressedTensorsW8A8Fp8", "TMFp8LinearKernel"),
}
"""Of the mixture with experts and 8-bit activations; None: 16 bits, as are those below."""
PLAIN = ("conv1d", "in_proj_ba", "gate", "shared_expert_gate", "embed_tokens", "lm_head")
AWQ_LINEAR = ("AutoAWQMarlinLinearMethod", "TMWNA16LinearKernel")
AWQ_EXPERTS = ("AutoAWQMoEMethod", "TMExpertsKernel")


def _map(result: dict[str, Any]) -> dict[str, tuple[str, str] | None]:
    """Layer -> scheme and kernel, None for one in 16 bits; those of PLAIN are left out."""
    found = {}
    for name, (scheme, kernel) in result["modules"].items():
        plain = scheme.startswith("Unquantized")
        assert plain == (kernel == "-"), name
        if name.rpartition(".")[2] in PLAIN:
            assert plain, name
        else:
            found[name.removeprefix("model.layers.")] = None if plain else (scheme, kernel)
    return found


@pytest.mark.parametrize("mixture", [ROUNDED, AWQ], ids=lambda mixture: mixture.name)
def test_a_golden_map_of_schemes(results: dict[str, Any], mixture: Mixture | Awq) -> None:
    """Every layer runs as its own part of the configuration says; AWQ has one scheme for all that
    its modules_to_not_convert does not keep."""
    golden: dict[str, tuple[str, str] | None] = dict(GOLDEN)
    if mixture is AWQ:
        golden = {
            name: how and (AWQ_EXPERTS if "routed" in name else AWQ_LINEAR)
            for name, how in GOLDEN.items()
        }
    assert _map(results[str(Model(MOE, mixture))]) == golden


@pytest.mark.parametrize("model", [m for m in HYBRID if m.mixture is not AWQ], ids=str)
def test_inspect_tells_what_the_engine_runs(
    results: dict[str, Any], models: Path, model: Model
) -> None:
    """Of every module of the checkpoint: a kernel of ours or not, and which arithmetic."""
    engine = results[str(model)]["modules"]
    kernels = {
        "w4a16": ("TMWNA16LinearKernel", "TMExpertsKernel"),
        "w8a16": ("TMWNA16LinearKernel", "TMExpertsKernel"),
        "w8a8": ("TMInt8ScaledMMLinearKernel", "TMExpertsKernel"),
        "fp8": ("TMFp8LinearKernel", "TMWFp8A16LinearKernel", "TMFloatExpertsKernel"),
    }
    fused = {part: whole for whole, parts in FUSED.items() for part in parts}
    fused |= {"in_proj_a": "in_proj_ba", "in_proj_b": "in_proj_ba"}
    seen = set()
    for module in inspect(model.checkpoint(models), machine.detect()):
        parent, _, leaf = module.module.rpartition(".")
        name = f"{parent}.{fused.get(leaf, leaf)}".removeprefix(".")
        if ".experts." in name:
            name = f"{name.partition('.experts.')[0]}.experts.routed_experts"
        seen.add(name)
        kernel = engine[name][1]
        if module.kernel == "upstream":
            assert kernel == "-", module
            assert module.scheme == "bfloat16"
        else:
            assert kernel in kernels[module.kernel.removeprefix("TM ")], module
    # A convolution's weights are no matrix.
    assert seen == {name for name in engine if not name.endswith("conv1d")}


@cache
def _two_cores() -> str:
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[1]}" if len(cores) > 1 else ""


def test_two_workers_answer_as_one(
    results: dict[str, Any],
    models: Path,
    run_engines: Callable[..., list[dict[str, Any]]],
    torchvision: dict[str, str],
) -> None:
    """Heads and experts in halves: equal but for the order of sums, in float32; heads of Gated
    DeltaNet: as near to the exact result as bf16 goes."""
    if not _two_cores():
        pytest.skip("two cores are needed")
    every = (Model(MOE, KEPT, exact=True), Model(DENSE, KEPT))
    jobs = [_job(model, models, tensor_parallel_size=2) for model in every]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": _two_cores(), **torchvision}
    answers = run_engines("qwen3_5-parallel", jobs, **settings)
    for model, answer in zip(every, answers, strict=True):
        got, one = _logprobs(answer), _logprobs(results[str(model)])
        if model.exact:
            assert _distance(got, one) <= 5e-6, str(model)
        else:
            want = model.reference(models)
            rounding = _distance(model.reference(models, torch.bfloat16), want)
            assert _distance(got, want) <= 1.25 * rounding, str(model)
        for worker in answer["workers"]:
            ours = sum(count for _, on_tm, count in worker["layers"] if on_tm)
            (alone,) = results[str(model)]["workers"]
            assert ours == sum(count for _, on_tm, count in alone["layers"] if on_tm)
