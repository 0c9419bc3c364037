"""The byte model: what a layer moves to and from memory, as a function of the tokens of a batch.

A layer (:class:`DenseFFN`, :class:`MoEFFN`, :class:`MemoryLayer`, :class:`PKMLayer`, and sums of
them) gives ``traffic(phase, tokens)``, the bytes of a decode pass, of a training pass (forward and
backward) or of the step behind it, and ``flops(phase, tokens)``. ``terms`` says which tensors these
bytes are, and of a memory layer which operator's; the classes' docstrings hold them as tables.

- ``dense``: parameters that are gone through whole whatever the batch (projections, keys, routers,
  dense FFNs), with their gradients and states.
- ``gathered``: experts and rows, counted once for every token that uses them. The products of
  experts are grouped, so that an expert is counted once a pass in any case.
- ``distinct``: the same, each counted once.
- ``activations``: tensors of tokens, between kernels. An L2 cache may hold them where tokens are
  few; they are counted all the same.

Rows of a table are gathered token by token: what reaches the caches is ``gathered``, what must come
from memory at least once is ``distinct``, and a real pass lies between, from ``lower`` to
``upper``. Experts and slots are drawn uniformly, each token on its own, unless the layer has a
:class:`Routing`. Skewed choices touch fewer distinct ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from .record import Bytes, Phase
from .traffic_ffn import DenseFFN, MoEFFN
from .traffic_memory import MemoryLayer, PKMLayer, Table
from .traffic_routing import Routing, expected_distinct
from .traffic_terms import (
    ADAGRAD,
    ADAM_BF16,
    ADAM_FP32,
    ADAMW_BF16,
    ADAMW_FP32,
    DEFAULT_RECIPE,
    PASSES,
    SGD,
    Layer,
    Layers,
    Optimizer,
    Pass,
    Recipe,
    SparseLayer,
    Term,
    total,
)

__all__ = [
    "ADAGRAD",
    "ADAMW_BF16",
    "ADAMW_FP32",
    "ADAM_BF16",
    "ADAM_FP32",
    "BATCH_SIZES",
    "LARGEST_BATCH",
    "PASSES",
    "SGD",
    "Bytes",
    "DenseFFN",
    "Layer",
    "Layers",
    "MemoryLayer",
    "MoEFFN",
    "Optimizer",
    "PKMLayer",
    "Pass",
    "Recipe",
    "Routing",
    "SparseLayer",
    "Table",
    "Term",
    "TrafficRow",
    "crossover",
    "expected_distinct",
    "per_token",
    "total",
]

BATCH_SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
LARGEST_BATCH = 1 << 24

Count = Literal["upper", "lower"]


@dataclass(frozen=True)
class TrafficRow:
    """Bytes per token of one layer at one batch size."""

    batch: int
    upper: float
    lower: float


def per_token(
    layer: Layer,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    phase: Phase = "decode",
    *,
    activations: bool = True,
    recipe: Recipe = DEFAULT_RECIPE,
) -> list[TrafficRow]:
    """Bytes per token by batch size, of parameters alone without ``activations``."""
    rows = []
    for batch in batch_sizes:
        moved = layer.traffic(phase, batch, recipe=recipe)
        moved = moved if activations else moved.parameters
        rows.append(TrafficRow(batch, moved.upper / batch, moved.lower / batch))
    return rows


def crossover(
    layer: Layer,
    other: Layer,
    phase: Phase = "decode",
    *,
    count: Count = "upper",
    activations: bool = True,
    recipe: Recipe = DEFAULT_RECIPE,
) -> int | None:
    """Smallest batch from which on ``layer`` moves more bytes than ``other``.

    1 where it moves more at every batch; None where there is none up to ``LARGEST_BATCH``.

    Args:
        count: "upper" for gathered rows all counted, "lower" for each distinct one once.
        activations: False for parameters alone.
    """
    if count not in ("upper", "lower"):
        raise ValueError(f"count: must be 'upper' or 'lower', got {count!r}")

    def bytes_of(one: Layer) -> Callable[[int], float]:
        @cache
        def moved(batch: int) -> float:
            found = one.traffic(phase, batch, recipe=recipe)
            return float(getattr(found if activations else found.parameters, count))

        return moved

    last = _last_not_above(bytes_of(layer), bytes_of(other), LARGEST_BATCH)
    if last == LARGEST_BATCH:
        return None
    return 1 if last is None else last + 1


def _last_not_above(
    f: Callable[[int], float], g: Callable[[int], float], largest: int
) -> int | None:
    """Largest n in [1, largest] with f(n) <= g(n); None without one. Both must be concave.

    Every count of bytes is: what is used whole is constant from one token on, activations and
    gathered rows are proportional to tokens, and a new token finds fewer new members than the one
    before. The difference can cross zero several times, so intervals are searched from the right,
    those left out in which concavity keeps f above g.
    """
    intervals = [(1, largest)]
    while intervals:
        low, high = intervals.pop()
        if f(high) <= g(high):
            return high
        if low == high or _least_difference(f, g, low, high) > 0:
            continue
        middle = (low + high) // 2
        intervals += [(low, middle), (middle + 1, high)]
    return None


def _least_difference(
    f: Callable[[int], float], g: Callable[[int], float], low: int, high: int
) -> float:
    """A lower bound of f - g on [low, high], for concave f and g.

    f lies above its chord, g below its tangents at both ends; their difference is least at an end
    or where the tangents meet.
    """
    width = high - low
    first, last = g(low + 1) - g(low), g(high) - g(high - 1)
    bound = min(f(low) - g(low), f(high) - g(high))
    if first <= last:  # straight
        return bound
    meet = (g(high) - last * width - g(low)) / (first - last)
    meet = min(max(meet, 0.0), float(width))
    chord = f(low) + (f(high) - f(low)) * meet / width
    return min(bound, chord - (g(low) + first * meet))
