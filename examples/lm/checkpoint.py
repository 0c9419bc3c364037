"""Training checkpoints: one file, replaced atomically, checked when read.

A file is what ``torch.save`` wrote followed by the SHA-256 of it (32 bytes). Archive checksums do
not do: they leave out the names and offsets of the records, where a flipped bit also tells.
"""

from __future__ import annotations

import errno
import hashlib
import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from .errors import UsageError
from .files import remove_stale_temporaries, write_atomically

FORMAT = 2
DIGEST_BYTES = hashlib.sha256().digest_size


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings and containers of them) to ``path``.

    Raises:
        UsageError: the disk is full or the file cannot be written; an older checkpoint at ``path``
            is untouched.
    """
    remove_stale_temporaries(path)
    try:
        write_atomically(path, lambda file: _serialise({**state, "format": FORMAT}, file))
    except OSError as error:
        reason = "no space left on the device" if error.errno == errno.ENOSPC else str(error)
        kept = "; the previous checkpoint is intact" if path.exists() else ""
        raise UsageError("--out", f"cannot write checkpoint '{path}': {reason}{kept}") from error


def _serialise(state: dict[str, Any], file: BinaryIO) -> None:
    recorder = _Recorder(file)
    try:
        torch.save(state, cast(BinaryIO, recorder))
    except RuntimeError:
        # torch turns an error of the file object into a RuntimeError without its cause.
        if recorder.error is not None:
            raise recorder.error from None
        raise
    file.write(recorder.digest.digest())


class _Recorder:
    """A file object for ``torch.save``: hashes what is written, remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
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
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError("--resume", f"there is no checkpoint at '{path}'") from error
    except OSError as error:
        raise UsageError(
            "--resume", f"cannot read checkpoint '{path}': {error.strerror or error}"
        ) from error
    payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        raise UsageError("--resume", f"checkpoint '{path}' is damaged or not one")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UsageError("--resume", f"checkpoint '{path}' is damaged or not one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError("--resume", f"'{path}' is not a checkpoint this version can read")
    return state
