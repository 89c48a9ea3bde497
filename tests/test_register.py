# SPDX-License-Identifier: Apache-2.0
"""register(): inert while off, all or nothing while on, and clear where it cannot do its work.

Each case is a fresh process: what is tested is what registering does to an untouched vLLM.
"""

import os
import subprocess
import sys
import tempfile

import pytest

from vllm_plugin_tm.kernels import ops

needs_extension = pytest.mark.skipif(not ops.is_available(), reason="the extension is not built")

# Identity of everything that the patch table may touch, and of the lists inside.
SNAPSHOT = """
def snapshot():
    import vllm.envs
    from importlib import import_module
    from vllm.model_executor import model_loader
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum
    methods = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    methods += ".compressed_tensors_moe"
    kernels = linear._POSSIBLE_KERNELS
    loaders = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    return (
        id(kernels), [(k, id(v), tuple(map(id, v))) for k, v in kernels.items()],
        id(loaders), [(k, id(v)) for k, v in loaders.items()],
        id(linear.choose_mp_linear_kernel), id(linear.MPLinearKernel),
        id(vllm.envs.environment_variables),
        [
            id(getattr(import_module(f"{methods}_{module}"), f"CompressedTensors{name}MoEMethod"))
            for module, name in (
                ("wna16", "WNA16"), ("w8a8_int8", "W8A8Int8"), ("w4a8_int8", "W4A8Int8")
            )
        ],
    )
"""


def run(code, **variables):
    """Runs `code` in a new process with these of our variables and no others: the process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_PLUGIN")}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        return subprocess.run(
            [sys.executable, script.name],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )


def assert_runs(code, **variables):
    process = run(code, **variables)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


def assert_refuses(code, *words, **variables):
    process = run(code, **variables)
    assert process.returncode != 0, process.stdout
    last = process.stderr[-3000:]
    for word in words:
        assert word in last


def test_off_imports_nothing_heavy():
    assert_runs(
        "import sys, vllm_plugin_tm; vllm_plugin_tm.register();"
        "heavy = {'torch', 'vllm', 'numpy', 'vllm_plugin_tm.patch'} & set(sys.modules);"
        "assert not heavy, heavy",
    )


@pytest.mark.slow
def test_off_leaves_upstream_untouched():
    pytest.importorskip("vllm")
    assert_runs(
        SNAPSHOT + "import vllm.envs, vllm_plugin_tm\n"
        "names = list(vllm.envs.environment_variables)\n"
        "before = snapshot(); vllm_plugin_tm.register(); assert snapshot() == before\n"
        "new = set(vllm.envs.environment_variables) - set(names)\n"
        "assert new == {'VLLM_PLUGIN_TM'}, new\n"  # else vLLM warns of the switch that is set to 0
        "from vllm.platforms import current_platform\n"
        "current_platform.validate_environ(True)\n",
        VLLM_PLUGIN_TM="0",
    )


def test_a_wrong_switch_is_refused():
    assert_refuses(
        "import vllm_plugin_tm; vllm_plugin_tm.register()",
        "EnvError",
        "VLLM_PLUGIN_TM='yes'",
        '"1" (on)',
        VLLM_PLUGIN_TM="yes",
    )


def test_a_misspelt_variable_is_refused_while_on():
    assert_refuses(
        "import vllm_plugin_tm; vllm_plugin_tm.register()",
        "did you mean VLLM_PLUGIN_TM_ISA",
        VLLM_PLUGIN_TM="1",
        VLLM_PLUGIN_TM_ISAA="avx2",
    )


@pytest.mark.slow
@needs_extension
def test_on_applies_everything_once():
    pytest.importorskip("vllm")
    output = assert_runs(
        SNAPSHOT + "import vllm.envs, vllm_plugin_tm\n"
        "from vllm.platforms import PlatformEnum, current_platform\n"
        "from vllm.model_executor.kernels import linear\n"
        "upstream = snapshot(); upstream_list = list(linear._POSSIBLE_KERNELS[PlatformEnum.CPU])\n"
        "vllm_plugin_tm.register(); once = snapshot(); assert once != upstream\n"
        "vllm_plugin_tm.register(); assert snapshot() == once\n"
        "from vllm_plugin_tm.patch import apply\n"
        "assert all(row.applied for row in apply.status()), apply.status()\n"
        "kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]\n"
        "assert kernels[0].__name__ == 'TMWNA16LinearKernel' and kernels[2:] == upstream_list\n"
        "current_platform.validate_environ(True)\n"
        "assert vllm.envs.VLLM_PLUGIN_TM == '1'\n"
        "assert vllm.envs.compile_factors()['VLLM_PLUGIN_TM'] == '1'\n"
        "apply.remove(); assert snapshot() == upstream\n"
        # An untested version is a warning, and the patches are still made.
        "import vllm; vllm.__version__ = '0.99.0'; vllm_plugin_tm.register()\n"
        "assert all(row.applied for row in apply.status()), apply.status()\n",
        VLLM_PLUGIN_TM="1",
    )
    assert output.count("0.99.0 is not a version that vllm-plugin-tm was tested with") == 1


@pytest.mark.slow
@needs_extension
def test_a_spawned_process_reports_its_own_patches():
    """Workers are spawned: what one process patched does not reach another by itself."""
    pytest.importorskip("vllm")
    assert_runs(
        "import multiprocessing\n"
        "def work():\n"
        "    from vllm.plugins import load_general_plugins\n"
        "    load_general_plugins()\n"
        "    from vllm_plugin_tm.patch import apply\n"
        "    return [row.name for row in apply.status() if row.applied]\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        from vllm_plugin_tm.patch.table import PATCHES\n"
        "        assert pool.apply(work) == [patch.name for patch in PATCHES] != []\n",
        VLLM_PLUGIN_TM="1",
    )


@pytest.mark.slow
def test_a_missing_extension_is_one_clear_error():
    pytest.importorskip("vllm")
    assert_refuses(
        "from vllm_plugin_tm.kernels import ops\n"
        "ops.extension_path = lambda: None\n"
        "import vllm_plugin_tm; vllm_plugin_tm.register()",
        "ActivationError",
        "VLLM_PLUGIN_TM=1",
        "pip install",
        VLLM_PLUGIN_TM="1",
    )


@pytest.mark.slow
@needs_extension
def test_an_instruction_set_that_the_processor_lacks_is_refused():
    pytest.importorskip("vllm")
    assert_refuses(
        "from vllm_plugin_tm.kernels import ops\n"
        "ops.cpu_isas = lambda: ('avx2',)\n"
        "import vllm_plugin_tm; vllm_plugin_tm.register()",
        "EnvError",
        "VLLM_PLUGIN_TM_ISA='avx512bf16'",
        "avx2",
        VLLM_PLUGIN_TM="1",
        VLLM_PLUGIN_TM_ISA="avx512bf16",
    )


@pytest.mark.slow
@needs_extension
def test_an_amx_that_the_system_refuses_is_said_once_unless_another_set_is_forced():
    pytest.importorskip("vllm")
    refused = (
        "from vllm_plugin_tm.kernels import ops\n"
        "isas = tuple(isa for isa in ops.cpu_isas() if isa != 'amx')\n"
        "ops.cpu_isas = lambda: isas\n"
        "ops.amx_problem = lambda: 'this processor has AMX, but a made-up reason'\n"
        "import vllm_plugin_tm; vllm_plugin_tm.register()"
    )
    said = "vllm-plugin-tm: this processor has AMX, but a made-up reason"
    assert assert_runs(refused, VLLM_PLUGIN_TM="1").count(said) == 1
    assert said not in assert_runs(refused, VLLM_PLUGIN_TM="1", VLLM_PLUGIN_TM_ISA="avx2")
    assert_refuses(
        refused,
        "VLLM_PLUGIN_TM_ISA='amx'",
        "a made-up reason",
        VLLM_PLUGIN_TM="1",
        VLLM_PLUGIN_TM_ISA="amx",
    )


@pytest.mark.slow
@needs_extension
def test_what_is_about_gpus_is_refused_on_a_cpu(tmp_path):
    pytest.importorskip("vllm")
    assert_refuses(
        "import vllm_plugin_tm; vllm_plugin_tm.register()",
        "EnvError",
        f"VLLM_PLUGIN_TM_CUDA_TUNING='{tmp_path}/tiles.json'",
        "expected it unset",
        "this platform is a CPU",
        VLLM_PLUGIN_TM="1",
        VLLM_PLUGIN_TM_CUDA_TUNING=str(tmp_path / "tiles.json"),
    )


@pytest.mark.slow
@needs_extension
def test_where_no_kernel_runs_upstream_stays_and_the_log_says_so():
    pytest.importorskip("vllm")
    output = assert_runs(
        SNAPSHOT + "import vllm_plugin_tm\n"
        "from vllm_plugin_tm.kernels import ops\n"
        "before = snapshot()\n"
        "real = ops.cpu_isas; ops.cpu_isas = lambda: ()\n"
        "vllm_plugin_tm.register(); assert snapshot() == before\n"
        "ops.cpu_isas = real\n"
        "from vllm.platforms import current_platform as platform\n"
        "type(platform).is_cpu = lambda self: False; type(platform).device_type = 'xpu'\n"
        "vllm_plugin_tm.register(); assert snapshot() == before\n"
        "type(platform).is_cuda = lambda self: True; type(platform).device_type = 'cuda'\n"
        "assert not ops.has_cuda()\n"
        "vllm_plugin_tm.register(); assert snapshot() == before\n"
        "ops.has_cuda = lambda: True\n"
        "Capability = __import__('vllm.platforms.interface').platforms.interface.DeviceCapability\n"
        "type(platform).get_device_capability = lambda self: Capability(7, 5)\n"
        "vllm_plugin_tm.register(); assert snapshot() == before\n",
        VLLM_PLUGIN_TM="1",
    )
    assert "no kernels for this processor" in output
    assert "no kernels for device xpu" in output
    assert "built without kernels for GPUs" in output
    assert "no kernels for this GPU (expected one of sm_80" in output
    assert output.count("left to upstream") == 4
