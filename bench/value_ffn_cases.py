"""What `bench.value_ffn` runs: inputs, peers, floors and the rows of each section."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ultramem_cuda import GradientFactors, MemoryTable
from ultramem_cuda.optim import MemoryAdagrad, MemoryAdam, MemorySGD, clip_grad_norm_
from ultramem_cuda.profiling import traffic
from ultramem_cuda.profiling.timing import Candidate, Timing

from . import eager
from . import ops as bench_ops
from .report import Quantity, Row
from .retrieval_cases import DTYPE, FWD, Settings, is_standard, release_memory
from .shapes import DISTRIBUTIONS, Shape, draw_slots

DENSE, DEFERRED = "bwd, main_grad", "bwd, deferred"
ONE = "one"
SLOTS = (*DISTRIBUTIONS, ONE)

TABLE_US: dict[tuple[str, str], dict[str, float]] = {
    (FWD, "uniform"): {"S": 95.0, "B": 225.0, "M": 950.0},
    (DENSE, "uniform"): {"S": 400.0, "B": 1000.0, "M": 4200.0},
    (DENSE, "zipf"): {"S": 280.0, "B": 700.0},
    (DEFERRED, "uniform"): {"S": 115.0, "B": 250.0, "M": 1080.0},
}
# Time with uniform slots over the time with these.
UNIFORM_RATIO = {"zipf": 1.0, ONE: 1 / 3}
GATHER_RATIO = 0.92
STEP_FLOOR_RATIO = 1.5

# Layers that share the table.
LAYERS = {"S": 20, "M": 16}
SMOKE_LAYERS = 2
BANDWIDTH = 3.0e12
STEP_FLOOR = (
    "bytes at 3.0 TB/s: touched rows * (Dv + Dp) * 2 * (2 + bytes of states an element) "
    "+ touched rows * 2 tables * 2 * bytes of states a row (weights and states read and written "
    "once) + entries * ((Dv + Dp) * 2 + 8 + 4C) (factors gathered) + entries * 48 (keys and "
    "entries, 8 bytes, sorted in 3 passes, one for each 8 bits of N, each read and written); with "
    "clipping + entries * (Dv + "
    "Dp) * 2 (gathered once more, for the norm must be known before the first row is changed)"
)
# Of a parameter that torch's fused optimizer updates; the table is given to it in such parts.
_PART_ELEMENTS = 1 << 30
_CHECKED_TOKENS = 256

# activation, window, offset, expand, shuffle, num_keys, seed, sum_groups
_OPTIONS = ("identity", 0, 0, 1, "none", 0, 0, True)


# ---- inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The arguments of value_ffn for one layer's tokens, and the raw operators on them."""

    indices: Tensor  # [T, S]
    scores: Tensor  # [T, S, C]
    values: Tensor  # [N, Dv]
    pre_values: Tensor  # [N, Dp]
    pre_input: Tensor  # [T, Dp]
    grad: Tensor  # [T, Dv]

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.indices, self.scores, self.values, self.pre_values, self.pre_input

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.values, self.pre_values

    def forward(self) -> tuple[Tensor, Tensor]:
        """out, and the pre-activations that the backward needs."""
        return torch.ops.ultramem.value_ffn(*self.arguments, *[None] * 5, *_OPTIONS)

    def backward_dense(self, pre_activation: Tensor) -> tuple[Tensor, ...]:
        """Gradients of scores, pre_input, values and pre_values."""
        return torch.ops.ultramem.value_ffn_bwd(
            self.grad, *self.arguments, pre_activation, None, None, *_OPTIONS, True, True
        )

    def backward_main_grad(
        self, pre_activation: Tensor, main_grads: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of scores and pre_input; the tables' are added to main_grads."""
        return torch.ops.ultramem.value_ffn_bwd_main_grad(
            self.grad, *self.arguments, pre_activation, None, *_OPTIONS, *main_grads
        )

    def backward_deferred(
        self, pre_activation: Tensor, factors: GradientFactors
    ) -> tuple[Tensor, Tensor]:
        """Gradients of scores and pre_input; the factors of the tables' are appended."""
        return torch.ops.ultramem.value_ffn_bwd_deferred(
            self.grad, *self.arguments, pre_activation, None, None, *_OPTIONS, factors.arena
        )


def draw(slots: str, shape: Shape, inputs: bench_ops.Inputs) -> Tensor:
    """Rows of the layer's window [T, S]; "one": the same for all."""
    if slots == ONE:
        size = (shape.num_tokens, shape.selected)
        return torch.full(size, 5, dtype=torch.int64, device=inputs.device)
    return draw_slots(slots, shape, inputs.generator)


def make_problem(shape: Shape, table: MemoryTable, slots: str, inputs: bench_ops.Inputs) -> Problem:
    assert table.pre_values is not None
    size = (shape.num_tokens, shape.selected, shape.num_cores)
    return Problem(
        draw(slots, shape, inputs),
        inputs.normal(*size, dtype=inputs.accumulation),
        table.values.detach(),
        table.pre_values.detach(),
        inputs.normal(shape.num_tokens, shape.pre_value_dim),
        inputs.normal(shape.num_tokens, shape.value_dim),
    )


def make_table(shape: Shape, settings: Settings, layers: int = 1) -> MemoryTable:
    """With deferred gradients, and room for the factors of so many layers."""
    torch.manual_seed(settings.seed)
    table = MemoryTable(
        shape.num_slots,
        shape.value_dim,
        shape.pre_value_dim,
        dtype=DTYPE,
        device=settings.device,
        grad_mode="deferred",
    )
    factors_of(table).reserve(
        layers * shape.num_tokens,
        num_selected=shape.selected,
        num_cores=shape.num_cores,
        dtype=DTYPE,
    )
    return table


def factors_of(table: MemoryTable) -> GradientFactors:
    assert table.factors is not None
    return table.factors


def num_layers(shape: Shape) -> int:
    return LAYERS.get(shape.name, SMOKE_LAYERS)


def layer_slots(slots: str, shape: Shape, inputs: bench_ops.Inputs) -> Iterator[Tensor]:
    """Rows of the layers that share a table: their windows start at equal steps and wrap around."""
    layers = num_layers(shape)
    for layer in range(layers):
        offset = layer * (shape.num_slots // layers)
        yield (draw(slots, shape, inputs) + offset) % shape.num_slots


def fill(table: MemoryTable, shape: Shape, slots: str, inputs: bench_ops.Inputs) -> None:
    """The factors of all layers that share the table."""
    factors = factors_of(table)
    factors.clear()
    problem = make_problem(shape, table, slots, inputs)
    for indices in layer_slots(slots, shape, inputs):
        layer = dataclasses.replace(problem, indices=indices)
        layer.backward_deferred(layer.forward()[1], factors)
    factors.check()


def relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- table: the operator -------------------------------------------------------------------------


def table_rows(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Row]:
    """Forward and both backwards by raw operators, uniform, Zipf(1) and all slots the same."""
    inputs = settings.inputs()
    table = make_table(shape, settings)
    factors = factors_of(table)
    base = make_problem(shape, table, "uniform", inputs)
    problems = {"uniform": base}
    for slots in SLOTS[1:]:
        problems[slots] = dataclasses.replace(base, indices=draw(slots, shape, inputs))
    saved = {slots: problem.forward()[1] for slots, problem in problems.items()}
    main_grads = [torch.zeros_like(t, dtype=torch.float32) for t in base.tables]
    for slots, problem in problems.items():
        name = f"{shape.name}, {slots}"
        wrong += _disagreements(name, problem, saved[slots], main_grads, factors)

    forward = {slots: Candidate(problem.forward) for slots, problem in problems.items()}
    gathers = {}
    for slots in DISTRIBUTIONS:
        gather = best_gather(settings, problems[slots], wrong)
        if gather is not None:
            gathers[f"gather {slots}"] = gather
    dense = {
        slots: Candidate(partial(problem.backward_main_grad, saved[slots], main_grads))
        for slots, problem in problems.items()
    }
    deferred = {
        slots: Candidate(partial(problem.backward_deferred, saved[slots], factors), factors.clear)
        for slots, problem in problems.items()
    }
    for what, candidates in ((FWD, forward | gathers), (DENSE, dense), (DEFERRED, deferred)):
        timings = settings.times(candidates)
        for slots in SLOTS:
            yield table_row(shape, what, slots, timings)


def table_row(shape: Shape, what: str, slots: str, timings: dict[str, Timing]) -> Row:
    """One line of a pass whose timings are by slots and, of the gathers, "gather " and slots."""
    row_bytes = shape.num_tokens * shape.selected * (shape.value_dim + shape.pre_value_dim) * 2
    found = {"ours": timings[slots]} if slots in timings else {}
    peers: list[str] = []
    targets: dict[str, float] = {}
    note = ""
    if slots != "uniform":
        peers.append("uniform")
        targets["uniform"] = UNIFORM_RATIO[slots]
        if "uniform" in timings:
            found["uniform"] = timings["uniform"]
    if what == FWD and slots in timings:
        note = f"{row_bytes / timings[slots].median_ms / 1e9:.2f} TB/s"
    gather = timings.get(f"gather {slots}")
    if gather is not None:
        peers.append("gather")
        found["gather"] = gather
        if slots == "uniform":
            targets["gather"] = GATHER_RATIO
        note += f", gather {row_bytes / gather.median_ms / 1e9:.2f} TB/s"
    elif what == FWD and slots != ONE:
        note += ", no gather: no Triton"
    standard = is_standard(shape)
    return Row(
        shape.name,
        f"{what}, {slots}",
        found,
        tuple(peers),
        TABLE_US.get((what, slots), {}).get(shape.name) if standard else None,
        targets if standard else {},
        {"row_bytes": row_bytes},
        note,
    )


def _disagreements(
    name: str,
    problem: Problem,
    pre_activation: Tensor,
    main_grads: Sequence[Tensor],
    factors: GradientFactors,
) -> list[str]:
    """Where the first tokens' output is not eager's, or the two backwards differ."""
    tokens = slice(_CHECKED_TOKENS)
    first = dataclasses.replace(
        problem,
        indices=problem.indices[tokens],
        scores=problem.scores[tokens],
        pre_input=problem.pre_input[tokens],
    )
    expected = eager.value_ffn(*first.arguments)
    limit = bench_ops.AGREEMENT[DTYPE]
    found = []
    # Not >, which a NaN passes.
    if not relative_distance(problem.forward()[0][tokens], expected) <= limit:
        found.append(f"value_ffn, {name}: ours and eager differ")
    dense = problem.backward_main_grad(pre_activation, main_grads)
    deferred = problem.backward_deferred(pre_activation, factors)
    factors.clear()
    if not all(relative_distance(a, b) <= limit for a, b in zip(dense, deferred, strict=True)):
        found.append(f"value_ffn, {name}: the backwards into main_grad and factors differ")
    return found


def best_gather(settings: Settings, problem: Problem, wrong: list[str]) -> Candidate | None:
    """The fastest Triton gather of the problem's rows; None where Triton is missing."""
    try:
        from . import triton_gather
    except ImportError:
        return None
    few = dataclasses.replace(settings, warmup=1, repeats=min(settings.repeats, 5))
    candidates = {
        name: Candidate(run)
        for name, run in triton_gather.gathers(problem.indices, *problem.tables).items()
    }
    try:
        timings = few.times(candidates)
    except Exception as error:  # Triton has many of its own, and needs a C compiler
        wrong.append(f"gather: {error}")
        return None
    best = min(timings, key=lambda name: timings[name].median_ms)
    sums = candidates[best].run()
    assert isinstance(sums, tuple)
    tokens = slice(_CHECKED_TOKENS)
    for ours, rows in zip(sums, problem.tables, strict=True):
        expected = rows[problem.indices[tokens]].double().sum(1)
        if not relative_distance(ours[tokens], expected) <= 1e-4:
            wrong.append(f"gather, {best}: not the sums of the rows")
    return candidates[best]


# ---- step: the optimizers ------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerCase:
    make: Callable[..., torch.optim.Optimizer]
    states: traffic.Optimizer
    bytes_target: float | None = None
    """Weights and states, for a parameter of the table."""


OPTIMIZERS = {
    case.states.name: case
    for case in (
        OptimizerCase(partial(MemorySGD, lr=1e-3), traffic.SGD),
        OptimizerCase(partial(MemoryAdagrad, lr=1e-3), traffic.ADAGRAD, 2.1),
        OptimizerCase(partial(MemoryAdam, lr=1e-3, state_dtype=DTYPE), traffic.ADAM_BF16, 6.1),
        OptimizerCase(partial(MemoryAdam, lr=1e-3), traffic.ADAM_FP32),
    )
}


def step_floor_bytes(
    shape: Shape, rows: int, entries: int, case: OptimizerCase, clipped: bool = False
) -> int:
    """Bytes that a step cannot do without, for so many touched rows and retrieved slots.

    The byte model's, with every gathered factor counted; see STEP_FLOOR.
    """
    table = traffic.Table(
        num_slots=shape.num_slots,
        selected=shape.selected,
        value_dim=shape.value_dim,
        pre_value_dim=shape.pre_value_dim,
        num_cores=shape.num_cores,
    )
    recipe = traffic.Recipe(table_optimizer=case.states, clip=clipped)
    return round(traffic.total(table.step_terms(entries, rows, recipe)).upper)


class DenseAdamW:
    """torch.optim.AdamW(fused=True) over whole tables, in parts of at most 2^30 elements."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self._parts = [nn.Parameter(part) for table in tables for part in _split(table.detach())]
        self._optimizer = torch.optim.AdamW(self._parts, lr=1e-3, fused=True)

    def step(self, grads: Sequence[Tensor]) -> None:
        """One step with the gradients of the tables, of their dtype."""
        parts = [part for grad in grads for part in _split(grad)]
        for parameter, grad in zip(self._parts, parts, strict=True):
            parameter.grad = grad
        self._optimizer.step()
        for parameter in self._parts:
            parameter.grad = None


def _split(table: Tensor) -> tuple[Tensor, ...]:
    return table.split(max(_PART_ELEMENTS // table.shape[1], 1))


def alone(
    settings: Settings, name: str, make: Callable[[], Candidate], calls: int = 1
) -> dict[str, Timing]:
    """Times a candidate that exists for that long only; nothing where it does not fit."""
    try:
        return settings.times({name: make()}, calls)
    except torch.OutOfMemoryError:
        return {}
    finally:
        release_memory()


def step_rows(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Row]:
    """Steps after all layers' backwards, against their floor and a dense step."""
    inputs = settings.inputs()
    table = make_table(shape, settings, num_layers(shape))
    dense = alone(settings, "dense", partial(_dense_step, table))
    for slots in DISTRIBUTIONS:
        fill(table, shape, slots, inputs)
        entries = factors_of(table).slots
        counts = {"layers": num_layers(shape), "entries": entries.numel()}
        counts["rows"] = torch.unique(entries).numel()
        for name, case in OPTIMIZERS.items():
            timings = _step_timings(settings, table, case)
            release_memory()
            for what in ("step", "clip + step"):
                ours = {"ours": timings[what]} if what in timings else {}
                label = f"{name}, {what}, {slots}"
                yield step_row(shape, label, ours | dense, counts, case, what != "step")


def step_row(
    shape: Shape,
    what: str,
    timings: dict[str, Timing],
    counts: dict[str, int],
    case: OptimizerCase,
    clipped: bool,
) -> Row:
    """One step; its target is a multiple of its floor."""
    floor_bytes = step_floor_bytes(shape, counts["rows"], counts["entries"], case, clipped)
    floor_us = floor_bytes / BANDWIDTH * 1e6
    note = f"floor {floor_us:.0f} us"
    if "ours" in timings:
        note = f"{timings['ours'].median_ms * 1e3 / floor_us:.2f}x the {note}"
    return Row(
        shape.name,
        what,
        timings,
        ("dense",),
        STEP_FLOOR_RATIO * floor_us if is_standard(shape) else None,
        {},
        {**counts, "floor_bytes": floor_bytes},
        note,
    )


def _step_timings(settings: Settings, table: MemoryTable, case: OptimizerCase) -> dict[str, Timing]:
    optimizer = case.make(table.parameters())
    factors = factors_of(table)

    def step() -> None:
        optimizer.step()

    def clip_and_step() -> None:
        clip_grad_norm_([], 1.0, tables=[table])
        optimizer.step()

    def forget_grouping() -> None:
        factors.step_cache = None

    runs = {"step": step, "clip + step": clip_and_step}
    return settings.times({what: Candidate(run, forget_grouping) for what, run in runs.items()})


def _dense_step(table: MemoryTable) -> Candidate:
    """Zeroing a gradient of the table's size and dtype, and fused AdamW with it."""
    tables = [parameter.detach().clone() for parameter in table.parameters()]
    grads = [torch.zeros_like(t) for t in tables]
    optimizer = DenseAdamW(tables)

    def run() -> None:
        for grad in grads:
            grad.zero_()
        optimizer.step(grads)

    return Candidate(run)


# ---- training: layers and step together ----------------------------------------------------------

TRAINING_OPTIMIZERS = ("MemoryAdam bf16", "MemoryAdagrad")


def forward_backward(
    problems: Sequence[Problem], backward: Callable[[Problem, Tensor], object]
) -> None:
    """All layers' forwards, then their backwards in reverse."""
    saved = [problem.forward()[1] for problem in problems]
    for problem, pre_activation in zip(reversed(problems), reversed(saved), strict=True):
        backward(problem, pre_activation)


def training_rows(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Row]:
    """Forwards, backwards and step, a layer's share, deferred against dense.

    Raw operators: where the host takes longer than the GPU is what the section "layer" shows.
    """
    inputs = settings.inputs()
    layers = num_layers(shape)
    table = make_table(shape, settings, layers)
    problem = make_problem(shape, table, "uniform", inputs)
    problems = [
        dataclasses.replace(problem, indices=indices)
        for indices in layer_slots("uniform", shape, inputs)
    ]
    peers = {
        "main_grad + AdamW": partial(_train_main_grad, problems),
        ".grad + AdamW": partial(_train_grad, problems),
    }
    dense: dict[str, Timing] = {}
    for name, make in peers.items():
        dense |= alone(settings, name, make, layers)
    for name in TRAINING_OPTIMIZERS:
        ours = alone(settings, "ours", partial(_train_deferred, problems, table, name), layers)
        yield Row(
            shape.name,
            f"{name}, a layer of {layers}",
            ours | dense,
            tuple(peers),
            sizes={"layers": layers},
        )


def _train_deferred(problems: Sequence[Problem], table: MemoryTable, name: str) -> Candidate:
    optimizer = OPTIMIZERS[name].make(table.parameters())
    factors = factors_of(table)

    def step() -> None:
        forward_backward(problems, lambda p, a: p.backward_deferred(a, factors))
        optimizer.step()
        optimizer.zero_grad()

    return Candidate(step)


def _train_main_grad(problems: Sequence[Problem]) -> Candidate:
    """Gradients in float32 main_grads; AdamW takes them in the table's dtype."""
    tables = problems[0].tables
    main_grads = [torch.zeros_like(t, dtype=torch.float32) for t in tables]
    grads = [torch.empty_like(t) for t in tables]
    optimizer = DenseAdamW(tables)

    def step() -> None:
        forward_backward(problems, lambda p, a: p.backward_main_grad(a, main_grads))
        for grad, main_grad in zip(grads, main_grads, strict=True):
            grad.copy_(main_grad)
            main_grad.zero_()
        optimizer.step(grads)

    return Candidate(step)


def _train_grad(problems: Sequence[Problem]) -> Candidate:
    """What autograd does without a main_grad: a new dense gradient a layer, all of them added."""
    optimizer = DenseAdamW(problems[0].tables)

    def step() -> None:
        grads: list[Tensor] = []

        def backward(problem: Problem, pre_activation: Tensor) -> None:
            new = problem.backward_dense(pre_activation)[2:]
            if grads:
                for grad, addend in zip(grads, new, strict=True):
                    grad.add_(addend)
            else:
                grads.extend(new)

        forward_backward(problems, backward)
        optimizer.step(grads)

    return Candidate(step)


# ---- state: bytes a parameter --------------------------------------------------------------------

UNIT = "bytes a parameter"


def state_quantities(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Quantity]:
    """Weights and states after a step, for a parameter of the table; scratch and factors apart."""
    table = make_table(shape, settings, num_layers(shape))
    fill(table, shape, "uniform", settings.inputs())
    factors = factors_of(table)
    numel = sum(parameter.numel() for parameter in table.parameters())
    for name, case in OPTIMIZERS.items():
        optimizer = case.make(table.parameters())
        optimizer.step()
        held = sum(p.nbytes for p in table.parameters()) + sum(
            tensor.nbytes for state in optimizer.state.values() for tensor in state.values()
        )
        target = case.bytes_target if is_standard(shape) else None
        yield Quantity(shape.name, f"{name}, weights and states", held / numel, UNIT, target)
        factors.step_cache = None
        if settings.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            optimizer.step()
            scratch = torch.cuda.max_memory_allocated() - before
            yield Quantity(shape.name, f"{name}, scratch of a step", scratch / numel, UNIT)
            factors.step_cache = None
        del optimizer
        release_memory()
    note = f"{num_layers(shape)} layers of {shape.num_tokens} tokens"
    yield Quantity(shape.name, "factors", factors.nbytes / numel, UNIT, None, note)
