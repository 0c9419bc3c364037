"""Bytes that a sharded table sends, by formula."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..config import UltraMemConfig
from ..ops._checks import accumulation_dtype
from ._columns import num_pieces
from ._read import INT32_INDICES


class WireBytes(NamedTuple):
    """Bytes that a rank sends to the others for each of its own tokens, in one layer."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def wire_bytes(
    config: UltraMemConfig,
    by: str,
    num_ranks: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    table_dtype: torch.dtype | None = None,
) -> WireBytes:
    """What reading a table that is sharded over a memory group of P ranks sends.

    With s bytes an element, a bytes a score (4), i bytes an id (4 below 2^31 ids) and S = H*M slots
    a token, a rank sends for each of its tokens, in forward and backward (p pieces of a rank's
    columns, C / gcd(C, P); an all-reduce counts as a reduce-scatter and an all-gather):

        columns     (P - 1) * (i*S + a*S*p + s*Dp/P + 2*a*S + s*Dv/P)
                    (P - 1) * (s*Dv/P + 2*a*S + a*S*p + s*Dp/P)
        rows        (P - 1) * (i*S + a*S*C + s*Dp + s*Dv)
                    (P - 1) * (s*Dv + a*S*C + s*Dp)

    Without pre-values Dp and the all-reduces are not there; without summed groups Dv is E*Dv.
    (Parcels end on multiples of 16 bytes, which is not counted.)

    Args:
        config: of the layer.
        by: "columns" or "rows".
        num_ranks: P.
        dtype: of activations.
        table_dtype: of the table; by default dtype. Scores are float64 where it is.

    Raises:
        ValueError: naming the argument, what it was and what it must be.
    """
    if by not in ("columns", "rows"):
        raise ValueError(f"by: must be 'columns' or 'rows', got {by!r}")
    if num_ranks < 1:
        raise ValueError(f"num_ranks: must be at least 1, got {num_ranks}")
    score = accumulation_dtype(table_dtype or dtype).itemsize
    selected, cores = config.slots_per_token, config.num_cores
    index = 4 if config.expand * config.window <= INT32_INDICES else 8
    pre = dtype.itemsize * config.pre_value_dim
    out = dtype.itemsize * config.value_dim * config.output_groups
    ids = index * selected
    if by == "rows":
        scores = score * selected * cores
        forward, backward = float(ids + scores + pre + out), float(out + scores + pre)
    else:
        scores = score * selected * num_pieces(cores, num_ranks)
        partial = 2 * score * selected if config.pre_value_dim else 0
        vectors = (pre + out) / num_ranks
        forward, backward = ids + scores + partial + vectors, scores + partial + vectors
    return WireBytes((num_ranks - 1) * forward, (num_ranks - 1) * backward)
