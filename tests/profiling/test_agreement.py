"""Bytes of simple targets in three ways; and what stands where one of them is missing."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from nvml_stand_in import GPU_UUID, NvmlStandIn, SimulatedGpu
from tiny_profile import CONFIG, PASS_BYTES, SimulatedSampler

from ultramem_cuda.profiling import agreement, nvml
from ultramem_cuda.profiling.agreement import Counted
from ultramem_cuda.profiling.instruments import Windows
from ultramem_cuda.profiling.nsight import ncu, targets
from ultramem_cuda.profiling.record import Agreement, Bytes
from ultramem_cuda.profiling.sampling import KnownCopy, Sampler

CPU = torch.device("cpu")
MODEL = Bytes(dense=10e6, gathered=60e6, distinct=20e6, activations=30e6)
TOKENS = 8


@pytest.fixture(autouse=True)
def tiny_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets.SHAPES, "M", CONFIG)
    monkeypatch.setattr(targets, "COPY_BYTES", 1 << 16)


def row(what: str, nvml: float | None = None) -> Counted:
    return Counted(Agreement(what, MODEL.upper, nvml, None), MODEL)


@pytest.mark.parametrize("name", ["copy", "gather"])
def test_without_nvml_there_is_the_model(name: str) -> None:
    found = agreement.by_nvml(name, None, CPU, tokens=TOKENS)
    expected = targets.MODELS[name](CONFIG, TOKENS).upper
    assert found.row == Agreement(name, expected, None, None)


def test_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu()
    NvmlStandIn(gpu).install(monkeypatch)
    device = nvml.open_device(GPU_UUID)
    assert isinstance(device, nvml.NvmlDevice)
    with device:
        sampler = Sampler(device, gpu, seconds=1.0)
        baseline = sampler.baseline(KnownCopy(gpu.run(0.7e-3, 2e9), 2e9))
        windows = Windows(SimulatedSampler(sampler, gpu), baseline)
        found = agreement.by_nvml("copy", windows, CPU, tokens=TOKENS)
    assert found.row.model == 2 << 16
    assert found.row.nvml == pytest.approx(PASS_BYTES, rel=1e-6)
    assert found.row.note == ""


# ---- ncu -----------------------------------------------------------------------------------------

CSV = """
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","byte","byte","ns"
"0","kernel","150,000,000","90,000,000","100,000"
"""


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only folder in which programs are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(ncu, "find", lambda: folder / "ncu" if (folder / "ncu").exists() else None)
    return folder


def install(folder: Path, prints: str = "", code: int = 0, refuses: str = "") -> Path:
    """An ncu that writes CSV for every target but ``refuses``; returns where it lists them."""
    asked = folder / "asked"
    program = folder / "ncu"
    program.write_text(
        f"""#!{sys.executable}
import sys
from pathlib import Path
arguments = sys.argv[1:]
target = arguments[arguments.index("-m") + 2]
with open({str(asked)!r}, "a") as file:
    print(target, file=file)
print({prints!r})
Path(arguments[arguments.index("--log-file") + 1]).write_text({CSV.strip()!r})
sys.exit({code} if target == {refuses!r} or not {refuses!r} else 0)
"""
    )
    os.chmod(program, program.stat().st_mode | stat.S_IXUSR)
    return asked


def by_ncu(*counted: Counted) -> tuple[list[Agreement], list[str]]:
    notes: list[str] = []
    found = [one.row for one in agreement.by_ncu(counted, notes.append, tokens=TOKENS)]
    return found, notes


def test_ncu_beside_the_others(path: Path) -> None:
    asked = install(path)
    found, notes = by_ncu(row("copy", nvml=77e6), row("gather"))
    assert notes == []
    assert asked.read_text().split() == ["copy", "gather"]
    # The CSV is that of three passes.
    expected = Agreement("copy", MODEL.upper, 77e6, 80e6, 50e6, 30e6)
    assert found == [expected, dataclasses.replace(expected, what="gather", nvml=None)]


def test_ncu_is_not_installed(path: Path) -> None:
    found, notes = by_ncu(row("copy", nvml=77e6), row("gather"))
    assert found == [row("copy", nvml=77e6).row, row("gather").row]
    (note,) = notes
    assert "Nsight Compute is not installed" in note


def test_ncu_is_not_permitted_and_asked_once(path: Path) -> None:
    asked = install(path, prints="==ERROR== ERR_NVGPUCTRPERM", code=1)
    found, notes = by_ncu(row("copy"), row("gather"), row("moe"))
    assert [one.ncu for one in found] == [None, None, None]
    (note,) = notes
    assert "NVreg_RestrictProfilingToAdminUsers" in note
    assert asked.read_text().split() == ["copy"]


def test_a_target_that_fails_alone(path: Path) -> None:
    install(path, prints="Killed", code=9, refuses="gather")
    found, notes = by_ncu(row("copy"), row("gather"), row("moe"))
    assert [one.ncu for one in found] == [80e6, None, 80e6]
    assert notes == ["gather: ncu: exit status 9: Killed"]


# ---- why they lie apart --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nvml", "ncu_bytes", "explained"),
    [
        (99e6, 101e6, False),  # all agree
        (70e6, 101e6, True),
        (None, 60e6, True),
        (None, None, False),
        (120e6, 101e6, False),  # more than every use
        (70e6, 40e6, False),  # less than each once
    ],
)
def test_what_the_bounds_explain(
    nvml: float | None, ncu_bytes: float | None, explained: bool
) -> None:
    counted = Counted(Agreement("gather", MODEL.upper, nvml, ncu_bytes, note="A gap."), MODEL)
    found = agreement.explained(counted)
    assert dataclasses.replace(found, note="A gap.") == counted.row
    assert found.note.startswith("A gap.")
    assert ("60 MB with each row" in found.note) == explained
