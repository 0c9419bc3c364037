"""product_key_topk where selections go wrong: ties, signed zeros, NaN, Inf, extreme sizes.

Most inputs are small integers: float32 sums them exactly, so that ranks tie often, the reference
has the same ranks, and the kept slots and their order must be equal, not merely close.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    Data,
    accumulation_dtype,
    array,
    check_product_key_topk,
    check_zero_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from retrieval_reference import judge, reference
from torch import Tensor

from ultramem_cuda import ops
from ultramem_cuda import python_ref as ref


def from_axis_scores(
    rows: list[float], cols: list[float], device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """query and keys (T = H = R = Kd = 1) whose axis scores are these."""
    keys = torch.tensor([rows, cols], dtype=dtype, device=device).reshape(1, 2, 1, len(rows), 1)
    return torch.ones(1, 2, 1, 1, 1, dtype=dtype, device=device), keys


def unit_core(device: str) -> Tensor:
    return torch.ones(1, 1, 1, 1, device=device)


def check_exact(
    query: Tensor, keys: Tensor, core: Tensor | None, *, topk: int, axis_topk: int, mode: str
) -> None:
    """Indices and scores equal the reference's; u = 1 .. R and t = R .. 1 keep ranks integers."""
    u = t = None
    if core is not None:
        rank, heads = core.shape[-1], core.shape[1]
        u = torch.arange(1.0, rank + 1, device=core.device).expand(heads, rank)
        t = u.flip(-1)
    scores, indices = ops.product_key_topk(
        query, keys, core, topk=topk, axis_topk=axis_topk, u=u, t=t, mode=mode
    )
    expected = ref.product_key_topk(
        array(query),
        array(keys),
        None if core is None else array(core),
        topk=topk,
        axis_topk=axis_topk,
        u=None if u is None else array(u),
        t=None if t is None else array(t),
        mode=mode,
    )
    np.testing.assert_array_equal(array(indices), expected.indices)
    np.testing.assert_array_equal(array(scores), expected.scores)


def integers(data: Data, *shape: int, dtype: torch.dtype, high: int = 4) -> Tensor:
    return (data.integers(2 * high + 1, *shape) - high).to(dtype)


@given(
    tokens=st.sampled_from([1, 7, 40]),
    heads=st.integers(1, 2),
    rank=st.integers(1, 4),
    cores=st.integers(1, 3),
    key_dim=st.integers(1, 33),
    num_keys=st.integers(1, 150),
    mode=st.sampled_from(["tucker", "additive"]),
    sizes=st.data(),
    seed=st.integers(0, 2**32),
)
def test_drawn_ties(
    device_dtype: tuple[str, torch.dtype],
    tokens: int,
    heads: int,
    rank: int,
    cores: int,
    key_dim: int,
    num_keys: int,
    mode: str,
    sizes: st.DataObject,
    seed: int,
) -> None:
    device, dtype = device_dtype
    axis_topk = sizes.draw(st.integers(1, min(num_keys, 40)), label="axis_topk")
    topk = axis_topk if mode == "additive" else sizes.draw(st.integers(1, axis_topk**2), "topk")
    topk = min(topk, 1024)
    rank = 1 if mode == "additive" else rank
    data = Data(seed, device)
    query = integers(data, tokens, 2, heads, rank, key_dim, dtype=dtype)
    keys = integers(data, heads, 2, rank, num_keys, key_dim, dtype=dtype)
    core = None
    if mode == "tucker":
        core = integers(data, cores, heads, rank, rank, dtype=accumulation_dtype(dtype), high=2)
    check_exact(query, keys, core, topk=topk, axis_topk=axis_topk, mode=mode)


@pytest.mark.parametrize("num_keys", [1, 2, 7, 8, 9, 15, 17, 31, 33, 63, 65, 127, 129, 1138])
@pytest.mark.parametrize("mode", ["tucker", "additive"])
def test_number_of_keys_around_multiples_of_vector_widths(
    device: str, num_keys: int, mode: str
) -> None:
    data = Data(num_keys, device)
    query = integers(data, 5, 2, 1, 1, 11, dtype=torch.float32)
    keys = integers(data, 1, 2, 1, num_keys, 11, dtype=torch.float32)
    core = unit_core(device) if mode == "tucker" else None
    axis_topk = min(num_keys, 16)
    check_exact(query, keys, core, topk=axis_topk, axis_topk=axis_topk, mode=mode)


@pytest.mark.parametrize("key_dim", [1, 3, 8, 15, 16, 17, 31, 64, 65, 513])
def test_key_dimension_around_multiples_of_vector_widths(
    device_dtype: tuple[str, torch.dtype], key_dim: int
) -> None:
    device, dtype = device_dtype
    data = Data(key_dim, device)
    query = integers(data, 9, 2, 1, 2, key_dim, dtype=dtype)
    keys = integers(data, 1, 2, 2, 21, key_dim, dtype=dtype)
    core = integers(data, 2, 1, 2, 2, dtype=accumulation_dtype(dtype), high=2)
    check_exact(query, keys, core, topk=20, axis_topk=5, mode="tucker")


def test_no_tokens(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(1, device)
    query = data.normal(0, 2, 2, 2, 9, dtype=dtype, requires_grad=True)
    keys = data.normal(2, 2, 2, 20, 9, dtype=dtype, requires_grad=True)
    core = data.cores(3, 2, 2, requires_grad=True)
    gain = data.gains(9, requires_grad=True)
    scores, indices = ops.product_key_topk(query, keys, core, topk=5, key_norm_weight=gain)
    assert scores.shape == (0, 2, 5, 3)
    assert indices.shape == (0, 2, 5)
    scores.sum().backward()
    check_zero_gradients([query, keys, core, gain])


def test_no_tokens_additive(device: str) -> None:
    data = Data(1, device)
    query = data.normal(0, 2, 1, 1, 9, requires_grad=True)
    keys = data.normal(1, 2, 1, 20, 9, requires_grad=True)
    scores, _ = ops.product_key_topk(query, keys, None, topk=5, mode="additive")
    assert scores.shape == (0, 1, 5, 1)
    scores.sum().backward()
    check_zero_gradients([query, keys])


def test_one_token(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(2, device)
    query = data.normal(1, 2, 1, 2, 60, dtype=dtype)
    keys = data.normal(1, 2, 2, 333, 60, dtype=dtype)
    check_product_key_topk(query, keys, data.cores(2, 1, 2), topk=32, axis_topk=16)


def test_one_key(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(3, device)
    query, keys = data.normal(6, 2, 2, 2, 20, dtype=dtype), data.normal(2, 2, 2, 1, 20, dtype=dtype)
    _, indices = check_product_key_topk(query, keys, data.cores(2, 2, 2), topk=1)
    assert not indices.any()


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_that_are_not_packed_and_not_aligned(
    device: str, dtype: torch.dtype, tokens: int
) -> None:
    """Strided inputs, and contiguous ones that begin two bytes behind a multiple of 16."""
    data = Data(12, device)
    query = integers(data, tokens, 2, 2, 2, 24, dtype=dtype)
    keys = integers(data, 2, 2, 2, 90, 24, dtype=dtype)
    core = integers(data, 2, 2, 2, 2, dtype=torch.float32, high=2)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0]

    def shifted(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    for change in (strided, shifted):
        for one, other in ((change(query), keys), (query, change(keys))):
            check_exact(one, other, core, topk=60, axis_topk=20, mode="tucker")


@pytest.mark.parametrize("axis_topk", [1, 3, 10, 32])
def test_topk_is_every_candidate(device_dtype: tuple[str, torch.dtype], axis_topk: int) -> None:
    device, dtype = device_dtype
    data = Data(4, device)
    query, keys = (
        data.normal(6, 2, 1, 2, 20, dtype=dtype),
        data.normal(1, 2, 2, 70, 20, dtype=dtype),
    )
    core = data.cores(2, 1, 2)
    check_product_key_topk(query, keys, core, topk=axis_topk**2, axis_topk=axis_topk)


def test_everything_kept(device: str) -> None:
    """m = n and M = n * n: the kept set is no choice, and every key has a gradient."""
    data = Data(5, device)
    query, keys = data.normal(3, 2, 1, 2, 20), data.normal(1, 2, 2, 12, 20)
    _, indices = check_product_key_topk(query, keys, data.cores(2, 1, 2), topk=144, axis_topk=12)
    assert torch.equal(indices.sort(-1).values, torch.arange(144, device=device).expand(3, 1, 144))


def test_largest_sizes(device: str) -> None:
    data = Data(6, device)
    query, keys = data.normal(5, 2, 1, 4, 30), data.normal(1, 2, 4, 131, 30)
    check_product_key_topk(query, keys, data.cores(4, 1, 4), topk=1024, axis_topk=128)


@pytest.mark.parametrize("mode", ["tucker", "additive"])
@pytest.mark.parametrize("num_keys", [6, 200])
def test_all_scores_equal(device: str, mode: str, num_keys: int) -> None:
    query, keys = from_axis_scores([3.0] * num_keys, [2.0] * num_keys, device)
    core = unit_core(device) if mode == "tucker" else None
    _, indices = ops.product_key_topk(query, keys, core, topk=5, axis_topk=5, mode=mode)
    assert indices.flatten().tolist() == [0, 1, 2, 3, 4]


def test_all_scores_equal_grid_goes_by_index_not_by_position(device: str) -> None:
    """Rows 4 and 1 are kept in this order, but slots of equal rank go by row * n + col."""
    query, keys = from_axis_scores([0, 2, 0, 0, 3], [0, 3, 0, 0, 2], device)
    core = unit_core(device)
    scores, indices = ops.product_key_topk(query, keys, core, topk=4, axis_topk=2)
    # Rows {4: 3, 1: 2}, columns {1: 3, 4: 2}: products 9, 6, 6, 4.
    assert indices.flatten().tolist() == [21, 6, 24, 9]
    assert scores.flatten().tolist() == [9.0, 6.0, 6.0, 4.0]


def test_equal_ranks_at_the_axis_threshold(device: str) -> None:
    """Of keys 1, 3, 5, 7 with the same rank the two lowest join key 6."""
    query, keys = from_axis_scores([0, 1, 0, 1, 0, 1, 2, 1], [1, 0, 0, 0, 0, 0, 0, 0], device)
    _, indices = ops.product_key_topk(query, keys, None, topk=3, axis_topk=3, mode="additive")
    assert indices.flatten().tolist() == [6 * 8, 1 * 8, 3 * 8]


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("mode", ["tucker", "additive"])
@pytest.mark.parametrize(("num_keys", "axis_topk"), [(37, 8), (1138, 32), (1138, 128)])
def test_sorted_scores(device: str, order: str, mode: str, num_keys: int, axis_topk: int) -> None:
    ascending = [float(i) for i in range(num_keys)]
    line = ascending if order == "ascending" else ascending[::-1]
    query, keys = from_axis_scores(line, line, device)
    core = unit_core(device) if mode == "tucker" else None
    check_exact(query, keys, core, topk=axis_topk, axis_topk=axis_topk, mode=mode)


@pytest.mark.parametrize(
    ("num_keys", "axis_topk"), [(384, 128), (385, 1), (513, 33), (1056, 127), (1056, 128)]
)
@pytest.mark.parametrize("key_dim", [256, 512])
def test_axes_of_few_values(device: str, key_dim: int, num_keys: int, axis_topk: int) -> None:
    """Long keys, and tokens side by side whose scores are equal, few numbers, or rise late: more
    equal keys at the threshold than there is room for."""
    data = Data(num_keys + axis_topk, device)
    index = torch.arange(num_keys, device=device)
    kinds = [torch.ones_like(index), *(data.integers(k, num_keys) for k in (2, 3, 4, 8))]
    kinds += [index // 128, -(index // 64), (index >= num_keys - 40).long(), index % 128 // 64]
    keys = torch.zeros(1, 2, 2, num_keys, key_dim, device=device)
    keys[..., : len(kinds)] = torch.stack(kinds, -1)
    tokens = 20 if device == "cpu" else 1100
    kind = data.integers(len(kinds), tokens, 2)
    kind[tokens // 2 :] = 0  # whole tiles of tokens whose scores are equal
    query = torch.zeros(tokens, 2, 1, 2, key_dim, device=device)
    query.scatter_(-1, kind[:, :, None, None, None].expand(-1, -1, 1, 2, 1), 1.0)
    query *= torch.where(torch.arange(tokens, device=device) % 5 == 0, -1, 1)[
        :, None, None, None, None
    ]
    core = integers(data, 1, 1, 2, 2, dtype=torch.float32, high=2)
    query, keys = query.bfloat16(), keys.bfloat16()
    check_exact(query, keys, core, topk=axis_topk, axis_topk=axis_topk, mode="tucker")
    if device == "cpu":
        return
    # So many tiles of tokens that clusters take up one after the other.
    times = 7
    once, often = (
        ops.product_key_topk(of, keys, core, topk=axis_topk, axis_topk=axis_topk)
        for of in (query, query.repeat(times, 1, 1, 1, 1))
    )
    for expected, repeated in zip(once, often, strict=True):
        assert torch.equal(repeated, torch.cat([expected] * times))


@pytest.mark.parametrize("mode", ["tucker", "additive"])
@pytest.mark.parametrize("special", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("distinct", [1, 3, 50])
@pytest.mark.parametrize(
    ("axis_topk", "topk"),
    [(8, 64), (14, 32), (32, 32), (32, 700), (33, 33), (100, 1024), (128, 33), (128, 128)],
)
def test_grid_of_few_values(
    device: str, axis_topk: int, topk: int, distinct: int, special: float, mode: str
) -> None:
    """Ties where the grid is cut, among numbers and among NaN, in grids of every size: more equal
    pairs than there is room for, too few numbers, infinities that the cut falls on."""
    rows = [float(1 + i * 7 % distinct) for i in range(axis_topk)]
    cols = [float(i * 5 % distinct - 1) for i in range(axis_topk)]
    for place in range(0, axis_topk, 3):
        rows[place] = special
    cols[-1] = special
    query, keys = from_axis_scores(rows, cols, device)
    core = unit_core(device) if mode == "tucker" else None
    if mode == "additive":
        topk = min(topk, axis_topk)
    with np.errstate(invalid="ignore"):
        check_exact(query, keys, core, topk=topk, axis_topk=axis_topk, mode=mode)


@pytest.mark.parametrize("mode", ["tucker", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_keys", "topk"), [(20, 6), (32, 32), (30, 1)])
def test_pairs_below_all_numbers(
    device: str, num_keys: int, topk: int, dtype: torch.dtype, mode: str
) -> None:
    """Finite keys whose pairs float32 rounds to -inf, but for those of one row behind many."""
    rows = [2.0**70 if mode == "tucker" else -1.5 * 2.0**127] * num_keys
    rows[-3] = 1.0 if mode == "tucker" else 0.0
    scale = 2.0**60 if mode == "tucker" else 2.0**121
    cols = [-scale * (64 + j) for j in range(num_keys)]
    query, keys = from_axis_scores(rows, cols, device, dtype)
    # Keys of eight elements, for tensor cores.
    query, keys = (torch.nn.functional.pad(tensor, (0, 7)) for tensor in (query, keys))
    core = unit_core(device) if mode == "tucker" else None
    check_exact(query, keys, core, topk=topk, axis_topk=num_keys, mode=mode)


def tokens_of_many_grids(device: str) -> int:
    """On the CPU, which takes grids one by one, more than it scores without packing the keys."""
    return 9 if device == "cpu" else 65


def additive_keys(kind: str, data: Data, heads: int, num_keys: int) -> Tensor:
    """[H, 2, 1, n, 1], where float32 sums of a row's and a column's number are like this."""
    shape = (heads, 2, 1, num_keys, 1)
    keys = data.normal(*shape)
    if kind == "ties":
        keys = integers(data, *shape, dtype=torch.float32, high=3)
    elif kind == "all equal":
        keys = torch.ones_like(keys)
    elif kind == "signed zeros":
        keys = torch.zeros_like(keys).copysign(keys)
    elif kind == "ties by rounding":  # of a column's numbers in one head, of a row's in another
        large = 2.0**24 * (1 + data.integers(3, *shape))
        side = (torch.arange(2) + torch.arange(heads)[:, None]).reshape(heads, 2, 1, 1, 1) % 2
        keys = torch.where(side.to(keys.device) == 1, large.to(keys), 4 * keys)
    elif kind == "all magnitudes":
        keys = torch.ldexp(keys, data.integers(60, *shape) - 30)
    elif kind == "subnormal":
        keys = integers(data, *shape, dtype=torch.float32, high=1000) * 2.0**-149
    elif kind == "overflow":
        keys = 3e38 * keys.clamp(-1, 1)
    elif kind in ("nan", "inf"):
        spoiled = data.integers(6, *shape) == 0
        spoiled[0] = False  # a head of numbers beside it
        keys = torch.where(spoiled, keys.sign() * float(kind), keys)
    return keys


@pytest.mark.parametrize(
    "kind",
    [
        *("normal", "ties", "all equal", "signed zeros", "ties by rounding", "all magnitudes"),
        *("subnormal", "overflow", "nan", "inf"),
    ],
)
@pytest.mark.parametrize(
    ("num_keys", "topk"),
    [
        *((1, 1), (3, 4), (16, 16), (32, 32), (32, 500), (32, 1024)),
        *((33, 33), (64, 64), (100, 100), (128, 33), (128, 128), (128, 1000)),
    ],
)
def test_additive_grid_of_many_tokens(device: str, num_keys: int, topk: int, kind: str) -> None:
    """Against a stable sort of all float32 sums; more tokens and heads than get a block each."""
    data = Data(13, device)
    tokens, heads = tokens_of_many_grids(device), 2
    keys = additive_keys(kind, data, heads, num_keys)
    query = torch.ldexp(  # powers of two and their negatives: no score is rounded
        1.0 - 2.0 * data.integers(2, tokens, 2, heads, 1, 1),
        data.integers(3, tokens, 2, heads, 1, 1),
    )
    if kind == "overflow":
        query = query.sign()
    scores, indices = ops.product_key_topk(
        query, keys, None, topk=topk, axis_topk=num_keys, mode="additive"
    )

    axes = (query[..., 0] * keys[:, :, 0, :, 0].transpose(0, 1)).cpu().numpy()  # [T, 2, H, n]
    with np.errstate(invalid="ignore", over="ignore"):
        sums = (axes[:, 0, :, :, None] + axes[:, 1, :, None, :]).reshape(tokens, heads, -1)
    assert sums.dtype == np.float32
    expected = np.argsort(-sums, axis=-1, kind="stable")[..., :topk]
    np.testing.assert_array_equal(array(indices), expected)
    np.testing.assert_array_equal(
        scores[..., 0].cpu().numpy(), np.take_along_axis(sums, expected, axis=-1)
    )


@pytest.mark.parametrize(
    "kind", ["uniform", "equal singular values", "any filter", "no filter", "subnormal"]
)
@pytest.mark.parametrize("tucker_rank", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("num_keys", "topk"), [(32, 32), (33, 33), (64, 64), (128, 7), (128, 128), (128, 768)]
)
def test_tucker_grid_of_many_tokens(
    device: str, num_keys: int, topk: int, tucker_rank: int, kind: str
) -> None:
    """Against a stable sort of all ranks, which float32 holds without rounding; more tokens and
    heads than get a block each. Keys are all kept, so the filter is no more than a hint."""
    data = Data(14, device)
    tokens, heads, cores = tokens_of_many_grids(device), 2, 2
    keys = (16.0 * data.normal(heads, 2, tucker_rank, num_keys, 1)).clamp(-60, 60).round() / 16
    query = torch.ldexp(
        1.0 - 2.0 * data.integers(2, tokens, 2, heads, tucker_rank, 1),
        data.integers(2, tokens, 2, heads, tucker_rank, 1),
    )
    core = data.integers(17, cores, heads, tucker_rank, tucker_rank) / 16.0
    if kind == "subnormal":
        keys = keys * 2.0**-68  # pairs are multiples of 2^-148
    if kind == "equal singular values":
        core = torch.eye(tucker_rank).expand(cores, heads, -1, -1).to(core).contiguous()
    u = t = None
    if kind in ("any filter", "no filter"):
        u, t = (data.normal(heads, tucker_rank) * float(kind == "any filter") for _ in range(2))
    scores, indices = ops.product_key_topk(
        query, keys, core, topk=topk, axis_topk=num_keys, u=u, t=t
    )

    axes = array(query[..., 0])[..., None] * array(keys[..., 0]).swapaxes(0, 1)  # [T, 2, H, R, n]
    pairs = np.einsum("thri,chrs,thsj->thijc", axes[:, 0], array(core), axes[:, 1])
    pairs = pairs.reshape(tokens, heads, -1, cores)
    expected = np.argsort(-pairs.sum(-1), axis=-1, kind="stable")[..., :topk]
    np.testing.assert_array_equal(array(indices), expected)
    np.testing.assert_array_equal(
        array(scores), np.take_along_axis(pairs, expected[..., None], axis=-2)
    )


@pytest.mark.parametrize("numbers", [0, 5, 40])
def test_fewer_numbers_than_wanted(device: str, numbers: int) -> None:
    """A grid that is NaN but for a few rows: first all numbers, then the lowest NaN."""
    rows = [math.nan] * 100
    rows[50 : 50 + numbers // 5] = [float(i) for i in range(numbers // 5)]
    cols = [2.0] * 5 + [math.nan] * 95
    query, keys = from_axis_scores(rows, cols, device)
    check_exact(query, keys, unit_core(device), topk=300, axis_topk=100, mode="tucker")


@pytest.mark.parametrize("copies", [2, 40])
def test_identical_keys_go_by_the_lower_id(
    device_dtype: tuple[str, torch.dtype], copies: int
) -> None:
    """Equal keys have equal ranks wherever they stand, whatever the rounding: copies of one key are
    kept in order of id."""
    device, dtype = device_dtype
    data = Data(7, device)
    key_dim = 37
    query = data.normal(6, 2, 1, 2, key_dim, dtype=dtype)
    keys = data.normal(1, 2, 2, 1, key_dim, dtype=dtype).repeat(1, 1, 1, copies, 1)
    axis_topk = min(copies, 5)
    _, indices = ops.product_key_topk(
        query, keys, data.cores(2, 1, 2), topk=axis_topk**2, axis_topk=axis_topk
    )
    square = torch.arange(axis_topk)[:, None] * copies + torch.arange(axis_topk)
    assert torch.equal(indices.cpu(), square.flatten().expand(6, 1, -1))


@pytest.mark.parametrize("mode", ["tucker", "additive"])
def test_negative_zero_equals_zero_on_the_axis(device: str, mode: str) -> None:
    query, keys = from_axis_scores([-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0], device)
    core = unit_core(device) if mode == "tucker" else None
    _, indices = ops.product_key_topk(query, keys, core, topk=3, axis_topk=3, mode=mode)
    assert indices.flatten().tolist() == [0, 1, 2]


def test_negative_zero_equals_zero_in_the_grid(device: str) -> None:
    """Row 0 has score -1 and ranks -1 * 0 = -0; row 1 has 1 and ranks +0: still the lower index."""
    query, keys = from_axis_scores([-1.0, 1.0], [0.0, 0.0], device)
    _, indices = ops.product_key_topk(query, keys, unit_core(device), topk=4, axis_topk=2)
    assert indices.flatten().tolist() == [0, 1, 2, 3]


def test_nan_ranks_below_negative_infinity(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    rows = [math.nan, -math.inf, 1.0, math.nan, 2.0]
    query, keys = from_axis_scores(rows, [0.0] * 5, device, dtype)
    scores, indices = ops.product_key_topk(query, keys, None, topk=25, axis_topk=5, mode="additive")
    expected = [row * 5 + col for row in (4, 2, 1) for col in range(5)]
    # The NaN slots tie with one another and go by index.
    expected += [row * 5 + col for row in (0, 3) for col in range(5)]
    assert indices.flatten().tolist() == expected
    assert scores.flatten()[10:15].tolist() == [-math.inf] * 5
    assert torch.isnan(scores.flatten()[15:]).all()


def test_infinities_keep_their_order(device: str) -> None:
    rows = [1.0, math.inf, -math.inf, math.inf, 5.0]
    query, keys = from_axis_scores(rows, [0.0] * 5, device)
    _, indices = ops.product_key_topk(query, keys, None, topk=5, axis_topk=5, mode="additive")
    assert indices.flatten().tolist() == [5, 6, 7, 8, 9]
    _, indices = ops.product_key_topk(query, keys, None, topk=25, axis_topk=5, mode="additive")
    assert (indices.flatten() // 5).tolist() == [1] * 5 + [3] * 5 + [4] * 5 + [0] * 5 + [2] * 5


def test_negative_nan_is_a_nan(device: str) -> None:
    """The sign bit of a NaN does not lift it."""
    negative = torch.tensor(math.nan).copysign(torch.tensor(-1.0)).item()
    query, keys = from_axis_scores([negative, math.nan, -7.0], [1.0, 1.0, 1.0], device)
    _, indices = ops.product_key_topk(query, keys, unit_core(device), topk=9, axis_topk=3)
    assert indices.flatten().tolist() == [6, 7, 8, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_query_stays_with_its_token(
    device_dtype: tuple[str, torch.dtype], value: float
) -> None:
    device, dtype = device_dtype
    data = Data(8, device)
    query, keys = (
        data.normal(6, 2, 1, 2, 20, dtype=dtype),
        data.normal(1, 2, 2, 40, 20, dtype=dtype),
    )
    core = data.cores(2, 1, 2)
    clean_scores, clean_indices = ops.product_key_topk(query, keys, core, topk=16, axis_topk=8)
    query[3, 0, 0, 1, 5] = value
    scores, indices = ops.product_key_topk(query, keys, core, topk=16, axis_topk=8)
    rest = [0, 1, 2, 4, 5]
    assert torch.equal(scores[rest], clean_scores[rest])
    assert torch.equal(indices[rest], clean_indices[rest])
    spoiled = indices[3, 0]
    assert spoiled.unique().numel() == 16
    assert ((spoiled >= 0) & (spoiled < 1600)).all()
    if math.isnan(value):
        assert torch.isnan(scores[3]).all()
        # All rows tie at NaN: the eight lowest are kept, and of all their slots the lowest.
        assert (spoiled[:8] // 40 == 0).all()
        assert (spoiled[8:] // 40 == 1).all()


def test_nan_key_is_the_last_choice_and_leaks_no_gradient(
    device_dtype: tuple[str, torch.dtype],
) -> None:
    device, dtype = device_dtype
    data = Data(9, device)
    query = data.normal(6, 2, 1, 2, 20, dtype=dtype, requires_grad=True)
    keys = data.normal(1, 2, 2, 40, 20, dtype=dtype)
    keys[0, 0, 0, 7] = math.nan
    keys[0, 1, 1, 11, 3] = math.nan
    keys.requires_grad_()
    core = data.cores(2, 1, 2, requires_grad=True)
    scores, indices = ops.product_key_topk(query, keys, core, topk=16, axis_topk=8)
    assert not (indices // 40 == 7).any()
    assert not (indices % 40 == 11).any()
    for grad in torch.autograd.grad(scores.sum(), [query, keys, core]):
        assert torch.isfinite(grad).all()


def test_nan_gradient_stays_with_its_token_and_keys(device: str) -> None:
    data = Data(10, device)
    query = data.normal(4, 2, 1, 2, 20, requires_grad=True)
    keys = data.normal(1, 2, 2, 60, 20, requires_grad=True)
    scores, indices = ops.product_key_topk(query, keys, data.cores(2, 1, 2), topk=8, axis_topk=4)
    upstream = torch.ones_like(scores)
    upstream[2, 0, 5, 1] = math.nan
    grad_query, grad_keys = torch.autograd.grad(scores, [query, keys], upstream)
    assert torch.isfinite(grad_query[[0, 1, 3]]).all()
    assert torch.isnan(grad_query[2]).any()
    spoiled = indices[2, 0, 5].item()
    for side, key in enumerate((spoiled // 60, spoiled % 60)):
        others = [i for i in range(60) if i != key]
        assert torch.isfinite(grad_keys[0, side][:, others]).all()
        assert torch.isnan(grad_keys[0, side][:, key]).any()


def test_keys_nobody_kept_have_zero_gradient(device: str) -> None:
    data = Data(11, device)
    query, keys = data.normal(3, 2, 1, 1, 20), data.normal(1, 2, 1, 500, 20, requires_grad=True)
    scores, indices = ops.product_key_topk(query, keys, unit_core(device), topk=4, axis_topk=4)
    (grad,) = torch.autograd.grad(scores.sum(), [keys])
    for side, kept in enumerate((indices // 500, indices % 500)):
        touched = grad[0, side, 0].any(-1).nonzero().flatten()
        assert torch.equal(touched, kept.unique())


def extreme_factors(kind: str, data: Data, tokens: int, num_keys: int) -> Tensor:
    """Axis scores [tokens, 2 sides, 2 ranks, num_keys] of tiny or huge columns, whose best pairs
    depend on both ranks."""
    scores = data.normal(tokens, 2, 2, num_keys)
    row, col = scores.unbind(1)
    row[..., 0, :] = row[..., 0, :].abs() + 0.2
    col[..., 0, :] = col[..., 0, :].abs() + 0.2
    first_half = data.integers(2, tokens, num_keys) == 0
    if kind == "tiny columns":
        col[..., 1, :] = -1e-5 * col[..., 1, :].abs()
        col *= 1e-18
    elif kind == "huge columns, one against the filter":
        row[..., 1, :] = -1e-3 * row[..., 1, :].abs().where(first_half, 0.0)
        col[..., 0, :] *= 1e35
        col[..., 1, :] = 3e36 * col[..., 1, :].abs()
        col[..., 0, 0], col[..., 1, 0] = -1e36, 0.0
    elif kind == "huge columns, along or across":
        row[..., 0, :] = (0.1 * row[..., 0, :]).where(first_half, 1e-3)
        row[..., 1, :] = (-10 * row[..., 1, :].abs()).where(~first_half, 0.0)
        col[..., 0, :] = (4e36 * col[..., 0, :]).where(first_half, 0.0)
        col[..., 1, :] = (2e36 * col[..., 1, :]).where(~first_half, 0.0)
    return scores


@pytest.mark.parametrize("num_keys", [64, 128])
@pytest.mark.parametrize(
    "kind",
    ["tiny columns", "huge columns, one against the filter", "huge columns, along or across"],
)
def test_factors_of_extreme_sizes(device: str, kind: str, num_keys: int) -> None:
    # More tokens than have a block each.
    tokens = 20 if device == "cpu" else 600
    query = extreme_factors(kind, Data(num_keys, device), tokens, num_keys)[:, :, None]
    keys = torch.eye(num_keys, device=device).expand(1, 2, 2, -1, -1).contiguous()
    core = torch.eye(2, device=device)[None, None]
    first = torch.tensor([[1.0, 0.0]], device=device)
    sizes = {"topk": num_keys, "axis_topk": num_keys}
    _, indices = ops.product_key_topk(query, keys, core, u=first, t=first, **sizes)
    expected = reference(query, keys, core, first, first, **sizes)
    assert not judge(expected, indices).violations()
