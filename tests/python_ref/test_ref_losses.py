from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_checks import assert_close, assert_matches_finite_differences, leaf
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramem_cuda import python_ref as ref


@settings(deadline=None, max_examples=25)
@given(
    num_cores=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    rank=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_tucker_penalty(num_cores: int, num_heads: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Singular values 0.2, 0.7, 1.2, ...: well apart, and on either side of tau.
    left = np.linalg.qr(rng.standard_normal((num_heads, rank, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((num_heads, rank, rank)))[0]
    sigma = 0.2 + 0.5 * np.arange(rank)
    core = rng.standard_normal((num_cores, num_heads, rank, rank))
    core[0] += (left * sigma) @ right - core.sum(axis=0)

    loss = ref.tucker_penalty(core, alpha=0.3, tau=0.5)
    excess = [max(0.0, s - 0.5) ** 2 for s in sorted(sigma)[:-1]]
    assert loss == pytest.approx(0.3 / max(rank - 1, 1) * sum(excess), rel=1e-9, abs=1e-12)

    tensor = leaf(core)
    second = torch.linalg.svdvals(tensor.sum(0))[:, 1:]
    (0.3 / max(rank - 1, 1) * second.sub(0.5).clamp_min(0).square().sum(-1).mean()).backward()
    gradient = ref.tucker_penalty_bwd(core, alpha=0.3, tau=0.5)
    assert_close(gradient, tensor.grad)
    assert_matches_finite_differences(
        lambda c: ref.tucker_penalty(c, alpha=0.3, tau=0.5), (core,), (gradient,), rng
    )
    scaled = ref.tucker_penalty_bwd(core, alpha=0.3, tau=0.5, grad_out=-2.0)
    np.testing.assert_allclose(scaled, -2.0 * gradient, rtol=1e-14)


@settings(deadline=None, max_examples=25)
@given(
    num_tokens=st.integers(1, 5),
    num_heads=st.integers(1, 2),
    rank=st.integers(1, 3),
    shared=st.booleans(),
    num_keys=st.integers(1, 6),
    normalize=st.sampled_from(["paper", "release"]),
    seed=st.integers(0, 2**31),
)
def test_key_balance_loss(
    num_tokens: int,
    num_heads: int,
    rank: int,
    shared: bool,
    num_keys: int,
    normalize: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    axis_topk = int(rng.integers(1, num_keys + 1))
    query = rng.standard_normal((num_tokens, 2, num_heads, 1 if shared else rank, 3))
    keys = rng.standard_normal((num_heads, 2, rank, num_keys, 3))
    core = rng.standard_normal((2, num_heads, rank, rank))
    result = ref.product_key_topk(query, keys, core, topk=1, axis_topk=axis_topk)
    u, t = np.moveaxis(result.axis_filter, 1, 0)
    arguments = (result.axis_indices, u, t)
    options = {"beta": 0.7, "normalize": normalize}

    tensors = leaf(query), leaf(keys)
    expected = torch.zeros((), dtype=torch.float64)
    for side, weights in enumerate((u, t)):
        probability = torch.zeros(num_keys, dtype=torch.float64)
        counts = [0] * num_keys
        for token, head in np.ndindex(num_tokens, num_heads):
            logits = torch.zeros(num_keys, dtype=torch.float64)
            for r in range(rank):
                q = tensors[0][token, side, head, 0 if shared else r]
                logits = logits + float(weights[head, r]) * (tensors[1][head, side, r] @ q)
            probability = probability + logits.softmax(0) / (num_tokens * num_heads)
            for key in result.axis_indices[token, head, side].tolist():
                counts[key] += 1
        total = num_tokens if normalize == "paper" else sum(counts)
        frequency = torch.tensor(counts, dtype=torch.float64) / total
        expected = expected + 0.7 * num_keys * (frequency * probability).sum()
    expected.backward()

    assert ref.key_balance_loss(query, keys, *arguments, **options) == pytest.approx(
        expected.item(), rel=1e-11
    )
    gradients = ref.key_balance_loss_bwd(query, keys, *arguments, **options)
    # A single key has probability 1 whatever happens: both gradients are zero up to rounding.
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-9, atol=1e-13)
    assert_matches_finite_differences(
        lambda *a: ref.key_balance_loss(*a, *arguments, **options), (query, keys), gradients, rng
    )


@pytest.mark.parametrize(("normalize", "expected"), [("paper", 2 * 0.5 * 3 * 2), ("release", 1.0)])
def test_even_choice_of_keys(normalize: str, expected: float) -> None:
    """Equal scores, and every key kept equally often: 2 beta H m, or 2 beta per selection."""
    query, keys = np.zeros((4, 2, 2, 1, 3)), np.ones((2, 2, 1, 12, 3))
    axis_indices = np.broadcast_to(np.arange(12).reshape(4, 1, 1, 3), (4, 2, 2, 3))
    u = t = np.ones((2, 1))
    loss = ref.key_balance_loss(query, keys, axis_indices, u, t, beta=0.5, normalize=normalize)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_no_tokens_cost_nothing() -> None:
    query, keys = np.zeros((0, 2, 1, 1, 3)), np.ones((1, 2, 1, 4, 3))
    arguments = (np.zeros((0, 1, 2, 2), np.int64), np.ones((1, 1)), np.ones((1, 1)))
    assert ref.key_balance_loss(query, keys, *arguments, beta=1.0) == 0.0
    grad_query, grad_keys = ref.key_balance_loss_bwd(query, keys, *arguments, beta=1.0)
    assert grad_query.shape == query.shape
    assert not grad_keys.any()


def test_unknown_normalization_raises() -> None:
    query, keys = np.zeros((1, 2, 1, 1, 3)), np.ones((1, 2, 1, 4, 3))
    with pytest.raises(ValueError, match="normalize"):
        ref.key_balance_loss(
            query,
            keys,
            np.zeros((1, 1, 2, 2), np.int64),
            np.ones((1, 1)),
            np.ones((1, 1)),
            beta=1.0,
            normalize="mean",
        )
