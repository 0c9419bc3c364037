"""Which slots and keys a model uses, and how evenly. Costs nothing while no collector is attached.

::

    with um.stats.collect_usage(model) as slots, um.stats.collect_key_usage(model) as keys:
        evaluate(model)
    print(slots["blocks.3.memory"].summary())
    rows, columns = keys["blocks.3.memory"].summaries()
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .addressing import SlotAddressing
from .ops._key_balance import kept_key_counts

if TYPE_CHECKING:
    from .layer import UltraMemLayer

Usage = TypeVar("Usage")


@dataclasses.dataclass(frozen=True)
class UsageSummary:
    """How evenly reads spread over ``num_slots`` slots; or choices over keys, which then stand for
    slots in all that follows.

    Entropies are in nats and those of the sample: with fewer reads than slots even uniform slots
    fall short of ``uniform_entropy``.
    """

    num_slots: int
    reads: int
    distinct: int
    fraction_touched: float
    entropy: float
    uniform_entropy: float
    relative_entropy: float
    """``uniform_entropy - entropy``: the divergence (KL) from uniform use, 0 for even use."""
    effective_slots: float
    """exp(entropy): the number of equally used slots with the same entropy."""
    top_share: float
    """Share of the reads that went to the most read hundredth of the slots; 0.01 for even use."""


def summarize_counts(counts: Tensor) -> UsageSummary:
    """Summary of the reads of each slot, or of how often each key was kept: an integer tensor
    [num_slots]. Synchronises with the host.

    Raises:
        ValueError: another shape or dtype, or no slots.
    """
    if counts.dim() != 1 or counts.numel() == 0 or counts.is_floating_point():
        raise ValueError(
            f"counts: must be an integer tensor [num_slots], not empty, got {counts.dtype} "
            f"{list(counts.shape)}"
        )
    num_slots, reads = counts.numel(), int(counts.sum())
    uniform = math.log(num_slots)
    if reads == 0:
        return UsageSummary(num_slots, 0, 0, 0.0, 0.0, uniform, uniform, 1.0, 0.0)
    touched = counts[counts > 0].double()
    share = touched / reads
    entropy = -float((share * share.log()).sum())
    top = counts.topk(max(1, num_slots // 100)).values.sum()
    return UsageSummary(
        num_slots=num_slots,
        reads=reads,
        distinct=touched.numel(),
        fraction_touched=touched.numel() / num_slots,
        entropy=entropy,
        uniform_entropy=uniform,
        relative_entropy=uniform - entropy,
        effective_slots=math.exp(entropy),
        top_share=int(top) / reads,
    )


class SlotUsage:
    """Reads of each slot in the window of one layer, counted on the device without synchronising.

    A recomputed forward pass (activation checkpointing) counts again, which doubles ``reads`` and
    changes nothing else.

    Attributes:
        counts: int64 [window]; entry i is row (offset + i) % num_slots of the table. It follows the
            indices to their device.
    """

    def __init__(
        self, addressing: SlotAddressing, device: torch.device | str | None = None
    ) -> None:
        self.addressing = addressing
        self.counts = torch.zeros(addressing.window, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Count virtual indices, an integer tensor of any shape.

        They must lie in the layer's range, as its own do, and of int32 or int64 (else TypeError).
        Where they lie on another device than before, as after ``model.to``, the counts move there.
        """
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices: must be int32 or int64, got {indices.dtype}")
        if self.counts.device != indices.device:
            self.counts = self.counts.to(indices.device)
            self.addressing = self.addressing.to(indices.device)
        slots, _ = self.addressing.slots(indices.reshape(-1))
        local = (slots - self.addressing.offset) % self.addressing.num_slots
        self.counts.index_add_(0, local, torch.ones_like(local))

    def summary(self) -> UsageSummary:
        """Statistics within the window. Synchronises with the host."""
        return summarize_counts(self.counts)

    def table_counts(self) -> Tensor:
        """Counts as rows of the table, int64 [num_slots]; add those of several layers to see the
        table's own use."""
        table = self.counts.new_zeros(self.addressing.num_slots)
        rows = torch.arange(self.counts.numel(), device=self.counts.device) + self.addressing.offset
        table[rows % self.addressing.num_slots] = self.counts
        return table


class KeyUsage:
    """How often one layer kept each key of either axis, counted on the device without
    synchronising. As with `SlotUsage`, a recomputed forward pass counts again.

    Attributes:
        counts: int64 [2, n], rows and columns; heads are pooled by key id. It follows the indices
            to their device.
    """

    def __init__(self, num_keys: int, device: torch.device | str | None = None) -> None:
        self.counts = torch.zeros(2, num_keys, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, axis_indices: Tensor) -> None:
        """Count kept keys, int32 or int64 [T, H, 2, m]: what
        ``ops.product_key_topk(..., return_axis_indices=True)`` returns.

        An index outside [0, n) counts as none.

        Raises:
            TypeError, ValueError: another dtype or shape.
        """
        if axis_indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"axis_indices: must be int32 or int64, got {axis_indices.dtype}")
        if axis_indices.dim() != 4 or axis_indices.shape[2] != 2:
            raise ValueError(
                f"axis_indices: must have shape [T, H, 2, m], got {list(axis_indices.shape)}"
            )
        if self.counts.device != axis_indices.device:
            self.counts = self.counts.to(axis_indices.device)
        self.counts += kept_key_counts(axis_indices, self.counts.shape[1])

    def summaries(self) -> tuple[UsageSummary, UsageSummary]:
        """Statistics of rows and of columns. Synchronises with the host."""
        return summarize_counts(self.counts[0]), summarize_counts(self.counts[1])


def collect_usage(model: nn.Module) -> contextlib.AbstractContextManager[dict[str, SlotUsage]]:
    """Count the slots that every memory layer of ``model`` reads inside the block.

    Yields:
        A collector a layer, by the layer's name in ``model``; still readable after the block.
    """
    return _collect(model, "usage", lambda layer: SlotUsage(layer.addressing, layer.keys.device))


def collect_key_usage(model: nn.Module) -> contextlib.AbstractContextManager[dict[str, KeyUsage]]:
    """Count the keys that every memory layer of ``model`` keeps inside the block, as
    `collect_usage` does the slots."""
    return _collect(
        model, "key_usage", lambda layer: KeyUsage(layer.config.num_keys, layer.keys.device)
    )


@contextlib.contextmanager
def _collect(
    model: nn.Module, attribute: str, make: Callable[[UltraMemLayer], Usage]
) -> Iterator[dict[str, Usage]]:
    from .layer import UltraMemLayer

    layers = {name: m for name, m in model.named_modules() if isinstance(m, UltraMemLayer)}
    before = {name: getattr(layer, attribute) for name, layer in layers.items()}
    usage = {name: make(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            setattr(layer, attribute, usage[name])
        yield usage
    finally:
        for name, layer in layers.items():
            setattr(layer, attribute, before[name])
