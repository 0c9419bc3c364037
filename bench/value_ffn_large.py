"""The section `large` of `bench.value_ffn`: a table of 20e9 elements, right and timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ultramem_cuda import MemoryTable
from ultramem_cuda.optim import MemoryAdagrad
from ultramem_cuda.profiling.timing import Candidate

from .report import Row
from .retrieval_cases import FWD, Settings
from .shapes import SHAPES, SMOKE, Shape
from .value_ffn_cases import (
    DEFERRED,
    Problem,
    factors_of,
    make_problem,
    make_table,
)

ELEMENTS = 20_000_000_000
# Element numbers that 32-bit arithmetic goes wrong beyond.
BORDERS = (1 << 31, 1 << 32, 1 << 33)
SMOKE_BORDERS = (1 << 10, 1 << 12)
LEARNING_RATE, EPS = 1e-2, 1e-10
# Of a bfloat16 number rounded to nearest, twice over; and of sums in float32.
ROUNDING, ABSOLUTE = 2.0**-8, 1e-6


def large_shape() -> Shape:
    """Rows and tokens as at shape M, with slots from anywhere in a table of 20e9 elements."""
    base = SHAPES["M"]
    num_slots = ELEMENTS // (base.value_dim + base.pre_value_dim)
    return dataclasses.replace(
        base, name="20e9", num_slots=num_slots, num_keys=int(num_slots**0.5) + 1
    )


def border_rows(shape: Shape, borders: Sequence[int]) -> list[int]:
    """The first row, the last, and those around each border in either table."""
    rows = {0, shape.num_slots - 1}
    for dim in (shape.value_dim, shape.pre_value_dim):
        for border in borders:
            rows |= {border // dim + step for step in (-1, 0, 1)}
    return sorted(row for row in rows if row < shape.num_slots)


def large_rows(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Row]:
    """Forward, deferred backward and an Adagrad step, checked first."""
    borders = SMOKE_BORDERS if shape == SMOKE else BORDERS
    table = make_table(shape, settings)
    inputs = settings.inputs()
    marked = torch.tensor(border_rows(shape, borders), device=settings.device)
    problem = make_problem(shape, table, "uniform", inputs)
    # Every token reads one of the rows, the others are anywhere.
    tokens = torch.arange(shape.num_tokens, device=settings.device)
    problem.indices[tokens, tokens % shape.selected] = marked[tokens % len(marked)]

    wrong += [f"large, {message}" for message in misread(table, problem)]
    optimizer = MemoryAdagrad(
        table.parameters(), lr=LEARNING_RATE, eps=EPS, stochastic_rounding=False
    )
    factors = factors_of(table)
    pre_activation = problem.forward()[1]
    problem.backward_deferred(pre_activation, factors)
    wrong += [f"large, {message}" for message in misstepped(table, optimizer, marked)]

    def forget_grouping() -> None:
        factors.step_cache = None

    sizes = {
        "elements": sum(parameter.numel() for parameter in table.parameters()),
        "num_slots": shape.num_slots,
        "rows": torch.unique(factors.slots).numel(),
    }
    forget_grouping()
    steps = settings.times({"ours": Candidate(lambda: optimizer.step(), forget_grouping)})
    factors.clear()
    for what, candidate in (
        (FWD, Candidate(problem.forward)),
        (
            DEFERRED,
            Candidate(partial(problem.backward_deferred, pre_activation, factors), factors.clear),
        ),
    ):
        yield Row(shape.name, what, settings.times({"ours": candidate}), sizes=sizes)
    yield Row(shape.name, "MemoryAdagrad, step, one layer", steps, sizes=sizes)


def misread(table: MemoryTable, problem: Problem) -> list[str]:
    """What the operators read from the table other than torch's indexing does, to the last bit.

    pre_input and grad have a single one a token, and a single slot a token has scores, which are
    one: no sum has a second term, and products of two bfloat16 numbers are exact in float32.
    """
    indices = problem.indices
    values, pre_values = problem.values, problem.pre_values
    num_tokens, selected = indices.shape
    tokens = torch.arange(num_tokens, device=indices.device)
    mark = tokens % selected
    column, pre_column = (7 * tokens) % values.shape[1], tokens % pre_values.shape[1]

    scores, x, grad = (
        torch.zeros_like(t) for t in (problem.scores, problem.pre_input, problem.grad)
    )
    scores[tokens, mark] = 1.0
    x[tokens, pre_column] = 1.0
    grad[tokens, column] = 1.0
    exact = dataclasses.replace(problem, scores=scores, pre_input=x, grad=grad)
    out, a = exact.forward()
    factors = factors_of(table)
    factors.clear()
    grad_scores, grad_pre_input = exact.backward_deferred(a, factors)

    rows = indices[tokens, mark]
    value_rows, pre_value_rows = values[rows].float(), pre_values[rows].float()
    expected_a = pre_values[indices, pre_column[:, None]].float()
    dot = values[indices, column[:, None]].float()
    expected_grad = torch.zeros_like(grad_scores)
    core = column // (values.shape[1] // scores.shape[2])
    expected_grad[tokens, :, core] = expected_a * dot
    marked_a, marked_dot = expected_a[tokens, mark], dot[tokens, mark]
    weights = torch.zeros_like(scores)
    weights[tokens, mark] = marked_a[:, None]
    grad_a = torch.zeros_like(a)
    grad_a[tokens, mark] = marked_dot
    pairs: dict[str, tuple[Tensor, Tensor | None]] = {
        "pre-activations": (expected_a, a),
        "out": ((marked_a[:, None] * value_rows).to(out.dtype), out),
        "grad_scores": (expected_grad, grad_scores),
        "grad_pre_input": ((marked_dot[:, None] * pre_value_rows).to(out.dtype), grad_pre_input),
        "slots": (indices.flatten(), factors.slots.long() & 0xFFFFFFFF),
        "weights": (weights.flatten(0, 1), factors.weights),
        "grad_a": (grad_a.flatten(), factors.grad_a),
    }
    found = [
        f"{name}: not those of the rows that torch reads"
        for name, (expected, ours) in pairs.items()
        if ours is None or not torch.equal(expected, ours)
    ]
    # torch's gathers against its views, which are pointers.
    for row, value_row in zip(rows.unique().tolist(), values[rows.unique()], strict=True):
        if not torch.equal(value_row, values[row]):
            found.append(f"row {row}: torch gathers another")
    factors.clear()
    return found


def misstepped(table: MemoryTable, optimizer: MemoryAdagrad, marked: Tensor) -> list[str]:
    """Does a first Adagrad step; what of the marked rows it left otherwise than float64 does.

    Their neighbours that have no gradient must not change.
    """
    factors = factors_of(table)
    slots = factors.slots.long() & 0xFFFFFFFF
    near = torch.cat([marked - 2, marked + 2]).clamp(0, table.num_slots - 1)
    near = near[~torch.isin(near, slots)]
    parameters = {"values": table.values.detach()}
    if table.pre_values is not None:
        parameters["pre_values"] = table.pre_values.detach()
    before = {name: (p[marked], p[near]) for name, p in parameters.items()}
    optimizer.step()
    found = []
    for i, row in enumerate(marked.tolist()):
        entries = (slots == row).nonzero()[:, 0]
        for name, gradient in _gradients(table, entries).items():
            old, new = before[name][0][i].double(), parameters[name][row].double()
            rate = LEARNING_RATE / (gradient.square().mean().sqrt() + EPS)
            expected = old - rate * gradient
            error = (new - expected).abs() - ROUNDING * expected.abs()
            if torch.equal(new, old) or not error.max() <= ABSOLUTE:
                found.append(f"step: {name}, row {row}: not as in float64")
    for name, p in parameters.items():
        if not torch.equal(p[near], before[name][1]):
            found.append(f"step: {name}: rows without a gradient changed")
    return found


def _gradients(table: MemoryTable, entries: Tensor) -> dict[str, Tensor]:
    """Of one row in float64, from the factors of its entries."""
    factors = factors_of(table)
    tokens = entries // factors.num_selected
    weights = factors.weights[entries].double()
    rows = factors.grad_outs[tokens, 0].double().unflatten(1, (weights.shape[1], -1))
    found = {"values": (weights[:, :, None] * rows).sum(0).flatten()}
    if factors.grad_a is not None and factors.pre_inputs is not None:
        terms = factors.grad_a[entries].double()[:, None] * factors.pre_inputs[tokens].double()
        found["pre_values"] = terms.sum(0)
    return found
