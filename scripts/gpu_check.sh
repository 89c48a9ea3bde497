#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# On a machine with a GPU, nvcc, CMake and a Python that has torch with CUDA, pytest and compressed-tensors (vLLM is not
# needed): builds the CUDA kernels, runs their tests on the GPU, NVIDIA's sanitizer where it works, and the bench; writes
# one file of results. PYTHON names the interpreter.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m tools.gpu_check "$@"
