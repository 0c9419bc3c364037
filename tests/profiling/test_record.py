"""A profile as data: written, read again, refused where it is broken."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic_profile as synthetic

from ultramem_cuda.profiling.record import (
    CSV_COLUMNS,
    SCHEMA,
    Preset,
    Profile,
    read_json,
)


@pytest.mark.parametrize("build", [synthetic.full, synthetic.model_only])
def test_json_gives_back_the_same_profile(build: Callable[[], Profile], tmp_path: Path) -> None:
    profile = build()
    profile.write_json(tmp_path / "new" / "profile.json")
    assert read_json(tmp_path / "new" / "profile.json") == profile
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["profile.json"]


def test_floats_keep_every_bit(tmp_path: Path) -> None:
    seconds = math.nextafter(1e-5, 1)
    profile = synthetic.profile_of([synthetic.point("moe", 1, seconds, joules=0.1 + 0.2)])
    profile.write_json(tmp_path / "p.json")
    (read,) = read_json(tmp_path / "p.json").points
    assert read == profile.points[0]


def changed(path: tuple[Any, ...], value: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *outer, last = path
        place: Any = data
        for step in outer:
            place = place[step]
        place[last] = value

    return change


def deleted(path: tuple[Any, ...]) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *outer, last = path
        place: Any = data
        for step in outer:
            place = place[step]
        del place[last]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deleted(("schema",)), "not a profile: it has no schema"),
        (changed(("schema",), SCHEMA + 1), f"schema {SCHEMA + 1}; this version reads {SCHEMA}"),
        (deleted(("ceilings",)), "^ceilings is missing"),
        # Defaults are for those who build a profile.
        (deleted(("command",)), "^command is missing"),
        (deleted(("points", 0, "note")), r"^points\[0\].note is missing"),
        (deleted(("points", 3, "model", "dense")), r"^points\[3\].model.dense is missing"),
        (changed(("points", 0, "colour"), 1), r"^points\[0\].colour is unknown"),
        (changed(("points", 0, "tokens"), 1.5), r"^points\[0\].tokens must be a whole number"),
        (changed(("points", 0, "tokens"), True), r"tokens must be a whole number, got True"),
        (changed(("points", 0, "tokens"), 0), r"tokens must be positive"),
        (changed(("points", 0, "flops"), "1"), r"flops must be a finite number, got '1'"),
        (changed(("points", 0, "flops"), math.nan), r"flops must be a finite number, got nan"),
        (changed(("points", 0, "phase"), "idle"), r"phase must be one of decode, training"),
        (changed(("points", 0, "timing"), 3), r"^points\[0\].timing must be an object"),
        (changed(("points", 0, "subject"), "x"), r"a point of an unknown subject"),
        (changed(("points", 0, "note"), None), r"note must be a string"),
        (changed(("points",), "many"), r"^points must be a list"),
        (changed(("machine",), []), r"^machine must be an object"),
        (changed(("presets", 0, "comparisons", 0), ["block"]), r"must be a list of 2"),
        (changed(("presets", 0, "comparisons", 0, 1), "x"), r"compares unknown subjects \['x'\]"),
        (changed(("presets", 0, "subjects", 0, "name"), "moe"), r"must have different names"),
        (changed(("presets", 0, "subjects", 0, "total_parameters"), 0), r"must have parameters"),
        (changed(("ceilings", "measured"), 1), r"measured must be true or false, got 1"),
    ],
)
def test_broken_profiles_are_refused(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = json.loads(json.dumps(synthetic.full().to_json()))
    change(data)
    with pytest.raises(ValueError, match=message):
        Profile.from_json(data)


@pytest.mark.parametrize("foreign", [[], None, "profile", 3, {}])
def test_foreign_data_is_refused(foreign: object) -> None:
    with pytest.raises(ValueError, match="not a profile"):
        Profile.from_json(foreign)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"schema": 1, "machine"')
    with pytest.raises(ValueError, match=r"cannot read .*broken\.json: Expecting"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.json"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_twice_the_same_point_is_refused() -> None:
    point = synthetic.point("moe", 4, 1e-3)
    with pytest.raises(ValueError, match="two points of the same subject"):
        synthetic.profile_of([point, copy.copy(point)])
    # The other phase is another point.
    synthetic.profile_of([point, dataclasses.replace(point, phase="training")])


def test_presets_have_names_of_their_own() -> None:
    preset = Preset("tiny", 16, (), ())
    profile = synthetic.full()
    with pytest.raises(ValueError, match="presets must have different names"):
        dataclasses.replace(profile, presets=(*profile.presets, preset))


def test_a_number_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile = synthetic.profile_of([synthetic.point("moe", 1, 1e-3)])
    profile.write_json(path)
    broken = synthetic.profile_of([synthetic.point("moe", 1, math.inf)])
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.write_json(path)
    assert read_json(path) == profile


def test_csv_says_what_the_points_say(tmp_path: Path) -> None:
    profile = synthetic.full()
    profile.write_csv(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(profile.points)
    subjects = {subject.name: subject for subject in profile.presets[0].subjects}
    for row, point in zip(rows, profile.points, strict=True):
        subject = subjects[point.subject]
        assert (row["preset"], row["subject"], row["phase"]) == ("tiny", subject.name, point.phase)
        assert row["title"] == subject.title
        assert int(row["active_parameters"]) == subject.active_parameters
        assert int(row["tokens"]) == point.tokens
        # Exactly: no digit is lost.
        assert float(row["flops"]) == point.flops
        assert float(row["model_lower_bytes"]) == point.model.lower
        assert float(row["model_gathered_bytes"]) == point.model.gathered
        assert float(row["floor_ms"]) == point.floor_seconds(profile.ceilings) * 1e3
        assert row["counted_lower_bytes"] == ""
        assert row["note"] == point.note
        if point.timing is None or point.sampled is None:
            for name in ("time_median_ms", "achieved_fraction", "nvml_bytes", "nvml_energy_j"):
                assert row[name] == ""
        else:
            assert float(row["time_median_ms"]) == point.timing.median_ms
            assert float(row["time_q3_ms"]) == point.timing.q3_ms
            assert float(row["achieved_fraction"]) == point.achieved(profile.ceilings)
            assert float(row["nvml_bytes"]) == point.sampled.bytes
            assert float(row["nvml_energy_per_token_j"]) == point.joules_per_token()
            # Measured windows without this one.
            assert row["tensor_utilization_fraction"] == ""


def test_csv_names_units(tmp_path: Path) -> None:
    words = {"preset", "phase", "subject", "title", "kind", "throttle_reasons", "note"}
    counts = {"tokens", "flops", "time_repeats", "nvml_passes"}
    units = ("_bytes", "_ms", "_s", "_j", "_mhz", "_fraction", "_parameters")
    for name in CSV_COLUMNS:
        assert name in words | counts or name.endswith(units), name


def test_csv_quotes_what_needs_it(tmp_path: Path) -> None:
    note = 'a, "b"\nc; <d>'
    profile = synthetic.profile_of([synthetic.point("moe", 1, None, note=note)])
    profile.write_csv(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["note"] == note


def test_measured_means_any_point() -> None:
    assert synthetic.full().measured
    assert not synthetic.model_only().measured
    assert synthetic.profile_of([synthetic.point("moe", 1, None, joules=1.0)]).measured
