"""``python -m bench.ops``: the operators against torch eager, as a table of ratios in one run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem_cuda import _library, ops
from ultramem_cuda.profiling.timing import Candidate, Timing, machine, measure, write_json

from . import eager
from .report import aligned
from .shapes import DISTRIBUTIONS, SHAPES, SMOKE, Shape, draw_slots

OPERATORS = ("tucker_query", "product_key_topk", "value_ffn")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

FWD = "fwd"
FWD_BWD = "fwd+bwd"
INTO_MAIN_GRAD = "fwd+bwd, main_grad"
DENSE_GRAD = "fwd+bwd, new .grad"

# What the CPU kernels are to reach: eager's time over ours at shape "cpu", float32, two threads.
CPU_TARGETS = {
    ("product_key_topk", FWD_BWD): 2.0,
    ("value_ffn", FWD): 3.0,
    ("value_ffn", INTO_MAIN_GRAD): 5.0,
    ("value_ffn", DENSE_GRAD): 1.0,
}

# Relative L2 distance between ours and eager's forward that still counts as the same computation:
# eager rounds scores and weights to 16 bits on the way.
AGREEMENT = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


@dataclass(frozen=True)
class Problem:
    """One operator with its inputs, and the functions that compute it."""

    operator: str
    slots: str
    passes: tuple[str, ...]
    functions: dict[str, Callable[[], Tensor]]
    """By peer name; "ours" and "eager" are always there. They return what is differentiated."""
    leaves: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    """Those of the leaves that can have a main_grad."""
    grad: Tensor
    comparable: Callable[[Tensor], Tensor] = lambda output: output
    """What of the output is the same however near-ties are ordered."""


class Row(NamedTuple):
    """One line of the table."""

    shape: str
    operator: str
    what: str
    slots: str
    timings: dict[str, Timing]
    target: float | None

    def ratio(self, peer: str) -> float | None:
        """The peer's time over ours: how many times as fast ours is."""
        if "ours" not in self.timings or peer not in self.timings:
            return None
        return self.timings[peer].median_ms / self.timings["ours"].median_ms

    def verdict(self) -> str:
        ratio = self.ratio("eager")
        if self.target is None or ratio is None:
            return ""
        return "met" if ratio >= self.target else "missed"

    def record(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "operator": self.operator,
            "pass": self.what,
            "slots": self.slots or None,
            "timings": {name: dataclasses.asdict(t) for name, t in self.timings.items()},
            "ratio": {peer: self.ratio(peer) for peer in self.timings if peer != "ours"},
            "target": self.target,
            "verdict": self.verdict() or None,
        }


# ---- problems ------------------------------------------------------------------------------------


class Inputs:
    """Random tensors of one dtype on one device, from a seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device = device
        self.dtype = dtype
        self.accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = torch.Generator(device).manual_seed(seed)
        self.host_generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        data = torch.empty(size, device=self.device, dtype=dtype or self.dtype)
        return data.normal_(0.0, std, generator=self.generator)

    def uniform(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.rand(size, device=self.device, dtype=dtype, generator=self.generator)


def _tucker_query(shape: Shape, inputs: Inputs) -> Iterator[Problem]:
    rows = 2 * shape.num_heads * shape.tucker_rank * shape.key_dim
    x = inputs.normal(shape.num_tokens, shape.d_model).requires_grad_()
    weight = inputs.normal(rows, shape.d_model, std=shape.d_model**-0.5).requires_grad_()
    gain = torch.ones(shape.key_dim, device=x.device, dtype=x.dtype, requires_grad=True)
    arguments = (x, weight, gain)
    yield Problem(
        "tucker_query",
        "",
        (FWD, FWD_BWD),
        {
            "ours": lambda: ops.tucker_query(*arguments, num_heads=shape.num_heads),
            "eager": lambda: eager.tucker_query(*arguments, num_heads=shape.num_heads),
        },
        arguments,
        (),
        inputs.normal(shape.num_tokens, 2, shape.num_heads, shape.tucker_rank, shape.key_dim),
    )


def _product_key_topk(shape: Shape, inputs: Inputs) -> Iterator[Problem]:
    heads, rank = shape.num_heads, shape.tucker_rank
    query = inputs.normal(shape.num_tokens, 2, heads, rank, shape.key_dim).requires_grad_()
    keys = inputs.normal(
        heads, 2, rank, shape.num_keys, shape.key_dim, std=shape.key_dim**-0.5
    ).requires_grad_()
    core = inputs.uniform(shape.num_cores, heads, rank, rank, dtype=inputs.accumulation)
    core.requires_grad_()
    # Given to both: the filter belongs to another operator, and eager's SVD would flatter ours.
    u, t, _ = ops.tucker_filter(core.detach())
    options = {"topk": shape.topk, "axis_topk": shape.axis_topk, "u": u, "t": t}
    arguments = (query, keys, core)

    def scores_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
        return lambda: function(*arguments, **options)[0]

    yield Problem(
        "product_key_topk",
        "",
        (FWD, FWD_BWD),
        {"ours": scores_of(ops.product_key_topk), "eager": scores_of(eager.product_key_topk)},
        arguments,
        (),
        inputs.normal(
            shape.num_tokens, heads, shape.topk, shape.num_cores, dtype=inputs.accumulation
        ),
        comparable=lambda scores: scores.sum(-1),
    )


def _value_ffn(shape: Shape, inputs: Inputs, distributions: Sequence[str]) -> Iterator[Problem]:
    tokens, selected = shape.num_tokens, shape.selected
    values = inputs.normal(shape.num_slots, shape.value_dim).requires_grad_()
    pre_values = inputs.normal(shape.num_slots, shape.pre_value_dim).requires_grad_()
    pre_input = inputs.normal(tokens, shape.pre_value_dim, std=shape.pre_value_dim**-0.5)
    pre_input.requires_grad_()
    scores = inputs.normal(tokens, selected, shape.num_cores, dtype=inputs.accumulation)
    scores.requires_grad_()
    grad = inputs.normal(tokens, shape.value_dim)
    for distribution in distributions:
        indices = draw_slots(distribution, shape, inputs.host_generator).to(inputs.device)
        arguments = (indices, scores, values, pre_values, pre_input)
        yield Problem(
            "value_ffn",
            distribution,
            (FWD, INTO_MAIN_GRAD, DENSE_GRAD),
            {
                "ours": _call(ops.value_ffn, arguments),
                "eager": _call(eager.value_ffn, arguments),
                "bag": _call(eager.value_ffn_bag, arguments),
            },
            (scores, values, pre_values, pre_input),
            (values, pre_values),
            grad,
        )


def _call(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def problems(
    operator: str, shape: Shape, inputs: Inputs, distributions: Sequence[str]
) -> Iterator[Problem]:
    if operator == "tucker_query":
        return _tucker_query(shape, inputs)
    if operator == "product_key_topk":
        return _product_key_topk(shape, inputs)
    return _value_ffn(shape, inputs, distributions)


# ---- passes --------------------------------------------------------------------------------------


def _candidate(problem: Problem, function: Callable[[], Tensor], what: str) -> Candidate:
    """What is run and timed; gradients are dropped between runs, as an optimizer's zero_grad does.

    Where ours adds to main_grad, a peer does what training with it takes: autograd makes a
    dense .grad, which is then added.
    """
    if what == FWD:

        def forward() -> Tensor:
            with torch.no_grad():
                return function()

        return Candidate(forward)

    def forward_backward() -> None:
        function().backward(problem.grad)
        if what == INTO_MAIN_GRAD:
            for table in problem.tables:
                if table.grad is not None:
                    table.main_grad.add_(table.grad)  # type: ignore[attr-defined]

    def drop_gradients() -> None:
        for leaf in problem.leaves:
            leaf.grad = None

    return Candidate(forward_backward, drop_gradients)


def _set_main_grads(problem: Problem, accumulation: torch.dtype, present: bool) -> None:
    for table in problem.tables:
        if present:
            table.main_grad = torch.zeros_like(table, dtype=accumulation)  # type: ignore[attr-defined]
        elif hasattr(table, "main_grad"):
            del table.main_grad


def disagreement(problem: Problem) -> float:
    """Largest relative L2 distance of a peer's forward from ours."""
    with torch.no_grad():
        ours = problem.comparable(problem.functions["ours"]().double())
        worst = 0.0
        for name, function in problem.functions.items():
            if name == "ours":
                continue
            try:
                theirs = problem.comparable(function().double())
            except torch.OutOfMemoryError:
                continue
            worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


def _with_compiled(problem: Problem) -> Problem:
    """The problem with one more peer: eager under torch.compile."""
    compiled = torch.compile(problem.functions["eager"], dynamic=False)
    return dataclasses.replace(problem, functions={**problem.functions, "compiled": compiled})


def targets_for(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> dict[tuple[str, str], float]:
    """Ratio to reach by (operator, pass); empty where none was set."""
    if device.type == "cpu" and dtype == torch.float32 and shape == SHAPES["cpu"]:
        return CPU_TARGETS
    return {}


def run(arguments: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Measures everything that was asked for; returns the rows and what was wrong."""
    device = torch.device(arguments.device)
    dtype = DTYPES[arguments.dtype]
    rows: list[Row] = []
    wrong: list[str] = []
    for shape in arguments.shapes:
        targets = targets_for(shape, device, dtype)
        for operator in arguments.op:
            inputs = Inputs(device, dtype, arguments.seed)
            for problem in problems(operator, shape, inputs, arguments.slots):
                name = f"{shape.name} {operator} {problem.slots}".strip()
                distance = disagreement(problem)
                # Not `>`: a NaN must not pass for agreement.
                if not distance <= AGREEMENT[dtype]:
                    wrong.append(f"{name}: ours and eager differ by {distance:.1e} (relative L2)")
                if arguments.compile:
                    problem = _with_compiled(problem)
                for what in problem.passes:
                    print(f"  {name}: {what} ...", file=sys.stderr, flush=True)
                    _set_main_grads(problem, inputs.accumulation, what == INTO_MAIN_GRAD)
                    timings = measure(
                        {k: _candidate(problem, f, what) for k, f in problem.functions.items()},
                        device,
                        warmup=arguments.warmup,
                        repeats=arguments.repeats,
                        cold=arguments.cold,
                    )
                    if "ours" not in timings:
                        wrong.append(f"{name}: {what}: ours does not fit in memory")
                    target = targets.get((operator, what))
                    rows.append(Row(shape.name, operator, what, problem.slots, timings, target))
    return rows, wrong


# ---- output --------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows as text: medians with quartiles, in milliseconds."""
    peers = [p for p in ("bag", "compiled") if any(p in row.timings for row in rows)]
    header = ["shape", "operator", "pass", "slots", "ours ms", "eager ms", "ratio", "target", ""]
    for peer in peers:
        header += [f"{peer} ms", "ratio"]
    lines = [header]
    for row in rows:
        line = [row.shape, row.operator, row.what, row.slots]
        line += [_cell(row, "ours"), _cell(row, "eager"), _ratio(row, "eager")]
        line += ["" if row.target is None else f">= {row.target:g}x", row.verdict()]
        for peer in peers:
            absent = peer == "bag" and row.operator != "value_ffn"
            line += ["", ""] if absent else [_cell(row, peer), _ratio(row, peer)]
        lines.append(line)
    return aligned(lines)


def _cell(row: Row, peer: str) -> str:
    if peer not in row.timings:
        return "out of memory"
    timing = row.timings[peer]
    return f"{timing.median_ms:.4g} [{timing.q1_ms:.4g}, {timing.q3_ms:.4g}]"


def _ratio(row: Row, peer: str) -> str:
    ratio = row.ratio(peer)
    return "" if ratio is None else f"{ratio:.2f}x"


def _describe(shape: Shape) -> str:
    return (
        f"shape {shape.name}: T {shape.num_tokens}, D {shape.d_model}, n {shape.num_keys}, "
        f"Kd {shape.key_dim}, R {shape.tucker_rank}, C {shape.num_cores}, H {shape.num_heads}, "
        f"m/M {shape.axis_topk}/{shape.topk}, Dp {shape.pre_value_dim}, Dv {shape.value_dim}, "
        f"N {shape.num_slots}"
    )


# ---- command line --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ops",
        description="Times the operators against torch eager, in turns, and prints the ratios.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, help="default: cpu on the CPU, S on CUDA"
    )
    parser.add_argument("--tokens", type=int, help="T instead of the shape's (drops the targets)")
    parser.add_argument("--slots", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on CUDA"
    )
    parser.add_argument("--compile", action="store_true", help="also eager under torch.compile")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each (default 30)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed runs of each (default 5)")
    parser.add_argument(
        "--cold",
        action=argparse.BooleanOptionalAction,
        help="flush the caches before each run; default: on CUDA only",
    )
    parser.add_argument("--threads", type=int, help="torch's CPU threads; default: torch's choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, 2 repeats: does it run")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    if arguments.device == "cuda" and arguments.dtype == "float64":
        parser.error("--dtype float64 is offered on the CPU only")
    for name in ("tokens", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")

    on_cuda = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ("bfloat16" if on_cuda else "float32")
    arguments.cold = on_cuda if arguments.cold is None else arguments.cold
    names = arguments.shape or ["S" if on_cuda else "cpu"]
    arguments.shapes = [SHAPES[name] for name in names]
    if arguments.smoke:
        arguments.shapes, arguments.repeats, arguments.warmup = [SMOKE], 2, 1
    if arguments.tokens is not None:
        arguments.shapes = [
            dataclasses.replace(shape, num_tokens=arguments.tokens) for shape in arguments.shapes
        ]
    return arguments


def unavailable(device: str) -> str | None:
    """Why nothing can be measured on this device, or None."""
    if not _library.is_loaded():
        return _library.load_error()
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device == "cuda" and not _library.has_cuda_kernels():
        return "this build of ultramem_cuda has no CUDA kernels"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    arguments = parse(argv)
    reason = unavailable(arguments.device)
    if reason is not None:
        print(f"bench.ops: {reason}", file=sys.stderr)
        return 1
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    where = machine(torch.device(arguments.device))
    rows, wrong = run(arguments)

    print("\n".join(f"{key}: {value}" for key, value in where.items()))
    print("\n".join(_describe(shape) for shape in arguments.shapes))
    print(
        f"{arguments.dtype}, {'cold' if arguments.cold else 'warm'} caches, "
        f"median [quartiles] of {arguments.repeats}\n"
    )
    print(table(rows))
    if arguments.json is not None:
        record = {
            "machine": where,
            "dtype": arguments.dtype,
            "cold": arguments.cold,
            "shapes": [dataclasses.asdict(shape) for shape in arguments.shapes],
            "rows": [row.record() for row in rows],
            "wrong": wrong,
        }
        write_json(arguments.json, record)
    for message in wrong:
        print(f"wrong: {message}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
