"""SlotAddressing against the NumPy reference, and its validation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ultramem_cuda as um
from ultramem_cuda import python_ref as ref


def reference_slots(addressing: um.SlotAddressing, indices: torch.Tensor) -> Any:
    shuffle = addressing.shuffle
    return ref.slots(
        indices.numpy(),
        num_slots=addressing.num_slots,
        window=addressing.window,
        offset=addressing.offset,
        expand=addressing.expand,
        shuffle=shuffle.numpy() if isinstance(shuffle, torch.Tensor) else shuffle,
        seed=addressing.seed,
    )


def assert_equals_reference(addressing: um.SlotAddressing, indices: torch.Tensor) -> None:
    slot, group = addressing.slots(indices)
    expected_slot, expected_group = reference_slots(addressing, indices)
    assert slot.dtype == group.dtype == torch.int64
    np.testing.assert_array_equal(slot.numpy(), expected_slot)
    np.testing.assert_array_equal(group.numpy(), expected_group)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_slots_equal_the_reference(data: st.DataObject) -> None:
    key_expand = data.draw(st.integers(1, 3))
    num_keys = key_expand * data.draw(st.integers(1, 20))
    window = num_keys**2 // key_expand**2
    num_slots = window + data.draw(st.integers(0, 50))
    offset = data.draw(st.integers(0, num_slots - 1))
    seed = data.draw(st.integers(0, 2**63 - 1))
    kind = data.draw(st.sampled_from([None, "feistel", "tensor"]))
    virtual = num_keys**2
    shuffle: Any = kind
    if kind == "tensor":
        shuffle = torch.randperm(virtual, generator=torch.Generator().manual_seed(seed))
    addressing = um.SlotAddressing(num_slots, window, offset, key_expand**2, shuffle, seed)
    assert_equals_reference(addressing, torch.arange(virtual))


@pytest.mark.parametrize("num_keys", [1138, 46341, 2**31 - 1])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_feistel_is_exact_for_large_tables(num_keys: int, seed: int) -> None:
    virtual = num_keys**2
    addressing = um.SlotAddressing(virtual, virtual, virtual // 3, shuffle="feistel", seed=seed)
    generator = torch.Generator().manual_seed(seed % 1000)
    indices = torch.randint(0, virtual, (500,), generator=generator)
    assert_equals_reference(addressing, torch.cat((indices, torch.tensor([0, virtual - 1]))))


@pytest.mark.parametrize("num_keys", [1, 2, 3, 12, 97])
def test_feistel_is_a_bijection_that_parts_rows(num_keys: int) -> None:
    virtual = num_keys**2
    addressing = um.SlotAddressing(virtual, virtual, shuffle="feistel", seed=9)
    slot, _ = addressing.slots(torch.arange(virtual))
    assert slot.unique().numel() == virtual
    if num_keys == 97:
        for line in (slot.view(97, 97)[5], slot.view(97, 97)[:, 5]):
            # 97 draws from 97 rows or columns meet about 61 different ones.
            assert 45 < (line // 97).unique().numel() < 80
            assert 45 < (line % 97).unique().numel() < 80


def test_int32_indices_of_any_shape() -> None:
    addressing = um.SlotAddressing(20, 16, 7, shuffle="feistel", seed=1)
    indices = torch.arange(16)
    slot, group = addressing.slots(indices.int().view(2, 4, 2))
    assert slot.shape == group.shape == (2, 4, 2)
    assert slot.flatten().tolist() == addressing.slots(indices)[0].tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 0}, ValueError, r"window: must be in \[1, num_slots = 40\], got 0"),
        ({"window": 41}, ValueError, r"window: must be in \[1, num_slots = 40\], got 41"),
        ({"window": 4.0}, TypeError, r"window: must be an int, got float"),
        ({"num_slots": 0}, ValueError, r"num_slots: must be in"),
        ({"offset": 40}, ValueError, r"offset: must be in \[0, num_slots = 40\), got 40"),
        ({"offset": -1}, ValueError, r"offset: must be in"),
        ({"expand": 0}, ValueError, r"expand: must be at least 1, got 0"),
        ({"seed": -1}, ValueError, r"seed: must be in \[0, 2\^63\), got -1"),
        ({"window": 8, "shuffle": "feistel"}, ValueError, r"expand \* window: .* got 1 \* 8 = 8"),
        ({"shuffle": "affine"}, ValueError, r"shuffle: must be None, 'feistel' or .*'affine'"),
        ({"shuffle": torch.arange(9, dtype=torch.int32)}, TypeError, r"dtype torch.int64, got"),
        (
            {"shuffle": torch.arange(8)},
            ValueError,
            r"shape \[expand \* window\] = \[9\], got \[8\]",
        ),
        ({"shuffle": torch.zeros(9, dtype=torch.int64)}, ValueError, r"must be a permutation"),
        ({"shuffle": torch.arange(1, 10)}, ValueError, r"must be a permutation of 0 \.\. 8"),
        ({"shuffle": torch.arange(-1, 8)}, ValueError, r"must be a permutation"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        um.SlotAddressing(**{"num_slots": 40, "window": 9, **arguments})


def test_equality_hash_copy_and_pickle() -> None:
    plain = um.SlotAddressing(20, 16, 7, shuffle="feistel", seed=1)
    permutation = torch.randperm(16)
    explicit = um.SlotAddressing(20, 16, 7, shuffle=permutation)
    for addressing in (plain, explicit):
        for twin in (copy.deepcopy(addressing), pickle.loads(pickle.dumps(addressing))):
            assert twin == addressing
            assert hash(twin) == hash(addressing)
            assert twin.num_keys == addressing.num_keys
    assert plain != explicit
    assert plain != um.SlotAddressing(20, 16, 7, shuffle="feistel", seed=2)
    assert explicit != um.SlotAddressing(20, 16, 7, shuffle=permutation.flip(0))
    assert plain != "feistel"
    assert plain.num_keys == 4
    assert explicit.num_keys == 0


def test_moving_a_permutation() -> None:
    explicit = um.SlotAddressing(20, 16, 7, shuffle=torch.randperm(16))
    moved = explicit.to("meta")
    assert isinstance(moved.shuffle, torch.Tensor)
    assert moved.shuffle.is_meta
    assert explicit.to("cpu") is explicit
    feistel = um.SlotAddressing(20, 16, shuffle="feistel")
    assert feistel.to("meta") is feistel


def test_is_plain_data_under_compile() -> None:
    permuted = um.SlotAddressing(20, 16, 7, shuffle=torch.randperm(16))
    for addressing in (um.SlotAddressing(20, 16, 7, shuffle="feistel", seed=5), permuted):
        compiled = torch.compile(addressing.slots, fullgraph=True, backend="eager")
        for mine, eager in zip(
            compiled(torch.arange(16)), addressing.slots(torch.arange(16)), strict=True
        ):
            assert torch.equal(mine, eager)
