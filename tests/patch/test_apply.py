# SPDX-License-Identifier: Apache-2.0
"""patch/: all or nothing, read back, and a table that tells the truth about the installed vLLM."""

import dataclasses
import importlib

import pytest

from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.patch import table
from vllm_plugin_tm.versions import TESTED_VLLM

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.model_executor import model_loader
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.quantization import auto_gptq, fp8
from vllm.platforms import PlatformEnum
from vllm.v1.worker import cpu_worker

from vllm_plugin_tm.patch import apply, float_methods, linear_methods, moe_methods, worker

SWAPS = {patch: patch.SWAPS.swaps for patch in (float_methods, linear_methods, moe_methods)}
SWAPS[worker] = (worker.SWAPS["cpu"],)


def swapped_classes(patch):
    """The classes that stand in upstream's modules now."""
    return [swap.live() for swap in SWAPS[patch]]


def upstream_state():
    return (
        list(linear._POSSIBLE_KERNELS[PlatformEnum.CPU]),
        list(linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]),
        *(
            {platform: list(kernels) for platform, kernels in table.items()}
            for table in (
                linear._POSSIBLE_FP8_KERNELS,
                linear._POSSIBLE_FP8_BLOCK_KERNELS,
                linear._POSSIBLE_WFP8A16_KERNELS,
                linear._POSSIBLE_NVFP4_KERNELS,
                linear._POSSIBLE_MXFP4_KERNELS,
            )
        ),
        linear.MarlinNvFp4LinearKernel,
        dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER),
        *(swapped_classes(patch) for patch in SWAPS),
        dict(WeightTransferEngineFactory._registry),
    )


@pytest.fixture(autouse=True)
def _untouched():
    before = upstream_state()
    yield
    apply.remove()
    assert upstream_state() == before


def test_apply_is_idempotent_and_read_back():
    apply.apply()
    once = upstream_state()
    apply.apply()
    assert upstream_state() == once
    assert [(row.name, row.applied, row.problems) for row in apply.status()] == [
        (name, True, ())
        for name in (
            *("mixed_precision", "scaled_mm", "float_kernels", "float_methods", "linear_methods"),
            *("moe_methods", "online", "model_loader", "weight_transfer", "worker"),
        )
    ]


def test_status_tells_what_is_not_applied(monkeypatch):
    def applied():
        return {row.name for row in apply.status() if row.applied}

    everything = {patch.name for patch in table.PATCHES}
    assert applied() == set()
    apply.apply()
    assert applied() == everything
    for name, kernels in (
        ("mixed_precision", linear._POSSIBLE_KERNELS),
        ("scaled_mm", linear._POSSIBLE_INT8_KERNELS),
        ("float_kernels", linear._POSSIBLE_FP8_KERNELS),
    ):
        kernels[PlatformEnum.CPU].reverse()
        assert applied() == everything - {name}
        kernels[PlatformEnum.CPU].reverse()
    for name, owner, upstream in (
        ("float_kernels", linear, "MarlinNvFp4LinearKernel"),
        ("float_methods", fp8, "Fp8LinearMethod"),
        ("linear_methods", auto_gptq, "AutoGPTQLinearMethod"),
        ("moe_methods", auto_gptq, "AutoGPTQMoEMethod"),
        ("worker", cpu_worker, "CPUWorker"),
    ):
        monkeypatch.setattr(owner, upstream, getattr(owner, upstream).__bases__[-1])
        assert applied() == everything - {name}
        monkeypatch.undo()
    monkeypatch.delitem(WeightTransferEngineFactory._registry, "tm_safetensors")
    assert applied() == everything - {"weight_transfer"}
    monkeypatch.undo()


def test_every_expectation_holds_in_the_installed_vllm():
    for symbol, expected in table.all_expectations().items():
        assert table.accepts(expected, apply.found_signature(symbol)), symbol


@pytest.mark.parametrize("symbol", list(table.all_expectations()))
def test_each_moved_symbol_stops_everything(monkeypatch, symbol):
    """Whatever single thing upstream changes, nothing is patched and the error names it."""
    before = upstream_state()
    real = apply.found_signature

    def moved(name):
        return "(something, else)" if name == symbol else real(name)

    monkeypatch.setattr(apply, "found_signature", moved)
    with pytest.raises(apply.PatchError) as caught:
        apply.apply()
    text = str(caught.value)
    assert symbol in text
    assert "(something, else)" in text
    assert table.all_expectations()[symbol] in text
    assert all(version in text for version in TESTED_VLLM)
    assert upstream_state() == before


def test_a_missing_symbol_stops_everything(monkeypatch):
    monkeypatch.delattr(linear, "choose_mp_linear_kernel")
    with pytest.raises(apply.PatchError, match=r"choose_mp_linear_kernel: .*found nothing"):
        apply.apply()


@pytest.mark.parametrize("failure", ["install raises", "cannot be read back"])
def test_a_late_failure_takes_the_earlier_patches_back(monkeypatch, failure):
    before = upstream_state()
    last = importlib.import_module(f"vllm_plugin_tm.patch.{table.PATCHES[-1].name}")

    def broken():
        raise RuntimeError("no")

    if failure == "install raises":
        monkeypatch.setattr(last, "install", broken)
    else:
        monkeypatch.setattr(last, "installed", lambda: False)
    with pytest.raises(RuntimeError):
        apply.apply()
    assert upstream_state() == before


def test_upstream_that_lacks_an_import_is_a_patch_error(monkeypatch):
    def gone(_):
        raise ImportError("no KVCacheMethod")

    with monkeypatch.context() as patched:
        patched.setattr(apply, "_module", gone)
        with pytest.raises(apply.PatchError, match="no KVCacheMethod"):
            apply.apply()


def test_the_kernel_wins_selection_and_upstreams_without_it():
    import torch
    from vllm.scalar_type import scalar_types

    config = linear.MPLinearLayerConfig(
        full_weight_shape=(256, 256),
        partition_weight_shape=(256, 256),
        weight_type=scalar_types.uint4b8,
        act_type=torch.bfloat16,
        group_size=32,
        zero_points=False,
    )
    off = linear.choose_mp_linear_kernel(config).__name__
    apply.apply()
    assert linear.choose_mp_linear_kernel(config).__name__ == "TMWNA16LinearKernel"
    # What we decline goes to upstream's kernel as if we were not there.
    other = dataclasses.replace(config, group_size=2)
    assert linear.choose_mp_linear_kernel(other).__name__ == off
    apply.remove()
    assert linear.choose_mp_linear_kernel(config).__name__ == off


def test_loaders_keep_their_names_and_formats():
    upstream = dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
    apply.apply()
    for load_format, loader in model_loader._LOAD_FORMAT_TO_MODEL_LOADER.items():
        assert loader.__name__ == upstream[load_format].__name__
        assert issubclass(loader, upstream[load_format])


@pytest.mark.parametrize("patch", SWAPS, ids=lambda patch: patch.__name__)
def test_classes_are_subclasses_under_the_same_names(patch):
    (row,) = [row for row in table.PATCHES if patch.__name__.endswith(f".{row.name}")]
    before = swapped_classes(patch)
    apply.apply()
    for swap, upstream in zip(SWAPS[patch], before, strict=True):
        live = swap.live()
        assert live.__name__ == upstream.__name__
        assert "." in swap.name or live.__name__ == swap.name
        assert live.__bases__ == (swap.mixin, upstream)
        # What no mixin changes is upstream's.
        if "create_weights" in vars(upstream) and "create_weights" not in vars(swap.mixin):
            assert live.create_weights is upstream.create_weights
        assert live.__name__ in row.how
        symbols = [symbol for symbol in row.expects if symbol.startswith(f"{swap.module}:")]
        assert any(symbol.split(":")[1].startswith(swap.name) for symbol in symbols)


def test_what_the_worker_changes_is_in_the_table():
    (row,) = [patch for patch in table.PATCHES if patch.name == "worker"]
    for name in ("load_model", "reload_weights", "update_weights", "finish_weight_update"):
        assert name in vars(worker.TMWorker)
        assert f"vllm.v1.worker.gpu_worker:Worker.{name}" in row.expects


def test_the_table_explains_every_patch():
    for patch in table.PATCHES:
        assert patch.target in patch.expects
        assert all((patch.why, patch.how, patch.delete_when))
        assert set(TESTED_VLLM) <= set(patch.tested)


def test_the_table_is_importable_without_torch_and_vllm():
    import subprocess
    import sys

    code = (
        "import sys; from vllm_plugin_tm.patch import table; "
        "assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
