"""What reading a sharded table by rows and by columns have in common."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..addressing import SlotAddressing
from ..factors import FactorShape, GradientFactors
from ..ops._value_ffn import addressing_arguments
from .collectives import Parcels, Section

if TYPE_CHECKING:
    from ..table import MemoryTable
    from .sharding import TableSharding

INT32_INDICES = (1 << 31) - 1


@dataclasses.dataclass
class ShardedRead:
    """One layer's read: what does not change between forward and backward, and is no gradient's.

    Attributes:
        num_selected, num_cores: S, C.
        dtype: of pre_input and of the output.
    """

    sharding: TableSharding
    table: MemoryTable
    addressing: SlotAddressing
    activation: str
    sum_groups: bool
    num_selected: int
    num_cores: int
    dtype: torch.dtype
    factors: GradientFactors | None = dataclasses.field(default=None, init=False)

    @property
    def group(self) -> dist.ProcessGroup:
        group = self.sharding.shard_group
        assert group is not None
        return group

    @property
    def num_ranks(self) -> int:
        return self.sharding.num_shards

    @property
    def index_dtype(self) -> torch.dtype:
        """Of the indices on their way: as narrow as all of them fit."""
        virtual = self.addressing.expand * self.addressing.window
        return torch.int32 if virtual <= INT32_INDICES else torch.int64

    @property
    def group_shape(self) -> tuple[int, ...]:
        """Of what a token has in place of one output, beside its width."""
        return () if self.sum_groups else (self.addressing.expand,)

    @property
    def place(self) -> tuple[Any, ...]:
        """The operators' arguments that say which row an index is."""
        return (*addressing_arguments(self.addressing), self.sum_groups)

    def anchor(self, device: torch.device) -> Tensor:
        """An input without values, of no gradient, on whose account a backward runs although
        nothing but a deferred table trains."""
        return torch.empty(0, device=device, requires_grad=self.factors is not None)

    def scale_of(self, which: int) -> Tensor | None:
        """That of values (0) or pre_values (1)."""
        return None if self.table.scale is None else self.table.scale[which]

    def output_shape(self, num_tokens: int) -> tuple[int, ...]:
        return (num_tokens, *self.group_shape, self.table.value_dim)

    def prepare_factors(
        self, values: Tensor, pre_values: Tensor | None, num_cores: int
    ) -> GradientFactors | None:
        """The table's factors, if a backward is to append to them: their shape is fixed here."""
        factors = self.table.factors
        trains = any(p is not None and p.requires_grad for p in self.table.rows())
        if factors is None or not trains or not torch.is_grad_enabled():
            return None
        num_groups = 1 if self.sum_groups else self.addressing.expand
        shape = FactorShape(self.num_selected, num_cores, num_groups, self.dtype)
        factors._for_forward(values, pre_values, shape)
        return factors

    def send_back(
        self, grad_scores: Tensor, grad_inputs: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What this rank has of the gradients of all tokens' scores [P*T, *] and inputs [P*T, w],
        to the ranks whose tokens they are: what each of those had of this one's, [P, T, *]."""
        grads = [grad for grad in (grad_scores, grad_inputs) if grad is not None]
        parts = [grad.unflatten(0, (self.num_ranks, -1)) for grad in grads]
        sections = [Section(tuple(part.shape[1:]), part.dtype) for part in parts]
        parcels = Parcels(self.num_ranks, sections, grad_scores.device)
        for i, part in enumerate(parts):
            parcels[i].copy_(part)
        received = parcels.exchange(self.group)
        return received[0], None if grad_inputs is None else received[1]


def no_gradients(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of a read without tokens, which asks no other rank: zeros where something is wanted."""
    return tuple(
        torch.zeros_like(tensor) if tensor is not None and needed else None
        for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=True)
    )
