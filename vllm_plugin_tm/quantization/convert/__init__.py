# SPDX-License-Identifier: Apache-2.0
"""Converting a checkpoint to compressed-tensors: convert(), and what it takes and gives.

    from vllm_plugin_tm.quantization.convert import Options, convert
    report = convert("SRC", "DST", Options("w4a16", group_size=32))

`vllm-tm convert` is this with a progress bar. Needs torch and compressed-tensors; no vLLM, no
transformers and no class of the model. Nothing heavy is imported before it is used.
"""

from typing import TYPE_CHECKING

from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.options import METHODS, SCHEMES, Options

if TYPE_CHECKING:
    from vllm_plugin_tm.quantization.convert.engine import Report, Watch, convert, preview

__all__ = [
    "METHODS",
    "SCHEMES",
    "ConvertError",
    "Options",
    "Report",
    "Watch",
    "convert",
    "preview",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        from vllm_plugin_tm.quantization.convert import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
