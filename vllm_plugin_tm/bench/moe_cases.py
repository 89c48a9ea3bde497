# SPDX-License-Identifier: Apache-2.0
"""What is measured of routed experts: layers, numbers of tokens and formats, and what a call
computes. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from vllm_plugin_tm.bench.cases import DTYPE_BYTES, Format, fits, those_of
from vllm_plugin_tm.bench.schemes import SCHEMES
from vllm_plugin_tm.quantization.support_matrix import CHANNEL


@dataclass(frozen=True)
class Layer:
    """A layer of routed experts: `model` is its name in tables; each token goes through `top_k` of
    `experts`, from `hidden` to `intermediate` channels (gates and ups, so many each) and back."""

    model: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """N x K of an expert's two weight matrices: gates and ups, then downs."""
        return (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)


LAYERS = {
    layer.model: layer
    for layer in (
        Layer("qwen3-30b-a3b", 128, 2048, 768, 8),
        Layer("mixtral", 8, 4096, 7168, 2),
        Layer("deepseek-v2-lite", 64, 2048, 1408, 6),
    )
}
"""Many small experts, few large ones, and some between them; by name."""
TOKENS = (1, 4, 16, 64, 256, 1024)
MOE_SCHEMES = ("w4a16", "w4a8", "w8a8")
"""Those of a run without options."""

_QUICK_LAYERS = ("qwen3-30b-a3b",)
_QUICK_TOKENS = (1, 16, 128)


@dataclass(frozen=True)
class MoeCase:
    """One layer of routed experts applied to m tokens."""

    layer: Layer
    m: int
    format: Format

    @property
    def flops(self) -> int:
        """Multiplications and additions of the three products of each token's experts."""
        return 2 * self.m * self.layer.top_k * sum(n * k for n, k in self.layer.products)

    @property
    def activation_bytes(self) -> int:
        """x read once and y written once, both [m, hidden]: what is between them is scratch."""
        return 2 * self.m * self.layer.hidden * DTYPE_BYTES[self.format.dtype]


def chosen_cases(
    schemes: Iterable[str],
    layers: tuple[Layer, ...] = (),
    tokens: tuple[int, ...] | None = None,
    group_sizes: tuple[int, ...] | None = None,
    symmetries: tuple[bool, ...] = (True,),
    dtypes: tuple[str, ...] = ("bf16",),
    quick: bool = False,
) -> list[MoeCase]:
    """Every combination of what was asked for; what was not is as in a full or quick run.

    Raises:
        ValueError: a layer, or a scheme, that has no such groups or zero points.
    """
    layers = layers or tuple(LAYERS[name] for name in (_QUICK_LAYERS if quick else LAYERS))
    tokens = tokens or (_QUICK_TOKENS if quick else TOKENS)
    cases = []
    for scheme in (SCHEMES[name] for name in schemes):
        groups, evenness = group_sizes or (scheme.usual_group,), those_of(scheme, symmetries)
        for layer, group, symmetric, dtype in product(layers, groups, evenness, dtypes):
            if not group_sizes and not scheme.groups:
                group = _fitting(layer, group)
            form = Format(group, symmetric, dtype, scheme.name)
            _check(layer, form)
            cases += [MoeCase(layer, m, form) for m in tokens]
    return list(dict.fromkeys(cases))


def _divides(layer: Layer, group: int) -> bool:
    return all(fits(n, k, group) for n, k in layer.products)


def _fitting(layer: Layer, usual: int) -> int:
    """The usual group where it divides both inputs, else the largest that does."""
    return next((g for g in (usual, 64, 32) if _divides(layer, g)), CHANNEL)


def _check(layer: Layer, form: Format) -> None:
    if not form.facts.grouped and not (form.symmetric and form.group_size == CHANNEL):
        raise ValueError(
            f"scheme {form.scheme} of routed experts, group size {form.group_name}: the only group "
            "size is channel, and activations are rounded without zero points"
        )
    groups = form.facts.groups
    if groups and form.group_size not in groups:
        raise ValueError(
            f"scheme {form.scheme} of routed experts, group size {form.group_name}: the format's "
            f"group size is {groups[0]}"
        )
    if not _divides(layer, form.group_size):
        raise ValueError(
            f"layer {layer.model} with group size {form.group_name}: its inputs, "
            f"{layer.hidden} and {layer.intermediate}, must be multiples of it"
        )
