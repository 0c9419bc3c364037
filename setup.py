"""Builds the native libraries with CMake and Ninja; everything else is in pyproject.toml.

Environment variables:
  ULTRAMEM_CPU_ONLY=1     leave CUDA out even where nvcc is present
  CUDACXX                 nvcc, where it is not on PATH; else CUDA_HOME or CUDA_PATH, its toolkit
  TORCH_CUDA_ARCH_LIST    GPU architectures, torch's way ("8.0;9.0a+PTX")
  CUDAARCHS               the same, CMake's way ("80;90a-real"); or CMAKE_CUDA_ARCHITECTURES
  CMAKE_ARGS              further arguments to CMake (e.g. -DCMAKE_BUILD_TYPE=RelWithDebInfo)
  MAX_JOBS                how many compilers run at once
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_LIBRARY = "libultramem_torch.so"

# Top-level folders that the wheel ships inside the package; a checkout finds them where they are
# (ultramem_cuda/__init__.py).
BUNDLED = {
    "ultramem_cuda.python_ref": "python_ref",
    "ultramem_cuda.profiling": "profiling",
    "ultramem_cuda.profiling.nsight": "profiling/nsight",
    "ultramem_cuda.examples": "examples",
    "ultramem_cuda.examples.lm": "examples/lm",
    "ultramem_cuda.bench": "bench",
}


class CMakeBuild(build_ext):
    """Runs CMake once for both native modules and puts them beside the package's Python files."""

    def run(self) -> None:
        build_dir = self.configure()
        self.cmake("--build", str(build_dir))
        package_dir = self.output_dir()
        package_dir.mkdir(parents=True, exist_ok=True)
        (python_module,) = build_dir.glob("_C.*.so")
        for library in (build_dir / TORCH_LIBRARY, python_module):
            # Renamed into place: a process that has the old file loaded must keep it whole.
            partial = package_dir / f"{library.name}.partial"
            shutil.copy2(library, partial)
            os.replace(partial, package_dir / library.name)

    def configure(self) -> Path:
        cpu_only = os.environ.get("ULTRAMEM_CPU_ONLY", "0") == "1"
        # One tree per interpreter and kind: rebuilding touches only what changed.
        tag = f"{sys.implementation.cache_tag}-{'cpu' if cpu_only else 'cuda'}"
        build_dir = ROOT / "build" / tag
        torch_spec = importlib.util.find_spec("torch")
        if torch_spec is None or not torch_spec.submodule_search_locations:
            raise RuntimeError("building ultramem_cuda needs torch >= 2.11 (its headers)")
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        if importlib.util.find_spec("pybind11") is None:
            missing.append("pybind11")
        if missing:
            raise RuntimeError(
                f"building ultramem_cuda needs {' and '.join(missing)}: "
                'pip install cmake ninja "pybind11>=2.13"'
            )
        self.cmake(
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            # Every path is given anew: pip builds in environments that it deletes, and CMake's
            # cache would still name the last one.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DULTRAMEM_CPU_ONLY={'ON' if cpu_only else 'OFF'}",
            f"-DULTRAMEM_TORCH_DIR={torch_spec.submodule_search_locations[0]}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )
        return build_dir

    def output_dir(self) -> Path:
        if self.inplace:
            return ROOT / "ultramem_cuda"
        return Path(self.build_lib).resolve() / "ultramem_cuda"

    def cmake(self, *arguments: str) -> None:
        environment = dict(os.environ)
        if "MAX_JOBS" in environment:
            environment["CMAKE_BUILD_PARALLEL_LEVEL"] = environment["MAX_JOBS"]
        subprocess.run(["cmake", *arguments], check=True, env=environment)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.output_dir().glob("*.so")]


setup(
    packages=[*find_packages(include=["ultramem_cuda", "ultramem_cuda.*"]), *BUNDLED],
    package_dir=BUNDLED,
    package_data={
        "ultramem_cuda": ["py.typed"],
        "ultramem_cuda.profiling.nsight": ["*.section"],
    },
    # Which MANIFEST.in puts into the sdist.
    exclude_package_data={"ultramem_cuda.bench": ["results/*"]},
    ext_modules=[Extension("ultramem_cuda._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
