# SPDX-License-Identifier: Apache-2.0
"""What `vllm-tm doctor` looks at, one function per section. Nothing here prints."""

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vllm_plugin_tm import envs, installation
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization import support_matrix
from vllm_plugin_tm.quantization.online.options import HEAD_SCHEMES, KEY, LM_HEAD

if TYPE_CHECKING:
    from vllm_plugin_tm.selftest import Result

State = Literal["ok", "info", "warn", "fail"]

_DISTRIBUTION = "vllm-plugin-tm"
# Processor features that some kernel, ours or upstream's, is chosen by.
_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
# Shapes do not matter to the matrix as long as they fit: a layer that every group size divides.
_SAMPLE_SIZE = 4096
_SAMPLE_GROUPS = (32, 64, 128, support_matrix.CHANNEL)


@dataclass(frozen=True)
class Check:
    """One line: `state` "fail" means broken, "warn" worth knowing, "info" merely so."""

    name: str
    state: State
    detail: str


@dataclass
class Report:
    """Everything doctor found, by section title."""

    sections: dict[str, list[Check]] = field(default_factory=dict)

    def checks(self) -> Iterator[Check]:
        """All checks of all sections, in order."""
        for section in self.sections.values():
            yield from section

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return all(check.state != "fail" for check in self.checks())


def gather() -> Report:
    """Runs every section. A section that cannot go on says so as a failed check of its own."""
    report = Report()
    for title, section in _SECTIONS.items():
        report.sections[title] = _guarded(title, section)
    return report


def _guarded(title: str, section: Callable[[], list[Check]]) -> list[Check]:
    try:
        return section()
    # A doctor that dies of the illness is of no use: whatever goes wrong is the finding.
    except Exception as error:
        return [Check(title.lower(), "fail", f"{type(error).__name__}: {error}")]


def _versions() -> list[Check]:
    checks = [Check("python", "info", platform.python_version())]
    for name in (_DISTRIBUTION, "torch", "compressed-tensors", "transformers"):
        try:
            checks.append(Check(name, "info", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "fail", "not installed"))
    checks.append(_vllm_version())
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        checks.append(
            Check("vllm command", "warn", 'no distribution is named "vllm": `vllm` cannot start')
        )
    return checks


def _vllm_version() -> Check:
    try:
        import vllm
    except ImportError as error:
        return Check("vllm", "fail", f"cannot be imported: {error}")
    warnings = installation.warnings()
    if warnings:
        return Check("vllm", "warn", " ".join(warnings))
    return Check("vllm", "ok", f"{vllm.__version__}, tested")


def _environment() -> list[Check]:
    checks = []
    for variable in envs.VARIABLES:
        try:
            variable.read()
            given = "" if variable.name in envs.given() else " (default)"
            text = envs.text(variable.name)
            checks.append(Check(variable.name, "ok", f"{text}{given}: {variable.doc}"))
        except envs.EnvError as error:
            checks.append(Check(variable.name, "fail", str(error)))
    if all(check.state == "ok" for check in checks):
        try:
            envs.validate()
        except envs.EnvError as error:
            checks.append(Check("names", "fail", str(error)))
    return checks


def _processor() -> list[Check]:
    import torch

    model, flags = _cpuinfo()
    present = [flag for flag in _FLAGS if flag in flags]
    return [
        Check("processor", "info", f"{model}, {platform.machine()}"),
        Check("features", "info", " ".join(present) or "none that matter here"),
        Check("threads", "info", f"{torch.get_num_threads()} for torch and for these kernels"),
        _gpu(),
        _instruction_sets(),
        *_refused_amx(),
    ]


def _gpu() -> Check:
    """The GPU, and whether layers go to it: on vLLM's CUDA platform, where kernels were built."""
    import torch
    from vllm.platforms import current_platform

    from vllm_plugin_tm import machine

    if not torch.cuda.is_available():
        return Check("GPU", "info", "none")
    major, minor = torch.cuda.get_device_capability()
    found = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    if not current_platform.is_cuda():
        return Check("GPU", "info", f"{found}; this vLLM runs on {current_platform.device_type}")
    if not ops.has_cuda():
        return Check("GPU", "warn", f"{found}; the plugin was built without kernels for GPUs")
    isa = machine.cuda_isa(major, minor)
    if isa is None:
        return Check("GPU", "warn", f"{found}; no kernels for it")
    machine.use("cuda")
    return Check("GPU", "ok", f"{found}; kernels of {isa}")


def _instruction_sets() -> Check:
    ops.load()
    usable = ops.cpu_isas()
    if not usable:
        return Check("kernels for", "warn", "nothing: AVX2 and FMA are the least")
    wanted = envs.isa()
    if wanted != "auto" and wanted not in usable:
        return Check(
            "kernels for", "fail", f"{envs.ISA.name}={wanted}, but only {', '.join(usable)} can run"
        )
    chosen = ops.get_isa() if wanted == "auto" else wanted
    return Check("kernels for", "ok", f"{', '.join(usable)}; in use: {chosen}")


def _refused_amx() -> list[Check]:
    """Why a processor's AMX is not used, where it has it and the system refuses it."""
    problem = ops.amx_problem()
    return [Check("AMX", "warn", problem)] if problem else []


def _cpuinfo() -> tuple[str, frozenset[str]]:
    """Model name and flags of the first processor in /proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    entries: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            entries[key.strip()] = value.strip()
    return entries.get("model name", "unknown"), frozenset(entries.get("flags", "").split())


def _plugin() -> list[Check]:
    """Whether vLLM finds the plugin, and what registering it here and now does."""
    import vllm.envs

    import vllm_plugin_tm

    entry_points = importlib.metadata.entry_points(group="vllm.general_plugins")
    ours = [entry.name for entry in entry_points if entry.value.startswith("vllm_plugin_tm:")]
    checks = [
        Check("entry point", "ok", f"vllm.general_plugins: {ours[0]}")
        if ours
        else Check("entry point", "fail", "vLLM does not see the plugin: is it installed by pip?")
    ]
    allowed = vllm.envs.VLLM_PLUGINS
    if ours and allowed is not None and ours[0] not in allowed:
        checks.append(
            Check("VLLM_PLUGINS", "warn", f"{allowed} leaves out {ours[0]}: vLLM will not load it")
        )
    try:
        vllm_plugin_tm.register()
    except Exception as error:
        return [*checks, Check("register", "fail", f"{type(error).__name__}: {error}")]
    state = "on" if envs.enabled() else "off: VLLM_PLUGIN_TM=1 turns it on"
    return [*checks, Check("switch", "info", state)]


def _patches() -> list[Check]:
    from vllm_plugin_tm.patch import apply

    checks = []
    for row in apply.status():
        if row.problems:
            checks.append(Check(row.name, "fail", "\n".join(row.problems)))
            continue
        state = "applied" if row.applied else "not applied, upstream is as expected"
        checks.append(Check(row.name, "ok", f"{state}: {row.kind} {row.target}"))
    return checks


def _matrix() -> list[Check]:
    """What runs here of every scheme; weight types that fare alike share a line."""
    from vllm_plugin_tm import machine

    checks = []
    for row in _rows():
        alike: dict[tuple[State, str], list[str]] = {}
        for weight_type in row.weight_types:
            cells: dict[tuple[State, str], list[str]] = {}
            for act_dtype in row.act_dtypes:
                cells.setdefault(_cell(row, weight_type, act_dtype), []).append(act_dtype)
            text = "\n".join(f"{', '.join(dtypes)}: {cell[1]}" for cell, dtypes in cells.items())
            state: State = "ok" if any(cell[0] == "ok" for cell in cells) else "info"
            alike.setdefault((state, text), []).append(weight_type)
        for (state, text), weight_types in alike.items():
            checks.append(Check(f"{row.scheme} {' '.join(weight_types)}", state, text))
    if machine.device() == "cpu":
        checks += [_head(scheme) for scheme in HEAD_SCHEMES]
    if envs.w4a16_int8_activations():
        text = f"rounded to int8, which costs accuracy: {envs.INT8_ACTIVATIONS.name}=1"
        checks.append(Check("w4a16 activations", "warn", text))
    return checks


def _rows() -> list[support_matrix.Row]:
    """The matrix of this process's device."""
    from vllm_plugin_tm import machine

    return [row for row in support_matrix.MATRIX if row.device == machine.device()]


def _head(scheme: str) -> Check:
    """Whether an output head of 16 bits may be quantized while it is loaded."""
    row = next(row for row in _rows() if row.scheme == scheme)
    symmetric = (name for name in row.weight_types if not support_matrix.needs_zero_points(name))
    state, text = _cell(row, next(symmetric), "bfloat16")
    asked = f'--additional-config \'{{"{KEY}": {{"{LM_HEAD}": "{scheme}"}}}}\''
    return Check(
        f"{LM_HEAD} {scheme}", state, f"{text}; quantized while loading where asked: {asked}"
    )


def _cell(row: support_matrix.Row, weight_type: str, act_dtype: str) -> tuple[State, str]:
    """Which group sizes run, or why none does."""
    from vllm_plugin_tm import machine

    here = machine.detect()
    verdicts = {
        group: support_matrix.check(
            _sample(weight_type, act_dtype, group), here, envs.schemes(), row.scheme
        )
        for group in _SAMPLE_GROUPS
    }
    groups = ", ".join(
        "channel" if group == support_matrix.CHANNEL else str(group)
        for group, verdict in verdicts.items()
        if verdict.ok
    )
    if groups:
        return "ok", f"groups {row.groups or groups}"
    reasons = dict.fromkeys(verdict.reason for verdict in verdicts.values() if verdict.reason)
    return "info", f"upstream's: {'; '.join(reasons)}"


def _sample(weight_type: str, act_dtype: str, group_size: int) -> support_matrix.Request:
    return support_matrix.Request(
        weight_type=weight_type,
        zero_points=support_matrix.needs_zero_points(weight_type),
        group_size=group_size,
        act_dtype=act_dtype,
        k=_SAMPLE_SIZE,
        n=_SAMPLE_SIZE,
        full_k=_SAMPLE_SIZE,
    )


def _self_test() -> list[Check]:
    """Every kernel on every instruction set that this processor has, not only the one in use; on a
    GPU all of its kernels."""
    from vllm_plugin_tm import machine, selftest

    ops.load()
    if machine.device() == "cuda":
        return [_tested(selftest.run(kernel)) for kernel in selftest.kernels()]
    usable = ops.cpu_isas()
    if not usable:
        return [Check("self-test", "info", "no kernel runs on this processor")]
    in_use = ops.get_isa()
    checks = []
    try:
        for isa in usable:
            ops.set_isa(isa)
            checks += [_tested(selftest.run(kernel)) for kernel in selftest.kernels()]
    finally:
        ops.set_isa(in_use)
    return checks


def _tested(result: "Result") -> Check:
    detail = f"worst error {result.error:.2f} of what rounding explains"
    if not result.ok:
        detail += f", at {result.detail}"
    return Check(f"{result.kernel} {result.isa}", "ok" if result.ok else "fail", detail)


_SECTIONS: dict[str, Callable[[], list[Check]]] = {
    "Versions": _versions,
    "Environment": _environment,
    "Machine": _processor,
    "Plugin": _plugin,
    "Patches": _patches,
    "Support matrix on this machine": _matrix,
    "Self-test": _self_test,
}
