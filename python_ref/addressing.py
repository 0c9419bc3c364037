"""From a virtual index to a row of the table: sharing windows, implicit value expansion, shuffling.

UltraMem (arXiv 2411.12364) lets E virtual copies of the table share one physical table (implicit
value expansion) and shuffles the virtual indices, which UltraMemV2 (arXiv 2508.18756) writes as

    s_hat = Shuffle(vec(S_grid))                                   (equation 8)
    o = sum_p W_p^T (V^T s_hat_p)                                  (equation 9)

where s_hat_p are the scores of the p-th virtual copy. A layer sees `window` rows of the table, from
`offset` on and around its end, so that layers can share it:

    v' = shuffle(v),  slot = (v' mod window + offset) mod num_slots,  p = group = v' div window
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ._arrays import IntArray, i64

Uint64Array = npt.NDArray[np.uint64]

UINT64_MASK = (1 << 64) - 1


class Addressing(Protocol):
    """Anything with these fields addresses a table."""

    @property
    def num_slots(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def expand(self) -> int: ...
    @property
    def shuffle(self) -> Any: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class SlotAddressing:
    """The fields of an address; what they mean is said in slots()."""

    num_slots: int
    window: int
    offset: int = 0
    expand: int = 1
    shuffle: Any = None
    seed: int = 0


def slots(
    indices: npt.ArrayLike,
    *,
    num_slots: int,
    window: int,
    offset: int = 0,
    expand: int = 1,
    shuffle: str | npt.ArrayLike | None = None,
    seed: int = 0,
) -> tuple[IntArray, IntArray]:
    """Physical row and virtual copy of virtual indices of any shape: (slot, group), int64.

    num_slots rows in the table, window of them (0 < window <= num_slots) seen from offset on;
    expand is the number E of virtual copies; shuffle is None, "feistel" (needs expand * window to
    be a square) or a permutation of [0, expand * window). Raises ValueError on arguments out of
    range, IndexError on an index outside [0, expand * window).
    """
    indices = i64(indices, "indices")
    num_virtual = expand * window
    if not 0 < window <= num_slots:
        raise ValueError(f"window must lie in (0, num_slots = {num_slots}], got {window}")
    if offset < 0 or expand < 1:
        raise ValueError(f"offset >= 0 and expand >= 1 are needed, got {offset} and {expand}")
    if indices.size and (indices.min() < 0 or indices.max() >= num_virtual):
        raise IndexError(f"indices must lie in [0, expand * window = {num_virtual})")

    if isinstance(shuffle, str):
        if shuffle != "feistel":
            raise ValueError(f"shuffle must be None, 'feistel' or a permutation, got {shuffle!r}")
        num_keys = isqrt(num_virtual)
        if num_keys * num_keys != num_virtual:
            raise ValueError(f"feistel needs expand * window to be a square, got {num_virtual}")
        indices = feistel(indices, num_keys, seed)
    elif shuffle is not None:
        permutation = i64(shuffle, "shuffle")
        if permutation.shape != (num_virtual,) or not np.array_equal(
            np.sort(permutation), np.arange(num_virtual)
        ):
            raise ValueError(f"shuffle must be a permutation of [0, {num_virtual})")
        indices = permutation[indices]
    group, within = np.divmod(indices, window)
    return (within + offset) % num_slots, group


def feistel(indices: IntArray, num_keys: int, seed: int) -> IntArray:
    """A seeded bijection of [0, n * n), n = num_keys: row, col = divmod(v, n), then two rounds of

        row <- (row + h_k(col)) mod n,   col <- (col + h_{k+1}(row)) mod n,   k = 0, 2

    Each half step adds to one coordinate what depends on the other alone, so it can be undone, and
    two rounds part both the rows and the columns that scoring ties together. (v -> a v + b mod n^2
    would not: it keeps a column together.)
    """
    row, col = np.divmod(indices, num_keys)
    for k in (0, 2):
        row = (row + _round_hash(k, col, num_keys, seed)) % num_keys
        col = (col + _round_hash(k + 1, row, num_keys, seed)) % num_keys
    mixed: IntArray = row * num_keys + col
    return mixed


def _round_hash(k: int, a: IntArray, num_keys: int, seed: int) -> IntArray:
    """h_k(a) = mix64(mix64(seed) + 0x9E3779B97F4A7C15 * (4 a + k + 1)) mod n, in 64-bit words."""
    # One-element arrays throughout: numpy wraps uint64 arrays silently, scalars with a warning.
    base = mix64(np.array([seed & UINT64_MASK], dtype=np.uint64))
    counter = a.astype(np.uint64) * np.array([4], np.uint64) + np.array([k + 1], np.uint64)
    hashed = mix64(base + np.array([0x9E3779B97F4A7C15], np.uint64) * counter)
    return (hashed % np.array([num_keys], np.uint64)).astype(np.int64).reshape(a.shape)


def mix64(z: Uint64Array) -> Uint64Array:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection of 64-bit words.

    z is an array of uint64 with at least one dimension.
    """
    z = z ^ (z >> np.uint64(30))
    z = z * np.array([0xBF58476D1CE4E5B9], np.uint64)
    z = z ^ (z >> np.uint64(27))
    z = z * np.array([0x94D049BB133111EB], np.uint64)
    return z ^ (z >> np.uint64(31))
