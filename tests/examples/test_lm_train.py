"""The trainer: learning, resuming, checkpoints, what goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ultramem_cuda.examples.lm import checkpoint, files, train
from ultramem_cuda.examples.lm.config import KINDS, Kind, ModelConfig, TrainConfig
from ultramem_cuda.examples.lm.data import Corpus
from ultramem_cuda.examples.lm.errors import UsageError
from ultramem_cuda.examples.lm.progress import ProgressBar
from ultramem_cuda.examples.lm.train import Trainer, TrainingDiverged, learning_rate

MODEL = ModelConfig(
    d_model=32,
    num_layers=2,
    attention_heads=2,
    context=32,
    ffn_inner=64,
    num_experts=4,
    experts_per_token=2,
    expert_inner=32,
    num_keys=12,
    key_dim=8,
    topk=4,
    pre_value_dim=8,
    value_dim=8,
)
TRAIN = TrainConfig(
    steps=8,
    batch=4,
    lr=3e-3,
    warmup=2,
    val_fraction=0.2,
    val_windows=4,
    eval_every=4,
    checkpoint_every=4,
    log_every=1,
)


def text(seed: int = 0) -> Corpus:
    """Words that repeat, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    words = [b"alpha ", b"beta ", b"gamma ", b"delta\n"]
    content = b"".join(words[i] for i in generator.integers(4, size=3000))
    return Corpus(
        ("words.txt",), np.frombuffer(content, np.uint8), np.array([0, len(content)]), "test"
    )


def trainer(
    out: Path, kind: Kind = "dense", corpus: Corpus | None = None, **changes: object
) -> Trainer:
    model_fields = {field.name for field in dataclasses.fields(ModelConfig)}
    model = {name: value for name, value in changes.items() if name in model_fields}
    train = {name: value for name, value in changes.items() if name not in model_fields}
    return Trainer(
        dataclasses.replace(MODEL, kind=kind, **model),  # type: ignore[arg-type]
        dataclasses.replace(TRAIN, **train),  # type: ignore[arg-type]
        text() if corpus is None else corpus,
        out=out,
        device=torch.device("cpu"),
        quiet=True,
    )


class Stopped(Exception):
    """Stands for whatever ends a process."""


def stop_after(running: Trainer, step: int) -> None:
    """Runs until ``step`` is done and the process "dies" in the next one."""
    advance = running._advance

    def interrupted(*arguments: object) -> None:
        if running.step == step:
            raise Stopped
        advance(*arguments)  # type: ignore[arg-type]

    running._advance = interrupted  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        running.run()


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_bit_identical(tmp_path: Path, kind: Kind) -> None:
    whole = trainer(tmp_path / "whole", kind)
    expected = whole.run()

    stop_after(trainer(tmp_path / "parts", kind), 6)
    resumed = trainer(tmp_path / "parts", kind)
    resumed.resume()
    assert resumed.step == 4
    result = resumed.run()

    assert result.train == expected.train
    assert result.validation == expected.validation
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name

    logs = [
        [json.loads(line) for line in (tmp_path / part / "log.jsonl").read_text().splitlines()]
        for part in ("whole", "parts")
    ]
    for log in logs:
        for record in log:
            record.pop("seconds", None)
    assert logs[0] == logs[1]


def test_training_learns_and_logs(tmp_path: Path) -> None:
    result = trainer(tmp_path, "ultramem_v2", steps=60, eval_every=20, checkpoint_every=60).run()
    assert result.validation.tokens == [0, 20 * 128, 40 * 128, 60 * 128]
    assert 5.0 < result.validation.loss[0] < 7.0
    assert result.final_loss < 2.9
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[0]["event"] == "start"
    assert records[0]["parameters"] == dataclasses.asdict(result.counts)
    steps = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 61))
    assert {"loss", "lr", "grad_norm_network", "grad_norm_table"} <= steps[0].keys()
    assert [r["loss"] for r in records if r["event"] == "validation"] == result.validation.loss


def test_seed_decides_everything(tmp_path: Path) -> None:
    first = trainer(tmp_path / "a", steps=3, seed=1).run()
    assert trainer(tmp_path / "b", steps=3, seed=1).run().train == first.train
    assert trainer(tmp_path / "c", steps=3, seed=2).run().train != first.train


@pytest.mark.parametrize("kind", ["dense", "ultramem_v2"])
def test_accumulated_gradients_are_those_of_the_batch(tmp_path: Path, kind: Kind) -> None:
    whole, parts = trainer(tmp_path / "a", kind), trainer(tmp_path / "b", kind, accumulate=4)
    loss, mean = whole._accumulate_gradients(), parts._accumulate_gradients()
    torch.testing.assert_close(loss, mean)
    for (name, one), other in zip(
        whole.model.named_parameters(), parts.model.parameters(), strict=True
    ):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).norm() <= 1e-4 * one.grad.norm() + 1e-9, name


def test_autocast_trains(tmp_path: Path) -> None:
    running = trainer(tmp_path, "ultramem_v2", steps=30, precision="bf16", eval_every=30)
    assert running.run().final_loss < 3.4
    assert all(parameter.dtype == torch.float32 for parameter in running.model.parameters())


def test_network_and_table_are_clipped_apart(tmp_path: Path) -> None:
    running = trainer(tmp_path, "ultramem_v2", clip=1e-3, table_clip=1e-5)
    running._accumulate_gradients()
    norms = running._clip_gradients()
    assert norms["network"] > 1e-2
    table = running.model.table
    assert table is not None
    inside = {id(p) for p in table.parameters()}
    grads = {True: 0.0, False: 0.0}
    for parameter in running.model.parameters():
        assert parameter.grad is not None
        grads[id(parameter) in inside] += float(parameter.grad.double().square().sum())
    assert grads[True] ** 0.5 == pytest.approx(1e-5, rel=0.05)
    assert grads[False] ** 0.5 == pytest.approx(1e-3, rel=0.05)


def test_learning_rates() -> None:
    config = dataclasses.replace(TRAIN, steps=110, warmup=10, lr=1.0, final_lr_ratio=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(110, config) == pytest.approx(0.1)


def test_table_learns_faster_at_first(tmp_path: Path) -> None:
    running = trainer(tmp_path, "ultramem_v2", steps=8, warmup=1, final_lr_ratio=1.0)
    ratios = []
    for step in (0, 4, 8):
        running.step = step
        running._set_learning_rates()
        rates = {group["name"]: group["lr"] for group in running.optimizer.param_groups}
        ratios.append(rates["memory"] / rates["network"])
    assert ratios == pytest.approx([4.0, 2.5, 1.0])


def test_divergence_is_reported(tmp_path: Path) -> None:
    running = trainer(tmp_path)
    with torch.no_grad():
        running.model.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="the loss is nan at step 1"):
        running.run()


def test_divergence_keeps_the_good_checkpoint(tmp_path: Path) -> None:
    running = trainer(tmp_path)
    running.save()
    before = running.checkpoint_path.read_bytes()
    with torch.no_grad():
        running.model.head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match=r"head\.weight is not finite"):
        running.save()
    assert running.checkpoint_path.read_bytes() == before


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--resume: there is no checkpoint at"):
        trainer(tmp_path).resume()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text", "other"])
def test_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    running = trainer(tmp_path)
    running.save()
    path = running.checkpoint_path
    content = path.read_bytes()
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        weight = running.model.embedding.weight.detach().numpy().tobytes()
        where = content.index(weight[:64]) + 100
        flipped = content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]
        path.write_bytes(
            {"truncate": content[: len(content) // 2], "flip": flipped, "empty": b"", "text": b"x"}[
                damage
            ]
        )
    with pytest.raises(UsageError, match=r"^--resume: .*checkpoint\.pt'"):
        trainer(tmp_path).resume()


def test_every_damage_to_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    running = trainer(tmp_path)
    running.save()
    path = running.checkpoint_path
    content = path.read_bytes()
    flipped = [
        *range(0, len(content), len(content) // 100),
        *range(len(content) - 32, len(content)),
    ]
    damaged = [content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :] for i in flipped]
    for wrong in (*damaged, content[:-1], content + b"\0", content[32:], content[:20]):
        path.write_bytes(wrong)
        with pytest.raises(UsageError, match=r"^--resume: .*is damaged or not one"):
            checkpoint.load_checkpoint(path)
    path.write_bytes(content)
    assert checkpoint.load_checkpoint(path)["step"] == 0


def test_unreadable_checkpoint_says_why(tmp_path: Path) -> None:
    # A directory: the tests may run as root, whom permissions do not stop.
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(UsageError, match=r"^--resume: cannot read checkpoint .*: Is a directory"):
        trainer(tmp_path).resume()


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    out = tmp_path / "run"
    kept = [
        out / f".checkpoint.pt.{os.getppid()}.tmp",
        out / f".other.pt.{ended}.tmp",
        tmp_path / f".checkpoint.pt.{ended}.tmp",
    ]
    stale = out / f".checkpoint.pt.{ended}.tmp"
    out.mkdir()
    for path in (*kept, stale):
        path.write_bytes(b"half")
    trainer(out).save()
    assert not stale.exists()
    assert all(path.exists() for path in kept)


def test_a_new_run_discards_the_old_checkpoint_before_the_log(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    stop_after(trainer(tmp_path), 2)
    with pytest.raises(UsageError, match=r"^--resume: there is no checkpoint at"):
        trainer(tmp_path).resume()


def test_damaged_log_does_not_stop_a_resumption(tmp_path: Path) -> None:
    stop_after(trainer(tmp_path), 6)
    log = tmp_path / "log.jsonl"
    good = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= 4]
    damage = [
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b'{"step": "2"}',
        b'{"step": true}',
        b"[" * 100_000,
        b"9" * 9999,
    ]
    log.write_bytes(log.read_bytes() + b"\n".join(damage) + b"\n")
    trainer(tmp_path).resume()
    assert log.read_text().splitlines() == good


def test_unreadable_log_says_why(tmp_path: Path) -> None:
    trainer(tmp_path).save()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"^--out: cannot read .*log\.jsonl': Is a directory"):
        trainer(tmp_path).resume()


def test_log_has_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    running = trainer(tmp_path)
    with torch.no_grad():
        running.model.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged):
        running.run()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the log")

    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [r["loss"] for r in records if r["event"] == "validation"] == [None]


def test_model_too_large_for_memory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^model options: no memory for a dense model of 12,8"):
        trainer(tmp_path, ffn_inner=2 * 10**14 // 3)


def test_other_errors_of_building_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: ModelConfig) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(train, "ByteLM", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--steps", {"steps": 9}),
        ("--seed", {"seed": 1}),
        ("--d-model", {"d_model": 64}),
        ("--kind", {"kind": "ultramem_v2"}),
        ("--precision", {"precision": "bf16"}),
        ("--data", {"corpus": text(1)}),
    ],
)
def test_resume_refuses_other_settings(
    tmp_path: Path, option: str, changes: dict[str, object]
) -> None:
    trainer(tmp_path).save()
    with pytest.raises(UsageError, match=f"^{option}: "):
        trainer(tmp_path, **changes).resume()  # type: ignore[arg-type]


def test_resume_may_change_how_often_it_reports(tmp_path: Path) -> None:
    trainer(tmp_path).save()
    trainer(tmp_path, log_every=2, eval_every=2, checkpoint_every=2).resume()


class FullDisk(io.FileIO):
    """Accepts ``room`` bytes, then behaves like a device with no space left."""

    room = 10_000

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = trainer(tmp_path)
    running.run()
    before = running.checkpoint_path.read_bytes()
    assert len(before) > FullDisk.room

    monkeypatch.setattr(files, "open", lambda path, mode: FullDisk(path, "w"), raising=False)
    with pytest.raises(UsageError) as raised:
        running.save()
    assert str(raised.value).startswith("--out: cannot write checkpoint")
    assert "no space left on the device; the previous checkpoint is intact" in str(raised.value)
    monkeypatch.undo()
    assert running.checkpoint_path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    trainer(tmp_path).resume()


def test_failed_flush_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_of_torch_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"lambda|pickle"):
        checkpoint.save_checkpoint(tmp_path / "c.pt", {"function": lambda: None})
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"^--out: cannot write to"):
        trainer(tmp_path / "file" / "run").run()


def test_batch_must_divide(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--accumulate: must divide --batch = 4, got 3"):
        trainer(tmp_path, accumulate=3)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_draws_on_terminals_only() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream, quiet in ((terminal, False), (pipe, False)):
        bar = ProgressBar("dense", 10, quiet=quiet, stream=stream)
        bar.update(10, "loss 1.0")
        bar.close()
    assert "dense [############################] 10/10 loss 1.0" in terminal.getvalue()
    assert pipe.getvalue() == ""
    quiet_terminal = Terminal()
    ProgressBar("dense", 10, quiet=True, stream=quiet_terminal).update(10)
    assert quiet_terminal.getvalue() == ""
