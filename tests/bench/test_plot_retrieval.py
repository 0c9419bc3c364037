"""The figures of the retrieval bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="matplotlib (requirements.txt) draws the figures")

from ultramem_cuda.bench import plot_retrieval, report
from ultramem_cuda.bench.record import item_entries
from ultramem_cuda.bench.retrieval_cases import SWEEPS
from ultramem_cuda.profiling import timing


def of(ms: float) -> timing.Timing:
    return timing.Timing(median_ms=ms, q1_ms=ms, q3_ms=ms, repeats=2)


def sweep_record() -> dict[str, Any]:
    rows = [
        report.Row("S", f"{size} {value}, {what}", {"ours": of(value / 1e3)}, sizes={size: value})
        for size in SWEEPS
        for value in (128, 64)
        for what in ("fwd", "bwd")
    ]
    rows.append(report.Row("S", "num_tokens 256, fwd", {}, sizes={"num_tokens": 256}))
    return {
        "machine": {"gpu": "a GPU"},
        "dtype": "bfloat16",
        "shapes": [],
        "sections": {"sweep": [row.record() for row in rows]},
        "wrong": [],
    }


def test_points_are_sorted_and_leave_out_what_did_not_fit() -> None:
    items = sweep_record()["sections"]["sweep"]
    entries = [entry for item in items for entry in item_entries("retrieval", "sweep", item)]
    assert plot_retrieval.points(entries, "num_tokens", "fwd") == [(64, 64.0), (128, 128.0)]
    assert plot_retrieval.points(entries, "key_dim", "bwd") == [(64, 64.0), (128, 128.0)]


def test_figures_are_drawn_and_the_same_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps(sweep_record()))
    for folder in ("a", "b"):
        assert plot_retrieval.main([str(record), "--out", str(tmp_path / folder)]) == 0
    names = ["retrieval-kd.svg", "retrieval-m.svg", "retrieval-n.svg", "retrieval-t.svg"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        drawn = (tmp_path / "a" / name).read_text()
        assert drawn == (tmp_path / "b" / name).read_text()
        text = "".join(ElementTree.fromstring(drawn).itertext())
        assert "microseconds" in text
        assert "a GPU" in text
        assert "backward" in text
    record.write_text(json.dumps(sweep_record() | {"sections": {}}))
    assert plot_retrieval.main([str(record)]) == 1
    assert "no section sweep" in capsys.readouterr().err
    record.write_text("{}")
    assert plot_retrieval.main([str(record)]) == 1
    assert "no record of a bench" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps(sweep_record()))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_retrieval.main([str(record), "--out", str(tmp_path / "out")]) == 1
    assert 'pip install "ultramem_cuda[figures]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
