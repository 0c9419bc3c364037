"""What the sdist and the wheel hold, that they work, and that a rebuild compiles what changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The sources, for a checkout without git too: everything else at the root is somebody's output.
SOURCES = (
    ".ci",
    ".clang-format",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "bench",
    "cmake",
    "csrc",
    "docs",
    "examples",
    "profiling",
    "pyproject.toml",
    "python_ref",
    "requirements.txt",
    "setup.py",
    "tests",
    "ultramem_cuda",
)
NOT_SOURCES = shutil.ignore_patterns("*.so", "*.so.partial", "__pycache__", "*.egg-info")


def environment(*folders: Path) -> dict[str, str]:
    """For a CPU-only build without optimisation, which takes a tenth of the time."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"PYTHONPATH", "ULTRAMEM_LIBRARY", "NINJA_STATUS"}
    }
    path = os.pathsep.join([*map(str, folders), str(Path(sys.executable).parent)])
    return inherited | {
        "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0",
        "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "ULTRAMEM_CPU_ONLY": "1",
    }


def run(*command: str, cwd: Path, env: dict[str, str]) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a copy of the sources."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=NOT_SOURCES)
        else:
            shutil.copy2(source, checkout / name)
    run(sys.executable, "setup.py", "-q", "sdist", cwd=checkout, env=environment())
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel built from the sdist, with a ninja that is gone afterwards.

    As in pip's isolated builds, whose environment is deleted while the build tree stays.
    """
    tools = sdist.parent / "tools"
    tools.mkdir()
    ninja = shutil.which("ninja", path=environment()["PATH"])
    assert ninja is not None, "ninja is missing; requirements.txt installs it"
    (tools / "ninja").symlink_to(ninja)
    log = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"),
        *("--no-cache-dir", "--wheel-dir", str(sdist.parent), "."),
        cwd=sdist,
        env=environment(tools),
    )
    assert log.count("building for the CPU only") == 1
    shutil.rmtree(tools)
    (built,) = sdist.parent.glob("*.whl")
    return built


def files_below(root: Path) -> set[str]:
    return {
        file.relative_to(root).as_posix()
        for name in SOURCES
        for file in ([root / name] if (root / name).is_file() else (root / name).rglob("*"))
        if file.is_file()
    }


def test_sdist_holds_every_source(sdist: Path):
    assert files_below(sdist) == files_below(sdist.parent / "checkout")


def test_wheel_holds_package_and_libraries(sdist: Path, wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {
        name.removeprefix("ultramem_cuda/") for name in names if name.startswith("ultramem_cuda/")
    }
    assert {
        "__init__.py",
        "bench/__main__.py",
        "cli/__init__.py",
        "examples/lm/__init__.py",
        "libultramem_torch.so",
        "optim/__init__.py",
        "profiling/__init__.py",
        "profiling/nsight/ultramem.section",
        "py.typed",
        "python_ref/__init__.py",
    } <= inside
    assert len([name for name in inside if name.startswith("_C.") and name.endswith(".so")]) == 1
    # Every module of the package and of the bundled folders, and no other top-level name.
    for folder, place in [
        ("ultramem_cuda", ""),
        ("python_ref", "python_ref/"),
        ("profiling", "profiling/"),
        ("bench", "bench/"),
        ("examples/lm", "examples/lm/"),
    ]:
        modules = {
            place + file.relative_to(sdist / folder).as_posix()
            for file in (sdist / folder).rglob("*.py")
        }
        assert modules <= inside, modules - inside
    assert not any(name.startswith("bench/results") for name in inside), "150 kB of records"
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ultramem_cuda"}


def test_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    env = environment()
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)),
        str(wheel),
        cwd=tmp_path,
        env=env,
    )
    output = run(
        *(sys.executable, "-m", "ultramem_cuda", "doctor"),
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(target)},
    )
    assert str(target / "ultramem_cuda" / "libultramem_torch.so") in output
    assert "no: CPU-only build" in output
    output = run(
        *(sys.executable, "-m", "ultramem_cuda", "bench", "--device", "cpu", "--smoke"),
        *("--only", "retrieval", "--json", "record.json"),
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(target)},
    )
    assert "tucker_query" in output
    assert (tmp_path / "record.json").is_file()


@pytest.mark.usefixtures("wheel")
def test_rebuild_compiles_what_changed(sdist: Path):
    def rebuild() -> list[str]:
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        log = run(*command, cwd=sdist, env=environment())
        return [line for line in log.splitlines() if "Building CXX object" in line]

    assert rebuild() == []
    (sdist / "csrc" / "torch" / "introspection.cpp").touch()
    (compiled,) = rebuild()
    assert "introspection.cpp" in compiled
