"""tucker_filter against the reference: singular vectors, singular values, their gradient."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Data, array, check_close, check_gradient
from hypothesis import given
from hypothesis import strategies as st

from ultramem_cuda import ops
from ultramem_cuda import python_ref as ref

# Computed in float64 and rounded once.
BOUND = {torch.float32: 1.2e-7, torch.float64: 1e-13}


def filter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@given(
    num_cores=st.integers(1, 4),
    num_heads=st.integers(1, 3),
    rank=st.integers(1, 4),
    signed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_drawn_cores(
    device_dtype: tuple[str, torch.dtype],
    num_cores: int,
    num_heads: int,
    rank: int,
    signed: bool,
    seed: int,
) -> None:
    device, dtype = device_dtype
    data = Data(seed, device)
    if signed:
        core = data.normal(num_cores, num_heads, rank, rank, dtype=dtype, requires_grad=True)
    else:
        core = data.cores(num_cores, num_heads, rank, dtype, requires_grad=True)
    u, t, sigma = ops.tucker_filter(core)
    expected_u, expected_t, expected_sigma = ref.tucker_filter(array(core))
    result_dtype = filter_dtype(dtype)
    for name, actual, wanted in (
        ("u", u, expected_u),
        ("t", t, expected_t),
        ("sigma", sigma, expected_sigma),
    ):
        assert actual.dtype == result_dtype
        check_close(name, actual, wanted, BOUND[result_dtype])
    assert not u.requires_grad
    assert not t.requires_grad

    upstream = data.normal(num_heads, rank, dtype=result_dtype)
    (grad,) = torch.autograd.grad(sigma, [core], upstream)
    assert grad.dtype == dtype
    check_gradient("grad_core", grad, ref.tucker_filter_bwd(array(upstream), array(core)))


def test_defining_properties(device: str) -> None:
    core = Data(1, device).normal(3, 2, 4, 4)
    u, t, sigma = ops.tucker_filter(core)
    total = core.double().sum(0)
    u, t = u.double(), t.double()
    assert (sigma[:, :-1] >= sigma[:, 1:]).all()
    assert (u.sum(-1) >= 0).all()
    ones = torch.ones(2, dtype=torch.float64, device=device)
    torch.testing.assert_close(u.norm(dim=-1), ones, rtol=0, atol=1e-6)
    torch.testing.assert_close(t.norm(dim=-1), ones, rtol=0, atol=1e-6)
    leading = torch.einsum("hr,hrs,hs->h", u, total, t)
    torch.testing.assert_close(leading.float(), sigma[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["zero", "identity", "cancelling", "rotation"])
def test_undetermined_vectors_are_the_first_axis(device: str, rank: int, kind: str) -> None:
    core = torch.zeros(2, 1, rank, rank, device=device)
    if kind == "identity":
        core[0, 0] = torch.eye(rank)
    elif kind == "cancelling":
        core[0], core[1] = 3.0, -3.0
    elif kind == "rotation":
        core[1, 0] = torch.eye(rank).roll(1, 0)
    u, t, _ = ops.tucker_filter(core)
    e_1 = torch.eye(1, rank, device=device)
    assert torch.equal(u, e_1)
    assert torch.equal(t, e_1)


def test_rank_one_sign_goes_to_t(device: str) -> None:
    u, t, sigma = ops.tucker_filter(torch.full((1, 1, 1, 1), -2.5, device=device))
    assert (u.item(), t.item(), sigma.item()) == (1.0, -1.0, 2.5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
def test_extreme_scales(device: str, scale: float) -> None:
    core = Data(2, device).cores(2, 2, 3) * scale
    u, t, sigma = ops.tucker_filter(core)
    expected = ref.tucker_filter(array(core))
    for name, actual, wanted in zip("uts", (u, t, sigma), expected, strict=True):
        check_close(name, actual, wanted, BOUND[torch.float32])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_head_stays_apart(device: str, value: float) -> None:
    core = Data(3, device).cores(2, 3, 2)
    clean = ops.tucker_filter(core)
    core[1, 1, 0, 1] = value
    u, t, sigma = ops.tucker_filter(core)
    e_1 = torch.tensor([1.0, 0.0], device=device)
    assert torch.equal(u[1], e_1)
    assert torch.equal(t[1], e_1)
    assert torch.isnan(sigma[1]).all()
    for spoiled, original in zip((u, t, sigma), clean, strict=True):
        assert torch.equal(spoiled[[0, 2]], original[[0, 2]])


def test_not_contiguous(device: str) -> None:
    core = Data(4, device).normal(3, 3, 2, 2).permute(3, 1, 0, 2)[:, :, ::2]
    assert not core.is_contiguous()
    for a, b in zip(ops.tucker_filter(core), ops.tucker_filter(core.clone()), strict=True):
        assert torch.equal(a, b)
