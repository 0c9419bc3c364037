"""Bytes that one forward pass of a layer moves, as a function of the batch.

Parameters only: activations are small beside them at the batch sizes where the question is open,
and the same for all kinds. A batch is B tokens whose layer runs once (decode, or a small prefill).
Each parameter is counted once a pass, however many tokens use it; of sparse parameters only those
that a token of the batch uses.

Experts and slots are taken as drawn uniformly, each token on its own. Skewed routing touches fewer
distinct ones, so the formulas are upper bounds on distinct bytes. Rows of a table are gathered per
token: what reaches the caches is ``gathered``, what must come from memory at least once is
``distinct``; a real pass lies between.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BATCH_SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
LARGEST_BATCH = 1 << 24


def expected_distinct(population: int, taken: float, batch: float) -> float:
    """Expected number of distinct members after ``batch`` independent draws of ``taken`` each.

    A member is missed by one draw of k out of X without replacement with probability 1 - k/X:
    X (1 - (1 - k/X)^B).
    """
    if taken >= population:
        return float(population) if batch > 0 else 0.0
    # log1p keeps the difference from 1 that matters when the population is large.
    return -population * math.expm1(batch * math.log1p(-taken / population))


@dataclass(frozen=True)
class Traffic:
    """Bytes of one forward pass over a batch.

    ``dense`` are parameters read whole whatever the batch (projections, keys, routers, dense
    FFNs); ``gathered`` the sparse ones counted once for every token that uses them; ``distinct``
    the sparse ones counted once.
    """

    dense: float = 0.0
    gathered: float = 0.0
    distinct: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.dense + other.dense,
            self.gathered + other.gathered,
            self.distinct + other.distinct,
        )

    @property
    def upper(self) -> float:
        """Bytes if no gathered row is ever found in a cache."""
        return self.dense + self.gathered

    @property
    def lower(self) -> float:
        """Bytes if every repeated row is found in a cache."""
        return self.dense + self.distinct


class Layer(abc.ABC):
    """Something whose forward pass reads parameters."""

    @abc.abstractmethod
    def forward(self, batch: float) -> Traffic:
        """Traffic of a pass over ``batch`` tokens."""

    def __add__(self, other: Layer) -> Layers:
        return Layers((self, other))


@dataclass(frozen=True)
class Layers(Layer):
    """Several layers that a token passes one after the other or side by side."""

    parts: tuple[Layer, ...]

    def forward(self, batch: float) -> Traffic:
        return sum((part.forward(batch) for part in self.parts), Traffic())


@dataclass(frozen=True)
class DenseFFN(Layer):
    """A SwiGLU: three matrices of ``d_model * inner``."""

    d_model: int
    inner: int
    element_bytes: int = 2

    def forward(self, batch: float) -> Traffic:
        read = 3 * self.d_model * self.inner * self.element_bytes
        return Traffic(dense=read if batch > 0 else 0.0)


@dataclass(frozen=True)
class MoEFFN(Layer):
    """A router and ``num_experts`` SwiGLU experts, of which a token uses ``experts_per_token``.

    The experts' products are grouped, so a touched expert is read once: ``gathered`` equals
    ``distinct``.
    """

    d_model: int
    inner: int
    num_experts: int
    experts_per_token: int
    element_bytes: int = 2

    @property
    def population(self) -> int:
        """Experts to choose from."""
        return self.num_experts

    def touched(self, batch: float) -> float:
        """Expected number of experts that a batch uses."""
        return expected_distinct(self.num_experts, self.experts_per_token, batch)

    def forward(self, batch: float) -> Traffic:
        return self.with_touched(batch, self.touched(batch))

    def with_touched(self, batch: float, touched: float) -> Traffic:
        """Traffic of a pass that was counted to use ``touched`` distinct experts."""
        router = self.d_model * self.num_experts * self.element_bytes
        experts = touched * 3 * self.d_model * self.inner * self.element_bytes
        return Traffic(dense=router if batch > 0 else 0.0, gathered=experts, distinct=experts)


@dataclass(frozen=True)
class MemoryLayer(Layer):
    """A memory layer: query projection, keys, pre and value projections, rows of the table.

    Names are those of ``UltraMemConfig``; ``window`` is the number of rows the layer can reach.
    With ``tucker_rank = num_cores = 1`` and ``pre_value_dim = 0`` it is a PKM layer.
    """

    d_model: int
    num_keys: int
    key_dim: int
    topk: int
    value_dim: int
    window: int
    pre_value_dim: int = 0
    num_heads: int = 1
    tucker_rank: int = 2
    num_cores: int = 2
    element_bytes: int = 2

    @property
    def slots_per_token(self) -> int:
        return self.num_heads * self.topk

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot: its pre-value and its value."""
        return (self.pre_value_dim + self.value_dim) * self.element_bytes

    @property
    def population(self) -> int:
        """Rows to choose from."""
        return self.window

    def dense_parameters(self) -> int:
        """Parameters that every pass reads whole."""
        sides = 2 * self.num_heads * self.tucker_rank * self.key_dim
        cores = self.num_cores * self.num_heads * self.tucker_rank**2
        projections = self.d_model * (self.pre_value_dim + self.value_dim)
        return sides * (self.d_model + self.num_keys) + projections + cores + 2 * self.key_dim

    def touched(self, batch: float) -> float:
        """Expected number of distinct rows that a batch reads."""
        return expected_distinct(self.window, self.slots_per_token, batch)

    def forward(self, batch: float) -> Traffic:
        return self.with_touched(batch, self.touched(batch))

    def with_touched(self, batch: float, touched: float) -> Traffic:
        """Traffic of a pass that was counted to read ``touched`` distinct rows."""
        return Traffic(
            dense=self.dense_parameters() * self.element_bytes if batch > 0 else 0.0,
            gathered=batch * self.slots_per_token * self.row_bytes,
            distinct=touched * self.row_bytes,
        )


@dataclass(frozen=True)
class TrafficRow:
    """Bytes per token of one layer at one batch size."""

    batch: int
    upper: float
    lower: float


def per_token(layer: Layer, batch_sizes: Sequence[int] = BATCH_SIZES) -> list[TrafficRow]:
    """Bytes per token by batch size."""
    rows = []
    for batch in batch_sizes:
        read = layer.forward(batch)
        rows.append(TrafficRow(batch, read.upper / batch, read.lower / batch))
    return rows


def crossover(layer: Layer, other: Layer) -> int | None:
    """Smallest batch from which on ``layer`` reads more than ``other``, gathered rows all counted.

    1 where it reads more at every batch; None where there is none up to ``LARGEST_BATCH``.
    ``layer`` must have no experts: its bytes are then affine in the batch, those of any ``other``
    concave, and the batches at which ``layer`` reads no more are one interval.
    """

    def excess(batch: int) -> float:
        return layer.forward(batch).upper - other.forward(batch).upper

    # The excess is convex: its minimum is where it stops falling.
    minimum = _first(lambda batch: excess(batch + 1) >= excess(batch), 1, LARGEST_BATCH)
    if excess(minimum) > 0:
        return 1
    if excess(LARGEST_BATCH) <= 0:
        return None
    return _first(lambda batch: excess(batch) > 0, minimum, LARGEST_BATCH)


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Smallest integer in [low, high] from which on ``holds`` is true; ``high`` if it never is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


# One block of OLMoE-1B-7B (arXiv 2409.02060: width 2048, 64 experts of inner width 1024, 8 a token)
# and what UltraMemV2's 1B/7B has in its place: memory layer shape M of the benchmarks beside a
# dense FFN of inner width 5632 (ours; an FFN of the MoE's FLOPs would be about 6750 wide).
OLMOE_MOE = MoEFFN(d_model=2048, inner=1024, num_experts=64, experts_per_token=8)
ULTRAMEM_FFN = DenseFFN(d_model=2048, inner=5632)
ULTRAMEM_MEMORY = MemoryLayer(
    d_model=2048,
    num_keys=1056,
    key_dim=512,
    topk=128,
    pre_value_dim=384,
    value_dim=768,
    window=1056**2,
)
ULTRAMEM_BLOCK = ULTRAMEM_FFN + ULTRAMEM_MEMORY
