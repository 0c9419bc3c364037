"""Windows of steady load on a GPU, and what NVML says of them: bytes, energy, utilization.

    device = nvml.open_device(torch.device("cuda"))
    if not isinstance(device, nvml.Unavailable):
        with device:
            sampler = Sampler(device, CudaQueue(torch.device("cuda")))
            baseline = sampler.baseline(large_copy(torch.device("cuda")))   # about 5 s
            measurement = sampler.measure(graph.replay, baseline)           # about 2.5 s

How the numbers come to be true:

- GPM's counters lag behind the GPU: on an H100, a second of idling that followed a load of 80% read
  12%. So a window starts after half a second of the same load, lasts a second at least, and ends
  before the load does; an idle window waits for a second first.
- The share of DRAM bandwidth is of a maximum that no one states, and part of it is not the load's.
  A copy of known bytes, in the same run and through the same windows, gives bytes a second for a
  share; the share of an idle window is subtracted from both.
- The energy counter moves in steps of 20 to 100 ms. Read at any time, it is off by up to a step at
  either end: 7% of 1.5 s. It is therefore read when it moves, on both ends, and gives the mean
  power between; what remains is the poll of about a millisecond. A power sensor that samples only a
  part of the time (https://arxiv.org/abs/2312.02741) sees a steady load rightly.
- The time of a pass is the GPU's, between CUDA events.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from .nvml import DRAM, METRICS, OCCUPANCY, SM, TENSOR, NvmlDevice, Unavailable
from .record import Sampled

__all__ = [
    "Baseline",
    "Calibration",
    "CudaQueue",
    "KnownCopy",
    "Measurement",
    "PassWindow",
    "Sampler",
    "Window",
    "calibrate",
    "large_copy",
]

# A window shorter than this is mostly the lag of the counters.
MINIMUM_SECONDS = 1.0
# Load enqueued ahead, in batches that a mark follows: enough to outlast a nap of the host, little
# enough to see the progress.
_BATCH_SECONDS = 0.02
_BATCHES_AHEAD = 3
_POLL_SECONDS = 0.001
# Several steps of the slowest energy counter.
_ENERGY_SECONDS = 0.5
# A copy that uses less of the bandwidth, or an idle GPU that uses more, is not what it should be.
_LEAST_COPY_SHARE = 0.2
_LARGEST_IDLE_PART = 0.5
_COPY_BYTES = 1 << 30
# Of the size of the L2 cache: what is left there of a smaller buffer would miss in the count.
_LEAST_CACHES = 8

T = TypeVar("T")


class Mark(Protocol):
    """A point in the GPU's queue."""

    def reached(self) -> bool: ...

    def seconds_since(self, earlier: Any) -> float:
        """The GPU's time between two marks that were both reached."""


class Queue(Protocol):
    """A GPU's queue, and the clock of the host that fills it."""

    def mark(self) -> Mark:
        """Puts a mark behind all that was enqueued."""

    def synchronize(self) -> None: ...

    def now(self) -> float:
        """Seconds."""

    def sleep(self, seconds: float) -> None: ...


class CudaQueue:
    """torch's current stream on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        return _CudaMark(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class _CudaMark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def reached(self) -> bool:
        return self.event.query()

    def seconds_since(self, earlier: _CudaMark) -> float:
        return earlier.event.elapsed_time(self.event) / 1e3


@dataclass(frozen=True)
class Window:
    """What NVML said between two moments of a steady state."""

    seconds: float
    shares: Mapping[str, float | Unavailable]
    """By the names of nvml.METRICS, from 0 to 1."""
    watts: float | Unavailable
    """Mean power."""
    sm_clock_mhz: float | Unavailable
    """In the middle, as the next."""
    throttle_reasons: tuple[str, ...] | Unavailable


@dataclass(frozen=True)
class PassWindow:
    """A window in which one pass followed the other."""

    window: Window
    seconds_per_pass: float
    """The GPU's time."""
    gaps: int
    """How often the host found that the GPU had run out of passes."""


@dataclass(frozen=True)
class KnownCopy:
    """A copy, and the bytes that one pass of it reads and writes."""

    run: Callable[[], object]
    bytes: float


@dataclass(frozen=True)
class Calibration:
    """What a share of the DRAM bandwidth is worth."""

    bytes_per_second_at_full: float
    """Of a share of 1."""
    copy_bytes_per_second: float
    """Reads and writes of the copy."""
    copy_share: float
    idle_share: float

    def bytes_per_second(self, share: float) -> float:
        """Above idle."""
        return (share - self.idle_share) * self.bytes_per_second_at_full


@dataclass(frozen=True)
class Baseline:
    """What later windows are held against."""

    idle: Window
    calibration: Calibration | Unavailable


@dataclass(frozen=True)
class Measurement:
    """A window of passes, and a sentence for all that is missing or doubtful in it."""

    sampled: Sampled
    notes: tuple[str, ...]


def large_copy(device: torch.device) -> KnownCopy | Unavailable:
    """A copy between two buffers of 1 GiB, or of a quarter of the free memory where that is less.

    Counted are one read and one write of each byte: caches are small beside the buffers.
    """
    free, _ = torch.cuda.mem_get_info(device)
    size = min(_COPY_BYTES, free // 4)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if size < _LEAST_CACHES * cache:
        return Unavailable(
            f"calibration: {free / 1e9:.2f} GB of free memory are too little for a copy that no "
            "cache can hold"
        )
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return KnownCopy(lambda: target.copy_(source), 2 * size)


def calibrate(copy: PassWindow, copy_bytes: float, idle: Window) -> Calibration | Unavailable:
    """Bytes a second for a share of the DRAM bandwidth, or why the windows do not give them.

    Args:
        copy: a window of a copy larger than the caches.
        copy_bytes: what one pass of it reads and writes.
        idle: a window without load.
    """
    share, idle_share = copy.window.shares[DRAM], idle.shares[DRAM]
    if isinstance(share, Unavailable):
        return share
    if isinstance(idle_share, Unavailable):
        return idle_share
    if share < _LEAST_COPY_SHARE or idle_share > _LARGEST_IDLE_PART * share:
        return Unavailable(
            f"calibration: GPM metric {DRAM} is {share:.1%} in a large copy and {idle_share:.1%} "
            "in an idle window: too close, or too small, to tell bytes from"
        )
    rate = copy_bytes / copy.seconds_per_pass
    return Calibration(
        bytes_per_second_at_full=rate / (share - idle_share),
        copy_bytes_per_second=rate,
        copy_share=share,
        idle_share=idle_share,
    )


class Sampler:
    """Takes windows on one device."""

    def __init__(
        self,
        device: NvmlDevice,
        queue: Queue,
        *,
        seconds: float = 1.5,
        warmup_seconds: float = 0.5,
    ) -> None:
        """
        Args:
            device: NVML's view of the GPU.
            queue: the same GPU's queue, into which the passes go.
            seconds: length of a window, at least 1; passes are finished, so it may be longer.
            warmup_seconds: of the same load before it.

        Raises:
            ValueError: a window too short to be true.
        """
        if seconds < MINIMUM_SECONDS:
            raise ValueError(f"seconds must be at least {MINIMUM_SECONDS}, got {seconds}")
        if warmup_seconds < 0:
            raise ValueError(f"warmup_seconds must not be negative, got {warmup_seconds}")
        self.device = device
        self.queue = queue
        self.seconds = seconds
        self.warmup_seconds = warmup_seconds

    def baseline(self, copy: KnownCopy | Unavailable) -> Baseline:
        """An idle window, then one of the copy. To be called before other load warms the GPU."""
        idle = self.idle()
        if isinstance(copy, Unavailable):
            return Baseline(idle, copy)
        return Baseline(idle, calibrate(self.load(copy.run), copy.bytes, idle))

    def idle(self, settle_seconds: float = 1.0) -> Window:
        """A window without load, once what went before has left the counters."""
        self.queue.synchronize()
        self.queue.sleep(settle_seconds)
        return self._window(_Idle())

    def load(self, run: Callable[[], object]) -> PassWindow:
        """A window of passes, back to back.

        Args:
            run: enqueues one pass on the current stream. It should neither wait for the GPU nor
                take longer than the GPU does (a CUDA graph's replay is best): the window says how
                often the GPU ran dry.
        """
        load = _Load(run, self.queue)
        self._wait(load, self.warmup_seconds)
        load.gaps = 0
        window = self._window(load)
        self.queue.synchronize()
        return PassWindow(window, load.seconds_per_pass(), load.gaps)

    def measure(self, run: Callable[[], object], baseline: Baseline) -> Measurement:
        """A window of passes (see ``load``), in bytes and joules of one pass."""
        return _interpret(self.load(run), baseline)

    def _window(self, load: _Idle) -> Window:
        queue = self.queue
        start_energy = self._energy_step(load)
        with self.device.counters() as counters:
            load.begin()
            counters.begin()
            start = queue.now()
            self._wait(load, self.seconds / 2)
            clock, reasons = self.device.sm_clock_mhz(), self.device.throttle_reasons()
            self._wait(load, start + self.seconds - queue.now())
            load.end()
            counters.end()
            seconds = queue.now() - start
            shares = counters.shares()
        end_energy = self._energy_step(load)
        return Window(
            seconds=seconds,
            shares=shares,
            watts=_mean_power(start_energy, end_energy),
            sm_clock_mhz=clock,
            throttle_reasons=reasons,
        )

    def _wait(self, load: _Idle, seconds: float) -> None:
        """Keeps up the load meanwhile."""
        end = self.queue.now() + seconds
        while self.queue.now() < end:
            load.feed()
            self.queue.sleep(_POLL_SECONDS)

    def _energy_step(self, load: _Idle) -> _EnergyStep | Unavailable:
        """Waits until the energy counter moves."""
        before = self.device.energy_joules()
        if isinstance(before, Unavailable):
            return before
        end = self.queue.now() + _ENERGY_SECONDS
        while self.queue.now() < end:
            self._wait(load, _POLL_SECONDS)
            joules = self.device.energy_joules()
            if isinstance(joules, Unavailable):
                return joules
            if joules != before:
                return _EnergyStep(self.queue.now(), joules)
        return Unavailable(f"energy: the counter did not move in {_ENERGY_SECONDS} s")


@dataclass(frozen=True)
class _Progress:
    """The mark behind a number of passes."""

    mark: Mark
    passes: int


@dataclass(frozen=True)
class _EnergyStep:
    """A moment at which the energy counter moved, and where to."""

    time: float
    joules: float


class _Idle:
    """No load."""

    def feed(self) -> None:
        """Keeps the GPU busy; to be called every few milliseconds."""

    def begin(self) -> None:
        """Waits for the end of a pass, at which the count begins."""

    def end(self) -> None:
        """Waits for the end of a pass, at which the count ends."""


class _Load(_Idle):
    """Passes enqueued ahead of the GPU, a few batches at a time."""

    def __init__(self, run: Callable[[], object], queue: Queue) -> None:
        self.gaps = 0
        self._run = run
        self._queue = queue
        self._enqueued = 0
        self._ahead: deque[_Progress] = deque()
        self._reached: _Progress | None = None
        self._batch = self._batch_size()

    def feed(self) -> None:
        while self._ahead and self._ahead[0].mark.reached():
            self._reached = self._ahead.popleft()
        if self._reached and not self._ahead:
            self.gaps += 1
        while len(self._ahead) < _BATCHES_AHEAD:
            for _ in range(self._batch):
                self._run()
            self._enqueued += self._batch
            self._ahead.append(_Progress(self._queue.mark(), self._enqueued))

    def begin(self) -> None:
        self._begin = self._next()

    def end(self) -> None:
        self._end = self._next()

    def seconds_per_pass(self) -> float:
        """Between ``begin`` and ``end``."""
        passes = self._end.passes - self._begin.passes
        return self._end.mark.seconds_since(self._begin.mark) / passes

    def _next(self) -> _Progress:
        last = self._reached
        while self._reached is None or self._reached is last:
            self.feed()
            self._queue.sleep(_POLL_SECONDS)
        return self._reached

    def _batch_size(self) -> int:
        """Passes that keep the GPU busy for a while, found by doubling."""
        self._run()  # The first may load code or compile.
        self._queue.synchronize()
        passes = 1
        while True:
            start = self._queue.mark()
            for _ in range(passes):
                self._run()
            end = self._queue.mark()
            self._queue.synchronize()
            if end.seconds_since(start) >= _BATCH_SECONDS:
                return passes
            passes *= 2


def _mean_power(
    start: _EnergyStep | Unavailable, end: _EnergyStep | Unavailable
) -> float | Unavailable:
    if isinstance(start, Unavailable):
        return start
    if isinstance(end, Unavailable):
        return end
    if end.joules < start.joules:
        return Unavailable("energy: the counter was reset during the window")
    return (end.joules - start.joules) / (end.time - start.time)


def _interpret(passes: PassWindow, baseline: Baseline) -> Measurement:
    """A window as bytes and joules of one pass."""
    window, seconds = passes.window, passes.seconds_per_pass
    notes: dict[str, None] = {}  # A set that keeps its order.

    def known(value: T | Unavailable) -> T | None:
        if isinstance(value, Unavailable):
            notes[value.reason] = None
            return None
        return value

    shares = {name: known(window.shares[name]) for name in METRICS}
    watts, idle_watts = known(window.watts), known(baseline.idle.watts)
    above_idle = None if watts is None or idle_watts is None else watts - idle_watts
    sampled = Sampled(
        seconds=window.seconds,
        passes=window.seconds / seconds,
        bytes=known(_pass_bytes(passes, baseline.calibration)),
        joules=None if watts is None else watts * seconds,
        joules_above_idle=None if above_idle is None else above_idle * seconds,
        sm_utilization=shares[SM],
        sm_occupancy=shares[OCCUPANCY],
        tensor_utilization=shares[TENSOR],
        sm_clock_mhz=known(window.sm_clock_mhz),
        throttle_reasons=known(window.throttle_reasons) or (),
    )
    if passes.gaps:
        notes["the host could not keep the GPU busy: its window has gaps between passes"] = None
    return Measurement(sampled, tuple(notes))


def _pass_bytes(passes: PassWindow, calibration: Calibration | Unavailable) -> float | Unavailable:
    share = passes.window.shares[DRAM]
    if isinstance(share, Unavailable):
        return share
    if isinstance(calibration, Unavailable):
        return calibration
    if share <= calibration.idle_share:
        return Unavailable(
            f"DRAM bytes: GPM metric {DRAM} is {share:.2%}, not above the idle GPU's "
            f"{calibration.idle_share:.2%}"
        )
    return calibration.bytes_per_second(share) * passes.seconds_per_pass
