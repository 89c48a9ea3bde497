# SPDX-License-Identifier: Apache-2.0
"""Models of vLLM whose layers are sent to the CUDA kernels, on the simulator: loaded by vLLM's own
loader, layer by layer beside the CPU's kernels, and updated as on a CPU. Attention is not run."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_device import Device
from sim_device import Simulator

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

import sim_ops
import tiny_llama
import tiny_moe
from served_model import Served, plain, quantized
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from vllm_plugin_tm import layer_table, selftest
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_int8 import (
    TMInt8ScaledMMLinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    TMWNA16LinearKernel,
)
from vllm_plugin_tm.quantization.support_matrix import Machine

TOKEN = tiny_llama.int8_activations()
STATIC = tiny_llama.int8_activations("asymmetric")
BYTES = {"bits": 8, "packed": False, "group": -1}
MODELS = {
    "w4a16": quantized(tiny_llama),
    "w4a16 asymmetric": quantized(tiny_llama, symmetric=False, group=64),
    "w4a8": quantized(tiny_llama, TOKEN, packed=False),
    "w4a8 packed": quantized(tiny_llama, TOKEN, symmetric=False, group=64),
    "w8a8": quantized(tiny_llama, TOKEN, **BYTES),
    "w8a8 static": quantized(tiny_llama, STATIC, static="asymmetric", **BYTES),
    "w4a16 experts": quantized(tiny_moe, symmetric=False, group=32),
    "w4a8 experts": quantized(tiny_moe, packed=False, group=-1),
    "w4a8 packed experts": quantized(tiny_moe, rounded=True, group=32),
    "w8a8 experts": quantized(tiny_moe, **BYTES),
    "tm_w4a16": plain("llama"),
    "tm_w4a16 biases": plain("qwen2", tied=True),
    "tm_w8a8": plain("llama"),
    "tm_w4a8 experts": plain("qwen3_moe"),
}
# Layers of ours: all linear ones, or of tiny_moe the experts, of qwen3_moe both.
COUNTS = {name: 1 for name in MODELS if name.endswith(" experts")} | {"tm_w4a8 experts": 6}
# What CUDA kernels sum as the CPU's do, and so to the same bits.
SAME_BITS = ("w4a8", "w4a8 packed", "w8a8", "w8a8 static", "tm_w8a8")


@contextmanager
def device(sim: Device | None) -> Iterator[None]:
    """The patches of a CPU, or of CUDA where there is a simulator."""
    with pytest.MonkeyPatch.context() as until:
        until.setenv("HF_HUB_OFFLINE", "1")
        # vLLM's CPU worker does the same when it is imported, maybe in another test.
        until.setattr(torch.accelerator, "empty_cache", lambda: None)
        if sim is not None:
            sim_ops.use_simulator(until, sim)
        apply.apply()
        try:
            yield
        finally:
            apply.remove()
    # What is left behind would be taken for the CPU's by every test after this one.
    for name in ("w4a16_linear", "w8a8_pack", "w4a8_moe"):
        op = getattr(torch.ops.vllm_plugin_tm, name)
        assert isinstance(op, torch._ops.OpOverloadPacket), name


@pytest.fixture
def on_cuda(simulated: Device) -> Iterator[None]:
    """The device is "cuda" and the patches are those of it."""
    with device(simulated):
        yield


def options_of(name: str) -> dict[str, str]:
    """vLLM's for a model of MODELS: one of 16 bits is quantized while it is loaded."""
    return {"quantization": name.split()[0]} if name.startswith("tm_") else {}


def outputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What every layer of ours makes of the same rows."""
    found = {}
    for name, module in model.named_modules():
        kernel: Any = layer_table.tm_kernel_of(module)
        if kernel is None:
            continue
        generator = torch.Generator().manual_seed(5)

        def x(rows: int, columns: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator).bfloat16()

        method: Any = module.quant_method
        if hasattr(module, "w13_weight") or hasattr(module, "w13_weight_packed"):
            ids = torch.tensor([[0, 3], [2, 1], [3, 2], [1, 0], [0, 1]], dtype=torch.int32)
            weights = torch.rand(5, 2, generator=generator)
            rows = x(5, kernel.request.hidden)
            found[name] = method.apply(module, rows, weights, ids, None, None)
        else:
            found[name] = method.apply(module, x(5, module.input_size_per_partition))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_layers_are_those_of_the_cpu(simulated: Simulator, tmp_path: Path, name: str) -> None:
    """All of a checkpoint's layers, chosen by upstream's own lists, from the same files; on the
    tiles of either family, whose sums the simulator rounds in one order."""
    MODELS[name](tmp_path, 0)
    with device(None):
        want = outputs(tiny_llama.load(tmp_path, **options_of(name)))
    with device(simulated):
        model = tiny_llama.load(tmp_path, **options_of(name))
        rows = layer_table.collect(model)
        got = outputs(model)
        simulated.counts()
        with simulated.with_wgmma():
            again = outputs(model)
        assert simulated.counts()["wgmma"] > 0
    ours = [row for row in rows if row.on_tm]
    assert {row.isa for row in ours} == {sim_ops.HERE.isa}
    assert set(got) == set(want)
    assert len(got) == sum(row.count for row in ours) == COUNTS.get(name, 8)
    for layer, y in got.items():
        assert torch.equal(again[layer], y), layer
        if name in SAME_BITS:
            assert torch.equal(y, want[layer]), layer
            continue
        # Both are within their own bounds of the oracle (test_hostsim_*.py); two roundings of the
        # output to bfloat16 apart, and for experts one of h.
        error = (y.float() - want[layer].float()).norm() / want[layer].float().norm()
        assert error < 2**-8, (layer, float(error))


@pytest.mark.slow
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("name", MODELS)
def test_updates_equal_a_fresh_load(tmp_path: Path, name: str) -> None:
    """As tests/patch/test_updates.py has it for CPUs."""
    Served(MODELS[name], tmp_path, **options_of(name)).assert_there_and_back()


@pytest.mark.slow
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("name", ["w4a16", "w8a8 experts"])
@pytest.mark.parametrize("way", ["reload", "session"])
def test_a_wrong_update_changes_nothing(tmp_path: Path, name: str, way: str) -> None:
    """A scale that is no number, in the file's last layer."""
    from safetensors.torch import load_file, save_file

    from vllm_plugin_tm.updates.update import UpdateError

    served = Served(MODELS[name], tmp_path)
    before = served.state()
    path = served.checkpoint(1)
    tensors = load_file(path / "model.safetensors")
    last = max(key for key in tensors if key.endswith("down_proj.weight_scale"))
    tensors[last][0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpdateError, match="not a number"):
        served.update(way, path)
    served.assert_is(before)


def config_of(weight_type: Any, group: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A layer of 256 x 256."""
    shape = (256, 256)
    fields: dict[str, Any] = {
        "full_weight_shape": shape,
        "partition_weight_shape": shape,
        "weight_type": weight_type,
        "act_type": dtype,
        "group_size": group,
        "zero_points": False,
    }
    if any(field.name == "has_g_idx" for field in dataclasses.fields(MPLinearLayerConfig)):
        fields["has_g_idx"] = False
    return MPLinearLayerConfig(**fields)


@pytest.mark.usefixtures("on_cuda")
def test_what_no_cuda_kernel_takes_is_left_to_upstream() -> None:
    takes = TMWNA16LinearKernel.can_implement
    assert takes(config_of(scalar_types.uint4b8, 32)) == (True, None)
    for config, words in (
        (
            config_of(scalar_types.uint4b8, 16),
            "group size (16) not supported, supported are 32, mu",
        ),
        (config_of(scalar_types.uint8b128, 128), "no w8a16 kernel for device cuda"),
        (config_of(scalar_types.uint4b8, 64, torch.float32), "activation type (float32)"),
    ):
        ok, reason = takes(config)
        assert (ok, words in str(reason)) == (False, True), reason


@pytest.mark.usefixtures("on_cuda")
def test_a_kernel_that_computes_wrongly_is_left_to_upstream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The start-up test sees one percent, the log says so once, and no layer is taken."""
    config = config_of(scalar_types.uint4b8, 64)
    right = torch.ops.vllm_plugin_tm.w4a16_linear
    # Not the fixture: it would be undone after the simulator's ops are, and put one of them back.
    with pytest.MonkeyPatch.context() as wrong, caplog.at_level(logging.ERROR):
        wrong.setattr(
            torch.ops.vllm_plugin_tm, "w4a16_linear", lambda *arguments: right(*arguments) * 1.01
        )
        wrong.setattr(logging.getLogger("vllm"), "propagate", True)
        for _ in range(2):
            ok, reason = TMWNA16LinearKernel.can_implement(config)
            assert not ok
            assert "self-test of w4a16_linear on sm_80 failed" in str(reason)
        said = {id(r) for r in caplog.records if "left to upstream" in r.getMessage()}
        assert len(said) == 1
        with pytest.raises(ValueError, match="self-test"):
            TMWNA16LinearKernel(config, "weight_packed", "weight_scale")
        # The other schemes' kernels are trusted as before. vLLM's default dtype is the model's.
        wrong.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
        assert TMInt8ScaledMMLinearKernel.is_supported() == (True, None)


@pytest.mark.usefixtures("on_cuda")
def test_every_kernel_passes_its_self_test() -> None:
    results = [selftest.run(kernel) for kernel in selftest.kernels()]
    assert len(results) == 6
    assert all(result.ok and result.isa == sim_ops.HERE.isa for result in results)


def test_the_lists_of_the_device_are_changed_and_put_back(simulated: Device) -> None:
    def lists() -> dict[str, list[type]]:
        tables = {"mixed": linear._POSSIBLE_KERNELS, "int8": linear._POSSIBLE_INT8_KERNELS}
        return {
            f"{name} {platform}": list(table[platform])
            for name, table in tables.items()
            for platform in (PlatformEnum.CPU, PlatformEnum.CUDA)
        }

    before = lists()
    with device(simulated):
        changed = {name for name, kernels in lists().items() if kernels != before[name]}
        assert changed == {f"mixed {PlatformEnum.CUDA}", f"int8 {PlatformEnum.CUDA}"}
        assert linear._POSSIBLE_KERNELS[PlatformEnum.CUDA][0] is TMWNA16LinearKernel
        rows = apply.status()
        assert [row for row in rows if row.problems or not row.applied] == []
        assert "float_kernels" not in {row.name for row in rows}
    assert lists() == before


@pytest.mark.parametrize(
    ("capability", "isa"),
    [((7, 5), None), ((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((12, 0), "PTX")],
)
def test_a_gpu_runs_what_was_compiled_for_it(capability: tuple[int, int], isa: str | None) -> None:
    from vllm_plugin_tm import machine

    found = machine.cuda_isa(*capability)
    assert found is None if isa is None else isa in str(found)
    assert Machine("cuda", found).isa == found
