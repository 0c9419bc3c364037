from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramem_cuda import python_ref as ref


def test_relative_l2() -> None:
    assert ref.relative_l2([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert ref.relative_l2([0.0], [0.0]) == 0.0
    assert ref.relative_l2([1e-30], [0.0]) == np.inf
    assert np.isnan(ref.relative_l2([np.nan, 1.0], [1.0, 1.0]))


def test_cosine() -> None:
    assert ref.cosine([2.0, 0.0], [1.0, 1.0]) == pytest.approx(0.5**0.5)
    assert ref.cosine([-1.0, -2.0], [1.0, 2.0]) == pytest.approx(-1.0)
    assert ref.cosine([0.0], [0.0]) == 1.0
    assert ref.cosine([0.0], [2.0]) == 0.0


def test_signed_bias() -> None:
    assert ref.signed_bias([1.1, -1.1], [1.0, -1.0]) == pytest.approx(0.1)
    assert ref.signed_bias([1.1, -0.9], [1.0, -1.0]) == pytest.approx(0.0, abs=1e-12)
    assert ref.signed_bias([0.0], [0.0]) == 0.0
    assert ref.signed_bias([1.0], [0.0]) == np.inf


def test_missing_rows() -> None:
    expected = np.array([[0, 0], [0, 1], [2, 0], [0, 0]])
    actual = np.array([[0, 0], [0, 0], [9, 9], [1, 0]])
    assert ref.missing_rows(actual, expected).tolist() == [1, 3]


@pytest.mark.parametrize(
    "measure", [ref.relative_l2, ref.cosine, ref.signed_bias, ref.missing_rows]
)
def test_shapes_are_not_broadcast(measure: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        measure(np.ones((2, 1)), np.ones((2, 2)))


def test_directional_derivative() -> None:
    x, y = np.array([0.5, -1.0]), np.array([2.0])
    derivative = ref.directional_derivative(
        lambda x, y: np.sin(x).sum() * y[0] ** 3, (x, y), (np.array([1.0, 2.0]), np.array([-1.0]))
    )
    expected = (np.cos(x) @ [1, 2]) * 8 - np.sin(x).sum() * 3 * 4
    assert derivative == pytest.approx(expected, rel=1e-10)


# The band. A second implementation is played by the reference on other inputs or in float32.


def problem(
    seed: int, num_tokens: int, num_keys: int, key_dim: int, additive: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, dict]:
    rng = np.random.default_rng(seed)
    rank = 1 if additive else 2
    query = rng.standard_normal((num_tokens, 2, 2, rank, key_dim)).astype(np.float32)
    keys = rng.standard_normal((2, 2, rank, num_keys, key_dim)).astype(np.float32)
    core = None if additive else rng.standard_normal((2, 2, rank, rank)).astype(np.float32)
    mode = "additive" if additive else "tucker"
    return query, keys, core, {"topk": 10, "axis_topk": 10, "mode": mode}


def ranks_in_float32(
    query: np.ndarray, keys: np.ndarray, core: np.ndarray | None, axis_filter: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Axis ranks [T, H, 2, n] and whole grid [T, H, n, n], every operation rounded to float32."""
    scores = np.zeros((query.shape[0], *keys.shape[:4]), np.float32)
    for k in range(keys.shape[4]):  # one product after the other: the longest chain of roundings
        scores = scores + query.swapaxes(1, 2)[..., k, None] * keys[..., k]
    axis = (axis_filter.astype(np.float32)[..., None] * scores).sum(axis=3, dtype=np.float32)
    row, col = scores[:, :, 0], scores[:, :, 1]
    if core is None:
        return axis, row[:, :, 0, :, None] + col[:, :, 0, None, :]
    folded = np.einsum("thri,hrs->thsi", row, core.sum(axis=0, dtype=np.float32))
    return axis, np.einsum("thsi,thsj->thij", folded, col)


def select(axis: np.ndarray, grid: np.ndarray, axis_topk: int, topk: int) -> np.ndarray:
    num_tokens, num_heads, _, num_keys = axis.shape
    indices = np.zeros((num_tokens, num_heads, topk), np.int64)
    for where in np.ndindex(num_tokens, num_heads):
        rows, cols = np.argsort(-axis[where], axis=-1, kind="stable")[:, :axis_topk]
        slots = (rows[:, None] * num_keys + cols).ravel()
        slots.sort()
        ranks = grid[where].ravel()[slots]
        indices[where] = slots[np.argsort(-ranks, kind="stable")[:topk]]
    return indices


@pytest.mark.parametrize("additive", [False, True])
def test_float32_arithmetic_stays_within_the_bands(additive: bool) -> None:
    query, keys, core, options = problem(0, 33, 200, 64, additive)
    result = ref.product_key_topk(query, keys, core, **options)
    axis_band = ref.axis_band(query, keys, result.axis_filter)
    grid_band = ref.grid_band(query, keys, core)
    axis, grid = ranks_in_float32(query, keys, core, result.axis_filter)

    every_slot = np.broadcast_to(np.arange(200 * 200), (33, 2, 200 * 200))
    axis_error = np.abs(axis - result.all_axis_ranks).max(axis=-1)
    grid_error = np.abs(grid.reshape(every_slot.shape) - result.ranks_at(every_slot)).max(axis=-1)
    assert (axis_error <= axis_band / 2).all()
    assert (grid_error <= grid_band / 2).all()
    # Bounds for the worst case, but not idle ones: against the spread of the ranks they are small.
    assert axis_error.max() > 1e-3 * axis_band.max()
    assert axis_band.max() < 1e-3 * result.all_axis_ranks.std()
    assert grid_band.max() < 1e-2 * result.grid_ranks.std()

    comparison = ref.compare_kept_sets(
        result, select(axis, grid, 10, 10), axis_band=axis_band, grid_band=grid_band
    )
    assert comparison.violations == ()
    assert comparison.kept == 33 * 2 * 10
    assert comparison.band_used <= 0.002 * comparison.kept


@settings(deadline=None, max_examples=40)
@given(
    num_keys=st.integers(4, 20),
    data=st.data(),
    additive=st.booleans(),
    scale=st.sampled_from([1e-3, 1e-2, 1e-1]),
    seed=st.integers(0, 2**31),
)
def test_any_ranks_within_half_a_band_are_accepted(
    num_keys: int, data: st.DataObject, additive: bool, scale: float, seed: int
) -> None:
    """Noise of half a band on every rank moves each of two compared ranks by that at most."""
    axis_topk = data.draw(st.integers(2, min(num_keys, 5)))
    topk = data.draw(st.integers(1, axis_topk if additive else axis_topk**2))
    query, keys, core, options = problem(seed, 6, num_keys, 3, additive)
    options |= {"topk": topk, "axis_topk": axis_topk}
    result = ref.product_key_topk(query, keys, core, **options)
    rng = np.random.default_rng(seed)
    every_slot = np.broadcast_to(np.arange(num_keys**2), (6, 2, num_keys**2))
    grid = result.ranks_at(every_slot).reshape(6, 2, num_keys, num_keys)
    axis = result.all_axis_ranks + scale * rng.uniform(-0.5, 0.5, result.all_axis_ranks.shape)
    noisy_grid = grid + scale * rng.uniform(-0.5, 0.5, grid.shape)
    comparison = ref.compare_kept_sets(
        result,
        select(axis, noisy_grid, axis_topk, topk),
        axis_band=scale,
        grid_band=scale,
    )
    assert comparison.violations == ()


def accepted(result: ref.ProductKeyResult, indices: object, band: float = 1e-9) -> bool:
    comparison = ref.compare_kept_sets(result, indices, axis_band=band, grid_band=band)
    return not comparison.violations


def test_a_row_that_enters_may_displace_other_slots() -> None:
    """Rows 1 and 2 tie for second place, to within the band. Row 2 brings two slots that push out
    slot (0, 1), though neither its row, nor its column, nor its rank is near a threshold."""
    # Cbar = diag(2, 1), so that u = t = e_1 and the axes are ranked by the first score alone.
    rows = [[10.0, 5.0, 5.0 - 1e-9], [0.0, -9.0, 25.0]]
    cols = [[3.0, 2.0, 0.0], [1.0, 1.0, 0.0]]
    keys = np.array([rows, cols]).reshape(1, 2, 2, 3, 1)
    result = ref.product_key_topk(
        np.ones((1, 2, 1, 2, 1)), keys, np.diag([2.0, 1.0])[None, None], topk=3, axis_topk=2
    )
    assert result.indices[0, 0].tolist() == [0, 1, 3]
    np.testing.assert_allclose(result.ranks[0, 0], [60, 40, 21])
    assert accepted(result, [[[0, 6, 7]]], band=1e-8)  # ranks 60, 55, 45
    assert not accepted(result, [[[0, 6, 7]]], band=1e-10), "row 2 is below the threshold"
    assert not accepted(result, [[[0, 6, 1]]], band=1e-8), "row 2 is in, but (2, 1) is missing"
    assert not accepted(result, [[[6, 7, 3]]], band=1e-8), "row 0 must be kept"
    assert not accepted(result, [[[0, 1, 4]]], band=1e-8), "(1, 0) ranks above (1, 1)"
    used = ref.compare_kept_sets(result, [[[0, 6, 7]]], axis_band=1e-8, grid_band=0.0)
    assert (used.kept, used.band_used) == (3, 2)


def test_wrong_selections_are_rejected() -> None:
    query, keys, core, options = problem(3, 4, 12, 5)
    options |= {"topk": 6, "axis_topk": 4}
    result = ref.product_key_topk(query, keys, core, **options)
    assert accepted(result, result.indices)

    def changed(position: int, index: int) -> np.ndarray:
        indices = result.indices.copy()
        indices[2, 1, position] = index
        return indices

    kept = result.indices[2, 1]
    next_best = ref.product_key_topk(query, keys, core, **options | {"topk": 7}).indices[2, 1, 6]
    assert not accepted(result, changed(5, next_best)), "a better slot is missing"
    assert not accepted(result, changed(0, kept[1])), "a slot twice"
    assert not accepted(result, changed(0, -1)), "below the range"
    assert not accepted(result, changed(0, 144)), "above the range"
    assert not accepted(result, result.indices[..., ::-1]), "worst first"
    lost_row = next(i for i in range(12) if i not in result.axis_indices[2, 1, 0])
    column = result.axis_indices[2, 1, 1, 0]
    assert not accepted(result, changed(5, lost_row * 12 + column)), "a row below the threshold"
    comparison = ref.compare_kept_sets(
        result, changed(5, next_best), axis_band=1e-9, grid_band=1e-9
    )
    assert comparison.violations[0].startswith("token 2, head 1")
    with pytest.raises(ValueError, match="indices"):
        ref.compare_kept_sets(result, result.indices[:1], axis_band=0.0, grid_band=0.0)


def test_too_many_rows_are_rejected() -> None:
    # All four rows lie on the threshold.
    keys = np.array([[1.0, 1, 1, 1], [4, 3, 2, 1]]).reshape(1, 2, 1, 4, 1)
    result = ref.product_key_topk(
        np.ones((1, 2, 1, 1, 1)), keys, np.ones((1, 1, 1, 1)), topk=1, axis_topk=1
    )
    assert accepted(result, [[[12]]])
    result = ref.product_key_topk(
        np.ones((1, 2, 1, 1, 1)), keys, np.ones((1, 1, 1, 1)), topk=4, axis_topk=2
    )
    assert accepted(result, [[[8, 12, 9, 13]]])
    assert not accepted(result, [[[4, 8, 12, 13]]])


def test_rows_that_must_be_kept_leave_no_room_for_others() -> None:
    # Row 0 is far above the others, so row 1 or row 2 may be kept beside it, but not both, even
    # where the slots kept are of the latter two alone.
    rows, cols = [[9.0, 1.0, 1.0], [-99.0, 1.0, 1.0]], [[1.0, 0.5, 0.0], [1.0, 1.0, 0.0]]
    keys = np.array([rows, cols]).reshape(1, 2, 2, 3, 1)
    core = np.diag([2.0, 1.0])[None, None]
    result = ref.product_key_topk(np.ones((1, 2, 1, 2, 1)), keys, core, topk=2, axis_topk=2)
    assert result.axis_indices[0, 0, 0].tolist() == [0, 1]
    assert result.indices[0, 0].tolist() == [3, 4]
    assert accepted(result, [[[6, 7]]])
    assert not accepted(result, [[[3, 6]]])


def test_larger_noise_than_the_band_is_noticed() -> None:
    query, keys, core, options = problem(1, 50, 60, 8)
    result = ref.product_key_topk(query, keys, core, **options)
    rng = np.random.default_rng(0)
    other = ref.product_key_topk(
        query, keys + 1e-2 * rng.standard_normal(keys.shape), core, **options
    )
    bands = {
        "axis_band": ref.axis_band(query, keys, result.axis_filter),
        "grid_band": ref.grid_band(query, keys, core),
    }
    assert len(ref.compare_kept_sets(result, other.indices, **bands).violations) > 50


def test_nan_ranks_are_compared_as_the_lowest() -> None:
    keys = np.array([[np.nan, 2.0, 1.0], [3.0, 2.0, 1.0]]).reshape(1, 2, 1, 3, 1)
    query = np.ones((1, 2, 1, 1, 1))
    result = ref.product_key_topk(query, keys, None, topk=9, axis_topk=3, mode="additive")
    bands = {
        "axis_band": ref.axis_band(query, keys, result.axis_filter),
        "grid_band": ref.grid_band(query, keys, None),
    }
    assert np.isfinite(bands["axis_band"]).all()
    assert np.isfinite(bands["grid_band"]).all()
    assert ref.compare_kept_sets(result, result.indices, **bands).violations == ()
    nan_first = np.roll(result.indices, 1, axis=-1)
    assert ref.compare_kept_sets(result, nan_first, **bands).violations != ()
