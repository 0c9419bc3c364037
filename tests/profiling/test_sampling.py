"""Bytes and energy of a simulated GPU's passes come out as they went in; on a real one, too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import nvml_stand_in as stand_in
import pytest
import torch
from nvml_stand_in import GPU_UUID, MIG_UUID, NvmlStandIn, SimulatedGpu

from ultramem_cuda.profiling import nvml, sampling
from ultramem_cuda.profiling.nvml import NvmlDevice, Unavailable
from ultramem_cuda.profiling.sampling import (
    Baseline,
    Calibration,
    KnownCopy,
    Measurement,
    PassWindow,
    Sampler,
    Window,
)

COPY_BYTES = 2e9
COPY_SECONDS = 0.7e-3


@pytest.fixture
def gpu() -> SimulatedGpu:
    return SimulatedGpu()


@pytest.fixture
def sampler_of(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu
) -> Iterator[Callable[..., Sampler]]:
    """A sampler on a stand-in; what it allocated must be free again afterwards."""
    opened: list[tuple[NvmlStandIn, NvmlDevice]] = []

    def sampler_of(
        uuid: str = GPU_UUID, seconds: float = 1.5, warmup_seconds: float = 0.5, **options: Any
    ) -> Sampler:
        library = NvmlStandIn(gpu, **options).install(monkeypatch)
        device = nvml.open_device(uuid)
        assert isinstance(device, NvmlDevice), device
        opened.append((library, device))
        return Sampler(device, gpu, seconds=seconds, warmup_seconds=warmup_seconds)

    yield sampler_of
    for library, device in opened:
        device.close()
        assert not library.errors
        if gpu.time < library.lost_at:
            assert not library.samples
            assert library.users == 0


def _copy(gpu: SimulatedGpu) -> KnownCopy:
    return KnownCopy(gpu.run(COPY_SECONDS, COPY_BYTES), COPY_BYTES)


@pytest.mark.parametrize("background", [0.0, 9e10, 4e11])
@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_bytes_are_calibrated_and_idle_is_subtracted(
    sampler_of: Callable[..., Sampler], gpu: SimulatedGpu, background: float, seconds: float
) -> None:
    gpu.background = background
    sampler = sampler_of(seconds=seconds)
    baseline = sampler.baseline(_copy(gpu))
    assert isinstance(baseline.calibration, Calibration)
    assert baseline.calibration.idle_share == pytest.approx(background / 3.7e12, rel=1e-9)
    assert baseline.calibration.copy_bytes_per_second == pytest.approx(2e9 / 0.7e-3, rel=1e-9)
    assert baseline.calibration.bytes_per_second_at_full == pytest.approx(3.7e12, rel=1e-9)
    for pass_seconds, pass_bytes in ((50e-6, 3e6), (3e-3, 4.5e9), (0.4, 2e11)):
        measurement = sampler.measure(gpu.run(pass_seconds, pass_bytes), baseline)
        sampled = measurement.sampled
        assert sampled.bytes == pytest.approx(pass_bytes, rel=1e-8)
        assert seconds <= sampled.seconds < seconds + max(0.1, 2 * pass_seconds)
        assert sampled.passes == pytest.approx(sampled.seconds / pass_seconds, rel=1e-8)
        assert measurement.notes == ()


@pytest.mark.parametrize("energy_step", [0.02, 0.1])
def test_energy(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu, energy_step: float) -> None:
    """The counter's steps cost a poll on either end (1 ms of 1.5 s), not a step."""
    sampler = sampler_of(energy_step=energy_step)
    baseline = sampler.baseline(_copy(gpu))
    assert baseline.idle.watts == pytest.approx(110, rel=2e-3)
    for watts in (20, 550):
        sampled = sampler.measure(gpu.run(3e-3, 1e9, watts=watts), baseline).sampled
        assert sampled.joules == pytest.approx((110 + watts) * 3e-3, rel=2e-3)
        assert sampled.joules_above_idle == pytest.approx(watts * 3e-3, abs=2e-3 * 660 * 3e-3)


def test_other_metrics(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu) -> None:
    sampler = sampler_of(throttle_reasons=0x4)
    sampled = sampler.measure(gpu.run(1e-3, 1e9), sampler.baseline(_copy(gpu))).sampled
    assert sampled.sm_utilization == 0.75
    assert sampled.sm_occupancy == 0.5
    assert sampled.tensor_utilization == 0.25
    assert sampled.sm_clock_mhz == 1980
    assert sampled.throttle_reasons == ("software power cap",)


def test_idle_window_waits_for_the_load_before_it(
    sampler_of: Callable[..., Sampler], gpu: SimulatedGpu
) -> None:
    sampler = sampler_of()
    load = gpu.run(0.1, 3e11)
    for _ in range(20):
        load()
    idle = sampler.idle()
    assert idle.shares[nvml.DRAM] == pytest.approx(9e10 / 3.7e12, rel=1e-9)
    assert idle.watts == pytest.approx(110, rel=2e-3)


def test_clocks_are_those_of_the_middle(
    sampler_of: Callable[..., Sampler], gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    sampler = sampler_of()
    clock = sampler.device.sm_clock_mhz
    monkeypatch.setattr(sampler.device, "sm_clock_mhz", lambda: asked.append(gpu.time) or clock())
    window = sampler.load(gpu.run(1e-3, 1e9)).window
    (time,) = asked
    # What follows the middle: half the window, a step of the energy counter, the queue's rest.
    assert window.seconds / 2 <= gpu.time - time < window.seconds / 2 + 0.1 + 0.15


def test_host_that_is_too_slow_is_noted(
    sampler_of: Callable[..., Sampler], gpu: SimulatedGpu
) -> None:
    sampler = sampler_of()
    baseline = sampler.baseline(_copy(gpu))
    measurement = sampler.measure(gpu.run(1e-3, 1e9, launch_seconds=4e-3), baseline)
    assert measurement.notes == (
        "the host could not keep the GPU busy: its window has gaps between passes",
    )
    # A pass then takes as long as its launch.
    assert measurement.sampled.passes == pytest.approx(measurement.sampled.seconds / 4e-3, rel=0.1)


def test_slow_start_is_the_warm_ups(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu) -> None:
    sampler = sampler_of()
    fast, slow = gpu.run(1e-3, 1e9), gpu.run(1e-3, 1e9, launch_seconds=4e-3)
    assert sampler.load(lambda: slow() if gpu.time < 0.3 else fast()).gaps == 0


def test_window_leaves_an_empty_queue(
    sampler_of: Callable[..., Sampler], gpu: SimulatedGpu
) -> None:
    sampler_of().load(gpu.run(3e-3, 1e9))
    assert gpu.mark().reached()


def _measure(sampler: Sampler, gpu: SimulatedGpu) -> Measurement:
    return sampler.measure(gpu.run(3e-3, 1e9, watts=300), sampler.baseline(_copy(gpu)))


def test_one_metric_refused(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu) -> None:
    not_supported = {stand_in.ANY_TENSOR_UTIL: stand_in.NOT_SUPPORTED}
    measurement = _measure(sampler_of(metric_returns=not_supported), gpu)
    assert measurement.sampled.tensor_utilization is None
    assert measurement.sampled.bytes == pytest.approx(1e9, rel=1e-9)
    assert measurement.notes == ("GPM metric ANY_TENSOR_UTIL: NVML says Not Supported",)


def test_dram_refused(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu) -> None:
    measurement = _measure(sampler_of(metric_returns={stand_in.DRAM_BW_UTIL: 4}), gpu)
    assert measurement.sampled.bytes is None
    assert measurement.sampled.sm_utilization == 0.75
    (note,) = measurement.notes
    assert note.startswith("GPM metric DRAM_BW_UTIL: NVML says Insufficient Permissions")


def test_without_gpm(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu) -> None:
    """The rest of the measurement stays."""
    sampled, notes = (m := _measure(sampler_of(gpm=False), gpu)).sampled, m.notes
    assert (sampled.bytes, sampled.sm_utilization, sampled.sm_occupancy) == (None, None, None)
    assert sampled.tensor_utilization is None
    assert sampled.joules == pytest.approx(410 * 3e-3, rel=2e-3)
    assert sampled.sm_clock_mhz == 1980
    assert notes == ("GPM: this GPU has no such counters (Hopper and newer have)",)


@pytest.mark.parametrize("trouble", ["refused", "stuck"])
def test_without_energy(
    sampler_of: Callable[..., Sampler], gpu: SimulatedGpu, trouble: str
) -> None:
    name = "nvmlDeviceGetTotalEnergyConsumption"
    options, sentence = {
        "refused": (
            {"returns": {name: stand_in.NOT_SUPPORTED}},
            f"{name}: NVML says Not Supported",
        ),
        "stuck": ({"energy_step": 1e6}, "energy: the counter did not move in 0.5 s"),
    }[trouble]
    measurement = _measure(sampler_of(**options), gpu)
    assert measurement.sampled.joules is None
    assert measurement.sampled.joules_above_idle is None
    assert measurement.sampled.bytes == pytest.approx(1e9, rel=1e-9)
    assert measurement.notes == (sentence,)


def test_energy_counter_that_is_reset(
    sampler_of: Callable[..., Sampler], gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of()
    baseline = sampler.baseline(_copy(gpu))
    since = gpu.time + 1.0
    joules = gpu.joules
    monkeypatch.setattr(
        gpu, "joules", lambda time: joules(time) - (joules(since) if time > since else 0)
    )
    measurement = sampler.measure(gpu.run(3e-3, 1e9), baseline)
    assert measurement.sampled.joules is None
    assert measurement.notes == ("energy: the counter was reset during the window",)


def test_mig_instance(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu) -> None:
    measurement = _measure(sampler_of(MIG_UUID, mig=True), gpu)
    sampled = measurement.sampled
    assert sampled.bytes == pytest.approx(1e9, rel=1e-9)
    assert (sampled.joules, sampled.sm_clock_mhz, sampled.throttle_reasons) == (None, None, ())
    whole = "known for the whole GPU, not for a MIG instance"
    assert set(measurement.notes) == {
        f"energy: {whole}",
        f"SM clock: {whole}",
        f"throttle reasons: {whole}",
    }


@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_gpu_that_is_lost(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu, when: str) -> None:
    sampler = sampler_of()
    library = pytest.importorskip("pynvml").nvmlLib
    baseline = sampler.baseline(_copy(gpu))
    library.lost_at = gpu.time + (0 if when == "before" else 1.0)
    sampled, notes = (m := sampler.measure(gpu.run(3e-3, 1e9), baseline)).sampled, m.notes
    for value in (sampled.bytes, sampled.joules, sampled.sm_utilization, sampled.sm_clock_mhz):
        assert value is None
    assert sampled.passes == pytest.approx(sampled.seconds / 3e-3, rel=1e-9)
    assert notes
    assert all(note.endswith("NVML says GPU is lost") for note in notes)


@pytest.mark.parametrize(
    ("copy_bytes", "background", "shares"),
    [(2e8, 9e10, "10.2% in a large copy and 2.4%"), (2e9, 4e12, "185.3% in a large copy and 108")],
)
def test_copy_that_cannot_calibrate(
    sampler_of: Callable[..., Sampler],
    gpu: SimulatedGpu,
    copy_bytes: float,
    background: float,
    shares: str,
) -> None:
    """A counter that misses the copy, or another process's load in the idle window."""
    gpu.background = background
    sampler = sampler_of()
    baseline = sampler.baseline(KnownCopy(gpu.run(COPY_SECONDS, copy_bytes), copy_bytes))
    assert isinstance(baseline.calibration, Unavailable)
    assert shares in baseline.calibration.reason
    measurement = sampler.measure(gpu.run(3e-3, 1e9), baseline)
    assert measurement.sampled.bytes is None
    assert measurement.sampled.joules is not None
    assert measurement.notes == (baseline.calibration.reason,)


def test_no_room_for_a_copy(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu) -> None:
    sampler = sampler_of()
    none = Unavailable("calibration: no memory")
    measurement = sampler.measure(gpu.run(3e-3, 1e9), sampler.baseline(none))
    assert measurement.sampled.bytes is None
    assert measurement.notes == (none.reason,)


def test_pass_below_the_idle_level(sampler_of: Callable[..., Sampler], gpu: SimulatedGpu) -> None:
    """Its bytes are unknown, not negative."""
    sampler = sampler_of()
    baseline = sampler.baseline(_copy(gpu))
    gpu.background /= 2
    measurement = sampler.measure(gpu.run(3e-3, 0.0), baseline)
    assert measurement.sampled.bytes is None
    (note,) = measurement.notes
    assert note.startswith("DRAM bytes: GPM metric DRAM_BW_UTIL is 1.22%, not above")


def test_calibration_is_the_ratio_of_differences() -> None:
    def window(share: float) -> Window:
        return Window(1.5, {nvml.DRAM: share}, 100.0, 1980, ())

    calibration = sampling.calibrate(PassWindow(window(0.8), 0.5, 0), 1e12, window(0.05))
    assert isinstance(calibration, Calibration)
    assert calibration.copy_bytes_per_second == 2e12
    assert calibration.bytes_per_second_at_full == pytest.approx(2e12 / 0.75)
    assert calibration.bytes_per_second(0.425) == pytest.approx(1e12)


def test_failure_of_a_pass_is_the_callers(
    sampler_of: Callable[..., Sampler], gpu: SimulatedGpu
) -> None:
    """It leaves as it is; the fixture finds the samples freed."""
    sampler = sampler_of()
    enqueue = gpu.run(3e-3, 1e9)

    def run() -> None:
        if gpu.time > 1.0:
            raise RuntimeError("a pass failed")
        enqueue()

    with pytest.raises(RuntimeError, match="a pass failed"):
        sampler.load(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.5}, "seconds must be at least 1"),
        ({"warmup_seconds": -1}, "warmup_seconds must not be negative"),
    ],
)
def test_windows_too_short_to_be_true_are_refused(
    sampler_of: Callable[..., Sampler], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_of(**options)


def test_copy_that_a_cache_could_hold_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 8 * 10**10))
    properties = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    answer = sampling.large_copy(torch.device("cuda"))
    assert isinstance(answer, Unavailable)
    assert answer.reason.startswith("calibration: 1.00 GB of free memory are too little")


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Sampler, Baseline]]:
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("NVML counts what all processes do: run this one without the others (-n 0)")
    cuda = torch.device("cuda")
    device = nvml.open_device(cuda)
    if isinstance(device, Unavailable):
        pytest.skip(device.reason)
    with device:
        sampler = Sampler(device, sampling.CudaQueue(cuda))
        yield sampler, sampler.baseline(sampling.large_copy(cuda))


@pytest.mark.gpu
@pytest.mark.parametrize("megabytes", [400, 2000])
def test_bytes_of_a_real_copy(real: tuple[Sampler, Baseline], megabytes: int) -> None:
    sampler, baseline = real
    source = torch.ones(megabytes * 1_000_000, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    measurement = sampler.measure(lambda: target.copy_(source), baseline)
    if measurement.sampled.bytes is None:
        pytest.skip("; ".join(measurement.notes))
    assert measurement.sampled.bytes == pytest.approx(2e6 * megabytes, rel=0.15)


@pytest.mark.gpu
def test_energy_of_a_real_copy(real: tuple[Sampler, Baseline]) -> None:
    sampler, baseline = real
    copy = sampling.large_copy(torch.device("cuda"))
    if isinstance(copy, Unavailable):
        pytest.skip(copy.reason)
    measurement = sampler.measure(copy.run, baseline)
    sampled = measurement.sampled
    if sampled.joules is None or sampled.joules_above_idle is None:
        pytest.skip("; ".join(measurement.notes))
    assert 0 < sampled.joules_above_idle < sampled.joules
