"""What two records have in common, and what of it is a regression."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ultramem_cuda.bench import compare
from ultramem_cuda.bench.record import Entry, Record, RecordError

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
RECORDS = [
    "ops-cpu-epyc-2-cores",
    "ops-h100-first-kernels",
    "retrieval-h100-query",
    "retrieval-h100-sweeps",
    "retrieval-h100-table",
    "value-ffn-h100",
]
H100 = {"device": "cuda", "gpu": "H100", "torch": "2.11", "cpu": "x"}


def timed(us: float | None, what: str = "fwd", peer: str = "ours", **fields: Any) -> Entry:
    """A time with quartiles one percent away."""
    spread = {} if us is None else {"q1": us * 0.99, "q3": us * 1.01, "repeats": 20}
    entry = Entry("retrieval", "table", "S", what, peer, "us", us, **spread)
    return dataclasses.replace(entry, **fields)


def amount(value: float, what: str = "peak", **fields: Any) -> Entry:
    return Entry("value_ffn", "layer", "S", what, "ours", "MB", value, **fields)


def record(*entries: Entry, **fields: Any) -> Record:
    shapes = [{"name": "S", "num_tokens": 8192}]
    return dataclasses.replace(
        Record(H100, "bfloat16", True, shapes, entries=list(entries)), **fields
    )


def verdict(old: Entry, new: Entry, threshold: float = 1.05) -> str:
    (change,) = compare.compare(record(old), record(new), threshold).changes
    return change.verdict


# ---- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (timed(106.0), "regression"),
        (timed(104.9), ""),
        (timed(100.0), ""),
        (timed(96.0), ""),
        (timed(94.0), "improvement"),
        # Slower by the median, but noise may be the cause: the spreads overlap.
        (timed(110.0, q1=101.0), ""),
        (timed(110.0, q1=101.1), "regression"),
        (timed(90.0, q3=99.0), ""),
        (timed(90.0, q3=98.9), "improvement"),
        (timed(None), "regression"),
    ],
)
def test_a_time_against_100(new: Entry, expected: str) -> None:
    assert verdict(timed(100.0), new) == expected


def test_the_threshold() -> None:
    assert verdict(timed(100.0), timed(110.0), threshold=1.2) == ""
    assert verdict(timed(100.0), timed(121.0), threshold=1.2) == "regression"
    # A ratio of exactly the threshold is not above it.
    assert verdict(amount(100.0), amount(150.0), threshold=1.5) == ""


def test_what_fits_now_is_an_improvement() -> None:
    assert verdict(timed(None), timed(100.0)) == "improvement"
    assert verdict(timed(None), timed(None)) == ""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (100.0, 106.0, "regression"),
        (100.0, 105.0, ""),
        (100.0, 90.0, "improvement"),
        (0.0, 1.0, "regression"),
        (0.0, 0.0, ""),
        (-1.0, 0.0, ""),
    ],
)
def test_amounts_have_no_quartiles(old: float, new: float, expected: str) -> None:
    (change,) = compare.compare(record(amount(old)), record(amount(new))).changes
    assert change.verdict == expected
    assert change.overlap is None
    assert change.ratio == (pytest.approx(new / old) if old > 0 else None)


def test_rows_of_one_record_alone_are_named() -> None:
    old = record(timed(1.0), timed(1.0, "a"), timed(1.0, peer="eager"))
    new = record(timed(1.0), timed(1.0, "b"))
    found = compare.compare(old, new)
    assert [change.entry.what for change in found.changes] == ["fwd"]
    assert found.only_old == ["retrieval/table/S/a/ours"]
    assert found.only_new == ["retrieval/table/S/b/ours"]


def test_peers_that_got_slower_are_no_regression() -> None:
    old = record(timed(1.0), timed(10.0, peer="eager"))
    new = record(timed(1.0), timed(20.0, peer="eager"))
    found = compare.compare(old, new)
    assert len(found.changes) == 1
    assert found.named("regression") == []


def test_targets_that_changed_sides() -> None:
    def entries(ours: str | None, peer: str, value: float = 69.0) -> list[Entry]:
        return [
            timed(value, target=70.0, verdict=ours),
            timed(700.0, peer="eager", ratio=700.0 / value, ratio_target=10.0, verdict=peer),
        ]

    old = record(*entries("met", "met"))
    found = compare.compare(old, record(*entries("missed", "missed", 71.0)))
    assert [(a.key, a.verdict, b.verdict) for a, b in found.verdicts] == [
        ("retrieval/table/S/fwd/ours", "met", "missed"),
        ("retrieval/table/S/fwd/eager", "met", "missed"),
    ]
    assert found.named("regression") == [], "3% within the threshold"
    text = compare.describe(found)
    assert "fwd/ours: met (69 us, target <= 70) -> missed (71 us, target <= 70)" in text
    assert "fwd/eager: met (10.14x, target >= 10x) -> missed (9.86x, target >= 10x)" in text
    assert compare.compare(old, old).verdicts == []
    # Without a target on one side nothing changed sides.
    assert len(compare.compare(old, record(*entries(None, "met"))).verdicts) == 0
    back = compare.compare(record(*entries("missed", "met", 71.0)), old)
    assert [(a.verdict, b.verdict) for a, b in back.verdicts] == [("missed", "met")]


# ---- machines and peers --------------------------------------------------------------------------


def test_ours_over_a_peer_is_what_two_machines_have_in_common() -> None:
    old = record(timed(100.0), timed(1000.0, peer="eager"), timed(10.0, "alone"), amount(5.0))
    # Twice as fast a machine: ours gained nothing on it beside the peer.
    new = record(
        timed(80.0),
        timed(500.0, peer="eager"),
        timed(5.0, "alone"),
        amount(6.0),
        machine=H100 | {"gpu": "H200"},
    )
    found = compare.compare(old, new)
    assert found.by == "peer"
    assert found.machines == {"gpu": ("H100", "H200")}
    ratio, size = found.changes
    assert (ratio.entry.peer, ratio.unit) == ("eager", "ours / eager")
    assert ratio.ratio == pytest.approx(1.6)
    assert ratio.old is not None
    assert ratio.old.q1 == pytest.approx(99 / 1010)
    assert ratio.old.q3 == pytest.approx(101 / 990)
    assert ratio.verdict == "regression"
    assert (size.unit, size.verdict) == ("MB", "regression")
    assert found.only_old == found.only_new == []
    times = compare.compare(old, new, by="time")
    assert [change.verdict for change in times.changes] == [
        "improvement",
        "improvement",
        "regression",
    ]
    assert compare.compare(old, old, by="peer").by == "peer"


def test_wide_spreads_of_either_make_a_ratio_uncertain() -> None:
    old = record(timed(100.0), timed(1000.0, peer="eager", q1=800.0))
    new = record(timed(110.0), timed(1000.0, peer="eager"))
    (change,) = compare.compare(old, new, by="peer").changes
    assert change.ratio == pytest.approx(1.1)
    assert change.overlap
    assert change.verdict == ""


def test_out_of_memory_beside_a_peer() -> None:
    fits = record(timed(1.0), timed(10.0, peer="eager"), amount(1.0))
    ours = record(timed(None), timed(10.0, peer="eager"), amount(1.0))
    peer = record(timed(1.0), timed(None, peer="eager"), amount(1.0))
    found = compare.compare(fits, ours, by="peer")
    assert [change.verdict for change in found.changes] == ["regression", ""]
    found = compare.compare(fits, peer, by="peer")
    assert [change.verdict for change in found.changes] == [""]
    assert found.only_old == ["retrieval/table/S/fwd/eager"]


def test_our_own_kernels_are_no_peers() -> None:
    names = [("adversarial", "random"), ("table", "eager")]
    entries = [
        timed(1.0, peer=peer, section=section) for section, name in names for peer in ("ours", name)
    ]
    found = compare.compare(record(*entries), record(*entries), by="peer")
    assert [change.entry.peer for change in found.changes] == ["eager"]


@pytest.mark.parametrize(
    ("machine", "differs"),
    [
        ({"torch": "2.12"}, ["torch"]),
        ({"gpu": "H200", "torch": "2.12"}, ["gpu", "torch"]),
        ({"cpu": "y", "time": "later", "ultramem_cuda": "0.2"}, []),
        ({"device": "cpu"}, ["device"]),
    ],
)
def test_what_makes_another_machine(machine: dict[str, str], differs: list[str]) -> None:
    old, new = record(amount(1.0)), record(amount(1.0), machine=H100 | machine)
    assert list(compare.compare(old, new).machines) == differs


def test_on_the_cpu_the_cpu_counts() -> None:
    cpu = {"device": "cpu", "cpu": "x", "threads": 2, "cpu_capability": "AVX2", "torch": "2.13"}
    old = record(amount(1.0), machine=cpu)
    for name in ("cpu", "threads", "cpu_capability", "torch"):
        new = record(amount(1.0), machine=cpu | {name: "other"})
        assert compare.compare(old, new).machines == {name: (cpu[name], "other")}
    assert compare.compare(old, old).machines == {}


# ---- what cannot be compared ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (record(timed(1.0)), record(timed(1.0), dtype="float32"), "bfloat16, .* against float32"),
        (record(timed(1.0)), record(timed(1.0), cold=False), "cold caches against .* warm caches"),
        (record(timed(1.0)), record(timed(1.0, "other")), "nothing to compare is in both"),
        (record(), record(), "nothing to compare is in both"),
    ],
)
def test_records_without_anything_in_common(old: Record, new: Record, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        compare.compare(old, new)


def test_a_name_may_stand_for_another_shape() -> None:
    old = record(timed(1.0, verdict="met"), timed(1.0, shape="M"))
    shapes = [{"name": "S", "num_tokens": 64}, {"name": "M", "num_tokens": 8192}]
    new = record(timed(9.0, verdict="missed"), timed(1.0, shape="M"), shapes=shapes)
    found = compare.compare(old, new)
    assert found.other_shapes == ["S"]
    assert [change.entry.shape for change in found.changes] == ["M"]
    assert found.only_old == found.only_new == found.verdicts == []
    assert any("shape S has other sizes" in line for line in compare.warnings(found, new))


# ---- the command ---------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return compare.main([str(argument) for argument in arguments])


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Record], Path]:
    def write(name: str, content: Record) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content.to_json()))
        return path

    return write


def test_the_table(
    write: Callable[[str, Record], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old = write(
        "old",
        record(timed(100.0), timed(100.0, "bwd"), timed(50.0, "both"), timed(None, "large")),
    )
    new = write(
        "new",
        record(
            timed(120.0),
            timed(101.0, "bwd"),
            timed(25.0, "both"),
            timed(3.0, "large"),
            timed(3.0, "more"),
            wrong=["table, S: they differ"],
            out_of_memory=["table, M"],
        ),
    )
    assert run(old, new) == 1
    output = capsys.readouterr()
    header, _, forward, backward, both, large, *rest = output.out.splitlines()
    assert header.split() == [
        *("section", "shape", "what", "unit", "old", "new", "new/old", "quartiles"),
    ]
    assert forward.split()[:4] == ["retrieval/table", "S", "fwd", "us"]
    assert forward.split()[4:] == [
        *("100", "[99,", "101]", "120", "[118.8,", "121.2]"),
        *("1.200", "apart", "regression"),
    ]
    assert backward.split()[-2:] == ["1.010", "overlap"]
    assert both.split()[-3:] == ["0.500", "apart", "improvement"]
    assert "out of memory" in large
    assert large.endswith("improvement")
    assert rest[1:3] == ["only in NEW:", "  retrieval/table/S/more/ours"]
    assert rest[-1].startswith("1 regressions, 2 improvements, 1 within")
    assert "NEW says: table, S: they differ" in output.err
    assert "NEW says: out of memory: table, M" in output.err
    assert run(old, new, "--threshold", "1.3") == 0
    assert run(new, old, "--threshold", "1.3") == 1


def test_json(write: Callable[[str, Record], Path], capsys: pytest.CaptureFixture[str]) -> None:
    met = {"target": 1.0, "verdict": "met"}
    old = write("old", record(timed(1.0, **met), amount(0.0), timed(1.0, "a")))
    new = write("new", record(timed(2.0, target=1.0, verdict="missed"), amount(1.0)))
    assert run(old, new, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["by"] == "time"
    assert (found["regressions"], found["improvements"]) == (2, 0)
    first, second = found["rows"]
    assert first["key"] == "retrieval/table/S/fwd/ours"
    assert (first["old"]["value"], first["new"]["value"]) == (1.0, 2.0)
    assert (first["ratio"], first["quartiles_overlap"]) == (2.0, False)
    assert first["verdict"] == "regression"
    assert second["ratio"] is None
    assert found["targets"] == [{"key": first["key"], "old": "met", "new": "missed"}]
    assert found["only_old"] == ["retrieval/table/S/a/ours"]


def test_other_machines_are_warned_of(
    write: Callable[[str, Record], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    entries = (timed(100.0), timed(1000.0, peer="eager"))
    old = write("old", record(*entries))
    new = write("new", record(*entries, machine=H100 | {"gpu": "H200"}))
    assert run(old, new) == 0
    output = capsys.readouterr()
    assert "the machines differ (gpu: H100 and H200)" in output.err
    assert "--by time" in output.err
    assert "ours / eager" in output.out
    assert run(old, new, "--by", "time") == 0
    output = capsys.readouterr()
    assert "--by peer" in output.err
    assert "ours / eager" not in output.out
    assert run(old, old) == 0
    assert capsys.readouterr().err == ""


def test_files_that_are_no_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = RESULTS / "retrieval-h100-table.json"
    for wrong in (RESULTS / "lm-h100-stdlib.json", Path(__file__)):
        assert run(wrong, right) == run(right, wrong) == 2
        assert f"{wrong} is no " in capsys.readouterr().err
    assert run(right, tmp_path / "missing.json") == 2
    assert "cannot read" in capsys.readouterr().err
    assert run(right, RESULTS / "value-ffn-h100.json") == 2
    assert "nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize("threshold", ["0.9", "nan", "inf", "five"])
def test_thresholds_that_are_refused(threshold: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run("a", "b", "--threshold", threshold)
    assert ended.value.code == 2


# ---- the committed records -----------------------------------------------------------------------


@pytest.mark.parametrize("by", ["time", "peer"])
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_as_fast_as_itself(
    name: str, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RESULTS / f"{name}.json"
    assert run(path, path, "--by", by, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"]
    assert all(row["ratio"] == 1.0 for row in found["rows"])
    assert found["regressions"] == found["improvements"] == 0
    assert found["only_old"] == found["only_new"] == found["targets"] == []


def doctored(value: Any, name: str, factor: float) -> int:
    """Multiplies every number of this name that belongs to ours; returns how many there were."""
    count = 0
    if isinstance(value, list):
        return sum(doctored(item, name, factor) for item in value)
    if isinstance(value, dict):
        for key, item in value.items():
            if key == name and isinstance(item, dict):
                for field in ("median_ms", "q1_ms", "q3_ms"):
                    item[field] *= factor
                count += 1
            elif key == name:
                value[key] = item * factor
                count += 1
            else:
                count += doctored(item, name, factor)
    return count


@pytest.mark.parametrize("name", RECORDS)
def test_a_slower_copy_is_flagged(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, copied = RESULTS / f"{name}.json", tmp_path / "copy.json"
    content = json.loads(path.read_text())
    # More than the spread of any row: one peer's quartiles are twenty times apart.
    count = doctored(content, "ours", 30.0)
    copied.write_text(json.dumps(content))
    for by in ("time", "peer"):
        assert run(path, copied, "--by", by, "--json") == 1
        found = json.loads(capsys.readouterr().out)
        slower = [row for row in found["rows"] if row["verdict"] == "regression"]
        assert all(row["ratio"] == pytest.approx(30.0) for row in slower)
        times = [row for row in found["rows"] if row["unit"] == "us" or "/" in row["unit"]]
        assert slower == times
        if by == "time":
            assert len(slower) == count
    assert run(copied, path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["improvements"] == count


@pytest.mark.parametrize("name", ["value-ffn-h100", "retrieval-h100-sweeps"])
def test_larger_amounts_are_flagged(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, copied = RESULTS / f"{name}.json", tmp_path / "copy.json"
    content = json.loads(path.read_text())
    count = doctored(content, "amount", 1.06)
    copied.write_text(json.dumps(content))
    assert count > 0
    assert run(path, copied, "--json") == 1
    assert json.loads(capsys.readouterr().out)["regressions"] == count


def test_one_slower_row_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, copied = RESULTS / "value-ffn-h100.json", tmp_path / "copy.json"
    content = json.loads(path.read_text())
    row = content["sections"]["step"][3]
    before = copy.deepcopy(row)
    for field in ("median_ms", "q1_ms", "q3_ms"):
        row["timings"]["ours"][field] *= 1.2
    copied.write_text(json.dumps(content))
    assert run(path, copied) == 1
    flagged = [line for line in capsys.readouterr().out.splitlines() if line.endswith("regression")]
    assert len(flagged) == 1
    assert before["what"] in flagged[0]
