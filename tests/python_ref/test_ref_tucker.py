from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_checks import assert_close, assert_matches_finite_differences, leaf
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramem_cuda import python_ref as ref


@settings(deadline=None, max_examples=30)
@given(
    num_tokens=st.integers(0, 5),
    d_model=st.integers(1, 6),
    num_heads=st.integers(1, 3),
    num_queries=st.integers(1, 4),
    key_dim=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
def test_query_forward_and_backward(
    num_tokens: int, d_model: int, num_heads: int, num_queries: int, key_dim: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, d_model))
    weight = rng.standard_normal((2 * num_heads * num_queries * key_dim, d_model))
    norm_weight = rng.standard_normal(key_dim)
    grad_query = rng.standard_normal((num_tokens, 2, num_heads, num_queries, key_dim))
    eps = 0.3

    tensors = leaf(x), leaf(weight), leaf(norm_weight)
    # Segment by segment: the rows of side, head and query are a contiguous block of the weight.
    segments = [tensors[0] @ block.T for block in tensors[1].split(key_dim)]
    normed = [torch.nn.functional.rms_norm(s, (key_dim,), tensors[2], eps) for s in segments]
    expected = torch.stack(normed, 1).view(grad_query.shape)
    expected.backward(torch.tensor(grad_query))

    assert_close(ref.tucker_query(x, weight, norm_weight, num_heads, eps), expected)
    gradients = ref.tucker_query_bwd(grad_query, x, weight, norm_weight, num_heads, eps)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert_close(gradient, tensor.grad)
    assert_matches_finite_differences(
        lambda *a: (ref.tucker_query(*a, num_heads, eps) * grad_query).sum(),
        (x, weight, norm_weight),
        gradients,
        rng,
    )


def test_query_weight_that_is_no_multiple_of_the_segments_raises() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        ref.tucker_query(np.ones((1, 2)), np.ones((9, 2)), np.ones(2))


cores = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))


@settings(deadline=None, max_examples=40)
@given(shape=cores, seed=st.integers(0, 2**31))
def test_filter_is_the_leading_pair_with_canonical_sign(shape: tuple[int, ...], seed: int) -> None:
    num_cores, num_heads, rank = shape
    core = np.random.default_rng(seed).standard_normal((num_cores, num_heads, rank, rank))
    core_sum = core.sum(axis=0)
    u, t, sigma = ref.tucker_filter(core)
    assert u.shape == t.shape == sigma.shape == (num_heads, rank)
    assert (np.diff(sigma, axis=-1) <= 0).all()
    np.testing.assert_allclose(np.linalg.norm(u, axis=-1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(t, axis=-1), 1.0, rtol=1e-12)
    assert (u.sum(axis=-1) >= 0).all()
    # Cbar t = sigma_1 u and Cbar^T u = sigma_1 t hold for this pair of signs alone.
    np.testing.assert_allclose(np.einsum("hrs,hs->hr", core_sum, t), sigma[:, :1] * u, atol=1e-12)
    np.testing.assert_allclose(np.einsum("hrs,hr->hs", core_sum, u), sigma[:, :1] * t, atol=1e-12)
    expected = torch.linalg.svdvals(torch.tensor(core_sum))
    np.testing.assert_allclose(sigma, expected.numpy(), rtol=1e-10, atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(shape=cores, seed=st.integers(0, 2**31))
def test_filter_backward(shape: tuple[int, ...], seed: int) -> None:
    num_cores, num_heads, rank = shape
    rng = np.random.default_rng(seed)
    # Singular values well apart and away from zero: there they are smooth.
    left = np.linalg.qr(rng.standard_normal((num_heads, rank, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((num_heads, rank, rank)))[0]
    core_sum = (left * (1.0 + np.arange(rank))) @ right
    core = rng.standard_normal((num_cores, num_heads, rank, rank))
    core[0] += core_sum - core.sum(axis=0)
    grad_sigma = rng.standard_normal((num_heads, rank))

    gradient = ref.tucker_filter_bwd(grad_sigma, core)
    tensor = leaf(core)
    torch.linalg.svdvals(tensor.sum(0)).backward(torch.tensor(grad_sigma))
    assert_close(gradient, tensor.grad)
    assert_matches_finite_differences(
        lambda c: (ref.tucker_filter(c)[2] * grad_sigma).sum(), (core,), (gradient,), rng
    )


def test_rank_one_filter_is_one_and_the_sign() -> None:
    u, t, sigma = ref.tucker_filter(np.array([2.0, -3.0, 0.0]).reshape(1, 3, 1, 1))
    np.testing.assert_array_equal(u[:, 0], [1, 1, 1])
    np.testing.assert_array_equal(t[:, 0], [1, -1, 1])
    np.testing.assert_array_equal(sigma[:, 0], [2, 3, 0])


@pytest.mark.parametrize(
    "core_sum",
    [
        np.zeros((3, 3)),
        np.eye(3),
        np.array([[0.0, -2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        np.diag([1.0, 1.0 + 1e-10, 0.5]),
    ],
    ids=["zero", "identity", "rotation", "equal to within the tolerance"],
)
def test_undetermined_vectors_are_e_1(core_sum: np.ndarray) -> None:
    u, t, _ = ref.tucker_filter(core_sum[None, None])
    np.testing.assert_array_equal(u, [[1, 0, 0]])
    np.testing.assert_array_equal(t, [[1, 0, 0]])


def test_nearly_equal_singular_values_are_told_apart() -> None:
    u, t, _ = ref.tucker_filter(np.diag([1.0, 1.0 + 1e-7])[None, None])
    np.testing.assert_allclose(u, [[0, 1]], atol=1e-8)
    np.testing.assert_allclose(t, [[0, 1]], atol=1e-8)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_zero_sum_makes_the_first_component_positive(sign: float) -> None:
    # Cbar = (0, 1, -1) (1, 2, 3)^T up to sign and size: u sums to zero.
    core = sign * np.outer([0.0, 1.0, -1.0], [1.0, 2.0, 3.0])[None, None]
    u, t, _ = ref.tucker_filter(core)
    np.testing.assert_allclose(u, [[0.0, 0.5**0.5, -(0.5**0.5)]], atol=1e-12)
    np.testing.assert_allclose(t, sign * np.array([[1.0, 2.0, 3.0]]) / 14**0.5, atol=1e-12)


def test_non_finite_head_leaves_the_others_alone() -> None:
    core = np.random.default_rng(0).standard_normal((2, 3, 2, 2))
    expected = ref.tucker_filter(core)
    core[1, 1, 0, 1] = np.nan
    u, t, sigma = ref.tucker_filter(core)
    np.testing.assert_array_equal(u[1], [1, 0])
    np.testing.assert_array_equal(t[1], [1, 0])
    assert np.isnan(sigma[1]).all()
    for actual, whole in zip((u, t, sigma), expected, strict=True):
        np.testing.assert_array_equal(actual[[0, 2]], whole[[0, 2]])
    gradient = ref.tucker_filter_bwd(np.ones((3, 2)), core)
    assert np.isnan(gradient[:, 1]).all()
    assert np.isfinite(gradient[:, [0, 2]]).all()


def test_core_of_wrong_shape_raises() -> None:
    with pytest.raises(ValueError, match="core"):
        ref.tucker_filter(np.ones((1, 2, 3)))
