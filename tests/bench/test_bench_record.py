"""Entries of every kind of record: keys, reading, tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from ultramem_cuda.bench import ops as bench_ops
from ultramem_cuda.bench import record, report
from ultramem_cuda.bench.record import Entry, Record, RecordError, load
from ultramem_cuda.profiling import timing

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def of(us: float) -> timing.Timing:
    return timing.Timing(us / 1e3, 0.9 * us / 1e3, 1.2 * us / 1e3, repeats=2)


def row_entries() -> list[Entry]:
    row = report.Row(
        "S",
        "fwd",
        {"ours": of(80.0), "compiled": of(800.0)},
        ("compiled", "eager"),
        70.0,
        {"compiled": 10.0, "eager": 9.0},
        {"num_tokens": 8192},
        "a graph",
    )
    return record.item_entries("retrieval", "table", row.record())


def quantity_entry() -> Entry:
    quantity = report.Quantity("M", "activations", 170.0, "MB", 180.0, "forward 1, backward 2")
    (entry,) = record.item_entries("value_ffn", "layer", quantity.record())
    return entry


def whole_record() -> Record:
    return Record(
        {"device": "cuda", "gpu": "a GPU"},
        "bfloat16",
        True,
        [{"name": "S", "num_tokens": 8192}],
        {"quick": True},
        {"step_floor": "bytes"},
        [*row_entries(), quantity_entry()],
        ["value_ffn: large, 20e9"],
        ["retrieval: sweep, S: broke"],
    )


def test_a_row_is_an_entry_for_ours_and_every_peer() -> None:
    ours, compiled, eager = row_entries()
    assert [e.key for e in (ours, compiled, eager)] == [
        f"retrieval/table/S/fwd/{name}" for name in ("ours", "compiled", "eager")
    ]
    assert ours.value == pytest.approx(80.0)
    assert (ours.q1, ours.q3) == (pytest.approx(72.0), pytest.approx(96.0))
    assert (ours.unit, ours.repeats, ours.target, ours.verdict) == ("us", 2, 70.0, "missed")
    assert (ours.sizes, ours.note, ours.ratio) == ({"num_tokens": 8192}, "a graph", None)
    assert compiled.ratio == pytest.approx(10.0)
    assert (compiled.ratio_target, compiled.target) == (10.0, None)
    assert compiled.verdict == "met"
    assert (eager.value, eager.ratio, eager.verdict) == (None, None, None)
    assert eager.ratio_target == 9.0


def test_an_amount_is_an_entry() -> None:
    entry = quantity_entry()
    assert entry.key == "value_ffn/layer/M/activations/ours"
    assert (entry.value, entry.q1, entry.unit) == (170.0, None, "MB")
    assert (entry.target, entry.verdict) == (180.0, "met")


@pytest.mark.parametrize("slots", ["zipf", ""])
def test_a_row_of_ops_is_judged_by_eager(slots: str) -> None:
    timings = {"ours": of(10.0), "eager": of(40.0), "bag": of(20.0)}
    row = bench_ops.Row("cpu", "value_ffn", "fwd", slots, timings, 3.0)
    ours, eager, bag = record.ops_entries(row.record())
    assert ours.key == f"ops/value_ffn/cpu/fwd{', zipf' if slots else ''}/ours"
    assert (ours.target, ours.verdict) == (None, None)
    assert (eager.ratio, eager.ratio_target, eager.verdict) == (pytest.approx(4.0), 3.0, "met")
    assert (bag.ratio, bag.ratio_target, bag.verdict) == (pytest.approx(2.0), None, None)
    del timings["ours"]
    ours, eager, bag = record.ops_entries(row.record())
    assert (ours.peer, ours.value) == ("ours", None)
    assert eager.ratio is None


# ---- reading -------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(whole_record().to_json()))
    assert load(path) == whole_record()


@pytest.mark.parametrize(
    ("name", "bench", "sections"),
    [
        ("ops-cpu-epyc-2-cores", "ops", {"tucker_query", "product_key_topk", "value_ffn"}),
        ("ops-h100-first-kernels", "ops", {"tucker_query", "product_key_topk", "value_ffn"}),
        ("retrieval-h100-table", "retrieval", {"table"}),
        ("retrieval-h100-query", "retrieval", {"query"}),
        ("retrieval-h100-sweeps", "retrieval", {"decode", "memory", "sweep", "adversarial"}),
        (
            "value-ffn-h100",
            "value_ffn",
            {"table", "step", "training", "layer", "state", "large"},
        ),
    ],
)
def test_committed_records_are_read(name: str, bench: str, sections: set[str]) -> None:
    path = RESULTS / f"{name}.json"
    found = load(path)
    assert {entry.bench for entry in found.entries} == {bench}
    assert {entry.section for entry in found.entries} == sections
    text = path.read_text()
    entries = sum(text.count(f'"{field}":') for field in ("median_ms", "amount"))
    assert len(found.entries) == entries > 20
    assert found.machine["device"] == ("cpu" if "cpu" in name else "cuda")


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "{}",
        '{"machine": {}, "dtype": "float32", "shapes": [], "wrong": []}',
        '{"machine": {}, "dtype": "x", "shapes": [], "wrong": [], "cold": true, "rows": [1]}',
        '{"machine": {}, "dtype": "x", "shapes": [], "wrong": [], "sections": {"table": [{}]}}',
    ],
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"file\.json is no (JSON|record of a bench)"):
        load(path)


def test_records_of_training_are_refused() -> None:
    with pytest.raises(RecordError, match="no record of a bench"):
        load(RESULTS / "lm-h100-stdlib.json")


def test_a_key_comes_once(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    twice = dataclasses.replace(whole_record(), entries=row_entries() * 2)
    path.write_text(json.dumps(twice.to_json()))
    with pytest.raises(RecordError, match="has retrieval/table/S/fwd/ours twice"):
        load(path)


# ---- tables --------------------------------------------------------------------------------------


def test_the_table_has_a_line_a_row() -> None:
    # Ours need not come first.
    entries = [*reversed(row_entries()), quantity_entry()]
    header, _, first, second = record.table(entries).splitlines()
    columns = ["bench", "section", "shape", "what", "ours", "unit", "target", "peers", "note"]
    assert header.split() == columns
    assert first.split()[:8] == ["retrieval", "table", "S", "fwd", "80", "[72,", "96]", "us"]
    assert "missed  eager: out of memory, compiled 10.00x (>= 10x met)" in first
    assert "170 " in second
    assert "<= 180  met" in second
    assert second.endswith("forward 1, backward 2")


def test_a_peer_without_ours_shows_its_time() -> None:
    row = report.Row("S", "fwd", {"eager": of(80.0)}, ("eager",))
    entries = record.item_entries("retrieval", "table", row.record())
    text = record.summary(entries)
    assert text == "retrieval table S fwd out of memory us eager 80 [72, 96]"


def test_markdown_has_the_same_cells() -> None:
    entries = [dataclasses.replace(quantity_entry(), what="a | b")]
    header, line, row = record.markdown_table(entries).splitlines()
    assert header.count("|") == line.count("|") == row.replace("\\|", "").count("|")
    assert "| a \\| b | 170 | MB | <= 180 | met |" in row


def test_csv_has_every_entry_and_field() -> None:
    entries = whole_record().entries
    rows = list(csv.DictReader(io.StringIO(record.csv_table(entries))))
    assert [row["key"] for row in rows] == [entry.key for entry in entries]
    assert float(rows[0]["value"]) == entries[0].value
    assert rows[0]["sizes"] == "num_tokens=8192"
    assert rows[2]["value"] == ""
    assert set(rows[0]) == {"key", *(f.name for f in dataclasses.fields(Entry))}
