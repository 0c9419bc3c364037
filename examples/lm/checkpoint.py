"""Training checkpoints: one file, replaced atomically, checked when read."""

from __future__ import annotations

import errno
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from .errors import UsageError
from .files import write_atomically

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings and containers of them) to ``path``.

    Raises:
        UsageError: the disk is full or the file cannot be written; an older checkpoint at ``path``
            is untouched.
    """
    try:
        write_atomically(path, lambda file: _serialise({**state, "format": FORMAT}, file))
    except OSError as error:
        reason = "no space left on the device" if error.errno == errno.ENOSPC else str(error)
        kept = "; the previous checkpoint is intact" if path.exists() else ""
        raise UsageError("--out", f"cannot write checkpoint '{path}': {reason}{kept}") from error


def _serialise(state: dict[str, Any], file: BinaryIO) -> None:
    recorder = _WriteErrorRecorder(file)
    try:
        torch.save(state, cast(BinaryIO, recorder))
    except RuntimeError:
        # torch turns an error of the file object into a RuntimeError without its cause.
        if recorder.error is not None:
            raise recorder.error from None
        raise


class _WriteErrorRecorder:
    """A file object for ``torch.save`` that remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what ``save_checkpoint`` wrote, on the CPU.

    Raises:
        UsageError: the file is missing, unreadable, damaged or not a checkpoint of this program.
    """
    try:
        _verify_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError("--resume", f"there is no checkpoint at '{path}'") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UsageError("--resume", f"checkpoint '{path}' is damaged or not one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError("--resume", f"'{path}' is not a checkpoint this version can read")
    return state


def _verify_archive(path: Path) -> None:
    """Compares every record with its checksum, which ``torch.load`` leaves to chance."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"checksum of {damaged}")
