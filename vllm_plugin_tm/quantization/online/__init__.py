# SPDX-License-Identifier: Apache-2.0
"""Quantizing an unquantized checkpoint while vLLM loads it: `--quantization tm_w4a16` and kin.

The arithmetic and the choice of layers are the converter's (quantization/convert), the kernels and
the layers' parameters those of a compressed-tensors checkpoint of the same scheme.
"""
