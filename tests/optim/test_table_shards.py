"""Optimizer steps on shards of a table, by rows and by columns: those of the whole, to the last
bit; and the sums of squares that Adagrad's need."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from factor_cases import NOWHERE, deferred_table, dense_gradients, fill
from helpers import Data, accumulation_dtype, array
from torch import Tensor

KINDS = ["adam", "adagrad", "sgd"]
ROWS, DIM = 21, 48
# By columns also at what is no multiple of eight, the columns of one draw of random numbers.
ROW_CUTS, COLUMN_CUTS = (0, 6, 7, 21), (0, 24, 37, 48)


@dataclasses.dataclass
class Gradient:
    """Factors of a table's gradient, or a dense one."""

    slots: Tensor | None
    weights: Tensor
    groups: Tensor | None
    source: Tensor
    num_selected: int

    @staticmethod
    def drawn(data: Data, dtype: torch.dtype, *, dense: bool = False, dim: int = DIM) -> Gradient:
        """Rows of all lengths of runs: few entries, and more than are summed at once."""
        if dense:
            grad = data.normal(ROWS, dim, dtype=accumulation_dtype(dtype))
            return Gradient(None, grad, None, grad, 0)
        table = deferred_table(data, ROWS, dim, dtype=dtype)
        slots = data.integers(ROWS - 5, 300)
        slots[:140] = 3
        slots[::11] = NOWHERE
        fill(table, data, 100, 3, cores=1, groups=2, slots=slots, scale=0.1)
        f = table.factors
        return Gradient(f.slots, f.weights, f.groups, f.grad_outs, 3)

    def shard(self, rows: slice, columns: slice) -> Gradient:
        source = self.source[..., columns].contiguous()
        if self.slots is None:
            return dataclasses.replace(self, source=source[rows].contiguous())
        slots = self.slots - rows.start
        here = (slots >= 0) & (slots < rows.stop - rows.start)
        slots = torch.where(here, slots, NOWHERE)
        return dataclasses.replace(self, slots=slots, source=source)

    def grouped(self, num_rows: int) -> tuple[Any, ...]:
        assert self.slots is not None
        grouping = torch.ops.ultramem.table_group(self.slots, num_rows)
        return (*grouping, self.weights, self.groups, self.source, self.num_selected)

    def row_sq(self, num_rows: int) -> Tensor:
        if self.slots is None:
            return self.source.square().sum(1)
        result: Tensor = torch.ops.ultramem.table_grad_row_sq(*self.grouped(num_rows), num_rows)
        return result

    def arguments(self, num_rows: int) -> tuple[Any, ...]:
        """grad to num_selected of table_update."""
        if self.slots is None:
            return (self.source, *[None] * 8, 0)
        return (None, *self.grouped(num_rows))


def state_of(
    data: Data, kind: str, dtype: torch.dtype, state_dtype: torch.dtype, dim: int = DIM
) -> dict[str, Tensor | None]:
    """weight, master, exp_avg, exp_avg_sq, row_sum of a table that has been trained."""
    acc = accumulation_dtype(dtype)
    adam = kind == "adam"
    return {
        "weight": data.normal(ROWS, dim, dtype=dtype),
        "master": None,
        "exp_avg": data.normal(ROWS, dim, dtype=state_dtype) if adam else None,
        "exp_avg_sq": data.normal(ROWS, dim, dtype=state_dtype).square() if adam else None,
        "row_sum": data.normal(ROWS, dtype=acc).square() if kind == "adagrad" else None,
    }


def update(
    kind: str,
    state: dict[str, Tensor | None],
    gradient: Gradient,
    *shard: Any,
    grad_scale: float | None = None,
    loss_scale: float | None = None,
    stochastic: bool = True,
) -> None:
    """Three steps, in place; `shard` is first_row to row_columns."""
    weight = state["weight"]
    assert weight is not None

    def scalar(x: float | None) -> Tensor | None:
        return None if x is None else torch.tensor(x, device=weight.device)

    step = torch.zeros((), device=weight.device)
    scalars = (None, scalar(grad_scale), scalar(loss_scale), None)
    options = (0.05, 0.9, 0.99, 1e-3, 0.1, stochastic, 7, 2)
    for _ in range(3):
        torch.ops.ultramem.table_update(
            *(kind, *state.values(), step, None, *gradient.arguments(weight.shape[0])),
            *(*scalars, *options, *shard),
        )


def cut(state: dict[str, Tensor | None], rows: slice, columns: slice) -> dict[str, Tensor | None]:
    return {
        name: None if x is None else (x[rows, columns] if x.dim() == 2 else x[rows]).clone()
        for name, x in state.items()
    }


def slices(cuts: tuple[int, ...]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def check_equal(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    for name, x in wanted.items():
        y = got[name]
        if x is not None:
            assert y is not None
            assert torch.equal(x, y), name


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_rows(device_dtype: tuple[str, torch.dtype], kind: str, dense: bool) -> None:
    device, dtype = device_dtype
    data = Data(1, device)
    gradient = Gradient.drawn(data, dtype, dense=dense)
    narrow = dtype in (torch.bfloat16, torch.float16)
    state_dtype = torch.bfloat16 if narrow else accumulation_dtype(dtype)
    whole = state_of(data, kind, dtype, state_dtype)
    before = cut(whole, slice(None), slice(None))
    update(kind, whole, gradient)
    every = slice(0, DIM)
    for rows in slices(ROW_CUTS):
        part = cut(before, rows, every)
        update(kind, part, gradient.shard(rows, every), rows.start)
        check_equal(part, cut(whole, rows, every))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_columns(device_dtype: tuple[str, torch.dtype], kind: str, dense: bool) -> None:
    device, dtype = device_dtype
    data = Data(2, device)
    gradient = Gradient.drawn(data, dtype, dense=dense)
    narrow = dtype in (torch.bfloat16, torch.float16)
    state_dtype = torch.bfloat16 if narrow else accumulation_dtype(dtype)
    whole = state_of(data, kind, dtype, state_dtype)
    before = cut(whole, slice(None), slice(None))
    sums = (gradient.row_sq(ROWS), DIM) if kind == "adagrad" else ()
    update(kind, whole, gradient, 0, 0, *sums)
    every = slice(0, ROWS)
    for columns in slices(COLUMN_CUTS):
        part = cut(before, every, columns)
        update(kind, part, gradient.shard(every, columns), 0, columns.start, *sums)
        check_equal(part, cut(whole, every, columns))


def test_a_shard_of_both(device: str) -> None:
    """Rows and columns, with cores, of which the shard has one's slice."""
    data = Data(3, device)
    table = deferred_table(data, ROWS, DIM, dtype=torch.bfloat16)
    fill(table, data, 40, 3, cores=2, source=torch.bfloat16)
    f = table.factors
    gradient = Gradient(f.slots, f.weights, None, f.grad_outs, 3)
    whole = state_of(data, "sgd", torch.bfloat16, torch.float32)
    before = cut(whole, slice(None), slice(None))
    update("sgd", whole, gradient)
    rows, columns = slice(5, 16), slice(24, 48)
    part = cut(before, rows, columns)
    shard = gradient.shard(rows, columns)
    shard.weights = f.weights[:, 1:].contiguous()
    update("sgd", part, shard, 5, 24)
    check_equal(part, cut(whole, rows, columns))


@pytest.mark.parametrize("first", [(1, 0), (0, 8), (0, 1)])
def test_the_random_numbers_are_the_shards_own(device: str, first: tuple[int, int]) -> None:
    """That the offsets matter: without them the same numbers would be drawn again."""
    data = Data(4, device)
    gradient = Gradient.drawn(data, torch.bfloat16)
    state = state_of(data, "sgd", torch.bfloat16, torch.float32)
    other = cut(state, slice(None), slice(None))
    update("sgd", state, gradient)
    update("sgd", other, gradient, *first)
    assert state["weight"] is not None
    assert other["weight"] is not None
    assert not torch.equal(state["weight"], other["weight"])


# ---- sums of squares -----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 7, 8, 48, 200, 1000])
def test_row_squares(device_dtype: tuple[str, torch.dtype], dim: int) -> None:
    """In the order of the runs, zero behind them."""
    device, dtype = device_dtype
    data = Data(5, device)
    table = deferred_table(data, 500, dim, dtype=dtype)
    drawn = data.integers(400, 150).cpu()
    slots = torch.cat([drawn, torch.full((120,), 33), torch.tensor([NOWHERE])])
    fill(table, data, 271, 1, slots=slots)
    f = table.factors
    gradient = Gradient(f.slots, f.weights, None, f.grad_outs, 1)
    row_sq = gradient.row_sq(500)
    touched = np.unique(slots.numpy()[:-1])
    assert row_sq.shape == (271,)
    assert row_sq.dtype == accumulation_dtype(dtype)
    assert not row_sq[len(touched) :].any()
    expected = (dense_gradients(table)["values"] ** 2).sum(1)[touched]
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(array(row_sq)[: len(touched)], expected, rtol=bound)
    assert torch.equal(row_sq, gradient.row_sq(500))


def test_row_squares_of_columns_add_up(device: str) -> None:
    gradient = Gradient.drawn(Data(6, device), torch.float32)
    every = slice(0, ROWS)
    parts = [gradient.shard(every, columns).row_sq(ROWS) for columns in slices(COLUMN_CUTS)]
    torch.testing.assert_close(torch.stack(parts).sum(0), gradient.row_sq(ROWS))


@pytest.mark.parametrize("scales", [{}, {"grad_scale": 0.3, "loss_scale": 1024.0}], ids=str)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dim", [48, 21])
def test_given_or_not(device: str, dim: int, dense: bool, scales: dict[str, float]) -> None:
    """The step multiplies by the square of the scales, and its own sums are the same."""
    data = Data(7, device)
    gradient = Gradient.drawn(data, torch.float32, dense=dense, dim=dim)
    own = state_of(data, "adagrad", torch.float32, torch.float32, dim)
    given = cut(own, slice(None), slice(None))
    update("adagrad", own, gradient, **scales)
    update("adagrad", given, gradient, 0, 0, gradient.row_sq(ROWS), 0, **scales)
    for name in ("weight", "row_sum"):
        torch.testing.assert_close(given[name], own[name], rtol=1e-5, atol=1e-6)


def test_squares_of_a_tiny_scale(device: str) -> None:
    """Whose own square is no float32."""
    data = Data(8, device)
    gradient = Gradient.drawn(data, torch.float32, dense=True)
    state = state_of(data, "adagrad", torch.float32, torch.float32)
    row_sum = torch.zeros(ROWS, device=device)
    state["row_sum"] = row_sum
    sums = torch.full((ROWS,), 2.0**126, device=device)
    update("adagrad", state, gradient, 0, 0, sums, 64, grad_scale=2.0**-76)
    assert torch.equal(row_sum, torch.full_like(row_sum, 3 * 2.0 ** (126 - 152 - 6)))


def test_no_entries(device: str) -> None:
    slots = torch.zeros(0, dtype=torch.int32, device=device)
    empty = torch.zeros(0, 1, device=device)
    gradient = Gradient(slots, empty, None, torch.zeros(0, 1, 8, device=device), 4)
    assert gradient.row_sq(50).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("first_column", [3, 8])
@pytest.mark.parametrize("dim", [21, 48, 1000])
def test_cuda_has_the_same_bits(dim: int, first_column: int) -> None:
    on_cpu = Gradient.drawn(Data(9), torch.float32, dim=dim)
    on_cuda = Gradient.drawn(Data(9, "cuda"), torch.float32, dim=dim)
    sums = on_cpu.row_sq(ROWS)
    assert torch.equal(on_cuda.row_sq(ROWS).cpu(), sums)
    states = [state_of(Data(10, d), "adagrad", torch.bfloat16, torch.float32, dim) for d in
              ("cpu", "cuda")]  # fmt: skip
    update("adagrad", states[0], on_cpu, 100, first_column, sums, 2 * dim)
    update("adagrad", states[1], on_cuda, 100, first_column, sums.cuda(), 2 * dim)
    check_equal({n: None if x is None else x.cpu() for n, x in states[1].items()}, states[0])


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shard", "message"),
    [
        ("sgd", (-1,), "first_row"),
        ("sgd", (2**32 - 2 - ROWS + 1,), "first_row"),
        ("sgd", (0, -8), "columns must end below"),
        ("sgd", (0, 2**31 - DIM), "columns must end below"),
        ("sgd", (0, 0, "sums", DIM), "row_sq is Adagrad's"),
        ("adagrad", (0, 0, None, DIM), "row_columns needs row_sq"),
        ("adagrad", (0, 0, "sums", DIM - 1), "row_columns must be 0 or at least"),
        ("adagrad", (0, 0, "short", DIM), r"row_sq must be \[min\(n, N\)\] = \[21\], got \[20\]"),
        ("adagrad", (0, 0, "double", DIM), "row_sq must be float32, got float64"),
    ],
)
def test_bad_shards_raise(device: str, kind: str, shard: tuple[Any, ...], message: str) -> None:
    data = Data(11, device)
    gradient = Gradient.drawn(data, torch.float32)
    sums = gradient.row_sq(ROWS)
    named = {"sums": sums, "short": sums[1:], "double": sums.double()}
    state = state_of(data, kind, torch.float32, torch.float32)
    before = cut(state, slice(None), slice(None))
    with pytest.raises(RuntimeError, match=f"table_update: .*{message}"):
        update(
            kind, state, gradient, *(named.get(x, x) if isinstance(x, str) else x for x in shard)
        )
    check_equal(state, before)
