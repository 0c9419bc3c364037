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

import ultramem_cuda
from ultramem_cuda import _library

LIBRARY = _library.library_path()
EXPECT_CUDA = os.environ.get("ULTRAMEM_EXPECT_CUDA") == "1"
# Present in every ELF file that gcc links; resolved, or not, by the loader.
RUNTIME_WEAK = {
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
}


def tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """CUDA's disassembler, from the toolkit or from its PyPI package."""
    if not _library.has_cuda_kernels():
        pytest.skip("a CPU-only build carries no GPU code")
    found = shutil.which("cuobjdump")
    if found is None:
        for base in map(Path, sys.path):
            candidates = list(base.glob("nvidia/*/bin/cuobjdump"))
            if candidates:
                found = str(candidates[0])
                break
    assert found is not None, "cuobjdump is missing; requirements.txt installs it"
    return found


def test_library_is_loaded():
    assert _library.load_error() is None


def test_cuda_kernels_are_there_when_they_must_be():
    if EXPECT_CUDA:
        assert _library.has_cuda_kernels()
    else:
        has_nvcc_build = "sm_" in LIBRARY.read_bytes().decode("latin-1")
        assert _library.has_cuda_kernels() == has_nvcc_build


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


def test_depends_on_no_python_and_no_cuda_runtime():
    needed = re.findall(r"NEEDED.*\[(.*)\]", tool("readelf", "-d", str(LIBRARY)))
    assert needed, "readelf printed no dependencies"
    for name in needed:
        assert not re.match(r"libpython|libcudart|libcuda\.|libc10|libtorch_python", name), name
    assert "RPATH" not in tool("readelf", "-d", str(LIBRARY))
    assert "RUNPATH" not in tool("readelf", "-d", str(LIBRARY))


def test_exports_only_its_c_entry_points():
    exported = {
        line.split()[-1]
        for line in tool("nm", "-D", "--defined-only", str(LIBRARY)).splitlines()
        if line.split()[-2] == "T"
    }
    assert exported == {
        "ultramem_cpu_capability",
        "ultramem_kernel_attributes",
        "ultramem_kernel_count",
    }


def default_architectures() -> bool:
    return not any(
        os.environ.get(name)
        for name in ("TORCH_CUDA_ARCH_LIST", "CUDAARCHS", "CMAKE_ARGS", "CMAKE_CUDA_ARCHITECTURES")
    )


@pytest.mark.skipif(not default_architectures(), reason="architectures were chosen by hand")
def test_carries_sm80_sm90a_and_ptx(cuobjdump: str):
    machine_code = set(
        re.findall(r"\.(sm_\w+)\.cubin", tool(cuobjdump, "--list-elf", str(LIBRARY)))
    )
    ptx = set(
        re.findall(r"\.(sm_\w+|compute_\w+)\.ptx", tool(cuobjdump, "--list-ptx", str(LIBRARY)))
    )
    assert machine_code == {"sm_80", "sm_90a"}
    assert {name.split("_")[1] for name in ptx} == {"80"}


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
    assert info is not None, "the module _C is missing"
    assert info["version"] == ultramem_cuda.__version__
    assert bool(info["cuda_architectures"]) == _library.has_cuda_kernels()
    assert "DEFAULT" in info["cpu_capabilities"]


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
