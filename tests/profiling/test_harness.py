"""A profile from beginning to end, on tiny layers: what is measured, and what stands in for it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import nvml_stand_in as stand_in
import pytest
import torch
from nvml_stand_in import GPU_UUID, MIG_UUID, NvmlStandIn, SimulatedGpu
from tiny_profile import (
    EXPERTS_PER_TOKEN,
    LAYERS,
    PASS_BYTES,
    PASS_SECONDS,
    PASS_WATTS,
    SimulatedSampler,
    cpu_instruments,
    tiny_preset,
)

from ultramem_cuda import _library
from ultramem_cuda.profiling import (
    contenders,
    harness,
    instruments,
    measuring,
    nvml,
    settings,
)
from ultramem_cuda.profiling.contenders import groups, make_contender
from ultramem_cuda.profiling.draft import RECIPE, Draft
from ultramem_cuda.profiling.harness import Progress, Settings, measure_presets
from ultramem_cuda.profiling.instruments import Instruments, Windows
from ultramem_cuda.profiling.measuring import decode_calls, training_passes
from ultramem_cuda.profiling.moe_dispatch import DroplessMoE
from ultramem_cuda.profiling.moe_packages import PackagedMoE
from ultramem_cuda.profiling.nvml import NvmlDevice, Unavailable
from ultramem_cuda.profiling.presets import NAMES, profile_preset
from ultramem_cuda.profiling.record import Ceilings, Point, Profile
from ultramem_cuda.profiling.sampling import KnownCopy, Sampler
from ultramem_cuda.profiling.subjects import Runnable
from ultramem_cuda.profiling.traffic import Layer

SMALL = Settings(decode_tokens=(64, 1), training_tokens=(64,), packages=False, repeats=2)
MEASURED = ("decode", "training")
quiet = Progress(lambda line: None)
pytestmark = pytest.mark.usefixtures("quick_collections")


def measure(
    plan: Settings = SMALL, opened: Instruments | None = None, progress: Progress = quiet
) -> tuple[Profile, list[Profile]]:
    """The tiny preset's profile, and what was saved on the way."""
    saved: list[Profile] = []
    draft = Draft({}, saved.append)
    measure_presets(draft, [tiny_preset()], opened or cpu_instruments(), plan, progress)
    return draft.profile(), saved


def find(profile: Profile, subject: str, phase: str, tokens: int) -> Point:
    (point,) = (
        p for p in profile.points if (p.subject, p.phase, p.tokens) == (subject, phase, tokens)
    )
    return point


def check_read_again(profile: Profile) -> None:
    text = json.dumps(profile.to_json())
    assert json.dumps(Profile.from_json(json.loads(text)).to_json()) == text


@pytest.fixture(autouse=True)
def short_graphs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Of training: four passes of 64 tokens."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(measuring, "TRAINING_TOKENS_OF_A_GRAPH", 256)


# ---- the model alone -----------------------------------------------------------------------------


def test_without_a_gpu_there_is_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    profile = harness.profile(Settings(presets=("227M-1.2B",)), command="ultramem profile")
    assert not profile.measured
    assert not profile.ceilings.measured
    assert profile.command == "ultramem profile"
    assert "the byte model alone" in profile.notes[0]
    assert "torch finds no CUDA GPU" in profile.notes[0]
    (preset,) = profile.presets
    grids = {"decode": 8, "training": 5, "optimizer": 5}
    assert len(profile.points) == len(preset.subjects) * sum(grids.values())
    for point in profile.points:
        layer = profile_preset(point.preset)[point.subject].layer
        assert point.model == layer.traffic(point.phase, point.tokens, recipe=RECIPE)
        assert point.flops == layer.flops(point.phase, point.tokens, recipe=RECIPE)
    check_read_again(profile)


def test_why_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "_load_error", None)
    monkeypatch.setattr(_library, "_has_cuda_kernels", True)
    assert instruments.unavailable() is None
    monkeypatch.setattr(_library, "_has_cuda_kernels", False)
    assert "for CPUs alone" in str(instruments.unavailable())
    monkeypatch.setattr(_library, "_load_error", "the native library is missing; build it")
    assert instruments.unavailable() == "the native library is missing; build it"
    profile = harness.profile(SMALL)
    assert "the native library is missing" in profile.notes[0]


# ---- measured on the CPU -------------------------------------------------------------------------


def test_every_point_is_timed_and_counted() -> None:
    profile, _ = measure()
    for point in profile.points:
        assert (point.timing is not None) == (point.phase in MEASURED)
        assert point.sampled is None
        assert point.note == ""
        sparse = point.subject != "ffn" and point.phase in MEASURED
        assert (point.counted is not None) == sparse
        if point.timing is not None:
            assert point.timing.repeats == SMALL.repeats
            assert 0 < point.timing.q1_ms <= point.timing.median_ms <= point.timing.q3_ms
        if point.counted is not None:
            assert 0 < point.counted.distinct <= point.counted.gathered
            assert dataclasses.replace(point.counted, gathered=0, distinct=0) == (
                dataclasses.replace(point.model, gathered=0, distinct=0)
            )
    # A token's experts are different ones, and six experts are all that 64 tokens can use.
    layer = tiny_preset()["moe"].layer
    for tokens, touched in ((1, EXPERTS_PER_TOKEN), (64, 6)):
        expected = layer.traffic("decode", tokens, touched=touched)
        assert find(profile, "moe", "decode", tokens).counted == expected
    assert any("optimizer" in note for note in profile.notes)


def test_counted_are_the_inputs_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call's layer and input, once each; the same inputs for all subjects."""
    timed: dict[str, list[tuple[int, torch.Tensor]]] = {}
    counted: dict[str, list[tuple[int, torch.Tensor]]] = {}
    forward, touched = Runnable.forward, Runnable.touched

    def timed_forward(self: Runnable, layer: int, x: torch.Tensor) -> torch.Tensor:
        timed.setdefault(self.name, []).append((layer, x))
        return forward(self, layer, x)

    def counted_touched(self: Runnable, layer: int, x: torch.Tensor) -> int:
        counted.setdefault(self.name, []).append((layer, x))
        return touched(self, layer, x)

    monkeypatch.setattr(Runnable, "forward", timed_forward)
    monkeypatch.setattr(Runnable, "touched", counted_touched)
    measure(dataclasses.replace(SMALL, decode_tokens=(5,), training_tokens=()))
    calls = decode_calls(LAYERS)
    assert calls >= 20
    assert calls % LAYERS == 0
    for name, pairs in counted.items():
        assert [layer for layer, _ in pairs] == [i % LAYERS for i in range(calls)]
        assert len({x.data_ptr() for _, x in pairs}) == calls
        last = timed[name][-calls:]
        assert [(layer, x.data_ptr()) for layer, x in last] == [
            (layer, x.data_ptr()) for layer, x in pairs
        ]
    for (_, x), (_, other) in zip(counted["block"], counted["moe"], strict=True):
        assert torch.equal(x, other)


def test_training_passes_fill_a_graph() -> None:
    assert [training_passes(tokens) for tokens in (64, 100, 256, 65536)] == [4, 3, 1, 1]


def test_times_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultramem_cuda.profiling.timing._cpu_ms", lambda run: run() or 42.0)
    profile, _ = measure()
    decode, training = find(profile, "moe", "decode", 1), find(profile, "moe", "training", 64)
    assert decode.timing is not None
    assert training.timing is not None
    assert decode.timing.median_ms == pytest.approx(42.0 / decode_calls(LAYERS))
    assert training.timing.median_ms == pytest.approx(42.0 / 4)


def test_a_run_that_is_broken_off_leaves_what_it_had() -> None:
    profile, saved = measure()
    assert len(saved) == 1 + 2 * 3
    timed = [sum(point.timing is not None for point in one.points) for one in saved]
    assert timed[0] == 0
    assert timed == sorted(set(timed))
    assert timed[-1] == sum(point.timing is not None for point in profile.points)
    for one in saved:
        assert "not finished" in one.notes[0]
        check_read_again(one)
    assert not any("not finished" in note for note in profile.notes)


def test_progress_says_what_is_left() -> None:
    lines: list[str] = []
    measure(progress=Progress(lines.append))
    assert sum("training, 64 tokens" in line for line in lines) == 2
    assert all("s left]" in line for line in lines)
    assert "about 0 s left" in lines[-1]


def refuse(monkeypatch: pytest.MonkeyPatch, method: str, subject: str, tokens: int) -> None:
    """A subject does not fit at a number of tokens."""
    call = getattr(Runnable, method)

    def refusing(self: Runnable, layer: int, x: torch.Tensor, *others: torch.Tensor) -> Any:
        if self.name == subject and x.shape[0] == tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, layer, x, *others)

    monkeypatch.setattr(Runnable, method, refusing)


@pytest.mark.parametrize(
    ("method", "phase", "tokens"), [("forward", "decode", 1), ("train", "training", 64)]
)
def test_out_of_memory_is_a_note(
    monkeypatch: pytest.MonkeyPatch, method: str, phase: str, tokens: int
) -> None:
    refuse(monkeypatch, method, "moe", tokens)
    profile, _ = measure()
    for point in profile.points:
        failed = (point.subject, point.phase, point.tokens) == ("moe", phase, tokens)
        assert (point.note == "It does not fit in the GPU's memory.") == failed
        assert (point.timing is not None) == (point.phase in MEASURED and not failed)


@pytest.mark.parametrize("reason", ["memory", "host"])
def test_a_subject_that_cannot_be_built_is_left_out(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def refusing(*arguments: Any) -> Any:
        if arguments[0].name == "block":
            if reason == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            raise contenders.NotMeasurable("it waits for the host")
        return make_contender(*arguments)

    monkeypatch.setattr("ultramem_cuda.profiling.measuring.make_contender", refusing)
    profile, _ = measure()
    assert {p.subject for p in profile.points if p.timing is None and p.phase in MEASURED} == {
        "block"
    }
    expected = {"memory": "does not fit in the GPU's memory", "host": "it waits for the host"}
    assert f"1B-7B: block was not measured: {expected[reason]}." in profile.notes


def test_gradients_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Runnable.start_training

    def refusing(self: Runnable, tokens: int) -> None:
        if self.name == "moe":
            raise torch.OutOfMemoryError("CUDA out of memory")
        start(self, tokens)

    monkeypatch.setattr(Runnable, "start_training", refusing)
    profile, _ = measure()
    without = {p.subject for p in profile.points if p.timing is None and p.phase == "training"}
    assert without == {"moe"}
    assert any("training of moe was not measured" in note for note in profile.notes)


def test_programming_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Runnable, layer: int, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Runnable, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        measure()


# ---- groups and layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compared_is_measured_in_turns(name: str) -> None:
    preset = profile_preset(name)
    found = [[case.name for case in group] for group in groups(preset)]
    assert sorted(itertools.chain(*found)) == sorted(case.name for case in preset.cases)
    for ours, other in preset.comparisons:
        assert any({ours, other} <= set(group) for group in found)
    assert len(found) == 2
    assert any({"ffn", "block", "moe"} <= set(group) for group in found)


def test_groups_without_comparisons() -> None:
    alone = settings.select(tiny_preset(), ("ffn", "moe"))
    assert [[case.name for case in group] for group in groups(alone)] == [["ffn", "moe"]]


def test_layers_are_as_many_as_fit() -> None:
    preset = tiny_preset()
    moe = preset["moe"]
    weights = 4 * moe.layer.total_parameters()
    for room, layers in ((0, 1), (2 * weights, 2), (100 * weights, LAYERS)):
        opened = dataclasses.replace(cpu_instruments(), weights_bytes=room)
        assert make_contender(moe, preset, opened).num_layers == layers
    assert make_contender(preset["block"], preset, opened).num_layers == LAYERS


def test_layers_that_a_cache_may_hold_are_named() -> None:
    profile, _ = measure(dataclasses.replace(SMALL, decode_tokens=(1,), training_tokens=()))
    layer: Layer = tiny_preset()["memory"].layer
    megabytes = LAYERS * layer.traffic("decode", 1).parameters.upper / 1e6
    (note,) = (note for note in profile.notes if "layers of memory" in note)
    assert f"is {megabytes:.0f} MB" in note


# ---- installed packages --------------------------------------------------------------------------


def package(build: Callable[[DroplessMoE], Any]) -> PackagedMoE:
    return PackagedMoE("fastmoe", "1.0", build)


def test_an_installed_package_is_a_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = package(lambda moe: lambda x: moe(x) * 1.0)
    monkeypatch.setattr(
        harness, "installed_moe_packages", lambda: ([installed], ["one is missing"])
    )
    profile, _ = measure(dataclasses.replace(SMALL, packages=True, decode_tokens=(1, 2, 64)))
    points = [point for point in profile.points if point.subject == "moe-fastmoe"]
    assert [(point.phase, point.tokens) for point in points] == [("decode", 1), ("decode", 64)]
    for point in points:
        assert point.timing is not None
        assert point.counted == find(profile, "moe", "decode", point.tokens).counted
    (preset,) = profile.presets
    assert ("block", "moe-fastmoe") in preset.comparisons
    assert "one is missing." in profile.notes


def test_a_package_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = package(lambda moe: lambda x: moe(x) * 1.5)
    monkeypatch.setattr(harness, "installed_moe_packages", lambda: ([installed], []))
    profile, _ = measure(dataclasses.replace(SMALL, packages=True))
    assert all(p.timing is None for p in profile.points if p.subject == "moe-fastmoe")
    assert any("fastmoe 1.0 computes something else" in note for note in profile.notes)


# ---- NVML ----------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> SimulatedGpu:
    return SimulatedGpu()


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu
) -> Iterator[Callable[..., tuple[Windows | None, list[str]]]]:
    """Opens the windows of a stand-in of NVML; returns them and what was noted."""
    monkeypatch.setattr(
        instruments, "large_copy", lambda device: KnownCopy(gpu.run(0.7e-3, 2e9), 2e9)
    )
    opened: list[NvmlDevice] = []

    def start(uuid: str = GPU_UUID, **options: Any) -> tuple[Windows | None, list[str]]:
        NvmlStandIn(gpu, **options).install(monkeypatch)
        device = nvml.open_device(uuid)
        assert isinstance(device, NvmlDevice), device
        opened.append(device)
        notes: list[str] = []
        sampler = Sampler(device, gpu, seconds=1.0)
        return instruments.start_windows(sampler, torch.device("cpu"), notes.append), notes

    yield start
    for device in opened:
        device.close()


def test_windows_are_of_one_call(
    start: Callable[..., tuple[Windows | None, list[str]]], gpu: SimulatedGpu
) -> None:
    windows, notes = start()
    assert windows is not None
    assert notes == []
    sampler = SimulatedSampler(windows.sampler, gpu)  # type: ignore[arg-type]
    opened = cpu_instruments(dataclasses.replace(windows, sampler=sampler))
    plan = dataclasses.replace(SMALL, decode_tokens=(2, 64), training_tokens=(1024,))
    profile, _ = measure(plan, opened)
    watched = [point for point in profile.points if point.sampled is not None]
    assert sampler.windows == len(watched) == 2 * 3
    assert {point.subject for point in watched} == {"block", "moe", "memory"}
    for point in watched:
        calls = decode_calls(LAYERS) if point.phase == "decode" else 1
        assert point.tokens in (64, 1024)
        assert point.sampled is not None
        assert point.sampled.bytes == pytest.approx(PASS_BYTES / calls, rel=1e-6)
        joules = (PASS_WATTS + gpu.idle_watts) * PASS_SECONDS / calls
        assert point.sampled.joules == pytest.approx(joules, rel=5e-3)
        passes = point.sampled.seconds / PASS_SECONDS * calls
        assert point.sampled.passes == pytest.approx(passes, rel=1e-6)
        assert point.note == ""


def test_windows_for_every_point(
    start: Callable[..., tuple[Windows | None, list[str]]], gpu: SimulatedGpu
) -> None:
    windows, _ = start()
    assert windows is not None
    sampler = SimulatedSampler(windows.sampler, gpu)  # type: ignore[arg-type]
    opened = cpu_instruments(dataclasses.replace(windows, sampler=sampler))
    plan = dataclasses.replace(SMALL, training_tokens=(), all_windows=True)
    profile, _ = measure(plan, opened)
    assert all(p.sampled is not None for p in profile.points)


@pytest.mark.parametrize(
    ("options", "says", "has_bytes", "has_energy"),
    [
        ({"returns": {"nvmlGpmSampleGet": stand_in.NO_PERMISSION}}, "Permission", False, True),
        ({"gpm": False}, "no such counters", False, True),
        ({"uuid": MIG_UUID, "mig": True}, "not for a MIG instance", True, False),
        (
            {"returns": {"nvmlDeviceGetTotalEnergyConsumption": stand_in.NOT_SUPPORTED}},
            "Not Supported",
            True,
            False,
        ),
    ],
)
def test_what_nvml_refuses_is_said_once(
    start: Callable[..., tuple[Windows | None, list[str]]],
    gpu: SimulatedGpu,
    options: dict[str, Any],
    says: str,
    has_bytes: bool,
    has_energy: bool,
) -> None:
    windows, notes = start(**options)
    assert windows is not None
    assert len(set(notes)) == len(notes)
    assert any(says in note for note in notes), notes
    sampler = SimulatedSampler(windows.sampler, gpu)  # type: ignore[arg-type]
    opened = cpu_instruments(dataclasses.replace(windows, sampler=sampler))
    profile, _ = measure(SMALL, opened)
    point = find(profile, "block", "decode", 64)
    assert point.sampled is not None
    assert (point.sampled.bytes is not None) == has_bytes
    assert (point.joules_per_token() is not None) == has_energy
    assert point.note == ""
    assert point.timing is not None


def test_no_windows_where_nvml_says_nothing(
    start: Callable[..., tuple[Windows | None, list[str]]],
) -> None:
    refused = {
        "nvmlGpmSampleGet": stand_in.NO_PERMISSION,
        "nvmlDeviceGetTotalEnergyConsumption": stand_in.NO_PERMISSION,
    }
    windows, notes = start(returns=refused)
    assert windows is None
    assert "no windows were taken" in notes[-1]


# ---- everything together -------------------------------------------------------------------------


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`profile` measures the tiny preset on the CPU as if it were a GPU."""
    monkeypatch.setattr(settings, "profile_preset", tiny_preset)
    monkeypatch.setattr(instruments, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    opened = cpu_instruments()
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: type("Properties", (), {"total_memory": 1 << 34}),
    )
    monkeypatch.setattr(instruments, "_compiles", lambda device, note: False)
    monkeypatch.setattr(instruments, "_graph_recorder", opened.new_recorder)
    monkeypatch.setattr(
        instruments,
        "Instruments",
        lambda **options: dataclasses.replace(opened, windows=options["windows"]),
    )


@pytest.mark.usefixtures("on_the_cpu")
def test_a_machine_without_the_nvml_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    stand_in.load_as(monkeypatch, missing)
    real = nvml.open_device
    monkeypatch.setattr(nvml, "open_device", lambda device: real(GPU_UUID))
    ceilings = Ceilings(2e12, 5e14, measured=True)
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: ceilings)
    plan = dataclasses.replace(SMALL, presets=("1B-7B",), ncu=False)
    profile = harness.profile(plan)
    assert profile.ceilings == ceilings
    assert any("No bytes and energy by NVML: nvmlInit" in note for note in profile.notes)
    assert "ncu was not run, as requested." in profile.notes
    for point in profile.points:
        assert (point.timing is not None) == (point.phase in MEASURED)
        assert point.sampled is None


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("failure", ["small", "memory"])
def test_ceilings_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    def refusing(device: torch.device) -> Any:
        if failure == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Unavailable("calibration: too little memory")

    monkeypatch.setattr(harness, "measure_ceilings", refusing)
    plan = dataclasses.replace(SMALL, presets=("1B-7B",), nvml=False, ncu=False)
    profile = harness.profile(plan)
    assert not profile.ceilings.measured
    assert profile.measured
    assert any("The ceilings are those of an H100" in note for note in profile.notes)
    assert any("NVML was not asked" in note for note in profile.notes)


def test_what_a_graph_reads_lives_as_long_as_it(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[bool] = []

    class Graph:
        def replay(self) -> None:
            replayed.append(True)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(instruments.timing, "capture", lambda calls, pool: Graph())
    x = torch.ones(3)
    seen = weakref.ref(x)
    run = instruments._graph_recorder()([functools.partial(torch.neg, x)])
    del x
    assert seen() is not None
    run()
    assert replayed == [True]
    del run
    assert seen() is None


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "profile_preset", tiny_preset)
    plan = Settings(
        presets=("1B-7B",),
        subjects=("block", "moe"),
        decode_tokens=(1, 8),
        training_tokens=(256,),
        packages=False,
        repeats=3,
        window_seconds=1.0,
        agreement_targets=("copy",),
        ncu=False,
    )
    profile = harness.profile(plan)
    assert profile.ceilings.measured
    assert 1e11 < profile.ceilings.copy_bytes_per_second < 2e13
    grouped = torch.cuda.get_device_capability() >= (9, 0)
    for point in profile.points:
        if point.phase in MEASURED and (grouped or point.subject != "moe"):
            assert point.timing is not None, point
            assert 0 < point.timing.median_ms < 50
    (copy,) = profile.agreement
    # NVML counts what all processes do.
    if copy.nvml is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        assert copy.nvml == pytest.approx(copy.model, rel=0.15)
    check_read_again(profile)
