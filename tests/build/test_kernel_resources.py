"""No kernel spills registers, but for those that are named here with the bytes they may use.

`cuobjdump --dump-resource-usage` prints STACK and LOCAL for each kernel. STACK is ptxas's stack
frame: spilled registers and arrays indexed at run time live there, and it agrees with what
`ptxas -v` calls "bytes stack frame". LOCAL was 0 in every kernel looked at, spills or not; it is
added here in case that changes. Neither needs a GPU. Both depend on the version of nvcc.

The machine code is read, not the PTX, which has no registers yet.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from binaries import cuobjdump, tool

from ultramem_cuda import _library

# (kernel, architecture) -> bytes of local memory a thread. An entry must go when its kernel no
# longer spills, so that the list says what is true.
KNOWN: dict[tuple[str, str], int] = {}


class Kernel(NamedTuple):
    name: str
    architecture: str
    local_bytes: int


def parse(report: str) -> list[Kernel]:
    """Kernels by their mangled names, from cuobjdump's report."""
    kernels = []
    architecture = name = None
    for line in report.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            architecture, name = found[1], None
        elif found := re.match(r"\s*Function (\S+):\s*$", line):
            name = found[1]
        elif usage := dict(re.findall(r"(\w+):(\d+)", line)):
            if name is None or "STACK" not in usage:
                continue
            assert architecture is not None
            kernels.append(Kernel(name, architecture, int(usage["STACK"]) + int(usage["LOCAL"])))
            name = None
    return kernels


def readable(mangled: list[str]) -> list[str]:
    """Function and template arguments, without namespaces and parameters."""
    if not mangled:
        return []
    demangled = tool("c++filt", text="\n".join(mangled)).splitlines()
    return [shorten(name) for name in demangled]


def shorten(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for position, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        # Parentheses within template arguments are casts: (int)4.
        if character == "(" and depth == 0:
            name = name[:position]
            break
    return re.sub(r"ultramem::(?:cuda::|api\d+::)?", "", name)


def judge(kernels: list[Kernel], known: dict[tuple[str, str], int]) -> list[str]:
    """What is wrong, a line each."""
    wrong = []
    seen: dict[tuple[str, str], int] = {}
    for kernel in kernels:  # overloads share a name
        key = (kernel.name, kernel.architecture)
        seen[key] = max(kernel.local_bytes, seen.get(key, 0))
    for (name, architecture), size in sorted(seen.items()):
        allowed = known.get((name, architecture), 0)
        if size > allowed:
            wrong.append(
                f"{name} on {architecture} uses {size} bytes of local memory a thread "
                f"(spills or run-time indexing), {allowed} are allowed"
            )
    for (name, architecture), allowed in sorted(known.items()):
        size = seen.get((name, architecture))
        if size is None:
            wrong.append(f"{name} on {architecture} is on the list of spills, but not built")
        elif size < allowed:
            wrong.append(
                f"{name} on {architecture} is listed with {allowed} bytes and uses {size}: "
                "correct the list"
            )
    return wrong


def built_kernels() -> list[Kernel]:
    report = tool(cuobjdump(), "--dump-resource-usage", str(_library.library_path()))
    kernels = parse(report)
    names = readable([kernel.name for kernel in kernels])
    return [kernel._replace(name=name) for kernel, name in zip(kernels, names, strict=True)]


def needs_cuda_kernels() -> None:
    if not _library.has_cuda_kernels():
        pytest.skip("this build has no CUDA kernels")


def test_no_kernel_spills() -> None:
    needs_cuda_kernels()
    kernels = built_kernels()
    built_for = {kernel.architecture for kernel in kernels}
    known = {key: size for key, size in KNOWN.items() if key[1] in built_for}
    wrong = judge(kernels, known)
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_kernel_is_read() -> None:
    """As many kernels as the report has functions, and those of every operator among them."""
    needs_cuda_kernels()
    report = tool(cuobjdump(), "--dump-resource-usage", str(_library.library_path()))
    kernels = built_kernels()
    assert len(kernels) == len(re.findall(r"^ *Function ", report, re.MULTILINE))
    for architecture in {kernel.architecture for kernel in kernels}:
        names = [kernel.name for kernel in kernels if kernel.architecture == architecture]
        for operator in ("product_key_topk_fwd", "product_key_topk_bwd", "value_ffn", "rms_norm"):
            assert any(name.startswith(operator) for name in names), (operator, architecture)


REPORT = """
Fatbin ptx code:
================
arch = sm_80
identifier = a.cu

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:38 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1gv:
  REG:64 STACK:1720 SHARED:0 LOCAL:8 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80

Resource usage:
 Function _Z1fv:
  REG:38 STACK:24 SHARED:16 LOCAL:0 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_the_report_is_understood() -> None:
    assert parse(REPORT) == [
        Kernel("_Z1fv", "sm_90a", 0),
        Kernel("_Z1gv", "sm_90a", 1728),
        Kernel("_Z1fv", "sm_80", 24),
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void ultramem::cuda::(anonymous namespace)::k<float, 4>(A, int)", "k<float, 4>"),
        ("ultramem::cuda::(anonymous namespace)::k(ultramem::P)", "k"),
        ("void k<(ultramem::api4::DType)1, (int)4>(int)", "k<(DType)1, (int)4>"),
        (
            "void cub::detail::k<cub::Policy<1>::P, (bool)0>(int*)",
            "cub::detail::k<cub::Policy<1>::P, (bool)0>",
        ),
    ],
)
def test_names_are_readable(name: str, short: str) -> None:
    assert shorten(name) == short


def test_what_is_wrong() -> None:
    kernels = [Kernel("f", "sm_80", 24), Kernel("g", "sm_80", 8), Kernel("g", "sm_90a", 0)]
    assert judge(kernels, {("f", "sm_80"): 24, ("g", "sm_80"): 8}) == []
    (line,) = judge(kernels, {("g", "sm_80"): 8})
    assert line.startswith("f on sm_80 uses 24 bytes")
    (line,) = judge(kernels, {("f", "sm_80"): 16, ("g", "sm_80"): 8})
    assert "24 bytes" in line
    assert "16 are allowed" in line
    (line,) = judge(kernels, {("f", "sm_80"): 24, ("g", "sm_80"): 8, ("g", "sm_90a"): 4})
    assert line.startswith("g on sm_90a is listed with 4 bytes and uses 0")
    (line,) = judge(kernels, {("f", "sm_80"): 24, ("g", "sm_80"): 8, ("h", "sm_80"): 4})
    assert "h on sm_80 is on the list of spills, but not built" in line
