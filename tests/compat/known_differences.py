# SPDX-License-Identifier: Apache-2.0
"""What is known of older vLLM versions: where they differ from the patch table's first form.

Data only. A symbol and version that stand in neither table have the first signature that
vllm_plugin_tm.patch.table accepts; tests/compat/test_contracts.py holds all of it exact.
"""

_LINEAR = "vllm.model_executor.kernels.linear"
_WNA8_INT = (
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa8"
    ":CompressedTensorsWNA8Int"
)
# Asymmetric weights came to this scheme after 0.30.
_SYMMETRIC_WNA8_INT = (
    "(num_bits, strategy, group_size=None, input_quant=None, layer_name=None,"
    " quant_format='pack-quantized')"
)

# What 0.33 changed.
_BEFORE_0_33 = {
    f"{_LINEAR}:init_int8_linear_kernel": (
        "(is_channelwise, is_static_input_scheme, input_symmetric, module_name)"
    ),
    f"{_LINEAR}:Int8ScaledMMLinearLayerConfig": (
        "(is_static_input_scheme, is_channelwise, input_symmetric)"
    ),
    "vllm.model_executor.utils:replace_parameter": (
        "(layer, param_name, new_tensor, prefer_copy=False)"
    ),
}

# Older forms that the patch table accepts: version -> symbol -> signature found.
ACCEPTED: dict[str, dict[str, str]] = {
    "0.28.0": {
        **_BEFORE_0_33,
        # has_g_idx went in 0.30, when runtime activation reordering was dropped.
        f"{_LINEAR}:MPLinearLayerConfig": (
            "(full_weight_shape, partition_weight_shape, weight_type, act_type, group_size,"
            " zero_points, has_g_idx, out_type=None)"
        ),
        f"{_LINEAR}:MPLinearKernel.__init__": (
            "(self, c, w_q_param_name, w_s_param_name, w_zp_param_name=None,"
            " w_gidx_param_name=None)"
        ),
        _WNA8_INT: _SYMMETRIC_WNA8_INT,
    },
    "0.30.0": {**_BEFORE_0_33, _WNA8_INT: _SYMMETRIC_WNA8_INT},
    "0.31.0": _BEFORE_0_33,
    "0.32.0": _BEFORE_0_33,
}
ACCEPTED["0.27.1"] = ACCEPTED["0.28.0"]

# Forms that the table refuses: a registration with such a version ends in a PatchError.
REFUSED: dict[str, dict[str, str]] = {
    "0.27.1": {
        # The third argument was renamed in 0.28.
        "vllm.model_executor.utils:replace_parameter": (
            "(layer, param_name, new_data, prefer_copy=False)"
        ),
    },
}
