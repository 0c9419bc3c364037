"""``ultramem doctor``: every cause that something is not used for is named, with what to do."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_uint, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch

from ultramem_cuda import _library, cli
from ultramem_cuda._extras import EXTRAS
from ultramem_cuda._version import NATIVE_API_VERSION, __version__
from ultramem_cuda.cli import diagnosis, doctor, driver
from ultramem_cuda.cli.diagnosis import Finding, Situation
from ultramem_cuda.cli.driver import Driver, Gpu

H100 = Gpu("NVIDIA H100", (9, 0))
V100 = Gpu("Tesla V100", (7, 0))
A10 = Gpu("NVIDIA A10", (8, 6))
B200 = Gpu("NVIDIA B200", (10, 0))
NO_DRIVER = Driver(None, (), "no NVIDIA driver (libcuda.so.1: cannot open)")
# Where everything works.
GOOD = Situation(
    load_error=None,
    library_version=__version__,
    architectures=("80", "90a-real"),
    cuda_compiler="13.0.88",
    cpu_capability="AVX512",
    missing_module=None,
    torch_version="2.13.0+cu130",
    torch_cuda="13.0",
    torch_gpus=(H100,),
    torch_error=None,
    driver=Driver((13, 1), (H100,), None),
    environment={},
    missing_extras=(),
    hidden=None,
)


def test_nothing_to_say_where_everything_works() -> None:
    assert diagnosis.findings(GOOD) == []
    assert diagnosis.verdict(GOOD) == (
        f"ultramem_cuda {__version__} works on the CPU and on 1 GPU (NVIDIA H100)"
    )
    assert doctor.text(GOOD).startswith(diagnosis.verdict(GOOD) + "\nBuilt\n")


def changed(gpu: Gpu | None = None, **changes: Any) -> Situation:
    if gpu is not None:
        changes = {"torch_gpus": (gpu,), "driver": Driver((13, 1), (gpu,), None)} | changes
    return dataclasses.replace(GOOD, **changes)


# Changes that keep CUDA operators from running; severity is "unused".
NO_CUDA = {
    "CPU-only build": (
        changed(architectures=(), cuda_compiler=None),
        "this build is CPU-only",
        "pip install --no-build-isolation .",
    ),
    "CPU build of torch": (
        changed(torch_version="2.13.0+cpu", torch_cuda=None, torch_gpus=()),
        "torch 2.13.0+cpu is a build without CUDA",
        "install a CUDA build of torch",
    ),
    "no driver": (
        changed(torch_gpus=(), driver=NO_DRIVER),
        "no GPU: no NVIDIA driver (libcuda.so.1: cannot open)",
        "",
    ),
    "no GPU": (
        changed(torch_gpus=(), driver=Driver((13, 1), (), "the NVIDIA driver finds no GPU")),
        "no GPU: the NVIDIA driver finds no GPU",
        "",
    ),
    "hidden GPU": (
        changed(
            torch_gpus=(),
            driver=Driver((13, 1), (), "the NVIDIA driver finds no GPU"),
            environment={"CUDA_VISIBLE_DEVICES": ""},
        ),
        "with CUDA_VISIBLE_DEVICES=''",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "driver too old for torch": (
        changed(torch_gpus=(), driver=Driver((12, 8), (H100,), None), cuda_compiler="12.8.93"),
        "the NVIDIA driver is too old: it runs CUDA 12.8 at most, and torch 2.13.0+cu130 is "
        "built for 13.0",
        "update the NVIDIA driver",
    ),
    "driver too old for this build": (
        changed(torch_cuda="12.8", driver=Driver((12, 8), (H100,), None)),
        "this build has the runtime of CUDA 13.0.88, and the NVIDIA driver runs 12.8 at most",
        "build from source with the older CUDA",
    ),
    "torch fails": (
        changed(torch_gpus=(), torch_error="CUDA unknown error"),
        "cannot use the GPU: CUDA unknown error",
        "",
    ),
    "old GPU": (changed(V100), "the CUDA kernels need compute capability 8.0 or later", ""),
    "no code": (
        changed(A10, architectures=("90a-real",)),
        "this build has no code that runs on it (built for 90a-real)",
        'TORCH_CUDA_ARCH_LIST="8.6"',
    ),
}


@pytest.mark.parametrize("name", NO_CUDA)
def test_why_cuda_operators_do_not_run(name: str) -> None:
    now, cause, remedy = NO_CUDA[name]
    assert now.cpu_runs
    assert now.cuda_gpus == ()
    (finding,) = diagnosis.findings(now)
    assert finding.severity == "unused"
    assert cause in finding.cause
    assert remedy in finding.remedy
    assert bool(remedy) == bool(finding.remedy)
    assert f"works on the CPU alone; {finding.cause}" in diagnosis.verdict(now)


def test_all_causes_are_told_at_once() -> None:
    now = changed(V100, architectures=(), cuda_compiler=None, torch_cuda=None, torch_gpus=())
    causes = [finding.cause for finding in diagnosis.findings(now)]
    assert len(causes) == 2
    assert "CPU-only" in causes[0]
    assert "without CUDA" in causes[1]


# Notes: something is missing, and CUDA operators run all the same.
NOTES = {
    "PTX": (
        changed(B200),
        "NVIDIA B200, compute capability 10.0",
        "no machine code for it in this build (built for 80, 90a-real): the driver compiles PTX",
        'TORCH_CUDA_ARCH_LIST="10.0"',
    ),
    "no sm_90a": (
        changed(architectures=("80", "90")),
        "NVIDIA H100, compute capability 9.0",
        "the kernels of sm_90a are not in this build",
        'TORCH_CUDA_ARCH_LIST="9.0a"',
    ),
    "no _C": (
        changed(missing_module="No module named 'ultramem_cuda._C'"),
        "kernel attributes",
        f"no module _C for Python {sys.version_info[0]}.{sys.version_info[1]}; nothing else needs",
        "build from source with this Python",
    ),
    "other version": (
        changed(library_version="0.0.9"),
        "native library",
        f"it is of version 0.0.9, the Python files are of {__version__}",
        "make build",
    ),
    "other library": (
        changed(environment={"ULTRAMEM_LIBRARY": "/elsewhere/libultramem_torch.so"}),
        "native library",
        "ULTRAMEM_LIBRARY='/elsewhere/libultramem_torch.so' replaces the package's",
        "",
    ),
    "lowered": (
        changed(environment={"ULTRAMEM_CPU_CAPABILITY": "avx2"}, cpu_capability="AVX2"),
        "CPU operators",
        "ULTRAMEM_CPU_CAPABILITY='avx2' limits them to AVX2 code",
        "unset ULTRAMEM_CPU_CAPABILITY",
    ),
    "old processor": (
        changed(cpu_capability="DEFAULT"),
        "CPU operators",
        "slow: no code for this processor's vector units",
        "",
    ),
    "hidden package": (
        changed(hidden=Path("/site/ultramem_cuda")),
        "installed package",
        "this source tree hides the ultramem_cuda installed in /site/ultramem_cuda",
        "run Python from another folder",
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_else_is_not_used(name: str) -> None:
    now, subject, cause, remedy = NOTES[name]
    (finding,) = diagnosis.findings(now)
    assert (finding.severity, finding.subject) == ("note", subject)
    assert cause in finding.cause
    assert remedy in finding.remedy
    assert bool(remedy) == bool(finding.remedy)
    assert now.cuda_gpus == now.torch_gpus
    assert "works on the CPU and on 1 GPU" in diagnosis.verdict(now)


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: extra.name)
def test_an_absent_extra(extra: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(extra), "is_installed", lambda self: self.name != extra.name)
    now = changed(missing_extras=diagnosis.observe().missing_extras)
    assert diagnosis.findings(now) == [
        Finding(
            "note",
            extra.distribution,
            f"not installed; it gives {extra.gives}",
            f'pip install "ultramem_cuda[{extra.name}]"',
        )
    ]


def test_a_library_that_does_not_load_comes_first() -> None:
    now = changed(
        load_error="the native library is missing",
        library_version=None,
        architectures=(),
        cuda_compiler=None,
        cpu_capability=None,
        missing_extras=EXTRAS[:1],
    )
    assert not now.cpu_runs
    assert now.cuda_gpus == ()
    assert [finding.severity for finding in diagnosis.findings(now)] == ["broken", "note"]
    assert diagnosis.verdict(now).endswith("does not work here: the native library is missing")


@pytest.mark.parametrize(
    ("capability", "architectures", "code"),
    [
        ((8, 0), "80", "machine code"),
        ((8, 6), "80-real", "machine code"),
        ((8, 0), "86-real", None),
        ((8, 0), "86", None),
        ((8, 9), "80-virtual", "PTX"),
        ((9, 0), "80", "PTX"),
        ((9, 0), "80-real", None),
        ((9, 0), "90a-real", "machine code"),
        ((9, 0), "90a-virtual", "PTX"),
        ((10, 0), "90a", None),
        ((10, 3), "100f-real", "machine code"),
        ((12, 0), "100f", None),
        ((12, 0), "80-real 90-virtual", "PTX"),
        ((9, 0), "native", "unknown"),
        ((9, 0), "all-major", "unknown"),
    ],
)
def test_which_code_a_gpu_runs(
    capability: tuple[int, int], architectures: str, code: str | None
) -> None:
    assert diagnosis.gpu_code(capability, tuple(architectures.split())) == code


# ---- what is observed ----------------------------------------------------------------------------


def test_this_process() -> None:
    now = diagnosis.observe()
    assert now.load_error is None
    assert now.library_version == __version__
    assert bool(now.architectures) == _library.has_cuda_kernels()
    assert bool(now.torch_gpus) == torch.cuda.is_available()
    assert now.torch_version == torch.__version__
    assert now.cpu_capability == _library.cpu_capability()


class StandIn:
    """The NVIDIA driver's library with other GPUs, in cuda.h's signatures."""

    def __init__(self, gpus: list[Gpu], version: int = 12080, init: int = 0) -> None:
        self.gpus = gpus
        self.version = version
        self.init = init
        self.cuDriverGetVersion = self._c(self._version, POINTER(c_int))
        self.cuInit = self._c(lambda flags: self.init, c_uint)
        self.cuDeviceGetCount = self._c(self._count, POINTER(c_int))
        self.cuDeviceGet = self._c(self._get, POINTER(c_int), c_int)
        self.cuDeviceGetName = self._c(self._name, c_void_p, c_int, c_int)
        self.cuDeviceGetAttribute = self._c(self._attribute, POINTER(c_int), c_int, c_int)
        self.cuGetErrorString = self._c(self._error, c_int, POINTER(c_char_p))

    def _c(self, function: Callable[..., int], *arguments: Any) -> Any:
        return ctypes.CFUNCTYPE(c_int, *arguments)(function)

    def _version(self, out: Any) -> int:
        out[0] = self.version
        return 0

    def _count(self, out: Any) -> int:
        out[0] = len(self.gpus)
        return 0

    def _get(self, out: Any, ordinal: int) -> int:
        out[0] = 40 + ordinal  # a handle is not its ordinal
        return 0

    def _name(self, out: int, size: int, device: int) -> int:
        name = self.gpus[device - 40].name.encode() + b"\0"
        assert len(name) <= size
        ctypes.memmove(out, name, len(name))
        return 0

    def _attribute(self, out: Any, attribute: int, device: int) -> int:
        out[0] = self.gpus[device - 40].capability[{75: 0, 76: 1}[attribute]]
        return 0

    def _error(self, code: int, out: Any) -> int:
        out[0] = {100: b"no CUDA-capable device is detected", 803: b"system mismatch"}[code]
        return 0


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Puts an object in the place of libcuda.so.1, or an error of loading it."""

    def load(stand_in: object) -> None:
        def opened(name: str) -> object:
            assert name == "libcuda.so.1"
            if isinstance(stand_in, Exception):
                raise stand_in
            return stand_in

        monkeypatch.setattr(driver.ctypes, "CDLL", opened)

    return load


def test_the_driver_is_asked(install: Callable[[object], None]) -> None:
    install(StandIn([H100, V100]))
    assert driver.ask() == Driver((12, 8), (H100, V100), None)


def test_a_driver_without_gpus(install: Callable[[object], None]) -> None:
    nothing = Driver((13, 1), (), "the NVIDIA driver finds no GPU")
    install(StandIn([], 13010))
    assert driver.ask() == nothing
    install(StandIn([H100], 13010, init=100))
    assert driver.ask() == nothing


def test_a_driver_that_refuses(install: Callable[[object], None]) -> None:
    install(StandIn([H100], init=803))
    refuses = "the NVIDIA driver refuses: system mismatch (error 803)"
    assert driver.ask() == Driver((12, 8), (), refuses)


def test_no_driver(install: Callable[[object], None]) -> None:
    install(OSError("libcuda.so.1: cannot open shared object file"))
    asked = driver.ask()
    assert (asked.cuda_version, asked.gpus) == (None, ())
    assert str(asked.error).startswith("no NVIDIA driver (libcuda.so.1: cannot open")
    install(object())
    assert "libcuda.so.1 is no NVIDIA driver" in str(driver.ask().error)


def test_a_hidden_installation(tmp_path: Path) -> None:
    tree, site = tmp_path / "tree", tmp_path / "site"
    for folder in (tree, site):
        (folder / "ultramem_cuda").mkdir(parents=True)
        (folder / "ultramem_cuda" / "__init__.py").touch()
    path = [str(tree), str(tmp_path / "none"), str(site)]
    assert diagnosis._hidden_installation(tree, path) is None, "no source tree"
    (tree / "setup.py").touch()
    assert diagnosis._hidden_installation(tree, path) == site / "ultramem_cuda"
    assert diagnosis._hidden_installation(tree, [str(tree), str(tmp_path / "none")]) is None


def test_torch_says_why_it_uses_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA unknown error\nand a stack")

    monkeypatch.setattr(torch.cuda, "init", fail)
    assert diagnosis._torch_error() == "CUDA unknown error"


# ---- libraries that do not load ------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Compiles C in the place of the native library; returns why it is not loaded."""

    def build(source: str) -> str:
        # The loader knows a file that it has loaded by its name.
        path = tmp_path / f"library{len(list(tmp_path.iterdir()))}.so"
        subprocess.run(
            ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)],
            input=source,
            text=True,
            check=True,
        )
        monkeypatch.setattr(_library, "_PATH", path)
        return str(_library._load())

    return build


def test_a_symbol_that_an_older_torch_lacks(
    library: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        'extern "C" int torch_of_tomorrow(); extern "C" int ours() { return torch_of_tomorrow(); }'
    )
    said = library(source)
    assert "undefined symbol: torch_of_tomorrow" in said
    assert "it needs torch" not in said
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    said = library(source)
    assert "does not load under torch 2.10.1+cpu: " in said
    assert "undefined symbol: torch_of_tomorrow" in said
    assert 'it needs torch 2.11 or later: pip install "torch>=2.11"' in said


@pytest.mark.parametrize(
    ("version", "name"), [("GLIBC_2.99", "glibc"), ("GLIBCXX_3.4.99", "libstdc++")]
)
def test_a_system_that_is_too_old(version: str, name: str) -> None:
    said = f"/lib/x.so.6: version `{version}' not found (required by libultramem_torch.so)"
    hint = _library._hint(said, torch.__version__)
    assert f"({name}) is older than the one it was built for ({version})" in hint
    assert "build ultramem_cuda from source here" in hint
    assert _library._hint("cannot open shared object file", torch.__version__) == ""


def test_python_files_and_library_of_different_versions(library: Callable[[str], str]) -> None:
    right = f'extern "C" int ultramem_api_version() {{ return {NATIVE_API_VERSION}; }}'
    assert library(right) == "None"
    wrong = library('extern "C" int ultramem_api_version() { return 1; }')
    assert f"API version 1; these files need {NATIVE_API_VERSION}" in wrong
    assert "`make build`" in wrong
    assert "API version unknown" in library("int nothing;")


# ---- the command ---------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, now: Situation, *arguments: str) -> int:
    monkeypatch.setattr(diagnosis, "observe", lambda: now)
    return cli.main(["doctor", *arguments])


def test_first_line_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = NO_CUDA["CPU-only build"][0]
    assert run(monkeypatch, now) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == diagnosis.verdict(now)
    assert lines[1] == "Not used, and why"
    assert lines[2].split(maxsplit=2) == [
        "CUDA",
        "operators",
        "this build is CPU-only, without CUDA kernels",
    ]
    assert lines[3].lstrip().startswith("-> build from source")


@pytest.mark.parametrize(
    ("now", "codes"),
    [
        (GOOD, (0, 0)),
        (NO_CUDA["no driver"][0], (0, 1)),
        (changed(load_error="missing", architectures=()), (1, 1)),
    ],
)
def test_exit_code_is_about_the_device(
    now: Situation, codes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (run(monkeypatch, now, "--device", "cpu"), run(monkeypatch, now)) == (codes[0],) * 2
    assert run(monkeypatch, now, "--device", "cuda") == codes[1]


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = NO_CUDA["CPU build of torch"][0]
    assert run(monkeypatch, now, "--json", "--device", "cuda") == 1
    content = json.loads(capsys.readouterr().out)
    assert content["verdict"] == diagnosis.verdict(now)
    assert (content["cpu"], content["cuda"]) == (True, False)
    assert content["findings"] == [dataclasses.asdict(diagnosis.findings(now)[0])]
    assert content["facts"]["Built"]["native library"] == str(_library.library_path())
