# SPDX-License-Identifier: Apache-2.0
"""The configuration of the output: what compressed-tensors' own classes make of a plan."""

from typing import TYPE_CHECKING

from vllm_plugin_tm.quantization.convert.options import Options
from vllm_plugin_tm.quantization.convert.plan import Plan
from vllm_plugin_tm.quantization.convert.selection import is_embedding, is_head
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

_QUANTIZATION = "quantization_config"


def scheme_of(options: Options, group_size: int, targets: list[str]) -> "QuantizationScheme":
    """The compressed-tensors scheme of weights with this group size."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    details = options.details
    shape: dict[str, object] = {"strategy": "group", "group_size": group_size}
    if group_size == CHANNEL:
        shape = {"strategy": "channel"}
    in_blocks = options.in_blocks(group_size)
    if in_blocks:
        shape = {"strategy": "block", "block_structure": [group_size, group_size]}
    weights = QuantizationArgs(
        num_bits=details.bits, type=details.kind, symmetric=options.symmetric, **shape
    )
    per_token: dict[str, object] = {"strategy": "token"}
    if in_blocks:
        per_token = {"strategy": "group", "group_size": group_size}
    activations = QuantizationArgs(
        num_bits=8, type=details.kind, symmetric=True, dynamic=True, **per_token
    )
    return QuantizationScheme(
        targets=targets,
        weights=weights,
        input_activations=activations if details.activations else None,
        format=options.weight_format,
    )


def output_config(plan: Plan) -> dict:
    """The checkpoint's config.json with the quantization of the output in it."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    quantization = QuantizationConfig(
        config_groups=_groups(plan),
        format=plan.options.weight_format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=_ignored(plan),
    )
    config = {k: v for k, v in plan.checkpoint.config.items() if k != _QUANTIZATION}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {
            k: v for k, v in config["text_config"].items() if k != _QUANTIZATION
        }
    return {**config, _QUANTIZATION: quantization.model_dump(mode="json")}


def _groups(plan: Plan) -> dict[str, "QuantizationScheme"]:
    """One group of layers for each group size. A single one targets every linear layer, as readers
    expect; several name their modules, since a class would catch the others' too."""
    sizes: dict[int, list[str]] = {}
    for name, job in plan.quantized.items():
        assert job.group_size is not None
        sizes.setdefault(job.group_size, []).append(name)
    if len(sizes) == 1:
        (size,) = sizes
        # vLLM's class of an output head has another name than its linear layers.
        heads = [name for name in plan.quantized if is_head(name)]
        return {"group_0": scheme_of(plan.options, size, ["Linear", *heads])}
    return {
        f"group_{number}": scheme_of(plan.options, size, names)
        for number, (size, names) in enumerate(sorted(sizes.items(), reverse=True))
    }


def _ignored(plan: Plan) -> list[str]:
    """Every module with a matrix that stays, embeddings aside (no linear layers, to any reader).

    A head that is tied to the embedding has no matrix of its own, and is named all the same.
    """
    names = [name for name in plan.kept if not is_embedding(name)]
    if not any(is_head(name) for name in (*plan.kept, *plan.quantized)):
        names.append("lm_head")
    # vLLM asks for a layer of experts under its own name.
    experts = {
        name.rpartition(".experts.")[0] + ".experts" for name in plan.kept if ".experts." in name
    }
    return names + sorted(experts)
