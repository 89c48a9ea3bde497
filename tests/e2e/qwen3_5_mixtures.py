# SPDX-License-Identifier: Apache-2.0
"""How the tests' Qwen3.5 checkpoints are quantized: which module in which way."""

from mixed_models import (
    FP8,
    FP8_KEPT,
    W4_G32,
    W4_G64_ASYMMETRIC,
    W8_G64,
    W8A8,
    Awq,
    Kind,
    Mixture,
)

# The first layer, and q, k and v beside quantized o-projections, in 16 bits; so are routers, the
# shared expert's gate, and what is too narrow to be worth it.
_IGNORE = (
    "lm_head",
    r"re:.*layers\.0\..*",
    r"re:.*self_attn\.[qkv]_proj$",
    r"re:.*linear_attn\.in_proj_[ab]$",
    r"re:.*mlp\.gate$",
    r"re:.*mlp\.shared_expert_gate$",
)


def _mixture(
    name: str, gdn_in: Kind, gdn_out: Kind, rows: tuple[Kind, Kind, Kind], up: Kind, down: Kind
) -> Mixture:
    """`rows`: the MLPs' gates and ups, or the experts, of layers 1 to 3. `up` and `down`: of the
    shared expert, and `down` of the MLPs."""
    layers = [
        rule
        for number, kind in enumerate(rows, start=1)
        for rule in (
            (rf"re:.*layers\.{number}\.mlp\.(gate|up)_proj$", kind),
            (rf"re:.*layers\.{number}\.mlp\.experts\..*", kind),
        )
    ]
    rules = (
        (r"re:.*linear_attn\.in_proj_(qkv|z)$", gdn_in),
        (r"re:.*linear_attn\.out_proj$", gdn_out),
        (r"re:.*self_attn\.o_proj$", W4_G32),
        *layers,
        (r"re:.*mlp\.shared_expert\.(gate|up)_proj$", up),
        (r"re:.*mlp(\.shared_expert)?\.down_proj$", down),
    )
    return Mixture(name, rules, _IGNORE)


KEPT = _mixture(
    "kept", W8_G64, FP8_KEPT, (W4_G32, W8_G64, W4_G64_ASYMMETRIC), W4_G64_ASYMMETRIC, W8_G64
)
"""Activations stay 16 bits everywhere."""

ROUNDED = _mixture("rounded", W8A8, FP8, (W4_G32, W8A8, FP8), W8A8, FP8)
"""8-bit activations in most layers."""

AWQ = Awq(
    "awq",
    r"layers\.[1-3]\.(self_attn\.o_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|"
    r"mlp\.(experts\.\d+\.|shared_expert\.)?(gate|up|down)_proj)$",
    (
        "lm_head",
        "model.layers.0.",
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
        *("mlp.gate.", "mlp.shared_expert_gate"),
    ),
)
