"""A GPU in simulated time, and a stand-in for the NVML library that reports on it.

nvidia-ml-py itself is not replaced: the stand-in takes the place of the shared library that it
loads, with C functions of NVML's signatures that return NVML's codes (nvml.h).
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from ctypes import POINTER, c_char_p, c_double, c_int, c_long, c_uint, c_ulonglong, c_void_p
from typing import Any

import pytest

SUCCESS = 0
UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
DRIVER_NOT_LOADED = 9
GPU_IS_LOST = 15
NOT_READY = 27
UNKNOWN = 999

DRAM_BW_UTIL, SM_UTIL, SM_OCCUPANCY, ANY_TENSOR_UTIL = 10, 2, 3, 5

GPU_UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"
MIG_UUID = "MIG-fedcba98-7654-3210-fedc-ba9876543210"
_GPU, _MIG = 0x1000, 0x2000
_GPU_INSTANCE = 7
_NVLINK_SENT, _ALL_LINKS = 138, 0xFFFFFFFF  # a field, and its scope


class SimulatedGpu:
    """Runs passes one after the other; clock and queue for ``sampling``.

    Bytes and energy of a pass are spread evenly over its time. Bytes that no pass moves
    (``background``) and the idle GPU's watts come on top.
    """

    def __init__(
        self,
        *,
        bytes_at_full: float = 3.7e12,
        background: float = 9e10,
        idle_watts: float = 110.0,
    ) -> None:
        self.bytes_at_full = bytes_at_full
        self.background = background
        self.idle_watts = idle_watts
        self.time = 0.0
        # Of passes: their beginnings and ends, and running sums of bytes and joules at their ends.
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._bytes = [0.0]
        self._joules = [0.0]

    def run(
        self, seconds: float, bytes: float, watts: float = 400.0, launch_seconds: float = 0.0
    ) -> Callable[[], None]:
        """A function that enqueues a pass; ``watts`` are those above idle."""

        def enqueue() -> None:
            self.time += launch_seconds
            begin = max(self.time, self._end)
            self._begins.append(begin)
            self._ends.append(begin + seconds)
            self._bytes.append(self._bytes[-1] + bytes)
            self._joules.append(self._joules[-1] + watts * seconds)

        return enqueue

    @property
    def _end(self) -> float:
        return self._ends[-1] if self._ends else 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def synchronize(self) -> None:
        self.time = max(self.time, self._end)

    def mark(self) -> _SimulatedMark:
        return _SimulatedMark(self, max(self.time, self._end))

    def _until(self, time: float, sums: list[float]) -> float:
        done = bisect.bisect_right(self._ends, time)
        if done == len(self._ends) or time <= self._begins[done]:
            return sums[done]
        part = (time - self._begins[done]) / (self._ends[done] - self._begins[done])
        return sums[done] + part * (sums[done + 1] - sums[done])

    def dram_bytes(self, time: float) -> float:
        return self.background * time + self._until(time, self._bytes)

    def joules(self, time: float) -> float:
        return self.idle_watts * time + self._until(time, self._joules)


class _SimulatedMark:
    def __init__(self, gpu: SimulatedGpu, time: float) -> None:
        self.gpu, self.time = gpu, time

    def reached(self) -> bool:
        return self.gpu.time >= self.time

    def seconds_since(self, earlier: _SimulatedMark) -> float:
        return self.time - earlier.time


class _Metric(ctypes.Structure):
    _fields_ = (
        ("metricId", c_uint),
        ("nvmlReturn", c_int),
        ("value", c_double),
        ("names", c_char_p * 3),
    )


class _MetricsGet(ctypes.Structure):
    _fields_ = (
        ("version", c_uint),
        ("numMetrics", c_uint),
        ("sample1", c_void_p),
        ("sample2", c_void_p),
        ("metrics", _Metric * 98),
    )


class _GpmSupport(ctypes.Structure):
    _fields_ = (("version", c_uint), ("isSupportedDevice", c_uint))


class _MemoryV2(ctypes.Structure):
    _fields_ = (
        ("version", c_uint),
        ("total", c_ulonglong),
        ("reserved", c_ulonglong),
        ("free", c_ulonglong),
        ("used", c_ulonglong),
    )


class _FieldValue(ctypes.Structure):
    _fields_ = (
        ("fieldId", c_uint),
        ("scopeId", c_uint),
        ("timestamp", c_long),
        ("latencyUsec", c_long),
        ("valueType", c_uint),
        ("nvmlReturn", c_uint),
        ("value", c_ulonglong),
    )


def _c(*argtypes: Any, restype: Any = c_int) -> Callable[[Any], Any]:
    def mark(method: Any) -> Any:
        method.prototype = ctypes.CFUNCTYPE(restype, *argtypes)
        return method

    return mark


_INTEGER = POINTER(c_uint)


class NvmlStandIn:
    """The library of a machine with one GPU, perhaps with one MIG instance on it.

    Args:
        gpu: what it reports on.
        returns: codes that functions return instead of doing their work, by name.
        metric_returns: codes of single GPM metrics, by number.
        absent: functions that this version of the library does not have.
        gpm: whether the GPU has GPM counters.
        mig: the GPU is in MIG mode and has one instance.
        energy_step: seconds between two steps of the energy counter.
        gpm_lag: seconds by which GPM's counters lag behind the GPU.
        lost_at: the time from which on the GPU is lost.

    ``asked`` lists the functions that were called; ``errors`` what went wrong in the stand-in.
    """

    def __init__(
        self,
        gpu: SimulatedGpu,
        *,
        returns: Mapping[str, int] | None = None,
        metric_returns: Mapping[int, int] | None = None,
        absent: Collection[str] = (),
        gpm: bool = True,
        mig: bool = False,
        energy_step: float = 0.1,
        gpm_lag: float = 0.12,
        lost_at: float = math.inf,
        throttle_reasons: int = 0,
        nvlink_kib: int | None = None,
    ) -> None:
        self.gpu = gpu
        self.returns = dict(returns or {})
        self.metric_returns = dict(metric_returns or {})
        self.absent = absent
        self.gpm = gpm
        self.mig = mig
        self.energy_step = energy_step
        self.gpm_lag = gpm_lag
        self.lost_at = lost_at
        self.throttle_reasons_bits = throttle_reasons
        self.nvlink_kib = nvlink_kib  # None: no NVLink
        self.users = 0
        self.samples: dict[int, float | None] = {}
        self.asked: list[str] = []
        self.errors: list[BaseException] = []
        self._numbers = itertools.count(0x100)
        self._kept: list[Any] = []
        self._texts: dict[int, Any] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> NvmlStandIn:
        """Makes pynvml load this library."""
        load_as(monkeypatch, lambda _: self)
        return self

    def __getattr__(self, name: str) -> Any:
        method = getattr(type(self), f"c_{name}", None)
        if method is None or name in self.absent:
            raise AttributeError(name)

        def called(*arguments: Any) -> Any:
            self.asked.append(name)
            try:
                return self._refusal(name) or method(self, *arguments)
            except BaseException as error:  # ctypes would print it and return 0, success.
                self.errors.append(error)
                return UNKNOWN

        function = method.prototype(called)
        self._kept.append(function)
        # As in a library: an address, whose arguments ctypes knows nothing of.
        return ctypes.CFUNCTYPE(c_int)(ctypes.cast(function, c_void_p).value)

    def _refusal(self, name: str) -> int:
        if name == "nvmlErrorString":
            return SUCCESS
        if self.gpu.time >= self.lost_at:
            return GPU_IS_LOST
        if not self.users and not name.startswith("nvmlInit"):
            return UNINITIALIZED
        return self.returns.get(name, SUCCESS)

    @_c(c_uint)
    def c_nvmlInitWithFlags(self, flags: int) -> int:
        self.users += 1
        return SUCCESS

    @_c()
    def c_nvmlShutdown(self) -> int:
        self.users -= 1
        return SUCCESS

    @_c(c_int, restype=c_void_p)
    def c_nvmlErrorString(self, code: int) -> int:
        text = {NOT_READY: b"Not Ready"}.get(code, b"Unknown Error")
        self._texts[code] = ctypes.create_string_buffer(text)
        return ctypes.addressof(self._texts[code])

    @_c(_INTEGER)
    def c_nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count[0] = 1
        return SUCCESS

    @_c(c_uint, POINTER(c_void_p))
    def c_nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        if index:
            return INVALID_ARGUMENT
        handle[0] = _GPU
        return SUCCESS

    @_c(c_char_p, POINTER(c_void_p))
    def c_nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        known = {GPU_UUID: _GPU, **({MIG_UUID: _MIG} if self.mig else {})}
        if uuid.decode() not in known:
            return NOT_FOUND
        handle[0] = known[uuid.decode()]
        return SUCCESS

    @_c(c_void_p, POINTER(ctypes.c_char), c_uint)
    def c_nvmlDeviceGetUUID(self, handle: int, text: Any, size: int) -> int:
        return self._text({_GPU: GPU_UUID, _MIG: MIG_UUID}[handle], text, size)

    @_c(c_void_p, POINTER(ctypes.c_char), c_uint)
    def c_nvmlDeviceGetName(self, handle: int, text: Any, size: int) -> int:
        name = {_GPU: "Simulated H100", _MIG: "Simulated H100 MIG 3g.40gb"}[handle]
        return self._text(name, text, size)

    def _text(self, value: str, text: Any, size: int) -> int:
        data = value.encode() + b"\0"
        assert len(data) <= size
        ctypes.memmove(text, data, len(data))
        return SUCCESS

    @_c(c_void_p, _INTEGER, _INTEGER)
    def c_nvmlDeviceGetMigMode(self, handle: int, current: Any, pending: Any) -> int:
        current[0] = pending[0] = int(self.mig)
        return SUCCESS

    @_c(c_void_p, _INTEGER)
    def c_nvmlDeviceGetMaxMigDeviceCount(self, handle: int, count: Any) -> int:
        count[0] = 7
        return SUCCESS

    @_c(c_void_p, c_uint, POINTER(c_void_p))
    def c_nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: int, index: int, handle: Any) -> int:
        if not self.mig or index != 2:
            return NOT_FOUND
        handle[0] = _MIG
        return SUCCESS

    @_c(c_void_p, _INTEGER)
    def c_nvmlDeviceIsMigDeviceHandle(self, handle: int, answer: Any) -> int:
        answer[0] = int(handle == _MIG)
        return SUCCESS

    @_c(c_void_p, POINTER(c_void_p))
    def c_nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: int, gpu: Any) -> int:
        gpu[0] = _GPU
        return SUCCESS if handle == _MIG else INVALID_ARGUMENT

    @_c(c_void_p, _INTEGER)
    def c_nvmlDeviceGetGpuInstanceId(self, handle: int, number: Any) -> int:
        number[0] = _GPU_INSTANCE
        return SUCCESS if handle == _MIG else INVALID_ARGUMENT

    @_c(c_void_p, POINTER(c_ulonglong))
    def c_nvmlDeviceGetTotalEnergyConsumption(self, handle: int, millijoules: Any) -> int:
        # Plus a little: the sum of many small sleeps must not fall short of a whole step.
        steps = math.floor(self.gpu.time / self.energy_step + 1e-6)
        millijoules[0] = round(1e3 * self.gpu.joules(steps * self.energy_step))
        return SUCCESS

    @_c(c_void_p, c_uint, _INTEGER)
    def c_nvmlDeviceGetClockInfo(self, handle: int, kind: int, mhz: Any) -> int:
        mhz[0] = {0: 1755, 1: 1980, 2: 2619}[kind]
        return SUCCESS

    @_c(c_void_p, c_int, POINTER(_FieldValue))
    def c_nvmlDeviceGetFieldValues(self, handle: int, count: int, values: Any) -> int:
        for i in range(count):
            known = values[i].fieldId == _NVLINK_SENT and values[i].scopeId == _ALL_LINKS
            if known and self.nvlink_kib is not None:
                values[i].value, values[i].nvmlReturn = self.nvlink_kib, SUCCESS
            else:
                values[i].nvmlReturn = NOT_SUPPORTED
        return SUCCESS

    def _throttle_reasons(self, handle: int, reasons: Any) -> int:
        reasons[0] = self.throttle_reasons_bits
        return SUCCESS

    c_nvmlDeviceGetCurrentClocksEventReasons = _c(c_void_p, POINTER(c_ulonglong))(
        lambda self, handle, reasons: self._throttle_reasons(handle, reasons)
    )
    c_nvmlDeviceGetCurrentClocksThrottleReasons = _c(c_void_p, POINTER(c_ulonglong))(
        lambda self, handle, reasons: self._throttle_reasons(handle, reasons)
    )

    @_c(c_void_p, POINTER(_MemoryV2))
    def c_nvmlDeviceGetMemoryInfo_v2(self, handle: int, memory: Any) -> int:
        assert memory[0].version == (2 << 24 | ctypes.sizeof(_MemoryV2))
        total = 80_000_000_000 if handle == _GPU else 40_000_000_000
        memory[0].total, memory[0].used, memory[0].reserved = total, 3_000_000_000, 500_000_000
        return SUCCESS

    @_c(c_void_p, POINTER(_GpmSupport))
    def c_nvmlGpmQueryDeviceSupport(self, handle: int, support: Any) -> int:
        assert handle == _GPU
        assert support[0].version == 1
        support[0].isSupportedDevice = int(self.gpm)
        return SUCCESS

    @_c(POINTER(c_void_p))
    def c_nvmlGpmSampleAlloc(self, sample: Any) -> int:
        sample[0] = number = next(self._numbers)
        self.samples[number] = None
        return SUCCESS

    @_c(c_void_p)
    def c_nvmlGpmSampleFree(self, sample: int) -> int:
        del self.samples[sample]
        return SUCCESS

    @_c(c_void_p, c_void_p)
    def c_nvmlGpmSampleGet(self, handle: int, sample: int) -> int:
        assert handle == _GPU
        if self.mig:
            return NOT_SUPPORTED
        return self._take(sample)

    @_c(c_void_p, c_uint, c_void_p)
    def c_nvmlGpmMigSampleGet(self, handle: int, instance: int, sample: int) -> int:
        assert handle == _GPU
        assert instance == _GPU_INSTANCE
        return self._take(sample)

    def _take(self, sample: int) -> int:
        assert sample in self.samples
        self.samples[sample] = self.gpu.time - self.gpm_lag
        return SUCCESS

    @_c(POINTER(_MetricsGet))
    def c_nvmlGpmMetricsGet(self, request: Any) -> int:
        request = request[0]
        assert request.version == 1
        first, second = self.samples[request.sample1], self.samples[request.sample2]
        if first is None or second is None or second - first < 0.1:
            return INVALID_ARGUMENT
        moved = self.gpu.dram_bytes(second) - self.gpu.dram_bytes(first)
        shares = {
            DRAM_BW_UTIL: moved / (second - first) / self.gpu.bytes_at_full,
            SM_UTIL: 0.75,
            SM_OCCUPANCY: 0.5,
            ANY_TENSOR_UTIL: 0.25,
        }
        for metric in request.metrics[: request.numMetrics]:
            metric.nvmlReturn = self.metric_returns.get(metric.metricId, SUCCESS)
            # NVML leaves the value of a metric that it refuses undefined.
            metric.value = math.nan if metric.nvmlReturn else 100 * shares[metric.metricId]
        return SUCCESS


def load_as(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> None:
    """Makes pynvml load its library by a function of the library's name."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    monkeypatch.setattr(pynvml, "CDLL", load)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
