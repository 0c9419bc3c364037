"""The halves of value_ffn, dot products and weighted sums, and factors appended as they are given:
what a table needs whose shards hold some columns of every row."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import (
    FORWARD_BOUND,
    SCORE_BOUND,
    array,
    check_close,
    check_gradient,
    root,
    square,
)
from hypothesis import given, settings
from shard_cases import Calls, check_same, row_shards
from test_op_value_ffn import FIXED, VECTOR_ROWS, Case, cases
from torch import Tensor

from ultramem_cuda import python_ref as ref

SMALL = Case(9, 7, 2, 4, 30, 5, seed=1)
NARROW = [torch.float32, torch.bfloat16, torch.float16]


def without_pre_values(case: Case) -> Case:
    return dataclasses.replace(case, pre_value_dim=None, activation="identity")


def scale_of(device: str) -> Tensor:
    return torch.tensor(0.3, dtype=torch.float64, device=device)


def check_halves(case: Case, device: str, dtype: torch.dtype, other: torch.dtype) -> None:
    """Against the reference, and bit for bit value_ffn's where the dtypes are. `other`: of the
    inputs of the products and of the sums."""
    calls = Calls.of(without_pre_values(case), device, dtype)
    other = torch.float64 if dtype == torch.float64 else other
    scale = scale_of(device)
    cores, rows = calls.scores.shape[2], calls.values
    (indices, weights, table, *_), addressing = calls.reference_inputs()
    options = {"addressing": addressing, "sum_groups": calls.sum_groups}

    out = calls.sum(calls.scores, rows, other, scale)
    assert out.dtype == other
    expected = ref.value_ffn(indices, weights, 0.3 * table, **options)
    sizes = ref.value_ffn(indices, weights**2, (0.3 * table) ** 2, **options)
    check_close("sum", out, expected, FORWARD_BOUND[other], root(sizes))
    assert torch.equal(calls.sum(calls.scores, rows, dtype, None), calls.forward()[0])

    inputs = calls.upstream(out)
    dots = calls.dots(inputs, rows, cores, scale)
    assert dots.dtype == calls.scores.dtype
    g = array(inputs)
    expected = ref.value_ffn_bwd(g, indices, weights, 0.3 * table, **options).scores
    sizes = ref.value_ffn_bwd(g**2, indices, weights**2, (0.3 * table) ** 2, **options).scores
    check_close("dots", dots, expected, SCORE_BOUND[other], root(sizes))
    no_a = torch.empty(0, dtype=dots.dtype, device=device)
    whole = calls.backward(inputs, no_a)
    assert torch.equal(calls.dots(inputs, rows, cores, None), whole[0])
    # The dense gradient of a shard of columns, of a grad_out that need not be of the table's dtype.
    grads = ref.value_ffn_bwd(g, indices, weights, table, **options).values
    sizes = ref.value_ffn_bwd(g**2, indices, weights**2, table**2, **options).values
    check_gradient("grad_values", whole[2], grads, root(sizes))


@settings(max_examples=15)
@given(case=cases())
def test_drawn_shapes(device_dtype: tuple[str, torch.dtype], case: Case) -> None:
    check_halves(case, *device_dtype, NARROW[case.seed % 3])


@pytest.mark.parametrize("name", FIXED)
def test_fixed_shapes(device_dtype: tuple[str, torch.dtype], name: str) -> None:
    check_halves(FIXED[name], *device_dtype, torch.float32)


@pytest.mark.parametrize("other", NARROW, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_dtypes_are_independent(device: str, dtype: torch.dtype, other: torch.dtype) -> None:
    for slice_dim in (5, 24):
        check_halves(Case(40, 12, 2, slice_dim, 60, seed=8), device, dtype, other)


@pytest.mark.parametrize("dims", VECTOR_ROWS, ids=str)
@pytest.mark.parametrize(("tokens", "selected"), [(1, 300), (300, 3)])
def test_rows_of_whole_vectors(
    device_dtype: tuple[str, torch.dtype], tokens: int, selected: int, dims: tuple[int, int]
) -> None:
    check_halves(Case(tokens, selected, 2, dims[1] // 2, 200, seed=3), *device_dtype, torch.float32)


def test_row_shards(device_dtype: tuple[str, torch.dtype]) -> None:
    """A slot is in one of them, so that the products of the shards are those of the whole."""
    device, dtype = device_dtype
    calls = Calls.of(without_pre_values(FIXED["apart"]), device, dtype)
    out = calls.sum(calls.scores, calls.values, dtype, None)
    inputs = calls.upstream(out)
    dots = torch.zeros_like(calls.scores)
    for shard in row_shards(calls.num_slots):
        rows, where = calls.of_shard(shard).values, calls.where(shard)
        masked = calls.masked(shard).values
        got = calls.sum(calls.scores, rows, dtype, None, *where)
        check_same("sum", got, calls.sum(calls.scores, masked, dtype, None))
        dots += calls.dots(inputs, rows, 3, None, *where)
    check_same("dots", dots, calls.dots(inputs, calls.values, 3, None))


# ---- a table sharded by columns ------------------------------------------------------------------


def test_shards_of_columns(device_dtype: tuple[str, torch.dtype]) -> None:
    """A layer forward and backward, of which each of two shards has half of the columns of either
    table, and the factors, of which it keeps its own columns' alone."""
    device, dtype = device_dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = dataclasses.replace(FIXED["expanded"], pre_input_dtype=wide)
    calls = Calls.of(case, device, dtype)
    assert calls.pre_values is not None
    assert calls.pre_input is not None
    scale = scale_of(device)
    halves = [
        (
            calls.values[:, 100 * r : 100 * (r + 1)].contiguous(),
            calls.pre_values[:, 40 * r : 40 * (r + 1)].contiguous(),
            calls.pre_input[:, 40 * r : 40 * (r + 1)].contiguous(),
            calls.scores[:, :, r : r + 1].contiguous(),
        )
        for r in range(2)
    ]
    a = sum(calls.dots(x, p, 1, scale).squeeze(2) for _, p, x, _ in halves)
    assert isinstance(a, Tensor)
    h = torch.nn.functional.silu(a)
    weights = [(h.unsqueeze(2) * g).contiguous() for *_, g in halves]
    outs = [calls.sum(w, v, wide, scale) for w, (v, *_) in zip(weights, halves, strict=True)]
    (indices, *inputs), addressing = calls.reference_inputs()
    inputs[1], inputs[2] = 0.3 * inputs[1], 0.3 * inputs[2]
    options = {"addressing": addressing, "activation": "silu"}
    expected = ref.value_ffn(indices, *inputs, **options)
    sizes = ref.value_ffn(indices, *(square(x) for x in inputs), addressing=addressing)
    check_close("out", torch.cat(outs, 1), expected, FORWARD_BOUND[wide], root(sizes))

    upstream = calls.upstream(torch.cat(outs, 1))
    grad_outs = [u.contiguous() for u in upstream.chunk(2, 1)]
    products = torch.cat(
        [calls.dots(u, v, 1, scale) for u, (v, *_) in zip(grad_outs, halves, strict=True)], 2
    )
    slope = torch.autograd.functional.vjp(torch.nn.functional.silu, a, torch.ones_like(a))[1]
    grad_a = slope * (products * calls.scores).sum(2)
    grad_pre = torch.cat(
        [calls.sum(grad_a.unsqueeze(2), p, wide, scale, sum_groups=True) for _, p, *_ in halves], 1
    )
    dense = []
    for r, (values, pre_values, pre_input, _) in enumerate(halves):
        half = dataclasses.replace(
            calls, values=values, pre_values=pre_values, pre_input=pre_input, scores=weights[r]
        )
        factors = half.reserved(wide)
        half.append(weights[r], grad_a, grad_outs[r], factors)
        assert factors.num_tokens == case.tokens
        dense.append(factors.to_dense())
    # Gradients of the products with the scale, as those of the scaled tables are.
    wanted = ref.value_ffn_bwd(array(upstream), indices, *inputs, **options)
    check_gradient("grad_scores", h.unsqueeze(2) * products, wanted.scores)
    check_gradient("grad_pre_input", grad_pre, wanted.pre_input)
    check_gradient("grad_values", torch.cat([d[0] for d in dense], 1), wanted.values)
    check_gradient("grad_pre_values", torch.cat([d[1] for d in dense], 1), wanted.pre_values)


# ---- factors -------------------------------------------------------------------------------------


def check_append(case: Case, device: str, dtype: torch.dtype) -> None:
    """What a backward appended is appended again, to another arena, bit for bit; then once more."""
    calls = Calls.of(case, device, dtype)
    for shard in row_shards(calls.num_slots):
        part, where = calls.of_shard(shard), calls.where(shard)
        out, a = part.forward(*where)
        upstream = calls.upstream(out)
        *_, wanted = part.backward_deferred(upstream, a, *where)
        shape = part.indices.shape
        # Not those of a slot elsewhere: that they are zero is the operator's to see to.
        nan = torch.full_like(part.scores, float("nan"))
        elsewhere = (wanted.slots == -1).view(*shape, 1)
        weights = torch.where(elsewhere, nan, wanted.weights.view_as(part.scores))
        grad_a = None
        if wanted.grad_a is not None:
            grad_a = torch.where(
                elsewhere.squeeze(2), nan[..., 0], wanted.grad_a.view(shape)
            ).contiguous()
        factors = part.reserved(upstream.dtype, 2 * case.tokens)
        for _ in range(2):
            part.append(weights, grad_a, upstream, factors, *where)
        assert factors.num_tokens == 2 * case.tokens
        for name in ("slots", "weights", "grad_a", "groups", "grad_outs", "pre_inputs"):
            got, once = getattr(factors, name), getattr(wanted, name)
            assert (got is None) == (once is None), name
            if once is not None:
                assert torch.equal(got, torch.cat([once, once])), name


@settings(max_examples=12)
@given(case=cases())
def test_append_is_what_the_backward_does(
    device_dtype: tuple[str, torch.dtype], case: Case
) -> None:
    check_append(case, *device_dtype)


@pytest.mark.parametrize("dims", VECTOR_ROWS[:3], ids=str)
def test_append_of_whole_vectors(
    device_dtype: tuple[str, torch.dtype], dims: tuple[int, int]
) -> None:
    """Which the backward on CUDA appends in another kernel."""
    check_append(
        Case(200, 5, 2, dims[1] // 2, 50, dims[0], activation="silu", seed=4), *device_dtype
    )


def test_append_beyond_the_capacity(device: str) -> None:
    """Nothing is written, and the header counts what did not fit."""
    calls = Calls.of(dataclasses.replace(SMALL, tokens=200), device, torch.float32)
    factors = calls.reserved(torch.float32)
    grad_a = calls.scores[..., 0].contiguous()
    upstream = calls.upstream(calls.forward()[0])
    calls.append(calls.scores, grad_a, upstream, factors)
    before = factors.arena.clone()
    calls.append(calls.scores, grad_a, upstream, factors)
    assert torch.equal(factors.arena[256:], before[256:])
    assert factors.arena[:16].view(torch.int64).tolist() == [200, 200]
    with pytest.raises(RuntimeError, match="200 tokens did not fit beside 200"):
        factors.check()


def test_append_out_of_range_raises_on_the_cpu() -> None:
    calls = Calls.of(SMALL, "cpu", torch.float32)
    factors = calls.reserved(torch.float32)
    upstream = calls.upstream(calls.forward()[0])
    calls.indices[3, 2] = 30
    message = r"table_factors_append: indices must be in \[0, 30\), got 30 at \[3, 2\]"
    with pytest.raises(RuntimeError, match=message):
        calls.append(calls.scores, calls.scores[..., 0].contiguous(), upstream, factors)
    assert factors.num_tokens == 0


@pytest.mark.gpu
def test_append_in_a_cuda_graph() -> None:
    """Every replay appends, and the buffers may not move any more."""
    calls = Calls.of(SMALL, "cuda", torch.float32)
    factors = calls.reserved(torch.float32, 30)
    upstream = calls.upstream(calls.forward()[0])
    grad_a = calls.scores[..., 0].contiguous()
    calls.append(calls.scores, grad_a, upstream, factors)
    once = factors.to_dense()
    factors.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls.append(calls.scores, grad_a, upstream, factors)
    for _ in range(3):
        graph.replay()
    assert factors.num_tokens == 27
    for got, wanted in zip(factors.to_dense(), once, strict=True):
        torch.testing.assert_close(got, 3 * wanted)
    with pytest.raises(RuntimeError, match="captured CUDA graph writes to"):
        factors.release()


# ---- edges and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "selected"), [(0, 7), (5, 0)])
def test_empty(device: str, tokens: int, selected: int) -> None:
    calls = Calls.of(dataclasses.replace(SMALL, tokens=tokens), device, torch.float32)
    calls.indices, calls.scores = calls.indices[:, :selected], calls.scores[:, :selected]
    out = calls.sum(calls.scores, calls.values, torch.bfloat16, None)
    assert out.shape == (tokens, 8)
    assert not out.any()
    dots = calls.dots(torch.ones_like(out), calls.values, 2, None)
    assert dots.shape == (tokens, selected, 2)
    factors = calls.reserved(torch.bfloat16)
    calls.append(calls.scores, calls.scores[..., 0], out, factors)
    assert factors.num_tokens == tokens


def test_not_contiguous(device: str) -> None:
    calls = Calls.of(SMALL, device, torch.float32)
    out = calls.sum(calls.scores, calls.values, torch.float32, None)
    dots = calls.dots(out, calls.values, 2, None)
    strided = dataclasses.replace(
        calls,
        indices=calls.indices.t().contiguous().t(),
        scores=calls.scores.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        values=calls.values.repeat(1, 2)[:, :8],
    )
    assert torch.equal(strided.sum(strided.scores, strided.values, torch.float32, None), out)
    assert torch.equal(strided.dots(out.t().contiguous().t(), strided.values, 2, None), dots)


def test_bad_arguments_raise(device: str) -> None:
    calls = Calls.of(SMALL, device, torch.float32)
    rows, scores = calls.values, calls.scores
    inputs = torch.ones(9, 8, device=device)
    float32_scale = torch.ones((), device=device)
    dots = [
        ((inputs[:, 1:], rows, 2, None), r"inputs must be \[T, W\] = \[9, 8\], got \[9, 7\]"),
        ((inputs.long(), rows, 2, None), "inputs must be float32"),
        ((inputs, rows, 3, None), "the number of cores C must divide W, got C = 3, W = 8"),
        ((inputs, rows, 5, None), r"the number of cores C must be 1\.\.4, got 5"),
        ((inputs, rows[:0], 2, None), "rows must not be empty"),
        ((inputs, rows, 2, float32_scale), "row_scale must be float64, got float32"),
    ]
    for arguments, message in dots:
        with pytest.raises(RuntimeError, match=f"slot_dots: {message}"):
            calls.dots(*arguments)
    sums = [
        ((scores[1:], rows, torch.float32, None), r"weights must be \[T, S, C\]"),
        ((scores.bfloat16(), rows, torch.float32, None), "weights must be float32, got bfloat16"),
        ((scores, rows, torch.int64, None), "dtype must be float32"),
        ((scores, rows, torch.float32, float32_scale), "row_scale must be float64"),
    ]
    for arguments, message in sums:
        with pytest.raises(RuntimeError, match=f"slot_sum: {message}"):
            calls.sum(*arguments)


def test_differentiating_raises(device: str) -> None:
    """They are what gradients are made of, where the caller knows more than they do."""
    calls = Calls.of(SMALL, device, torch.float32)
    weights, inputs = calls.scores.requires_grad_(), torch.ones(9, 8, device=device)
    with pytest.raises(RuntimeError, match="slot_sum: differentiating twice is not supported"):
        calls.sum(weights, calls.values, torch.float32, None).sum().backward()
    with pytest.raises(RuntimeError, match="slot_dots: differentiating twice is not supported"):
        calls.dots(inputs.requires_grad_(), calls.values, 2, None).sum().backward()


def test_float64_is_all_or_nothing() -> None:
    calls = Calls.of(SMALL, "cpu", torch.float64)
    with pytest.raises(RuntimeError, match="rows and inputs must both be float64 or neither"):
        calls.dots(torch.ones(9, 8), calls.values, 2, None)
    with pytest.raises(RuntimeError, match="rows and dtype must both be float64 or neither"):
        calls.sum(calls.scores, calls.values, torch.float32, None)


def test_bad_factors_raise(device: str) -> None:
    calls = Calls.of(SMALL, device, torch.float32)
    factors = calls.reserved(torch.float32)
    grad_a, upstream = calls.scores[..., 0].contiguous(), calls.upstream(calls.forward()[0])
    assert calls.pre_input is not None
    for arguments, message in (
        ((calls.scores, None, upstream), "factors must have the size of an arena"),
        ((calls.scores, grad_a[1:], upstream), r"grad_a must be \[T, S\]"),
        ((calls.scores, grad_a.bfloat16(), upstream), "grad_a must be float32, got bfloat16"),
        ((calls.scores, grad_a, upstream.bfloat16()), "factors must have the size of an arena"),
        ((calls.scores[:, :, :1], grad_a, upstream), "factors must have the size of an arena"),
        ((calls.scores, grad_a, upstream[:, :7]), "grad_out must have a width that"),
    ):
        with pytest.raises(RuntimeError, match=f"table_factors_append: {message}"):
            calls.append(*arguments, factors)
    assert factors.num_tokens == 0
