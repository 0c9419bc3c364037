"""Builds the native libraries with CMake and Ninja; everything else is in pyproject.toml.

Environment variables:
  ULTRAMEM_CPU_ONLY=1     leave CUDA out even where nvcc is present
  CUDACXX                 nvcc, where it is not on PATH; else CUDA_HOME or CUDA_PATH, its toolkit
  TORCH_CUDA_ARCH_LIST    GPU architectures, torch's way ("8.0;9.0a+PTX")
  CUDAARCHS               the same, CMake's way ("80;90a-real"); or CMAKE_CUDA_ARCHITECTURES
  CMAKE_ARGS              further arguments to CMake (e.g. -DCMAKE_BUILD_TYPE=RelWithDebInfo)
  MAX_JOBS                how many compilers run at once
  ULTRAMEM_PYTHONS        further interpreters that the wheel carries a module _C for, separated by
                          colons; the torch library serves all of them
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
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


# The manylinux tags (PEP 600): of the oldest systems with this glibc, the versions of its other
# libraries' symbols (auditwheel has the same numbers).
MANYLINUX = {
    (2, 28): {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    (2, 31): {"GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (7, 0, 0)},
    (2, 34): {"GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
    (2, 35): {"GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)},
    (2, 39): {"GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)},
}

Version = tuple[int, ...]


def needed_versions(library: Path) -> dict[str, Version]:
    """The newest version that a library needs of each system library's symbols."""
    command = ["readelf", "--wide", "--version-info", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    newest: dict[str, Version] = {}
    for name, text in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", listing):
        version = tuple(map(int, text.split(".")))
        newest[name] = max(version, newest.get(name, ()))
    return newest


def manylinux(needs: Iterable[dict[str, Version]]) -> str | None:
    """The oldest manylinux tag whose systems have all of these versions, without architecture."""
    needed: dict[str, Version] = {}
    for versions in needs:
        for name, version in versions.items():
            needed[name] = max(version, needed.get(name, ()))
    if "GLIBC" not in needed:  # musl
        return None
    for glibc, offered in MANYLINUX.items():
        if all(needed.get(name, ()) <= version for name, version in offered.items()):
            major, minor = max(glibc, needed["GLIBC"][:2])
            return f"manylinux_{major}_{minor}"
    return None


def cpu_only() -> bool:
    return os.environ.get("ULTRAMEM_CPU_ONLY", "0") == "1"


class OneWheel(bdist_wheel):
    """One wheel for every Python, and for every system that the libraries load on."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[-1]
        libraries = [Path(name) for name in self.get_finalized_command("build_ext").get_outputs()]
        if platform.startswith("linux_") and libraries and shutil.which("readelf"):
            tag = manylinux(map(needed_versions, libraries))
            if tag is not None:
                platform = f"{tag}_{platform.removeprefix('linux_')}"
        return "py3", "none", platform


class CMakeBuild(build_ext):
    """Builds the native libraries and puts them beside the package's Python files."""

    def run(self) -> None:
        kind = "cpu" if cpu_only() else "cuda"
        # One tree per interpreter and kind: rebuilding touches only what changed.
        tree = ROOT / "build" / f"{sys.implementation.cache_tag}-{kind}"
        self.configure(tree, sys.executable, cpu_only=cpu_only())
        self.cmake("--build", str(tree))
        (python_module,) = tree.glob("_C.*.so")
        built = [tree / TORCH_LIBRARY, python_module]
        for python in filter(None, os.environ.get("ULTRAMEM_PYTHONS", "").split(os.pathsep)):
            built.append(self.build_module(python))
        package_dir = self.output_dir()
        package_dir.mkdir(parents=True, exist_ok=True)
        for library in built:
            # Renamed into place: a process that has the old file loaded must keep it whole.
            partial = package_dir / f"{library.name}.partial"
            shutil.copy2(library, partial)
            os.replace(partial, package_dir / library.name)

    def build_module(self, python: str) -> Path:
        """Builds _C alone, for another interpreter; returns the file."""
        ask = "import sys; print(sys.implementation.cache_tag)"
        tag = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout
        tree = ROOT / "build" / f"{tag.strip()}-module"
        self.configure(tree, python, "-DULTRAMEM_BUILD_TORCH=OFF", cpu_only=True)
        self.cmake("--build", str(tree), "--target", "_C")
        (module,) = tree.glob("_C.*.so")
        return module

    def configure(self, build_dir: Path, python: str, *arguments: str, cpu_only: bool) -> None:
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
        import pybind11

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
            f"-DPython3_EXECUTABLE={python}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *arguments,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )

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
    cmdclass={"bdist_wheel": OneWheel, "build_ext": CMakeBuild},
)
