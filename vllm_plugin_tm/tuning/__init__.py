# SPDX-License-Identifier: Apache-2.0
"""Measured choices of tiles for the CUDA kernels. A tile changes no bit of a result
(csrc/cuda/tuning.h), so a choice that does not fit costs time alone."""
