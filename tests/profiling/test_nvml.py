"""What NVML refuses becomes a sentence; what it says is read rightly."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import nvml_stand_in as stand_in
import pytest
import torch
from nvml_stand_in import GPU_UUID, MIG_UUID, NvmlStandIn, SimulatedGpu

from ultramem_cuda.profiling import nvml
from ultramem_cuda.profiling.nvml import NvmlDevice, Unavailable

Library = Callable[..., NvmlStandIn]


@pytest.fixture
def gpu() -> SimulatedGpu:
    return SimulatedGpu()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu) -> Iterator[Library]:
    """Installs a stand-in. Afterwards it must have been shut down, with all samples freed."""
    installed: list[NvmlStandIn] = []

    def install(**options: Any) -> NvmlStandIn:
        installed.append(NvmlStandIn(gpu, **options).install(monkeypatch))
        return installed[-1]

    yield install
    for one in installed:
        assert not one.errors
        assert one.users == 0
        assert not one.samples


def _open(uuid: str = GPU_UUID) -> NvmlDevice:
    device = nvml.open_device(uuid)
    assert isinstance(device, NvmlDevice), device
    return device


def _shares(device: NvmlDevice, gpu: SimulatedGpu) -> dict[str, float | Unavailable]:
    with device.counters() as counters:
        counters.begin()
        gpu.sleep(1)
        counters.end()
        return counters.shares()


def _reasons(values: dict[str, float | Unavailable]) -> set[str]:
    assert all(isinstance(value, Unavailable) for value in values.values()), values
    return {value.reason for value in values.values()}


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for answer in (nvml.open_device(GPU_UUID), nvml.device_uuids()):
        assert isinstance(answer, Unavailable)
        assert 'pip install "ultramem_cuda[profiling]"' in answer.reason


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    stand_in.load_as(monkeypatch, missing)
    answer = nvml.open_device(GPU_UUID)
    assert isinstance(answer, Unavailable)
    assert answer.code == 12
    assert "NVML Shared Library Not Found" in answer.reason
    assert "comes with the NVIDIA driver" in answer.reason


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (stand_in.DRIVER_NOT_LOADED, "Driver Not Loaded"),
        (stand_in.NO_PERMISSION, "Insufficient Permissions"),
        (stand_in.NOT_READY, "Not Ready"),  # Known to the library alone, not to pynvml.
        (12345, "Unknown Error"),  # Known to neither.
    ],
)
def test_library_that_does_not_start(library: Library, code: int, text: str) -> None:
    library(returns={"nvmlInitWithFlags": code})
    for answer in (nvml.open_device(GPU_UUID), nvml.device_uuids()):
        assert isinstance(answer, Unavailable)
        assert answer.code == code
        assert answer.reason.startswith(f"nvmlInit: NVML says {text}")


def test_unknown_uuid(library: Library) -> None:
    library()
    answer = nvml.open_device("GPU-another")
    assert isinstance(answer, Unavailable)
    assert answer.reason == "NVML knows no device GPU-another"


@pytest.mark.parametrize("name", ["nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMigMode"])
def test_refused_device(library: Library, name: str) -> None:
    library(returns={name: stand_in.GPU_IS_LOST})
    answer = nvml.open_device(GPU_UUID)
    assert isinstance(answer, Unavailable)
    assert answer.reason == f"{name}: NVML says GPU is lost"


def test_gpu_without_mig(library: Library) -> None:
    library(returns={"nvmlDeviceGetMigMode": stand_in.NOT_SUPPORTED})
    with _open() as device:
        assert not device.is_mig


def _pretend_cuda(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(("uuid", "mig"), [(GPU_UUID, False), (MIG_UUID, True)])
def test_torch_device_is_matched_by_uuid(
    library: Library, monkeypatch: pytest.MonkeyPatch, uuid: str, mig: bool
) -> None:
    library(mig=mig)
    _pretend_cuda(monkeypatch, uuid[4:])
    device = nvml.open_device(torch.device("cuda:3"))
    assert isinstance(device, NvmlDevice)
    with device:
        assert device.uuid == uuid
        assert device.is_mig == mig


def test_torch_device_that_nvml_does_not_know(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library()
    _pretend_cuda(monkeypatch, "0")
    answer = nvml.open_device(torch.device("cuda"))
    assert isinstance(answer, Unavailable)
    assert answer.reason == "NVML knows no device GPU-0 or MIG-0"


def test_torch_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nvml.open_device(torch.device("cuda")) == Unavailable("torch finds no CUDA GPU")


def test_other_devices_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="CUDA devices alone, got cpu"):
        nvml.open_device(torch.device("cpu"))


def test_values(library: Library, gpu: SimulatedGpu) -> None:
    library(throttle_reasons=0x4 | 0x40 | 0x8000)
    gpu.sleep(10.05)
    with _open() as device:
        assert device.name() == "Simulated H100"
        assert device.energy_joules() == pytest.approx(1100)
        assert device.sm_clock_mhz() == 1980
        assert device.throttle_reasons() == (
            "software power cap",
            "hardware thermal slowdown",
            "reason 0x8000",
        )
        assert device.memory() == nvml.Memory(total=80_000_000_000, used=3_000_000_000)
        shares = _shares(device, gpu)
    assert shares[nvml.DRAM] == pytest.approx(9e10 / 3.7e12)
    assert (shares[nvml.SM], shares[nvml.OCCUPANCY], shares[nvml.TENSOR]) == (0.75, 0.5, 0.25)


def test_nvlink(library: Library) -> None:
    library(nvlink_kib=5)
    with _open() as device:
        assert device.nvlink_sent_bytes() == 5 * 1024
    library()
    with _open() as device:
        assert device.nvlink_sent_bytes() == Unavailable(
            "NVLink: NVML says Not Supported", stand_in.NOT_SUPPORTED
        )


def test_throttle_reasons_of_an_older_driver(library: Library) -> None:
    library(absent=["nvmlDeviceGetCurrentClocksEventReasons"], throttle_reasons=1)
    with _open() as device:
        assert device.throttle_reasons() == ("GPU idle",)


def test_older_nvidia_ml_py(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library(throttle_reasons=8)
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.delattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons")
    monkeypatch.delattr(pynvml, "nvmlGpmQueryDeviceSupport")
    with _open() as device:
        assert device.throttle_reasons() == ("hardware slowdown",)
        refused = device.gpm()
    assert refused is not None
    assert refused.reason == "GPM: nvmlGpmQueryDeviceSupport: this nvidia-ml-py is too old"


@pytest.mark.parametrize("lacking", ["counters", "function", "query"])
def test_gpu_without_gpm(library: Library, gpu: SimulatedGpu, lacking: str) -> None:
    query = "nvmlGpmQueryDeviceSupport"
    options, sentence = {
        "counters": ({"gpm": False}, "this GPU has no such counters (Hopper and newer have)"),
        "function": ({"absent": [query]}, f"{query}: NVML says Function Not Found"),
        "query": (
            {"returns": {query: stand_in.NOT_SUPPORTED}},
            f"{query}: NVML says Not Supported",
        ),
    }[lacking]
    one = library(**options)
    with _open() as device:
        (reason,) = _reasons(_shares(device, gpu))
        assert reason.startswith(f"GPM: {sentence}")
        assert device.sm_clock_mhz() == 1980
    assert not any(name.startswith("nvmlGpmSample") for name in one.asked)


@pytest.mark.parametrize(
    "name", ["nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlGpmMetricsGet", "nvmlGpmSampleFree"]
)
def test_gpm_that_is_refused(library: Library, gpu: SimulatedGpu, name: str) -> None:
    one = library(returns={name: stand_in.NO_PERMISSION})
    with _open() as device:
        shares = _shares(device, gpu)
    if name == "nvmlGpmSampleFree":
        assert shares[nvml.SM] == 0.75
        assert one.asked.count(name) == 2
        one.samples.clear()
    else:
        (reason,) = _reasons(shares)
        assert reason.startswith(f"GPM: {name}: NVML says Insufficient Permissions (root may")
        assert one.asked.count(name) == 1


def test_metric_that_is_refused(library: Library, gpu: SimulatedGpu) -> None:
    library(
        metric_returns={
            stand_in.DRAM_BW_UTIL: stand_in.NOT_SUPPORTED,
            stand_in.ANY_TENSOR_UTIL: stand_in.NOT_READY,
        }
    )
    with _open() as device:
        shares = _shares(device, gpu)
    assert shares[nvml.DRAM] == Unavailable(
        "GPM metric DRAM_BW_UTIL: NVML says Not Supported", stand_in.NOT_SUPPORTED
    )
    assert shares[nvml.TENSOR] == Unavailable(
        "GPM metric ANY_TENSOR_UTIL: NVML says Not Ready", stand_in.NOT_READY
    )
    assert (shares[nvml.SM], shares[nvml.OCCUPANCY]) == (0.75, 0.5)


def test_metric_that_is_no_number(library: Library, gpu: SimulatedGpu) -> None:
    library()
    gpu.bytes_at_full = float("nan")
    with _open() as device:
        shares = _shares(device, gpu)
    assert shares[nvml.DRAM] == Unavailable("GPM metric DRAM_BW_UTIL: NVML gives nan for it")


def test_samples_are_freed_when_the_window_fails(library: Library) -> None:
    one = library()

    def fail(device: NvmlDevice) -> None:
        with device, device.counters() as counters:
            counters.begin()
            assert len(one.samples) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(_open())


def test_mig_instance(library: Library, gpu: SimulatedGpu) -> None:
    """Its counters are its own; what NVML knows of the GPU alone is not passed off as its."""
    one = library(mig=True)
    with _open(MIG_UUID) as device:
        assert device.name() == "Simulated H100 MIG 3g.40gb"
        assert device.memory() == nvml.Memory(total=40_000_000_000, used=3_000_000_000)
        assert _shares(device, gpu)[nvml.SM] == 0.75
        assert "nvmlGpmMigSampleGet" in one.asked
        assert "nvmlGpmSampleGet" not in one.asked
        for what, value in {
            "energy": device.energy_joules(),
            "SM clock": device.sm_clock_mhz(),
            "throttle reasons": device.throttle_reasons(),
        }.items():
            assert value == Unavailable(f"{what}: known for the whole GPU, not for a MIG instance")


def test_gpu_in_mig_mode_is_not_an_instance(library: Library) -> None:
    library(mig=True)
    answer = nvml.open_device(GPU_UUID)
    assert isinstance(answer, Unavailable)
    assert answer.reason.startswith(f"{GPU_UUID} is cut into MIG instances")


def test_uuids(library: Library) -> None:
    library()
    assert nvml.device_uuids() == [GPU_UUID]
    library(mig=True)
    assert nvml.device_uuids() == [GPU_UUID, MIG_UUID]
    library(returns={"nvmlDeviceGetCount_v2": stand_in.UNKNOWN})
    answer = nvml.device_uuids()
    assert isinstance(answer, Unavailable)
    assert answer.reason == "nvmlDeviceGetCount: NVML says Unknown Error"


def test_description(
    library: Library,
    gpu: SimulatedGpu,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(time, "sleep", gpu.sleep)
    library(
        nvlink_kib=10**6,
        metric_returns={stand_in.SM_OCCUPANCY: stand_in.NOT_SUPPORTED},
        returns={"nvmlDeviceGetTotalEnergyConsumption": stand_in.NOT_SUPPORTED},
    )
    assert nvml.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Simulated H100, {GPU_UUID}"
    values = dict(line.strip().split("  ", 1) for line in lines[1:])
    assert {name: value.strip() for name, value in values.items()} == {
        "DRAM_BW_UTIL": "2.43%",
        "SM_UTIL": "75.00%",
        "SM_OCCUPANCY": "GPM metric SM_OCCUPANCY: NVML says Not Supported",
        "ANY_TENSOR_UTIL": "25.00%",
        "energy": "nvmlDeviceGetTotalEnergyConsumption: NVML says Not Supported",
        "NVLink": "1.024 GB sent",
        "SM clock": "1980 MHz",
        "throttle reasons": "none",
        "memory": "3.0 of 80.0 GB in use",
    }


def test_description_of_mig(
    library: Library,
    gpu: SimulatedGpu,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(time, "sleep", gpu.sleep)
    library(mig=True)
    assert nvml.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{GPU_UUID} is cut into MIG instances")
    assert lines[1] == f"Simulated H100 MIG 3g.40gb, {MIG_UUID}"


def test_description_without_a_driver(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    library(returns={"nvmlInitWithFlags": stand_in.DRIVER_NOT_LOADED})
    assert nvml.main() == 0
    assert capsys.readouterr().out.startswith("nvmlInit: NVML says Driver Not Loaded")


def test_module_runs_on_this_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ultramem_cuda.profiling.nvml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
