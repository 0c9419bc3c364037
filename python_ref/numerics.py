"""How implementations are judged: error measures, finite differences, a band for discrete outputs.

Selecting the top m of n is discontinuous: two right implementations that differ in the last bits of
a score may keep different slots, but only slots whose rank lies within the arithmetic's error of a
threshold. The band functions bound that error a priori, and compare_kept_sets accepts every
selection that ranks within the band could give, and no slot that none of them could.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ._arrays import FloatArray, IntArray, f64, i64, non_finite_ok
from .product_key import ProductKeyResult, axis_scores, grid_ranks_at

FLOAT32_UNIT = float(np.finfo(np.float32).eps)


def relative_l2(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """||actual - expected|| / ||expected||; 0 where both are zero, inf where only expected is."""
    actual, expected = f64(actual), f64(expected)
    _same_shape(actual, expected)
    error = float(np.linalg.norm((actual - expected).ravel()))
    size = float(np.linalg.norm(expected.ravel()))
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / size


def cosine(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Cosine of the angle between the two vectors; 1 where both are zero, 0 where only one is."""
    actual, expected = f64(actual), f64(expected)
    _same_shape(actual, expected)
    sizes = float(np.linalg.norm(actual.ravel())), float(np.linalg.norm(expected.ravel()))
    if 0.0 in sizes:
        return 1.0 if sizes == (0.0, 0.0) else 0.0
    return float((actual.ravel() / sizes[0]) @ (expected.ravel() / sizes[1]))


def signed_bias(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """sum(|actual| - |expected|) / sum |expected|: what a systematic shrinking or growing leaves.

    0 where both are zero, inf where only expected is.
    """
    actual, expected = f64(actual), f64(expected)
    _same_shape(actual, expected)
    difference = float((np.abs(actual) - np.abs(expected)).sum())
    size = float(np.abs(expected).sum())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def missing_rows(actual: npt.ArrayLike, expected: npt.ArrayLike) -> IntArray:
    """Rows [K] that are all zero in exactly one of the two: lost, or written by mistake."""
    actual, expected = f64(actual), f64(expected)
    _same_shape(actual, expected)
    trailing = tuple(range(1, actual.ndim))
    return np.flatnonzero((actual != 0).any(axis=trailing) != (expected != 0).any(axis=trailing))


def directional_derivative(
    function: Callable[..., npt.ArrayLike],
    arguments: Sequence[npt.ArrayLike],
    directions: Sequence[npt.ArrayLike],
    step: float = 1e-3,
) -> FloatArray:
    """d/dh function(*(arguments + h directions)) at h = 0, by central differences of fourth order:

        (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / (12 h)

    Its error is h^4 times the fifth derivative, and the rounding error of f over h. The function
    must be smooth within 2 h: for a selection, hold the indices fixed.
    """
    points = [f64(argument) for argument in arguments]
    lines = [f64(direction) for direction in directions]

    def along(h: float) -> FloatArray:
        return f64(function(*(x + h * d for x, d in zip(points, lines, strict=True))))

    near = along(step) - along(-step)
    far = along(2.0 * step) - along(-2.0 * step)
    derivative: FloatArray = (8.0 * near - far) / (12.0 * step)
    return derivative


@non_finite_ok
def axis_band(
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    axis_filter: npt.ArrayLike,
    *,
    unit: float = FLOAT32_UNIT,
) -> FloatArray:
    """How far two axis ranks must lie apart to be ordered for certain: [T, H, 2].

    A sum of k rounded products, in any order, is off by at most gamma_k = k u / (1 - k u) times the
    sum of the products' magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section
    3.1). An axis rank sum_r u_r (q_r . k_r) is Kd products deep, R more for the filter, and one for
    the rounding of u itself:

        |error| <= gamma_{Kd + R + 1} * max_i sum_r |u_r| sum_d |q_{r,d}| |k_{r,i,d}|

    and each of the two ranks may be off by that, hence twice. unit is the machine epsilon of the
    accumulation type: the whole spacing, since tensor cores truncate. query [T, 2, H, Q, Kd] and
    keys [H, 2, R, n, Kd] are what is scored, keys normalised; axis_filter [H, 2, R] is the
    ProductKeyResult's. Keys whose score is not finite are left out.
    """
    query, keys = f64(query), f64(keys)
    weights = np.abs(f64(axis_filter))
    magnitudes = axis_scores(np.abs(query), np.abs(keys))
    largest = _largest_finite((weights[..., None] * magnitudes).sum(axis=3))
    num_terms = keys.shape[4] + keys.shape[2] + 1
    return 2.0 * _gamma(num_terms, unit) * largest


@non_finite_ok
def grid_band(
    query: npt.ArrayLike,
    keys: npt.ArrayLike,
    core: npt.ArrayLike | None,
    *,
    unit: float = FLOAT32_UNIT,
) -> FloatArray:
    """How far two grid ranks must lie apart to be ordered for certain: [T, H].

    As axis_band, with core [C, H, R, R], or None in additive mode: row^T Cbar col is Kd deep on
    either side, C for the sum of cores, R for either contraction and three for its products,

        |error| <= gamma_{2 Kd + C + 2 R + 3} * sum_{r,s} a_row[r] (sum_c |C_c|)[r, s] a_col[s],
        a_side[r] = max_i sum_d |q_{r,d}| |k_{r,i,d}|

    (additive: gamma_{Kd + 1} * (a_row + a_col)), and twice that for two ranks.
    """
    query, keys = f64(query), f64(keys)
    largest = _largest_finite(axis_scores(np.abs(query), np.abs(keys)))  # [T, H, 2, R]
    row, col = largest[:, :, 0], largest[:, :, 1]
    rank, key_dim = keys.shape[2], keys.shape[4]
    if core is None:
        return 2.0 * _gamma(key_dim + 1, unit) * (row + col)[..., 0]
    core = f64(core)
    magnitude = np.einsum("thr,hrs,ths->th", row, np.abs(core).sum(axis=0), col)
    return 2.0 * _gamma(2 * key_dim + core.shape[0] + 2 * rank + 3, unit) * magnitude


@dataclass(frozen=True)
class KeptSetComparison:
    """Of the `kept` slots in all, the reference did not keep `band_used`, which the band excuses.

    violations say, in words, where the two differ by more than the band allows.
    """

    kept: int
    band_used: int
    violations: tuple[str, ...]


@non_finite_ok
def compare_kept_sets(
    reference: ProductKeyResult,
    indices: npt.ArrayLike,
    *,
    axis_band: npt.ArrayLike,
    grid_band: npt.ArrayLike,
) -> KeptSetComparison:
    """Hold the slots that another implementation kept, indices [T, H, M], against the reference.

    axis_band [T, H, 2] and grid_band [T, H], or anything that broadcasts to them, are absolute. A
    token's and head's slots are right if they are distinct, in order of rank (to within grid_band),
    and either the same set as the reference's or different for these reasons alone:

    1. A row or column may be kept if its rank is not below the m-th by more than axis_band, and
       must be if it is above the m-th by more than that. At most m of each are kept.
    2. A slot whose row and column are kept, because they must be or because other kept slots have
       them, may be missing only if its rank exceeds no kept slot's by more than grid_band.

    This admits slots that move only because a row near the threshold did: a row that enters brings
    its slots, and they push out others. band_used counts the slots which the reference did not
    keep.
    """
    indices = i64(indices, "indices")
    if indices.shape != reference.indices.shape:
        raise ValueError(f"indices must be {reference.indices.shape}, got {indices.shape}")
    num_tokens, num_heads, topk = indices.shape
    axis_bands = np.broadcast_to(f64(axis_band), (num_tokens, num_heads, 2))
    grid_bands = np.broadcast_to(f64(grid_band), (num_tokens, num_heads))
    in_range = (indices >= 0) & (indices < reference.num_keys**2)
    ranks = _nan_lowest(reference.ranks_at(np.where(in_range, indices, 0)))
    # A later slot outranks an earlier one by more than the band.
    running_min = np.minimum.accumulate(ranks, axis=-1)
    unordered = np.any(ranks - grid_bands[..., None] > running_min, axis=-1, keepdims=True)

    band_used = 0
    violations = []
    for token, head in np.ndindex(num_tokens, num_heads):
        where = (token, head)
        kept = set(indices[where].tolist())
        extra = kept - set(reference.indices[where].tolist())
        reason = None
        if not in_range[where].all():
            reason = "an index is out of range"
        elif len(kept) != topk:
            reason = "a slot is kept twice"
        elif unordered[where].any():
            reason = "slots are not in order of rank"
        elif extra:
            reason = _unexplained(
                reference,
                where,
                kept,
                float(ranks[where].min()),
                axis_bands[where],
                float(grid_bands[where]),
            )
        if reason is None:
            band_used += len(extra)
        else:
            violations.append(f"token {token}, head {head}: {reason}")
    return KeptSetComparison(indices.size, band_used, tuple(violations))


def _unexplained(
    reference: ProductKeyResult,
    where: tuple[int, int],
    kept: set[int],
    lowest_rank: float,
    axis_bands: FloatArray,
    grid_band: float,
) -> str | None:
    """Why a kept set that is not the reference's is wrong, or None where the bands explain it."""
    num_keys = reference.num_keys
    axis_topk = reference.axis_indices.shape[-1]
    kept_keys = [{index // num_keys for index in kept}, {index % num_keys for index in kept}]
    for side, name in enumerate(("row", "column")):
        ranks = _nan_lowest(reference.all_axis_ranks[where][side])
        threshold = _nan_lowest(reference.axis_ranks[where][side])[-1]
        for key in sorted(kept_keys[side]):
            if not ranks[key] >= threshold - axis_bands[side]:
                return f"{name} {key} is below the axis threshold by {threshold - ranks[key]:.3g}"
        everything = axis_topk == num_keys
        certain = ranks >= threshold if everything else ranks > threshold + axis_bands[side]
        kept_keys[side] |= set(np.flatnonzero(certain).tolist())
        if len(kept_keys[side]) > axis_topk:
            return f"{len(kept_keys[side])} {name}s must have been kept, axis_topk is {axis_topk}"

    rivals = {row * num_keys + col for row, col in itertools.product(*kept_keys)} - kept
    token, head = where
    core_sum = None if reference.core_sum is None else reference.core_sum[head : head + 1]
    ranks = grid_ranks_at(
        reference.all_axis_scores[token : token + 1, head : head + 1],
        core_sum,
        np.array(sorted(rivals), dtype=np.int64)[None, None],
    )
    excess = _nan_lowest(ranks).max(initial=-np.inf) - lowest_rank
    if excess > grid_band:
        return f"a slot is missing whose rank is {excess:.3g} above the lowest kept"
    return None


def _gamma(num_terms: int, unit: float) -> float:
    return num_terms * unit / (1.0 - num_terms * unit)


def _largest_finite(magnitudes: FloatArray) -> FloatArray:
    return np.where(np.isfinite(magnitudes), magnitudes, 0.0).max(axis=-1)


def _nan_lowest(ranks: FloatArray) -> FloatArray:
    return np.where(np.isnan(ranks), -np.inf, ranks)


def _same_shape(actual: FloatArray, expected: FloatArray) -> None:
    if actual.shape != expected.shape:
        raise ValueError(f"actual is {actual.shape}, expected is {expected.shape}")
