"""rms_norm against the reference: forward, both gradients, hard cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    FORWARD_BOUND,
    GRADIENT_BOUND,
    Data,
    accumulation_dtype,
    array,
    check_close,
    check_gradient,
    check_zero_gradients,
    scalar_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ultramem_cuda import ops
from ultramem_cuda import python_ref as ref


def check_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, seed: int = 0) -> None:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    y = ops.rms_norm(*leaves, eps=eps)
    assert y.dtype == x.dtype
    gain = weight.to(accumulation_dtype(x.dtype))
    check_close("y", y, ref.rms_norm(array(x), array(gain), eps), FORWARD_BOUND[x.dtype])

    upstream = Data(seed, x.device.type).normal(*x.shape, dtype=x.dtype)
    grad_x, grad_weight = scalar_gradients(y, upstream, leaves)
    expected_x, expected_weight = ref.rms_norm_bwd(array(upstream), array(x), array(gain), eps)
    # grad_x is the difference of two terms of the size of the first; in short rows they cancel.
    inverse_rms = 1.0 / np.sqrt(np.square(array(x)).mean(axis=-1, keepdims=True) + eps)
    first_term = inverse_rms * array(gain) * array(upstream)
    check_gradient("grad_x", grad_x, expected_x, first_term)
    terms = array(upstream) * array(x) * inverse_rms
    random_size = np.sqrt(np.square(terms).reshape(-1, weight.shape[0]).sum(axis=0))
    check_gradient("grad_weight", grad_weight, expected_weight, random_size)


@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    dim=st.integers(2, 200),
    weight_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
)
def test_drawn_shapes(
    device_dtype: tuple[str, torch.dtype],
    shape: list[int],
    dim: int,
    weight_dtype: torch.dtype,
    seed: int,
) -> None:
    device, dtype = device_dtype
    data = Data(seed, device)
    x = data.normal(*shape, dim, dtype=dtype, scale=3.0)
    check_rms_norm(x, data.gains(dim, weight_dtype), seed=seed)


@pytest.mark.parametrize("shape", [(4096, 192), (2, 2, 1138, 192), (3, 5000)], ids=str)
def test_fixed_shapes(device_dtype: tuple[str, torch.dtype], shape: tuple[int, ...]) -> None:
    device, dtype = device_dtype
    data = Data(1, device)
    check_rms_norm(data.normal(*shape, dtype=dtype), data.gains(shape[-1]), eps=1e-5)


# On CUDA the length of a row decides how many lanes share it, and whether registers hold it; the
# number of rows, how many blocks there are and how many rows each of them walks over.
@pytest.mark.parametrize("dim", [8, 64, 128, 136, 256, 264, 512, 640, 1024, 1032, 2048, 2056])
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_lengths_of_rows(device_dtype: tuple[str, torch.dtype], rows: int, dim: int) -> None:
    device, dtype = device_dtype
    data = Data(dim, device)
    check_rms_norm(data.normal(rows, dim, dtype=dtype), data.gains(dim), seed=rows)


@pytest.mark.parametrize("shape", [(20000, 24), (4000, 264), (4000, 520), (3000, 1032)], ids=str)
def test_many_rows(device_dtype: tuple[str, torch.dtype], shape: tuple[int, int]) -> None:
    device, dtype = device_dtype
    data = Data(5, device)
    check_rms_norm(data.normal(*shape, dtype=dtype), data.gains(shape[-1]))


@pytest.mark.parametrize("dim", [5, 64, 65, 264, 512, 640, 1032, 2056])
@pytest.mark.parametrize("rows", [0, 3, 300])
@pytest.mark.parametrize("gain_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_of_the_gain(
    device_dtype: tuple[str, torch.dtype], gain_dtype: torch.dtype, rows: int, dim: int
) -> None:
    """x's dtype is taken as it is, any other is cast: what comes out is the same, but rounded."""
    device, dtype = device_dtype
    data = Data(8, device)
    x = data.normal(rows, dim, dtype=dtype, requires_grad=True)
    gain = data.gains(dim, gain_dtype, requires_grad=True)
    exact = gain.detach().to(accumulation_dtype(dtype)).requires_grad_()
    upstream = data.normal(rows, dim, dtype=dtype)
    y, expected = ops.rms_norm(x, gain), ops.rms_norm(x, exact)
    grad_x, grad_gain = torch.autograd.grad(y, [x, gain], upstream)
    expected_grad_x, expected_grad_gain = torch.autograd.grad(expected, [x, exact], upstream)
    assert torch.equal(y, expected)
    assert torch.equal(grad_x, expected_grad_x)
    assert grad_gain.dtype == gain_dtype
    assert torch.equal(grad_gain, expected_grad_gain.to(gain_dtype))


def test_rows_that_begin_anywhere(device_dtype: tuple[str, torch.dtype]) -> None:
    """Contiguous, whole vectors long, but not aligned as they are: as right, if slower."""
    device, dtype = device_dtype
    data = Data(6, device)
    x = data.normal(40 * 64 + 1, dtype=dtype)[1:].view(40, 64)
    gain = data.gains(65)[1:]
    assert x.is_contiguous()
    assert gain.is_contiguous()
    check_rms_norm(x, gain)


def test_same_gradients_in_every_run(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(7, device)
    x = data.normal(9000, 192, dtype=dtype, requires_grad=True)
    gain = data.gains(192, requires_grad=True)
    upstream = data.normal(9000, 192, dtype=dtype)
    y = ops.rms_norm(x, gain)
    first = torch.autograd.grad(y, [x, gain], upstream, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(y, [x, gain], upstream, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_last_dimension_one(device: str) -> None:
    x = torch.tensor([[3.0], [-0.5]], device=device)
    y = ops.rms_norm(x, torch.tensor([2.0], device=device), eps=0.0)
    assert y.tolist() == [[2.0], [-2.0]]


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)], ids=str)
def test_no_rows(device_dtype: tuple[str, torch.dtype], shape: tuple[int, ...]) -> None:
    device, dtype = device_dtype
    x = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    weight = torch.ones(7, dtype=torch.float32, device=device, requires_grad=True)
    y = ops.rms_norm(x, weight)
    assert y.shape == shape
    y.sum().backward()
    check_zero_gradients([x, weight])


def test_zero_rows_are_finite(device: str) -> None:
    x = torch.zeros(4, 9, device=device, requires_grad=True)
    y = ops.rms_norm(x, torch.ones(9, device=device))
    assert not y.any()
    y.sum().backward()
    # The derivative at zero is weight / sqrt(eps).
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_stay_apart(device: str, value: float) -> None:
    data = Data(2, device)
    x, weight = data.normal(5, 33), data.gains(33)
    clean = ops.rms_norm(x, weight)
    spoiled = x.clone()
    spoiled[2, 4] = value
    y = ops.rms_norm(spoiled, weight)
    # inf / inf: the entry itself is NaN, the others of its row are 0 or NaN.
    assert torch.isnan(y[2, 4])
    rest = [0, 1, 3, 4]
    assert torch.equal(y[rest], clean[rest])


def test_large_float16_does_not_overflow(device: str) -> None:
    x = torch.full((2, 64), 6e4, dtype=torch.float16, device=device)
    y = ops.rms_norm(x, torch.ones(64, device=device))
    assert torch.equal(y, torch.ones_like(y))


def test_not_contiguous(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(3, device)
    base = data.normal(30, 2, 17, dtype=dtype)
    weight = data.gains(34)[::2]
    x = base.transpose(0, 1)[:, ::3]
    assert not x.is_contiguous()
    leaf, gain = x.clone().requires_grad_(), weight.clone().requires_grad_()
    view, gain_view = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y, y_view = ops.rms_norm(leaf, gain), ops.rms_norm(view, gain_view)
    assert torch.equal(y, y_view)
    expanded = torch.ones((), dtype=dtype, device=device).expand_as(y)
    for a, b in zip(
        torch.autograd.grad(y, [leaf, gain], torch.ones_like(y)),
        torch.autograd.grad(y_view, [view, gain_view], expanded),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_gradient_bound_is_tight_for_one_rounding(device: str) -> None:
    """grad_weight is summed in float32 whatever x is: as right as for float32."""
    data = Data(4, device)
    x = data.normal(3000, 48, dtype=torch.bfloat16)
    weight = data.gains(48, requires_grad=True)
    upstream = data.normal(3000, 48, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(ops.rms_norm(x, weight), [weight], upstream)
    _, expected = ref.rms_norm_bwd(array(upstream), array(x), array(weight))
    assert grad.dtype == torch.float32
    check_gradient("grad_weight", grad, expected, bound=GRADIENT_BOUND[torch.float32])
