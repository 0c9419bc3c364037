"""product_key_topk against the reference, over drawn and fixed shapes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import Data, array, check_only_some_train, check_product_key_topk, proper_subsets
from hypothesis import given
from hypothesis import strategies as st

from ultramem_cuda import ops
from ultramem_cuda import python_ref as ref


class Case(NamedTuple):
    tokens: int
    heads: int
    shared_query: bool
    rank: int
    cores: int
    key_dim: int
    num_keys: int
    axis_topk: int
    topk: int
    mode: str
    key_norm: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mode = draw(st.sampled_from(["tucker", "tucker", "tucker", "additive"]))
    tucker = mode == "tucker"
    num_keys = draw(st.integers(1, 200))
    axis_topk = draw(st.integers(1, min(num_keys, 128)))
    candidates = axis_topk**2
    if not tucker and axis_topk < num_keys:
        candidates = axis_topk
    return Case(
        tokens=draw(st.sampled_from([0, 1, 7, 129])),
        heads=draw(st.integers(1, 3)),
        shared_query=draw(st.booleans()),
        rank=draw(st.integers(1, 4)) if tucker else 1,
        cores=draw(st.integers(1, 4)) if tucker else 1,
        key_dim=draw(st.integers(5, 70)),
        num_keys=num_keys,
        axis_topk=axis_topk,
        topk=draw(st.integers(1, min(candidates, 200))),
        mode=mode,
        key_norm=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def check(case: Case, device: str, dtype: torch.dtype) -> None:
    data = Data(case.seed, device)
    num_queries = 1 if case.shared_query else case.rank
    query = data.normal(case.tokens, 2, case.heads, num_queries, case.key_dim, dtype=dtype)
    keys = data.normal(case.heads, 2, case.rank, case.num_keys, case.key_dim, dtype=dtype)
    core = None
    if case.mode == "tucker":
        core = data.cores(case.cores, case.heads, case.rank)
    check_product_key_topk(
        query,
        keys,
        core,
        topk=case.topk,
        axis_topk=case.axis_topk,
        mode=case.mode,
        key_norm_weight=data.gains(case.key_dim) if case.key_norm else None,
        seed=case.seed,
    )


@given(case=cases())
def test_drawn_shapes(device_dtype: tuple[str, torch.dtype], case: Case) -> None:
    check(case, *device_dtype)


SMALL = Case(64, 1, False, 2, 2, 192, 1138, 32, 32, "tucker", True, 1)  # "227M-1.2B"
MANY = Case(16, 1, False, 2, 2, 96, 300, 128, 768, "tucker", False, 2)
FOUR = Case(9, 2, True, 4, 4, 80, 257, 48, 1024, "tucker", False, 3)
ADDITIVE = Case(65, 2, False, 1, 1, 100, 515, 64, 64, "additive", False, 4)
FIXED = {"small": SMALL, "many": MANY, "four": FOUR, "additive": ADDITIVE}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_shapes(device_dtype: tuple[str, torch.dtype], name: str) -> None:
    check(FIXED[name], *device_dtype)


@pytest.mark.parametrize("core_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_core_of_any_dtype(device: str, core_dtype: torch.dtype) -> None:
    data = Data(5, device)
    query = data.normal(9, 2, 2, 2, 24, dtype=torch.bfloat16)
    keys = data.normal(2, 2, 2, 30, 24, dtype=torch.bfloat16)
    check_product_key_topk(query, keys, data.cores(3, 2, 2, core_dtype), topk=11, axis_topk=6)


@pytest.mark.parametrize("gain_dtype", [torch.bfloat16, torch.float32])
def test_key_norm_inside_equals_ahead(
    device_dtype: tuple[str, torch.dtype], gain_dtype: torch.dtype
) -> None:
    device, dtype = device_dtype
    data = Data(6, device)
    query, keys = (
        data.normal(8, 2, 1, 2, 40, dtype=dtype),
        data.normal(1, 2, 2, 50, 40, dtype=dtype),
    )
    core, gain = data.cores(2, 1, 2), data.gains(40, gain_dtype)
    inside = ops.product_key_topk(query, keys, core, topk=9, key_norm_weight=gain, eps=1e-5)
    normed = ops.rms_norm(keys, gain, eps=1e-5)
    ahead = ops.product_key_topk(query, normed, core, topk=9)
    assert torch.equal(inside[0], ahead[0])
    assert torch.equal(inside[1], ahead[1])


def test_filter_given_equals_default(device: str) -> None:
    data = Data(7, device)
    query, keys, core = (
        data.normal(8, 2, 2, 3, 20),
        data.normal(2, 2, 3, 40, 20),
        data.cores(2, 2, 3),
    )
    u, t, _ = ops.tucker_filter(core)
    default = ops.product_key_topk(query, keys, core, topk=9)
    given_filter = ops.product_key_topk(query, keys, core, topk=9, u=u, t=t)
    assert torch.equal(default[0], given_filter[0])
    assert torch.equal(default[1], given_filter[1])


@pytest.mark.parametrize("key_dim", [64, 192, 256, 512])
@pytest.mark.parametrize("tokens", [2, 700, 9000])
@pytest.mark.gpu
def test_filter_and_inputs_just_written(tokens: int, key_dim: int) -> None:
    """On a GPU the first kernel begins while the filter is computed, but not before its inputs are
    there: each time all of them are written right ahead of the call."""
    data = Data(7, "cuda")
    sources = [
        (data.normal(tokens, 2, 1, 2, key_dim), data.normal(1, 2, 2, 600, key_dim))
        for _ in range(2)
    ]
    cores = [data.cores(2, 1, 2) for _ in range(2)]
    expected = []
    for (query, keys), core in zip(sources, cores, strict=True):
        u, t, _ = ops.tucker_filter(core)
        query, keys = query.bfloat16(), keys.bfloat16()
        expected.append(ops.product_key_topk(query, keys, core, topk=32, u=u, t=t))
    query, keys = (torch.zeros_like(x, dtype=torch.bfloat16) for x in sources[0])
    core = torch.zeros_like(cores[0])
    for turn in range(6):
        query.copy_(sources[turn % 2][0])
        keys.copy_(sources[turn % 2][1])
        core.copy_(cores[turn % 2])
        scores, indices = ops.product_key_topk(query, keys, core, topk=32)
        assert torch.equal(scores, expected[turn % 2][0])
        assert torch.equal(indices, expected[turn % 2][1])


@pytest.mark.parametrize(
    ("tokens", "num_keys", "key_dim"), [(36_000, 600, 264), (33_120, 9_000, 64)]
)
@pytest.mark.gpu
def test_more_tokens_than_a_workspace_holds(tokens: int, num_keys: int, key_dim: int) -> None:
    """By kernels that take them in chunks, one of them an odd number of 64 at a time: a token's
    result does not depend on the others."""
    data = Data(11, "cuda")
    query = data.normal(tokens, 2, 1, 2, key_dim, dtype=torch.bfloat16)
    keys = data.normal(1, 2, 2, num_keys, key_dim, dtype=torch.bfloat16)
    core = data.cores(2, 1, 2)
    scores, indices = ops.product_key_topk(query, keys, core, topk=32)
    part_tokens = tokens // 6
    for first in range(0, tokens, part_tokens):
        part = slice(first, first + part_tokens)
        expected = ops.product_key_topk(query[part], keys, core, topk=32)
        assert torch.equal(scores[part], expected[0])
        assert torch.equal(indices[part], expected[1])


@pytest.mark.parametrize("mode", ["tucker", "additive"])
def test_kept_keys_of_the_axes(device: str, mode: str) -> None:
    data = Data(8, device)
    rank = 2 if mode == "tucker" else 1
    query, keys = data.normal(8, 2, 3, rank, 20), data.normal(3, 2, rank, 40, 20)
    core = data.cores(2, 3, 2) if mode == "tucker" else None
    options = {"topk": 5, "axis_topk": 7, "mode": mode}
    scores, indices = ops.product_key_topk(query, keys, core, **options)
    again = ops.product_key_topk(query, keys, core, **options, return_axis_indices=True)
    assert torch.equal(again[0], scores)
    assert torch.equal(again[1], indices)
    kept = again[2]
    assert kept.dtype == torch.int32
    arrays = array(query), array(keys), None if core is None else array(core)
    expected = np.sort(ref.product_key_topk(*arrays, **options).axis_indices)
    np.testing.assert_array_equal(kept.cpu().numpy(), expected)


def test_filter_given_is_used_and_gets_no_gradient(device: str) -> None:
    """With u = t = e_2 only the second rank's scores choose the rows and columns."""
    query = torch.ones(1, 2, 1, 2, 1, device=device)
    keys = torch.zeros(1, 2, 2, 6, 1, device=device)
    keys[0, :, 0, :, 0] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    keys[0, :, 1, :, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    core = torch.eye(2, device=device).reshape(1, 1, 2, 2).requires_grad_()
    e_2 = torch.tensor([[0.0, 1.0]], device=device, requires_grad=True)
    scores, indices = ops.product_key_topk(query, keys, core, topk=4, axis_topk=2, u=e_2, t=e_2)
    # Rows and columns {5, 4}; ranks 1*1+6*6 = 37, 2*1+5*6 = 32 twice, 2*2+5*5 = 29.
    assert indices.flatten().tolist() == [35, 29, 34, 28]
    assert scores.flatten().tolist() == [37.0, 32.0, 32.0, 29.0]
    scores.sum().backward()
    assert core.grad is not None
    assert e_2.grad is None


def test_default_axis_topk(device: str) -> None:
    """min(n, topk, 128)."""
    data = Data(8, device)
    for num_keys, topk, axis_topk in ((5, 17, 5), (40, 9, 9), (150, 130, 128)):
        query, keys = data.normal(3, 2, 1, 1, 16), data.normal(1, 2, 1, num_keys, 16)
        core = data.cores(1, 1, 1)
        default = ops.product_key_topk(query, keys, core, topk=topk)
        explicit = ops.product_key_topk(query, keys, core, topk=topk, axis_topk=axis_topk)
        assert torch.equal(default[0], explicit[0])
        assert torch.equal(default[1], explicit[1])


@pytest.mark.parametrize("trained", proper_subsets("query", "keys", "core"), ids="-".join)
def test_only_some_inputs_train(device: str, trained: tuple[str, ...]) -> None:
    data = Data(9, device)
    inputs = {
        "query": data.normal(5, 2, 2, 2, 12, requires_grad=True),
        "keys": data.normal(2, 2, 2, 20, 12, requires_grad=True),
        "core": data.cores(2, 2, 2, requires_grad=True),
    }
    check_only_some_train(
        lambda **inputs: ops.product_key_topk(**inputs, topk=6)[0], inputs, trained
    )


def test_not_contiguous(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(10, device)
    query = data.normal(2, 2, 14, 15, 2, dtype=dtype).permute(2, 0, 1, 4, 3)[::2]
    keys = data.normal(2, 15, 2, 21, 2, dtype=dtype).permute(0, 2, 4, 3, 1)
    core = data.cores(2, 2, 2).transpose(2, 3)
    assert not any(tensor.is_contiguous() for tensor in (query, keys, core))
    outcomes = []
    for make in (torch.clone, torch.detach):
        leaves = [make(tensor).requires_grad_() for tensor in (query, keys, core)]
        scores, indices = ops.product_key_topk(*leaves, topk=7, axis_topk=5)
        upstream = torch.ones((), dtype=scores.dtype, device=device).expand_as(scores)
        outcomes.append([scores, indices, *torch.autograd.grad(scores, leaves, upstream)])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)
