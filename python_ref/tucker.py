"""The two ends of Tucker-decomposed query-key retrieval: the query, and the rank-1 filter.

UltraMem (arXiv 2411.12364) introduced the retrieval, UltraMemV2 (arXiv 2508.18756) restates it as

    S_row = K_row q_row(x),  S_col = K_col q_col(x)          (equation 6)
    S_grid = TopM(S_row^T C S_col)                           (equation 7)

and gives every Tucker rank a query of its own (section 3.2). The axes are filtered by the leading
singular vectors of the core, C = U Lambda T^T (equation 16).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ._arrays import FloatArray, f64, non_finite_ok
from .rms_norm import rms_norm, rms_norm_bwd

# Two leading singular values closer than this part of the first leave their vectors undetermined.
EQUAL_SINGULAR_VALUES = 1e-9
# A sum of singular vector components, or a component, below this is zero but for the arithmetic.
ZERO_COMPONENT = 1e-9


@non_finite_ok
def tucker_query(
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    norm_weight: npt.ArrayLike,
    num_heads: int = 1,
    eps: float = 1e-6,
) -> FloatArray:
    """query = RMSNorm(x weight^T), normalised over each (side, head, rank) segment.

    x [T, D]; weight [2 * H * Q * Kd, D], rows ordered (side, head, rank, Kd); norm_weight [Kd];
    returns float64 [T, 2, H, Q, Kd]. Q = 1 where the ranks share a query, R where they do not.
    Raises ValueError where the shapes do not fit.
    """
    return rms_norm(_project(f64(x), f64(weight), f64(norm_weight), num_heads), norm_weight, eps)


@non_finite_ok
def tucker_query_bwd(
    grad_query: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    norm_weight: npt.ArrayLike,
    num_heads: int = 1,
    eps: float = 1e-6,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Gradients of tucker_query: (grad_x [T, D], grad_weight like weight, grad_norm_weight [Kd]).

    The norm's backward gives the gradient dp of the projection p = x weight^T; then
    grad_x = dp weight and grad_weight = dp^T x.
    """
    x, weight, norm_weight = f64(x), f64(weight), f64(norm_weight)
    projection = _project(x, weight, norm_weight, num_heads)
    grad_projection, grad_norm_weight = rms_norm_bwd(grad_query, projection, norm_weight, eps)
    grad_projection = grad_projection.reshape(x.shape[0], weight.shape[0])
    return grad_projection @ weight, grad_projection.T @ x, grad_norm_weight


def _project(
    x: FloatArray, weight: FloatArray, norm_weight: FloatArray, num_heads: int
) -> FloatArray:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"tucker_query: x {x.shape} and weight {weight.shape} must share D")
    key_dim = norm_weight.size
    num_queries, rest = divmod(weight.shape[0], 2 * num_heads * key_dim)
    if rest or num_queries == 0:
        raise ValueError(
            f"tucker_query: weight has {weight.shape[0]} rows, which is no multiple of "
            f"2 * num_heads * key_dim = {2 * num_heads * key_dim}"
        )
    return (x @ weight.T).reshape(x.shape[0], 2, num_heads, num_queries, key_dim)


@non_finite_ok
def tucker_filter(core: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Leading singular vectors and all singular values of the summed core, head by head.

    core [C, H, R, R] -> u [H, R], t [H, R], sigma [H, R] descending, of Cbar = sum_c core_c
    (equation 16, with UltraMem's multi-core scoring ranking by the sum of the cores).

    Signs are canonical: sum(u) >= 0, and t's sign follows u's, so that u sigma_1 t^T stays the best
    rank-1 approximation. Where the sum is zero (below 1e-9), u's first component that is not zero
    is positive. For R = 1 this leaves u = 1 and t = sign(Cbar). Where Cbar is zero, or its first
    two singular values are equal to within 1e-9 of the first, the vectors are not determined: u = t
    = e_1. A head whose Cbar is not finite gets u = t = e_1 and sigma = NaN.

    u and t only filter: no gradient flows through them. Raises ValueError on a wrong shape.
    """
    left, sigma, right = _singular_triplets(core)
    u, t = left[:, :, 0], right[:, 0, :]

    sum_u = u.sum(axis=-1)
    first_nonzero = np.argmax(np.abs(u) > ZERO_COMPONENT, axis=-1)[:, None]
    leading_component = np.take_along_axis(u, first_nonzero, axis=-1)[:, 0]
    orientation = np.where(np.abs(sum_u) > ZERO_COMPONENT, sum_u, leading_component)
    sign = np.where(orientation < 0, -1.0, 1.0)[:, None]

    undetermined = ~(sigma[:, 0] > 0)  # zero or NaN
    if sigma.shape[1] > 1:
        undetermined |= sigma[:, 0] - sigma[:, 1] <= EQUAL_SINGULAR_VALUES * sigma[:, 0]
    e_1 = np.eye(sigma.shape[1])[0]
    u = np.where(undetermined[:, None], e_1, sign * u)
    t = np.where(undetermined[:, None], e_1, sign * t)
    return u, t, sigma


@non_finite_ok
def tucker_filter_bwd(grad_sigma: npt.ArrayLike, core: npt.ArrayLike) -> FloatArray:
    """grad_core [C, H, R, R] from grad_sigma [H, R].

    d sigma_i / d Cbar = u_i t_i^T (the sign of a pair cancels), and each core enters Cbar once:

        grad_core_c = sum_i grad_sigma_i u_i t_i^T          for every c

    Where singular values coincide, their pairs are any basis of the shared space, and the result is
    one element of the subdifferential.
    """
    core = f64(core)
    left, sigma, right = _singular_triplets(core)
    grad_sum = (left * f64(grad_sigma)[:, None, :]) @ right
    grad_sum[np.isnan(sigma[:, 0])] = np.nan
    return np.broadcast_to(grad_sum, core.shape).copy()


def _singular_triplets(core: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(left [H, R, R] with u_i in column i, sigma [H, R], right [H, R, R] with t_i in row i)."""
    core = f64(core)
    if core.ndim != 4 or core.shape[2] != core.shape[3] or 0 in core.shape:
        raise ValueError(f"core must be [C, H, R, R], got {core.shape}")
    core_sum = core.sum(axis=0)
    finite = np.isfinite(core_sum).all(axis=(1, 2))
    left, sigma, right = np.linalg.svd(np.where(finite[:, None, None], core_sum, 0.0))
    sigma = np.where(finite[:, None], sigma, np.nan)
    return left, sigma, right
