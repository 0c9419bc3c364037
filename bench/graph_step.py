"""``python -m bench.graph_step``: whole training steps as CUDA graphs, against the sum of their
kernels' times."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_cuda import MemoryTable, UltraMemLayer, optim
from ultramem_cuda.examples.lm.config import VOCABULARY, ModelConfig
from ultramem_cuda.examples.lm.memory import memory_config
from ultramem_cuda.examples.lm.model import ByteLM
from ultramem_cuda.profiling.timing import Candidate, Timing, capture

from .command import Bench, Section, bench_main
from .report import Row
from .retrieval_cases import DTYPE, Settings
from .shapes import SHAPES, SMOKE, Shape
from .value_ffn_cases import factors_of
from .value_ffn_layer import layer_config

KERNELS = "kernels"
TOKENS = 64
# The step may take so many times as long as its kernels.
MOST_OVER_KERNELS = 1.2
LAUNCH = "cudaGraphLaunch"

LAYER_SHAPES = tuple(
    dataclasses.replace(SHAPES[name], name=f"{name}, {TOKENS} tokens", num_tokens=TOKENS)
    for name in "SM"
)
_LM = ModelConfig(context=TOKENS)
LM_SHAPE = Shape(
    name=f"example LM, {TOKENS} tokens",
    num_tokens=TOKENS,
    d_model=_LM.d_model,
    num_keys=_LM.num_keys,
    key_dim=_LM.key_dim,
    axis_topk=_LM.topk,
    topk=_LM.topk,
    pre_value_dim=_LM.pre_value_dim,
    value_dim=_LM.value_dim,
    num_slots=_LM.num_layers * _LM.num_keys**2,
)


# ---- the sum of kernel times ---------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """What the GPU did for a launch: a kernel, a copy or a fill."""

    launch: int
    """Its correlation with the call on the host: one number for all that a graph's replay does."""
    stream: int
    begin_ns: int
    duration_ns: int


@dataclass(frozen=True)
class Replay:
    """What the kernels of one replay took together."""

    kernels: int
    streams: int
    sum_ns: int
    busy_ns: int
    """Time during which one of them at least ran."""


def replays_of(kernels: Iterable[Kernel], launches: Sequence[int]) -> list[Replay]:
    """One for each launch of a graph, in their order."""
    by_launch: dict[int, list[Kernel]] = {launch: [] for launch in launches}
    for kernel in kernels:
        if kernel.launch in by_launch:
            by_launch[kernel.launch].append(kernel)
    return [_replay(sorted(found, key=lambda k: k.begin_ns)) for found in by_launch.values()]


def _replay(kernels: Sequence[Kernel]) -> Replay:
    busy, end = 0, 0
    for kernel in kernels:
        kernel_end = kernel.begin_ns + kernel.duration_ns
        busy += max(0, kernel_end - max(end, kernel.begin_ns))
        end = max(end, kernel_end)
    return Replay(
        kernels=len(kernels),
        streams=len({kernel.stream for kernel in kernels}),
        sum_ns=sum(kernel.duration_ns for kernel in kernels),
        busy_ns=busy,
    )


def profiled(run: Callable[[], object], before: Callable[[], object], repeats: int) -> list[Replay]:
    """Replays of a graph under torch.profiler (CUPTI), in the state that `before` leaves."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            before()
            run()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    launches = [event.correlation_id() for event in events if event.name() == LAUNCH]
    on_gpu = (event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA)
    kernels = (
        Kernel(e.correlation_id(), e.device_resource_id(), e.start_ns(), e.duration_ns())
        for e in on_gpu
    )
    return replays_of(kernels, launches)


def timing_of(replays: Sequence[Replay]) -> Timing:
    q1, median, q3 = statistics.quantiles(
        [replay.sum_ns / 1e6 for replay in replays], n=4, method="inclusive"
    )
    return Timing(median_ms=median, q1_ms=q1, q3_ms=q3, repeats=len(replays))


def note_of(replay: Replay) -> str:
    """What is to be known of the sum: kernels that run beside others count in full."""
    note = f"{replay.kernels} kernels on {replay.streams} streams"
    beside = replay.sum_ns - replay.busy_ns
    return f"{note}, {beside / 1e3:.1f} us of them beside others" if beside else note


def step_row(
    settings: Settings, shape: Shape, what: str, step: Callable[[], object], wrong: list[str]
) -> Row:
    """The step's replay and the sum of its kernels, both with cold caches."""
    graph = capture([step])
    timings = settings.times({"ours": Candidate(graph.replay)})
    flush = torch.empty(1 << 30, dtype=torch.uint8, device=settings.device)
    replays = profiled(graph.replay, flush.zero_, settings.repeats)
    if len(replays) != settings.repeats or not all(replay.kernels for replay in replays):
        wrong.append(f"{what}, {shape.name}: the profiler did not see the kernels of every replay")
        return Row(shape.name, what, timings, (KERNELS,))
    timings[KERNELS] = timing_of(replays)
    target = {} if settings.smoke else {KERNELS: 1 / MOST_OVER_KERNELS}
    note = f"the ratio is kernels over step; {note_of(replays[-1])}"
    return Row(shape.name, what, timings, (KERNELS,), ratio_targets=target, note=note)


# ---- what is stepped -----------------------------------------------------------------------------


class LayerAndTable(nn.Module):
    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        config = layer_config(shape)
        self.layer = UltraMemLayer(config, 0, dtype=DTYPE, device=device)
        self.table = MemoryTable.from_config(
            config, grad_mode="deferred", dtype=DTYPE, device=device
        )
        self.table.reserve(shape.num_tokens)


def _optimizers(model: nn.Module, table: MemoryTable) -> list[torch.optim.Optimizer]:
    """Of the table and of the rest, both such that a graph can hold their steps."""
    rows = {id(p) for p in table.parameters()}
    rest = [p for p in model.parameters() if id(p) not in rows]
    return [
        optim.MemoryAdam(table.parameters(), lr=1e-3, state_dtype=torch.bfloat16),
        torch.optim.AdamW(rest, lr=1e-3, fused=True, capturable=True),
    ]


def training_step(
    loss_of: Callable[[], Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> Callable[[], None]:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of().backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def layer_rows(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Row]:
    """UltraMemLayer and a deferred table: forward, backward, MemoryAdam and AdamW."""
    torch.manual_seed(settings.seed)
    model, inputs = LayerAndTable(shape, settings.device), settings.inputs()
    x = inputs.normal(shape.num_tokens, shape.d_model)

    def loss_of() -> Tensor:
        return model.layer(x, model.table).float().square().mean()

    step = training_step(loss_of, _optimizers(model, model.table))
    yield step_row(settings, shape, "step", step, wrong)
    _check_factors(model.table, shape.num_tokens, f"step, {shape.name}", wrong)


def lm_rows(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Row]:
    """The example LM under bfloat16 autocast, its table deferred."""
    torch.manual_seed(settings.seed)
    config = _LM
    if shape == SMOKE:
        sizes = {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_inner": 64}
        memory = {"num_keys": 16, "key_dim": 8, "topk": 4, "pre_value_dim": 8, "value_dim": 8}
        config = ModelConfig(context=shape.num_tokens, **sizes, **memory)
    model = ByteLM(config)
    model.table = MemoryTable.from_config(memory_config(config), grad_mode="deferred")
    model.to(settings.device)
    all_tokens = config.num_layers * shape.num_tokens
    model.table.reserve(all_tokens, dtype=DTYPE)
    size = (1, shape.num_tokens + 1)
    text = torch.randint(VOCABULARY, size).to(settings.device)

    def loss_of() -> Tensor:
        with torch.autocast(settings.device.type, DTYPE):
            logits, _ = model(text[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())

    step = training_step(loss_of, _optimizers(model, model.table))
    yield step_row(settings, shape, "step", step, wrong)
    _check_factors(model.table, all_tokens, f"step, {shape.name}", wrong)


def _check_factors(table: MemoryTable, tokens: int, where: str, wrong: list[str]) -> None:
    """A replay clears, appends and steps: what the last one appended is still there."""
    held = factors_of(table).num_tokens
    if held != tokens:
        wrong.append(f"{where}: {held} tokens after a replay, {tokens} were to be appended")
    if not all(bool(p.isfinite().all()) for p in table.parameters()):
        wrong.append(f"{where}: the table is not finite")


BENCH = Bench(
    "graph_step",
    f"Times whole training steps of {TOKENS} tokens on a GPU as CUDA graphs, cold caches.",
    {
        "layer_step": Section("UltraMemLayer, table and optimizers", layer_rows, own=LAYER_SHAPES),
        "lm_step": Section("the example LM and its optimizers", lm_rows, own=(LM_SHAPE,)),
    },
    repeats=20,
    shape_help="every section has shapes of its own",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    return bench_main(BENCH, argv)


if __name__ == "__main__":
    sys.exit(main())
