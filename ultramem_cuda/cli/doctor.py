"""``ultramem doctor``: what is not used and why, what was built, what this machine has."""

from __future__ import annotations

import dataclasses
import json
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
from . import diagnosis, retrieval_shape

Facts = list[tuple[str, str]]
Sections = dict[str, Facts]


def run(shape: str | None = None, device: str = "cpu", as_json: bool = False) -> int:
    """Prints a verdict, what is not used and why, and the sections.

    Args:
        shape: as `retrieval_shape.parse` takes it; what retrieval does with it is then printed
            alone.
        device: "cpu" or "cuda".
        as_json: prints one JSON object instead, with the same content.

    Returns:
        0 where operators run on that type of device, else 1.
    """
    if shape is not None and _library.is_loaded():
        sizes = retrieval_shape.parse(shape)
        print(render({f"product_key_topk, shape {shape}": retrieval_shape.facts(sizes)}))
        return 0
    now = diagnosis.observe()
    runs = {"cpu": now.cpu_runs, "cuda": bool(now.cuda_gpus)}
    if as_json:
        content = {
            "version": __version__,
            "verdict": diagnosis.verdict(now),
            **runs,
            "findings": [dataclasses.asdict(finding) for finding in diagnosis.findings(now)],
            "facts": {title: dict(facts) for title, facts in sections(now).items()},
        }
        print(json.dumps(content, indent=2))
    else:
        print(text(now))
    return 0 if runs[device] else 1


def text(now: diagnosis.Situation) -> str:
    """The verdict, the findings and all sections."""
    found = diagnosis.findings(now)
    parts = {"Not used, and why": _explained(found)} if found else {}
    return f"{diagnosis.verdict(now)}\n{render(parts | sections(now))}"


def _explained(found: list[diagnosis.Finding]) -> Facts:
    facts = []
    for finding in found:
        facts.append((finding.subject, finding.cause))
        if finding.remedy:
            facts.append(("", f"-> {finding.remedy}"))
    return facts


def sections(now: diagnosis.Situation) -> Sections:
    """All facts, by section."""
    return {
        "Built": _built(now),
        "This machine": _machine(now),
        "Will be used": _used(now),
    }


def render(parts: Sections) -> str:
    """The sections as aligned text."""
    width = max(len(label) for facts in parts.values() for label, _ in facts)
    lines = []
    for title, facts in parts.items():
        lines.append(title)
        lines.extend(f"  {label:<{width}}  {value}" for label, value in facts)
    return "\n".join(lines)


def _built(now: diagnosis.Situation) -> Facts:
    facts = [("ultramem_cuda", __version__), ("native library", str(_library.library_path()))]
    facts.append(("loads", "yes" if now.load_error is None else f"NO: {now.load_error}"))
    if now.load_error is None:
        facts.append(("CUDA kernels", "yes" if now.architectures else "no: CPU-only build"))
        facts += [(k.replace("_", " "), _plain(v)) for k, v in _library.build_info().items()]
    module = "yes" if now.missing_module is None else "no"
    return [*facts, (f"_C for Python {sys.version_info[0]}.{sys.version_info[1]}", module)]


def _plain(value: object) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value if item != "") or "none"
    return str(value)


def _machine(now: diagnosis.Situation) -> Facts:
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
        ("NVIDIA driver", _driver(now)),
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


def _driver(now: diagnosis.Situation) -> str:
    newest = now.driver.cuda_version
    if newest is None:
        return "none"
    return f"runs CUDA up to {newest[0]}.{newest[1]}"


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


def _used(now: diagnosis.Situation) -> Facts:
    if now.load_error is not None:
        return [("operators", "none: the native library is not loaded")]
    gpus = ", ".join(dict.fromkeys(gpu.name for gpu in now.cuda_gpus))
    facts = [
        ("CPU operators", f"{now.cpu_capability} code on {torch.get_num_threads()} threads"),
        ("CUDA operators", f"on {gpus}" if gpus else "none"),
    ]
    device = resolve_device(None)
    facts.append(("train and demo", f"on {device.type}"))
    grouped = grouped_mm_runs(device, torch.bfloat16)
    facts.append(("MoE experts", "grouped_mm" if grouped else "a loop over experts"))
    return facts
