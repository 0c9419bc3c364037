"""The peers compute what the operators compute, and the bench runs and records it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ultramem_cuda import ops
from ultramem_cuda.bench import eager
from ultramem_cuda.bench import ops as bench_ops
from ultramem_cuda.bench.shapes import SHAPES, SMOKE, draw_slots
from ultramem_cuda.profiling import timing

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, requires_grad=True)


def _same_output_and_gradients(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: tuple[Tensor, ...]
) -> None:
    ours_out, theirs_out = ours(), theirs()
    torch.testing.assert_close(theirs_out, ours_out, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(ours_out)
    ours_grads = torch.autograd.grad(ours_out, leaves, weight)
    theirs_grads = torch.autograd.grad(theirs_out, leaves, weight)
    for ours_grad, theirs_grad in zip(ours_grads, theirs_grads, strict=True):
        assert theirs_grad.abs().max() > 0
        torch.testing.assert_close(theirs_grad, ours_grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("queries", [1, 3])
def test_tucker_query_is_the_operator(queries: int) -> None:
    heads, key_dim = 2, 12
    leaves = (_normal(7, 20), _normal(2 * heads * queries * key_dim, 20), _normal(key_dim))
    _same_output_and_gradients(
        lambda: ops.tucker_query(*leaves, num_heads=heads),
        lambda: eager.tucker_query(*leaves, num_heads=heads),
        leaves,
    )


def test_tucker_filter_is_the_operator() -> None:
    core = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    u, t, _ = ops.tucker_filter(core)
    torch.testing.assert_close(eager.tucker_filter(core), (u, t), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize(("heads", "cores", "topk", "axis_topk"), [(1, 2, 8, None), (2, 3, 10, 5)])
def test_product_key_topk_is_the_operator(
    queries: int, heads: int, cores: int, topk: int, axis_topk: int | None
) -> None:
    query, keys = _normal(9, 2, heads, queries, 16), _normal(heads, 2, 2, 37, 16)
    core, gain = _normal(cores, heads, 2, 2), _normal(16)
    options: dict[str, Any] = {"topk": topk, "axis_topk": axis_topk, "key_norm_weight": gain}
    _, ours_indices = ops.product_key_topk(query, keys, core, **options)
    _, theirs_indices = eager.product_key_topk(query, keys, core, **options)
    assert torch.equal(ours_indices, theirs_indices)
    _same_output_and_gradients(
        lambda: ops.product_key_topk(query, keys, core, **options)[0],
        lambda: eager.product_key_topk(query, keys, core, **options)[0],
        (query, keys, core, gain),
    )


@pytest.mark.parametrize("peer", [eager.value_ffn, eager.value_ffn_bag])
@pytest.mark.parametrize("activation", ["identity", "gelu", "relu", "silu"])
def test_value_ffn_is_the_operator(peer: Callable[..., Tensor], activation: str) -> None:
    indices = torch.randint(50, (6, 9))  # 54 draws of 50 rows: some slot comes twice
    leaves = (_normal(6, 9, 2), _normal(50, 12), _normal(50, 10), _normal(6, 10))
    _same_output_and_gradients(
        lambda: ops.value_ffn(indices, *leaves, activation=activation),
        lambda: peer(indices, *leaves, activation=activation),
        leaves,
    )


@pytest.mark.parametrize("peer", [eager.value_ffn, eager.value_ffn_bag])
def test_value_ffn_without_pre_values_is_the_operator(peer: Callable[..., Tensor]) -> None:
    indices = torch.randint(50, (6, 9))
    leaves = (_normal(6, 9, 3), _normal(50, 12))
    _same_output_and_gradients(
        lambda: ops.value_ffn(indices, *leaves), lambda: peer(indices, *leaves), leaves
    )


def test_main_grad_pass_accumulates_the_same_on_both_sides() -> None:
    inputs = bench_ops.Inputs(CPU, torch.float64, 0)
    (problem,) = bench_ops.problems("value_ffn", SMOKE, inputs, ["zipf"])
    accumulated = {}
    for name, function in problem.functions.items():
        bench_ops._set_main_grads(problem, torch.float64, True)
        candidate = bench_ops._candidate(problem, function, bench_ops.INTO_MAIN_GRAD)
        candidate.run()
        made_dense_grads = problem.tables[0].grad is not None
        assert made_dense_grads == (name != "ours")
        candidate.reset()
        assert all(leaf.grad is None for leaf in problem.leaves)
        accumulated[name] = [table.main_grad for table in problem.tables]
    assert accumulated["ours"][0].abs().max() > 0
    for name in ("eager", "bag"):
        torch.testing.assert_close(accumulated[name], accumulated["ours"])


def test_slots_follow_their_distribution() -> None:
    shape = SHAPES["cpu"]
    counts = {}
    for distribution in ("uniform", "zipf"):
        slots = draw_slots(distribution, shape, torch.Generator().manual_seed(1))
        assert slots.shape == (shape.num_tokens, shape.selected)
        assert int(slots.min()) >= 0
        assert int(slots.max()) < shape.window
        counts[distribution] = torch.bincount(slots.flatten()).sort(descending=True).values
    draws = shape.num_tokens * shape.selected
    # P(hottest) = 1 / H(200000) = 0.0782 under Zipf(1), and half of that for the next.
    assert counts["zipf"][0] / draws == pytest.approx(0.0782, rel=0.1)
    assert counts["zipf"][1] / draws == pytest.approx(0.0391, rel=0.15)
    assert counts["uniform"][0] <= 5
    with pytest.raises(ValueError, match="distribution"):
        draw_slots("normal", shape, torch.Generator())


def test_measure_takes_turns_and_resets_after_every_run() -> None:
    log: list[str] = []
    candidates = {
        name: timing.Candidate(lambda n=name: log.append(n), lambda: log.append("reset"))
        for name in ("a", "b", "c")
    }
    result = timing.measure(candidates, CPU, warmup=1, repeats=3, cold=True)
    runs = [entry for entry in log if entry != "reset"]
    assert runs == [*"abc", *"abc", *"bca", *"cab"]
    assert log == [entry for name in runs for entry in (name, "reset")]
    for t in result.values():
        assert t.repeats == 3
        assert 0 <= t.q1_ms <= t.median_ms <= t.q3_ms
    with pytest.raises(ValueError, match="repeats"):
        timing.measure(candidates, CPU, warmup=1, repeats=1, cold=False)


def test_a_peer_out_of_memory_is_left_out() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError

    candidates = {"ours": timing.Candidate(lambda: None), "eager": timing.Candidate(too_large)}
    timings = timing.measure(candidates, CPU, warmup=1, repeats=2, cold=False)
    assert list(timings) == ["ours"]
    row = bench_ops.Row("S", "value_ffn", bench_ops.FWD, "zipf", timings, 3.0)
    assert row.ratio("eager") is None
    assert row.verdict() == ""
    assert "out of memory" in bench_ops.table([row])


@pytest.mark.parametrize(("eager_ms", "verdict"), [(3.0, "met"), (2.9, "missed")])
def test_the_table_says_met_or_missed(eager_ms: float, verdict: str) -> None:
    timings = {
        name: timing.Timing(median_ms=ms, q1_ms=ms, q3_ms=ms, repeats=2)
        for name, ms in (("ours", 1.0), ("eager", eager_ms))
    }
    row = bench_ops.Row("cpu", "value_ffn", bench_ops.FWD, "zipf", timings, 3.0)
    assert row.record()["verdict"] == verdict
    assert row.record()["ratio"] == {"eager": eager_ms}
    line = bench_ops.table([row]).splitlines()[-1]
    assert line.split()[-4:] == [f"{eager_ms:.2f}x", ">=", "3x", verdict]


def test_targets_belong_to_the_cpu_shape_alone() -> None:
    cuda = torch.device("cuda")
    assert bench_ops.targets_for(SHAPES["cpu"], CPU, torch.float32) == {
        ("product_key_topk", "fwd+bwd"): 2.0,
        ("value_ffn", "fwd"): 3.0,
        ("value_ffn", "fwd+bwd, main_grad"): 5.0,
        ("value_ffn", "fwd+bwd, new .grad"): 1.0,
    }
    assert bench_ops.targets_for(SHAPES["cpu"], CPU, torch.bfloat16) == {}
    assert bench_ops.targets_for(SHAPES["cpu"], cuda, torch.float32) == {}
    fewer_tokens = bench_ops.parse(["--tokens", "64"]).shapes[0]
    assert fewer_tokens.num_tokens == 64
    assert bench_ops.targets_for(fewer_tokens, CPU, torch.float32) == {}


def test_a_disagreement_is_noticed() -> None:
    inputs = bench_ops.Inputs(CPU, torch.float32, 0)
    (problem,) = bench_ops.problems("tucker_query", SMOKE, inputs, [])
    assert bench_ops.disagreement(problem) < 1e-6
    right = problem.functions["eager"]
    problem.functions["eager"] = lambda: right() * 1.01
    assert bench_ops.disagreement(problem) == pytest.approx(0.01, rel=0.05)


def test_smoke_run_writes_a_valid_record(tmp_path: Path) -> None:
    path = tmp_path / "results" / "smoke.json"
    command = [sys.executable, "-m", "bench.ops", "--device", "cpu", "--smoke", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ours ms" in done.stdout

    record = json.loads(path.read_text())
    assert record["machine"]["device"] == "cpu"
    assert record["machine"]["threads"] >= 1
    assert record["wrong"] == []
    passes = {(row["operator"], row["pass"], row["slots"]) for row in record["rows"]}
    assert passes == {
        *((op, p, None) for op in ("tucker_query", "product_key_topk") for p in ("fwd", "fwd+bwd")),
        *(
            ("value_ffn", p, slots)
            for p in ("fwd", "fwd+bwd, main_grad", "fwd+bwd, new .grad")
            for slots in ("uniform", "zipf")
        ),
    }
    for row in record["rows"]:
        ours, theirs = row["timings"]["ours"], row["timings"]["eager"]
        assert ours["repeats"] == theirs["repeats"] == 2
        assert row["ratio"]["eager"] == pytest.approx(theirs["median_ms"] / ours["median_ms"])


def test_cuda_without_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_ops.main(["--device", "cuda"]) == 1
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_smoke_run_on_the_gpu(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_ops.main(["--device", "cuda", "--smoke", "--dtype", dtype]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
