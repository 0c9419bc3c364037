"""Calls of value_ffn's raw operators, and of its halves, on a whole table and on shards of it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from helpers import FORWARD_BOUND, Data, accumulation_dtype, array
from test_op_value_ffn import Case
from torch import Tensor

from ultramem_cuda import GradientFactors, SlotAddressing


def check_same_sums(name: str, actual: Tensor, expected: Tensor) -> None:
    """Of the same terms, in an order that may differ."""
    assert actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype, name
    error = (actual.double() - expected.double()).norm()
    bound = FORWARD_BOUND[actual.dtype] * expected.double().norm()
    assert error <= bound, f"{name}: {error} > {bound}"


def check_same(name: str, actual: Tensor, expected: Tensor) -> None:
    """Of the same terms in the same order, but for some that are zero: to the last bit on CUDA. On
    the CPU it depends on their number which of them the compiler multiplies and adds at once."""
    if actual.device.type == "cuda":
        assert torch.equal(actual, expected), name
    else:
        check_same_sums(name, actual, expected)


Shard = tuple[int, int]  # rows [begin, end) of the table


def row_shards(num_slots: int) -> list[Shard]:
    """Three of unequal length, one of them a single row; fewer of a tiny table."""
    cuts = sorted({0, num_slots // 3, num_slots // 3 + 1, num_slots})
    return list(itertools.pairwise(cuts))


def addressing_args(addressing: SlotAddressing | None) -> tuple[Any, ...]:
    """permutation, window, offset, expand, shuffle, num_keys, seed as the operators take them."""
    if addressing is None:
        return (None, 0, 0, 1, "none", 0, 0)
    a = addressing
    where = (a.window, a.offset, a.expand)
    if isinstance(a.shuffle, Tensor):
        return (a.shuffle, *where, "permutation", 0, a.seed)
    return (None, *where, a.shuffle or "none", a.num_keys, a.seed)


@dataclasses.dataclass
class Calls:
    """The tensors of a case, and the operators on all rows or on some of them."""

    indices: Tensor
    scores: Tensor  # in the accumulation dtype
    values: Tensor
    pre_values: Tensor | None
    pre_input: Tensor | None
    addressing: SlotAddressing | None
    activation: str
    sum_groups: bool

    @staticmethod
    def of(case: Case, device: str, dtype: torch.dtype) -> Calls:
        data = Data(case.seed, device)
        high = case.num_slots if case.window is None else case.expand * case.window
        shape = (case.tokens, case.selected)
        pre_values = pre_input = None
        if case.pre_value_dim is not None:
            wide = dtype == torch.float64
            input_dtype = torch.float64 if wide else case.pre_input_dtype or dtype
            scale = case.pre_value_dim**-0.5
            pre_values = data.normal(case.num_slots, case.pre_value_dim, dtype=dtype)
            pre_input = data.normal(case.tokens, case.pre_value_dim, dtype=input_dtype, scale=scale)
        return Calls(
            data.integers(high, *shape, dtype=case.index_dtype),
            data.normal(*shape, case.cores, dtype=accumulation_dtype(dtype)),
            data.normal(case.num_slots, case.cores * case.slice_dim, dtype=dtype),
            pre_values,
            pre_input,
            case.addressing(data),
            case.activation,
            case.sum_groups,
        )

    @property
    def num_slots(self) -> int:
        return self.values.shape[0]

    @property
    def num_groups(self) -> int:
        """Those that out keeps apart."""
        return 1 if self.sum_groups or self.addressing is None else self.addressing.expand

    def slots(self) -> Tensor:
        """Rows of the whole table, [T, S]."""
        if self.addressing is None:
            return self.indices.long()
        return self.addressing.slots(self.indices)[0]

    def upstream(self, out: Tensor) -> Tensor:
        return Data(5, out.device.type).normal(*out.shape, dtype=out.dtype)

    def of_shard(self, shard: Shard) -> Calls:
        """Only the shard's rows in memory; to be called with `where(shard)`."""
        begin, end = shard
        pre_values = None if self.pre_values is None else self.pre_values[begin:end].clone()
        return dataclasses.replace(
            self, values=self.values[begin:end].clone(), pre_values=pre_values
        )

    def masked(self, shard: Shard) -> Calls:
        """The whole table, zeros in the other shards' rows."""
        begin, end = shard

        def keep(table: Tensor) -> Tensor:
            zeros = torch.zeros_like(table)
            zeros[begin:end] = table[begin:end]
            return zeros

        pre_values = None if self.pre_values is None else keep(self.pre_values)
        return dataclasses.replace(self, values=keep(self.values), pre_values=pre_values)

    def where(self, shard: Shard) -> tuple[int, int]:
        """first_row and num_slots."""
        return shard[0], self.num_slots

    # ---- operators

    def _options(self) -> tuple[Any, ...]:
        return (self.activation, *addressing_args(self.addressing)[1:], self.sum_groups)

    def _permutation(self) -> Tensor | None:
        return addressing_args(self.addressing)[0]

    def _saved(self, grad_out: Tensor, a: Tensor) -> tuple[Any, ...]:
        tensors = (self.indices, self.scores, self.values, self.pre_values, self.pre_input)
        return (grad_out, *tensors, a, self._permutation())

    def forward(self, *where: int) -> tuple[Tensor, Tensor]:
        tensors = (self.indices, self.scores, self.values, self.pre_values, self.pre_input)
        nothing = [None] * 4
        result: tuple[Tensor, Tensor] = torch.ops.ultramem.value_ffn(
            *tensors, self._permutation(), *nothing, *self._options(), *where
        )
        return result

    def backward(self, grad_out: Tensor, a: Tensor, *where: int) -> tuple[Tensor, ...]:
        """grad_scores, grad_pre_input, grad_values, grad_pre_values."""
        saved = self._saved(grad_out, a)
        result: tuple[Tensor, ...] = torch.ops.ultramem.value_ffn_bwd(
            *saved, None, *self._options(), True, True, *where
        )
        return result

    def backward_main_grad(self, grad_out: Tensor, a: Tensor, *where: int) -> list[Tensor | None]:
        """Dense gradients of the tables in the accumulation dtype."""
        acc = accumulation_dtype(self.values.dtype)
        buffers = [
            None if table is None else torch.zeros_like(table, dtype=acc)
            for table in (self.values, self.pre_values)
        ]
        saved = self._saved(grad_out, a)
        torch.ops.ultramem.value_ffn_bwd_main_grad(*saved, *self._options(), *buffers, *where)
        return buffers

    def backward_deferred(
        self, grad_out: Tensor, a: Tensor, *where: int
    ) -> tuple[Tensor, Tensor, GradientFactors]:
        """grad_scores, grad_pre_input, and the factors."""
        factors = self.reserved(grad_out.dtype)
        saved = self._saved(grad_out, a)
        grads = torch.ops.ultramem.value_ffn_bwd_deferred(
            *saved, None, *self._options(), factors.arena, *where
        )
        return (*grads, factors)

    def reserved(self, dtype: torch.dtype, tokens: int | None = None) -> GradientFactors:
        """Empty factors for the tables in memory, with room for the tokens."""
        tables = (self.values, self.pre_values)
        num_rows, *dims = (self.values.shape[0], *(0 if t is None else t.shape[1] for t in tables))
        factors = GradientFactors(
            num_rows, *dims, dtype=self.values.dtype, device=self.values.device
        )
        factors.reserve(
            self.indices.shape[0] if tokens is None else tokens,
            num_selected=self.indices.shape[1],
            num_cores=self.scores.shape[2],
            num_groups=self.num_groups,
            dtype=dtype,
        )
        return factors

    def dots(
        self, inputs: Tensor, rows: Tensor, cores: int, scale: Tensor | None, *where: int
    ) -> Tensor:
        # Inputs of the pre-values belong to no group.
        sum_groups = self.sum_groups or inputs.dim() == 2
        result: Tensor = torch.ops.ultramem.slot_dots(
            self.indices, inputs, rows, cores, scale, *addressing_args(self.addressing),
            sum_groups, *where,
        )  # fmt: skip
        return result

    def sum(
        self,
        weights: Tensor,
        rows: Tensor,
        dtype: torch.dtype,
        scale: Tensor | None,
        *where: int,
        sum_groups: bool | None = None,
    ) -> Tensor:
        result: Tensor = torch.ops.ultramem.slot_sum(
            self.indices, weights, rows, dtype, scale, *addressing_args(self.addressing),
            self.sum_groups if sum_groups is None else sum_groups, *where,
        )  # fmt: skip
        return result

    def append(
        self,
        weights: Tensor,
        grad_a: Tensor | None,
        grad_out: Tensor,
        factors: GradientFactors,
        *where: int,
    ) -> None:
        """To factors of a table of `factors.num_slots` rows; pre_input in the dtype of grad_out."""
        pre_input = None if self.pre_input is None else self.pre_input.to(grad_out.dtype)
        torch.ops.ultramem.table_factors_append(
            self.indices, weights, grad_a, grad_out, None if grad_a is None else pre_input,
            factors.num_slots, *addressing_args(self.addressing), self.sum_groups,
            factors.arena, *where,
        )  # fmt: skip

    def reference_inputs(self) -> tuple[Any, ...]:
        """indices, scores, values, pre_values, pre_input as float64 arrays, and the addressing."""
        tensors = (self.scores, self.values, self.pre_values, self.pre_input)
        arrays = [None if x is None else array(x) for x in tensors]
        where = None if self.addressing is None else self.addressing.to("cpu")
        return (array(self.indices), *arrays), where
