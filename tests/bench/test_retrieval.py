"""The retrieval bench: targets, tables, records, figures, and that every section runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ultramem_cuda.bench import command, report, retrieval
from ultramem_cuda.bench import retrieval_cases as cases
from ultramem_cuda.bench.shapes import SHAPES, SMOKE
from ultramem_cuda.profiling import timing
from ultramem_cuda.python_ref import product_key_topk

CPU = torch.device("cpu")
SETTINGS = cases.Settings(CPU, 2, 1, compile=False, smoke=True)
SECTIONS = retrieval.BENCH.sections


def of(ms: float) -> timing.Timing:
    return timing.Timing(median_ms=ms, q1_ms=ms, q3_ms=ms, repeats=2)


@pytest.fixture(autouse=True)
def _caches_stay_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at how long anything takes."""
    monkeypatch.setitem(timing._FLUSH_BYTES, "cpu", 1)


@pytest.fixture
def _graphs_are_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of calls stands for the CUDA graph of them."""

    def capture(calls: Sequence[Callable[[], object]]) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: [call() for call in calls])

    monkeypatch.setattr(cases, "capture", capture)
    monkeypatch.setattr(cases, "FLUSHES", 1)


# ---- targets and tables --------------------------------------------------------------------------


def test_targets_are_the_issues() -> None:
    compiled = {"S": 10.0, "B": 7.0, "M": 7.0}
    forward, backward = {"S": 70, "B": 120, "M": 200}, {"S": 120, "B": 260, "M": 260}
    for name in "SBM":
        shape, ratio = SHAPES[name], {"compiled": compiled[name]}
        assert cases._table_targets(shape, cases.FWD) == (forward[name], ratio)
        assert cases._table_targets(shape, cases.BWD) == (backward[name], {})
        assert cases._table_targets(shape, cases.FWD_BWD) == (None, ratio)
    for shape in (SHAPES["L"], SMOKE, dataclasses.replace(SHAPES["S"], num_tokens=64)):
        for what in (cases.FWD, cases.BWD, cases.FWD_BWD):
            assert cases._table_targets(shape, what) == (None, {})


def test_a_row_judges_its_time_and_its_ratios() -> None:
    timings = {"ours": of(0.07), "compiled": of(0.7), "eager": of(0.8)}
    row = report.Row("S", "fwd", timings, ("compiled", "eager"), 70.0, {"compiled": 10.0})
    assert row.time_verdict() == "met"
    assert row.ratio("eager") == pytest.approx(8 / 0.7)
    assert row.ratio_verdict("eager") == ""
    late = dataclasses.replace(row, timings=timings | {"ours": of(0.0701)})
    assert late.time_verdict() == "missed"
    assert late.ratio_verdict("compiled") == "missed"
    record = late.record()
    assert record["verdict"] == record["ratios"]["compiled"]["verdict"] == "missed"
    assert record["ratios"]["compiled"]["target"] == 10.0
    assert record["out_of_memory"] == []


def test_what_does_not_fit_is_reported() -> None:
    row = report.Row("L", "fwd", {"ours": of(0.5)}, ("compiled",), None, {"compiled": 7.0})
    assert row.ratio_verdict("compiled") == ""
    assert row.record()["out_of_memory"] == ["compiled"]
    assert row.record()["timings"]["compiled"] is None
    assert "out of memory" in report.table([row])
    nothing = report.Row("S", "num_tokens 65536, fwd", {}, target_us=70.0)
    assert nothing.time_verdict() == ""
    assert nothing.record()["out_of_memory"] == ["ours"]
    assert "out of memory" in report.table([nothing])


def test_the_table_shows_targets_beside_what_was_measured() -> None:
    rows = [
        report.Row("S", "fwd", {"ours": of(0.08), "p": of(0.8)}, ("p",), 70.0, {"p": 10.0}),
        report.Row("S", "bwd", {"ours": of(0.1)}, (), 120.0, note="graph of 20"),
    ]
    header, line, forward, backward = report.table(rows).splitlines()
    assert header.split() == ["shape", "what", "ours", "us", "target", "p", "us", "ratio", "target"]
    assert set(line) == {"-", " "}
    assert forward.split()[2:7] == ["80", "[80,", "80]", "<=", "70"]
    assert forward.split()[-5:] == ["800]", "10.00x", ">=", "10x", "met"]
    assert "<= 120" in backward
    assert backward.endswith("graph of 20")


def test_one_call_of_many() -> None:
    one = timing.Timing(4.0, 3.0, 6.0, 25).of_one(20)
    assert one == timing.Timing(0.2, 0.15, 0.3, 25)


@pytest.mark.parametrize(
    ("parameters", "calls"), [(101_000_000, 20), (5_050_000, 20), (1_000_000, 101), (999_999, 102)]
)
def test_graphs_rotate_over_more_than_the_l2_cache(parameters: int, calls: int) -> None:
    settings = dataclasses.replace(SETTINGS, smoke=False)
    assert settings.graph_calls(parameters) == calls
    assert calls * parameters > 100_000_000


def test_sections_and_shapes_that_are_asked_for() -> None:
    def names(section: str, arguments: argparse.Namespace) -> list[str]:
        shapes = SECTIONS[section].shapes_of(arguments.shape, arguments.smoke)
        return [shape.name for shape in shapes]

    arguments = command.parse_bench(retrieval.BENCH, [])
    assert arguments.sections == list(SECTIONS)
    assert names("table", arguments) == list("SBML")
    assert names("query", arguments) == names("decode", arguments) == list("SBM")
    assert names("memory", arguments) == names("sweep", arguments) == ["S"]
    arguments = command.parse_bench(
        retrieval.BENCH, ["--section", "sweep", "table", "--shape", "M", "L"]
    )
    assert arguments.sections == ["table", "sweep"]
    assert names("query", arguments) == ["M"]
    assert names("adversarial", arguments) == ["S", "B", "M"]
    arguments = command.parse_bench(retrieval.BENCH, ["--smoke"])
    assert all(names(section, arguments) == ["smoke"] for section in SECTIONS)
    for wrong in (["--section", "all"], ["--repeats", "1"], ["--shape", "cpu"]):
        with pytest.raises(SystemExit):
            command.parse_bench(retrieval.BENCH, wrong)


@pytest.mark.parametrize(
    ("arguments", "compiles"), [([], True), (["--no-compile"], False), (["--smoke"], False)]
)
def test_compiled_peers_can_be_left_out(arguments: list[str], compiles: bool) -> None:
    assert command.parse_bench(retrieval.BENCH, arguments).compile is compiles


def test_memory_has_two_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients do not count; the larger of the two peaks does."""
    shape = dataclasses.replace(SHAPES["S"], num_tokens=4)
    inputs = SETTINGS.inputs()
    retrieval_inputs = cases.make_retrieval(shape, inputs)
    leaves = (retrieval_inputs.query, retrieval_inputs.keys, retrieval_inputs.core)
    outputs = 4 * shape.topk * (shape.num_cores * 4 + 8)
    gradients = sum(leaf.nbytes for leaf in leaves)
    # After the forward and the backward of a step that warms up, and of the one that counts.
    peaks = iter([0, 0, 12_000_000 + outputs, 36_000_000 + outputs + gradients])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setitem(SHAPES, "S", shape)
    (peak,) = cases.memory_use(SETTINGS, shape, [])
    assert peak.amount == pytest.approx(33.0)
    assert peak.note == "forward 9.0, backward 33.0"
    assert (peak.target, peak.verdict()) == (32.0, "missed")


# ---- measuring -----------------------------------------------------------------------------------


def test_the_backward_is_timed_without_its_forward() -> None:
    log: list[str] = []
    x = torch.ones(3, requires_grad=True)

    def function() -> torch.Tensor:
        log.append("forward")
        return (x * x).clone()

    candidate = cases._pass(function, cases.BWD, (x,), torch.ones(3))
    candidate.run()  # the first warm-up run makes its graph itself
    candidate.reset()
    for _ in range(2):
        log.clear()
        candidate.run()
        assert log == []
        candidate.reset()
        assert log == ["forward"]
    assert x.grad is None


def test_a_backward_that_does_not_fit_is_left_out() -> None:
    def too_large() -> torch.Tensor:
        raise torch.OutOfMemoryError

    x = torch.ones(3, requires_grad=True)
    candidates = {
        "ours": cases._pass(lambda: x * x, cases.BWD, (x,), torch.ones(3)),
        "eager": cases._pass(too_large, cases.BWD, (x,), torch.ones(3)),
    }
    assert list(SETTINGS.times(candidates)) == ["ours"]


@pytest.mark.usefixtures("_graphs_are_loops")
def test_every_section_has_its_rows() -> None:
    wrong: list[str] = []
    rows: dict[str, list[Any]] = {
        name: list(section.measure(SETTINGS, SMOKE, wrong))
        for name, section in SECTIONS.items()
        if name != "memory"  # which is torch.cuda's alone
    }
    assert wrong == []
    assert [row.what for row in rows["table"]] == ["fwd", "bwd", "fwd+bwd"]
    assert [row.peers for row in rows["table"]] == [("eager",)] * 3
    assert [row.what for row in rows["query"]] == ["T 1, fwd+bwd", "T 80, fwd+bwd"]
    assert [row.note[:5] for row in rows["query"]] == ["graph", ""]
    assert [row.what for row in rows["decode"]] == ["T 1, fwd", "T 4, fwd"]
    assert len(rows["sweep"]) == 2 * sum(map(len, cases.SMOKE_SWEEPS.values()))
    assert [row.what for row in rows["adversarial"]] == list(cases.ORDERS)
    for section in rows.values():
        assert report.table(section)
        for row in section:
            assert row.record()["out_of_memory"] == []
            assert all(t.median_ms > 0 for t in row.timings.values())
            assert row.time_verdict() == ""


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.eager.product_key_topk
    monkeypatch.setattr(
        cases.eager, "product_key_topk", lambda *a, **k: (right(*a, **k)[0] * 1.1, None)
    )
    wrong: list[str] = []
    list(cases.table_rows(SETTINGS, SMOKE, wrong))
    assert len(wrong) == 1
    assert "shape smoke" in wrong[0]


@pytest.mark.parametrize("order", [order for order in cases.ORDERS if order != "random"])
@pytest.mark.parametrize("num_keys", [37, 1138, 8192])
def test_scores_have_the_order_they_say(order: str, num_keys: int) -> None:
    shape = dataclasses.replace(SMOKE, num_tokens=3, num_keys=num_keys)
    case = cases.make_ordered(order, shape, SETTINGS.inputs())
    tensors = [x.double().numpy() for x in (case.query, case.keys, case.core, case.u, case.t)]
    expected = product_key_topk(*tensors[:3], topk=8, axis_topk=8, u=tensors[3], t=tensors[4])
    scores = torch.from_numpy(expected.all_axis_scores)
    assert torch.equal(scores, scores.float().double()), "not exact in float32"
    ranks = torch.from_numpy(expected.all_axis_ranks)  # [T, H, 2, n]
    steps = scores.diff(dim=-1)
    if order == "all equal":
        assert not steps.any()
    elif order == "ascending":
        assert (steps > 0).all()
        assert (ranks.diff(dim=-1) > 0).all()
    elif order == "descending":
        assert (steps < 0).all()
    else:
        distinct = scores[0, 0, 0, 0].unique().numel()
        assert distinct == (8 if order == "8 values" else num_keys)
        assert (steps > 0).any()
        assert (steps < 0).any()


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="order must be one of"):
        cases.order_values("sorted", 5, torch.Generator())


# ---- the command ---------------------------------------------------------------------------------


def test_without_a_gpu_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert retrieval.main(["--smoke"]) == 1
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.gpu
def test_smoke_run_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    assert retrieval.main(["--smoke", "--json", str(path)]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["bench"] == "retrieval"
    assert list(record["sections"]) == list(SECTIONS)
    assert record["wrong"] == record["out_of_memory"] == []
    (memory,) = record["sections"].pop("memory")
    assert memory["amount"] > 0
    for rows in record["sections"].values():
        assert rows
        for row in rows:
            assert row["out_of_memory"] == []


@pytest.mark.gpu
def test_a_compiled_peer_on_the_gpu() -> None:
    settings = cases.Settings(torch.device("cuda"), 2, 1, compile=True, smoke=True)
    wrong: list[str] = []
    rows = [
        *cases.table_rows(settings, SMOKE, wrong),
        *cases.query_rows(settings, SMOKE, wrong),
    ]
    assert wrong == []
    assert all(row.record()["out_of_memory"] == [] for row in rows)
