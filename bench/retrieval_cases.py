"""What `bench.retrieval` runs: inputs, peers and the rows of each section."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_cuda import ops
from ultramem_cuda.profiling.timing import Candidate, Timing, capture, measure

from . import eager
from . import ops as bench_ops
from .report import Quantity, Row
from .shapes import SHAPES, Shape

Calls = Sequence[Callable[[], object]]

DTYPE = torch.bfloat16
FWD, BWD, FWD_BWD = "fwd", "bwd", "fwd+bwd"

FORWARD_US = {"S": 70.0, "B": 120.0, "M": 200.0}
BACKWARD_US = {"S": 120.0, "B": 260.0, "M": 260.0}
COMPILED_RATIO = {"S": 10.0, "B": 7.0, "M": 7.0}
DECODE_US = {"S": 15.0, "B": 20.0, "M": 25.0}
DECODE_TARGET_TOKENS = (1, 16, 64)
QUERY_RATIO, QUERY_RATIO_SMALL = 1.0, 1.5
PEAK_MEMORY, PEAK_MEMORY_MB = "product_key_topk fwd+bwd, peak extra memory", 32.0
# How much slower than random an adversarial order may be.
ADVERSARIAL_RATIO = 0.5

# Up to here a call is too short to be timed alone: many are, as one CUDA graph.
QUERY_GRAPH_TOKENS = 64
SWEEP_GRAPH_TOKENS = 256
# A graph makes at least so many calls, and their parameters fill more than the L2 cache, so that
# none is there when its turn comes.
MIN_GRAPH_CALLS = 20
ROTATED_BYTES = 101_000_000
# The host gets three times 0.3 ms to enqueue a forward and backward through autograd.
FLUSHES = 3


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    device: torch.device
    repeats: int = 30
    warmup: int = 5
    compile: bool = True
    seed: int = 0
    smoke: bool = False

    def inputs(self) -> bench_ops.Inputs:
        return bench_ops.Inputs(self.device, DTYPE, self.seed)

    def times(self, candidates: Mapping[str, Candidate], calls: int = 1) -> dict[str, Timing]:
        """Of one call, where each run of a candidate makes `calls`; cold caches."""
        timings = measure(
            candidates,
            self.device,
            warmup=self.warmup,
            repeats=self.repeats,
            cold=True,
            flushes=FLUSHES,
        )
        return {name: timing.of_one(calls) for name, timing in timings.items()}

    def graph_calls(self, parameter_bytes: int) -> int:
        """Calls in a graph, each with parameters of its own."""
        if self.smoke:  # tiny parameters: it would take thousands
            return MIN_GRAPH_CALLS
        return max(MIN_GRAPH_CALLS, -(-ROTATED_BYTES // parameter_bytes))


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_standard(shape: Shape) -> bool:
    """Targets belong to the standard shapes as they stand."""
    return SHAPES.get(shape.name) == shape


@dataclass(frozen=True)
class Retrieval:
    """The arguments of product_key_topk."""

    shape: Shape
    query: Tensor  # [T, 2, H, R, Kd]
    keys: Tensor  # [H, 2, R, n, Kd], taken as normalised
    core: Tensor  # [C, H, R, R]
    u: Tensor  # [H, R]
    t: Tensor  # [H, R]

    def raw_forward(self, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """scores, indices and what the backward needs."""
        return torch.ops.ultramem.product_key_topk(
            self.query,
            self.keys if keys is None else keys,
            self.core,
            self.u,
            self.t,
            self.shape.topk,
            self.shape.axis_topk,
            "tucker",
        )

    def raw_backward(
        self, grad: Tensor, saved: Sequence[Tensor], keys: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Gradients of query, keys and core."""
        keys = self.keys if keys is None else keys
        return torch.ops.ultramem.product_key_topk_bwd(
            grad, self.query, keys, self.core, *saved, "tucker", True, True, True
        )


def make_keys(shape: Shape, inputs: bench_ops.Inputs) -> Tensor:
    size = (shape.num_heads, 2, shape.tucker_rank, shape.num_keys, shape.key_dim)
    return inputs.normal(*size, std=shape.key_dim**-0.5)


def make_retrieval(shape: Shape, inputs: bench_ops.Inputs) -> Retrieval:
    heads, rank = shape.num_heads, shape.tucker_rank
    core = inputs.uniform(shape.num_cores, heads, rank, rank, dtype=inputs.accumulation)
    u, t, _ = ops.tucker_filter(core)
    query = inputs.normal(shape.num_tokens, 2, heads, rank, shape.key_dim)
    return Retrieval(shape, query, make_keys(shape, inputs), core, u, t)


def make_grad_scores(shape: Shape, inputs: bench_ops.Inputs) -> Tensor:
    size = (shape.num_tokens, shape.num_heads, shape.topk, shape.num_cores)
    return inputs.normal(*size, dtype=inputs.accumulation)


# ---- table: product_key_topk against torch -------------------------------------------------------


def table_rows(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Row]:
    """Forward, backward alone, and both, against eager and torch.compile of it."""
    # Dynamo gives up, and runs eager without a word, after a few variants of one function.
    torch.compiler.reset()
    (problem,) = bench_ops.problems("product_key_topk", shape, settings.inputs(), [])
    distance = bench_ops.disagreement(problem)
    # Not <=, which a NaN passes.
    if not distance <= bench_ops.AGREEMENT[DTYPE]:
        wrong.append(f"product_key_topk at shape {shape.name}: ours and eager differ")
    functions = {"ours": problem.functions["ours"]}
    if settings.compile:
        functions["compiled"] = torch.compile(problem.functions["eager"], dynamic=False)
    functions["eager"] = problem.functions["eager"]
    peers = tuple(name for name in functions if name != "ours")
    for what in (FWD, BWD, FWD_BWD):
        candidates = {
            name: _pass(function, what, problem.leaves, problem.grad)
            for name, function in functions.items()
        }
        timings = settings.times(candidates)
        target_us, ratio_targets = _table_targets(shape, what)
        yield Row(
            shape.name,
            what,
            timings,
            peers,
            target_us,
            {peer: ratio_targets[peer] for peer in peers if peer in ratio_targets},
        )


def _table_targets(shape: Shape, what: str) -> tuple[float | None, dict[str, float]]:
    if not is_standard(shape):
        return None, {}
    if what == BWD:
        return BACKWARD_US.get(shape.name), {}
    target_us = FORWARD_US.get(shape.name) if what == FWD else None
    if shape.name not in COMPILED_RATIO:
        return target_us, {}
    return target_us, {"compiled": COMPILED_RATIO[shape.name]}


def _pass(
    function: Callable[[], Tensor], what: str, leaves: Sequence[Tensor], grad: Tensor
) -> Candidate:
    """What is timed of a function.

    The backward alone is torch.autograd.grad through a graph that a forward has just made, outside
    the clock: what training runs, on both sides. One graph kept for all runs would not do, because
    a compiled backward frees its buffers as it goes.
    """
    if what == FWD:

        def forward() -> None:
            with torch.no_grad():
                function()

        return Candidate(forward)
    if what == FWD_BWD:
        return Candidate(lambda: torch.autograd.grad(function(), leaves, grad))

    output: list[Tensor] = []

    def backward() -> None:
        if not output:  # the first warm-up run
            output.append(function())
        torch.autograd.grad(output.pop(), leaves, grad)

    def make_graph() -> None:
        output.append(function())

    return Candidate(backward, make_graph)


# ---- tucker_query --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """The arguments of tucker_query."""

    x: Tensor  # [T, D]
    weight: Tensor  # [2*H*R*Kd, D]
    gain: Tensor  # [Kd]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.gain


def make_projection(shape: Shape, inputs: bench_ops.Inputs, requires_grad: bool) -> Projection:
    """The gain is what trains in bfloat16, and without gradients what is used: float32."""
    rows = 2 * shape.num_heads * shape.tucker_rank * shape.key_dim
    return Projection(
        inputs.normal(shape.num_tokens, shape.d_model).requires_grad_(requires_grad),
        inputs.normal(rows, shape.d_model, std=shape.d_model**-0.5).requires_grad_(requires_grad),
        torch.ones(
            shape.key_dim,
            device=inputs.device,
            dtype=inputs.dtype if requires_grad else inputs.accumulation,
            requires_grad=requires_grad,
        ),
    )


def linear_and_norm(shape: Shape, compiled: bool) -> Callable[[Projection], Tensor]:
    """The peer of tucker_query: F.linear, then torch.compile of rms_norm."""

    def norm(projection: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(projection, gain.shape, gain, 1e-6)

    run = torch.compile(norm, dynamic=False) if compiled else norm

    def peer(p: Projection) -> Tensor:
        projection = F.linear(p.x, p.weight)
        return run(projection.view(p.x.shape[0], 2, shape.num_heads, -1, shape.key_dim), p.gain)

    return peer


def query_tokens(settings: Settings) -> tuple[int, ...]:
    return (1, 16, 64, 512, 8192) if not settings.smoke else (1, 80)


def query_rows(settings: Settings, base: Shape, wrong: list[str]) -> Iterator[Row]:
    """tucker_query forward and backward against F.linear and a compiled rms_norm."""
    for tokens in query_tokens(settings):
        torch.compiler.reset()
        shape = dataclasses.replace(base, num_tokens=tokens)
        yield _query_row(settings, shape, is_standard(base))


def _query_row(settings: Settings, shape: Shape, has_target: bool) -> Row:
    inputs = settings.inputs()
    peer = linear_and_norm(shape, settings.compile)
    functions: dict[str, Callable[[Projection], Tensor]] = {
        "ours": lambda p: ops.tucker_query(*p.leaves, num_heads=shape.num_heads),
        "linear+norm": peer,
    }
    first = make_projection(shape, inputs, True)
    grad = torch.randn_like(functions["ours"](first))
    small = shape.num_tokens <= QUERY_GRAPH_TOKENS
    calls = settings.graph_calls(first.weight.nbytes) if small else 1
    problems = [first, *(make_projection(shape, inputs, True) for _ in range(calls - 1))]

    def passes(function: Callable[[Projection], Tensor]) -> Calls:
        def call(projection: Projection) -> object:
            return torch.autograd.grad(function(projection), projection.leaves, grad)

        return [partial(call, p) for p in problems]

    if small:
        candidates = graph_candidates({name: passes(f) for name, f in functions.items()})
    else:
        candidates = {name: Candidate(passes(f)[0]) for name, f in functions.items()}
    target = QUERY_RATIO_SMALL if small else QUERY_RATIO
    return Row(
        shape.name,
        f"T {shape.num_tokens}, {FWD_BWD}",
        settings.times(candidates, calls),
        ("linear+norm",),
        None,
        {"linear+norm": target} if has_target else {},
        {"num_tokens": shape.num_tokens},
        f"graph of {calls}" if small else "",
    )


def graph_candidates(calls: Mapping[str, Calls]) -> dict[str, Candidate]:
    """A CUDA graph of each list of calls; those that do not fit in memory are left out."""
    candidates = {}
    for name, functions in calls.items():
        try:
            candidates[name] = Candidate(capture(functions).replay)
        except torch.OutOfMemoryError:
            release_memory()
    return candidates


# ---- decode --------------------------------------------------------------------------------------


def decode_tokens(settings: Settings) -> tuple[int, ...]:
    return (1, 4, 16, 64, 256) if not settings.smoke else (1, 4)


def decode_rows(settings: Settings, base: Shape, wrong: list[str]) -> Iterator[Row]:
    """tucker_query and product_key_topk, forward, as one graph of many calls."""
    for tokens in decode_tokens(settings):
        shape = dataclasses.replace(base, num_tokens=tokens)
        has_target = is_standard(base) and tokens in DECODE_TARGET_TOKENS
        yield _decode_row(settings, shape, DECODE_US.get(shape.name) if has_target else None)


def _decode_row(settings: Settings, shape: Shape, target_us: float | None) -> Row:
    inputs = settings.inputs()
    retrieval = make_retrieval(shape, inputs)
    first = make_projection(shape, inputs, False)
    calls = settings.graph_calls(first.weight.nbytes + retrieval.keys.nbytes)
    layers = [(first, retrieval.keys)]
    layers += [
        (make_projection(shape, inputs, False), make_keys(shape, inputs)) for _ in range(calls - 1)
    ]

    def passes(query: Callable[..., Tensor], topk: Callable[..., object]) -> Calls:
        def call(projection: Projection, keys: Tensor) -> object:
            with torch.no_grad():
                return topk(
                    query(*projection.leaves, num_heads=shape.num_heads),
                    keys,
                    retrieval.core,
                    topk=shape.topk,
                    axis_topk=shape.axis_topk,
                    u=retrieval.u,
                    t=retrieval.t,
                )

        return [partial(call, *layer) for layer in layers]

    candidates = graph_candidates(
        {
            "ours": passes(ops.tucker_query, ops.product_key_topk),
            "eager": passes(eager.tucker_query, eager.product_key_topk),
        }
    )
    return Row(
        shape.name,
        f"T {shape.num_tokens}, {FWD}",
        settings.times(candidates, calls),
        ("eager",),
        target_us,
        {},
        {"num_tokens": shape.num_tokens},
        f"graph of {calls}",
    )


# ---- memory --------------------------------------------------------------------------------------


def memory_use(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Quantity]:
    """Peak of torch's allocator over a forward and backward beyond what they are given and return.

    What is saved for the backward counts. The gradients of query, keys and core are returned.
    """
    inputs = settings.inputs()
    retrieval = make_retrieval(shape, inputs)
    leaves = (retrieval.query, retrieval.keys, retrieval.core)
    for leaf in leaves:
        leaf.requires_grad_()
    grad = make_grad_scores(shape, inputs)

    def step() -> tuple[int, int]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scores, indices = ops.product_key_topk(
            *leaves, topk=shape.topk, axis_topk=shape.axis_topk, u=retrieval.u, t=retrieval.t
        )
        outputs = scores.nbytes + indices.nbytes
        forward = torch.cuda.max_memory_allocated() - before - outputs
        torch.cuda.reset_peak_memory_stats()
        gradients = torch.autograd.grad(scores, leaves, grad)
        backward = torch.cuda.max_memory_allocated() - before - outputs
        return forward, backward - sum(gradient.nbytes for gradient in gradients)

    step()  # what is allocated once and kept, such as a library's workspace, is no part of a step
    gc.collect()
    forward, backward = step()
    yield Quantity(
        shape.name,
        PEAK_MEMORY,
        max(forward, backward) / 1e6,
        "MB",
        PEAK_MEMORY_MB if is_standard(shape) else None,
        f"forward {forward / 1e6:.1f}, backward {backward / 1e6:.1f}",
    )


# ---- sweeps over one size ------------------------------------------------------------------------

SWEEPS: dict[str, tuple[int, ...]] = {
    "num_keys": (512, 768, 1024, 1138, 1536, 2048, 3072, 4096, 6144, 8192),
    "axis_topk": (8, 16, 24, 32, 48, 64, 96, 128),
    "num_tokens": (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    "key_dim": (64, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024),
}
SMOKE_SWEEPS: dict[str, tuple[int, ...]] = {
    "num_keys": (9, 37),
    "axis_topk": (2, 8),
    "num_tokens": (1, 300),
    "key_dim": (8, 24),
}


def sweep_rows(settings: Settings, base: Shape, wrong: list[str]) -> Iterator[Row]:
    """Time against n, m (= M), T and Kd, the rest as at the shape."""
    for name, values in (SMOKE_SWEEPS if settings.smoke else SWEEPS).items():
        for value in values:
            changes: dict[str, Any] = {name: value}
            if name == "axis_topk":
                changes["topk"] = value
            yield from _sweep_point(settings, dataclasses.replace(base, **changes), name)


def _sweep_point(settings: Settings, shape: Shape, name: str) -> Iterator[Row]:
    """Forward and backward by the raw operators: a graph captures them without autograd."""
    sizes = {name: getattr(shape, name)}
    label = f"{name} {sizes[name]}"
    note = ""
    timings: dict[str, dict[str, Timing]] = {FWD: {}, BWD: {}}
    try:
        inputs = settings.inputs()
        retrieval = make_retrieval(shape, inputs)
        grad = make_grad_scores(shape, inputs)
        small = shape.num_tokens <= SWEEP_GRAPH_TOKENS
        calls = settings.graph_calls(retrieval.keys.nbytes) if small else 1
        keys = [retrieval.keys, *(make_keys(shape, inputs) for _ in range(calls - 1))]
        saved = [retrieval.raw_forward(k)[2:] for k in keys]
        forwards = [partial(retrieval.raw_forward, k) for k in keys]
        backwards = [
            partial(retrieval.raw_backward, grad, s, k) for k, s in zip(keys, saved, strict=True)
        ]
        note = f"graph of {calls}" if small else ""
        for what, functions in ((FWD, forwards), (BWD, backwards)):
            candidates = (
                graph_candidates({"ours": functions})
                if small
                else {"ours": Candidate(functions[0])}
            )
            timings[what] = settings.times(candidates, calls)
    except torch.OutOfMemoryError:
        release_memory()
    for what, timing in timings.items():
        yield Row(shape.name, f"{label}, {what}", timing, sizes=sizes, note=note)


# ---- adversarial orders --------------------------------------------------------------------------

ORDERS = ("random", "shuffled", "ascending", "descending", "all equal", "8 values")
# A value up to 2^15 as the sum of two numbers that bfloat16 holds exactly.
_LOW = 128


def order_values(order: str, num_keys: int, generator: torch.Generator) -> Tensor:
    """What each key of an axis scores (times the token's scale): whole numbers [n]."""
    ascending = torch.arange(1, num_keys + 1)
    if order == "ascending":
        return ascending
    if order == "descending":
        return ascending.flip(0)
    if order == "shuffled":
        return ascending[torch.randperm(num_keys, generator=generator)]
    if order == "all equal":
        return torch.ones_like(ascending)
    if order == "8 values":
        return torch.randint(1, 9, (num_keys,), generator=generator)
    raise ValueError(f"order must be one of {ORDERS}, got {order!r}")


def make_ordered(order: str, shape: Shape, inputs: bench_ops.Inputs) -> Retrieval:
    """Inputs whose axis scores have this order along the keys, for every token, head and side.

    "random" is that of the other sections. Otherwise key i of every rank is (high_i, low_i, 0, ...)
    with high_i + low_i = v_i, a whole number, and every query is (s, s, random ...) with s > 0 the
    token's own: its score s * v_i is exact in float32 (8 + 13 bits), so that the order is that of
    v, ties and all. u and t of positive cores are positive, so u.S has the order of S. "shuffled"
    has the values of "ascending", in random order.
    """
    retrieval = make_retrieval(shape, inputs)
    if order == "random":
        return retrieval
    values = order_values(order, shape.num_keys, inputs.host_generator).to(inputs.device)
    keys = torch.zeros_like(retrieval.keys)
    # A power of two keeps the scores' size near 1.
    scale = 2.0**-10
    keys[..., 0] = (values // _LOW * _LOW * scale).to(keys.dtype)
    keys[..., 1] = (values % _LOW * scale).to(keys.dtype)
    query = retrieval.query.clone()
    size = inputs.uniform(shape.num_tokens, 1, 1, 1, 1, dtype=torch.float32) + 0.5
    query[..., :2] = size.to(query.dtype)
    return dataclasses.replace(retrieval, query=query, keys=keys)


def adversarial_rows(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Row]:
    """The forward under orders of the scores, against random ones."""
    cases = {order: make_ordered(order, shape, settings.inputs()) for order in ORDERS}
    timings = settings.times({order: Candidate(case.raw_forward) for order, case in cases.items()})
    for order in ORDERS:
        found = {"ours": timings[order]} if order in timings else {}
        if order == "random":
            yield Row(shape.name, order, found)
            continue
        if "random" in timings:
            found["random"] = timings["random"]
        targets = {"random": ADVERSARIAL_RATIO} if is_standard(shape) else {}
        yield Row(shape.name, order, found, ("random",), None, targets)
