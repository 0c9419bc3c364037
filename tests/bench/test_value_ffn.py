"""The value FFN's bench: targets, floors, records, and that every section runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ultramem_cuda.bench import (
    command,
    report,
    retrieval_cases,
    value_ffn,
    value_ffn_large,
    value_ffn_layer,
)
from ultramem_cuda.bench import value_ffn_cases as cases
from ultramem_cuda.bench.shapes import SHAPES, SMOKE, draw_slots
from ultramem_cuda.profiling import timing

CPU = torch.device("cpu")
SETTINGS = retrieval_cases.Settings(CPU, 2, 1, compile=False, smoke=True)
SECTIONS = value_ffn.BENCH.sections
pytestmark = pytest.mark.usefixtures("quick_collections")


def of(us: float) -> timing.Timing:
    return timing.Timing(median_ms=us / 1e3, q1_ms=us / 1e3, q3_ms=us / 1e3, repeats=2)


@pytest.fixture(autouse=True)
def _caches_stay_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at how long anything takes."""
    monkeypatch.setitem(timing._FLUSH_BYTES, "cpu", 1)
    monkeypatch.setattr(retrieval_cases, "FLUSHES", 1)


@pytest.fixture
def _graphs_are_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of calls stands for the CUDA graph of them."""

    def capture(calls: Sequence[Callable[[], object]]) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: [call() for call in calls])

    monkeypatch.setattr(retrieval_cases, "capture", capture)


def measured(name: str, wrong: list[str]) -> list[Any]:
    return list(SECTIONS[name].measure(SETTINGS, SMOKE, wrong))


# ---- targets, ratios, floors ---------------------------------------------------------------------


def test_targets_are_the_issues() -> None:
    expected = {
        (cases.FWD, "uniform"): (95, 225, 950),
        (cases.DENSE, "uniform"): (400, 1000, 4200),
        (cases.DENSE, "zipf"): (280, 700, None),
        (cases.DEFERRED, "uniform"): (115, 250, 1080),
    }
    for what in (cases.FWD, cases.DENSE, cases.DEFERRED):
        for slots in cases.SLOTS:
            found = tuple(cases.table_row(SHAPES[s], what, slots, {}).target_us for s in "SBM")
            assert found == expected.get((what, slots), (None, None, None))
    assert value_ffn_layer.FORWARD_BACKWARD_US == {"S": 600, "B": 1450, "M": 3200}
    assert value_ffn_layer.ACTIVATION_MB == {"S": 60, "M": 180}
    assert {n: c.bytes_target for n, c in cases.OPTIMIZERS.items() if c.bytes_target} == {
        "MemoryAdagrad": 2.1,
        "MemoryAdam bf16": 6.1,
    }


def test_slots_are_held_against_uniform_ones_and_the_forward_against_a_gather() -> None:
    timings = {"uniform": of(93), "zipf": of(94), "one": of(279), "gather uniform": of(85)}
    rows = {s: cases.table_row(SHAPES["S"], cases.FWD, s, timings) for s in cases.SLOTS}
    assert rows["uniform"].peers == ("gather",)
    assert rows["uniform"].time_verdict() == "met"
    assert rows["uniform"].ratio_verdict("gather") == "missed"  # 85 / 93 < 0.92
    assert rows["zipf"].ratio_verdict("uniform") == "missed"
    assert rows["one"].ratio_verdict("uniform") == "met"
    # 8192 * 32 rows of 768 bytes.
    assert rows["uniform"].sizes == {"row_bytes": 201_326_592}
    assert rows["uniform"].note == "2.16 TB/s, gather 2.37 TB/s"
    assert rows["zipf"].note.endswith("no gather: no Triton")
    backward = cases.table_row(SHAPES["S"], cases.DENSE, "zipf", timings)
    assert backward.peers == ("uniform",)
    assert backward.note == ""
    smoke = cases.table_row(SMOKE, cases.FWD, "zipf", timings)
    assert (smoke.target_us, smoke.ratio_targets) == (None, {})
    assert cases.table_row(SHAPES["S"], cases.FWD, "zipf", {}).record()["verdict"] is None


def test_floor_of_a_step() -> None:
    shape, rows, entries = SHAPES["S"], 2_250_000, 5_242_880
    for name, states in (
        ("MemorySGD", 0),
        ("MemoryAdam bf16", 4),
        ("MemoryAdam fp32", 8),
    ):
        expected = rows * 384 * (4 + 2 * states) + entries * (384 * 2 + 16 + 48)
        assert cases.step_floor_bytes(shape, rows, entries, cases.OPTIMIZERS[name]) == expected
    sgd, adagrad = (
        cases.step_floor_bytes(shape, rows, entries, cases.OPTIMIZERS[name])
        for name in ("MemorySGD", "MemoryAdagrad")
    )
    assert adagrad - sgd == rows * 2 * 4 * 2
    clipped = cases.step_floor_bytes(shape, rows, entries, cases.OPTIMIZERS["MemorySGD"], True)
    assert clipped - sgd == entries * 384 * 2


def test_a_step_is_held_against_its_floor() -> None:
    case, counts = cases.OPTIMIZERS["MemorySGD"], {"layers": 20, "rows": 10**6, "entries": 0}
    floor_us = 10**6 * 384 * 4 / 3e12 * 1e6
    timings = {"ours": of(1.4 * floor_us), "dense": of(2.8 * floor_us)}
    row = cases.step_row(SHAPES["S"], "MemorySGD", timings, counts, case, False)
    assert row.target_us == pytest.approx(1.5 * floor_us)
    assert row.time_verdict() == "met"
    assert row.ratio("dense") == pytest.approx(2.0)
    assert row.note == "1.40x the floor 512 us"
    assert row.record()["sizes"] == {**counts, "floor_bytes": 10**6 * 384 * 4}
    counts["entries"] = 10**6
    clipped = cases.step_row(SHAPES["S"], "clipped", timings, counts, case, True)
    step = cases.step_row(SHAPES["S"], "step", timings, counts, case, False)
    assert clipped.target_us == pytest.approx(step.target_us + 1.5 * 10**6 * 384 * 2 / 3e12 * 1e6)
    assert cases.step_row(SMOKE, "step", {}, counts, case, False).target_us is None


def test_amounts_are_held_against_targets() -> None:
    amount = report.Quantity("S", "activations", 61.0, "MB", 60.0)
    assert amount.verdict() == amount.record()["verdict"] == "missed"
    assert dataclasses.replace(amount, amount=60.0).verdict() == "met"
    assert dataclasses.replace(amount, target=None).record()["verdict"] is None
    header, _, line = report.quantities([amount]).splitlines()
    assert header.split()[:4] == ["shape", "what", "amount", "unit"]
    assert line.split() == ["S", "activations", "61", "MB", "<=", "60", "missed"]


# ---- inputs --------------------------------------------------------------------------------------


def test_windows_of_layers_are_spread_over_the_table() -> None:
    shape = dataclasses.replace(SMOKE, num_keys=10, num_slots=400)
    first, second = cases.layer_slots("zipf", shape, SETTINGS.inputs())
    assert (first < 100).all()
    assert ((second >= 200) & (second < 300)).all()


@pytest.mark.gpu
def test_slots_drawn_on_the_gpu() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    counts = {}
    for name in ("uniform", "zipf"):
        slots = draw_slots(name, SHAPES["S"], generator)
        assert slots.is_cuda
        assert slots.shape == (8192, 32)
        counts[name] = slots.unique().numel()
    assert counts["zipf"] < counts["uniform"]


@pytest.mark.gpu
def test_gathers_read_the_rows() -> None:
    pytest.importorskip("triton")
    from ultramem_cuda.bench import triton_gather

    indices = torch.randint(999, (100, 24), device="cuda")
    tables = [torch.randn(999, dim, device="cuda").bfloat16() for dim in (48, 40)]
    runs = triton_gather.gathers(indices, *tables)
    assert list(runs) == [
        "4 rows, 1 warps",
        "8 rows, 1 warps",
        "8 rows, 2 warps",
        "8 rows, 4 warps",
    ]
    for run in runs.values():
        for ours, table in zip(run(), tables, strict=True):
            torch.testing.assert_close(ours, table[indices].float().sum(1))


def test_dense_training_is_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """main_grad and .grad differ in roundings alone."""
    inputs = SETTINGS.inputs()
    table = cases.make_table(SMOKE, SETTINGS, 2)
    problem = cases.make_problem(SMOKE, table, "zipf", inputs)
    problems = [
        dataclasses.replace(problem, indices=indices)
        for indices in cases.layer_slots("zipf", SMOKE, inputs)
    ]
    taken: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        cases.DenseAdamW, "step", lambda _, grads: taken.append([g.clone() for g in grads])
    )
    for make in (cases._train_main_grad, cases._train_grad):
        candidate = make(problems)
        candidate.run()
        candidate.run()  # the first has left nothing behind
    assert len(taken) == 4
    for grads in taken[1:]:
        for ours, theirs in zip(grads, taken[0], strict=True):
            assert theirs.any()
            assert cases.relative_distance(ours, theirs) < 1e-2


def test_dense_adamw_is_torchs_over_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_PART_ELEMENTS", 20)
    torch.manual_seed(0)
    tables = [torch.randn(7, 6), torch.randn(7, 3)]
    grads = [torch.randn_like(t) for t in tables]
    expected = [torch.nn.Parameter(t.clone()) for t in tables]
    for parameter, grad in zip(expected, grads, strict=True):
        parameter.grad = grad
    torch.optim.AdamW(expected, lr=1e-3, fused=True).step()
    optimizer = cases.DenseAdamW(tables)
    assert len(optimizer._parts) == 5
    optimizer.step(grads)
    for ours, theirs in zip(tables, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach())


def test_rows_around_the_borders() -> None:
    shape = value_ffn_large.large_shape()
    assert shape.num_slots * (shape.value_dim + shape.pre_value_dim) == pytest.approx(20e9, abs=2e3)
    assert shape.window == shape.num_slots
    for dim in (shape.value_dim, shape.pre_value_dim):
        assert shape.num_slots * dim > 1 << 32
    rows = value_ffn_large.border_rows(shape, value_ffn_large.BORDERS)
    assert rows[0] == 0
    assert rows[-1] == shape.num_slots - 1
    for dim in (shape.value_dim, shape.pre_value_dim):
        for border in (1 << 31, 1 << 32):
            assert {border // dim - 1, border // dim, border // dim + 1} <= set(rows)
    assert len(rows) == 2 + 3 * 3  # Dv is 2 Dp: most are those of either table


# ---- sections ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_graphs_are_loops")
def test_every_section_measures() -> None:
    wrong: list[str] = []
    found = {name: measured(name, wrong) for name in SECTIONS}
    assert wrong == []
    assert [row.what for row in found["table"]] == [
        f"{what}, {slots}"
        for what in (cases.FWD, cases.DENSE, cases.DEFERRED)
        for slots in cases.SLOTS
    ]
    assert len(found["step"]) == 2 * 2 * len(cases.OPTIMIZERS)
    assert {row.sizes["entries"] for row in found["step"]} == {2 * 16 * 8}
    assert [row.peers for row in found["training"]] == [("main_grad + AdamW", ".grad + AdamW")] * 2
    assert [row.what for row in found["layer"]] == ["fwd+bwd", "fwd", "factors of a layer's tokens"]
    assert [row.what for row in found["large"]][:2] == [cases.FWD, cases.DEFERRED]
    for section in found.values():
        assert command.describe(section)
        for item in section:
            record = json.loads(json.dumps(item.record()))
            assert record["verdict"] is None
            if isinstance(item, report.Row):
                assert record["out_of_memory"] == []
                assert all(t.median_ms > 0 for t in item.timings.values())


def test_bytes_a_parameter() -> None:
    amounts = {q.what: q.amount for q in measured("state", [])}
    steps = 2 * 4 / (500 * 40)
    assert amounts["MemorySGD, weights and states"] == pytest.approx(2 + steps)
    assert amounts["MemoryAdagrad, weights and states"] == pytest.approx(2 + 4 * 2 / 40 + steps)
    assert amounts["MemoryAdam bf16, weights and states"] == pytest.approx(6 + steps)
    assert amounts["MemoryAdam fp32, weights and states"] == pytest.approx(10 + steps)


def test_activation_memory_leaves_out_what_is_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """y and the parameters' gradients once they are whole; the largest peak counts."""
    x, weight = torch.randn(1000, 50, requires_grad=True), torch.randn(50, 50, requires_grad=True)
    # After the forward, with the weight's gradient and at the end; the first step warms up.
    allocated, peaks = 5_000_000, iter([0, 0, 0, 6_200_000, 6_300_000, 6_600_000])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    table = cases.make_table(SMOKE, SETTINGS)
    layer: Any = lambda tokens, _: tokens @ weight  # noqa: E731
    shape = SHAPES["S"]
    peak, bound = value_ffn_layer._activation_memory(
        shape, layer, table, (x, weight), torch.ones(1000, 50)
    )
    y_bytes, gradient_bytes = 200_000, 10_000
    assert peak.amount * 1e6 == pytest.approx(1_600_000 - y_bytes - gradient_bytes)
    assert peak.note == "forward 1.0, backward 1.4"
    assert (peak.target, peak.verdict()) == (60.0, "met")
    assert bound.amount * 1e6 == pytest.approx(1_600_000 - y_bytes)
    assert bound.target is None


def test_a_wrong_forward_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.eager.value_ffn
    monkeypatch.setattr(cases.eager, "value_ffn", lambda *a: right(*a) * 1.1)
    wrong: list[str] = []
    measured("table", wrong)
    assert len(wrong) == len(cases.SLOTS)
    assert all("ours and eager differ" in message for message in wrong)


def test_rows_read_or_stepped_wrong_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.Problem.forward

    def forward(self: cases.Problem) -> tuple[torch.Tensor, torch.Tensor]:
        moved = self.indices.clone()
        moved[moved == 499] = 498
        return right(dataclasses.replace(self, indices=moved))

    monkeypatch.setattr(cases.Problem, "forward", forward)
    wrong: list[str] = []
    measured("large", wrong)
    assert any("pre-activations" in message for message in wrong)

    monkeypatch.undo()
    monkeypatch.setattr(value_ffn_large.MemoryAdagrad, "step", lambda self: None)
    wrong.clear()
    measured("large", wrong)
    assert any("not as in float64" in message for message in wrong)


# ---- the command ---------------------------------------------------------------------------------


def test_sections_and_shapes_that_are_asked_for() -> None:
    arguments = command.parse_bench(value_ffn.BENCH, [])
    assert arguments.sections == list(SECTIONS)

    def names(section: str) -> list[str]:
        shapes = SECTIONS[section].shapes_of(arguments.shape, arguments.smoke)
        return [shape.name for shape in shapes]

    assert names("table") == names("layer") == list("SBM")
    assert names("step") == names("training") == names("state") == list("SM")
    assert names("large") == ["20e9"]
    arguments = command.parse_bench(
        value_ffn.BENCH, ["--section", "large", "table", "--shape", "M"]
    )
    assert arguments.sections == ["table", "large"]
    assert names("step") == ["M"]
    arguments = command.parse_bench(value_ffn.BENCH, ["--smoke"])
    assert all(names(section) == ["smoke"] for section in SECTIONS)
    for wrong in (["--section", "all"], ["--repeats", "1"], ["--shape", "L"]):
        with pytest.raises(SystemExit):
            command.parse_bench(value_ffn.BENCH, wrong)


def test_a_section_that_breaks_takes_no_other_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: Any) -> Iterator[report.Row]:
        yield report.Row("smoke", "first", {"ours": of(1.0)})
        raise ValueError("no such thing")

    def is_too_large(*_: Any) -> Iterator[report.Row]:
        raise torch.OutOfMemoryError
        yield

    def works(*_: Any) -> Iterator[report.Quantity]:
        yield report.Quantity("smoke", "bytes", 2.0, "B")

    measures = {"step": breaks, "large": is_too_large, "state": works}
    sections = {
        name: dataclasses.replace(SECTIONS[name], measure=measure)
        for name, measure in measures.items()
    }
    bench = dataclasses.replace(value_ffn.BENCH, sections=sections)
    path = tmp_path / "record.json"
    arguments = command.parse_bench(bench, ["--smoke", "--json", str(path)])
    assert command.run_bench(bench, arguments, {"gpu": "none"}) == ["step, smoke: no such thing"]
    output = capsys.readouterr()
    assert "ValueError: no such thing" in output.err
    assert "large, smoke: out of memory" in output.err
    assert "value_ffn state smoke bytes 2 B" in output.err, "rows are printed as they come"
    assert "nothing was measured" in output.out
    record = json.loads(path.read_text())
    assert record["wrong"] == ["step, smoke: no such thing"]
    assert record["out_of_memory"] == ["large, smoke"]
    assert [len(record["sections"][name]) for name in ("step", "large", "state")] == [1, 0, 1]
    assert [shape["name"] for shape in record["shapes"]] == ["S", "M", "20e9"]
    records = value_ffn.BENCH.shape_records()
    assert [shape["name"] for shape in records] == ["S", "B", "M", "20e9"]
    assert "3.0 TB/s" in record["step_floor"]


def test_without_a_gpu_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert value_ffn.main(["--smoke"]) == 1
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.gpu
def test_smoke_run_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    assert value_ffn.main(["--smoke", "--json", str(path)]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["out_of_memory"] == []
    assert all(record["sections"][name] for name in SECTIONS)
