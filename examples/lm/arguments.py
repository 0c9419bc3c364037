"""Command-line options of ``train`` and ``pack``, for ``ultramem`` and for ``python -m``."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ultramem_cuda import _library

from .config import KINDS, Kind, ModelConfig, TrainConfig
from .data import ARCHIVE_SUFFIX, Corpus, load_corpus
from .errors import UsageError
from .matching import counts_of, deviations, matched
from .presets import PRESETS
from .train import CHECKPOINT_NAME, RunResult, Trainer, check_checkpoint

MODEL_HELP = {
    "d_model": "hidden size",
    "num_layers": "blocks",
    "attention_heads": "attention heads",
    "context": "bytes in a window",
    "ffn_inner": "SwiGLU width of the dense kind, which sets the active parameters of all",
    "experts_per_token": "moe: experts a byte is sent to",
    "expert_inner": "moe: SwiGLU width of one expert (default: one that matches active parameters)",
    "balance_loss": "moe: weight of the load balance loss",
    "num_keys": "memory: keys per side; a layer has their square in slots",
    "key_dim": "memory: width of a key",
    "memory_heads": "memory: heads",
    "topk": "memory: slots a byte reads, per head",
    "pre_value_dim": "memory: width of a pre-value (ultramem_v2)",
    "value_dim": "memory: width of a value (ultramem_v2; pkm gets the width that matches totals)",
    "memory_init": "memory: initialisation, 'release' or 'paper'",
}
TRAIN_HELP = {
    "steps": "optimizer steps",
    "batch": "windows in a step",
    "accumulate": "micro-batches that a step is cut into",
    "lr": "peak learning rate of the network",
    "final_lr_ratio": "learning rate at the end, as a fraction of the peak",
    "warmup": "steps of linear warm-up",
    "weight_decay": "AdamW's decay of the network's matrices",
    "table_lr_multiplier": "learning rate of the tables over the network's, at the start",
    "clip": "gradient norm at which the network is clipped",
    "table_clip": "gradient norm at which the tables are clipped",
    "precision": "'bf16' (autocast) or 'fp32'; bf16 on a GPU unless given",
    "seed": "of weights and data order",
    "val_fraction": "share of files held out",
    "val_windows": "held-out windows evaluated",
    "eval_every": "steps between evaluations",
    "checkpoint_every": "steps between checkpoints",
    "log_every": "steps between lines of the log",
}
MAX_SEED = 2**63 - 1
# Of every other integer: products of two still fit the 64 bits that torch counts in.
MAX_INTEGER = 2**31 - 1
POSITIVE = frozenset(
    {*MODEL_HELP, *TRAIN_HELP}
    - {"balance_loss", "weight_decay", "final_lr_ratio", "warmup", "seed"}
)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the text comes from."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="a file, a directory or a packed archive (.npz); default: the source of the standard "
        "library of this Python",
    )
    parser.add_argument(
        "--pattern",
        default="*.py",
        metavar="GLOB",
        help="names of the files taken from a directory (default: %(default)s)",
    )


def add_device_argument(
    parser: argparse.ArgumentParser,
    text: str = "cpu, cuda or cuda:N (default: a GPU if there is one)",
) -> None:
    """Where to compute."""
    parser.add_argument("--device", metavar="NAME", help=text)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that ``train`` takes."""
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=[*KINDS, "all"],
        default=["ultramem_v2"],
        help="kinds of blocks to train, one after the other (default: ultramem_v2)",
    )
    add_data_arguments(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="sizes that the options below change (default: small on a GPU, tiny without)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="a folder KIND-seedN is made in it for log and checkpoint (default: %(default)s)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="discard a run found in --out")
    parser.add_argument("--quiet", action="store_true", help="print the summary only")
    _add_field_options(parser.add_argument_group("model"), ModelConfig, MODEL_HELP)
    _add_field_options(parser.add_argument_group("training"), TrainConfig, TRAIN_HELP)


def add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that ``pack`` takes."""
    parser.add_argument("archive", type=Path, help=f"file to write, NAME{ARCHIVE_SUFFIX}")
    add_data_arguments(parser)


def _add_field_options(group: Any, config: type, descriptions: dict[str, str]) -> None:
    types = get_type_hints(config)
    for name, text in descriptions.items():
        kind = types[name] if types[name] in (int, float) else str
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            metavar={int: "N", float: "X", str: "NAME"}[kind],
            help=text,
        )


def resolve_device(name: str | None) -> torch.device:
    """The device asked for; without a name, a GPU where machine and build can use one.

    Raises:
        UsageError: it is not one, or this machine does not have it.
    """
    if name is None:
        usable = torch.cuda.is_available() and _library.has_cuda_kernels()
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            "--device", f"'{name}' is not a device; give cpu, cuda or cuda:N"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError("--device", f"'{name}' is not supported; give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError("--device", f"'{name}': this machine has {_cuda_devices()}")
    return device


def _cuda_devices() -> str:
    count = torch.cuda.device_count()
    return f"{count} CUDA device{'' if count == 1 else 's'} that torch can use"


def configurations(
    args: argparse.Namespace, device: torch.device
) -> list[tuple[ModelConfig, TrainConfig]]:
    """One matched model and its training for each kind asked for."""
    preset = PRESETS[args.preset or ("small" if device.type == "cuda" else "tiny")]
    _check_options(args)
    train = dataclasses.replace(preset.train, **_given(args, TRAIN_HELP))
    if args.precision is None and device.type == "cuda":
        train = dataclasses.replace(train, precision="bf16")
    base = dataclasses.replace(preset.model, **_given(args, MODEL_HELP))
    kinds = KINDS if "all" in args.kind else tuple(dict.fromkeys(args.kind))
    if "pkm" in kinds and base.memory_init == "paper":
        raise UsageError(
            "--memory-init", "'paper' is derived for scores without a softmax, which 'pkm' has"
        )
    keep_width = args.expert_inner is not None
    try:
        models = [
            matched(dataclasses.replace(base, kind=kind), keep_expert_inner=keep_width)
            for kind in kinds
        ]
        for model in models:
            counts_of(model)
    except ValueError as error:
        # Configurations name the field first, as the options do.
        raise UsageError("model options", str(error)) from error
    except (RuntimeError, OverflowError, MemoryError) as error:
        # Even without storage, a tensor's size in bytes has to fit 64 bits.
        raise UsageError("model options", "the sizes are beyond what torch can hold") from error
    for line in deviations(base, models):
        print(f"note: {line}")
    return [(model, train) for model in models]


def require_kernels(kinds: Iterable[Kind], device: torch.device) -> None:
    """Raises UsageError where a kind with a memory cannot run on ``device`` in this build."""
    wanted = [kind for kind in kinds if kind in ("pkm", "ultramem_v2")]
    if not wanted:
        return
    if not _library.is_loaded():
        raise UsageError("--kind", f"'{wanted[0]}' needs operators, but {_library.load_error()}")
    if device.type == "cuda" and not _library.has_cuda_kernels():
        raise UsageError(
            "--device", f"'{device}': this build has no CUDA kernels, which '{wanted[0]}' needs"
        )


def _given(args: argparse.Namespace, names: dict[str, str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _check_options(args: argparse.Namespace) -> None:
    choices = {"precision": ("fp32", "bf16"), "memory_init": ("release", "paper")}
    for name, value in _given(args, {**MODEL_HELP, **TRAIN_HELP}).items():
        option = "--" + name.replace("_", "-")
        limit = MAX_SEED if name == "seed" else MAX_INTEGER
        if name in choices:
            if value not in choices[name]:
                raise UsageError(
                    option, f"must be one of {', '.join(choices[name])}, got '{value}'"
                )
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(option, f"must be a finite number, got {value}")
        elif isinstance(value, int) and value > limit:
            raise UsageError(option, f"must be in 0..{limit}, got {value}")
        elif value < 0 or (value == 0 and name in POSITIVE):
            raise UsageError(
                option, f"must be {'positive' if name in POSITIVE else '>= 0'}, got {value}"
            )
    if args.val_fraction is not None and args.val_fraction >= 1:
        raise UsageError("--val-fraction", f"must be below 1, got {args.val_fraction}")


def run_train(args: argparse.Namespace) -> int:
    """Trains what ``args`` asks for and prints a table of the results; returns the exit code."""
    device = resolve_device(args.device)
    runs = configurations(args, device)
    require_kernels((model.kind for model, _ in runs), device)
    corpus = load_corpus(args.data, args.pattern)
    print(describe_corpus(corpus))
    folders = [args.out / f"{model.kind}-seed{train.seed}" for model, train in runs]
    held = _holding_a_run(folders)
    if held and not (args.resume or args.overwrite):
        raise UsageError(
            "--out", f"'{held[0]}' already holds a run; give --resume to continue it or --overwrite"
        )
    if args.resume and not held:
        path = folders[0] / CHECKPOINT_NAME
        raise UsageError("--resume", f"there is no checkpoint at '{path}'")
    if args.resume and len(runs) > 1:
        for (model_config, train_config), out in zip(runs, folders, strict=True):
            if out in held:
                check_checkpoint(out, model_config, train_config, corpus)
    _train_all(runs, folders, held, corpus, device, args)
    return 0


def _train_all(
    runs: Sequence[tuple[ModelConfig, TrainConfig]],
    folders: Sequence[Path],
    held: Sequence[Path],
    corpus: Corpus,
    device: torch.device,
    args: argparse.Namespace,
) -> None:
    results: list[RunResult] = []
    try:
        for (model_config, train_config), out in zip(runs, folders, strict=True):
            trainer = Trainer(
                model_config, train_config, corpus, out=out, device=device, quiet=args.quiet
            )
            if args.overwrite and not results:
                # All at once, or a --resume after an interruption would take up the later kinds'.
                _discard(held)
            # An interrupted run never came to the kinds without a checkpoint: they start fresh.
            if args.resume and out in held:
                trainer.resume()
            results.append(trainer.run())
    finally:
        # Also where a later kind failed: the finished ones took their time.
        if results:
            print(results_table(results))


def _holding_a_run(folders: Iterable[Path]) -> list[Path]:
    """Those of ``folders`` with a checkpoint; all must be directories that could hold one."""
    held = []
    for out in folders:
        try:
            if out.exists() and not out.is_dir():
                raise UsageError("--out", f"'{out}' is not a directory")
            if (out / CHECKPOINT_NAME).exists():
                held.append(out)
        except OSError as error:
            raise UsageError("--out", f"cannot read '{out}': {error.strerror}") from error
    return held


def _discard(folders: Iterable[Path]) -> None:
    for out in folders:
        try:
            (out / CHECKPOINT_NAME).unlink(missing_ok=True)
        except OSError as error:
            raise UsageError("--out", f"cannot clear '{out}': {error.strerror}") from error


def run_pack(args: argparse.Namespace) -> int:
    """Writes a packed archive and prints its digest; returns the exit code."""
    if args.archive.suffix != ARCHIVE_SUFFIX:
        raise UsageError("archive", f"must end in {ARCHIVE_SUFFIX}, got '{args.archive}'")
    corpus = load_corpus(args.data, args.pattern)
    try:
        corpus.save(args.archive)
    except OSError as error:
        raise UsageError("archive", f"cannot write '{args.archive}': {error.strerror}") from error
    print(describe_corpus(corpus))
    print(f"packed into {args.archive} ({args.archive.stat().st_size:,} bytes)")
    return 0


def describe_corpus(corpus: Corpus) -> str:
    """One line: how much text, from where, and its digest."""
    return (
        f"text: {len(corpus.paths):,} files, {len(corpus.data):,} bytes from {corpus.origin}\n"
        f"sha256 {corpus.sha256}"
    )


def results_table(results: Sequence[RunResult]) -> str:
    """Parameters and final validation loss of each run."""
    columns = f"{'active':>12} {'total':>13} {'bytes seen':>13} {'nats/byte':>10} {'kB/s':>7}"
    lines = [f"{'kind':<12} {columns}"]
    for result in results:
        tokens = result.validation.tokens[-1]
        speed = tokens / result.seconds / 1000 if result.seconds else 0.0
        lines.append(
            f"{result.model_config.kind:<12} {result.counts.active:>12,} "
            f"{result.counts.total:>13,} {tokens:>13,} {result.final_loss:>10.4f} {speed:>7.1f}"
        )
    return "\n".join(lines)
