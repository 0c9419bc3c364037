"""Rows of a table: a rank reads the slots that it has, of all tokens of the memory group.

A slot's row is on one rank, which computes all that the slot adds to a token. What a rank has of a
token, over slots, heads and groups, is one sum before it travels:

    parcels     ids, scores, pre_input of all tokens                                 all-gather
    out         the receiver's tokens' partial sums                                  all-to-all

and back:

    grad_out    of all tokens                                                        all-gather
    parcels     gradients of scores (of the slots that the sender has) and partial
                sums of those of pre_input                                           all-to-all

A token of S slots concerns nearly every one of S / 3 ranks and fewer, so nothing is saved by asking
which; sizes do not depend on the ids, and nobody waits for them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..ops._common import raise_double_backward
from ._read import ShardedRead, no_gradients
from .collectives import Parcels, Section, gather_rows, return_sum


@dataclasses.dataclass
class RowRead(ShardedRead):
    """See the module; indices and scores are this rank's tokens'."""

    def __call__(
        self,
        indices: Tensor,
        scores: Tensor,
        pre_input: Tensor | None,
        values: Tensor,
        pre_values: Tensor | None,
    ) -> Tensor:
        self.factors = self.prepare_factors(values, pre_values, self.num_cores)
        anchor = self.anchor(values.device)
        out: Tensor = _RowRead.apply(self, indices, scores, pre_input, values, pre_values, anchor)
        return out

    @property
    def shard(self) -> tuple[int, int]:
        """The operators' first_row and num_slots."""
        num_slots = self.table.num_slots
        return self.sharding.first_row(num_slots), num_slots

    def outgoing(self, indices: Tensor, scores: Tensor, pre_input: Tensor | None) -> Parcels:
        sections = [
            Section(tuple(indices.shape), self.index_dtype),
            Section(tuple(scores.shape), scores.dtype),
        ]
        if pre_input is not None:
            sections.append(Section(tuple(pre_input.shape), pre_input.dtype))
        parcels = Parcels(1, sections, indices.device)
        for i, tensor in enumerate((indices, scores, pre_input)):
            if tensor is not None:
                parcels[i].copy_(tensor[None])
        return parcels


class _RowRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        read: RowRead,
        indices: Tensor,
        scores: Tensor,
        pre_input: Tensor | None,
        values: Tensor,
        pre_values: Tensor | None,
        anchor: Tensor,
    ) -> Tensor:
        ctx.read = read
        if indices.shape[0] == 0:
            ctx.save_for_backward(scores, pre_input, values, pre_values)
            return values.new_zeros(read.output_shape(0), dtype=read.dtype)
        parcels = read.outgoing(indices, scores, pre_input).gather(read.group)
        ids, all_scores = parcels[0].flatten(0, 1), parcels[1].flatten(0, 1)
        inputs = None if pre_input is None else parcels[2].flatten(0, 1)
        permutation, *rest = read.place
        partial, a = torch.ops.ultramem.value_ffn(
            ids,
            all_scores,
            values,
            pre_values,
            inputs,
            permutation,
            read.table.scale,
            None,
            None,
            None,
            read.activation,
            *rest,
            *read.shard,
        )
        ctx.save_for_backward(ids, all_scores, inputs, values, pre_values, a)
        return return_sum(partial, read.group)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise_double_backward("value_ffn")
        read: RowRead = ctx.read
        need_values, need_pre_values = ctx.needs_input_grad[4:6]
        if grad_out.shape[0] == 0:
            return no_gradients(ctx, None, None, *ctx.saved_tensors, None)
        ids, scores, inputs, values, pre_values, a = ctx.saved_tensors
        permutation, *rest = read.place
        arguments = (
            gather_rows(grad_out, read.group),
            ids,
            scores,
            values,
            pre_values,
            inputs,
            a,
            permutation,
            read.table.scale,
            read.activation,
            *rest,
        )
        grad_values = grad_pre_values = None
        if read.factors is not None:
            with read.factors._appending(ids.shape[0]) as arena:
                grad_scores, grad_inputs = torch.ops.ultramem.value_ffn_bwd_deferred(
                    *arguments, arena, *read.shard
                )
        else:
            grad_scores, grad_inputs, grad_values, grad_pre_values = (
                torch.ops.ultramem.value_ffn_bwd(
                    *arguments, need_values, need_pre_values, *read.shard
                )
            )
            scale = read.sharding.gradient_scale
            grad_values = grad_values.mul_(scale) if need_values else None
            grad_pre_values = grad_pre_values.mul_(scale) if need_pre_values else None
        scores, inputs = read.send_back(grad_scores, None if inputs is None else grad_inputs)
        # Of a slot's score one rank has the gradient, and the others zero.
        grads = (scores.sum(0), None if inputs is None else inputs.sum(0))
        return None, None, *grads, grad_values, grad_pre_values, None
