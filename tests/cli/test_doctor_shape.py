"""``ultramem doctor --shape``: which kernels retrieval runs, why, and with how much memory."""

from __future__ import annotations

import pytest
import torch

from ultramem_cuda import _library, cli
from ultramem_cuda.bench.shapes import SHAPES
from ultramem_cuda.cli import retrieval_shape

BASE = "n=1138,Kd=192,M=32"


def _has_sm90a() -> bool:
    """Whether the library has the kernels of sm_90, or is one of those that would not tell."""
    if not _library.is_loaded():
        return True
    shape = _library.RetrievalShape(
        **{"num_tokens": 8192, "num_keys": 64, "key_dim": 8, "num_heads": 1, "num_queries": 1},
        **{"tucker_rank": 1, "num_cores": 1, "axis_topk": 8, "topk": 8, "additive": 0, "dtype": 1},
    )
    return _library.retrieval_path(shape, 90)[0] == "tensor cores (sm_90)"


HAS_SM90A = _has_sm90a()
needs_sm90a = pytest.mark.skipif(not HAS_SM90A, reason="built without code for sm_90a")


def doctor(shape: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["doctor", "--shape", shape]) == 0
    return capsys.readouterr().out


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["S", "B", "M", "L"])
def test_standard_shapes_are_the_benches(name: str) -> None:
    sizes, shape = retrieval_shape.parse(name), SHAPES[name]
    for field in ("num_tokens", "num_keys", "key_dim", "axis_topk", "topk"):
        assert getattr(sizes, field) == getattr(shape, field)
    for field in ("tucker_rank", "num_cores", "num_heads"):
        assert getattr(sizes, field) == getattr(shape, field)
    assert sizes.num_queries == shape.tucker_rank


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize("name", ["S", "B", "M", "L"])
def test_standard_shapes_run_on_tensor_cores(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = doctor(name, capsys).splitlines()
    (hopper,) = [line for line in lines if "forward on sm_90" in line]
    (ampere,) = [line for line in lines if "forward on sm_80" in line]
    assert f"tensor cores ({'sm_90' if HAS_SM90A else 'sm_80'}): " in hopper
    assert "tensor cores (sm_80): " in ampere


@needs_sm90a
@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize(
    ("sizes", "few"),
    [
        ("T=1", True),
        ("T=64", True),
        ("T=64,H=16", True),
        ("T=1,H=1024", True),
        ("T=1024", True),
        ("T=512,H=2", True),
        ("T=1025", False),
        ("T=513,H=2", False),
        # 32 MiB of scores
        ("T=128,n=8192,R=4", True),
        ("T=129,n=8192,R=4", False),
    ],
)
def test_few_tokens_have_a_kernel_of_their_own(
    sizes: str, few: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = doctor(f"{BASE},{sizes}", capsys)
    assert ("tensor cores, few tokens: few tokens; " in printed) == few
    assert ("tensor cores (sm_90): " in printed) != few


LARGEST = "n=8192,Kd=1024,m=128,M=1024,R=4,C=4,H=3,Q=1"
GENERIC = "generic"
SM_80 = "tensor cores (sm_80)"
SM_90 = "tensor cores (sm_90)"
FEW = "tensor cores, few tokens"


@pytest.mark.parametrize(
    ("shape", "capability", "path", "reason"),
    [
        pytest.param(BASE, 90, SM_90, "allow it", marks=needs_sm90a),
        pytest.param(LARGEST, 90, SM_90, "allow it", marks=needs_sm90a),
        pytest.param(f"{BASE},dtype=fp16", 90, SM_90, "allow it", marks=needs_sm90a),
        pytest.param(f"{BASE},mode=additive", 90, SM_90, "allow it", marks=needs_sm90a),
        pytest.param("n=1,Kd=8,M=1", 90, SM_90, "allow it", marks=needs_sm90a),
        pytest.param(f"{LARGEST},T=64", 90, SM_90, "allow it", marks=needs_sm90a),
        (f"{LARGEST},T=40", 90, FEW, "few tokens"),
        (f"{BASE},T=1", 90, FEW, "few tokens"),
        pytest.param("n=8193,Kd=192,M=32", 90, SM_80, "n is above 8192", marks=needs_sm90a),
        (f"{LARGEST},n=65536", 90, SM_80, "sm_90"),
        (BASE, 80, SM_80, "sm_90"),
        (BASE, 89, SM_80, "sm_90"),
        (BASE, 100, SM_80, "sm_90"),
        (f"{LARGEST},n=65536", 120, SM_80, "sm_90"),
        (f"{BASE},mode=additive,T=64", 80, FEW, "few tokens"),
        (f"{BASE},T=8,H=8", 120, FEW, "few tokens"),
        (f"{BASE},T=1", 80, FEW, "few tokens"),
        (f"{BASE},T=1", 75, GENERIC, "compute capability 8.0"),
        ("n=8193,Kd=192,M=32,T=64", 80, SM_80, "sm_90"),
        ("n=8193,Kd=192,M=32,T=63", 90, GENERIC, "fewer than 64 tokens times heads"),
        (BASE, 75, GENERIC, "compute capability 8.0"),
        (f"{BASE},dtype=fp32", 90, GENERIC, "float32"),
        ("n=65537,Kd=192,M=32", 90, GENERIC, "n is above 65536"),
        ("n=1138,Kd=1032,M=32", 90, GENERIC, "Kd is above 1024"),
        ("n=1138,Kd=196,M=32", 80, GENERIC, "not a multiple of 8"),
    ],
)
def test_the_path_and_its_reason(
    shape: str,
    capability: int,
    path: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: divmod(capability, 10))
    monkeypatch.setattr(_library, "retrieval_workspace", lambda shape: (1_000_000, 2_500_000))
    facts = dict(retrieval_shape.facts(retrieval_shape.parse(shape)))
    answer = facts[f"forward on sm_{capability}"]
    assert answer.startswith(f"{path}: ")
    assert reason in answer
    assert facts["workspace"] == "forward 1.0 MB, backward 2.5 MB"


@pytest.mark.usefixtures("_no_gpu")
def test_memory_of_what_is_saved(capsys: pytest.CaptureFixture[str]) -> None:
    # Key ids 4 bytes and R = 2 scores of 4 bytes for 2 * 32 keys, positions of 2 bytes for 32.
    printed = doctor("S", capsys)
    assert "832 bytes a token, 6.8 MB" in printed
    assert "depends on the GPU" in printed
    assert "M up to min(m*m, 1024)" in printed


@pytest.mark.gpu
def test_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    major, minor = torch.cuda.get_device_capability()
    printed = doctor("S", capsys)
    assert f"forward on sm_{major}{minor}" in printed
    assert "workspace" in printed
    assert "backward 0.0 MB" not in printed


def test_defaults() -> None:
    sizes = retrieval_shape.parse("n=100,Kd=24,M=300")
    assert (sizes.axis_topk, sizes.tucker_rank, sizes.num_cores, sizes.num_queries) == (
        100,
        2,
        2,
        2,
    )
    assert (sizes.num_tokens, sizes.dtype, sizes.mode) == (8192, torch.bfloat16, "tucker")
    sizes = retrieval_shape.parse("n=100, Kd=24, M=32, mode=additive, T=7")
    assert (sizes.axis_topk, sizes.tucker_rank, sizes.num_cores) == (32, 1, 1)
    assert sizes.num_queries == 1
    assert sizes.num_tokens == 7
    assert retrieval_shape.parse("n=100,Kd=24,M=32,R=3").num_queries == 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("X", "must be one of S, B, M, L or NAME=VALUE"),
        ("n=5,Kd=8,M=1,x=2", "names n, Kd, m, M"),
        ("n=5,Kd=8", "M missing"),
        ("n=5,Kd=0,M=1", "Kd must be a positive whole number, got '0'"),
        ("n=5,Kd=8,M=1,dtype=fp8", "dtype must be one of bf16"),
        ("n=5,Kd=8,M=1,mode=both", "mode must be one of tucker, additive"),
        ("n=500,Kd=8,m=129,M=1", "axis_topk must be in 1..min(n, 128)"),
        ("n=500,Kd=8,m=128,M=1025", "topk must be in 1..min(axis_topk^2, 1024)"),
        (f"{BASE},R=5", "must be 1..4"),
        (f"{BASE},R=3,Q=2", "query.shape[3] must be 1 or R = 3"),
        (f"{BASE},mode=additive,R=2", "additive mode has R = 1"),
    ],
)
def test_shapes_that_are_refused(
    shape: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--shape", shape]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ultramem doctor: error: argument --shape: ")
    assert message in lines[0]


def test_without_the_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_library, "_load_error", "the native library is missing; build it")
    assert cli.main(["doctor", "--shape", "S"]) == 1
    assert "the native library is missing" in capsys.readouterr().out
