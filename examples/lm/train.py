"""The trainer: one model, one seed, one output directory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ultramem_cuda as um

from .checkpoint import load_checkpoint, save_checkpoint
from .config import ModelConfig, TrainConfig
from .data import Corpus, WindowSampler, fixed_windows
from .errors import UsageError
from .files import remove_stale_temporaries, write_atomically
from .matching import ParameterCounts, count_parameters, counts_of
from .model import ByteLM
from .progress import ProgressBar

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "log.jsonl"

# What a resumed run may change: none of it touches the numbers that are computed.
FREE_ON_RESUME = frozenset({"checkpoint_every", "log_every", "eval_every"})


class TrainingDiverged(RuntimeError):
    """The loss is not a number any more."""


@dataclass
class Curve:
    """Losses in nats a byte after so many training bytes ("tokens")."""

    tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def add(self, tokens: int, loss: float) -> None:
        self.tokens.append(tokens)
        self.loss.append(loss)


@dataclass
class RunResult:
    """What came out of a run. ``seconds`` is the time spent training, without validation."""

    model_config: ModelConfig
    train_config: TrainConfig
    counts: ParameterCounts
    train: Curve
    validation: Curve
    seconds: float

    @property
    def final_loss(self) -> float:
        """Validation loss after the last step, nats a byte."""
        return self.validation.loss[-1]


class Trainer:
    """Trains ``model_config`` on ``corpus``, writing a log and checkpoints below ``out``.

    On the CPU a run that was stopped and resumed is bit-identical to one that was not: the data
    position is a count of windows, and everything else that carries state is in the checkpoint.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        train_config: TrainConfig,
        corpus: Corpus,
        *,
        out: Path,
        device: torch.device,
        quiet: bool = False,
        progress_bar: bool = True,
    ) -> None:
        if train_config.batch % train_config.accumulate:
            raise UsageError(
                "--accumulate",
                f"must divide --batch = {train_config.batch}, got {train_config.accumulate}",
            )
        self.model_config = model_config
        self.config = train_config
        self.device = device
        self.out = out
        self.quiet = quiet
        self.progress_bar = progress_bar and not quiet
        self.corpus_digest = corpus.sha256
        train_stream, val_stream = corpus.split(train_config.val_fraction)
        self.sampler = WindowSampler(train_stream, model_config.context, train_config.seed)
        self.val_inputs, self.val_targets = fixed_windows(
            val_stream, model_config.context, train_config.val_windows
        )

        # Drawn on the CPU, so that a seed means the same weights on every device.
        torch.manual_seed(train_config.seed)
        self.model = _build(model_config, device)
        self.counts = count_parameters(self.model)
        self.optimizer = torch.optim.AdamW(
            um.optim.param_groups(
                self.model,
                train_config.lr,
                train_config.table_lr_multiplier,
                weight_decay=train_config.weight_decay,
            ),
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=device.type == "cuda",
        )
        self.step = 0
        self.seconds = 0.0
        self.train_curve = Curve()
        self.val_curve = Curve()

    @property
    def tokens(self) -> int:
        """Training bytes seen so far."""
        return self.step * self.config.batch * self.model_config.context

    @property
    def checkpoint_path(self) -> Path:
        return self.out / CHECKPOINT_NAME

    def run(self) -> RunResult:
        """Trains to the last step and returns the curves.

        Raises:
            TrainingDiverged: the loss became NaN or infinite.
            UsageError: a checkpoint or the log could not be written.
        """
        label = f"{self.model_config.kind:>11}"
        bar = ProgressBar(label, self.config.steps, quiet=not self.progress_bar)
        with self._open_log() as log:
            if self.step == 0:
                self._log(log, "start", **self._description())
                self._validate(log, bar)
            while self.step < self.config.steps:
                self._advance(log, bar)
                last = self.step == self.config.steps
                if last or self.step % self.config.eval_every == 0:
                    self._validate(log, bar)
                if last or self.step % self.config.checkpoint_every == 0:
                    self.save()
        bar.close()
        return RunResult(
            self.model_config,
            self.config,
            self.counts,
            self.train_curve,
            self.val_curve,
            self.seconds,
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss over the fixed held-out windows, nats a byte."""
        self.model.eval()
        size = self.config.batch // self.config.accumulate
        total = 0.0
        for inputs, targets in zip(
            self.val_inputs.split(size), self.val_targets.split(size), strict=True
        ):
            with self._autocast():
                loss, _ = self.model.loss(inputs.to(self.device), targets.to(self.device))
            total += loss.item() * len(inputs)
        self.model.train()
        return total / len(self.val_inputs)

    def save(self) -> None:
        """Writes the checkpoint; a failure leaves the one before it, and so does divergence.

        Raises:
            TrainingDiverged: a weight is not a number any more (the loss is looked at less often).
        """
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise TrainingDiverged(f"{name} is not finite at step {self.step}")
        save_checkpoint(
            self.checkpoint_path,
            {
                "identity": self._identity(),
                "step": self.step,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "train_curve": dataclasses.asdict(self.train_curve),
                "val_curve": dataclasses.asdict(self.val_curve),
            },
        )

    def resume(self) -> None:
        """Continues from the checkpoint in ``out``.

        Raises:
            UsageError: it is missing or damaged, or was written by a run with other settings.
        """
        state = load_checkpoint(self.checkpoint_path)
        try:
            _check_identity(state["identity"], self._identity())
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.train_curve = Curve(**state["train_curve"])
            self.val_curve = Curve(**state["val_curve"])
            self.step = state["step"]
            self.seconds = state["seconds"]
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UsageError(
                "--resume", f"'{self.checkpoint_path}' does not fit this program: {error}"
            ) from error
        self._trim_log()

    def _advance(self, log: Any, bar: ProgressBar) -> None:
        started = time.perf_counter()
        self._set_learning_rates()
        loss = self._accumulate_gradients()
        norms = self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # Reading the loss waits for the device, so it is done only where it is reported.
        if self.step % self.config.log_every and self.step != self.config.steps:
            self.seconds += time.perf_counter() - started
            return
        value = loss.item()
        self.seconds += time.perf_counter() - started
        if not math.isfinite(value):
            raise TrainingDiverged(f"the loss is {value} at step {self.step}")
        self.train_curve.add(self.tokens, value)
        speed = self.tokens / self.seconds
        self._log(
            log,
            "step",
            loss=value,
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=round(self.seconds, 3),
            **{f"grad_norm_{name}": norm.item() for name, norm in norms.items()},
        )
        bar.update(self.step, f"loss {value:.3f}  {speed / 1000:.1f} kB/s")

    def _accumulate_gradients(self) -> Tensor:
        """Backward over the micro-batches of one step; returns the mean loss, on the device."""
        config = self.config
        size = config.batch // config.accumulate
        total = torch.zeros((), device=self.device)
        for micro in range(config.accumulate):
            inputs, targets = self.sampler.batch(self.step * config.batch + micro * size, size)
            with self._autocast():
                loss, balance = self.model.loss(inputs.to(self.device), targets.to(self.device))
                objective = loss + self.model_config.balance_loss * balance
            (objective / config.accumulate).backward()
            total += loss.detach() / config.accumulate
        return total

    def _clip_gradients(self) -> dict[str, Tensor]:
        """Clips the network and the table, each by the norm of its own gradients; returns these."""
        network: list[Tensor] = []
        table: list[Tensor] = []
        for group in self.optimizer.param_groups:
            (table if group["name"] == "memory" else network).extend(group["params"])
        norms = {"network": nn.utils.clip_grad_norm_(network, self.config.clip)}
        if table:
            norms["table"] = nn.utils.clip_grad_norm_(table, self.config.table_clip)
        return norms

    def _set_learning_rates(self) -> None:
        config = self.config
        rate = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * um.optim.value_lr_factor(
                self.step, times=group["value_lr_multiplier"], max_steps=config.steps
            )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def _validate(self, log: Any, bar: ProgressBar) -> None:
        loss = self.evaluate()
        self.val_curve.add(self.tokens, loss)
        self._log(log, "validation", loss=loss)
        if not self.quiet:
            bar.write(
                f"{self.model_config.kind:>11}  step {self.step:>6}  {self.tokens:>12,} bytes  "
                f"validation {loss:.4f} nats/byte"
            )

    def _description(self) -> dict[str, Any]:
        return {
            **self._identity(),
            "parameters": dataclasses.asdict(self.counts),
            "device": str(self.device),
            "torch": torch.__version__,
        }

    def _identity(self) -> dict[str, Any]:
        return _identity(self.model_config, self.config, self.corpus_digest)

    def _open_log(self) -> Any:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.step == 0:
                # Before the log goes, so that no later --resume finds another run's checkpoint.
                self.checkpoint_path.unlink(missing_ok=True)
            return open(self.out / LOG_NAME, "a" if self.step else "w", encoding="utf-8")
        except OSError as error:
            raise UsageError("--out", f"cannot write to '{self.out}': {error.strerror}") from error

    def _log(self, log: Any, event: str, **fields: Any) -> None:
        record = {"event": event, "step": self.step, "tokens": self.tokens, **fields}
        try:
            print(_json_line(record), file=log, flush=True)
        except OSError as error:
            raise UsageError("--out", f"cannot write the log: {error.strerror}") from error

    def _trim_log(self) -> None:
        """Drops what an interrupted run logged after its last checkpoint, and damaged lines."""
        path = self.out / LOG_NAME
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UsageError("--out", f"cannot read '{path}': {error.strerror}") from error
        records = (_parse_line(line) for line in lines)
        kept = [_json_line(r) + "\n" for r in records if r is not None and r["step"] <= self.step]
        try:
            remove_stale_temporaries(path)
            write_atomically(path, lambda file: file.write("".join(kept).encode()))
        except OSError as error:
            raise UsageError("--out", f"cannot write '{path}': {error.strerror}") from error


def _json_line(record: dict[str, Any]) -> str:
    """``record`` as JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
    )


def _parse_line(line: str) -> dict[str, Any] | None:
    """A record of the log; None for a damaged line, one without an integer step included."""
    try:
        record = json.loads(line)
    # Python refuses numbers of thousands of digits and deep nesting each with its own error.
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def check_checkpoint(
    out: Path, model_config: ModelConfig, train_config: TrainConfig, corpus: Corpus
) -> None:
    """Raises UsageError where the checkpoint in ``out`` is damaged or one of another run.

    ``Trainer.resume`` does too; this builds no model, and can look before anything is trained.
    """
    state = load_checkpoint(out / CHECKPOINT_NAME)
    _check_identity(state["identity"], _identity(model_config, train_config, corpus.sha256))


def _identity(model: ModelConfig, train: TrainConfig, data_sha256: str) -> dict[str, Any]:
    """All that must be equal for a continuation to be one."""
    return {
        "model": dataclasses.asdict(model),
        "train": dataclasses.asdict(train),
        "data_sha256": data_sha256,
    }


def _check_identity(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    if saved["data_sha256"] != mine["data_sha256"]:
        raise UsageError(
            "--data", "is not the text that the checkpoint was trained on (its digest differs)"
        )
    for part in ("model", "train"):
        for name, value in mine[part].items():
            old = saved[part].get(name)
            if old != value and name not in FREE_ON_RESUME:
                option = "--" + name.replace("_", "-")
                reason = " (the learning rate's schedule depends on it)" * (name == "steps")
                raise UsageError(
                    option,
                    f"the checkpoint was written with {old}, this run says {value}{reason}",
                )


def _build(config: ModelConfig, device: torch.device) -> ByteLM:
    try:
        return ByteLM(config).to(device)
    except (RuntimeError, MemoryError) as error:
        # The CPU's allocator has no type of its own for this, the GPU's has.
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):
            raise
        total = counts_of(config).total
        raise UsageError(
            "model options", f"no memory for a {config.kind} model of {total:,} parameters"
        ) from error


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step ``step`` (from 0): linear warm-up, then a cosine to ``final_lr_ratio * lr``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine)
