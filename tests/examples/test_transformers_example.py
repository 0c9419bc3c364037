"""The example of memory layers in transformers, in few steps; docs/quality.md has all of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.0")

from ultramem_cuda.examples import transformers_memory as example

BRIEF = example.Settings(steps=12, batch=8, warmup=2, val_windows=8)


@pytest.fixture(autouse=True, scope="module")
def _read_once() -> Iterator[None]:
    # Reading the text takes longer than these runs.
    corpus = example.load_corpus()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "load_corpus", lambda: corpus)
        yield


@pytest.mark.parametrize("family", example.FAMILIES)
def test_few_steps(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = example.compare(dataclasses.replace(BRIEF, family=family), tmp_path, print)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["dense", "memory", "generates"]
    dense, memory = record["dense"], record["memory"]
    for result in (dense, memory):
        assert result["val_loss"] < result["first_val_loss"] - 0.5
        assert len(result["train_losses"]) == BRIEF.steps
    assert memory["active_parameters"] == pytest.approx(dense["active_parameters"], rel=0.01)
    assert memory["intermediate_size"] < dense["intermediate_size"]
    assert memory["total_parameters"] > 2 * dense["total_parameters"]
    assert record["same_tokens"]
    assert record["generated"].startswith(example.PROMPT.decode())
    assert json.loads(json.dumps(record)) == record


def test_runs_repeat(tmp_path: Path) -> None:
    short = dataclasses.replace(BRIEF, steps=2, val_windows=2)
    records = [example.compare(short, tmp_path, lambda line: None) for _ in range(2)]
    for kind in ("dense", "memory"):
        assert records[0][kind]["train_losses"] == records[1][kind]["train_losses"]


def test_width_that_cannot_be_matched() -> None:
    with pytest.raises(ValueError, match="intermediate_size: too small"):
        example.matched_width(dataclasses.replace(BRIEF, intermediate_size=16))


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(settings: example.Settings, folder: Path, report: object) -> dict[str, object]:
        assert folder.is_dir()
        return {"seed": settings.seed, "generated": "text", "same_tokens": settings.seed != 3}

    monkeypatch.setattr(example, "compare", compare)
    file = tmp_path / "record.json"
    assert example.main(["--seeds", "1", "2", "--json", str(file)]) == 0
    assert [record["seed"] for record in json.loads(file.read_text())] == [1, 2]
    assert "text" in capsys.readouterr().out
    assert example.main(["--seeds", "3", "--family", "llama"]) == 1
