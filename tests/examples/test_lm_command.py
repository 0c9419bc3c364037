"""The command line of the example: what it refuses, and runs of several kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ultramem_cuda import cli
from ultramem_cuda.examples.lm.train import Trainer, TrainingDiverged

SMALL = [
    *("--preset", "tiny", "--steps", "2", "--batch", "2", "--context", "32"),
    *("--val-windows", "2", "--device", "cpu", "--quiet"),
]


class Command:
    """``ultramem train`` on a little text, into one directory."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out = root / "runs"
        self._text = root / "text.txt"
        self._text.write_text("value = 1\n" * 500)
        self._capsys = capsys
        self.printed = self.errors = ""

    def __call__(self, *options: str) -> int:
        fixed = [*SMALL, "--data", str(self._text), "--out", str(self.out)]
        code = cli.main(["train", *fixed, *options])
        self.printed, self.errors = self._capsys.readouterr()
        return code

    def checkpoint(self, kind: str) -> Path:
        return self.out / f"{kind}-seed0" / "checkpoint.pt"


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


def end_run_of(monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException) -> None:
    """Lets training of ``kind`` raise ``error`` once it has opened its log."""
    run = Trainer.run

    def ended(trainer: Trainer):  # type: ignore[no-untyped-def]
        if trainer.model_config.kind != kind:
            return run(trainer)
        trainer._open_log().close()
        raise error

    monkeypatch.setattr(Trainer, "run", ended)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "nan"], "argument --lr: must be a finite number, got nan"),
        (["--clip", "nan"], "argument --clip: must be a finite number"),
        (["--weight-decay", "nan"], "argument --weight-decay: must be a finite number"),
        (["--final-lr-ratio", "nan"], "argument --final-lr-ratio: must be a finite number"),
        (["--val-fraction", "nan"], "argument --val-fraction: must be a finite number"),
        (["--table-lr-multiplier", "nan"], "argument --table-lr-multiplier: must be a finite"),
        (["--table-lr-multiplier", "inf"], "argument --table-lr-multiplier: must be a finite"),
        (["--seed", "-1"], "argument --seed: must be >= 0"),
        (["--seed", str(2**63)], f"argument --seed: must be in 0..{2**63 - 1}"),
        (["--kind", "pkm", "--memory-init", "paper"], "argument --memory-init: 'paper' is"),
        (["--kind", "dense", "--ffn-inner", "2000000000"], "argument model options: no memory"),
        (["--ffn-inner", str(2**31)], f"argument --ffn-inner: must be in 0..{2**31 - 1}"),
        (
            ["--kind", "dense", "--d-model", str(2**30), "--ffn-inner", str(2**31 - 1)],
            "argument model options: the sizes are beyond",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_values(train: Command, options: list[str], message: str) -> None:
    assert train(*options) == 2
    assert train.errors.count("\n") == 1
    assert message in train.errors


def test_largest_seed_trains(train: Command) -> None:
    assert train("--kind", "dense", "--seed", str(2**63 - 1)) == 0


def test_paper_initialisation_trains(train: Command) -> None:
    assert train("--kind", "ultramem_v2", "--memory-init", "paper") == 0


def test_a_kept_width_that_does_not_match_is_printed(train: Command) -> None:
    assert train("--kind", "moe", "--expert-inner", "32") == 0
    assert "note: moe has -" in train.printed
    assert train("--kind", "moe", "--experts-per-token", "2", "--overwrite") == 0
    assert "note:" not in train.printed


def test_every_folder_is_looked_at_before_training(train: Command) -> None:
    assert train("--kind", "moe") == 0
    assert train("--kind", "dense", "moe") == 2
    assert "moe-seed0' already holds a run" in train.errors
    (train.out / "pkm-seed0").write_text("in the way")
    assert train("--kind", "dense", "pkm") == 2
    assert "pkm-seed0' is not a directory" in train.errors
    assert train("--kind", "dense", "moe", "--resume", "--lr", "0.5") == 2
    assert "argument --lr: the checkpoint was written with" in train.errors
    assert not (train.out / "dense-seed0").exists()


def test_resume_starts_kinds_without_a_checkpoint(train: Command) -> None:
    both = ("--kind", "dense", "moe")
    assert train(*both, "--resume") == 2
    assert "argument --resume: there is no checkpoint" in train.errors
    assert train("--kind", "dense") == 0
    before = train.checkpoint("dense").read_bytes()
    assert train(*both, "--resume") == 0
    assert train.checkpoint("dense").read_bytes() == before
    assert train.checkpoint("moe").exists()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TrainingDiverged("the loss is nan at step 1"), 1, "error: the loss is nan at step 1"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["diverged", "interrupted"],
)
def test_finished_kinds_are_printed_when_a_later_one_ends_early(
    train: Command,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    end_run_of(monkeypatch, "moe", error)
    assert train("--kind", "dense", "moe") == code
    table = train.printed.splitlines()[-2:]
    assert [row.split()[0] for row in table] == ["kind", "dense"]
    assert train.errors == f"ultramem train: {line}\n"


def test_overwriting_discards_every_kind_at_once(
    train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = ("--kind", "dense", "moe")
    assert train(*both) == 0
    end_run_of(monkeypatch, "dense", KeyboardInterrupt())
    assert train(*both, "--overwrite") == cli.EXIT_INTERRUPTED
    assert not train.checkpoint("dense").exists()
    assert not train.checkpoint("moe").exists()
    assert train(*both, "--resume") == 2


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("value = 1\n" * 500)
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "ultramem_cuda", "train", "--kind", "dense"),
            *(*SMALL, "--data", tmp_path / "text.txt", "--out", tmp_path / "runs"),
        ],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (cli.EXIT_CUT_OFF, "")
