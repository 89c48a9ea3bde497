# SPDX-License-Identifier: Apache-2.0
"""vllm-plugin-tm, quantized CPU kernels for vLLM: the plugin's entry point and nothing else."""

import logging

from vllm_plugin_tm import envs

# Below "vllm", so that vLLM's own handler and level apply.
logger = logging.getLogger("vllm.plugin_tm")


class ActivationError(RuntimeError):
    """The switch is on, but this installation cannot do what it promises."""


def register() -> None:
    """Called by vLLM in each of its processes (entry point group vllm.general_plugins).

    With VLLM_PLUGIN_TM off nothing is imported and no upstream object is touched, save that names
    of ours found in the environment are made known to vLLM, which would warn of them. With it on
    the patches are applied. Calling it again changes nothing.

    Raises envs.EnvError for a wrong variable, ActivationError where the compiled extension is
    missing, patch.apply.PatchError where upstream is not as expected. Where the platform is neither
    a CPU nor CUDA, or the processor has no kernel of ours, everything is left to upstream with a
    log line.
    """
    if not envs.enabled():
        _make_known(envs.given())
        return
    envs.validate()
    _make_known(tuple(variable.name for variable in envs.VARIABLES))
    from vllm_plugin_tm import installation

    for warning in installation.warnings():
        logger.warning("%s", warning)
    if _usable():
        from vllm_plugin_tm.patch import apply

        apply.apply()


def _make_known(names: tuple[str, ...]) -> None:
    """Adds variables to vLLM's table: it warns of names that it does not know, and hashes those
    that it does know into its compile-cache key."""
    if not names:
        return
    from functools import partial

    import vllm.envs

    for name in names:
        if name not in vllm.envs.environment_variables:
            vllm.envs.environment_variables[name] = partial(envs.text, name)


def _usable() -> bool:
    """Whether this platform and processor can run our kernels; sets device and instruction set."""
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        logger.warning(
            "vllm-plugin-tm has no kernels for device %s: everything is left to upstream",
            current_platform.device_type,
        )
        return False

    from vllm_plugin_tm import installation
    from vllm_plugin_tm.kernels import ops

    if current_platform.is_cpu():
        try:
            installation.check_extension()
        except installation.UnfitError as error:
            raise ActivationError(str(error)) from error
    try:
        ops.load()
    except ops.ExtensionMissingError as error:
        raise ActivationError(
            f"VLLM_PLUGIN_TM=1, but the compiled kernels cannot be loaded: {error}. "
            "Unset VLLM_PLUGIN_TM to run vLLM without them."
        ) from error

    return _usable_gpu() if current_platform.is_cuda() else _usable_cpu()


def _usable_gpu() -> bool:
    from vllm_plugin_tm import machine
    from vllm_plugin_tm.kernels import ops
    from vllm_plugin_tm.quantization.support_matrix import CUDA_ISAS

    if envs.isa() != "auto":
        raise envs.EnvError(
            f"{envs.ISA.name}={envs.isa()!r}: expected it unset or 'auto', it chooses among the "
            "instruction sets of CPUs and this platform is CUDA"
        )
    if not ops.has_cuda():
        logger.warning(
            "vllm-plugin-tm was built without kernels for GPUs: everything is left to upstream. "
            "`pip install . --config-settings=cmake.define.VLLM_PLUGIN_TM_CUDA=ON` builds them"
        )
        return False
    if machine.gpu_isa() is None:
        logger.warning(
            "vllm-plugin-tm has no kernels for this GPU (expected one of %s): everything is left "
            "to upstream",
            ", ".join(CUDA_ISAS),
        )
        return False
    machine.use("cuda")
    return True


def _usable_cpu() -> bool:
    from vllm_plugin_tm.kernels import ops

    if envs.cuda_tuning():
        raise envs.EnvError(
            f"{envs.CUDA_TUNING.name}={envs.cuda_tuning()!r}: expected it unset, it is about "
            "kernels for GPUs and this platform is a CPU"
        )
    wanted = envs.isa()
    if wanted != "auto":
        try:
            ops.set_isa(wanted)
        except ValueError as error:
            raise envs.EnvError(f"{envs.ISA.name}={wanted!r}: {error}") from error
    if not ops.cpu_isas():
        logger.warning(
            "vllm-plugin-tm has no kernels for this processor (AVX2 and FMA are the least): "
            "everything is left to upstream"
        )
        return False
    problem = ops.amx_problem()
    if problem and wanted == "auto":
        logger.warning("vllm-plugin-tm: %s", problem)
    return True
