# SPDX-License-Identifier: Apache-2.0
"""What the tests of real kernels share: every format, activations, and where kernels can run."""

import pytest
import torch

from vllm_plugin_tm.bench.cases import DTYPES, Format
from vllm_plugin_tm.bench.schemes import SCHEMES
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

needs_extension = pytest.mark.skipif(not ops.is_available(), reason="extension not built")
SMALL_CACHE = 4096  # keeps the rotating sets small


def symmetries(name):
    """Those of a scheme: small floats have no zero points."""
    return (True,) if SCHEMES[name].floats else (True, False)


def small_group(name):
    """A group size of a scheme that divides small matrices."""
    return SCHEMES[name].groups[0] if SCHEMES[name].groups else 32


FORMATS = [
    Format(group, symmetric, dtype, name)
    for name, scheme in SCHEMES.items()
    for group in (scheme.groups or (32, CHANNEL))
    for symmetric in symmetries(name)
    for dtype in DTYPES
]


def activations(layer, m=5):
    """x [m, K] in the layer's dtype, the same every time."""
    return torch.randn(m, layer.k, generator=torch.Generator().manual_seed(1)).to(layer.dtype)


def format_name(value):
    """A test's name for a format."""
    return value.name if isinstance(value, Format) else None
