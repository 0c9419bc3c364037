from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_checks import assert_close, assert_matches_finite_differences, leaf
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramem_cuda import python_ref as ref

shapes = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 9))


@settings(deadline=None, max_examples=30)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_forward_and_backward(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal(shape), rng.standard_normal(shape[-1])
    grad_out = rng.standard_normal(shape)
    eps = 0.3  # wide enough to keep the function smooth over the steps where x is close to zero

    tensors = leaf(x), leaf(weight)
    expected = torch.nn.functional.rms_norm(tensors[0], (shape[-1],), tensors[1], eps)
    expected.backward(torch.tensor(grad_out))
    assert_close(ref.rms_norm(x, weight, eps), expected)
    gradients = ref.rms_norm_bwd(grad_out, x, weight, eps)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert_close(gradient, tensor.grad)
    assert_matches_finite_differences(
        lambda *a: (ref.rms_norm(*a, eps) * grad_out).sum(), (x, weight), gradients, rng
    )


def test_narrow_inputs_are_computed_in_float64() -> None:
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float16)
    weight = np.ones(6, np.float32)
    out = ref.rms_norm(x, weight)
    assert out.dtype == np.float64
    np.testing.assert_array_equal(out, ref.rms_norm(x.astype(np.float64), weight))


def test_shapes_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match="rms_norm"):
        ref.rms_norm(np.ones((2, 3)), np.ones(4))
