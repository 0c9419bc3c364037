"""The operators below the optimizers as torch sees them, and the order of the entries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from factor_cases import NOWHERE, deferred_table, fill
from helpers import Data
from torch import Tensor

OPCHECKS = ("test_schema", "test_faketensor")


def factored_args(device: str) -> tuple[Tensor, tuple[Any, ...]]:
    """A table's values and the arguments that stand for their gradient."""
    data = Data(0, device)
    table = deferred_table(data, 20, 16)
    fill(table, data, 6, 4, cores=2, groups=2)
    f = table.factors
    grouping = torch.ops.ultramem.table_group(f.slots, table.num_slots)
    return table.values.detach(), (*grouping, f.weights, f.groups, f.grad_outs, 4)


def test_group(device: str) -> None:
    slots = Data(1, device).integers(20, 50, dtype=torch.int32)
    torch.library.opcheck(torch.ops.ultramem.table_group, (slots, 20), test_utils=OPCHECKS)
    torch.library.opcheck(torch.ops.ultramem.table_group, (slots[:0], 20), test_utils=OPCHECKS)


def test_grad_sum_sq(device: str) -> None:
    values, arguments = factored_args(device)
    torch.library.opcheck(
        torch.ops.ultramem.table_grad_sum_sq,
        (*arguments, values.shape[0]),
        test_utils=OPCHECKS,
    )


def test_grad_row_sq(device: str) -> None:
    values, arguments = factored_args(device)
    torch.library.opcheck(
        torch.ops.ultramem.table_grad_row_sq,
        (*arguments, values.shape[0]),
        test_utils=OPCHECKS,
    )


def test_update_of_a_shard(device: str) -> None:
    values, arguments = factored_args(device)
    row_sq = torch.ops.ultramem.table_grad_row_sq(*arguments, values.shape[0])
    row_sum, step = torch.ones(20, device=device), torch.zeros((), device=device)
    options = (None, None, None, None, 0.1, 0.0, 0.0, 1e-8, 0.5, True, 0, 0, 40, 16, row_sq, 64)
    torch.library.opcheck(
        torch.ops.ultramem.table_update,
        ("adagrad", values, None, None, None, row_sum, step, None, None, *arguments, *options),
        test_utils=OPCHECKS,
    )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_update(device: str, dense: bool, scaled: bool) -> None:
    values, arguments = factored_args(device)
    gradient = (values.clone(), *[None] * 8, 0) if dense else (None, *arguments)
    states = (None, torch.zeros_like(values), torch.zeros_like(values), None)
    step = torch.zeros((), device=device)
    scale = torch.full((), 0.01, dtype=torch.float64, device=device) if scaled else None
    options = (None, None, None, None, 0.1, 0.9, 0.99, 1e-8, 0.5, True, 0, 0)
    torch.library.opcheck(
        torch.ops.ultramem.table_update,
        ("adam", values, *states, step, scale, *gradient, *options),
        test_utils=OPCHECKS,
    )


@pytest.mark.parametrize("lr", [1.0, 1.5, -0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_is_never_lost(device: str, dtype: torch.dtype, lr: float) -> None:
    """Where 1 - lr * weight_decay is not in (0, 1] there is no step."""
    values, arguments = factored_args(device)
    values = values.to(dtype)
    master = values.float() if dtype == torch.bfloat16 else None
    step, scale = torch.zeros((), device=device), torch.full((), 0.25, dtype=torch.float64)
    states = [master, torch.zeros_like(values), torch.zeros_like(values), None, step]
    changed = [values, *(t for t in states if t is not None), scale := scale.to(device)]
    before = [tensor.clone() for tensor in changed]

    def update(lr: float, weight_decay: float) -> None:
        options = (torch.tensor(lr, device=device), None, None, None, 1.0, 0.9, 0.99, 1e-8)
        torch.ops.ultramem.table_update(
            *("adam", values, *states, scale, None, *arguments, *options),
            *(weight_decay, False, 0, 0),
        )

    update(lr, 1.0)
    assert all(map(torch.equal, changed, before))
    update(0.5, 1.0)
    assert scale.item() == 0.125
    assert step.item() == 1.0
    assert not torch.equal(values, before[0])


@pytest.mark.parametrize(
    ("num_rows", "count"), [(1, 5), (20, 1), (20, 300), (100_000, 5000), (7, 40_000)]
)
def test_entries_are_in_order(device: str, num_rows: int, count: int) -> None:
    data = Data(2, device)
    slots = data.integers(num_rows, count, dtype=torch.int32)
    if count > 1:
        slots[:: max(count // 9, 1)] = NOWHERE
        slots[count // 2] = num_rows
    keys, entries, run_begins, pieces, counts = (
        t.cpu().numpy() for t in torch.ops.ultramem.table_group(slots, num_rows)
    )
    unsigned = slots.cpu().numpy().astype(np.int64) & 0xFFFFFFFF
    clamped = np.minimum(unsigned, num_rows)
    np.testing.assert_array_equal(entries, np.argsort(clamped, kind="stable"))
    np.testing.assert_array_equal(keys, np.sort(clamped))
    _, begins = np.unique(keys, return_index=True)
    valid = int((clamped < num_rows).sum())
    begins = begins[begins < valid]
    assert counts[0] == begins.size
    np.testing.assert_array_equal(run_begins[: counts[0] + 1], [*begins, valid])
    if device == "cuda":  # the kernels of the CPU find the pieces by themselves
        sizes = -(-np.diff([*begins, valid]) // 64)
        wanted = [(run, i) for run, size in enumerate(sizes) if size > 1 for i in range(size)]
        assert sorted(map(tuple, pieces[: counts[1]])) == wanted


def test_no_entries(device: str) -> None:
    """A norm of zero, and a step that counts but moves nothing."""
    ultramem = torch.ops.ultramem
    grouping = ultramem.table_group(torch.zeros(0, dtype=torch.int32, device=device), 50)
    factors = (torch.zeros(0, 1, device=device), None, torch.zeros(0, 1, 16, device=device), 4)
    assert ultramem.table_grad_sum_sq(*grouping, *factors, 50).item() == 0.0
    weight = Data(3, device).normal(50, 16)
    before, step = weight.clone(), torch.zeros((), device=device)
    scalars = (None, None, None, None, 0.1, 0.9, 0.99, 1e-8, 0.0, False, 0, 0)
    ultramem.table_update(
        "sgd", weight, None, None, None, None, step, None, None, *grouping, *factors, *scalars
    )
    assert torch.equal(weight, before)
    assert step.item() == 1.0


@pytest.mark.parametrize("num_rows", [0, 2**32])
def test_rows_are_bounded(device: str, num_rows: int) -> None:
    slots = torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="num_rows must be in 1"):
        torch.ops.ultramem.table_group(slots, num_rows)


def test_slots_are_checked(device: str) -> None:
    with pytest.raises(RuntimeError, match="slots must be int32"):
        torch.ops.ultramem.table_group(torch.zeros(3, dtype=torch.int64, device=device), 4)
