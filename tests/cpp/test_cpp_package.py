"""The installed C++ package: what it holds, that programs find, link and run it, and that their
numbers are Python's.

The package is installed from the build tree of the native library. Where there is none,
ULTRAMEM_CPP_PREFIX names an installed one, and ULTRAMEM_CPP_EXAMPLE a built examples/cpp.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import api_layout
import numpy as np
import pytest
import torch
from torch import Tensor

import ultramem_cuda as um
from ultramem_cuda import _library

ROOT = Path(__file__).resolve().parents[2]
KIND = "cuda" if _library.has_cuda_kernels() else "cpu"
BUILD_TREE = ROOT / "build" / f"{sys.implementation.cache_tag}-{KIND}"
GUIDE = ROOT / "docs" / "cpp.md"


def tool_path() -> str:
    """PATH with the tools that requirements.txt installs."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def attempt(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PATH": tool_path()} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(*command: str | Path, **environment: str) -> str:
    result = attempt(*command, **environment)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package, moved from where it was installed to."""
    if given := os.environ.get("ULTRAMEM_CPP_PREFIX"):
        return Path(given).resolve()
    if not (BUILD_TREE / "libultramem.a").exists():
        pytest.skip(
            f"no build tree at {BUILD_TREE}; ULTRAMEM_CPP_PREFIX names an installed package"
        )
    folder = tmp_path_factory.mktemp("package")
    run("cmake", "--install", BUILD_TREE, "--prefix", folder / "installed")
    return (folder / "installed").rename(folder / "moved")


@pytest.fixture(scope="module")
def with_cuda(prefix: Path) -> bool:
    """Whether the package has CUDA kernels: its library, not what it says of itself."""
    return ".nv_fatbin" in run("readelf", "-SW", prefix / "lib" / "libultramem.so")


def configure(source: Path, build: Path, prefix: Path, *options: str) -> list[str | Path]:
    command = ["cmake", "-S", source, "-B", build, "-G", "Ninja", *options]
    return [*command, f"-DCMAKE_PREFIX_PATH={prefix}"]


def build_project(source: Path, build: Path, prefix: Path) -> None:
    flags = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wpedantic -Werror"
    run(*configure(source, build, prefix, flags))
    run("cmake", "--build", build)


@pytest.fixture(scope="module")
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of examples/cpp, built out of tree."""
    if given := os.environ.get("ULTRAMEM_CPP_EXAMPLE"):
        return Path(given).resolve()
    prefix = request.getfixturevalue("prefix")
    build = tmp_path_factory.mktemp("example")
    build_project(ROOT / "examples" / "cpp", build, prefix)
    return build / "memory_layer"


# ---- the example against Python -----------------------------------------------------------------

CONFIG = um.UltraMemConfig(
    d_model=24,
    num_layers=2,
    num_keys=16,
    key_dim=8,
    num_slots=200,
    value_dim=16,
    pre_value_dim=12,
    num_heads=2,
    tucker_rank=2,
    num_cores=2,
    topk=8,
    key_expand=2,
    activation="silu",
    seed=3,
)
LEARNING_RATE = 0.05
NUM_TOKENS = 33


class Case:
    """One layer's inputs, and what Python makes of them."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.layer = um.UltraMemLayer(CONFIG, layer_index=1).to(dtype)
        table = um.MemoryTable.from_config(CONFIG).to(dtype)
        for parameter in [*self.layer.parameters(), *table.parameters()]:
            # Gains of one and small tables would hide what multiplies with them.
            torch.nn.init.normal_(parameter, mean=0.1)
        x = torch.randn(NUM_TOKENS, CONFIG.d_model, dtype=dtype, requires_grad=True)
        grad_y = torch.randn(NUM_TOKENS, CONFIG.d_model, dtype=dtype)
        assert self.layer.pre_proj is not None
        assert self.layer.cores is not None
        assert table.pre_values is not None
        parameters = {
            "query_weight": self.layer.query_proj.weight,
            "query_norm": self.layer.query_norm,
            "keys": self.layer.keys,
            "key_norm": self.layer.key_norm,
            "cores": self.layer.cores,
            "pre_weight": self.layer.pre_proj.weight,
            "value_weight": self.layer.value_proj.weight,
            "values": table.values,
            "pre_values": table.pre_values,
        }
        tensors: dict[str, Tensor] = {"x": x, "grad_y": grad_y, **parameters}
        self.inputs = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}

        y = self.layer(x, table)
        y.backward(grad_y)
        scores, indices = self.layer.retrieve(x)
        outputs: dict[str, Tensor] = {"y": y, "indices": indices, "scores": scores}
        outputs |= {f"grad_{name}": p.grad for name, p in {"x": x, **parameters}.items()}
        um.optim.MemoryAdagrad(table.parameters(), lr=LEARNING_RATE).step()
        outputs |= {"values": table.values, "pre_values": table.pre_values}
        self.outputs = {name: tensor.detach().numpy() for name, tensor in outputs.items()}

    def options(self) -> list[str]:
        addressing = self.layer.addressing
        assert addressing.offset > 0
        assert addressing.expand == 4
        named = {
            "topk": CONFIG.topk,
            "activation": CONFIG.activation,
            "window": addressing.window,
            "offset": addressing.offset,
            "seed": addressing.seed,
            "lr": LEARNING_RATE,
        }
        return [word for name, value in named.items() for word in (f"--{name}", str(value))]

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        for name, array in self.inputs.items():
            np.save(folder / f"{name}.npy", array)
        return folder


def assert_same_numbers(case: Case, folder: Path, bound: float) -> None:
    assert {file.stem for file in folder.iterdir()} == case.outputs.keys()
    for name, expected in case.outputs.items():
        found = np.load(folder / f"{name}.npy")
        assert found.dtype == expected.dtype, name
        assert found.shape == expected.shape, name
        if name == "indices":
            np.testing.assert_array_equal(found, expected)
            continue
        scale = np.abs(expected).max()
        assert scale > 0, name
        error = np.abs(found - expected).max() / scale
        assert error <= bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    ("dtype", "threads", "bound"),
    [
        pytest.param(torch.float64, 1, 1e-12, id="float64"),
        pytest.param(torch.float64, 3, 1e-12, id="float64-threads"),
        pytest.param(torch.float32, 1, 1e-5, id="float32"),
    ],
)
def test_layer_is_pythons_on_the_cpu(
    example: Path, tmp_path: Path, dtype: torch.dtype, threads: int, bound: float
) -> None:
    case = Case(dtype)
    inputs, outputs = case.write(tmp_path / "in"), tmp_path / "out"
    outputs.mkdir()
    said = run(example, inputs, outputs, *case.options(), "--threads", str(threads))
    assert f"ultramem {um.__version__}, API " in said
    assert f"{NUM_TOKENS} tokens, {CONFIG.num_heads * CONFIG.topk} slots each" in said
    assert_same_numbers(case, outputs, bound)


@pytest.mark.gpu
def test_layer_is_pythons_on_a_gpu(example: Path, tmp_path: Path) -> None:
    case = Case(torch.float32)
    inputs, outputs = case.write(tmp_path / "in"), tmp_path / "out"
    outputs.mkdir()
    run(example, inputs, outputs, *case.options(), "--device", "cuda")
    assert_same_numbers(case, outputs, 1e-4)


def test_example_says_what_is_wrong(example: Path, tmp_path: Path) -> None:
    case = Case(torch.float64)
    inputs = case.write(tmp_path / "in")
    topk = [*case.options(), "--topk", "300"]
    result = attempt(example, inputs, tmp_path, *topk)
    assert result.returncode == 1
    assert "product_key_topk: topk must be in [1, min(axis_topk^2, 1024)]" in result.stdout
    np.save(inputs / "key_norm.npy", np.ones(CONFIG.key_dim + 1))
    result = attempt(example, inputs, tmp_path, *case.options())
    assert result.returncode == 1
    assert "memory_layer: key_norm: does not fit" in result.stdout


# ---- the package --------------------------------------------------------------------------------


def guide_block(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    return block


@pytest.mark.parametrize("kind", ["static", "shared"])
def test_program_of_the_guide(prefix: Path, tmp_path: Path, kind: str) -> None:
    project = guide_block("cmake")
    if kind == "shared":
        project = project.replace("CONFIG REQUIRED", "CONFIG REQUIRED COMPONENTS shared")
        project = project.replace("ultramem::ultramem", "ultramem::ultramem_shared")
    (tmp_path / "CMakeLists.txt").write_text(project)
    (tmp_path / "main.cpp").write_text(guide_block("cpp"))
    build_project(tmp_path, tmp_path / "build", prefix)
    assert run(tmp_path / "build" / "reader") == "10.5 21 201 402\n"
    needed = run("readelf", "-d", tmp_path / "build" / "reader")
    assert ("libultramem.so" in needed) == (kind == "shared")
    assert "libcudart" not in needed


def api_version() -> int:
    info = _library.build_info()
    assert info is not None
    return info["api_version"]


def find_package(prefix: Path, folder: Path, request: str) -> subprocess.CompletedProcess[str]:
    """A project that has no language, and so needs no compiler, and prints what it found."""
    variables = ("WITH_CUDA", "CUDA_ARCHITECTURES", "API_VERSION", "VERSION")
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(finder LANGUAGES NONE)\n"
        f"find_package(ultramem {request})\n"
        + "".join(f'message("{name}=${{ultramem_{name}}}")\n' for name in variables)
    )
    return attempt(*configure(folder, folder / "build", prefix))


def test_package_says_what_is_inside(prefix: Path, with_cuda: bool, tmp_path: Path) -> None:
    result = find_package(prefix, tmp_path, "0.1 CONFIG REQUIRED COMPONENTS shared")
    assert result.returncode == 0, result.stdout
    found = dict(re.findall(r"^([A-Z_]+)=(.*)$", result.stdout, re.MULTILINE))
    assert bool(found.pop("CUDA_ARCHITECTURES")) == with_cuda
    assert found == {
        "WITH_CUDA": "ON" if with_cuda else "OFF",
        "API_VERSION": str(api_version()),
        "VERSION": um.__version__,
    }


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ("0.2 CONFIG REQUIRED", 'compatible with requested version "0.2"'),
        (
            "0.1 CONFIG REQUIRED COMPONENTS shared python",
            "no component python; there are static, shared and CUDA",
        ),
        ("0.1 CONFIG REQUIRED COMPONENTS shared CUDA", "this build of ultramem is CPU-only"),
    ],
)
def test_package_refuses(
    prefix: Path, with_cuda: bool, tmp_path: Path, request_: str, why: str
) -> None:
    if request_.endswith("CUDA") and with_cuda:
        why = ""
    result = find_package(prefix, tmp_path, request_)
    assert (result.returncode != 0) == bool(why), result.stdout
    assert why in " ".join(result.stdout.split())


def declared_functions() -> set[str]:
    """Functions of the headers that are not inline, as namespace::name."""
    functions = set()
    for header in (api_layout.INCLUDE / "ultramem").glob("*.h"):
        code = api_layout.code_of(header.read_text())
        for namespace, body in re.findall(
            r"^namespace (\w+) ULTRAMEM_PUBLIC \{\n(.*?)^\}", code, re.MULTILINE | re.DOTALL
        ):
            scope = "" if namespace == "ultramem" else f"{namespace}::"
            names = re.findall(
                r"^(?:Status|bool|const char\*|u?int\w+|size_t|\w+) (\w+)\(", body, re.M
            )
            functions |= {f"ultramem::{scope}{name}" for name in names}
    return functions


def test_shared_library_exports_the_declared_functions(prefix: Path, with_cuda: bool) -> None:
    library = prefix / "lib" / "libultramem.so"
    symbols = run("nm", "--dynamic", "--demangle", "--defined-only", library).splitlines()
    exported = {re.sub(r"\(.*", "", symbol.split(maxsplit=2)[2]) for symbol in symbols}
    declared = declared_functions()
    assert len(declared) > 30
    if not with_cuda:
        # A rule on sizes alone, which asks no GPU.
        path = "ultramem::cuda::product_key_topk_fwd_path"
        declared = {name for name in declared if "::cuda::" not in name or name == path}
    assert exported == declared
    assert f"[libultramem.so.{api_version()}]" in run("readelf", "-d", library)


# ---- versions -----------------------------------------------------------------------------------


def test_headers_of_another_version_do_not_link(prefix: Path, tmp_path: Path) -> None:
    include = tmp_path / "include"
    shutil.copytree(prefix / "include", include)
    version_header = include / "ultramem" / "version.h"
    current = int(re.findall(r"#define ULTRAMEM_API_VERSION (\d+)", version_header.read_text())[0])
    source = tmp_path / "main.cpp"
    source.write_text(guide_block("cpp"))

    def link() -> subprocess.CompletedProcess[str]:
        library = prefix / "lib" / "libultramem.so"
        return attempt(
            *("c++", "-std=c++17", f"-I{include}", source, library, "-o", tmp_path / "program")
        )

    assert link().returncode == 0
    version_header.write_text(
        version_header.read_text().replace(
            f"ULTRAMEM_API_VERSION {current}", f"ULTRAMEM_API_VERSION {current + 1}"
        )
    )
    result = link()
    assert result.returncode != 0
    assert f"undefined reference to `ultramem::cpu::value_ffn_fwd(ultramem::api{current + 1}::" in (
        result.stdout
    )


def test_layouts_are_on_record() -> None:
    recorded, measured = json.loads(api_layout.RECORD.read_text()), api_layout.measure()
    assert measured == recorded, (
        "if a struct changed, raise ULTRAMEM_API_VERSION; then python tests/cpp/api_layout.py: "
        + "; ".join(api_layout.changed(recorded["layout"], measured["layout"]))
    )


def test_changes_of_a_layout_are_seen() -> None:
    recorded = {"P": {"size": 16, "a": 0, "b": 8}, "E": {"size": 4, "::kA": 0}}
    same = {**recorded, "New": {"size": 4}, "E": {"size": 4, "::kA": 0, "::kB": 1}}
    assert api_layout.changed(recorded, same) == []
    longer = {**recorded, "P": {"size": 24, "a": 0, "b": 8, "c": 16}}
    assert api_layout.changed(recorded, longer) == ["P.c is new", "P size: 16, now 24"]
    swapped = {**recorded, "P": {"size": 16, "a": 8, "b": 0}}
    assert api_layout.changed(recorded, swapped) == ["P a: 0, now 8", "P b: 8, now 0"]
    assert api_layout.changed(recorded, {"P": recorded["P"]}) == ["E is gone"]
    header = """
    struct Base {
      int32_t a = 0;  // struct Comment { int x; };
      double b = 0, c;
      int64_t d[3];
      void (*call)(int x, Body body) = nullptr;
      bool ok() const { return a == 0; }
    };
    enum class Kind : int32_t { kOne = 1, kTwo };
    template <typename T>
    struct Skipped {
      T x;
    };
    """
    dedented = "\n".join(line.removeprefix("    ") for line in header.splitlines())
    assert api_layout.parse(dedented) == {
        "Base": ["a", "b", "c", "d", "call"],
        "Kind": ["::kOne", "::kTwo"],
    }
