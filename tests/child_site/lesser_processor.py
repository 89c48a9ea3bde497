# SPDX-License-Identifier: Apache-2.0
"""Makes torch, vLLM and the plugin believe in a lesser processor than this one.

They choose as they would there: vLLM loads its library for that processor, torch and oneDNN read
their environment variables, the plugin's list of instruction sets ends where the processor does,
and what a process reads from /proc/cpuinfo lacks the hidden flags. Kernels of FP8 that ask for
AVX-512 VBMI in C++ still find it.
"""

import builtins
import functools
import io
import os
import tempfile
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

VARIABLE = "TESTS_PROCESSOR"
"""Names the processor to believe in, one of PROCESSORS. Unset, it is this one without AMX in torch
and vLLM: what vLLM runs and refuses without the plugin is then the same on more machines."""

TESTS = (
    "bench/test_bench_amx.py",
    "bench/test_bench_kernels.py",
    "bench/test_bench_limit_ops.py",
    "bench/test_bench_machine.py",
    "bench/test_bench_moe.py",
    "bench/test_bench_peers.py",
    "e2e/test_refusals.py",
    "e2e/test_serve.py",
    "kernels/test_instruction_sets.py",
    "kernels/test_ops.py",
    "quantization/compressed_tensors/compressed_tensors_moe/test_experts_handover.py",
    "quantization/convert/test_convert_command.py",
    "quantization/test_registry.py",
    "test_doctor.py",
    "test_layer_table.py",
    "test_register.py",
    "test_selftest.py",
    "upstream/test_upstream_subset.py",
)
"""Files that expect something else on another processor: they have the mark `processor`."""

_CPUINFO = "/proc/cpuinfo"
_FAMILIES = ("avx512", "avxvnni", "avx10", "amx")
_CORE = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


@dataclass(frozen=True)
class Processor:
    """`isas`: the plugin's instruction sets, best first. `flags`: those of AVX-512, AVX-VNNI and
    AMX that it has, as in /proc/cpuinfo. `settings`: what torch and oneDNN are told."""

    isas: tuple[str, ...]
    flags: tuple[str, ...]
    settings: dict[str, str]

    def hides(self, flag: str) -> bool:
        """Whether a flag is one that it lacks; torch spells some differently."""
        name = flag.replace("_", "")
        return name.startswith(_FAMILIES) and name not in {f.replace("_", "") for f in self.flags}


def _told(torch_name: str, onednn_name: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": torch_name, "ONEDNN_MAX_CPU_ISA": onednn_name}


PROCESSORS = {
    "avx2": Processor(("avx2",), (), _told("avx2", "AVX2")),
    "avxvnni": Processor(("avxvnni", "avx2"), ("avx_vnni",), _told("avx2", "AVX2_VNNI")),
    "avx512": Processor(("avx512", "avx2"), _CORE, _told("avx512", "AVX512_CORE")),
    "avx512vnni": Processor(
        ("avx512vnni", "avx512", "avx2"),
        (*_CORE, "avx512_vnni"),
        _told("avx512", "AVX512_CORE_VNNI"),
    ),
    "avx512bf16": Processor(
        ("avx512bf16", "avx512vnni", "avx512", "avx2"),
        (*_CORE, "avx512_vnni", "avx512_bf16"),
        _told("avx512", "AVX512_CORE_BF16"),
    ),
}


def here() -> list[str]:
    """The names of those that this processor is above, or equal to."""
    flags = _flags()
    return [name for name, processor in PROCESSORS.items() if flags.issuperset(processor.flags)]


def _flags() -> set[str]:
    with open(_CPUINFO) as file:
        return set(file.read().split())


def named(environment: MutableMapping[str, str]) -> Processor | None:
    """The processor that an environment names, or None.

    Raises:
        ValueError: it names none of PROCESSORS, or one that this processor is not above.
    """
    name = environment.get(VARIABLE, "")
    if not name:
        return None
    if name not in PROCESSORS:
        raise ValueError(f"{VARIABLE}={name!r}: expected one of {', '.join(PROCESSORS)}")
    missing = set(PROCESSORS[name].flags) - _flags()
    if missing:
        raise ValueError(f"{VARIABLE}={name!r}: this processor lacks {', '.join(sorted(missing))}")
    return PROCESSORS[name]


def hide(processor: Processor) -> None:
    """Hides what a processor lacks from this process: from readers of /proc/cpuinfo at once, from
    torch and oneDNN if neither was used yet.

    torch finds what it has compiled by its source, not by the processor: what one arm compiled
    ends a process of another. Each has a cache of its own.
    """
    os.environ.update(processor.settings)
    cache = f"torchinductor_{os.getuid()}_{processor.isas[0]}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), cache)
    if not hasattr(io.open, "__wrapped__"):  # once, where a parent's process was forked
        builtins.open = io.open = _opening(io.open, processor)


def _opening(real: Any, processor: Processor) -> Any:
    @functools.wraps(real)
    def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if isinstance(file, int) or os.fspath(file) != _CPUINFO:
            return real(file, mode, *arguments, **named)
        with real(_CPUINFO) as whole:
            text = "\n".join(_without(line, processor) for line in whole.read().split("\n"))
        return io.BytesIO(text.encode()) if "b" in mode else io.StringIO(text)

    return opening


def _without(line: str, processor: Processor) -> str:
    name, colon, flags = line.partition(":")
    if name.strip() != "flags":
        return line
    return f"{name}{colon} {' '.join(f for f in flags.split() if not processor.hides(f))}"


def limit_products(torch: ModuleType) -> None:
    """Makes torch multiply FP8 as it does without AMX: where cpuid says AMX it asks oneDNN, which
    was told that there is none, and refuses."""
    real, enabled = torch._scaled_mm, torch._C._get_mkldnn_enabled

    @functools.wraps(real)
    def _scaled_mm(*arguments: Any, **named: Any) -> Any:
        before = enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return real(*arguments, **named)
        finally:
            torch._C._set_mkldnn_enabled(before)

    torch._scaled_mm = _scaled_mm  # type: ignore[attr-defined]


def is_amx(flag: str) -> bool:
    """Whether a flag is one of AMX."""
    return flag.startswith("amx")


def limit_torch(torch_cpu: ModuleType, hides: Callable[[str], bool]) -> None:
    """Makes torch.cpu say that the processor lacks what `hides` names."""
    real = torch_cpu.get_capabilities

    def get_capabilities() -> dict[str, Any]:
        return {k: v and not hides(k) for k, v in real().items()}

    torch_cpu.get_capabilities = get_capabilities  # type: ignore[attr-defined]


def limit_plugin(ops: ModuleType, processor: Processor) -> None:
    """Makes vllm_plugin_tm.kernels.ops know the processor's instruction sets, the best in use."""
    real_isas, real_fakes = ops.cpu_isas, ops._register_fakes

    def cpu_isas() -> tuple[str, ...]:
        return tuple(isa for isa in real_isas() if isa in processor.isas)

    def register_fakes() -> None:  # the last step of loading
        import torch

        real_fakes()
        torch.ops.vllm_plugin_tm.set_isa(processor.isas[0])

    ops.cpu_isas = cpu_isas  # type: ignore[attr-defined]
    ops._register_fakes = register_fakes  # type: ignore[attr-defined]


if __name__ == "__main__":
    print(*here())
