"""Why something of ultramem_cuda is not used on this machine, and what to do about it."""

from __future__ import annotations

import importlib.machinery
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .. import _library
from .._extras import EXTRAS, Extra
from .._version import __version__
from . import driver
from .driver import Driver, Gpu

# What the CUDA kernels are written for: asynchronous copies and bfloat16 in the tensor cores.
OLDEST_CAPABILITY = (8, 0)
SETS = {"native", "all", "all-major"}

Severity = Literal["broken", "unused", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not used.

    Attributes:
        severity: "broken", nothing works; "unused", a part of this machine or build is left out;
            "note", an option is not there.
        subject: what is not used.
        cause: why.
        remedy: what to do; empty where there is nothing.
    """

    severity: Severity
    subject: str
    cause: str
    remedy: str = ""


@dataclass(frozen=True)
class Situation:
    """What `findings` judges.

    Attributes:
        load_error: why the native library is not loaded, or None.
        library_version: the native library's own; None where it is not loaded.
        architectures: GPUs that it has code for, in CMake's notation; none in a CPU-only build.
        cuda_compiler: version of the nvcc that built it, or None.
        cpu_capability: instruction set of the CPU operators; None where it is not loaded.
        missing_module: why the module _C cannot be imported, or None.
        torch_version, torch_cuda: of torch, and of the CUDA that it was built for (None: none).
        torch_gpus: GPUs that torch uses.
        torch_error: why torch uses none of the driver's GPUs, where it says.
        driver: what the NVIDIA driver says.
        environment: variables that change what is used, as far as they are set.
        missing_extras: optional packages that are not installed.
        hidden: another installation of the package, which this source tree hides; or None.
    """

    load_error: str | None
    library_version: str | None
    architectures: tuple[str, ...]
    cuda_compiler: str | None
    cpu_capability: str | None
    missing_module: str | None
    torch_version: str
    torch_cuda: str | None
    torch_gpus: tuple[Gpu, ...]
    torch_error: str | None
    driver: Driver
    environment: dict[str, str]
    missing_extras: tuple[Extra, ...]
    hidden: Path | None

    @property
    def cpu_runs(self) -> bool:
        """Whether CPU tensors are computed."""
        return self.load_error is None

    @property
    def cuda_gpus(self) -> tuple[Gpu, ...]:
        """GPUs whose tensors are computed."""
        if self.load_error is not None or not self.architectures or _runtime_too_new(self):
            return ()
        return tuple(
            gpu
            for gpu in self.torch_gpus
            if gpu.capability >= OLDEST_CAPABILITY and gpu_code(gpu.capability, self.architectures)
        )


VARIABLES = ("CUDA_VISIBLE_DEVICES", "ULTRAMEM_CPU_CAPABILITY", "ULTRAMEM_LIBRARY")


def observe() -> Situation:
    """This process, this machine."""
    info = _library.build_info() if _library.is_loaded() else None
    gpus = driver.ask()
    torch_gpus = _torch_gpus()
    return Situation(
        load_error=_library.load_error(),
        library_version=info["version"] if info else None,
        architectures=tuple(info["cuda_architectures"]) if info else (),
        cuda_compiler=info["cuda_compiler"] if info else None,
        cpu_capability=_library.cpu_capability() if info else None,
        missing_module=_library.missing_module(),
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_gpus=torch_gpus,
        torch_error=_torch_error() if torch.version.cuda and not torch_gpus else None,
        driver=gpus,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        missing_extras=tuple(extra for extra in EXTRAS if not extra.is_installed()),
        hidden=_hidden_installation(Path(_library.__file__).resolve().parent.parent, sys.path),
    )


def _torch_gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(
        Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
        for index in range(torch.cuda.device_count())
    )


def _torch_error() -> str | None:
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return str(error).split("\n")[0]
    return None


def _hidden_installation(root: Path, search_path: list[str]) -> Path | None:
    """Where Python would find the package if it did not find this source tree first."""
    if not (root / "setup.py").is_file():
        return None
    others = [entry for entry in search_path if Path(entry or os.curdir).resolve() != root]
    found = importlib.machinery.PathFinder.find_spec("ultramem_cuda", others)
    if found is None or found.origin is None:
        return None
    place = Path(found.origin).resolve().parent
    return None if place == root / "ultramem_cuda" else place


def verdict(now: Situation) -> str:
    """All of it in one line."""
    name = f"ultramem_cuda {__version__}"
    if now.load_error is not None:
        return f"{name} does not work here: {now.load_error}"
    gpus = now.cuda_gpus
    if gpus:
        names = ", ".join(sorted({gpu.name for gpu in gpus}))
        count = f"{len(gpus)} GPU{'' if len(gpus) == 1 else 's'} ({names})"
        return f"{name} works on the CPU and on {count}"
    cause = next(iter(_cuda(now)), None)
    return f"{name} works on the CPU alone" + (f"; {cause.cause}" if cause else "")


def findings(now: Situation) -> list[Finding]:
    """Everything that is not used, the gravest first."""
    if now.load_error is not None:
        found = [Finding("broken", "all operators", now.load_error)]
    else:
        found = [*_cuda(now), *_library_notes(now)]
    if now.hidden is not None:
        found.append(
            Finding(
                "note",
                "installed package",
                f"this source tree hides the ultramem_cuda installed in {now.hidden}",
                "run Python from another folder to use that one",
            )
        )
    found += [
        Finding(
            "note",
            extra.distribution,
            f"not installed; it gives {extra.gives}",
            extra.pip_command(),
        )
        for extra in now.missing_extras
    ]
    order: dict[Severity, int] = {"broken": 0, "unused": 1, "note": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


_REBUILD = (
    "build from source where nvcc is found: pip install --no-build-isolation . (it says what it "
    "looked at; CUDACXX names nvcc)"
)


def _cuda(now: Situation) -> Iterator[Finding]:
    """Why CUDA operators do not run, or not as well as they could."""
    what = "CUDA operators"
    if not (now.driver.gpus or now.torch_gpus):
        yield _no_gpu(now, what)
        return
    if not now.architectures:
        yield Finding("unused", what, "this build is CPU-only, without CUDA kernels", _REBUILD)
    if now.torch_cuda is None:
        yield Finding(
            "unused",
            what,
            f"torch {now.torch_version} is a build without CUDA",
            "install a CUDA build of torch; ultramem_cuda stays as it is",
        )
    elif not now.torch_gpus:
        yield _torch_uses_none(now, what)
    if now.architectures:
        if _runtime_too_new(now):
            yield Finding(
                "unused",
                what,
                f"this build has the runtime of CUDA {now.cuda_compiler}, and the NVIDIA driver "
                f"runs {_dotted(now.driver.cuda_version)} at most",
                "update the NVIDIA driver, or build from source with the older CUDA",
            )
        for gpu in dict.fromkeys(now.torch_gpus or now.driver.gpus):
            yield from _gpu(gpu, now.architectures)


def _no_gpu(now: Situation, what: str) -> Finding:
    visible = now.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and now.driver.cuda_version is not None:
        return Finding(
            "unused",
            what,
            f"no GPU: {now.driver.error}, with CUDA_VISIBLE_DEVICES='{visible}'",
            "unset CUDA_VISIBLE_DEVICES",
        )
    return Finding("unused", what, f"no GPU: {now.driver.error}")


def _torch_uses_none(now: Situation, what: str) -> Finding:
    assert now.torch_cuda is not None
    newest = now.driver.cuda_version
    if newest is not None and newest[0] < int(now.torch_cuda.split(".")[0]):
        return Finding(
            "unused",
            what,
            f"the NVIDIA driver is too old: it runs CUDA {_dotted(newest)} at most, and torch "
            f"{now.torch_version} is built for {now.torch_cuda}",
            "update the NVIDIA driver, or install a torch for the older CUDA",
        )
    said = f": {now.torch_error}" if now.torch_error else ""
    return Finding("unused", what, f"torch {now.torch_version} cannot use the GPU{said}")


def _runtime_too_new(now: Situation) -> bool:
    """The linked CUDA runtime runs on any driver of its own major version, and on later ones."""
    newest = now.driver.cuda_version
    if newest is None or now.cuda_compiler is None:
        return False
    return newest[0] < int(now.cuda_compiler.split(".")[0])


def _gpu(gpu: Gpu, architectures: tuple[str, ...]) -> Iterator[Finding]:
    major, minor = gpu.capability
    here = f"{gpu.name}, compute capability {major}.{minor}"
    suffix = "a" if gpu.capability == (9, 0) else ""
    rebuild = (
        f'build from source: TORCH_CUDA_ARCH_LIST="{major}.{minor}{suffix}" '
        "pip install --no-build-isolation ."
    )
    if gpu.capability < OLDEST_CAPABILITY:
        oldest = _dotted(OLDEST_CAPABILITY)
        yield Finding("unused", here, f"the CUDA kernels need compute capability {oldest} or later")
        return
    code = gpu_code(gpu.capability, architectures)
    built = ", ".join(architectures)
    if code is None:
        cause = f"this build has no code that runs on it (built for {built})"
        yield Finding("unused", here, cause, rebuild)
    elif code == "PTX":
        yield Finding(
            "note",
            here,
            f"no machine code for it in this build (built for {built}): the driver compiles PTX "
            "when a kernel is first used, and keeps the result",
            rebuild,
        )
    elif gpu.capability == (9, 0) and not {"90a", "90a-real", *SETS} & set(architectures):
        cause = "the kernels of sm_90a are not in this build; slower ones stand in"
        yield Finding("note", here, cause, rebuild)


def gpu_code(
    capability: tuple[int, int], architectures: tuple[str, ...]
) -> Literal["machine code", "PTX", "unknown"] | None:
    """What a library with these architectures runs on such a GPU.

    "unknown" for CMake's names of sets, whose members nobody wrote down; None: nothing runs.
    """
    if SETS & set(architectures):
        return "unknown"
    found: Literal["PTX"] | None = None
    for entry in architectures:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        assert match is not None, entry
        built = int(match[1]), int(match[2])
        exact = built == capability
        family = built[0] == capability[0] and built[1] <= capability[1]
        # Code with the suffix a runs on that GPU alone, with f on its family.
        if match[4] != "-virtual" and (exact if match[3] == "a" else family):
            return "machine code"
        later = {"a": exact, "f": family, "": built <= capability}[match[3]]
        if match[4] != "-real" and later:
            found = "PTX"
    return found


def _library_notes(now: Situation) -> Iterator[Finding]:
    """What is unusual about the library that is loaded."""
    if now.library_version != __version__:
        yield Finding(
            "note",
            "native library",
            f"it is of version {now.library_version}, the Python files are of {__version__}",
            "build it again: make build, or pip install --force-reinstall",
        )
    if "ULTRAMEM_LIBRARY" in now.environment:
        path = now.environment["ULTRAMEM_LIBRARY"]
        yield Finding("note", "native library", f"ULTRAMEM_LIBRARY='{path}' replaces the package's")
    lowered = now.environment.get("ULTRAMEM_CPU_CAPABILITY")
    if lowered is not None:
        yield Finding(
            "note",
            "CPU operators",
            f"ULTRAMEM_CPU_CAPABILITY='{lowered}' limits them to {now.cpu_capability} code",
            "unset ULTRAMEM_CPU_CAPABILITY",
        )
    elif now.cpu_capability == "DEFAULT":
        yield Finding("note", "CPU operators", "slow: no code for this processor's vector units")
    if now.missing_module is not None:
        python = ".".join(platform.python_version_tuple()[:2])
        yield Finding(
            "note",
            "kernel attributes",
            f"this installation has no module _C for Python {python}; nothing else needs it "
            f"({now.missing_module})",
            "build from source with this Python: pip install --no-build-isolation .",
        )


def _dotted(version: tuple[int, int] | None) -> str:
    return "none" if version is None else f"{version[0]}.{version[1]}"
