"""``ultramem doctor``: what was built, what this machine has, what will be used."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from .. import _library
from .._version import __version__
from ..examples.lm.arguments import resolve_device
from ..examples.lm.layers import grouped_mm_runs
from . import retrieval_shape

Facts = list[tuple[str, str]]
Sections = dict[str, Facts]


def run(shape: str | None = None) -> int:
    """Prints the sections; 0 where the native library is loaded, else 1.

    Args:
        shape: as `retrieval_shape.parse` takes it; what retrieval does with it is then printed
            alone.
    """
    if shape is None or not _library.is_loaded():
        print(render(sections()))
        return 0 if _library.is_loaded() else 1
    sizes = retrieval_shape.parse(shape)
    print(render({f"product_key_topk, shape {shape}": retrieval_shape.facts(sizes)}))
    return 0


def sections() -> Sections:
    """All facts, by section."""
    return {
        "Built": _built(),
        "This machine": _machine(),
        "Will be used": _used(),
    }


def render(parts: Sections) -> str:
    """The sections as aligned text."""
    width = max(len(label) for facts in parts.values() for label, _ in facts)
    lines = []
    for title, facts in parts.items():
        lines.append(title)
        lines.extend(f"  {label:<{width}}  {value}" for label, value in facts)
    return "\n".join(lines)


def _built() -> Facts:
    facts = [("ultramem_cuda", __version__), ("native library", str(_library.library_path()))]
    error = _library.load_error()
    facts.append(("loads", "yes" if error is None else f"NO: {error}"))
    if error is None:
        facts.append(
            ("CUDA kernels", "yes" if _library.has_cuda_kernels() else "no: CPU-only build")
        )
    info = _library.build_info()
    if info is None:
        missing = f"no module _C for Python {platform.python_version()}: details unknown"
        return [*facts, ("build details", missing)]
    return facts + [(name.replace("_", " "), _plain(value)) for name, value in info.items()]


def _plain(value: object) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value if item != "") or "none"
    return str(value)


def _machine() -> Facts:
    facts = [
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("processor", f"{processor_name()}, {usable_cores()} usable cores"),
        ("memory", _memory()),
        ("Python", f"{platform.python_version()} at {sys.executable}"),
        ("torch", f"{torch.__version__} ({_torch_cuda()})"),
        ("NumPy", np.__version__),
        ("C++ compiler", _tool_version("c++", "g++", "clang++")),
        ("nvcc", _tool_version("nvcc")),
        ("cmake", _tool_version("cmake")),
    ]
    if torch.cuda.is_available():
        facts += [(f"GPU {index}", gpu_name(index)) for index in range(torch.cuda.device_count())]
    else:
        facts.append(("GPU", "none that torch can use"))
    return facts


def processor_name() -> str:
    """The CPU's marketing name, as far as the system tells."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_name(index: int) -> str:
    """Name, compute capability and memory of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _torch_cuda() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"


def _tool_version(*names: str) -> str:
    """The first of these programs that is installed, with the line that carries its version."""
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            output = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=20, check=False
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            return f"{path} (does not answer)"
        lines = [line for line in output.splitlines() if re.search(r"\d+\.\d+", line)]
        return lines[-1].strip() if name == "nvcc" and lines else (lines or [path])[0].strip()
    return "not found"


def _used() -> Facts:
    if not _library.is_loaded():
        return [("operators", "none: the native library is not loaded")]
    facts = [
        ("CPU operators", f"{_library.cpu_capability()} code on {torch.get_num_threads()} threads")
    ]
    if not torch.cuda.is_available():
        facts.append(("CUDA operators", "none: no GPU that torch can use"))
    elif not _library.has_cuda_kernels():
        facts.append(("CUDA operators", "none: this is a CPU-only build"))
    else:
        facts.append(("CUDA operators", f"on {gpu_name(torch.cuda.current_device())}"))
    device = resolve_device(None)
    facts.append(("train and demo", f"on {device.type}"))
    grouped = grouped_mm_runs(device, torch.bfloat16)
    facts.append(("MoE experts", "grouped_mm" if grouped else "a loop over experts"))
    return facts
