"""Medians of candidates that take turns, and a record of where they were taken."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ultramem_cuda import __version__, _library

__all__ = ["Candidate", "Timing", "capture", "machine", "measure", "write_json", "write_text"]

# Larger than any cache to flush, and on the GPU long enough (0.3 ms at 3 TB/s) for the host to
# enqueue what follows: otherwise small operators would show their launches instead.
_FLUSH_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Candidate:
    """One way of computing something."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None
    """Called after each run, outside the clock: drops the gradients that the run left."""


@dataclass(frozen=True)
class Timing:
    """Median and quartiles, in milliseconds."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    repeats: int

    def of_one(self, calls: int) -> Timing:
        """The share of one call, where a run was that many."""
        return replace(
            self,
            median_ms=self.median_ms / calls,
            q1_ms=self.q1_ms / calls,
            q3_ms=self.q3_ms / calls,
        )


def measure(
    candidates: Mapping[str, Candidate],
    device: torch.device,
    *,
    warmup: int,
    repeats: int,
    cold: bool,
    flushes: int = 1,
) -> dict[str, Timing]:
    """Times candidates in turns: A B C, B C A, C A B, ...

    What slows the machine for a while then slows all of them, and none always finds the caches as
    one particular other left them. CPU: wall time. CUDA: device time between two events.

    Args:
        warmup: untimed runs of each.
        repeats: timed runs of each, at least 2.
        cold: overwrite a buffer larger than the caches before each timed run.
        flushes: how often it is overwritten; each gives the host 0.3 ms more to enqueue what is
            timed, so that a backward through autograd shows the GPU's time and not the host's.

    Returns:
        A Timing for each candidate that fits in the device's memory.
    """
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2 (quartiles need two runs), got {repeats}")
    runnable = {name: c for name, c in candidates.items() if _warm_up(c, device, warmup)}
    flush_bytes = _FLUSH_BYTES[device.type] if cold else 0
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
    clock = _cuda_ms if device.type == "cuda" else _cpu_ms
    samples: dict[str, list[float]] = {name: [] for name in runnable}
    names = list(runnable)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name in names:
                for _ in range(flushes):
                    flush.zero_()
                samples[name].append(clock(runnable[name].run))
                runnable[name].reset()
            names = names[1:] + names[:1]
    finally:
        gc.enable()
    return {name: _summary(times) for name, times in samples.items()}


def capture(calls: Sequence[Callable[[], object]], pool: Any = None) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all the calls, one after the other. They are of one kind: two warm up.

    Args:
        pool: memory that graphs share (``torch.cuda.graph_pool_handle()``): for those that run one
            after the other, and of whose results nothing is kept.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()
    return graph


def _warm_up(candidate: Candidate, device: torch.device, warmup: int) -> bool:
    """Runs it a few times; False where it does not fit, or torch does not offer it there."""
    runs = True
    for _ in range(max(warmup, 1)):
        try:
            candidate.run()
        except (torch.OutOfMemoryError, NotImplementedError):
            runs = False
        try:
            candidate.reset()
        except torch.OutOfMemoryError:
            runs = False
        if not runs:
            # The traceback held the tensors of the attempt until here.
            gc.collect()
            torch.cuda.empty_cache()
            return False
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return True


def _cpu_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(run: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _summary(times: list[float]) -> Timing:
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median_ms=median, q1_ms=q1, q3_ms=q3, repeats=len(times))


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the shapes."""
    record: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ultramem_cuda": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_cores": _available_cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": _library.cpu_capability() if _library.is_loaded() else None,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
    return record


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record, whole or not at all; ValueError for NaN and infinity, which are no JSON."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
