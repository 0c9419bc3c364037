"""What the sdist and the wheel hold, that they work, and that a rebuild compiles what changed."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import setuptools
from binaries import tool
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from ultramem_cuda._extras import EXTRAS

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


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """The folder that the wheel is installed in, which is in no virtual environment."""
    target = wheel.parent / "site"
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)),
        str(wheel),
        cwd=wheel.parent,
        env=environment(),
    )
    return target


def metadata(wheel: Path, name: str) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
        return Parser().parsestr(archive.read(path).decode())


def test_sdist_holds_every_source(sdist: Path):
    assert files_below(sdist) == files_below(sdist.parent / "checkout")
    # And what setuptools adds: no output of a build.
    added = {path.name for path in sdist.iterdir()} - set(SOURCES)
    assert added <= {"PKG-INFO", "setup.cfg", "ultramem_cuda.egg-info"}


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


def test_one_wheel_serves_every_python_and_every_system_it_can(wheel: Path, site: Path):
    _, _, _, tags = parse_wheel_filename(wheel.name)
    (tag,) = tags
    assert metadata(wheel, "WHEEL").get_all("Tag") == [str(tag)]
    for minor in (10, 11, 12, 13):
        version, platforms = (3, minor), [tag.platform]
        assert tag in itertools.chain(
            cpython_tags(version, platforms=platforms),
            compatible_tags(version, platforms=platforms),
        )
    # The tag promises a glibc: no library may need a newer one.
    promised = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", tag.platform)
    assert promised is not None, tag.platform
    symbols = "".join(
        tool("objdump", "-T", str(path)) for path in (site / "ultramem_cuda").glob("*.so")
    )
    needed = {
        tuple(map(int, version.split("."))) for version in re.findall(r"\bGLIBC_([\d.]+)", symbols)
    }
    assert (2, 2) <= max(needed)[:2] <= (int(promised[1]), int(promised[2]))


@pytest.mark.parametrize(
    ("needs", "tag"),
    [
        ({"GLIBC": (2, 14)}, "manylinux_2_28"),
        ({"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24)}, "manylinux_2_28"),
        ({"GLIBC": (2, 29), "GLIBCXX": (3, 4, 24)}, "manylinux_2_29"),
        ({"GLIBC": (2, 17), "GLIBCXX": (3, 4, 25)}, "manylinux_2_31"),
        ({"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}, "manylinux_2_34"),
        ({"GLIBC": (2, 17), "GCC": (12, 0, 0)}, "manylinux_2_35"),
        ({"GLIBC": (2, 42), "GLIBCXX": (3, 4, 33)}, "manylinux_2_42"),
        ({"GLIBC": (2, 42), "GLIBCXX": (3, 4, 99)}, None),
        ({"GLIBCXX": (3, 4, 24)}, None),
    ],
)
def test_tag_of_the_oldest_system(
    needs: dict[str, tuple[int, ...]], tag: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    build = runpy.run_path(str(ROOT / "setup.py"))
    assert build["manylinux"]([needs]) == tag
    # Of several libraries, the one that needs most counts.
    assert build["manylinux"]([{}, needs, {"CXXABI": (1, 3)}]) == tag


def test_what_the_wheel_says_of_itself(wheel: Path):
    about = metadata(wheel, "METADATA")
    assert about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "Apache-2.0"
    assert set(about.get_all("Provides-Extra")) == {
        "all",
        "dev",
        *(extra.name for extra in EXTRAS),
    }
    requirements = [Requirement(text) for text in about.get_all("Requires-Dist")]
    core = {str(one) for one in requirements if one.marker is None}
    assert core == {"torch>=2.11", "numpy"}
    (entry,) = metadata(wheel, "entry_points.txt").get_payload().split("\n\n")
    assert entry.strip() == "[console_scripts]\nultramem = ultramem_cuda.cli:main"


def test_libraries_name_no_path_of_the_build_machine(site: Path):
    for library in (site / "ultramem_cuda").glob("*.so"):
        dynamic = tool("readelf", "-d", str(library))
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
    assert not list(site.rglob("libtorch*")), "torch is bundled"
    found = tool("ldd", str(site / "ultramem_cuda" / "libultramem_torch.so"))
    assert "libtorch_cpu.so => not found" in found, "found without torch in the process"


def test_a_users_program_is_typed_and_runs(site: Path, tmp_path: Path):
    """mypy finds py.typed and the types of the public names; the program trains a step."""
    program = tmp_path / "program.py"
    shutil.copy2(Path(__file__).with_name("typed_consumer.py"), program)
    # Half of what torch consists of, and nothing that the program sees.
    parts = ("_dynamo", "_export", "_functorch", "_inductor", "ao", "export", "fx", "onnx")
    compilers = ",".join(["sympy.*", *(f"torch.{part}.*" for part in parts)])
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\n[mypy-{compilers}]\nfollow_imports = skip\n"
    )
    env = environment() | {"PYTHONPATH": str(site)}
    run(
        *(sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--cache-dir=cache"),
        program.name,
        cwd=tmp_path,
        env=env,
    )
    run(sys.executable, program.name, cwd=tmp_path, env=env)


def test_installed_wheel_works_elsewhere(wheel: Path, site: Path, tmp_path: Path):
    env = environment()
    output = run(
        *(sys.executable, "-m", "ultramem_cuda", "doctor"),
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(site)},
    )
    assert str(site / "ultramem_cuda" / "libultramem_torch.so") in output
    assert output.startswith("ultramem_cuda ")
    assert "no: CPU-only build" in output
    (command,) = (site / "bin").iterdir()
    assert command.name == "ultramem"
    asked = run(str(command), "--version", cwd=tmp_path, env=env | {"PYTHONPATH": str(site)})
    assert asked == f"ultramem {parse_wheel_filename(wheel.name)[1]}\n"
    output = run(
        *(sys.executable, "-m", "ultramem_cuda", "bench", "--device", "cpu", "--smoke"),
        *("--only", "retrieval", "--json", "record.json"),
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(site)},
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


@pytest.mark.usefixtures("wheel")
def test_modules_for_further_pythons(sdist: Path):
    """Each is built alone, in a tree of its own: the torch library serves all."""
    further = environment() | {"ULTRAMEM_PYTHONS": sys.executable}
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=sdist, env=further)
    (tree,) = (sdist / "build").glob("*-module")
    (module,) = tree.glob("_C.*.so")
    assert not list(tree.glob("libultramem*"))
    assert module.read_bytes() == (sdist / "ultramem_cuda" / module.name).read_bytes()
