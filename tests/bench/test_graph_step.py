"""The bench of whole steps as CUDA graphs: its sums of the profiler's events, and its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ultramem_cuda.bench import graph_step, retrieval_cases, shapes
from ultramem_cuda.bench.graph_step import Kernel, Replay
from ultramem_cuda.profiling import timing

CPU = torch.device("cpu")


def test_replays_are_told_apart_by_their_launch() -> None:
    kernels = [
        Kernel(launch=1, stream=7, begin_ns=0, duration_ns=100),  # before any graph
        Kernel(launch=2, stream=7, begin_ns=200, duration_ns=100),
        Kernel(launch=4, stream=7, begin_ns=600, duration_ns=40),
        Kernel(launch=2, stream=7, begin_ns=310, duration_ns=50),
        Kernel(launch=4, stream=9, begin_ns=620, duration_ns=50),
        Kernel(launch=4, stream=9, begin_ns=625, duration_ns=5),
    ]
    first, second, third = graph_step.replays_of(kernels, [2, 4, 5])
    assert first == Replay(kernels=2, streams=1, sum_ns=150, busy_ns=150)
    assert second == Replay(kernels=3, streams=2, sum_ns=95, busy_ns=70)
    assert third == Replay(kernels=0, streams=0, sum_ns=0, busy_ns=0)
    assert graph_step.note_of(first) == "2 kernels on 1 streams"
    assert "0.0 us of them beside others" in graph_step.note_of(second)
    found = graph_step.timing_of([first, second, second])
    assert found == timing.Timing(95e-6, 95e-6, 122.5e-6, repeats=3)


@pytest.fixture
def _without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: a step that runs as it is stands for a graph, and a list for the profiler."""

    @dataclasses.dataclass
    class Graph:
        replay: Callable[[], object]

    def seen(run: Callable[[], object], before: Callable[[], object], repeats: int) -> list[Replay]:
        before()
        run()
        return [Replay(kernels=5, streams=1, sum_ns=1000, busy_ns=1000)] * repeats

    monkeypatch.setitem(timing._FLUSH_BYTES, "cpu", 1)
    monkeypatch.setattr(graph_step, "capture", lambda steps: Graph(steps[0]))
    monkeypatch.setattr(graph_step, "profiled", seen)
    monkeypatch.setattr(graph_step, "_optimizers", plain_optimizers)


def plain_optimizers(model: Any, table: Any) -> list[torch.optim.Optimizer]:
    """AdamW can be captured on a GPU alone."""
    rows = {id(p) for p in table.parameters()}
    rest = [p for p in model.parameters() if id(p) not in rows]
    return [graph_step.optim.MemoryAdam(table.parameters()), torch.optim.AdamW(rest)]


@pytest.mark.usefixtures("_without_graphs")
@pytest.mark.parametrize("section", ["layer_step", "lm_step"])
def test_steps(section: str) -> None:
    settings = retrieval_cases.Settings(CPU, repeats=2, warmup=1, smoke=True)
    wrong: list[str] = []
    measure = graph_step.BENCH.sections[section].measure
    (row,) = measure(settings, shapes.SMOKE, wrong)
    assert wrong == []
    record = row.record()
    assert record["timings"]["kernels"]["median_ms"] == 1e-3
    assert record["note"] == "the ratio is kernels over step; 5 kernels on 1 streams"


@pytest.mark.usefixtures("_without_graphs")
def test_a_profiler_that_sees_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Replay(kernels=0, streams=0, sum_ns=0, busy_ns=0)
    monkeypatch.setattr(graph_step, "profiled", lambda *_: [nothing] * 2)
    settings = retrieval_cases.Settings(CPU, repeats=2, warmup=1, smoke=True)
    wrong: list[str] = []
    (row,) = graph_step.layer_rows(settings, shapes.SMOKE, wrong)
    assert "did not see the kernels" in wrong[0]
    assert row.ratio("kernels") is None


def test_the_target_is_one_of_the_real_shapes() -> None:
    own = [shape for section in graph_step.BENCH.sections.values() for shape in section.own]
    assert [shape.num_tokens for shape in own] == [64] * 3
    assert graph_step.MOST_OVER_KERNELS == 1.2
