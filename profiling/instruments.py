"""What a profile is measured with: CUDA graphs, torch.compile, NVML; and a GPU's ceilings."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ultramem_cuda import _library

from . import nvml, timing
from .compilation import compile_static, resolve_compiled
from .nvml import Unavailable
from .record import Ceilings
from .sampling import Baseline, CudaQueue, Measurement, Sampler, large_copy
from .timing import Candidate

__all__ = ["Instruments", "Run", "Windows", "measure_ceilings", "open_instruments", "unavailable"]

Run = Callable[[], object]
Recorder = Callable[[Sequence[Run]], Run]
"""Makes one run of several calls."""

# Of the GPU's memory, and at most, for the experts of one kind of layer.
_WEIGHTS_SHARE = 0.15
_MOST_WEIGHTS = 12 << 30
_MATMUL = 8192
_CEILING_REPEATS = 20


class WindowSampler(Protocol):
    """What of a Sampler is used here."""

    def measure(self, run: Run, baseline: Baseline) -> Measurement: ...


@dataclass(frozen=True)
class Windows:
    """NVML's windows of passes."""

    sampler: WindowSampler
    baseline: Baseline

    @property
    def refusals(self) -> list[str]:
        """What NVML does not say on this machine, whatever runs."""
        idle, calibration = self.baseline.idle, self.baseline.calibration
        values = [*idle.shares.values(), idle.watts, idle.sm_clock_mhz, idle.throttle_reasons]
        reasons = [v.reason for v in [*values, calibration] if isinstance(v, Unavailable)]
        return list(dict.fromkeys(reasons))

    @property
    def useful(self) -> bool:
        """Whether a window would say bytes or energy."""
        idle = self.baseline.idle
        return not (
            isinstance(self.baseline.calibration, Unavailable)
            and isinstance(idle.watts, Unavailable)
        )

    def measure(self, run: Run) -> Measurement:
        """A window of passes; its notes without what holds for the whole machine."""
        found = self.sampler.measure(run, self.baseline)
        known = self.refusals
        return Measurement(found.sampled, tuple(n for n in found.notes if n not in known))


@dataclass(frozen=True)
class Instruments:
    """A device, and how things are measured on it."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    """Whether the FFN and the mixtures of experts are compiled."""
    new_recorder: Callable[[], Recorder]
    """A recorder, whose runs must not overlap."""
    windows: Windows | None
    """None where NVML says neither bytes nor energy, or was not to be asked."""
    weights_bytes: int
    """For the experts of one kind of layer."""


def unavailable() -> str | None:
    """Why nothing can be measured on this machine, or None."""
    if not _library.is_loaded():
        return _library.load_error()
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    if not _library.has_cuda_kernels():
        return "this build of ultramem_cuda is for CPUs alone (`ultramem doctor` says why)"
    return None


@contextlib.contextmanager
def open_instruments(
    *, use_nvml: bool, window_seconds: float, compiled: bool, note: Callable[[str], None]
) -> Iterator[Instruments]:
    """Those of CUDA's current device. Everything that they lack is a sentence for ``note``."""
    device = torch.device("cuda", torch.cuda.current_device())
    with contextlib.ExitStack() as stack:
        windows = None
        if use_nvml:
            windows = _open_windows(device, window_seconds, stack, note)
        else:
            note("NVML was not asked for bytes and energy, as requested")
        total = torch.cuda.get_device_properties(device).total_memory
        yield Instruments(
            device=device,
            dtype=torch.bfloat16,
            compiled=compiled and _compiles(device, note),
            new_recorder=_graph_recorder,
            windows=windows,
            weights_bytes=min(_MOST_WEIGHTS, int(_WEIGHTS_SHARE * total)),
        )


def _graph_recorder() -> Recorder:
    """CUDA graphs that share their memory: it is that of the largest, not of all."""
    pool = torch.cuda.graph_pool_handle()

    def record(calls: Sequence[Run]) -> Run:
        graph = timing.capture(calls, pool)

        def replay(_inputs: Sequence[Run] = tuple(calls)) -> None:
            # The graph reads what the calls hold, and holds none of it itself.
            graph.replay()

        return replay

    return record


def _open_windows(
    device: torch.device,
    seconds: float,
    stack: contextlib.ExitStack,
    note: Callable[[str], None],
) -> Windows | None:
    opened = nvml.open_device(device)
    if isinstance(opened, Unavailable):
        note(f"No bytes and energy by NVML: {opened.reason}")
        return None
    stack.enter_context(opened)
    return start_windows(Sampler(opened, CudaQueue(device), seconds=seconds), device, note)


def start_windows(
    sampler: Sampler, device: torch.device, note: Callable[[str], None]
) -> Windows | None:
    """Takes the baseline, to which every window is compared; what NVML refuses is noted."""
    windows = Windows(sampler, sampler.baseline(large_copy(device)))
    for reason in windows.refusals:
        note(f"Not from NVML: {reason}")
    if not windows.useful:
        note("NVML says neither bytes nor energy here: no windows were taken")
        return None
    return windows


def _compiles(device: torch.device, note: Callable[[str], None]) -> bool:
    """Whether torch.compile works: triton may be missing, or the C compiler that it calls."""
    uncompiled = "the FFN and the mixtures of experts ran uncompiled, slower than they can be"
    if not resolve_compiled(None, device):
        note(f"triton is not installed: {uncompiled}")
        return False
    try:
        compile_static(_doubled)(torch.ones(64, device=device))
    except Exception as error:  # whatever inductor, triton or a compiler raises
        last = str(error).strip().splitlines() or [""]
        note(f"torch.compile does not work here ({type(error).__name__}: {last[0]}): {uncompiled}")
        return False
    return True


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return x + x


def measure_ceilings(device: torch.device) -> Ceilings | Unavailable:
    """The rates of a large copy and of a large bfloat16 matrix product, in this run."""
    copy = large_copy(device)
    if isinstance(copy, Unavailable):
        return copy
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    a, b, out = (torch.randn(_MATMUL, _MATMUL, **options) for _ in range(3))
    timings = timing.measure(
        {"copy": Candidate(copy.run), "matmul": Candidate(lambda: torch.mm(a, b, out=out))},
        device,
        warmup=5,
        repeats=_CEILING_REPEATS,
        cold=False,
    )
    if len(timings) < 2:
        return Unavailable("a large matrix product does not fit in the GPU's memory")
    return Ceilings(
        copy_bytes_per_second=copy.bytes / (timings["copy"].median_ms / 1e3),
        matmul_flops_per_second=2 * _MATMUL**3 / (timings["matmul"].median_ms / 1e3),
        measured=True,
    )


def free_memory(device: torch.device, *, collect: bool = False) -> None:
    """Gives memory that nothing refers to any more back to the device.

    Args:
        collect: look for cycles first, such as an exception leaves. Slow: a fifth of a second.
    """
    if collect:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
