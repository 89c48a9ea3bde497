# SPDX-License-Identifier: Apache-2.0
"""The table of everything this package changes in upstream vLLM. Pure data: imports nothing of it.

A symbol is written "module:attribute.path". Its signature is that of `inspect.signature` without
annotations, for a class that of its constructor, for a table the word "dict". Where tested
versions differ, the accepted signatures stand side by side, separated by " | ".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vllm_plugin_tm.versions import TESTED_VLLM

_LINEAR = "vllm.model_executor.kernels.linear"
_LOADER = "vllm.model_executor.model_loader"
_TRANSFER = "vllm.distributed.weight_transfer"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_VOCABULARY = "vllm.model_executor.layers.vocab_parallel_embedding"
_CT = f"{_QUANTIZATION}.compressed_tensors.compressed_tensors"
_CT_MOE = f"{_QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe"
_ALL = ("cpu", "cuda")
_MOE_INIT = "(self, weight_quant, input_quant, moe, layer_name=None)"
_MODELOPT_MOE = "(quant_config, moe_config)"
_MOE_CREATE = (
    "(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype,"
    " **extra_weight_attrs)"
)
_MOE_APPLY = "(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)"


@dataclass(frozen=True)
class Patch:
    """One change of upstream.

    `name` is the module in vllm_plugin_tm.patch that makes it; `target` the symbol that changes;
    `kind` how: an entry in a registry of upstream's, or a subclass of the live class in the
    place of the class. `expects` maps the symbols that the change relies on to their signatures;
    `tested` are the vLLM versions that satisfy them; `delete_when` says what would spare us this.
    `devices` are those on which it is made.
    """

    name: str
    target: str
    kind: Literal["registry", "subclass"]
    why: str
    how: str
    expects: Mapping[str, str]
    tested: tuple[str, ...]
    delete_when: str
    devices: tuple[str, ...] = ("cpu",)


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="mixed_precision",
        target=f"{_LINEAR}:_POSSIBLE_KERNELS",
        kind="registry",
        why="upstream's register_linear_kernel appends, and the first kernel that can, wins",
        how="TMWNA16LinearKernel, TMW4A8IntLinearKernel at the head of the device's list, in place",
        expects={
            f"{_LINEAR}:_POSSIBLE_KERNELS": "dict",
            f"{_LINEAR}:choose_mp_linear_kernel": "(config, compute_capability=None)",
            f"{_LINEAR}:MPLinearLayerConfig": (
                "(full_weight_shape, partition_weight_shape, weight_type, act_type, group_size,"
                " zero_points, out_type=None)"
                " | (full_weight_shape, partition_weight_shape, weight_type, act_type, group_size,"
                " zero_points, has_g_idx, out_type=None)"
            ),
            f"{_LINEAR}:MPLinearKernel.__init__": (
                "(self, c, w_q_param_name, w_s_param_name, w_zp_param_name=None)"
                " | (self, c, w_q_param_name, w_s_param_name, w_zp_param_name=None,"
                " w_gidx_param_name=None)"
            ),
            f"{_LINEAR}:MPLinearKernel.process_weights_after_loading": "(self, layer)",
            f"{_LINEAR}:MPLinearKernel.apply_weights": "(self, layer, x, bias=None)",
        },
        tested=TESTED_VLLM,
        delete_when="register_linear_kernel can put a kernel before the in-tree ones",
        devices=_ALL,
    ),
    Patch(
        name="scaled_mm",
        target=f"{_LINEAR}:_POSSIBLE_INT8_KERNELS",
        kind="registry",
        why="as above; the last kernel of upstream's list takes every int8 layer",
        how="TMInt8ScaledMMLinearKernel at the head of the device's list, in place",
        expects={
            f"{_LINEAR}:_POSSIBLE_INT8_KERNELS": "dict",
            f"{_LINEAR}:init_int8_linear_kernel": (
                "(is_channelwise, is_static_input_scheme, input_symmetric, module_name,"
                " is_fused_module=False)"
                " | (is_channelwise, is_static_input_scheme, input_symmetric, module_name)"
            ),
            f"{_LINEAR}:Int8ScaledMMLinearLayerConfig": (
                "(is_static_input_scheme, is_channelwise, input_symmetric, is_fused_module=False)"
                " | (is_static_input_scheme, is_channelwise, input_symmetric)"
            ),
            f"{_LINEAR}:Int8ScaledMMLinearKernel.__init__": "(self, c, layer_param_names)",
            f"{_LINEAR}:Int8ScaledMMLinearKernel.process_weights_after_loading": "(self, layer)",
            f"{_LINEAR}:Int8ScaledMMLinearKernel.apply_weights": "(self, layer, x, bias=None)",
        },
        tested=TESTED_VLLM,
        delete_when="register_linear_kernel can put a kernel before the in-tree ones",
        devices=_ALL,
    ),
    Patch(
        name="float_kernels",
        target=f"{_LINEAR}:_POSSIBLE_FP8_KERNELS",
        kind="registry",
        why=(
            "as above; upstream's CPU lists have nothing without AMX for FP8 blocks, and nothing "
            "for FP8 weights under kept activations and for FP4"
        ),
        how=(
            "TMFp8LinearKernel, TMWFp8A16LinearKernel, TMNvFp4LinearKernel and TMMxFp4LinearKernel "
            "at the heads of the CPU lists, in place; the NVFP4 one also in the place of the one "
            "that upstream forces for kept activations"
        ),
        expects={
            f"{_LINEAR}:{name}": "dict"
            for name in (
                "_POSSIBLE_FP8_KERNELS",
                "_POSSIBLE_FP8_BLOCK_KERNELS",
                "_POSSIBLE_WFP8A16_KERNELS",
                "_POSSIBLE_NVFP4_KERNELS",
                "_POSSIBLE_MXFP4_KERNELS",
            )
        }
        | {
            f"{_LINEAR}:init_fp8_linear_kernel": (
                "(activation_quant_key, weight_quant_key, input_dtype, out_dtype, weight_shape,"
                " force_kernel=None, module_name=None)"
            ),
            f"{_LINEAR}:init_wfp8_a16_linear_kernel": (
                "(weight_quant_key, activation_quant_key, weight_shape, input_dtype, out_dtype,"
                " force_kernel=None, module_name=None)"
            ),
            f"{_LINEAR}:init_nvfp4_linear_kernel": "(use_a16=False)",
            f"{_LINEAR}:init_mxfp4_linear_kernel": "(activation_quant_key=None)",
            f"{_LINEAR}:FP8ScaledMMLinearLayerConfig": (
                "(weight_quant_key, activation_quant_key, weight_shape, input_dtype, out_dtype)"
            ),
            f"{_LINEAR}:FP8ScaledMMLinearKernel.__init__": "(self, c, layer_param_names)",
            f"{_LINEAR}:FP8ScaledMMLinearKernel.apply_weights": "(self, layer, x, bias=None)",
            f"{_LINEAR}:NvFp4LinearKernel.__init__": "(self, config)",
            f"{_LINEAR}:NvFp4LinearKernel.apply_weights": "(self, layer, x, bias=None)",
            f"{_LINEAR}:MxFp4LinearKernel.__init__": "(self, config)",
            f"{_LINEAR}:MxFp4LinearKernel.apply_weights": "(self, layer, x, bias=None)",
            f"{_LINEAR}:MarlinNvFp4LinearKernel": "(config)",
        },
        tested=TESTED_VLLM,
        delete_when="register_linear_kernel can put a kernel before the in-tree ones",
    ),
    Patch(
        name="float_methods",
        target=f"{_QUANTIZATION}.fp8:Fp8LinearMethod",
        kind="subclass",
        why=(
            "upstream brings the scales of fused FP8 tensors to one by an op that CPUs lack, fails "
            "on FP8 blocks under kept activations, takes one second scale for all parts of a fused "
            "NVFP4 layer, and looks packed embeddings up by Triton"
        ),
        how=(
            "subclasses of the live classes CompressedTensorsW8A8Fp8, CompressedTensorsW8A16Fp8, "
            "CompressedTensorsW4A4Fp4, CompressedTensorsEmbeddingWNA16Int and Fp8LinearMethod, "
            "where upstream looks them up"
        ),
        expects={
            f"{_QUANTIZATION}.fp8:Fp8LinearMethod": "(quant_config)",
            f"{_QUANTIZATION}.fp8:Fp8LinearMethod.create_weights": (
                "(self, layer, input_size_per_partition, output_partition_sizes, input_size,"
                " output_size, params_dtype, **extra_weight_attrs)"
            ),
            f"{_QUANTIZATION}.fp8:Fp8LinearMethod.process_weights_after_loading": "(self, layer)",
            f"{_QUANTIZATION}.fp8:Fp8LinearMethod.apply": "(self, layer, x, bias=None)",
            f"{_CT}:CompressedTensorsW8A8Fp8": "(weight_quant, is_static_input_scheme)",
            f"{_CT}:CompressedTensorsW8A8Fp8.process_weights_after_loading": "(self, layer)",
            f"{_CT}:CompressedTensorsW8A16Fp8": "(weight_quant, is_static_input_scheme)",
            f"{_CT}:CompressedTensorsW8A16Fp8.process_weights_after_loading": "(self, layer)",
            f"{_CT}:CompressedTensorsEmbeddingWNA16Int": "(weight_quant)",
            f"{_CT}:CompressedTensorsEmbeddingWNA16Int.embedding": "(self, layer, input_)",
            f"{_CT}:CompressedTensorsW4A4Fp4": "(use_a16=False)",
            f"{_CT}:CompressedTensorsW4A4Fp4.process_weights_after_loading": "(self, layer)",
        },
        tested=TESTED_VLLM,
        delete_when="kernels see a checkpoint's tensors before any other code",
    ),
    Patch(
        name="linear_methods",
        target=f"{_QUANTIZATION}.auto_gptq:AutoGPTQLinearMethod",
        kind="subclass",
        why=(
            "upstream refuses, on CPUs too, what Marlin cannot run: GPTQ of 8 bits and groups of "
            "other sizes than 32, 64 and 128; and it takes AWQ without zero points for codes that "
            "count from 0"
        ),
        how=(
            "subclasses of the live AutoGPTQLinearMethod and AutoAWQMarlinLinearMethod under the "
            "same names in their modules"
        ),
        expects={
            f"{_QUANTIZATION}.auto_gptq:AutoGPTQLinearMethod": "(quant_config)",
            f"{_QUANTIZATION}.auto_gptq:AutoGPTQLinearMethod.create_weights": (
                "(self, layer, input_size_per_partition, output_partition_sizes, input_size,"
                " output_size, params_dtype, **extra_weight_attrs)"
            ),
            f"{_QUANTIZATION}.auto_awq:AutoAWQMarlinLinearMethod": "(quant_config)",
        },
        tested=TESTED_VLLM,
        delete_when="upstream asks the kernels of the platform, and for what the files hold",
    ),
    Patch(
        name="moe_methods",
        target=f"{_CT_MOE}_wna16:CompressedTensorsWNA16MoEMethod",
        kind="subclass",
        why=(
            "there is no registry of kernels for routed experts, and the methods' constructors "
            "refuse a machine without a backend of upstream's"
        ),
        how=(
            "subclasses of the live classes CompressedTensorsWNA16MoEMethod, "
            "CompressedTensorsW8A8Int8MoEMethod, CompressedTensorsW4A8Int8MoEMethod, "
            "CompressedTensorsW8A8Fp8MoEMethod, CompressedTensorsW4A4Mxfp4MoEMethod, "
            "CompressedTensorsW4A4Nvfp4MoEMethod, Fp8MoEMethod, GptOssMxfp4MoEMethod, "
            "ModelOptFp8MoEMethod, ModelOptNvFp4FusedMoE, AutoGPTQMoEMethod and "
            "AutoAWQMoEMethod under the same names in their modules, ModelOpt's also in its "
            "configurations; CompressedTensorsMoEMethod, which chooses, where it is asked"
        ),
        expects={
            f"{_CT_MOE}_wna16:CompressedTensorsWNA16MoEMethod": (
                "(weight_quant, input_quant, moe, layer_name=None)"
            ),
            f"{_CT}:CompressedTensorsMoEMethod.get_moe_method": "(quant_config, layer, layer_name)",
            f"{_CT}:CompressedTensorsConfig._add_fused_moe_to_target_scheme_map": "(self)",
            f"{_CT}:CompressedTensorsConfig.get_scheme_dict": "(self, layer, layer_name=None)",
            f"{_CT}:CompressedTensorsConfig._is_dynamic_token_w4a8_int": (
                "(weight_quant, input_quant)"
            ),
            f"{_QUANTIZATION}.modelopt:ModelOptFp8Config.FusedMoEMethodCls": _MODELOPT_MOE,
            f"{_QUANTIZATION}.modelopt:ModelOptNvFp4Config.FusedMoEMethodCls": _MODELOPT_MOE,
        }
        | {
            f"{module}:{name}.{member}": signature
            for module, name, constructor in (
                (f"{_CT_MOE}_wna16", "CompressedTensorsWNA16MoEMethod", _MOE_INIT),
                (f"{_CT_MOE}_w8a8_int8", "CompressedTensorsW8A8Int8MoEMethod", _MOE_INIT),
                (f"{_CT_MOE}_w4a8_int8", "CompressedTensorsW4A8Int8MoEMethod", _MOE_INIT),
                (f"{_CT_MOE}_w8a8_fp8", "CompressedTensorsW8A8Fp8MoEMethod", _MOE_INIT),
                (
                    f"{_CT_MOE}_w4a4_mxfp4",
                    "CompressedTensorsW4A4Mxfp4MoEMethod",
                    "(self, moe)",
                ),
                (
                    f"{_CT_MOE}_w4a4_nvfp4",
                    "CompressedTensorsW4A4Nvfp4MoEMethod",
                    "(self, moe, layer_name=None, use_a16=False)",
                ),
                (f"{_QUANTIZATION}.fp8", "Fp8MoEMethod", "(self, quant_config, layer)"),
                (f"{_QUANTIZATION}.mxfp4", "GptOssMxfp4MoEMethod", "(self, moe)"),
                *(
                    (f"{_QUANTIZATION}.modelopt", name, "(self, quant_config, moe_config)")
                    for name in ("ModelOptFp8MoEMethod", "ModelOptNvFp4FusedMoE")
                ),
                (f"{_QUANTIZATION}.auto_gptq", "AutoGPTQMoEMethod", "(self, quant_config, moe)"),
                (f"{_QUANTIZATION}.auto_awq", "AutoAWQMoEMethod", "(self, quant_config, moe)"),
            )
            for member, signature in (
                ("__init__", constructor),
                ("create_weights", _MOE_CREATE),
                ("process_weights_after_loading", "(self, layer)"),
                ("get_fused_moe_quant_config", "(self, layer)"),
                ("apply", _MOE_APPLY),
            )
        },
        tested=TESTED_VLLM,
        delete_when="methods for routed experts choose kernels from a list that can be added to",
        devices=_ALL,
    ),
    Patch(
        name="online",
        target=f"{_QUANTIZATION}:_CUSTOMIZED_METHOD_TO_QUANT_CONFIG",
        kind="registry",
        why="upstream quantizes to FP8 and MXFP while loading, not to integers of 4 or 8 bits",
        how="register_quantization_config of tm_w4a16, tm_w8a16, tm_w4a8 and tm_w8a8",
        expects={
            f"{_QUANTIZATION}:_CUSTOMIZED_METHOD_TO_QUANT_CONFIG": "dict",
            f"{_QUANTIZATION}:register_quantization_config": "(quantization)",
            f"{_LOADER}.reload.layerwise:initialize_online_processing": "(layer)",
            f"{_QUANTIZATION}.compressed_tensors.compressed_tensors:"
            "CompressedTensorsConfig.from_config": "(config)",
            f"{_QUANTIZATION}.compressed_tensors.compressed_tensors:"
            "CompressedTensorsLinearMethod.create_weights": (
                "(self, layer, input_size_per_partition, output_partition_sizes, input_size,"
                " output_size, params_dtype, **extra_weight_attrs)"
            ),
        },
        tested=TESTED_VLLM,
        delete_when="upstream has online integer schemes whose kernels come from its lists",
        devices=_ALL,
    ),
    Patch(
        name="model_loader",
        target=f"{_LOADER}:_LOAD_FORMAT_TO_MODEL_LOADER",
        kind="registry",
        why=(
            "upstream leaves a quantized tensor that the checkpoint lacks as uninitialized memory, "
            "does not name a damaged file, has no hook for a report after loading, and none for "
            "the output head of a model whose layers have another method, or none"
        ),
        how=(
            "subclasses of the live DefaultModelLoader and DummyModelLoader in every entry that "
            "names these two, in place; of a model that they made, the head's method where "
            "tm_online.lm_head says so"
        ),
        expects={
            f"{_LOADER}:_LOAD_FORMAT_TO_MODEL_LOADER": "dict",
            f"{_LOADER}.base_loader:BaseModelLoader.load_model": (
                "(self, vllm_config, model_config, prefix='')"
            ),
            f"{_LOADER}.default_loader:DefaultModelLoader.load_weights": (
                "(self, model, model_config)"
            ),
            f"{_LOADER}.default_loader:DefaultModelLoader.get_all_weights": (
                "(self, model_config, model)"
            ),
            f"{_LOADER}.default_loader:DefaultModelLoader._prepare_weights": (
                "(self, model_name_or_path, subfolder, revision, fall_back_to_pt,"
                " allow_patterns_overrides)"
            ),
            f"{_LOADER}.dummy_loader:DummyModelLoader.load_weights": "(self, model, model_config)",
            f"{_VOCABULARY}:ParallelLMHead.tie_weights": "(self, embed_tokens)",
            f"{_VOCABULARY}:UnquantizedEmbeddingMethod.apply": "(self, layer, x, bias=None)",
            f"{_VOCABULARY}:UnquantizedEmbeddingMethod.embedding": "(self, layer, input_)",
        },
        tested=TESTED_VLLM,
        delete_when="upstream tracks the loading of quantized models by default and names the file",
        devices=_ALL,
    ),
    Patch(
        name="weight_transfer",
        target=f"{_TRANSFER}.factory:WeightTransferEngineFactory._registry",
        kind="registry",
        why="every backend of upstream's moves tensors between GPUs",
        how="register_engine of tm_safetensors",
        expects={
            f"{_TRANSFER}.factory:WeightTransferEngineFactory._registry": "dict",
            f"{_TRANSFER}.factory:WeightTransferEngineFactory.register_engine": (
                "(name, module_path_or_cls, class_name=None)"
            ),
            f"{_TRANSFER}.base:WeightTransferEngine.__init__": (
                "(self, config, vllm_config, device, model)"
            ),
            f"{_TRANSFER}.base:WeightTransferEngine.update_weights": "(self, update_info)",
            f"{_TRANSFER}.base:WeightTransferEngine.finish_weight_update": "(self)",
            f"{_LOADER}.reload.layerwise:initialize_layerwise_reload": "(model)",
            f"{_LOADER}.reload.layerwise:finalize_layerwise_reload": "(*args, **kwargs)",
            f"{_LOADER}.reload.layerwise:get_layerwise_info": "(layer)",
        },
        tested=TESTED_VLLM,
        delete_when="upstream has a backend for weights in a CPU's memory or in files",
        devices=_ALL,
    ),
    Patch(
        name="worker",
        target="vllm.v1.worker.cpu_worker:CPUWorker",
        kind="subclass",
        why=(
            "upstream reloads layer by layer into the weights that serve: what fails on the way "
            "leaves half of the model new and the rest without memory; and a loader that is not "
            "ours leaves a head that is to be quantized"
        ),
        how="a subclass of the live CPUWorker, on CUDA Worker, under the same name in its module",
        expects={
            "vllm.v1.worker.cpu_worker:CPUWorker": (
                "(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker=False)"
            ),
            "vllm.v1.worker.gpu_worker:Worker": (
                "(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker=False)"
            ),
            "vllm.v1.worker.gpu_worker:Worker.load_model": "(self, *, load_dummy_weights=False)",
            "vllm.v1.worker.gpu_worker:Worker.reload_weights": "(self, *args, **kwargs)",
            "vllm.v1.worker.gpu_worker:Worker.update_weights": "(self, update_info)",
            "vllm.v1.worker.gpu_worker:Worker.finish_weight_update": "(self)",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": (
                "(self, weights_iterator=None, weights_path=None, is_checkpoint_format=True)"
            ),
        },
        tested=TESTED_VLLM,
        delete_when="a failed reload of upstream's leaves the old weights in place",
        devices=_ALL,
    ),
)

_SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors.schemes"

CONTRACTS: Mapping[str, str] = {
    # What a checkpoint asks of activations: read from these schemes' attributes of the same names.
    f"{_SCHEMES}.compressed_tensors_wNa8:CompressedTensorsWNA8Int": (
        "(num_bits, strategy, group_size=None, symmetric=True, input_quant=None, layer_name=None,"
        " quant_format='pack-quantized')"
        " | (num_bits, strategy, group_size=None, input_quant=None, layer_name=None,"
        " quant_format='pack-quantized')"
    ),
    f"{_SCHEMES}.compressed_tensors_w4a8_int:CompressedTensorsW4A8Int": (
        "(strategy, num_bits, group_size=None, is_static_input_scheme=False, input_symmetric=True)"
    ),
    # What a configuration says of each part of a fused layer.
    f"{_QUANTIZATION}.base_config:QuantizationConfig.get_quant_method": "(self, layer, prefix)",
    "vllm.envs:environment_variables": "dict",
    "vllm.plugins:load_general_plugins": "()",
    "vllm.model_executor.utils:replace_parameter": (
        "(layer, param_name, new_tensor) | (layer, param_name, new_tensor, prefer_copy=False)"
    ),
}
"""What else of upstream our code calls or writes, beyond the patches' own expectations."""


def accepts(expected: str, found: str) -> bool:
    """Whether a found signature is one of the accepted ones."""
    return found in expected.split(" | ")


def all_expectations() -> dict[str, str]:
    """Every symbol that we rely on, with its accepted signatures."""
    merged = dict(CONTRACTS)
    for patch in PATCHES:
        merged.update(patch.expects)
    return merged
