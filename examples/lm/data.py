"""Text for the byte-level model: reading, packing, splitting and drawing windows.

A corpus is a list of files. Whole files are held out for validation, chosen by a hash of their
relative path, so that the split does not depend on the machine, the order of a directory or which
other files are present.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .errors import UsageError
from .files import write_atomically

Bytes = npt.NDArray[np.uint8]

ARCHIVE_SUFFIX = ".npz"
ARCHIVE_FORMAT = 1
SEPARATOR = b"\0"
SKIPPED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Files in the order of their relative paths.

    ``data`` [total bytes] holds them one after the other; file i is
    ``data[offsets[i]:offsets[i + 1]]`` and was found as ``paths[i]`` (with forward slashes).
    """

    paths: tuple[str, ...]
    data: Bytes
    offsets: npt.NDArray[np.int64]
    origin: str

    @property
    def sha256(self) -> str:
        """Hex digest of paths and contents: equal on two machines iff they hold the same text."""
        digest = hashlib.sha256()
        for index, path in enumerate(self.paths):
            content = self.document(index).tobytes()
            encoded = os.fsencode(path)
            digest.update(f"{len(encoded)} {len(content)}\n".encode() + encoded)
            digest.update(content)
        return digest.hexdigest()

    def document(self, index: int) -> Bytes:
        """The bytes of one file."""
        return self.data[self.offsets[index] : self.offsets[index + 1]]

    def split(self, val_fraction: float) -> tuple[Bytes, Bytes]:
        """Training and validation streams, each a concatenation of whole files.

        A file is held out where the hash of its relative path says so. A corpus of one file has no
        files to hold out: its last ``val_fraction`` is taken instead.
        """
        if len(self.paths) == 1:
            cut = round(len(self.data) * (1.0 - val_fraction))
            return self.data[:cut], self.data[cut:]
        held_out = [is_held_out(path, val_fraction) for path in self.paths]
        documents = [self.document(index).tobytes() for index in range(len(self.paths))]
        train = _join(text for text, held in zip(documents, held_out, strict=True) if not held)
        val = _join(text for text, held in zip(documents, held_out, strict=True) if held)
        return train, val

    def save(self, path: Path) -> None:
        """Writes the corpus as one compressed archive (``.npz``), atomically."""
        write_atomically(
            path,
            lambda file: np.savez_compressed(
                file,
                format=np.int64(ARCHIVE_FORMAT),
                paths=np.frombuffer(os.fsencode("\0".join(self.paths)), dtype=np.uint8),
                offsets=self.offsets,
                data=self.data,
                sha256=np.frombuffer(self.sha256.encode(), dtype=np.uint8),
            ),
        )


def is_held_out(path: str, val_fraction: float) -> bool:
    """Whether the file at this relative path belongs to the validation set."""
    digest = hashlib.sha256(os.fsencode(path)).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


def stdlib_directory() -> Path:
    """Where the running interpreter keeps the source of its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_corpus(source: Path | None = None, pattern: str = "*.py") -> Corpus:
    """Reads a file, a directory or a packed archive; without ``source``, the standard library.

    From a directory, files whose name matches ``pattern`` are taken, except below site-packages.
    Empty files, files with a NUL byte (they are not text, and NUL separates files) and repetitions
    of an earlier file (they would leak held-out text into training) are left out.

    Raises:
        UsageError: nothing can be read there, it holds no text, or the archive is damaged.
    """
    root = stdlib_directory() if source is None else source
    try:
        if root.is_dir():
            return _from_documents(_read_directory(root, pattern), str(root))
        if root.suffix == ARCHIVE_SUFFIX:
            return _read_archive(root)
        return _from_documents([(root.name, root.read_bytes())], str(root))
    except OSError as error:
        name = error.filename or root
        raise UsageError("--data", f"cannot read '{name}': {error.strerror or error}") from error


def _read_directory(root: Path, pattern: str) -> Iterable[tuple[str, bytes]]:
    # os.walk passes over a directory it may not list unless told otherwise.
    def refuse(error: OSError) -> None:
        raise error

    found: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in SKIPPED_DIRECTORIES]
        for name in names:
            path = Path(folder, name)
            if fnmatch.fnmatch(name, pattern) and path.is_file():
                found.append((path.relative_to(root).as_posix(), path))
    found.sort()
    for relative, path in found:
        yield relative, path.read_bytes()


def _from_documents(documents: Iterable[tuple[str, bytes]], origin: str) -> Corpus:
    kept: list[tuple[str, bytes]] = []
    seen: set[bytes] = set()
    for path, text in documents:
        fingerprint = hashlib.sha256(text).digest()
        if not text or SEPARATOR in text or fingerprint in seen:
            continue
        seen.add(fingerprint)
        kept.append((path, text))
    if not kept:
        raise UsageError("--data", f"no text found in '{origin}'")
    lengths = np.array([len(text) for _, text in kept], dtype=np.int64)
    return Corpus(
        paths=tuple(path for path, _ in kept),
        data=np.frombuffer(b"".join(text for _, text in kept), dtype=np.uint8),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        origin=origin,
    )


def _read_archive(path: Path) -> Corpus:
    try:
        corpus, expected = _unpack(path)
    except (OSError, UsageError):
        raise
    except Exception as error:
        # zipfile, its decompressors and numpy have a dozen types for what a damaged file does.
        raise UsageError("--data", f"'{path}' is not a packed archive or is damaged") from error
    if corpus.sha256 != expected:
        raise UsageError("--data", f"'{path}' is damaged: its content does not match its digest")
    return corpus


def _unpack(path: Path) -> tuple[Corpus, str]:
    """The corpus of an archive and the digest it claims; a bare array or a damaged file raises."""
    with np.load(path, allow_pickle=False) as archive:
        version = archive["format"]
        if version.shape or version.dtype.kind not in "iu":
            raise ValueError("format is not an integer")
        if version != ARCHIVE_FORMAT:
            raise UsageError("--data", f"'{path}' was packed in a format this version lacks")
        paths = tuple(os.fsdecode(archive["paths"].tobytes()).split("\0"))
        data, offsets = archive["data"], archive["offsets"]
        expected = archive["sha256"].tobytes().decode()
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError("data are not bytes")
    if offsets.dtype.kind not in "iu" or offsets.shape != (len(paths) + 1,):
        raise ValueError("offsets do not go with paths")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
        raise ValueError("offsets do not cut the data")
    return Corpus(paths=paths, data=data, offsets=offsets, origin=str(path)), expected


def _join(documents: Iterable[bytes]) -> Bytes:
    return np.frombuffer(b"".join(text + SEPARATOR for text in documents), dtype=np.uint8)


class WindowSampler:
    """An endless, seeded sequence of training windows, addressed by number.

    An epoch is a random permutation of the non-overlapping windows of the stream, laid out from a
    random phase. Window i depends on (seed, i) alone, so that the position in the data is one
    integer and resuming needs nothing else.
    """

    def __init__(self, stream: Bytes, context: int, seed: int) -> None:
        self.num_windows = (len(stream) - context) // context
        if self.num_windows < 1:
            raise UsageError(
                "--data", f"{len(stream)} training bytes are too few for a context of {context}"
            )
        self._stream = stream
        self._context = context
        self._seed = seed
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows from number ``first`` on: inputs and targets, int64 [count, context]."""
        starts = np.array([self._start(number) for number in range(first, first + count)])
        return _gather_windows(self._stream, starts, self._context)

    def _start(self, number: int) -> int:
        epoch, position = divmod(number, self.num_windows)
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            phase = generator.integers(self._context)
            self._starts = phase + self._context * generator.permutation(self.num_windows)
            self._epoch = epoch
        return int(self._starts[position])


def fixed_windows(stream: Bytes, context: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to ``count`` non-overlapping windows spread evenly over a stream, always the same ones.

    Returns inputs and targets, int64 [windows, context].
    """
    available = (len(stream) - 1) // context
    if available < 1:
        raise UsageError(
            "--data", f"{len(stream)} held-out bytes are too few for a context of {context}"
        )
    taken = min(count, available)
    starts = np.arange(taken, dtype=np.int64) * available // taken * context
    return _gather_windows(stream, starts, context)


def _gather_windows(
    stream: Bytes, starts: npt.NDArray[np.int64], context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    windows = torch.from_numpy(stream[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
