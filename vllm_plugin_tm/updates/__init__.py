# SPDX-License-Identifier: Apache-2.0
"""Changing the weights of a model that serves: all of them, or none and the old ones still serve.

How the tensors of a layer become its kernel's is in quantization/, and is the same as at the start.
"""
