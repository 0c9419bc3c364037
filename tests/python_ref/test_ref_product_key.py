from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gradient_checks import assert_close, assert_matches_finite_differences, leaf
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramem_cuda import python_ref as ref


@dataclass
class Case:
    query: np.ndarray
    keys: np.ndarray
    core: np.ndarray | None
    norm: np.ndarray | None
    topk: int
    axis_topk: int
    mode: str

    @property
    def options(self) -> dict:
        return {
            "topk": self.topk,
            "axis_topk": self.axis_topk,
            "mode": self.mode,
            "key_norm_weight": self.norm,
            "eps": 0.2,
        }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    additive = draw(st.booleans())
    num_tokens, num_heads = draw(st.sampled_from([0, 1, 2, 7])), draw(st.integers(1, 2))
    rank = 1 if additive else draw(st.integers(1, 4))
    num_queries = draw(st.sampled_from([1, rank]))
    num_keys, key_dim = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    axis_topk = draw(st.integers(1, num_keys))
    topk = draw(st.integers(1, axis_topk**2))
    if additive:
        axis_topk = max(axis_topk, min(topk, num_keys))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    return Case(
        query=rng.standard_normal((num_tokens, 2, num_heads, num_queries, key_dim)),
        keys=rng.standard_normal((num_heads, 2, rank, num_keys, key_dim)),
        core=None
        if additive
        else rng.standard_normal((draw(st.integers(1, 4)), num_heads, rank, rank)),
        norm=rng.standard_normal(key_dim) if draw(st.booleans()) else None,
        topk=topk,
        axis_topk=axis_topk,
        mode="additive" if additive else "tucker",
    )


def torch_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    core: torch.Tensor | None,
    norm: torch.Tensor | None,
    indices: torch.Tensor,
) -> torch.Tensor:
    """Scores of given slots from the full [n, n] grid of every core."""
    if norm is not None:
        keys = torch.nn.functional.rms_norm(keys, norm.shape, norm, 0.2)
    num_tokens, _, num_heads, _, key_dim = query.shape
    query = query.expand(num_tokens, 2, num_heads, keys.shape[2], key_dim)
    row, col = torch.einsum("tahrk,harnk->athrn", query, keys)
    if core is None:
        grids = (row[:, :, 0, :, None] + col[:, :, 0, None, :])[..., None]
    else:
        grids = torch.einsum("thri,chrs,thsj->thijc", row, core, col)
    flat = grids.flatten(2, 3)
    return flat.gather(2, indices[..., None].expand(*indices.shape, flat.shape[-1]))


def order_key(rank: float, index: int) -> tuple[bool, float, int]:
    """Sorts ascending into the documented order; Python, too, holds -0 equal to 0."""
    return math.isnan(rank), 0.0 if math.isnan(rank) else -rank, index


def best(ranks: np.ndarray, ids: list[int], count: int) -> list[int]:
    return sorted(ids, key=lambda k: order_key(float(ranks[k]), k))[:count]


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_selection_follows_the_rule(case: Case) -> None:
    result = ref.product_key_topk(case.query, case.keys, case.core, **case.options)
    num_tokens, num_heads = case.query.shape[0], case.keys.shape[0]
    num_keys = case.keys.shape[3]
    assert result.scores.shape[:3] == (num_tokens, num_heads, case.topk)

    # Ranks of all keys and of the whole grid, from torch.
    norm = None if case.norm is None else torch.tensor(case.norm)
    core = None if case.core is None else torch.tensor(case.core)
    everything = np.broadcast_to(np.arange(num_keys**2), (num_tokens, num_heads, num_keys**2))
    grid = torch_scores(
        torch.tensor(case.query),
        torch.tensor(case.keys),
        core,
        norm,
        torch.tensor(everything),
    ).sum(-1)
    keys = case.keys if case.norm is None else ref.rms_norm(case.keys, case.norm, 0.2)
    filters = np.ones((2, num_heads, 1)) if case.core is None else ref.tucker_filter(case.core)[:2]
    queries = np.broadcast_to(
        case.query, (*case.query.shape[:3], keys.shape[2], case.query.shape[4])
    )
    for token, head in np.ndindex(num_tokens, num_heads):
        kept = []
        for side in range(2):
            ranks = sum(
                filters[side][head, r] * keys[head, side, r] @ queries[token, side, head, r]
                for r in range(keys.shape[2])
            )
            kept.append(best(ranks, list(range(num_keys)), case.axis_topk))
        assert result.axis_indices[token, head].tolist() == kept
        candidates = [i * num_keys + j for i in kept[0] for j in kept[1]]
        expected = best(grid[token, head].numpy(), candidates, case.topk)
        assert result.indices[token, head].tolist() == expected


@settings(deadline=None, max_examples=30)
@given(case=cases())
def test_result_is_consistent(case: Case) -> None:
    result = ref.product_key_topk(case.query, case.keys, case.core, **case.options)
    i, j = np.divmod(result.grid_positions, case.axis_topk)
    rows = np.take_along_axis(result.axis_indices[:, :, 0], i, -1)
    cols = np.take_along_axis(result.axis_indices[:, :, 1], j, -1)
    np.testing.assert_array_equal(rows * result.num_keys + cols, result.indices)
    np.testing.assert_allclose(result.ranks_at(result.indices), result.ranks, rtol=1e-12)
    np.testing.assert_allclose(result.scores.sum(-1), result.ranks, rtol=1e-9, atol=1e-9)
    picked = np.take_along_axis(
        result.all_axis_scores, result.axis_indices[:, :, :, None, :], axis=-1
    )
    np.testing.assert_array_equal(picked, result.axis_scores)
    np.testing.assert_array_equal(
        np.take_along_axis(result.all_axis_ranks, result.axis_indices, -1), result.axis_ranks
    )


@settings(deadline=None, max_examples=40)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_backward(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    result = ref.product_key_topk(case.query, case.keys, case.core, **case.options)
    grad_scores = rng.standard_normal(result.scores.shape)
    named = {
        "query": case.query,
        "keys": case.keys,
        "core": case.core,
        "norm": case.norm,
    }
    present = [name for name, value in named.items() if value is not None]

    tensors = {name: None if a is None else leaf(a) for name, a in named.items()}
    expected = torch_scores(**tensors, indices=torch.tensor(result.indices))
    expected.backward(torch.tensor(grad_scores))
    assert_close(result.scores, expected)

    gradients = ref.product_key_topk_bwd(
        grad_scores,
        case.query,
        case.keys,
        case.core,
        result,
        key_norm_weight=case.norm,
        eps=0.2,
        mode=case.mode,
    )
    by_name = dict(zip(named, gradients, strict=False))
    assert len(gradients) == (3 if case.norm is None else 4)
    assert (by_name["core"] is None) == (case.core is None)
    for name in present:
        assert_close(by_name[name], tensors[name].grad)

    def scores(*arguments: np.ndarray) -> float:
        a = named | dict(zip(present, arguments, strict=True))
        at = ref.product_key_scores_at(
            a["query"],
            a["keys"],
            a["core"],
            result.indices,
            case.mode,
            key_norm_weight=a["norm"],
            eps=0.2,
        )
        return (at * grad_scores).sum()

    assert_matches_finite_differences(
        scores, [named[name] for name in present], [by_name[name] for name in present], rng
    )


def test_backward_takes_the_indices_of_another_backend() -> None:
    rng = np.random.default_rng(0)
    query, keys = rng.standard_normal((3, 2, 2, 1, 4)), rng.standard_normal((2, 2, 3, 5, 4))
    core = rng.standard_normal((2, 2, 3, 3))
    indices = rng.integers(0, 25, (3, 2, 7))  # in no order, with repetitions
    grad_scores = rng.standard_normal((3, 2, 7, 2))
    tensors = leaf(query), leaf(keys), leaf(core)
    expected = torch_scores(*tensors, None, torch.tensor(indices))
    expected.backward(torch.tensor(grad_scores))
    assert_close(ref.product_key_scores_at(query, keys, core, indices), expected)
    gradients = ref.product_key_topk_bwd(grad_scores, query, keys, core, indices.astype(np.int32))
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert_close(gradient, tensor.grad)


def additive(
    rows: Sequence[float], cols: Sequence[float], **options: object
) -> ref.ProductKeyResult:
    """One token of key dimension 1 whose row and column scores are given."""
    keys = np.array([rows, cols], dtype=np.float64).reshape(1, 2, 1, len(rows), 1)
    return ref.product_key_topk(np.ones((1, 2, 1, 1, 1)), keys, None, mode="additive", **options)


def test_ranks_descend() -> None:
    result = additive([1, 3, 2], [10, 20, 30], topk=3)
    assert result.axis_indices[0, 0].tolist() == [[1, 2, 0], [2, 1, 0]]
    assert result.indices[0, 0].tolist() == [5, 8, 2]
    assert result.scores[0, 0, :, 0].tolist() == [33, 32, 31]


def test_equal_axis_ranks_go_to_the_lower_key() -> None:
    result = additive([5, 7, 5, 7, 5], [0, 0, 0, 0, 0], topk=3)
    assert result.axis_indices[0, 0].tolist() == [[1, 3, 0], [0, 1, 2]]


def test_equal_grid_ranks_go_to_the_lower_index_not_to_the_earlier_position() -> None:
    # Rows are kept in the order 1, 0: of the two slots of rank 3, slot 3 = (1, 1) is met first.
    result = additive([1, 2], [2, 1], topk=4, axis_topk=2)
    assert result.axis_indices[0, 0].tolist() == [[1, 0], [0, 1]]
    assert result.indices[0, 0].tolist() == [2, 0, 3, 1]
    assert result.grid_positions[0, 0].tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_many_ties_on_a_long_axis(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    rows, cols = rng.integers(0, distinct, (2, 300)).astype(float)
    result = additive(rows, cols, topk=90, axis_topk=90)
    kept = [best(scores, list(range(300)), 90) for scores in (rows, cols)]
    assert result.axis_indices[0, 0].tolist() == kept
    sums = (rows[:, None] + cols).ravel()
    candidates = [i * 300 + j for i in kept[0] for j in kept[1]]
    assert result.indices[0, 0].tolist() == best(sums, candidates, 90)


def test_all_equal_scores_keep_the_lowest_indices() -> None:
    rng = np.random.default_rng(0)
    keys = np.repeat(rng.standard_normal((1, 2, 2, 1, 192)), 1138, axis=3)
    query = rng.standard_normal((16, 2, 1, 2, 192))
    result = ref.product_key_topk(query, keys, np.ones((1, 1, 2, 2)), topk=7, axis_topk=3)
    # Equal keys get equal ranks wherever they lie; in a blocked product they do not.
    assert (result.all_axis_ranks == result.all_axis_ranks[..., :1]).all()
    assert (result.axis_indices == [0, 1, 2]).all()
    assert (result.indices == [0, 1, 2, 1138, 1139, 1140, 2276]).all()


def test_negative_zero_equals_zero() -> None:
    # Too small for float32: the ranks round to -0, +0, -0, +0 on the row axis, and so in the grid.
    tiny = [-1e-60, 1e-60, -1e-60, 1e-60]
    result = additive(tiny, [0, 0, 0, 0], topk=16, rank_dtype=np.float32)
    assert np.signbit(result.all_axis_ranks[0, 0, 0]).tolist() == [True, False, True, False]
    assert result.axis_indices[0, 0, 0].tolist() == [0, 1, 2, 3]
    assert np.signbit(result.ranks[0, 0]).tolist() == ([True] * 4 + [False] * 4) * 2
    assert result.indices[0, 0].tolist() == list(range(16))


def test_nan_ranks_below_minus_infinity() -> None:
    result = additive([np.nan, -np.inf, 3, np.inf], [0, 0, 0, 0], topk=4)
    assert result.axis_indices[0, 0, 0].tolist() == [3, 2, 1, 0]
    # The grid: one column is enough to see all four rows.
    whole = additive([np.nan, -np.inf, 3, np.inf], [0, -1, -2, -3], topk=16)
    assert whole.indices[0, 0].tolist()[:8] == [12, 13, 14, 15, 8, 9, 10, 11]
    assert whole.indices[0, 0].tolist()[8:] == [4, 5, 6, 7, 0, 1, 2, 3]


def test_nan_ties_go_to_the_lower_index() -> None:
    result = additive([np.nan, -np.nan, np.nan], [np.nan, 0, np.nan], topk=9)
    assert result.axis_indices[0, 0].tolist() == [[0, 1, 2], [1, 0, 2]]
    assert result.indices[0, 0].tolist() == list(range(9))


def test_ascending_scores_keep_the_last() -> None:
    result = additive(list(range(40)), list(range(0, 400, 10)), topk=5, axis_topk=5)
    assert result.axis_indices[0, 0].tolist() == [[39, 38, 37, 36, 35]] * 2
    # Columns differ by 10 and rows by 1: the last column comes first.
    assert result.indices[0, 0].tolist() == [i * 40 + 39 for i in (39, 38, 37, 36, 35)]


def test_ranks_are_rounded_before_they_are_compared() -> None:
    close = [1.0, 1.0 + 1e-12, 0.0]
    assert additive(close, [0, 0, 0], topk=2).axis_indices[0, 0, 0].tolist() == [1, 0]
    rounded = additive(close, [0, 0, 0], topk=2, rank_dtype=np.float32)
    assert rounded.axis_indices[0, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("place", ["query", "keys", "core"])
@pytest.mark.parametrize("mode", ["tucker", "additive"])
def test_non_finite_inputs_neither_crash_nor_warn(value: float, place: str, mode: str) -> None:
    rng = np.random.default_rng(0)
    rank = 2 if mode == "tucker" else 1
    arrays = {
        "query": rng.standard_normal((3, 2, 1, rank, 4)),
        "keys": rng.standard_normal((1, 2, rank, 6, 4)),
        "core": rng.standard_normal((2, 1, rank, rank)),
    }
    arrays[place].flat[:3] = value
    core = arrays["core"] if mode == "tucker" else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ref.product_key_topk(arrays["query"], arrays["keys"], core, topk=5, mode=mode)
        for slots_kept in result.indices[:, 0]:
            assert len(set(slots_kept.tolist())) == 5
        gradients = ref.product_key_topk_bwd(
            np.ones_like(result.scores), arrays["query"], arrays["keys"], core, result, mode=mode
        )
    assert gradients[0].shape == arrays["query"].shape


def test_keys_that_nobody_kept_have_no_part_in_the_gradients() -> None:
    rng = np.random.default_rng(0)
    query = rng.standard_normal((4, 2, 1, 2, 3))
    keys = rng.standard_normal((1, 2, 2, 6, 3))
    keys[0, :, :, 5] = np.nan
    core = rng.standard_normal((2, 1, 2, 2))
    result = ref.product_key_topk(query, keys, core, topk=4)
    assert (result.axis_indices != 5).all()
    query_gradient, key_gradient, core_gradient = ref.product_key_topk_bwd(
        np.ones_like(result.scores), query, keys, core, result
    )
    assert np.isfinite(query_gradient).all()
    assert np.isfinite(core_gradient).all()
    assert (key_gradient[0, :, :, 5] == 0).all()


def test_axis_topk_defaults_to_at_most_128() -> None:
    rng = np.random.default_rng(0)
    query, keys = rng.standard_normal((1, 2, 1, 1, 2)), rng.standard_normal((1, 2, 1, 150, 2))
    result = ref.product_key_topk(query, keys, np.ones((1, 1, 1, 1)), topk=140)
    assert result.axis_indices.shape[-1] == 128
    result = ref.product_key_topk(query, keys, np.ones((1, 1, 1, 1)), topk=30)
    assert result.axis_indices.shape[-1] == 30


QUERY, KEYS, CORE = np.ones((2, 2, 1, 2, 3)), np.ones((1, 2, 2, 4, 3)), np.ones((1, 1, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((QUERY, KEYS, CORE), {"topk": 0}, "topk"),
        ((QUERY, KEYS, CORE), {"topk": 10, "axis_topk": 3}, "topk"),
        ((QUERY, KEYS, CORE), {"topk": 1, "axis_topk": 5}, "axis_topk"),
        ((QUERY, KEYS, CORE), {"topk": 1, "u": np.ones((1, 2))}, "together"),
        (
            (QUERY, KEYS, CORE),
            {"topk": 1, "u": np.ones((1, 3)), "t": np.ones((1, 3))},
            "must be",
        ),
        ((QUERY, KEYS, CORE), {"topk": 1, "mode": "sum"}, "mode"),
        ((QUERY, KEYS, None), {"topk": 1}, "core"),
        ((QUERY, KEYS, np.ones((1, 1, 3, 3))), {"topk": 1}, "core"),
        ((QUERY[..., :2], KEYS, CORE), {"topk": 1}, "query"),
        ((QUERY, KEYS, CORE), {"topk": 1, "mode": "additive"}, "additive"),
        (
            (QUERY[..., :1, :], KEYS[:, :, :1], None),
            {"topk": 3, "axis_topk": 2, "mode": "additive"},
            "axis_topk",
        ),
        (
            (QUERY[..., :1, :], KEYS[:, :, :1], None),
            {"topk": 1, "mode": "additive", "u": np.ones((1, 1)), "t": np.ones((1, 1))},
            "additive",
        ),
    ],
)
def test_bad_arguments_raise(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ref.product_key_topk(*arguments, **options)


def test_indices_out_of_range_raise() -> None:
    for index in (-1, 16):
        with pytest.raises(IndexError, match="indices"):
            ref.product_key_scores_at(QUERY, KEYS, CORE, np.full((2, 1, 1), index))


def test_additive_corner_holds_the_best_sums() -> None:
    """What axis_topk >= min(topk, n) is for: no sum outside the kept rows and columns is better."""
    rng = np.random.default_rng(0)
    query, keys = rng.standard_normal((6, 2, 2, 1, 3)), rng.standard_normal((2, 2, 1, 9, 3))
    pruned = ref.product_key_topk(query, keys, None, topk=4, mode="additive")
    whole = ref.product_key_topk(query, keys, None, topk=4, axis_topk=9, mode="additive")
    np.testing.assert_array_equal(pruned.indices, whole.indices)


@pytest.mark.parametrize(("num_tokens", "num_keys", "key_dim"), [(129, 200, 64), (16, 1138, 192)])
def test_is_fast_enough_to_test_with(num_tokens: int, num_keys: int, key_dim: int) -> None:
    rng = np.random.default_rng(0)
    query = rng.standard_normal((num_tokens, 2, 1, 2, key_dim))
    keys = rng.standard_normal((1, 2, 2, num_keys, key_dim))
    core = rng.random((2, 1, 2, 2))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        result = ref.product_key_topk(query, keys, core, topk=32)
        ref.product_key_topk_bwd(np.ones_like(result.scores), query, keys, core, result)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0
