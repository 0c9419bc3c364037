"""Array types and two helpers shared by the reference operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# NaN and Inf are legal inputs of every operator and travel by IEEE rules, without warnings.
non_finite_ok = np.errstate(all="ignore")


def f64(x: npt.ArrayLike) -> FloatArray:
    """x as a float64 array (a view where it already is one)."""
    return np.asarray(x, dtype=np.float64)


def i64(x: npt.ArrayLike, name: str) -> IntArray:
    """x as an int64 array. Raises TypeError where x does not hold integers."""
    array: npt.NDArray[Any] = np.asarray(x)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    return array.astype(np.int64, copy=False)


def scatter_add_rows(num_rows: int, rows: IntArray, updates: FloatArray) -> FloatArray:
    """out[rows[k]] += updates[k] into zeros; rows [K], updates [K, W] -> out [num_rows, W].

    Every row is summed in order of k, whatever else is scattered, so that a row nobody updates
    stays exactly zero even where other updates are NaN.
    """
    out = np.zeros((num_rows, updates.shape[1]))
    if rows.size == 0:
        return out
    order = np.argsort(rows, kind="stable")
    touched, starts = np.unique(rows[order], return_index=True)
    out[touched] = np.add.reduceat(updates[order], starts, axis=0)
    return out
