# SPDX-License-Identifier: Apache-2.0
"""load_check.py: what a checkpoint did not fill is found, what it did is left alone."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")
from vllm.model_executor import parameter as upstream

from vllm_plugin_tm.quantization import load_check
from vllm_plugin_tm.quantization.load_check import CheckpointError, Layer


def parameter(data, output_dim=0):
    param = torch.nn.Parameter(data, requires_grad=False)
    if output_dim is not None:
        param.output_dim = output_dim
    return param


def layer_with(tensors, sources=(("up", 32), ("down", 32)), name="block.fused"):
    module = torch.nn.Module()
    for key, param in tensors.items():
        module.register_parameter(key, param)
    return Layer(name, module, tuple(tensors), sources)


@pytest.fixture(autouse=True)
def _one_shard(monkeypatch):
    monkeypatch.setattr(upstream, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(upstream, "get_tensor_model_parallel_world_size", lambda: 1)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output_dim", [0, 1])
def test_every_dtype_and_order_is_found_missing(dtype, output_dim):
    shape = (64, 4) if output_dim == 0 else (4, 64)
    layer = layer_with({"t": parameter(torch.zeros(shape, dtype=dtype), output_dim)})
    marked = load_check.mark([layer])
    with pytest.raises(CheckpointError, match=r"up\.t \(layer block\.fused\)(\n.*)*down\.t"):
        load_check.refuse_missing(marked)
    layer.module.t.data.zero_()
    load_check.refuse_missing(marked)


def test_only_the_missing_source_is_named():
    layer = layer_with({"t": parameter(torch.zeros(64, 4, dtype=torch.int32))})
    marked = load_check.mark([layer])
    layer.module.t.data[:32].fill_(7)
    with pytest.raises(CheckpointError) as caught:
        load_check.refuse_missing(marked)
    assert "down.t" in str(caught.value)
    assert "up.t" not in str(caught.value)


def test_tensors_packed_along_the_output_have_fewer_rows():
    layer = layer_with({"zp": parameter(torch.zeros(8, 4, dtype=torch.int32))})
    marked = load_check.mark([layer])
    layer.module.zp.data[4:].fill_(7)
    with pytest.raises(CheckpointError) as caught:
        load_check.refuse_missing(marked)
    assert "up.zp" in str(caught.value)
    assert "down.zp" not in str(caught.value)


def test_not_a_number_of_the_checkpoints_own_is_not_missing():
    layer = layer_with({"s": parameter(torch.zeros(64, 1, dtype=torch.bfloat16))})
    marked = load_check.mark([layer])
    assert layer.module.s.isnan().all()
    layer.module.s.data.fill_(float("nan"))
    load_check.refuse_missing(marked)


def test_parameters_in_kernel_order_and_without_memory_are_left_alone():
    kernel_order = parameter(torch.full((64, 4), 5, dtype=torch.int32), output_dim=None)
    meta = parameter(torch.empty(64, 4, dtype=torch.int32, device="meta"))
    layer = layer_with({"a": kernel_order, "b": meta})
    assert load_check.mark([layer]) == []
    assert bool((kernel_order == 5).all())


def test_one_scale_for_each_part_is_looked_at_by_part():
    scale = upstream.PerTensorScaleParameter(data=torch.empty(2), weight_loader=print)
    layer = layer_with({"s": scale})
    marked = load_check.mark([layer])
    scale.load_merged_column_weight(loaded_weight=torch.tensor(0.5), shard_id=1)
    with pytest.raises(CheckpointError) as caught:
        load_check.refuse_missing(marked)
    assert "up.s" in str(caught.value)
    assert "down.s" not in str(caught.value)
    scale.load_merged_column_weight(loaded_weight=torch.tensor(0.5), shard_id=0)
    load_check.refuse_missing(marked)


@pytest.mark.parametrize("value", [*range(-128, 128)])
def test_a_byte_that_stands_alone_is_found_missing_and_any_value_is_not(value):
    zero = upstream.BasevLLMParameter(data=torch.zeros(1).char(), weight_loader=print)
    layer = layer_with({"z": zero})
    marked = load_check.mark([layer])
    with pytest.raises(CheckpointError, match=r"up\.z \(layer block\.fused\)"):
        load_check.refuse_missing(marked)
    zero.load_column_parallel_weight(torch.tensor([value], dtype=torch.int8))
    load_check.refuse_missing(marked)
    assert zero.tolist() == [value]


def test_scales_in_kernel_order_are_left_alone():
    """After processing they are plain parameters."""
    layer = layer_with({"s": parameter(torch.ones(64, 1), output_dim=None)})
    assert load_check.mark([layer]) == []


def test_packed_codes_of_another_dtype_are_refused():
    layer = layer_with({"weight_packed": parameter(torch.zeros(64, 4, dtype=torch.int32))})
    layers = {"block.up": layer}
    load_check.refuse_unfit("block.up.weight_packed", torch.zeros(1, dtype=torch.int32), layers)
    load_check.refuse_unfit("other.weight_packed", torch.zeros(1), layers)
    with pytest.raises(CheckpointError, match=r"block\.up\.weight_packed.*int32.*float32"):
        load_check.refuse_unfit("block.up.weight_packed", torch.zeros(1), layers)


@pytest.mark.parametrize("have", DTYPES)
@pytest.mark.parametrize("want", DTYPES)
def test_scales_are_floating_and_codes_their_own_dtype(have, want):
    layer = layer_with({"t": parameter(torch.zeros(64, 4, dtype=want))})
    fits = have == want or (have.is_floating_point and want.is_floating_point)
    tensor = torch.zeros(64, 4, dtype=have)
    if fits:
        load_check.refuse_unfit("up.t", tensor, {"up": layer})
        return
    with pytest.raises(CheckpointError, match=str(have)):
        load_check.refuse_unfit("up.t", tensor, {"up": layer})


def test_single_zero_points_are_of_any_integer_dtype():
    zero = upstream.BasevLLMParameter(data=torch.zeros(1).char(), weight_loader=print)
    layer = layer_with({"z": zero})
    for dtype in (torch.int8, torch.int32, torch.int64):
        load_check.refuse_unfit("up.z", torch.zeros(1, dtype=dtype), {"up": layer})
    with pytest.raises(CheckpointError, match=r"up\.z: expected an integer dtype.*float32"):
        load_check.refuse_unfit("up.z", torch.zeros(1), {"up": layer})


def test_surplus_bias_is_refused_unless_it_is_zero():
    layer = layer_with({"weight_packed": parameter(torch.zeros(64, 4, dtype=torch.int32))})
    load_check.refuse_unfit("up.bias", torch.zeros(64), {"up": layer})
    with pytest.raises(CheckpointError, match=r"up\.bias: surplus.*block\.fused"):
        load_check.refuse_unfit("up.bias", torch.ones(64), {"up": layer})
    layer.module.register_parameter("bias", parameter(torch.zeros(64)))
    load_check.refuse_unfit("up.bias", torch.ones(64), {"up": layer})


@pytest.fixture
def good_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100), "b": torch.ones(3)}, path, metadata={"format": "pt"})
    return path


def test_whole_files_pass(good_file, tmp_path):
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    load_check.refuse_damaged([str(good_file), str(empty)])


@pytest.mark.parametrize("keep", [0, 4, 8, 50, -1, -500])
def test_truncated_files_are_named(good_file, keep):
    data = good_file.read_bytes()
    good_file.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        load_check.refuse_damaged([str(good_file)])


def test_files_with_something_after_the_end_are_named(good_file):
    good_file.write_bytes(good_file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        load_check.refuse_damaged([str(good_file)])


@pytest.mark.parametrize("header", [b"not json", json.dumps({"a": {}}).encode(), b"[1]"])
def test_files_with_an_unreadable_header_are_named(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: damaged safetensors header"):
        load_check.refuse_damaged([str(path)])
