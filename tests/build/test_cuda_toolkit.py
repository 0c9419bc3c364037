"""How the build finds nvcc and chooses GPU architectures: its CMake functions, run as scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CMAKE_FOLDER = Path(__file__).resolve().parents[2] / "cmake"
READ_BY_THE_BUILD = {
    "CMAKE_CUDA_ARCHITECTURES",
    "CUDAARCHS",
    "CUDACXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "TORCH_CUDA_ARCH_LIST",
}


def run_script(
    folder: Path, code: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    script = folder / "script.cmake"
    script.write_text(code)
    env = {name: value for name, value in os.environ.items() if name not in READ_BY_THE_BUILD}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    cmake = shutil.which("cmake", path=env["PATH"])
    assert cmake is not None, "cmake is missing; requirements.txt installs it"
    return subprocess.run(
        [cmake, "-P", str(script)], env=env | environment, capture_output=True, text=True
    )


def printed(folder: Path, code: str, environment: dict[str, str]) -> str:
    result = run_script(folder, code, environment)
    assert result.returncode == 0, result.stderr
    return result.stderr.strip()  # message(NOTICE) goes there


ARCHITECTURES = f"""
include("{CMAKE_FOLDER}/CudaArchitectures.cmake")
ultramem_cuda_architectures(chosen)
message(NOTICE "${{chosen}}")
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "80;90a-real"),
        ({"CUDAARCHS": "", "TORCH_CUDA_ARCH_LIST": ""}, "80;90a-real"),
        ({"CMAKE_CUDA_ARCHITECTURES": "90a-real"}, "90a-real"),
        ({"CUDAARCHS": "80-real;90"}, "80-real;90"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0a+PTX"}, "80-real;90a"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;10.0f"}, "80-real;100f-real"),
        ({"CMAKE_CUDA_ARCHITECTURES": "80", "TORCH_CUDA_ARCH_LIST": "9.0"}, "80"),
    ],
)
def test_architectures(tmp_path: Path, environment: dict[str, str], expected: str):
    assert printed(tmp_path, ARCHITECTURES, environment) == expected


def test_architectures_given_to_cmake_come_first(tmp_path: Path):
    code = "set(CMAKE_CUDA_ARCHITECTURES 75)\n" + ARCHITECTURES
    assert printed(tmp_path, code, {"CMAKE_CUDA_ARCHITECTURES": "80"}) == "75"


def test_unreadable_architectures_are_an_error(tmp_path: Path):
    result = run_script(tmp_path, ARCHITECTURES, {"TORCH_CUDA_ARCH_LIST": "Hopper"})
    assert result.returncode != 0
    assert "cannot read 'Hopper'" in result.stderr


FIND_NVCC = f"""
include("{CMAKE_FOLDER}/FindNvcc.cmake")
set(CMAKE_CUDA_COMPILER NOTFOUND CACHE FILEPATH "")
ultramem_find_nvcc()
if(DEFINED CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "the cache still says that there is no nvcc")
endif()
message(NOTICE "$ENV{{CUDACXX}}")
"""


def a_toolkit(folder: Path) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_of_the_toolkit_is_found(tmp_path: Path, variable: str):
    nvcc = a_toolkit(tmp_path / "cuda")
    environment = {variable: str(tmp_path / "cuda"), "PATH": str(tmp_path)}
    assert printed(tmp_path, FIND_NVCC, environment) == str(nvcc)


def test_cudacxx_and_path_come_before_cuda_home(tmp_path: Path):
    a_toolkit(tmp_path / "cuda")
    on_path = a_toolkit(tmp_path / "other")
    home = {"CUDA_HOME": str(tmp_path / "cuda")}
    # An nvcc on PATH is left for CMake itself to find.
    assert printed(tmp_path, FIND_NVCC, home | {"PATH": str(on_path.parent)}) == ""
    assert printed(tmp_path, FIND_NVCC, home | {"CUDACXX": "/my/nvcc"}) == "/my/nvcc"


def test_no_toolkit_at_the_place_named(tmp_path: Path):
    environment = {"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
    assert printed(tmp_path, FIND_NVCC, environment) == ""
