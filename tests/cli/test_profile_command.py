"""`ultramem profile`: its files, what it prints, how it ends."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ultramem_cuda import cli
from ultramem_cuda.cli.profile import summary
from ultramem_cuda.profiling import harness
from ultramem_cuda.profiling.record import Agreement, Profile, read_json

SMALL = ["--preset", "1B-7B", "--subject", "block", "moe", "--decode-tokens", "1", "64", "4096"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(*arguments: object) -> int:
    return cli.main(["profile", *(str(argument) for argument in arguments)])


def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "here"
    assert run(*SMALL, "--training-tokens", 1024, "--out", out) == 0
    profile = read_json(out / "profile.json")
    tokens = {
        phase: [p.tokens for p in profile.select("1B-7B", "moe", phase)]
        for phase in ("decode", "training", "optimizer")
    }
    assert tokens == {"decode": [1, 64, 4096], "training": [1024], "optimizer": [1024]}
    assert profile.command == f"ultramem profile {' '.join(SMALL)} --training-tokens 1024"
    with open(out / "profile.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(profile.points) == 2 * 5
    assert {row["subject"] for row in rows} == {"block", "moe"}
    assert all(row["time_median_ms"] == "" for row in rows)
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    printed = capsys.readouterr().out
    assert "1B-7B, decode: FFN + memory layer against OLMoE's MoE" in printed
    assert "At 64 tokens" in printed
    assert "the byte model alone, nothing was measured: torch finds no CUDA GPU." in printed
    for name in ("profile.json", "profile.csv", "report.html"):
        assert str((out / name).resolve()) in printed
    # Ratios of what was never measured have no column.
    (header,) = {line.split("  ")[-1] for line in printed.splitlines() if " tokens  " in line}
    assert header == "never cached"


def test_counts_are_printed_below_a_header() -> None:
    profile = harness.profile(harness.Settings.quick(), say=lambda line: None)
    rows = [
        Agreement("copy", 2147.5e6, 2147.6e6, 2146.8e6),
        Agreement("moe", 2792.6e6, None, 3114.9e6, note="Twice."),
    ]
    lines = summary(dataclasses.replace(profile, agreement=rows)).splitlines()
    start = lines.index("Bytes of one pass in three ways, in MB") + 1
    assert [line.split() for line in lines[start : start + 3]] == [
        ["pass", "model", "NVML", "ncu"],
        ["copy", "2,147.5", "2,147.6", "2,146.8"],
        ["moe", "2,792.6", "-", "3,114.9"],
    ]
    assert lines[start + 3].strip() == "moe: Twice."


@pytest.mark.parametrize("option", ["--model-only", "--quick"])
def test_options_are_repeated(option: str, tmp_path: Path) -> None:
    options = [option, "--no-ncu", "--seconds", "2.5"]
    assert run(*options, "--out", tmp_path) == 0
    profile = read_json(tmp_path / "profile.json")
    words = profile.command.split()
    assert words[:2] == ["ultramem", "profile"]
    assert sorted(words[2:]) == sorted(options)
    assert len(profile.presets) == (1 if option == "--quick" else 2)


def test_the_report_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert run(*SMALL, "--training-tokens", "--out", first) == 0
    printed = capsys.readouterr().out
    assert run("--from-json", first / "profile.json", "--out", again) == 0
    assert capsys.readouterr().out == printed.replace(str(first), str(again))
    for name in ("profile.json", "profile.csv", "report.html"):
        assert (again / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "9B"], "argument --preset: must be among 227M-1.2B, 1B-7B, got '9B'"),
        (["--subject", "mlp"], "argument --subject: must be among memory, ffn"),
        (["--decode-tokens", "0"], "argument --decode-tokens: must be positive, got 0"),
        (["--training-tokens", "8", "8"], "argument --training-tokens: must be different"),
        (["--seconds", "0.1"], "argument --seconds: must be at least 1, got 0.1"),
        (["--from-json", "missing.json"], "argument --from-json: cannot read 'missing.json'"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert f"ultramem profile: error: {says}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_record_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"schema": 1, "points": 3}')
    assert run("--from-json", tmp_path / "other.json", "--out", tmp_path) == 2
    assert "argument --from-json: cannot read" in capsys.readouterr().err


def test_a_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run("--quick", "--out", tmp_path / "file" / "folder") == 2
    assert "argument --out: cannot write to" in capsys.readouterr().err


def test_an_interrupted_run_leaves_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(settings: Any, say: Any, *, save: Any, command: str) -> Profile:
        profile = model(settings, say, command=command)
        save(profile)
        partial = json.loads((tmp_path / "profile.json").read_text())
        assert len(partial["points"]) == len(profile.points)
        raise KeyboardInterrupt

    model = harness.profile
    monkeypatch.setattr(harness, "profile", interrupted)
    assert run("--quick", "--out", tmp_path) == 130
    assert len(read_json(tmp_path / "profile.json").points) == 2 * 5
    assert (tmp_path / "report.html").exists()
    errors = capsys.readouterr().err
    assert f"what was measured until now: {tmp_path}" in errors
    assert errors.endswith("ultramem profile: interrupted\n")


def test_nothing_of_it_is_loaded_for_other_commands() -> None:
    program = (
        "import sys; from ultramem_cuda import cli; cli.build_parser(); "
        "print([m for m in sys.modules if m.endswith(('.harness', '.nvml', '.subjects'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
