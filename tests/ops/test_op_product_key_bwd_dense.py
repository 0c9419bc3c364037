"""The backward of product_key_topk at shapes that CUDA multiplies on tensor cores: many tokens,
half-width floats and keys of a multiple of eight. The CPU runs the same cases in its own way, with
fewer tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import (
    Data,
    array,
    check_gradient,
    check_only_some_train,
    check_product_key_topk,
    proper_subsets,
    root,
    scalar_gradients,
    square,
)
from torch import Tensor

from ultramem_cuda import ops
from ultramem_cuda import python_ref as ref

DTYPES = [torch.bfloat16, torch.float16]
# Three of its tiles and a bit.
CPU_TOKENS = 97


class Case(NamedTuple):
    tokens: int
    num_keys: int
    key_dim: int
    axis_topk: int
    topk: int
    rank: int = 2
    heads: int = 1
    shared_query: bool = False
    cores: int = 2
    mode: str = "tucker"


CASES = {
    "one_tile_of_tokens_and_one_more": Case(385, 200, 64, 16, 16),
    "keys_fill_no_tile": Case(300, 65, 128, 12, 20),
    "keys_fill_tiles": Case(512, 256, 192, 16, 32),
    "narrow": Case(257, 130, 8, 32, 32),
    "between_widths": Case(320, 333, 200, 24, 40),
    "two_tiles_wide": Case(300, 190, 512, 8, 8),
    "three_tiles_wide": Case(260, 150, 640, 8, 8),
    "widest": Case(270, 140, 1024, 8, 8),
    "shared_query": Case(390, 300, 72, 20, 20, rank=2, shared_query=True),
    "rank_1": Case(330, 129, 48, 10, 10, rank=1, cores=1),
    "rank_3": Case(281, 100, 96, 10, 30, rank=3, heads=2, cores=3),
    "rank_4_shared": Case(300, 128, 40, 16, 64, rank=4, heads=2, shared_query=True, cores=4),
    "kept_64": Case(300, 300, 64, 64, 100, heads=2),
    "kept_64_of_few": Case(300, 300, 64, 64, 32, heads=2),
    "odd_number_kept": Case(300, 200, 64, 15, 20),
    "rank_1_kept_36": Case(330, 200, 48, 36, 40, rank=1, heads=3, cores=1),
    "many_kept": Case(300, 180, 104, 128, 768),
    "more_kept_than_query": Case(300, 400, 40, 128, 64, rank=4, shared_query=True),
    "additive": Case(500, 170, 64, 20, 20, rank=1, heads=2, cores=1, mode="additive"),
}
# Blocks take many tiles, or share one between many. On sm_90 with its 132 multiprocessors the parts
# of the keys' gradient are summed by the next kernel, but for "small"; a plane has three rows of
# tiles; there are more tiles than blocks, some of them shared.
LARGE = {
    "many_tokens": Case(4200, 150, 192, 8, 8),
    "small": Case(1000, 1138, 192, 32, 32),
    "odd_rows_of_keys": Case(4000, 330, 192, 8, 8),
    "many_heads": Case(300, 130, 64, 8, 8, heads=20),
}


def make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int = 1) -> list[Tensor | None]:
    data = Data(seed, device)
    num_queries = 1 if case.shared_query else case.rank
    query = data.normal(case.tokens, 2, case.heads, num_queries, case.key_dim, dtype=dtype)
    keys = data.normal(case.heads, 2, case.rank, case.num_keys, case.key_dim, dtype=dtype)
    core = None if case.mode == "additive" else data.cores(case.cores, case.heads, case.rank)
    return [query, keys, core]


def forward(leaves: list[Tensor | None], case: Case) -> tuple[Tensor, Tensor]:
    return ops.product_key_topk(*leaves, topk=case.topk, axis_topk=case.axis_topk, mode=case.mode)


def trainable(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.detach().requires_grad_() for x in inputs]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_shapes(device: str, dtype: torch.dtype, name: str) -> None:
    case = CASES[name]
    if device == "cpu":
        case = case._replace(tokens=CPU_TOKENS)
    query, keys, core = make_inputs(case, device, dtype)
    check_product_key_topk(
        query, keys, core, topk=case.topk, axis_topk=case.axis_topk, mode=case.mode
    )


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.gpu
def test_large_shapes(dtype: torch.dtype, name: str) -> None:
    case = LARGE[name]
    query, keys, core = make_inputs(case, "cuda", dtype)
    check_product_key_topk(query, keys, core, topk=case.topk, axis_topk=case.axis_topk)


def scores_at(
    query: Tensor, keys: Tensor, core: Tensor, indices: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Of one head, [T, M, C], by gathered rows in float64; and what they were made of."""
    leaves = [x.detach().double().requires_grad_() for x in (query, keys, core)]
    num_keys = keys.shape[3]
    axes = [
        torch.einsum("trk,rtmk->trm", leaves[0][:, side, 0], leaves[1][0, side][:, kept[:, 0]])
        for side, kept in enumerate((indices // num_keys, indices % num_keys))
    ]
    return torch.einsum("trm,crs,tsm->tmc", axes[0], leaves[2][:, 0], axes[1]), leaves


@pytest.mark.gpu
def test_blocks_of_many_steps() -> None:
    """A warp that unfolds dS knows of 32 of its steps at a time. Each row of tiles is compared."""
    case = Case(65536, 600, 64, 16, 16)
    query, keys, core = leaves = trainable(make_inputs(case, "cuda", torch.bfloat16))
    scores, indices = forward(leaves, case)
    reference, doubles = scores_at(query, keys, core, indices)
    upstream = torch.randn_like(scores)
    grads = torch.autograd.grad(scores, leaves[:2], upstream)
    expected = torch.autograd.grad(reference, doubles[:2], upstream[:, 0].double())
    for grad, right, rows in zip(grads, expected, (0, 3), strict=True):
        error = (grad.double() - right).movedim(rows, 0)
        for part, whole in zip(error.split(64), right.movedim(rows, 0).split(64), strict=True):
            assert part.norm() < 0.01 * whole.norm()


@pytest.mark.gpu
def test_peak_memory() -> None:
    """Of a forward and backward at shape S, beyond inputs, outputs and gradients: 7 MB saved for
    the backward, 4 MB of its workspace and on sm_90 12 MB of parts of the keys' gradient, which
    otherwise are where the gradient of the query goes."""
    leaves = trainable(make_inputs(Case(8192, 1138, 192, 32, 32), "cuda", torch.bfloat16))
    for _ in range(2):  # the first may allocate what is kept
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        scores, indices = ops.product_key_topk(*leaves, topk=32)
        upstream = torch.ones_like(scores)
        grads = torch.autograd.grad(scores, leaves, upstream)
        peak = torch.cuda.max_memory_allocated() - before
        peak -= sum(tensor.nbytes for tensor in (scores, indices, upstream, *grads))
        del scores, indices, upstream, grads
    assert peak <= 25e6


@pytest.mark.parametrize("exponent", [-60, -20, 12, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_gradients_far_from_one(device: str, dtype: torch.dtype, exponent: int) -> None:
    """Loss scaling: the gradients of the scores need not fit in float16, as long as those of query
    and keys do."""
    case = CASES["between_widths"]
    if device == "cpu":
        case = case._replace(tokens=CPU_TOKENS)
    query, keys, core = make_inputs(case, device, dtype)
    # Keeps query and key gradients near one where the scores' gradients are not.
    size = math.ldexp(1.0, -max(-14, min(exponent, 10)))
    query, keys = query * min(size, 1.0), keys * min(size, 1.0)
    if exponent in (-60, 60) and dtype == torch.float16:
        # Only what float16 can hold of the result is compared: all of it is 0 or infinite.
        leaves = trainable([query, keys, core])
        scores, _ = forward(leaves, case)
        upstream = torch.full_like(scores, math.ldexp(1.0, exponent))
        grads = torch.autograd.grad(scores, leaves[:2], upstream)
        for grad in grads:
            assert not grad.isnan().any()
            assert not grad.any() if exponent < 0 else grad.isinf().any()
        return
    leaves = trainable([query, keys, core])
    scores, indices = forward(leaves, case)
    upstream = Data(3, device).normal(*scores.shape, scale=math.ldexp(1.0, exponent))
    grads = scalar_gradients(scores, upstream, leaves)
    values = [array(x) for x in (query, keys, core)]
    expected = ref.product_key_topk_bwd(array(upstream), *values, array(indices))
    sizes = ref.product_key_topk_bwd(
        square(array(upstream)), *(square(x) for x in values), array(indices)
    )
    for name, grad, wanted, terms in zip(
        ("query", "keys", "core"), grads, expected, sizes, strict=True
    ):
        if dtype == torch.float16 and name != "core" and exponent < 0:
            # The result itself is near the smallest float16: it is off by a step of 2^-24 at most.
            error = np.abs(array(grad) - wanted)
            bound = 2.0**-25 + 2e-3 * np.abs(wanted).max()
            assert error.max() <= bound, f"grad_{name}: off by {error.max():.1e}"
        else:
            check_gradient(f"grad_{name}", grad, wanted, root(terms))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_one_token_far_above_the_others(device: str, dtype: torch.dtype) -> None:
    """One scale for all tokens must leave the small ones their share."""
    case = CASES["keys_fill_tiles"]
    leaves = trainable(make_inputs(case, device, dtype))
    scores, indices = forward(leaves, case)
    upstream = Data(4, device).normal(*scores.shape, scale=2.0**-9)
    upstream[7] *= 2.0**9
    grads = scalar_gradients(scores, upstream, leaves)
    rest = [t for t in range(case.tokens) if t != 7]
    values = [array(x) for x in leaves]
    expected = ref.product_key_topk_bwd(array(upstream), *values, array(indices))
    check_gradient("grad_query of the others", grads[0][rest], expected[0][rest])
    check_gradient("grad_query", grads[0], expected[0])


@pytest.mark.parametrize("name", ["between_widths", "rank_4_shared", "many_kept", "additive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_two_runs_are_bitwise_equal(device: str, dtype: torch.dtype, name: str) -> None:
    case = CASES[name]
    runs = []
    for _ in range(2):
        leaves = trainable(make_inputs(case, device, dtype))
        scores, _ = forward(leaves, case)
        upstream = Data(5, device).normal(*scores.shape)
        runs.append(scalar_gradients(scores, upstream, leaves))
    for a, b in zip(*runs, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("trained", proper_subsets("query", "keys", "core"), ids="-".join)
def test_only_some_inputs_train(device: str, trained: tuple[str, ...]) -> None:
    case = CASES["one_tile_of_tokens_and_one_more"]
    tensors = trainable(make_inputs(case, device, torch.bfloat16))
    check_only_some_train(
        lambda **inputs: forward(list(inputs.values()), case)[0],
        dict(zip(("query", "keys", "core"), tensors, strict=True)),
        trained,
    )


def test_keys_nobody_kept_have_zero_gradient(device: str) -> None:
    case = Case(260, 700, 192, 8, 8)
    leaves = trainable(make_inputs(case, device, torch.bfloat16))
    leaves[1].data[0, :, :, 300:] = leaves[1].data[0, :, :, :1] * 0.0
    scores, indices = forward(leaves, case)
    (grad,) = torch.autograd.grad(scores.sum(), [leaves[1]])
    for side, kept in enumerate((indices // 700, indices % 700)):
        others = torch.ones(700, dtype=torch.bool, device=device)
        others[kept.unique()] = False
        assert others.any()
        assert not grad[0, side][:, others].any()


# Tokens and keys with a whole and with a broken tile of their own: three rows of tiles of either.
SPOILED = Case(257, 290, 64, 8, 8)
SPOILED_TOKENS = [5, 256]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_spoiled_gradients_stay_with_their_tokens_and_keys(
    device: str, dtype: torch.dtype, value: float
) -> None:
    leaves = trainable(make_inputs(SPOILED, device, dtype))
    scores, indices = forward(leaves, SPOILED)
    upstream = torch.ones_like(scores)
    upstream[SPOILED_TOKENS, 0, 3, 1] = value
    check_spoiled(leaves, scores, indices, upstream, slots=[3])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_spoiled_queries_stay_with_their_tokens_and_keys(
    device: str, dtype: torch.dtype, value: float
) -> None:
    inputs = make_inputs(SPOILED, device, dtype)
    inputs[0][SPOILED_TOKENS, 0, 0, 1, 17] = value
    leaves = trainable(inputs)
    scores, indices = forward(leaves, SPOILED)
    check_spoiled(leaves, scores, indices, torch.ones_like(scores), slots=range(8), spoiled_side=0)


def check_spoiled(
    leaves: list[Tensor | None],
    scores: Tensor,
    indices: Tensor,
    upstream: Tensor,
    slots: list[int] | range,
    spoiled_side: int | None = None,
) -> None:
    """Only the spoiled tokens, and keys of their spoiled slots, have gradients that are not finite.
    On the side of a spoiled query that may go for all keys that the axis kept, in a slot or not."""
    num_keys = leaves[1].shape[3]
    grad_query, grad_keys = torch.autograd.grad(scores, leaves[:2], upstream)
    clean = [token for token in range(scores.shape[0]) if token not in SPOILED_TOKENS]
    assert torch.isfinite(grad_query[clean]).all()
    assert not torch.isfinite(grad_query[SPOILED_TOKENS]).flatten(1).all(1).any()
    spoiled = indices[SPOILED_TOKENS][:, 0, list(slots)]
    for side, kept in enumerate((spoiled // num_keys, spoiled % num_keys)):
        finite = torch.isfinite(grad_keys[0, side]).all(-1).all(0)
        if side == spoiled_side:
            assert (~finite).sum() <= len(SPOILED_TOKENS) * 8
            continue
        others = torch.ones(num_keys, dtype=torch.bool, device=finite.device)
        others[kept.unique()] = False
        assert finite[others].all()
    assert not torch.isfinite(grad_keys).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_a_key_that_is_not_finite_spoils_its_rank_alone(device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(SPOILED, device, dtype)
    # Positive first components, and a filter that is one: the key is the first row of every token.
    inputs[0][..., 0] = inputs[0][..., 0].abs() + 0.5
    inputs[1][0, 0, 0, 7, 0] = math.inf
    leaves = trainable(inputs)
    filters = torch.ones(1, 2, device=device)
    scores, indices = ops.product_key_topk(
        *leaves, topk=SPOILED.topk, axis_topk=SPOILED.axis_topk, u=filters, t=filters
    )
    rows = indices // SPOILED.num_keys
    assert (rows == 7).any(-1).all()
    grad_query, grad_keys = torch.autograd.grad(scores.sum(), leaves[:2])
    assert not torch.isfinite(grad_query[:, 0, 0, 0]).all(-1).any()
    assert torch.isfinite(grad_query[:, 0, 0, 1]).all()
    others = torch.ones(SPOILED.num_keys, dtype=torch.bool, device=device)
    others[rows.unique()] = False
    assert torch.isfinite(grad_keys[0, 0, :, others]).all()
    assert torch.isfinite(grad_keys[0, 0, 1]).all()


def test_a_score_that_overflows_spoils_no_finite_row(device: str) -> None:
    """Query and key are finite, and so is the gradient of their side, though their score is not."""
    inputs = make_inputs(SPOILED, device, torch.bfloat16)
    inputs[0][5, 0, 0, 0, 3] = inputs[1][0, 0, 0, 7, 3] = 1e30
    leaves = trainable(inputs)
    filters = torch.ones(1, 2, device=device)
    scores, indices = ops.product_key_topk(
        *leaves, topk=SPOILED.topk, axis_topk=SPOILED.axis_topk, u=filters, t=filters
    )
    assert (indices[5] // SPOILED.num_keys == 7).any()
    grad_query, grad_keys = torch.autograd.grad(scores.sum(), leaves[:2])
    assert torch.isfinite(grad_query[:, 0]).all()
    assert torch.isfinite(grad_keys[0, 0]).all()
    assert not torch.isfinite(grad_query[5, 1]).all()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_spoiled_keys_that_nobody_keeps_leak_no_gradient(
    device: str, dtype: torch.dtype, value: float
) -> None:
    case = SPOILED._replace(rank=1, cores=1)
    last = case.num_keys - 1
    inputs = make_inputs(case, device, dtype)
    # Positive first components: a key of -inf or NaN there ranks last.
    inputs[0][..., 0] = inputs[0][..., 0].abs() + 0.5
    inputs[1][0, 0, 0, 7, 0] = value
    inputs[1][0, 1, 0, last, 0] = value
    leaves = trainable(inputs)
    scores, indices = forward(leaves, case)
    assert not (indices // case.num_keys == 7).any()
    assert not (indices % case.num_keys == last).any()
    for grad in torch.autograd.grad(scores.sum(), leaves):
        assert torch.isfinite(grad).all()
