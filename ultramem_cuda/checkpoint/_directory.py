"""Directories that exist whole or not at all, written by one process or by several."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_INCOMPLETE = ".incomplete"


class Ranks:
    """The processes that write or read together: those of a group, or this one alone.

    A step that fails on one of them raises on all, so that none waits for another in vain.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        if group is not None and not self.distributed:
            raise ValueError("process_group: must be None where torch.distributed is not set up")
        self.group = group
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1
        if self.rank < 0:
            raise ValueError("process_group: this process is not in it")

    def each(self, work: Callable[[], T]) -> T:
        """work(), in every process; returns when all have finished.

        Raises:
            What work raised here, or RuntimeError for what it raised elsewhere.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        if self.distributed:
            messages: list[str | None] = [None] * self.size
            dist.all_gather_object(messages, _described(error), group=self.group)
        if error is not None:
            raise error
        if self.distributed:
            for rank, message in enumerate(messages):
                if message is not None:
                    raise RuntimeError(f"rank {rank} failed: {message}")
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], None]) -> None:
        """work() in the first process, while the others wait; raises as :meth:`each` does."""
        self.each(work if self.rank == 0 else lambda: None)


def _described(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def write_directory(
    path: Path,
    ranks: Ranks,
    write: Callable[[Path], None],
    finish: Callable[[Path], None],
) -> None:
    """Make the directory ``path``, all of it or nothing.

    It is written under another name beside ``path`` and renamed at the end, after what was written
    has reached the disk. A process that dies on the way leaves that other directory behind, which
    the next attempt removes.

    Args:
        path: must not exist; its parent is made.
        ranks: all of them call this.
        write: called with the directory to write to, in every process. Files must be synced.
        finish: called in the first process when all have written.

    Raises:
        FileExistsError: there is something at ``path``.
    """
    unfinished = path.with_name(f".{path.name}{_INCOMPLETE}")

    def begin() -> None:
        if path.exists():
            raise FileExistsError(f"path: there is something at {path}; nothing is overwritten")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)

    def commit() -> None:
        finish(unfinished)
        sync(unfinished)
        unfinished.rename(path)
        sync(path.parent)

    ranks.first(begin)
    try:
        ranks.each(lambda: write(unfinished))
        ranks.first(commit)
    except Exception:
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def is_leftover(path: Path) -> bool:
    """It is what an interrupted :func:`write_directory` has left."""
    return path.name.startswith(".") and path.name.endswith(_INCOMPLETE)


def write_file(path: Path, content: bytes) -> None:
    """A file of that content, on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Names in a directory reach the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
