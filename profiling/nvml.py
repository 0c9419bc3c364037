"""What NVML, the driver's own library, says of a GPU: GPM counters, energy, clocks, memory.

    python -m ultramem_cuda.profiling.nvml      # what this machine's GPUs offer

NVML is asked through nvidia-ml-py, which the extra ``profiling`` brings. Whatever
is refused (no package, no driver, no permission, a GPU without GPM, a single metric) comes back as
``Unavailable`` with the reason; nothing here raises for the state of the machine.

GPM (GPU performance monitoring, Hopper and newer) computes means between two samples of hardware
counters. All numbers are the GPU's: other processes on it count, too. Of a MIG instance GPM, memory
and name are known, energy and clocks are not: they belong to the whole GPU.

Reference: https://docs.nvidia.com/deploy/nvml-api
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ultramem_cuda import _extras

__all__ = [
    "DRAM",
    "METRICS",
    "OCCUPANCY",
    "SM",
    "TENSOR",
    "GpmCounters",
    "Memory",
    "NvmlDevice",
    "Unavailable",
    "device_uuids",
    "open_device",
]

DRAM = "DRAM_BW_UTIL"
SM = "SM_UTIL"
OCCUPANCY = "SM_OCCUPANCY"
TENSOR = "ANY_TENSOR_UTIL"
METRICS = (DRAM, SM, OCCUPANCY, TENSOR)
"""GPM metrics, as named after NVML_GPM_METRIC_: DRAM bandwidth of its theoretical maximum; SMs that
were busy; warps that were active, of those that fit; time in which SMs did tensor operations."""

_ALL_LINKS = 0xFFFFFFFF  # of a field, as its scope

# NVML has called them throttle reasons and event reasons; the bits are the same. Two more were
# documented once and are still set by some drivers.
_THROTTLE_REASONS = {
    0x001: "GPU idle",
    0x002: "application clocks setting",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability voltage limit",
}

# Return codes (nvml.h) that something follows from.
_NOT_SUPPORTED = 3
_INVALID_ARGUMENT = 2
_NO_PERMISSION = 4
_NOT_FOUND = 6
_DRIVER_NOT_LOADED = 9
_LIBRARY_NOT_FOUND = 12
_FUNCTION_NOT_FOUND = 13
_VERSION_MISMATCH = 18

_HINTS = {
    _NO_PERMISSION: "root may; the driver option NVreg_RestrictProfilingToAdminUsers=0 opens "
    "performance counters to all",
    _DRIVER_NOT_LOADED: "is there an NVIDIA GPU, and is nvidia.ko loaded?",
    _LIBRARY_NOT_FOUND: "libnvidia-ml.so.1 comes with the NVIDIA driver",
    _FUNCTION_NOT_FOUND: "the driver is older than the function",
    _VERSION_MISMATCH: "the driver was updated without a reboot",
}


@dataclass(frozen=True)
class Unavailable:
    """What stands in the place of a value that could not be had."""

    reason: str
    """In a sentence, without its full stop."""
    code: int | None = None
    """What NVML returned, where it was asked."""


T = TypeVar("T")


class _Library:
    """NVML, initialised. ``call`` is the only way to it: no other code sees an NVMLError."""

    def __init__(self, pynvml: Any) -> None:
        self.pynvml = pynvml

    @classmethod
    def open(cls) -> _Library | Unavailable:
        try:
            pynvml = _extras.require("pynvml", extra="profiling")
        except ModuleNotFoundError as error:
            return Unavailable(str(error))
        library = cls(pynvml)
        refused = library.call("nvmlInit")
        return refused if isinstance(refused, Unavailable) else library

    def call(self, name: str, *arguments: object) -> Any:
        """The value of pynvml's function of that name, or an Unavailable."""
        function = getattr(self.pynvml, name, None)
        if function is None:
            return Unavailable(f"{name}: this nvidia-ml-py is too old", _FUNCTION_NOT_FOUND)
        try:
            return function(*arguments)
        except self.pynvml.NVMLError as error:
            return self.refusal(name, error.value)

    def refusal(self, what: str, code: int) -> Unavailable:
        """NVML's return code as a sentence."""
        says = str(self.pynvml.NVMLError(code)).rstrip(".")
        hint = f" ({_HINTS[code]})" if code in _HINTS else ""
        return Unavailable(f"{what}: NVML says {says}{hint}", code)

    def close(self) -> None:
        # NVML counts its users. A shutdown that fails (the GPU is lost) leaves nothing to undo.
        self.call("nvmlShutdown")


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU's or an instance's memory."""

    total: int
    used: int


class NvmlDevice:
    """A GPU, or a MIG instance. Closes NVML when it is left; made by ``open_device``."""

    def __init__(
        self, library: _Library, handle: Any, uuid: str, gpu: Any, gpu_instance: int | None
    ) -> None:
        self._library = library
        self._handle = handle
        self._gpu = gpu  # The whole GPU: the handle itself where there is no MIG.
        self._gpu_instance = gpu_instance
        self.uuid = uuid

    def __enter__(self) -> NvmlDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hands NVML back. The device is of no use afterwards."""
        self._library.close()

    @property
    def is_mig(self) -> bool:
        return self._gpu_instance is not None

    def name(self) -> str | Unavailable:
        return self._library.call("nvmlDeviceGetName", self._handle)

    def energy_joules(self) -> float | Unavailable:
        """Since the driver was loaded. Volta and newer; the counter moves every 20 to 100 ms."""
        millijoules = self._of_whole_gpu("energy", "nvmlDeviceGetTotalEnergyConsumption")
        return millijoules if isinstance(millijoules, Unavailable) else millijoules / 1e3

    def sm_clock_mhz(self) -> int | Unavailable:
        """The SM clock at this moment."""
        kind = self._library.pynvml.NVML_CLOCK_SM
        return self._of_whole_gpu("SM clock", "nvmlDeviceGetClockInfo", kind)

    def nvlink_sent_bytes(self) -> int | Unavailable:
        """What the GPU has sent over all its NVLinks, data alone, since a time of the driver's
        choosing. The counter moves every few milliseconds, by KiB."""
        field = self._library.pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX
        request = [(field, _ALL_LINKS)]
        found = self._of_whole_gpu("NVLink", "nvmlDeviceGetFieldValues", request)
        if isinstance(found, Unavailable):
            return found
        (value,) = found
        if value.nvmlReturn != 0:
            return self._library.refusal("NVLink", value.nvmlReturn)
        return int(value.value.ullVal) * 1024

    def throttle_reasons(self) -> tuple[str, ...] | Unavailable:
        """What keeps the clocks from their maximum at this moment, in words."""
        reasons = self._of_whole_gpu("throttle reasons", "nvmlDeviceGetCurrentClocksEventReasons")
        if isinstance(reasons, Unavailable) and reasons.code == _FUNCTION_NOT_FOUND:
            older = "nvmlDeviceGetCurrentClocksThrottleReasons"
            reasons = self._of_whole_gpu("throttle reasons", older)
        if isinstance(reasons, Unavailable):
            return reasons
        bits = [1 << i for i in range(64) if reasons >> i & 1]
        return tuple(_THROTTLE_REASONS.get(bit, f"reason {bit:#x}") for bit in bits)

    def memory(self) -> Memory | Unavailable:
        """Memory of the GPU or the instance. What the driver keeps for itself is not used."""
        version = getattr(self._library.pynvml, "nvmlMemory_v2", None)
        memory = self._library.call("nvmlDeviceGetMemoryInfo", self._handle, version)
        if isinstance(memory, Unavailable):
            return memory
        return Memory(total=memory.total, used=memory.used)

    def gpm(self) -> Unavailable | None:
        """Why there are no GPM counters; None where there are."""
        support = self._library.call("nvmlGpmQueryDeviceSupport", self._gpu)
        if isinstance(support, Unavailable):
            return Unavailable(f"GPM: {support.reason}", support.code)
        if not support.isSupportedDevice:
            return Unavailable("GPM: this GPU has no such counters (Hopper and newer have)")
        return None

    def counters(self) -> GpmCounters:
        """For one window; a context manager."""
        return GpmCounters(self._library, self._gpu, self._gpu_instance, self.gpm())

    def _of_whole_gpu(self, what: str, function: str, *arguments: object) -> Any:
        # The GPU's number says nothing of a slice, whose handle NVML refuses with various codes.
        if self.is_mig:
            return Unavailable(f"{what}: known for the whole GPU, not for a MIG instance")
        return self._library.call(function, self._handle, *arguments)


class GpmCounters:
    """Two samples of GPM's counters: ``begin``, at least 100 ms, ``end``, ``shares``.

    A context manager, because NVML allocates the samples. After a refusal nothing more is asked,
    and every metric's share is that refusal.
    """

    def __init__(
        self, library: _Library, gpu: Any, gpu_instance: int | None, refused: Unavailable | None
    ) -> None:
        self._library = library
        self._gpu = gpu
        self._gpu_instance = gpu_instance
        self._refused = refused
        self._samples: list[Any] = []

    def __enter__(self) -> GpmCounters:
        for _ in range(2):
            sample = self._ask("nvmlGpmSampleAlloc")
            if self._refused is None:
                self._samples.append(sample)
        return self

    def __exit__(self, *_: object) -> None:
        for sample in self._samples:
            self._library.call("nvmlGpmSampleFree", sample)
        self._samples.clear()

    def begin(self) -> None:
        self._take(0)

    def end(self) -> None:
        self._take(1)

    def shares(self) -> dict[str, float | Unavailable]:
        """Means between the samples, by the names of METRICS, from 0 to 1."""
        pynvml = self._library.pynvml
        ids = {name: getattr(pynvml, f"NVML_GPM_METRIC_{name}") for name in METRICS}
        if self._refused is None:
            request = pynvml.c_nvmlGpmMetricsGet_t()
            request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
            request.numMetrics = len(ids)
            request.sample1, request.sample2 = self._samples
            for metric, number in zip(request.metrics, ids.values(), strict=False):
                metric.metricId = number
            self._ask("nvmlGpmMetricsGet", request)
        if self._refused is not None:
            return dict.fromkeys(ids, self._refused)
        return {
            name: self._share(name, metric)
            for name, metric in zip(ids, request.metrics, strict=False)
        }

    def _share(self, name: str, metric: Any) -> float | Unavailable:
        # Each metric has a return code of its own, beside the call's.
        if metric.nvmlReturn != 0:
            return self._library.refusal(f"GPM metric {name}", metric.nvmlReturn)
        if not math.isfinite(metric.value):
            return Unavailable(f"GPM metric {name}: NVML gives {metric.value} for it")
        return metric.value / 100

    def _take(self, which: int) -> None:
        if self._refused is not None:
            return
        if self._gpu_instance is None:
            self._ask("nvmlGpmSampleGet", self._gpu, self._samples[which])
        else:
            sample = self._samples[which]
            self._ask("nvmlGpmMigSampleGet", self._gpu, self._gpu_instance, sample)

    def _ask(self, function: str, *arguments: object) -> Any:
        if self._refused is None:
            answer = self._library.call(function, *arguments)
            if not isinstance(answer, Unavailable):
                return answer
            self._refused = Unavailable(f"GPM: {answer.reason}", answer.code)
        return self._refused


def open_device(device: torch.device | str) -> NvmlDevice | Unavailable:
    """NVML's view of a CUDA device of torch's, or of the device with a UUID.

    NVML's own order of devices is another than CUDA's, so torch's are matched by UUID, whatever
    CUDA_VISIBLE_DEVICES leaves out.

    Args:
        device: a CUDA device, or a UUID as nvidia-smi writes it ("GPU-...", "MIG-...").

    Raises:
        ValueError: the device is of another kind.
    """
    if isinstance(device, str):
        uuids = [device]
    elif device.type != "cuda":
        raise ValueError(f"NVML knows CUDA devices alone, got {device}")
    elif not torch.cuda.is_available():
        return Unavailable("torch finds no CUDA GPU")
    else:
        bare = str(torch.cuda.get_device_properties(device).uuid)
        uuids = [f"GPU-{bare}", f"MIG-{bare}"]
    library = _Library.open()
    if isinstance(library, Unavailable):
        return library
    found = _find(library, uuids)
    if isinstance(found, Unavailable):
        library.close()
    return found


def _find(library: _Library, uuids: Sequence[str]) -> NvmlDevice | Unavailable:
    """The device that one of the UUIDs is that of."""
    for uuid in uuids:
        handle = library.call("nvmlDeviceGetHandleByUUID", uuid)
        if not isinstance(handle, Unavailable):
            return _whole_or_instance(library, handle, uuid)
        if handle.code not in (_NOT_FOUND, _INVALID_ARGUMENT):
            return handle
    return Unavailable(f"NVML knows no device {' or '.join(uuids)}", _NOT_FOUND)


def _whole_or_instance(library: _Library, handle: Any, uuid: str) -> NvmlDevice | Unavailable:
    is_mig = library.call("nvmlDeviceIsMigDeviceHandle", handle)
    if not isinstance(is_mig, Unavailable) and is_mig:
        gpu = library.call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        instance = library.call("nvmlDeviceGetGpuInstanceId", handle)
        for answer in (gpu, instance):
            if isinstance(answer, Unavailable):
                return answer
        return NvmlDevice(library, handle, uuid, gpu, instance)
    # GPUs that cannot be cut up refuse the question.
    mode = library.call("nvmlDeviceGetMigMode", handle)
    if isinstance(mode, Unavailable):
        if mode.code not in (_NOT_SUPPORTED, _FUNCTION_NOT_FOUND):
            return mode
    elif mode[0] == library.pynvml.NVML_DEVICE_MIG_ENABLE:
        return Unavailable(
            f"{uuid} is cut into MIG instances, of which the one in use must be named: "
            "CUDA_VISIBLE_DEVICES=MIG-..., as nvidia-smi -L lists them"
        )
    return NvmlDevice(library, handle, uuid, handle, None)


def device_uuids() -> list[str] | Unavailable:
    """UUIDs of all GPUs that NVML sees, each followed by those of its MIG instances."""
    library = _Library.open()
    if isinstance(library, Unavailable):
        return library
    try:
        count = library.call("nvmlDeviceGetCount")
        if isinstance(count, Unavailable):
            return count
        uuids: list[str] = []
        for index in range(count):
            gpu = library.call("nvmlDeviceGetHandleByIndex", index)
            if isinstance(gpu, Unavailable):
                return gpu
            for handle in [gpu, *_instances(library, gpu)]:
                uuid = library.call("nvmlDeviceGetUUID", handle)
                if isinstance(uuid, Unavailable):
                    return uuid
                uuids.append(uuid)
        return uuids
    finally:
        library.close()


def _instances(library: _Library, gpu: Any) -> list[Any]:
    """Handles of a GPU's MIG instances; none where it has no MIG."""
    most = library.call("nvmlDeviceGetMaxMigDeviceCount", gpu)
    if isinstance(most, Unavailable):
        return []
    handles = [library.call("nvmlDeviceGetMigDeviceHandleByIndex", gpu, i) for i in range(most)]
    # Those that could exist and do not are refused.
    return [handle for handle in handles if not isinstance(handle, Unavailable)]


def describe(device: NvmlDevice) -> list[str]:
    """What the device offers, a line each: the value, or why there is none. Takes 0.3 s."""

    def line(title: str, value: T | Unavailable, show: Callable[[T], str]) -> str:
        return f"  {title:<18}{value.reason if isinstance(value, Unavailable) else show(value)}"

    with device.counters() as counters:
        counters.begin()
        time.sleep(0.3)
        counters.end()
        shares = counters.shares()
    name = device.name()
    return [
        f"{name.reason if isinstance(name, Unavailable) else name}, {device.uuid}",
        *(line(metric, share, lambda value: f"{value:.2%}") for metric, share in shares.items()),
        line("energy", device.energy_joules(), lambda j: f"{j:.3f} J since the driver was loaded"),
        line("NVLink", device.nvlink_sent_bytes(), lambda sent: f"{sent / 1e9:.3f} GB sent"),
        line("SM clock", device.sm_clock_mhz(), lambda mhz: f"{mhz} MHz"),
        line("throttle reasons", device.throttle_reasons(), lambda r: ", ".join(r) or "none"),
        line("memory", device.memory(), _in_gigabytes),
    ]


def _in_gigabytes(memory: Memory) -> str:
    return f"{memory.used / 1e9:.1f} of {memory.total / 1e9:.1f} GB in use"


def main() -> int:
    """Prints what NVML offers on this machine. Always 0: that it offers nothing is an answer."""
    uuids = device_uuids()
    if isinstance(uuids, Unavailable):
        print(uuids.reason)
        return 0
    for uuid in uuids:
        device = open_device(uuid)
        if isinstance(device, Unavailable):
            print(device.reason)
            continue
        with device:
            print("\n".join(describe(device)))
    if not uuids:
        print("NVML sees no GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
