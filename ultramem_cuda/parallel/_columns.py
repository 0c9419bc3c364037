"""Columns of a table: every rank of the memory group sees every token.

A rank has columns of both tables, so of a slot's dot product it knows a part, which all add up
before the activation; of the output it makes its columns for everyone. On the way forward:

    parcels     ids, the scores of the cores that the receiver has columns of, its columns of
                pre_input                                                            all-to-all
    a           the partial dot products                                             all-reduce
    out         the receiver's tokens, the sender's columns                          all-to-all

and back:

    grad_out    the sender's tokens, the receiver's columns                          all-to-all
    grad of h   the partial sums over a rank's columns                               all-reduce
    parcels     gradients of scores and of the sender's columns of pre_input         all-to-all
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._common import raise_double_backward
from ._read import ShardedRead, no_gradients
from .collectives import Parcels, Section, exchange_columns, return_columns

_ACTIVATIONS = {"identity": lambda a: a, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def num_pieces(num_cores: int, num_ranks: int) -> int:
    """Pieces of equal width that a rank's columns are cut into where the cores' slices end.

    Where cores and ranks divide the width, so does their least common multiple.
    """
    return num_cores // math.gcd(num_cores, num_ranks)


def _activation_grad(name: str, grad: Tensor, a: Tensor) -> Tensor:
    if name == "identity":
        return grad
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, a, 0)
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, a)
    return torch.ops.aten.silu_backward(grad, a)


@dataclasses.dataclass
class ColumnRead(ShardedRead):
    """See the module; indices and scores are this rank's tokens'."""

    def __call__(
        self,
        indices: Tensor,
        scores: Tensor,
        pre_input: Tensor | None,
        values: Tensor,
        pre_values: Tensor | None,
    ) -> Tensor:
        self.factors = self.prepare_factors(values, pre_values, self.num_pieces)
        anchor = self.anchor(values.device)
        out: Tensor = _ColumnRead.apply(
            self, indices, scores, pre_input, values, pre_values, anchor
        )
        return out

    @property
    def num_pieces(self) -> int:
        return num_pieces(self.num_cores, self.num_ranks)

    @property
    def piece_repeats(self) -> int:
        """Pieces, of all ranks, in the slice of a core."""
        return self.num_pieces * self.num_ranks // self.num_cores

    def outgoing(self, indices: Tensor, scores: Tensor, pre_input: Tensor | None) -> Parcels:
        ranks, (tokens, selected) = self.num_ranks, indices.shape
        sections = [
            Section((tokens, selected), self.index_dtype),
            Section((tokens, selected, self.num_pieces), scores.dtype),
        ]
        if pre_input is not None:
            sections.append(Section((tokens, pre_input.shape[1] // ranks), pre_input.dtype))
        parcels = Parcels(ranks, sections, indices.device)
        parcels[0].copy_(indices)
        pieces = scores.repeat_interleave(self.piece_repeats, 2)
        parcels[1].copy_(pieces.unflatten(2, (ranks, -1)).movedim(2, 0))
        if pre_input is not None:
            parcels[2].copy_(pre_input.unflatten(1, (ranks, -1)).movedim(1, 0))
        return parcels

    def dots(self, ids: Tensor, inputs: Tensor, rows: Tensor, which: int) -> Tensor:
        """[T, S, pieces] of values (which = 0), or [T, S, 1] of pre_values (1)."""
        pieces, place = self.num_pieces if which == 0 else 1, self.place
        if which == 1:
            place = (*place[:-1], True)
        return torch.ops.ultramem.slot_dots(ids, inputs, rows, pieces, self.scale_of(which), *place)

    def sums(self, ids: Tensor, weights: Tensor, rows: Tensor, which: int) -> Tensor:
        place = self.place if which == 0 else (*self.place[:-1], True)
        return torch.ops.ultramem.slot_sum(
            ids, weights, rows, self.dtype, self.scale_of(which), *place
        )

    def joined(self, pieces: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of scores [T, S, C] and pre_input [T, Dp], from those by rank."""
        # The pieces of all ranks in the order of the columns; those of a core are neighbours.
        ordered = pieces.movedim(0, 2).flatten(2)
        scores = ordered.unflatten(2, (self.num_cores, self.piece_repeats)).sum(3)
        return scores, None if inputs is None else inputs.movedim(0, 1).flatten(1)

    def append(
        self, ids: Tensor, weights: Tensor, grad_a: Tensor | None, grad_out: Tensor, inputs: Any
    ) -> None:
        assert self.factors is not None
        with self.factors._appending(ids.shape[0]) as arena:
            torch.ops.ultramem.table_factors_append(
                ids, weights, grad_a, grad_out, inputs, self.table.num_slots, *self.place, arena
            )

    def dense(self, ids: Tensor, weights: Tensor, source: Tensor, rows: Tensor, which: int) -> Any:
        """The gradient of this rank's columns of values or pre_values, averaged over the ranks."""
        weights = weights * self.sharding.gradient_scale
        place = self.place if which == 0 else (*self.place[:-1], True)
        *addressing, sum_groups = place
        permutation, *rest = addressing
        nothing = weights.new_empty(0)
        results = torch.ops.ultramem.value_ffn_bwd(
            source,
            ids,
            weights,
            rows,
            None,
            None,
            nothing,
            permutation,
            None,
            "identity",
            *rest,
            sum_groups,
            True,
            False,
        )
        return results[2]


class _ColumnRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        read: ColumnRead,
        indices: Tensor,
        scores: Tensor,
        pre_input: Tensor | None,
        values: Tensor,
        pre_values: Tensor | None,
        anchor: Tensor,
    ) -> Tensor:
        ctx.read = read
        if indices.shape[0] == 0:
            ctx.save_for_backward(indices, scores, pre_input, values, pre_values)
            return values.new_zeros(read.output_shape(0), dtype=read.dtype)
        parcels = read.outgoing(indices, scores, pre_input).exchange(read.group)
        ids, weights = parcels[0].flatten(0, 1), parcels[1].flatten(0, 1)
        a = inputs = None
        if pre_values is not None:
            inputs = parcels[2].flatten(0, 1)
            a = read.dots(ids, inputs, pre_values, 1)
            read.sharding.sum_over_shards(a)
            ctx.save_for_backward(ids, weights, inputs, values, pre_values, a)
            weights = _ACTIVATIONS[read.activation](a) * weights
        else:
            ctx.save_for_backward(ids, weights, None, values, None, None)
        out = read.sums(ids, weights, values, 0)
        return return_columns(out, read.group)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise_double_backward("value_ffn")
        read: ColumnRead = ctx.read
        if grad_out.shape[0] == 0:
            _, *saved = ctx.saved_tensors
            return no_gradients(ctx, None, None, *saved, None)
        ids, scores, inputs, values, pre_values, a = ctx.saved_tensors
        need_values, need_pre_values = ctx.needs_input_grad[4:6]
        grad_outs = exchange_columns(grad_out, read.group)
        grad_scores = read.dots(ids, grad_outs, values, 0)
        grad_a = grad_inputs = None
        weights = scores
        if a is not None:
            grad_h = (grad_scores * scores).sum(2, keepdim=True)
            read.sharding.sum_over_shards(grad_h)
            grad_a = _activation_grad(read.activation, grad_h, a)
            h = _ACTIVATIONS[read.activation](a)
            grad_scores, weights = h * grad_scores, h * scores
            grad_inputs = read.sums(ids, grad_a, pre_values, 1)
        grads = read.joined(*read.send_back(grad_scores, grad_inputs))
        grad_values = grad_pre_values = None
        if read.factors is not None:
            flat = None if grad_a is None else grad_a.squeeze(2)
            read.append(ids, weights, flat, grad_outs, inputs)
        else:
            if need_values:
                grad_values = read.dense(ids, weights, grad_outs, values, 0)
            if need_pre_values and grad_a is not None:
                grad_pre_values = read.dense(ids, grad_a, inputs, pre_values, 1)
        return None, None, *grads, grad_values, grad_pre_values, None
