"""The two auxiliary losses of UltraMemV2 (arXiv 2508.18756, section 3.6).

The paper's models are trained without either.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from ._arrays import FloatArray, f64, i64, non_finite_ok
from .product_key import axis_scores
from .tucker import tucker_filter, tucker_filter_bwd

Normalize = Literal["paper", "release"]


@non_finite_ok
def tucker_penalty(core: npt.ArrayLike, *, alpha: float, tau: float) -> float:
    """What keeps the cores near rank 1, so that filtering by u and t loses little (equation 17):

        L = alpha / (R - 1) * sum_{i >= 2} max(0, sigma_i - tau)^2

    over the singular values of Cbar = sum_c core_c, averaged over heads. core [C, H, R, R]. Zero
    for R = 1. tau leaves room for more than rank 1.
    """
    _, _, sigma = tucker_filter(core)
    num_heads, rank = sigma.shape
    if rank == 1:
        return 0.0
    excess = np.maximum(sigma[:, 1:] - tau, 0.0)
    return float(alpha / ((rank - 1) * num_heads) * (excess * excess).sum())


@non_finite_ok
def tucker_penalty_bwd(
    core: npt.ArrayLike, *, alpha: float, tau: float, grad_out: float = 1.0
) -> FloatArray:
    """grad_core [C, H, R, R] of tucker_penalty times grad_out.

    dL/dsigma_i = 2 alpha / ((R - 1) H) * max(0, sigma_i - tau) for i >= 2, then tucker_filter's
    backward.
    """
    _, _, sigma = tucker_filter(core)
    num_heads, rank = sigma.shape
    grad_sigma = np.zeros_like(sigma)
    if rank > 1:
        excess = np.maximum(sigma[:, 1:] - tau, 0.0)
        grad_sigma[:, 1:] = grad_out * 2.0 * alpha / ((rank - 1) * num_heads) * excess
    return tucker_filter_bwd(grad_sigma, core)


@non_finite_ok
def key_balance_loss(
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    axis_indices: npt.ArrayLike,
    u: npt.ArrayLike,
    t: npt.ArrayLike,
    *,
    beta: float,
    normalize: Normalize = "paper",
) -> float:
    """The load-balancing loss of mixtures of experts, each axis taken for a router over n keys.

    With w = u for rows and w = t for columns, each side has

        P[tau, h, i] = softmax_i(sum_r w_r S[tau, h, r, i])               (equation 18)
        L_side       = beta * n * sum_i f_i p_i                           (equation 19)
        f_i = Count_i / T,   p_i = mean over tau and h of P[tau, h, i]    (equation 20)

    and L is the sum of the two. Count_i is how often the tokens' heads kept key i; neither it nor
    the filter passes a gradient. An even choice gives L = 2 beta H m. normalize="release" divides
    counts by T * H * m, the number of selections, as the code released with the paper does: then
    sum_i f_i = 1 and an even choice gives 2 beta. Heads are pooled by key id, as in that code; the
    paper leaves the head's index out.

    query [T, 2, H, Q, Kd]; keys [H, 2, R, n, Kd], already normalised; axis_indices [T, H, 2, m];
    u, t [H, R] (ones in additive mode). 0 for T = 0. Raises ValueError on an unknown normalize.
    """
    probabilities, frequencies, _ = _balance(query, keys, axis_indices, u, t, normalize)
    num_tokens, _, _, num_keys = probabilities.shape
    if num_tokens == 0:
        return 0.0
    mean_probabilities = probabilities.mean(axis=(0, 1))  # p [2, n]
    return float(beta * num_keys * (frequencies * mean_probabilities).sum())


@non_finite_ok
def key_balance_loss_bwd(
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    axis_indices: npt.ArrayLike,
    u: npt.ArrayLike,
    t: npt.ArrayLike,
    *,
    beta: float,
    normalize: Normalize = "paper",
    grad_out: float = 1.0,
) -> tuple[FloatArray, FloatArray]:
    """(grad_query, grad_keys) of key_balance_loss times grad_out.

    With the logits z = sum_r w_r S[r, :] and dL/dP[tau, h, i] = beta n f_i / (T H), softmax gives

        dz[tau, h, i] = beta n / (T H) * P[tau, h, i] * (f_i - sum_j f_j P[tau, h, j])

    then dS[r, i] = w_r dz_i, dq_r = sum_i dS[r, i] K[r, i] and dK[r, i] = sum_tau dS[r, i] q_r.
    Unlike the scores' own gradient this one is dense: every key receives some.
    """
    query, keys = f64(query), f64(keys)
    probabilities, frequencies, axis_filter = _balance(query, keys, axis_indices, u, t, normalize)
    num_tokens, num_heads, _, num_keys = probabilities.shape
    if num_tokens == 0:
        return np.zeros_like(query), np.zeros_like(keys)
    scale = grad_out * beta * num_keys / (num_tokens * num_heads)
    centred = frequencies - (frequencies * probabilities).sum(axis=-1, keepdims=True)
    grad_logits = scale * probabilities * centred  # [T, H, 2, n]
    grad_axis = axis_filter[..., None] * grad_logits[:, :, :, None, :]  # dS [T, H, 2, R, n]

    grad_query = np.einsum("thsrn,hsrnk->tshrk", grad_axis, keys, optimize=True)
    per_rank_query = np.broadcast_to(query, grad_query.shape)
    grad_keys = np.einsum("thsrn,tshrk->hsrnk", grad_axis, per_rank_query, optimize=True)
    if query.shape[3] == 1:
        grad_query = grad_query.sum(axis=3, keepdims=True)
    return grad_query, grad_keys


def _balance(
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    axis_indices: npt.ArrayLike,
    u: npt.ArrayLike,
    t: npt.ArrayLike,
    normalize: Normalize,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(P [T, H, 2, n], f [2, n], filter [H, 2, R])."""
    if normalize not in ("paper", "release"):
        raise ValueError(f"normalize must be 'paper' or 'release', got {normalize!r}")
    axis_filter = np.stack([f64(u), f64(t)], axis=1)
    logits = (axis_filter[..., None] * axis_scores(f64(query), f64(keys))).sum(axis=3)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)

    kept = i64(axis_indices, "axis_indices")
    num_keys = probabilities.shape[-1]
    counts = np.stack(
        [np.bincount(kept[:, :, side].ravel(), minlength=num_keys) for side in range(2)]
    )
    num_tokens, num_heads, _, axis_topk = kept.shape
    total = num_tokens if normalize == "paper" else num_tokens * num_heads * axis_topk
    return probabilities, counts / max(total, 1), axis_filter
