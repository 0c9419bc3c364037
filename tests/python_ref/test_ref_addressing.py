from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramem_cuda import python_ref as ref

MASK = (1 << 64) - 1


def mix64_of_int(z: int) -> int:
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & MASK
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def feistel_of_int(v: int, n: int, seed: int) -> int:
    def h(k: int, a: int) -> int:
        return mix64_of_int(mix64_of_int(seed) + 0x9E3779B97F4A7C15 * (4 * a + k + 1) & MASK) % n

    row, col = divmod(v, n)
    row = (row + h(0, col)) % n
    col = (col + h(1, row)) % n
    row = (row + h(2, col)) % n
    col = (col + h(3, row)) % n
    return row * n + col


def test_mix64_is_the_finaliser_of_splitmix64() -> None:
    # The published first outputs of splitmix64 from seed 1234567, whose state steps by a constant.
    state = [(1234567 + k * 0x9E3779B97F4A7C15) & MASK for k in (1, 2, 3)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert ref.mix64(np.array(state, np.uint64)).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 31, 97, 360, 1138])
def test_feistel_is_a_bijection(n: int) -> None:
    mixed = ref.feistel(np.arange(n * n), n, seed=n)
    np.testing.assert_array_equal(np.sort(mixed), np.arange(n * n))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 70000), seed=st.integers(0, MASK), data=st.data())
def test_feistel_agrees_with_integer_arithmetic(n: int, seed: int, data: st.DataObject) -> None:
    v = data.draw(st.lists(st.integers(0, n * n - 1), min_size=1, max_size=8))
    assert ref.feistel(np.array(v), n, seed).tolist() == [feistel_of_int(w, n, seed) for w in v]


@pytest.mark.parametrize("n", [97, 128, 360])
def test_feistel_spreads_every_row_and_column(n: int) -> None:
    """Of n slots drawn at random, 1 - 1/e = 63% of the rows (columns) are met, and few by many."""
    grid = ref.feistel(np.arange(n * n), n, seed=3).reshape(n, n)
    for line in (*grid, *grid.T):
        for coordinate in np.divmod(line, n):
            met = np.bincount(coordinate, minlength=n)
            assert 0.45 * n < np.count_nonzero(met) < 0.8 * n
            assert met.max() <= 12
    # What an affine map keeps: the same step from one row to the next, wherever in the column.
    steps = np.diff(grid, axis=0)
    assert np.unique(steps).size > 0.3 * steps.size


def test_feistel_depends_on_the_seed() -> None:
    a, b = (ref.feistel(np.arange(97 * 97), 97, seed) for seed in (0, 1))
    assert np.count_nonzero(a == b) < 10


@settings(deadline=None, max_examples=40)
@given(
    window=st.integers(1, 9),
    outside=st.integers(0, 5),
    offset=st.integers(0, 40),
    expand=st.integers(1, 5),
    permuted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_window_offset_and_groups(
    window: int, outside: int, offset: int, expand: int, permuted: bool, seed: int
) -> None:
    num_slots = window + outside
    v = np.arange(expand * window)
    permutation = np.random.default_rng(seed).permutation(v) if permuted else v
    slot, group = ref.slots(
        v.reshape(expand, window),
        num_slots=num_slots,
        window=window,
        offset=offset,
        expand=expand,
        shuffle=permutation if permuted else None,
    )
    assert slot.shape == group.shape == (expand, window)
    for index in v.tolist():
        position = int(permutation[index])
        assert slot.flat[index] == (position % window + offset) % num_slots
        assert group.flat[index] == position // window
    # Every virtual copy holds each row of the window once.
    assert len(set(zip(slot.flat, group.flat, strict=True))) == v.size


def test_feistel_addresses_every_row_of_every_group() -> None:
    n, expand = 14, 4
    slot, group = ref.slots(
        np.arange(n * n), num_slots=60, window=49, offset=30, expand=expand, shuffle="feistel"
    )
    assert len(set(zip(slot.tolist(), group.tolist(), strict=True))) == n * n
    assert set(slot.tolist()) == {(k + 30) % 60 for k in range(49)}
    assert np.bincount(group).tolist() == [49] * expand


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": [4]}, IndexError, "indices"),
        ({"indices": [-1]}, IndexError, "indices"),
        ({"indices": [0.5]}, TypeError, "indices"),
        ({"window": 0}, ValueError, "window"),
        ({"window": 6}, ValueError, "window"),
        ({"offset": -1}, ValueError, "offset"),
        ({"expand": 0}, ValueError, "expand"),
        ({"expand": 2, "shuffle": "feistel"}, ValueError, "square"),
        ({"shuffle": "affine"}, ValueError, "shuffle"),
        ({"shuffle": [0, 1, 2, 2]}, ValueError, "permutation"),
    ],
)
def test_bad_arguments_raise(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"indices": [0, 3], "num_slots": 5, "window": 4} | change
    indices = arguments.pop("indices")
    with pytest.raises(error, match=message):
        ref.slots(indices, **arguments)
