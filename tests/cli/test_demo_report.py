"""The demo, end to end at a size of seconds, and the page it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from html_page import Page

from ultramem_cuda import cli
from ultramem_cuda.cli import check, demo_training, report
from ultramem_cuda.examples.lm.config import KINDS
from ultramem_cuda.examples.lm.data import Corpus, load_corpus
from ultramem_cuda.examples.lm.errors import UsageError
from ultramem_cuda.examples.lm.presets import PRESETS, Preset


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    source = folder / "source"
    source.mkdir()
    for number in range(80):
        (source / f"file{number}.py").write_text(f"# {number} <&>\n" + "value = [1]\n" * 40)
    arguments = ["--data", str(source), "--steps", "3", "--device", "cpu", "--quiet", "--jobs", "1"]
    # The check has its own test; here one operator is enough.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_OPERATORS", {"rms_norm": check._OPERATORS["rms_norm"]})
        assert cli.main(["demo", *arguments, "--out", str(folder / "out")]) == 0
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    return folder / "out", page


def test_report_is_one_well_formed_page(demo: tuple[Path, str]) -> None:
    _, content = demo
    page = Page(content)
    assert content.startswith("<!DOCTYPE html>")
    assert [tag for tag, _ in page.tags].count("svg") == 3
    # Nothing is loaded from anywhere, nothing is executed.
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href", "onload", "onclick"} & attributes.keys()
    assert [a["type"] for tag, a in page.tags if tag == "script"] == ["application/json"]
    assert "http" not in content
    assert "prefers-color-scheme: dark" in content


def test_report_shows_what_was_measured(demo: tuple[Path, str]) -> None:
    _, content = demo
    page = Page(content)
    data = json.loads(page.all_text("script"))
    kinds = [result["model"]["kind"] for result in data["results"]]
    assert kinds == ["dense", "moe", "pkm", "ultramem_v2"]
    body = page.all_text("td")
    for result in data["results"]:
        assert f"{result['parameters']['active']:,}" in body
        assert f"{result['validation']['loss'][-1]:.4f}" in body
        assert result["model"]["kind"] in page.all_text("svg")
    assert data["corpus"]["sha256"] in page.all_text("code")
    assert {row["operator"] for row in data["comparisons"]} == {"rms_norm"}
    assert "rms_norm" in body
    assert [row["kind"] for row in data["traffic"]] == kinds[1:]
    for row in data["traffic"]:
        assert row["counted_share"][0] == pytest.approx(row["expected_share"][0])
        assert all(0 < share <= 1 for share in row["counted_share"])
    assert "crossover" in page.all_text("svg")
    losses = {
        result["model"]["kind"]: result["validation"]["loss"][-1] for result in data["results"]
    }
    lower = losses["ultramem_v2"] < losses["dense"]
    assert ("not lower than dense" in page.all_text("p")) == (not lower)


def test_runs_leave_logs_and_checkpoints(demo: tuple[Path, str]) -> None:
    out, _ = demo
    for kind in ("dense", "moe", "pkm", "ultramem_v2"):
        assert (out / "runs" / kind / "log.jsonl").exists()
        assert (out / "runs" / kind / "checkpoint.pt").exists()


def small_preset() -> Preset:
    model = dataclasses.replace(PRESETS["tiny"].model, context=16, num_layers=1)
    train = dataclasses.replace(PRESETS["tiny"].train, steps=2, batch=2, val_windows=4)
    return Preset(model, train)


def small_corpus(folder: Path) -> Corpus:
    for number in range(60):
        (folder / f"f{number}.py").write_text(f"# {number}\n" + "x = 1\n" * 20)
    return load_corpus(folder)


def test_kinds_in_processes_are_those_trained_in_turn(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    arguments = (small_preset(), small_corpus(source))
    device = torch.device("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, two = (
            demo_training.train_kinds(
                *arguments, tmp_path / str(jobs), device, quiet=True, jobs=jobs
            )
            for jobs in (1, 2)
        )
    finally:
        torch.set_num_threads(before)
    assert [t.result.model_config.kind for t in two] == list(KINDS)
    for ours, theirs in zip(one, two, strict=True):
        assert ours.result.validation == theirs.result.validation
        assert ours.traffic == theirs.traffic


def test_an_error_in_a_process_is_reported(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(UsageError, match=r"^--out: cannot write to"):
        demo_training.train_kinds(
            small_preset(),
            small_corpus(source),
            tmp_path / "runs",
            torch.device("cpu"),
            quiet=True,
            jobs=2,
        )


def test_an_error_in_a_process_stops_the_others(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    runs = tmp_path / "runs"
    runs.mkdir()
    # Of the kind that starts first and is the last in order.
    (runs / KINDS[-1]).write_text("in the way")
    small = small_preset()
    train = dataclasses.replace(small.train, steps=5000, eval_every=5000, checkpoint_every=5000)
    with pytest.raises(UsageError, match=r"^--out: cannot write to"):
        demo_training.train_kinds(
            Preset(small.model, train),
            small_corpus(source),
            runs,
            torch.device("cpu"),
            quiet=True,
            jobs=2,
        )
    assert list(runs.glob("*/checkpoint.pt")) == []
    assert multiprocessing.active_children() == []


def test_jobs() -> None:
    assert demo_training.resolve_jobs(None, torch.device("cuda")) == 1
    assert demo_training.resolve_jobs(99, torch.device("cpu")) == 4
    assert 1 <= demo_training.resolve_jobs(None, torch.device("cpu")) <= 4
    with pytest.raises(UsageError, match=r"^--jobs: must be positive, got 0"):
        demo_training.resolve_jobs(0, torch.device("cpu"))


@pytest.mark.parametrize("option", ["--jobs", "--steps"])
def test_wrong_arguments_are_refused_before_the_check(
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(check, "compare", lambda on, seed=0: pytest.fail("the check ran"))
    out = tmp_path / "out"
    assert cli.main(["demo", option, "0", "--device", "cpu", "--out", str(out)]) == 2
    assert f"argument {option}: must be positive, got 0" in capsys.readouterr().err
    assert not out.exists()


def test_demo_fails_with_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(60):
        (tmp_path / f"f{number}.py").write_text(f"# {number}\n" + "x = 1\n" * 60)
    wrong = check.Comparison("cpu", "value_ffn", "fp32", "out", math.nan, 1e-6)
    monkeypatch.setattr(check, "compare", lambda on, seed=0: [wrong])
    arguments = ["--data", str(tmp_path), "--steps", "1", "--device", "cpu", "--quiet"]
    arguments += ["--jobs", "1"]
    assert cli.main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert "FAILED" in capsys.readouterr().out
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "FAILED" in page.all_text("td")
    assert json.loads(page.all_text("script"))["comparisons"][0]["error"] is None


def test_unwritable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "out"), "--device", "cpu"]) == 2
    assert "argument --out: cannot create" in capsys.readouterr().err


def test_verdict_says_what_came_out() -> None:
    class Result:
        def __init__(self, kind: str, loss: float) -> None:
            self.model_config = type("Config", (), {"kind": kind})
            self.final_loss = loss
            self.validation = type("Curve", (), {"tokens": [0, 1000]})

    better = report.verdict([Result("dense", 2.0), Result("ultramem_v2", 1.5)])  # type: ignore[list-item]
    assert "1.5000 nats a byte, lower than dense's 2.0000 (difference -0.5000)" in better
    assert better.endswith("at equal active parameters.")
    losses = {"dense": 2.0, "moe": 1.25, "pkm": 1.75, "ultramem_v2": 1.5}
    among_all = report.verdict([Result(*pair) for pair in losses.items()])  # type: ignore[misc]
    assert among_all.endswith("For comparison: moe 1.2500, pkm 1.7500.")
    worse = report.verdict([Result("dense", 2.0), Result("ultramem_v2", 2.5)])  # type: ignore[list-item]
    assert "not lower than dense's 2.0000 (difference +0.5000)" in worse
