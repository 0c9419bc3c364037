"""Files that are either the old one or the new one, never half of the new one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces ``path`` by what ``write`` puts into the file object it is given.

    The bytes go to a temporary file in the same directory (a rename is atomic only within one file
    system), are flushed to the disk, and only then take the name. Whatever goes wrong, a full disk
    included, ``path`` is left as it was, the temporary file is removed and the error is raised.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _flush_directory(path.parent)


def remove_stale_temporaries(path: Path) -> None:
    """Removes what ``write_atomically(path, ...)`` left behind in processes that were killed."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.tmp")
    # Tidying up: an entry that cannot be removed is no reason not to write.
    with contextlib.suppress(OSError):
        for entry in sorted(path.parent.iterdir()):
            match = pattern.fullmatch(entry.name)
            if match is not None and not _is_running(int(match[1])):
                entry.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It exists and belongs to someone else.
        return True
    return True


def _flush_directory(directory: Path) -> None:
    """Makes the rename itself survive a power cut, where the platform can open a directory."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems refuse to flush a directory; the file itself is on disk.
        pass
    finally:
        os.close(descriptor)
