"""What the native library depends on and what it carries."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from binaries import cuobjdump, tool

import ultramem_cuda
from ultramem_cuda import _library
from ultramem_cuda._version import NATIVE_API_VERSION

LIBRARY = _library.library_path()
EXPECT_CUDA = os.environ.get("ULTRAMEM_EXPECT_CUDA") == "1"
# Present in every ELF file that gcc links; resolved, or not, by the loader.
RUNTIME_WEAK = {
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
}


def test_library_is_loaded():
    assert _library.load_error() is None


def test_cuda_kernels_are_there_when_they_must_be():
    architectures = _library.build_info()["cuda_architectures"]
    assert _library.has_cuda_kernels() == bool(architectures)
    if EXPECT_CUDA:
        assert architectures, "ULTRAMEM_EXPECT_CUDA=1, but this is a CPU-only build"


def test_undefined_symbols_are_the_stable_abi():
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    headers = [include / "stable/c/shim.h", *(include / "inductor/aoti_torch").rglob("*.h")]
    stable = set(
        re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", "".join(h.read_text() for h in headers))
    )
    unexpected = []
    for line in tool("nm", "-D", "--undefined-only", str(LIBRARY)).splitlines():
        symbol = line.split()[-1]
        name, _, version = symbol.partition("@")
        if version.startswith(("GLIBC", "CXXABI", "GCC")):  # also GLIBCXX
            continue
        if name not in stable and name not in RUNTIME_WEAK:
            unexpected.append(symbol)
    assert unexpected == []


def test_depends_on_torch_and_the_system_alone():
    """And finds torch by no path of the machine that built it: torch is loaded before."""
    dynamic = tool("readelf", "-d", str(LIBRARY))
    system = r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+|ld-linux.*"
    others = [
        name for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic) if not re.fullmatch(system, name)
    ]
    assert others == ["libtorch_cpu.so"]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_exports_only_its_c_entry_points():
    exported = {
        line.split()[-1]
        for line in tool("nm", "-D", "--defined-only", str(LIBRARY)).splitlines()
        if line.split()[-2] == "T"
    }
    assert exported == {
        "ultramem_api_version",
        "ultramem_build_info",
        "ultramem_capture_id",
        "ultramem_cpu_capability",
        "ultramem_factors_forget",
        "ultramem_factors_sections",
        "ultramem_factors_set",
        "ultramem_factors_state",
        "ultramem_kernel_attributes",
        "ultramem_kernel_count",
        "ultramem_product_key_topk_fwd_path",
        "ultramem_product_key_topk_workspace",
    }


def test_carries_the_gpu_code_it_was_built_for():
    """By default sm_80, sm_90a and PTX (test_cuda_toolkit.py); none in a CPU-only build."""
    architectures = _library.build_info()["cuda_architectures"]
    if not architectures:
        assert ".nv_fatbin" not in tool("readelf", "-SW", str(LIBRARY))
        return
    elf = tool(cuobjdump(), "--list-elf", str(LIBRARY))
    ptx = tool(cuobjdump(), "--list-ptx", str(LIBRARY))
    machine_code = set(re.findall(r"\.sm_(\w+)\.cubin", elf))
    if not {"native", "all", "all-major"}.isdisjoint(architectures):
        assert machine_code
        return
    assert machine_code == {
        name.removesuffix("-real") for name in architectures if not name.endswith("-virtual")
    }
    assert set(re.findall(r"\.(?:sm|compute)_(\w+)\.ptx", ptx)) == {
        name.removesuffix("-virtual") for name in architectures if not name.endswith("-real")
    }


def test_cpu_code_is_chosen_at_run_time():
    assert _library.cpu_capability() in {"AVX512", "AVX2", "DEFAULT"}
    script = "from ultramem_cuda import _library; print(_library.cpu_capability())"
    lowered = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"ULTRAMEM_CPU_CAPABILITY": "default"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert lowered.stdout.strip() == "DEFAULT"


def test_build_info():
    info = _library.build_info()
    assert info["version"] == ultramem_cuda.__version__
    assert info["api_version"] == NATIVE_API_VERSION
    assert all(info[name] for name in ("build_type", "cxx_compiler"))
    assert (info["cuda_compiler"] is not None) == _library.has_cuda_kernels()
    assert "DEFAULT" in info["cpu_capabilities"]


def test_module_for_another_python_is_missing(monkeypatch: pytest.MonkeyPatch):
    """Kernel attributes are refused with the reason; what was built is known all the same."""
    assert _library.missing_module() is None
    monkeypatch.setitem(sys.modules, "ultramem_cuda._C", None)
    assert "ultramem_cuda._C" in str(_library.missing_module())
    with pytest.raises(RuntimeError, match="no module _C for this Python"):
        _library.kernel_attributes()
    assert _library.build_info()["version"] == ultramem_cuda.__version__


@pytest.mark.gpu
def test_kernel_attributes():
    kernels = _library.kernel_attributes()
    names = [kernel["name"] for kernel in kernels]
    assert len(set(names)) == len(names)
    for operator in (
        "product_key_topk_fwd",
        "product_key_topk_bwd",
        "value_ffn_fwd",
        "value_ffn_bwd",
        "rms_norm",
        "tucker_filter",
    ):
        assert any(name.startswith(operator) for name in names), operator
    major, minor = torch.cuda.get_device_capability()
    for kernel in kernels:
        assert 0 < kernel["registers_per_thread"] <= 255
        assert kernel["active_blocks_per_multiprocessor"] >= 1
        assert kernel["binary_version"] <= 10 * major + minor


def test_missing_library_is_explained(tmp_path: Path):
    """The package imports without its library, and says what to do."""
    copy = tmp_path / "ultramem_cuda"
    shutil.copytree(
        Path(ultramem_cuda.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so")
    )
    script = (
        "import ultramem_cuda as um, torch\n"
        "assert not um._library.is_loaded()\n"
        "um.ops.tucker_filter(torch.ones(1, 1, 1, 1))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode != 0
    assert "RuntimeError: ultramem_cuda: the native library" in result.stderr
    assert "pip install" in result.stderr
