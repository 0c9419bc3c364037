"""The fake implementations of the operators for a table's shards, see csrc/torch/slots.cpp.

They have no public wrappers, and differentiating them raises: `ultramem_cuda.parallel` calls them
between its exchanges, with the arguments that `value_ffn` gives its addressing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from ._checks import ArgumentChecks, accumulation_dtype, check_cores
from ._common import register


def _check_indices(checks: ArgumentChecks, indices: Tensor) -> None:
    checks.shape("indices", indices, "[T, S]", (None, None))
    checks.check(indices.dtype in (torch.int64, torch.int32), "indices must be int64 or int32")


def _check_rows(checks: ArgumentChecks, rows: Tensor, cores: int, row_scale: Tensor | None) -> None:
    checks.shape("rows", rows, "[N, W]", (None, None))
    for size in rows.shape:
        checks.check(size >= 1, "rows must not be empty")
    checks.dtype("rows", rows)
    check_cores(checks, cores)
    checks.check(
        rows.shape[1] % cores == 0,
        f"the number of cores C must divide W, got C = {cores}, W = {rows.shape[1]}",
    )
    if row_scale is not None:
        checks.shape("row_scale", row_scale, "a scalar", ())
        checks.has_dtype("row_scale", row_scale, torch.float64)


def _check_both_double(checks: ArgumentChecks, names: str, a: torch.dtype, b: torch.dtype) -> None:
    checks.check(
        (a == torch.float64) == (b == torch.float64), f"{names} must both be float64 or neither"
    )


def _slot_dots_fake(
    indices: Tensor,
    inputs: Tensor,
    rows: Tensor,
    num_cores: int,
    row_scale: Tensor | None,
    permutation: Tensor | None,
    window: int,
    offset: int,
    expand: int,
    shuffle: str,
    num_keys: int,
    seed: int,
    sum_groups: bool,
    first_row: int = 0,
    num_slots: int = 0,
) -> Tensor:
    checks = ArgumentChecks("slot_dots", "rows", rows)
    _check_indices(checks, indices)
    _check_rows(checks, rows, num_cores, row_scale)
    checks.dtype("inputs", inputs)
    _check_both_double(checks, "rows and inputs", rows.dtype, inputs.dtype)
    (tokens, selected), width = indices.shape, rows.shape[1]
    if sum_groups:
        checks.shape("inputs", inputs, "[T, W]", (tokens, width))
    else:
        checks.shape("inputs", inputs, "[T, E, W]", (tokens, expand, width))
    return rows.new_empty((tokens, selected, num_cores), dtype=accumulation_dtype(rows.dtype))


def _slot_sum_fake(
    indices: Tensor,
    weights: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    row_scale: Tensor | None,
    permutation: Tensor | None,
    window: int,
    offset: int,
    expand: int,
    shuffle: str,
    num_keys: int,
    seed: int,
    sum_groups: bool,
    first_row: int = 0,
    num_slots: int = 0,
) -> Tensor:
    checks = ArgumentChecks("slot_sum", "rows", rows)
    _check_indices(checks, indices)
    tokens, selected = indices.shape
    checks.shape("weights", weights, "[T, S, C]", (tokens, selected, None))
    _check_rows(checks, rows, weights.shape[2], row_scale)
    checks.has_dtype("weights", weights, accumulation_dtype(rows.dtype))
    _check_both_double(checks, "rows and dtype", rows.dtype, dtype)
    groups = () if sum_groups else (expand,)
    out = rows.new_empty((tokens, *groups, rows.shape[1]), dtype=dtype)
    checks.dtype("dtype", out)
    return out


def _table_factors_append_fake(
    indices: Tensor,
    weights: Tensor,
    grad_a: Tensor | None,
    grad_out: Tensor,
    pre_input: Tensor | None,
    num_rows: int,
    permutation: Tensor | None,
    window: int,
    offset: int,
    expand: int,
    shuffle: str,
    num_keys: int,
    seed: int,
    sum_groups: bool,
    factors: Tensor,
    first_row: int = 0,
    num_slots: int = 0,
) -> None:
    checks = ArgumentChecks("table_factors_append", "factors", factors)
    _check_indices(checks, indices)
    tokens, selected = indices.shape
    checks.shape("weights", weights, "[T, S, C]", (tokens, selected, None))
    check_cores(checks, weights.shape[2], " (weights.shape[2])")
    checks.check(
        (grad_a is None) == (pre_input is None),
        "grad_a and pre_input go together: give both or neither",
    )
    checks.shape("factors", factors, "[bytes]", (None,))
    checks.has_dtype("factors", factors, torch.uint8)


if _library.is_loaded():
    register("slot_dots", _slot_dots_fake)
    register("slot_sum", _slot_sum_fake)
    torch.library.register_fake("ultramem::table_factors_append", _table_factors_append_fake)
