"""Product-key retrieval: two sets of n keys address n * n slots.

PKM (arXiv 1907.05242) scores slot (i, j) with the sum of a row and a column score, which UltraMemV2
(arXiv 2508.18756) restates as

    s_row = TopM(K_row q_row(x)),  s_col = TopM(K_col q_col(x))          (equation 3)
    S_grid = TopM(s_row + s_col^T)                                       (equation 4)

and UltraMem (arXiv 2411.12364) with a Tucker core over R scores a side, in UltraMemV2's equations

    S_row = K_row q_row(x),  S_col = K_col q_col(x)                      (equations 6 and 10)
    S_grid = TopM(S_row^T C S_col)                                       (equations 7 and 11)

With C_1 .. C_C cores (multi-core scoring) a slot has a score per core, g_c = S_row^T C_c S_col, and
is ranked by their sum, that is by the core Cbar = sum_c C_c. The axes are cut to m keys each by u .
S_row and t . S_col with Cbar's leading singular vectors (equation 16), before the grid is built.
Raw scores: no softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from ._arrays import FloatArray, IntArray, f64, i64, non_finite_ok, scatter_add_rows
from .rms_norm import rms_norm, rms_norm_bwd
from .tucker import tucker_filter

Mode = Literal["tucker", "additive"]

DEFAULT_AXIS_TOPK = 128


@dataclass(frozen=True)
class ProductKeyResult:
    """What product_key_topk selected, and the ranks it selected by.

    T tokens, H heads, R ranks, C cores, n keys a side, m kept an axis, M kept in the end. Sides are
    0 = row, 1 = column. Kept entries are in order of rank, best first.
    """

    scores: FloatArray  # [T, H, M, C] g_c of every kept slot
    indices: IntArray  # [T, H, M] row * n + column
    ranks: FloatArray  # [T, H, M] what the kept slots were ordered by
    grid_positions: IntArray  # [T, H, M] i * m + j, positions within the kept rows and columns
    grid_ranks: FloatArray  # [T, H, m, m] rank of every candidate
    axis_indices: IntArray  # [T, H, 2, m] kept keys
    axis_scores: FloatArray  # [T, H, 2, R, m] their scores
    axis_ranks: FloatArray  # [T, H, 2, m] what the kept keys were ordered by
    all_axis_scores: FloatArray  # [T, H, 2, R, n] scores of every key
    all_axis_ranks: FloatArray  # [T, H, 2, n] ranks of every key
    axis_filter: FloatArray  # [H, 2, R] u and t; ones in additive mode
    core_sum: FloatArray | None  # [H, R, R] Cbar; None in additive mode

    @property
    def num_keys(self) -> int:
        """n, keys a side."""
        return self.all_axis_ranks.shape[-1]

    @non_finite_ok
    def ranks_at(self, indices: npt.ArrayLike) -> FloatArray:
        """Grid ranks, not rounded, of any slots, kept or not: indices [T, H, K] -> [T, H, K]."""
        return grid_ranks_at(self.all_axis_scores, self.core_sum, i64(indices, "indices"))


@non_finite_ok
def product_key_topk(
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    core: npt.ArrayLike | None,
    *,
    topk: int,
    axis_topk: int | None = None,
    u: npt.ArrayLike | None = None,
    t: npt.ArrayLike | None = None,
    key_norm_weight: npt.ArrayLike | None = None,
    eps: float = 1e-6,
    mode: Mode = "tucker",
    rank_dtype: npt.DTypeLike = np.float64,
) -> ProductKeyResult:
    """Score all keys, keep axis_topk a side, keep topk slots of the grid.

    query [T, 2, H, Q, Kd], Q = 1 or R; keys [H, 2, R, n, Kd]; core [C, H, R, R], or None in
    additive mode where R = 1; u, t [H, R] default to tucker_filter(core). axis_topk defaults to
    min(n, topk, 128). key_norm_weight [Kd] RMS-normalises the keys first, without rounding them:
    compare a backend that keeps normalised keys in a narrower type by handing its rounded keys
    over, and no key_norm_weight.

    The order is total. An axis is ordered by u . S_row (t . S_col), ties to the lower key; the grid
    by S_row^T Cbar S_col, ties to the lower row * n + column. Ranks descend, -0 equals +0, and NaN
    comes below -inf. Ranks are rounded to rank_dtype before they are compared.

    Raises ValueError where shapes, axis_topk or topk do not fit: 1 <= axis_topk <= n,
    1 <= topk <= axis_topk^2 and, in additive mode, axis_topk >= min(topk, n), because the best topk
    sums may all lie in one row.
    """
    query, keys, core = _checked(query, keys, core, mode)
    keys = keys if key_norm_weight is None else rms_norm(keys, key_norm_weight, eps)
    num_keys = keys.shape[3]
    axis_topk = min(num_keys, topk, DEFAULT_AXIS_TOPK) if axis_topk is None else axis_topk
    _check_topk(topk, axis_topk, num_keys, mode)

    all_axis_scores = axis_scores(query, keys)
    axis_filter = _axis_filter(core, u, t, keys.shape[0], keys.shape[2])
    all_axis_ranks = (axis_filter[..., None] * all_axis_scores).sum(axis=3)
    all_axis_ranks = _rounded(all_axis_ranks, rank_dtype)
    # A stable sort of the negated ranks is the whole order: numpy puts NaN last and holds -0 equal
    # to +0.
    axis_indices = np.argsort(-all_axis_ranks, axis=-1, kind="stable")[..., :axis_topk]
    kept_axis_scores = np.take_along_axis(all_axis_scores, axis_indices[:, :, :, None, :], axis=-1)

    core_sum = None if core is None else core.sum(axis=0)
    grid_ranks = _rounded(
        _grid_rank(
            kept_axis_scores[:, :, 0, :, :, None], kept_axis_scores[:, :, 1, :, None, :], core_sum
        ),
        rank_dtype,
    )
    grid_indices = axis_indices[:, :, 0, :, None] * num_keys + axis_indices[:, :, 1, None, :]
    candidates = (*grid_ranks.shape[:2], axis_topk * axis_topk)
    flat_ranks, flat_indices = grid_ranks.reshape(candidates), grid_indices.reshape(candidates)
    grid_positions = _best_positions(flat_ranks, flat_indices, topk)
    indices = np.take_along_axis(flat_indices, grid_positions, axis=-1)

    return ProductKeyResult(
        scores=_slot_scores(*_gather_pair(all_axis_scores, indices), core),
        indices=indices,
        ranks=np.take_along_axis(flat_ranks, grid_positions, axis=-1),
        grid_positions=grid_positions,
        grid_ranks=grid_ranks,
        axis_indices=axis_indices,
        axis_scores=kept_axis_scores,
        axis_ranks=np.take_along_axis(all_axis_ranks, axis_indices, axis=-1),
        all_axis_scores=all_axis_scores,
        all_axis_ranks=all_axis_ranks,
        axis_filter=axis_filter,
        core_sum=core_sum,
    )


@non_finite_ok
def product_key_scores_at(
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    core: npt.ArrayLike | None,
    indices: npt.ArrayLike,
    mode: Mode = "tucker",
    *,
    key_norm_weight: npt.ArrayLike | None = None,
    eps: float = 1e-6,
) -> FloatArray:
    """Scores of given slots, whoever selected them: indices [T, H, K] -> [T, H, K, C].

    The differentiable part of product_key_topk, and what its backward is the derivative of. The
    other arguments are product_key_topk's. Raises ValueError on wrong shapes, IndexError on an
    index outside [0, n * n).
    """
    query, keys, core = _checked(query, keys, core, mode)
    keys = keys if key_norm_weight is None else rms_norm(keys, key_norm_weight, eps)
    indices = _checked_indices(indices, keys.shape[3])
    return _slot_scores(*_gather_pair(axis_scores(query, keys), indices), core)


@overload
def product_key_topk_bwd(
    grad_scores: npt.ArrayLike,
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    core: npt.ArrayLike | None,
    selection: ProductKeyResult | npt.ArrayLike,
    *,
    key_norm_weight: None = None,
    eps: float = 1e-6,
    mode: Mode = "tucker",
) -> tuple[FloatArray, FloatArray, FloatArray | None]: ...


@overload
def product_key_topk_bwd(
    grad_scores: npt.ArrayLike,
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    core: npt.ArrayLike | None,
    selection: ProductKeyResult | npt.ArrayLike,
    *,
    key_norm_weight: npt.ArrayLike,
    eps: float = 1e-6,
    mode: Mode = "tucker",
) -> tuple[FloatArray, FloatArray, FloatArray | None, FloatArray]: ...


@non_finite_ok
def product_key_topk_bwd(
    grad_scores: npt.ArrayLike,
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    core: npt.ArrayLike | None,
    selection: ProductKeyResult | npt.ArrayLike,
    *,
    key_norm_weight: npt.ArrayLike | None = None,
    eps: float = 1e-6,
    mode: Mode = "tucker",
) -> (
    tuple[FloatArray, FloatArray, FloatArray | None]
    | tuple[FloatArray, FloatArray, FloatArray | None, FloatArray]
):
    """Gradients at a fixed selection: (grad_query, grad_keys, grad_core), each like its input.

    grad_scores [T, H, M, C]; selection is a ProductKeyResult, or indices [T, H, M] of any backend.
    With key_norm_weight, keys are the raw ones, grad_keys is theirs, and the norm gain's gradient
    [Kd] comes fourth. grad_core is None in additive mode. Selecting has no gradient (equation 7's
    TopM passes the kept scores through). For each kept slot (i, j) with incoming dg_c:

        dS_row[:, i] += sum_c dg_c C_c   S_col[:, j]
        dS_col[:, j] += sum_c dg_c C_c^T S_row[:, i]
        dC_c         += dg_c S_row[:, i] S_col[:, j]^T

    (additive: dS_row[i] += dg, dS_col[j] += dg), and on either side

        dq_r = sum_i dS[r, i] K[r, i],     dK[r, i] += dS[r, i] q_r

    where a query that the ranks share sums dq_r over r.
    """
    query, raw_keys, core = _checked(query, keys, core, mode)
    keys = raw_keys if key_norm_weight is None else rms_norm(raw_keys, key_norm_weight, eps)
    indices = selection.indices if isinstance(selection, ProductKeyResult) else selection
    indices = _checked_indices(indices, keys.shape[3])
    grad_scores = f64(grad_scores)

    grad_core: FloatArray | None = None
    if core is None:
        grad_row = grad_col = grad_scores  # [T, H, M, R = C = 1]
    else:
        row, col = _gather_pair(axis_scores(query, keys), indices)
        weighted_core = np.einsum("thmc,chrs->thmrs", grad_scores, core)
        grad_row = np.einsum("thmrs,thsm->thmr", weighted_core, col)
        grad_col = np.einsum("thmrs,thrm->thms", weighted_core, row)
        grad_core = np.einsum("thmc,thrm,thsm->chrs", grad_scores, row, col)

    rows, cols = np.divmod(indices, keys.shape[3])
    grad_query, grad_keys = np.zeros_like(query), np.zeros_like(keys)
    for side, (kept, grad_axis) in enumerate(((rows, grad_row), (cols, grad_col))):
        grad_query[:, side], grad_keys[:, side] = _axis_bwd(
            grad_axis, kept, query[:, side], keys[:, side]
        )
    if key_norm_weight is None:
        return grad_query, grad_keys, grad_core
    grad_keys, grad_norm_weight = rms_norm_bwd(grad_keys, raw_keys, key_norm_weight, eps)
    return grad_query, grad_keys, grad_core, grad_norm_weight


def grid_ranks_at(
    all_axis_scores: FloatArray, core_sum: FloatArray | None, indices: IntArray
) -> FloatArray:
    """Ranks of slots [T, H, K] from all_axis_scores [T, H, 2, R, n] and core_sum [H, R, R]."""
    return _grid_rank(*_gather_pair(all_axis_scores, indices), core_sum)


def axis_scores(query: FloatArray, keys: FloatArray) -> FloatArray:
    """S[side, r, i] = q_{side, r} . k_{side, r, i} (equation 10) -> [T, H, 2, R, n]."""
    num_tokens, _, num_heads, _, key_dim = query.shape
    query = np.broadcast_to(query, (num_tokens, 2, num_heads, keys.shape[2], key_dim))
    # Plain einsum sums every product in the same order, which BLAS does not: equal keys get equal
    # scores and ties stay ties.
    return np.einsum("tshrk,hsrnk->thsrn", query, keys)


def _axis_bwd(
    grad_axis: FloatArray, kept: IntArray, query: FloatArray, keys: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """One side's (grad_query [T, H, Q, Kd], grad_keys [H, R, n, Kd]) from dS at the kept keys.

    grad_axis [T, H, M, R], kept [T, H, M], query [T, H, Q, Kd], keys [H, R, n, Kd]. Kept keys are
    gathered rather than dS laid out over all n, so that a key which nobody kept has no part in it,
    NaN or not.
    """
    num_tokens, (num_heads, rank, num_keys, _) = len(query), keys.shape
    grad_query, grad_keys = np.zeros_like(query), np.zeros_like(keys)
    for head in range(num_heads):
        # What a token kept, once, however many of its slots share the key.
        kept_pairs = np.arange(num_tokens)[:, None] * num_keys + kept[:, head]
        pairs, slot_pair = np.unique(kept_pairs.ravel(), return_inverse=True)
        tokens, ids = np.divmod(pairs, num_keys)
        for r in range(rank):
            shared = r if query.shape[2] > 1 else 0
            grad_slots = grad_axis[:, head, :, r].ravel()
            # dS[r, i] of a pair.
            grad = np.bincount(slot_pair, grad_slots, minlength=pairs.size)[:, None]
            grad_query[:, head, shared] += scatter_add_rows(
                num_tokens, tokens, grad * keys[head, r, ids]
            )
            grad_keys[head, r] = scatter_add_rows(num_keys, ids, grad * query[tokens, head, shared])
    return grad_query, grad_keys


def _gather_pair(all_axis_scores: FloatArray, indices: IntArray) -> tuple[FloatArray, FloatArray]:
    """Row and column scores [T, H, R, K] of the slots indices [T, H, K]."""
    rows, cols = np.divmod(indices, all_axis_scores.shape[-1])
    row = np.take_along_axis(all_axis_scores[:, :, 0], rows[:, :, None, :], axis=-1)
    col = np.take_along_axis(all_axis_scores[:, :, 1], cols[:, :, None, :], axis=-1)
    return row, col


def _grid_rank(row: FloatArray, col: FloatArray, core_sum: FloatArray | None) -> FloatArray:
    """row^T Cbar col over axis 2, or row + col without a core; both [T, H, R, ...], broadcast.

    Sums over the few ranks are element by element, so that equal operands give equal ranks.
    """
    if core_sum is None:
        return (row + col)[:, :, 0]
    core_sum = core_sum.reshape(*core_sum.shape, *(1,) * (row.ndim - 3))
    folded = (row[:, :, :, None] * core_sum).sum(axis=2)  # row^T Cbar, [T, H, R, ...]
    return (folded * col).sum(axis=2)


def _best_positions(ranks: FloatArray, indices: IntArray, topk: int) -> IntArray:
    """Positions [T, H, M] of the best of [T, H, K], by rank, then by index."""
    negated = -ranks
    # Only what the last one kept does not outrank is put in order: partition, like sort, puts NaN
    # last.
    last = np.partition(negated, topk - 1, axis=-1)[..., topk - 1, None]
    near = int((~(negated > last)).sum(axis=-1).max(initial=topk))
    positions = np.argpartition(negated, near - 1, axis=-1)[..., :near]
    # lexsort's last key is its first.
    by = (indices, negated)
    order = np.lexsort([np.take_along_axis(x, positions, axis=-1) for x in by], axis=-1)
    return np.take_along_axis(positions, order[..., :topk], axis=-1)


def _slot_scores(row: FloatArray, col: FloatArray, core: FloatArray | None) -> FloatArray:
    """g_c = S_row^T C_c S_col, or the sum without a core: row, col [T, H, R, K] -> [T, H, K, C]."""
    if core is None:
        return (row + col).transpose(0, 1, 3, 2)
    return np.einsum("thrk,chrs,thsk->thkc", row, core, col)


def _axis_filter(
    core: FloatArray | None,
    u: npt.ArrayLike | None,
    t: npt.ArrayLike | None,
    num_heads: int,
    rank: int,
) -> FloatArray:
    """u and t as [H, 2, R], what all axis scores are weighted with; ones in additive mode."""
    if core is None:
        if u is not None or t is not None:
            raise ValueError("product_key_topk: additive mode has no filter, u and t must be None")
        return np.ones((num_heads, 2, 1))
    if (u is None) != (t is None):
        raise ValueError("product_key_topk: u and t must be given together")
    if u is None or t is None:
        u, t, _ = tucker_filter(core)
    u, t = f64(u), f64(t)
    if u.shape != (num_heads, rank) or t.shape != (num_heads, rank):
        raise ValueError(
            f"product_key_topk: u {u.shape} and t {t.shape} must be {(num_heads, rank)}"
        )
    return np.stack([u, t], axis=1)


def _rounded(ranks: FloatArray, rank_dtype: npt.DTypeLike) -> FloatArray:
    return ranks.astype(rank_dtype).astype(np.float64)


def _checked(
    query: npt.ArrayLike, keys: npt.ArrayLike, core: npt.ArrayLike | None, mode: Mode
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    query, keys = f64(query), f64(keys)
    if query.ndim != 5 or keys.ndim != 5 or query.shape[1] != 2 or keys.shape[1] != 2:
        raise ValueError(
            f"query {query.shape} must be [T, 2, H, Q, Kd], keys {keys.shape} [H, 2, R, n, Kd]"
        )
    num_heads, _, rank, _, key_dim = keys.shape
    if query.shape[2] != num_heads or query.shape[4] != key_dim or query.shape[3] not in (1, rank):
        raise ValueError(f"query {query.shape} does not fit keys {keys.shape}")
    if mode == "additive":
        if core is not None or rank != 1:
            raise ValueError("additive mode has no core and rank 1")
        return query, keys, None
    if mode != "tucker":
        raise ValueError(f"mode must be 'tucker' or 'additive', got {mode!r}")
    if core is None:
        raise ValueError("tucker mode needs a core")
    core = f64(core)
    if core.ndim != 4 or core.shape[1:] != (num_heads, rank, rank):
        raise ValueError(f"core {core.shape} must be [C, {num_heads}, {rank}, {rank}]")
    return query, keys, core


def _check_topk(topk: int, axis_topk: int, num_keys: int, mode: Mode) -> None:
    if not 1 <= axis_topk <= num_keys:
        raise ValueError(f"axis_topk must lie in [1, {num_keys}], got {axis_topk}")
    if not 1 <= topk <= axis_topk * axis_topk:
        raise ValueError(f"topk must lie in [1, axis_topk^2 = {axis_topk**2}], got {topk}")
    if mode == "additive" and axis_topk < min(topk, num_keys):
        raise ValueError(
            f"additive mode needs axis_topk >= min(topk, n) = {min(topk, num_keys)}, "
            f"got {axis_topk}"
        )


def _checked_indices(indices: npt.ArrayLike, num_keys: int) -> IntArray:
    indices = i64(indices, "indices")
    if indices.size and (indices.min() < 0 or indices.max() >= num_keys * num_keys):
        raise IndexError(f"indices must lie in [0, {num_keys * num_keys})")
    return indices
