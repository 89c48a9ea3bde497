# SPDX-License-Identifier: Apache-2.0
"""What is kept of the copies into a weight, and what is done."""

import pytest
import torch

pytest.importorskip("vllm", reason="the package of quantizing while loading imports vLLM")

from vllm_plugin_tm.quantization.online.arrivals import keeping, pieces_of

UNTOUCHED = -7.0
K = 6


def weight(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((*shape, K), UNTOUCHED), requires_grad=False)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@keeping
def load(param: torch.Tensor, loaded: torch.Tensor, start: int = 0, columns: int = K) -> str:
    param.data.narrow(-2, start, loaded.shape[-2])[..., :columns].copy_(loaded)
    return "loaded"


def joined(param: torch.nn.Parameter, unit: int = 1) -> torch.Tensor:
    return torch.cat([tensor for _, tensor in pieces_of(param, unit)])


def test_rows_are_kept_and_not_copied() -> None:
    """The parts of a fused layer, in whatever order they come."""
    param, q, k, v = weight(12), numbers(8, K), numbers(2, K, seed=1), numbers(2, K, seed=2)
    assert load(param, v, 10) == "loaded"
    load(param, q, 0)
    load(param, k, 8)
    assert bool((param == UNTOUCHED).all())
    pieces = pieces_of(param, 2)
    assert [(row, tensor.data_ptr()) for row, tensor in pieces] == [
        (0, q.data_ptr()),
        (8, k.data_ptr()),
        (10, v.data_ptr()),
    ]
    assert pieces_of(param, 1)[0][1].data_ptr() == param.data_ptr(), "they are given once"


def test_a_part_of_the_columns_of_a_file_is_a_view_of_it() -> None:
    param, whole = weight(4), numbers(4, 2 * K)
    load(param, whole[:, K:])
    ((row, tensor),) = pieces_of(param, 1)
    assert row == 0
    assert tensor.data_ptr() == whole[:, K:].data_ptr()


def test_experts_that_come_in_one_tensor_are_kept_one_by_one() -> None:
    """Transposed, as some checkpoints have them."""
    param, whole = weight(3, 4), numbers(3, K, 4).transpose(1, 2)
    load(param, whole)
    pieces = pieces_of(param, 4)
    assert [row for row, _ in pieces] == [0, 4, 8]
    assert torch.equal(torch.cat([tensor for _, tensor in pieces]), whole.reshape(12, K))


@pytest.mark.parametrize(
    ("rows", "starts", "unit"),
    [(10, (0, 6), 1), (8, (0, 4), 3), (8, (0, 2, 4), 1), (8, (4,), 1), (9, (0, 4), 1)],
    ids=["a gap", "not at a unit", "twice the same", "no beginning", "no end"],
)
def test_parts_that_are_no_whole_are_copied(rows: int, starts: tuple[int, ...], unit: int) -> None:
    """Later ones over earlier ones; rows that none brings are what the memory held."""
    param, want = weight(rows), torch.full((rows, K), UNTOUCHED)
    for seed, start in enumerate(starts):
        part = numbers(4, K, seed=seed)
        load(param, part, start)
        want[start : start + 4] = part
    ((row, tensor),) = pieces_of(param, unit)
    assert (row, tensor.data_ptr()) == (0, param.data_ptr())
    assert torch.equal(tensor, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_numbers_are_cast_by_the_copy(dtype: torch.dtype) -> None:
    param, part = weight(4), numbers(4, K).to(dtype)
    load(param, part)
    assert torch.equal(param, part.float())
    assert torch.equal(joined(param), part.float())


def test_copies_keep_their_order() -> None:
    """One into some columns is done, and so must be those before it."""
    param, rows, columns, last = weight(4), numbers(4, K), numbers(4, 2, seed=1), numbers(2, K)
    load(param, rows)
    load(param, columns, 0, 2)
    assert torch.equal(param, torch.cat([columns, rows[:, 2:]], 1))
    load(param, last, 2)
    assert torch.equal(joined(param), torch.cat([param[:2], last]))


def test_a_parameter_without_memory_is_loaded_by_the_loader_itself() -> None:
    """Upstream counts the copies of that call to know when a layer is complete."""
    param = torch.nn.Parameter(torch.empty(4, K, device="meta"), requires_grad=False)
    assert load(param, numbers(4, K)) == "loaded"
    assert not vars(param)


def test_other_tensors_are_copied() -> None:
    other = torch.zeros(4, K)

    @keeping
    def load_beside(param: torch.Tensor, loaded: torch.Tensor) -> None:
        other.copy_(loaded)
        param.data.copy_(loaded)

    param, part = weight(4), numbers(4, K)
    load_beside(param, part)
    assert torch.equal(other, part)
    assert bool((param == UNTOUCHED).all())
    assert torch.equal(joined(param), part)
