"""value_slots: rows of virtual indices, with the addressing's offset and seed from a tensor."""

from __future__ import annotations

import pytest
import torch
from helpers import Data
from torch import Tensor

from ultramem_cuda import SlotAddressing, ops

CASES = {
    "feistel": SlotAddressing(500, 400, 300, expand=4, shuffle="feistel", seed=5),
    "large seed": SlotAddressing(2**40, 900, 2**40 - 1, shuffle="feistel", seed=2**63 - 1),
    "no shuffle": SlotAddressing(100, 77, 60, expand=3),
    "permutation": SlotAddressing(
        300, 250, 299, expand=2, shuffle=torch.randperm(500, generator=Data(1).generator)
    ),
}


def indices_of(addressing: SlotAddressing, device: str, dtype: torch.dtype) -> Tensor:
    """Every virtual index, more than a tile of the CPU's work, in two dimensions."""
    every = torch.arange(addressing.num_virtual, device=device, dtype=dtype)
    return every.repeat(-(-10_000 // every.numel()))[:10_000].view(50, 200)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_addressing(device: str, case: str, dtype: torch.dtype) -> None:
    addressing = CASES[case].to(device)
    indices = indices_of(addressing, device, dtype)
    slots, groups = addressing.slots(indices)
    placement = addressing.placement(device)
    assert torch.equal(ops.value_slots(indices, placement, addressing=addressing), slots)
    both = ops.value_slots(indices, placement, addressing=addressing, with_groups=True)
    assert torch.equal(both, groups * addressing.num_slots + slots)


def test_offset_and_seed_are_those_of_the_tensor(device: str) -> None:
    shared, other = (
        SlotAddressing(500, 400, offset, shuffle="feistel", seed=seed)
        for offset, seed in ((0, 0), (123, 9))
    )
    indices = indices_of(shared, device, torch.int64)
    mine = ops.value_slots(indices, other.placement(device), addressing=shared)
    assert torch.equal(mine, other.slots(indices)[0])
    assert not torch.equal(mine, shared.slots(indices)[0])


def test_value_ffn_takes_what_comes_out(device: str) -> None:
    data, addressing = Data(3, device), CASES["feistel"]
    indices, scores = data.integers(1600, 9, 6), data.normal(9, 6, 2)
    values = data.normal(500, 8)
    placement = addressing.placement(device)
    slots = ops.value_slots(indices, placement, addressing=addressing)
    expected = ops.value_ffn(indices, scores, values, addressing=addressing)
    assert torch.equal(ops.value_ffn(slots, scores, values), expected)
    apart = ops.value_ffn(indices, scores, values, addressing=addressing, sum_groups=False)
    slots = ops.value_slots(indices, placement, addressing=addressing, with_groups=True)
    whole = SlotAddressing(500, 500, expand=4)
    assert torch.equal(
        ops.value_ffn(slots, scores, values, addressing=whole, sum_groups=False), apart
    )


def test_an_index_out_of_range_has_no_slot(device: str) -> None:
    addressing = CASES["feistel"]
    indices = torch.tensor([-1, 0, 1599, 1600, 2**62, -(2**63)], device=device)
    for with_groups in (False, True):
        slots = ops.value_slots(
            indices, addressing.placement(device), addressing=addressing, with_groups=with_groups
        )
        assert torch.equal(
            (slots == -1).cpu(), torch.tensor([True, False, False, True, True, True])
        )


@pytest.mark.parametrize(
    ("indices", "placement", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.int64), "indices must be int64 or int32"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(2), "placement must be"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "placement must be"),
    ],
)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_bad_input(where: str, indices: Tensor, placement: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"value_slots: {message}"):
        ops.value_slots(indices.to(where), placement.to(where), addressing=CASES["no shuffle"])
