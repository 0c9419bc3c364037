"""Checkpoints of a training run on torch.distributed.checkpoint."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._version import __version__
from ..table import MemoryTable, write_scaled
from . import _optimizer
from ._directory import Ranks, is_leftover, write_directory, write_file
from ._model import check_layers, describe_layers, model_tensors, parameter_names, tables

if TYPE_CHECKING:
    import torch.distributed as dist

FORMAT_VERSION = 1
_MANIFEST = "ultramem.json"
_MODEL = "model."


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What :func:`load` found beside the tensors.

    Attributes:
        path: the directory.
        step: as given to :func:`save`.
        world_size: processes that saved it.
        extra: what the process of this rank gave to :func:`save`; empty for ranks that there were
            not, for which :func:`read_extra` reads that of another.
    """

    path: Path
    step: int | None
    world_size: int
    extra: dict[str, Any]


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    step: int | None = None,
    extra: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Save a model, and the state of its optimizers, as the directory ``path``.

    Where torch.distributed is set up, every process calls this with its part of the model, and
    the file system must be one that all of them see. Each writes its own shards, in pieces.
    Tensors that all hold are written once. The directory appears when all is on the disk: a process
    that is killed before leaves the checkpoints that there were as they are, and beside them a
    hidden directory, which the next save of that name, or with ``keep_last``, removes.

    Gradients, and the factors of deferred tables, are not saved: save between steps.

    Args:
        path: must not exist.
        model: any module; names are those without DDP, torch.compile and activation checkpointing.
        optimizer: one, several that share no parameter, or none.
        step: kept for :func:`load`.
        extra: what else is to be kept, this process's own: the state of the data, of schedules and
            of random generators, say. Tensors, numbers, strings, lists and dictionaries.
        keep_last: afterwards, remove checkpoints beside ``path`` but the newest so many, and what
            killed saves have left there. The directory must then be this run's alone.
        process_group: the processes that save, by default all.

    Returns:
        The path, absolute.

    Raises:
        FileExistsError: there is something at ``path``.
        TypeError, ValueError: naming the argument and what is wrong with it.
        RuntimeError: another process failed.
    """
    ranks = Ranks(process_group)
    target = Path(os.path.abspath(path))
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last: must be at least 1, got {keep_last}")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise TypeError(f"step: must be an int or None, got {step!r}")

    def prepare() -> tuple[bytes | None, dict[str, Tensor], list[dict[str, Any]]]:
        found = model_tensors(model)
        tensors = {_MODEL + name: tensor for name, (_, tensor) in found.items()}
        states, records = _optimizer.describe(_as_list(optimizer), parameter_names(model))
        return _packed(extra), tensors | states, records

    own_extra, tensors, records = ranks.each(prepare)
    manifest = {
        "format_version": FORMAT_VERSION,
        "ultramem_cuda": __version__,
        "torch": torch.__version__,
        "step": step,
        "world_size": ranks.size,
        "layers": describe_layers(model),
        "optimizers": records,
    }

    def write(directory: Path) -> None:
        _write_tensors(directory, tensors, ranks)
        if own_extra is not None:
            write_file(directory / _extra_name(ranks.rank), own_extra)

    def finish(directory: Path) -> None:
        content = json.dumps({**manifest, "saved_at": time.time()}, indent=1)
        write_file(directory / _MANIFEST, content.encode())

    write_directory(target, ranks, write, finish)
    if keep_last is not None:
        ranks.first(lambda: _prune(target.parent, keep_last))
    return target


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    check_config: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> Checkpoint:
    """Load what :func:`save` wrote into a model, and into its optimizers.

    Parameters keep their sharding, device and dtype, which need not be those of the run that saved
    them, nor need the number of processes. A process holds its own shards and one piece of the
    checkpoint, never a whole table that is sharded. A table with ``grad_mode="dense"`` takes the
    effective weights of one with deferred gradients, and the other way round.

    The tensors of the model are written in place. Everything that can be known to be wrong raises
    before; a file that turns out to be damaged leaves the model with some of the tensors loaded.

    The files hold pickled Python objects: load checkpoints that you trust.

    Args:
        path: a directory that :func:`save` made; see :func:`latest`.
        model: with the same names and shapes.
        optimizer: as when it was saved, in kind and in the parameters of each group; or None to
            leave the states unread. Options such as learning rates become those that were saved.
        check_config: raise where a memory layer would read other rows or use them otherwise.
        process_group: the processes that load, by default all.

    Raises:
        FileNotFoundError: no complete checkpoint is there.
        ValueError: a newer format; a configuration, a name, a shape, an optimizer or one of its
            groups is another than was saved.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint import load as load_tensors

    ranks = Ranks(process_group)
    source = Path(os.path.abspath(path))
    plan = ranks.each(lambda: _plan(source, model, _as_list(optimizer), check_config))

    def run() -> None:
        load_tensors(
            plan.read_into(),
            storage_reader=FileSystemReader(source),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        )

    _call(run)
    plan.apply(model)
    manifest = plan.manifest
    return Checkpoint(
        source, manifest["step"], manifest["world_size"], read_extra(source, ranks.rank)
    )


@dataclasses.dataclass
class _LoadPlan:
    """What a checkpoint is read into, and what is to be done then; known to fit.

    Attributes:
        names: names in the model's state dict of what is read, by those in the checkpoint.
        tensors: what is read into, by names in the checkpoint.
        folds: multiply the weights of dense tables by scales that were read.
    """

    manifest: dict[str, Any]
    names: dict[str, str]
    tensors: dict[str, Tensor]
    folds: list[Callable[[], None]]
    optimizers: list[_optimizer.Restoration]

    def read_into(self) -> dict[str, Tensor]:
        targets = dict(self.tensors)
        for restoration in self.optimizers:
            targets |= restoration.targets
        return targets

    def apply(self, model: nn.Module) -> None:
        for fold in self.folds:
            fold()
        # Layers and tables have more to do than to copy, which they do in place here.
        model.load_state_dict(
            {full: self.tensors[name] for name, full in self.names.items() if name in self.tensors}
        )
        for restoration in self.optimizers:
            restoration.apply()


def _plan(
    source: Path, model: nn.Module, optimizers: Sequence[Optimizer], check_config: bool
) -> _LoadPlan:
    manifest = _read_manifest(source)
    if check_config:
        check_layers(model, manifest["layers"])
    saved = _saved_layout(source)
    mine = {_MODEL + name: entry for name, entry in model_tensors(model).items()}
    plan = _LoadPlan(
        manifest,
        names={name: full for name, (full, _) in mine.items()},
        tensors={name: tensor for name, (_, tensor) in mine.items()},
        folds=[],
        optimizers=[],
    )
    _add_scales(model, plan, saved)
    _check_names(plan.tensors, saved)
    if optimizers:
        plan.optimizers = _optimizer.restorations(
            optimizers, parameter_names(model), manifest["optimizers"], saved
        )
    return plan


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint in ``directory`` that was saved last, or None.

    By the clock and not by the step: a run that went back to an earlier checkpoint goes on from
    what it saved since.
    """
    found = _complete(Path(os.path.abspath(directory)))
    return found[-1] if found else None


def read_extra(path: str | os.PathLike[str], rank: int) -> dict[str, Any]:
    """What the process of that rank gave :func:`save` as ``extra``; empty where it gave nothing.

    Tensors are on the CPU.

    Raises:
        FileNotFoundError: no complete checkpoint is there.
    """
    source = Path(os.path.abspath(path))
    _read_manifest(source)
    file = source / _extra_name(rank)
    if not file.exists():
        return {}
    return torch.load(file, map_location="cpu", weights_only=True)


def _as_list(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def _extra_name(rank: int) -> str:
    return f"extra-{rank:05d}.pt"


def _packed(extra: Mapping[str, Any] | None) -> bytes | None:
    """Serialised, and known to be loadable."""
    if not extra:
        return None
    buffer = io.BytesIO()
    torch.save(dict(extra), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise TypeError(
            "extra: must hold tensors, numbers, strings, lists and dictionaries alone, which "
            f"torch.load(weights_only=True) reads: {error}"
        ) from error
    return buffer.getvalue()


def _call(work: Callable[[], None]) -> None:
    """Run a save or load of torch.distributed.checkpoint, and raise what went wrong in it."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # That there is one process alone is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            work()
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"rank {rank} failed: {type(failure).__name__}: {failure}") from error


def _write_tensors(directory: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import save as save_tensors

    from ._pieces import PiecewiseSavePlanner

    def run() -> None:
        save_tensors(
            tensors,
            storage_writer=FileSystemWriter(directory, sync_files=True),
            planner=PiecewiseSavePlanner(),
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        )

    _call(run)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = (path / _MANIFEST).read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"path: no complete checkpoint of ultramem_cuda at {path}, where {_MANIFEST} is missing"
        ) from None
    manifest = json.loads(content)
    version = manifest["format_version"]
    if version > FORMAT_VERSION:
        raise ValueError(
            f"path: {path} is in format {version}, written by ultramem_cuda "
            f"{manifest['ultramem_cuda']}; this is {__version__}, which reads formats up to "
            f"{FORMAT_VERSION}"
        )
    return manifest


def _saved_layout(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _add_scales(model: nn.Module, plan: _LoadPlan, saved: Mapping[str, Any]) -> None:
    """Reconcile dense tables with deferred ones.

    A deferred table takes weights that were saved without a scale for those of scale one, in its
    load_state_dict. A dense one has nothing to read a scale into: it is read all the same, and the
    weights are multiplied by it in place.
    """
    for prefix, table in tables(model).items():
        name = f"{_MODEL}{prefix}scale"
        if table.scale is not None and name not in saved:
            del plan.tensors[name]
        elif table.scale is None and name in saved:
            scale = plan.tensors[name] = torch.ones(2, dtype=torch.float64)

            def fold(table: MemoryTable = table, scale: Tensor = scale) -> None:
                for parameter, factor in zip((table.values, table.pre_values), scale, strict=True):
                    if parameter is not None:
                        write_scaled(parameter, parameter, factor)

            plan.folds.append(fold)


def _check_names(
    targets: Mapping[str, Tensor], saved: Mapping[str, tuple[torch.Size, Any]]
) -> None:
    theirs = {name for name in saved if name.startswith(_MODEL)}
    for names, where in (
        (targets.keys() - theirs, "the model alone, not in the checkpoint"),
        (theirs - targets.keys(), "the checkpoint alone, not in the model"),
    ):
        if names:
            shown = ", ".join(sorted(name.removeprefix(_MODEL) for name in names)[:5])
            raise ValueError(f"model: {len(names)} tensors are in {where}: {shown}")
    for name, tensor in targets.items():
        if tensor.shape != saved[name][0]:
            raise ValueError(
                f"model: {name.removeprefix(_MODEL)} has shape {list(tensor.shape)}, in the "
                f"checkpoint {list(saved[name][0])}"
            )


def _complete(directory: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    found = []
    for path in _children(directory):
        if is_leftover(path):
            continue
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
        except (FileNotFoundError, NotADirectoryError):
            continue
        found.append((manifest["saved_at"], path))
    return [path for _, path in sorted(found)]


def _children(directory: Path) -> Iterable[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _prune(directory: Path, keep: int) -> None:
    for path in _children(directory):
        if is_leftover(path):
            shutil.rmtree(path)
    for path in _complete(directory)[:-keep]:
        # Without its manifest a checkpoint that is half removed is not taken for a whole one.
        (path / _MANIFEST).unlink()
        shutil.rmtree(path)
