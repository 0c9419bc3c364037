"""Corpora: reading, packing, splitting, drawing windows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ultramem_cuda.examples.lm import data
from ultramem_cuda.examples.lm.errors import UsageError


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def numbered_files(root: Path, count: int) -> Path:
    return write_tree(
        root, {f"pkg{i % 7}/f{i}.py": f"text of {i}\n".encode() for i in range(count)}
    )


def test_directory_takes_matching_text_once(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "b.py": b"b",
            "a/x.py": b"x",
            "copy.py": b"b",
            "notes.txt": b"no",
            "empty.py": b"",
            "binary.py": b"a\0b",
            "site-packages/other.py": b"other",
        },
    )
    corpus = data.load_corpus(tmp_path)
    assert corpus.paths == ("a/x.py", "b.py")
    assert corpus.data.tobytes() == b"xb"
    assert data.load_corpus(tmp_path, "*.txt").data.tobytes() == b"no"


def test_default_is_the_standard_library() -> None:
    root = data.stdlib_directory()
    assert (root / "argparse.py").is_file()
    corpus = data.load_corpus()
    assert "argparse.py" in corpus.paths
    assert not any("site-packages" in path for path in corpus.paths)
    assert len(corpus.data) > 5_000_000


def test_pack_round_trip_and_digest(tmp_path: Path) -> None:
    corpus = data.load_corpus(numbered_files(tmp_path / "src", 40))
    corpus.save(tmp_path / "text.npz")
    packed = data.load_corpus(tmp_path / "text.npz")
    assert packed.paths == corpus.paths
    assert np.array_equal(packed.data, corpus.data)
    assert np.array_equal(packed.offsets, corpus.offsets)
    assert packed.sha256 == corpus.sha256

    (tmp_path / "src/pkg0/f0.py").write_bytes(b"other text\n")
    assert data.load_corpus(tmp_path / "src").sha256 != corpus.sha256


def test_digest_tells_where_one_file_ends(tmp_path: Path) -> None:
    one = data.load_corpus(write_tree(tmp_path / "one", {"a.py": b"12", "b.py": b"3"}))
    two = data.load_corpus(write_tree(tmp_path / "two", {"a.py": b"1", "b.py": b"23"}))
    assert one.data.tobytes() == two.data.tobytes()
    assert one.sha256 != two.sha256


def test_split_holds_out_whole_files_whatever_else_is_there(tmp_path: Path) -> None:
    corpus = data.load_corpus(numbered_files(tmp_path, 400))
    train, val = (stream.tobytes().split(b"\0") for stream in corpus.split(0.1))
    # Every text ends with the separator, so that the last part is empty.
    assert train.pop() == val.pop() == b""
    texts = {corpus.document(i).tobytes() for i in range(len(corpus.paths))}
    assert set(train) | set(val) == texts
    assert not set(train) & set(val)
    assert 15 <= len(val) <= 70

    for path in corpus.paths[::2]:
        os.unlink(tmp_path / path)
    _, fewer = (s.tobytes().split(b"\0") for s in data.load_corpus(tmp_path).split(0.1))
    assert set(fewer) <= set(val) | {b""}


def test_single_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(1, 101)))
    train, val = data.load_corpus(path).split(0.2)
    assert train.tobytes() + val.tobytes() == path.read_bytes()
    assert len(val) == 20


def test_unreadable_sources_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--data: cannot read '.*missing'"):
        data.load_corpus(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"^--data: no text found"):
        data.load_corpus(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"^--data: no text found"):
        data.load_corpus(tmp_path)


def test_directory_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, whom permissions do not stop.
    numbered_files(tmp_path, 3)

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"--data: cannot read .*Permission denied"):
        data.load_corpus(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "text", "other_npz"])
def test_damaged_archive(tmp_path: Path, damage: str) -> None:
    archive = tmp_path / "text.npz"
    data.load_corpus(numbered_files(tmp_path / "src", 60)).save(archive)
    content = archive.read_bytes()
    if damage == "truncate":
        archive.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = content.index(b"data.npy") + 60
        archive.write_bytes(
            content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        )
    elif damage == "text":
        archive.write_bytes(b"not an archive")
    else:
        np.savez(archive, other=np.zeros(3))
    with pytest.raises(UsageError, match=r"^--data: .*text\.npz' is"):
        data.load_corpus(archive)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": np.ones(2, np.int64)},
        {"format": np.float64(1)},
        {"data": np.uint8(7)},
        {"data": np.zeros(30, np.float32)},
        {"offsets": np.zeros(2, np.int64)},
        {"offsets": np.zeros(6, np.float64)},
        {"offsets": np.array([0, 9, 3, 12, 20, 50])},
        {"offsets": np.array([0, 1, 2, 3, 4, 2**63], np.uint64)},
        {"offsets": np.int64(0)},
        {"sha256": np.full(64, 255, np.uint8)},
    ],
    ids="".join,
)
def test_malformed_archive(tmp_path: Path, changes: dict[str, np.ndarray]) -> None:
    archive = tmp_path / "text.npz"
    data.load_corpus(numbered_files(tmp_path / "src", 5)).save(archive)
    with np.load(archive) as loaded:
        parts = dict(loaded)
    np.savez(archive, **{**parts, **changes})
    with pytest.raises(UsageError, match=r"text\.npz' is not a packed archive or is damaged"):
        data.load_corpus(archive)


def test_array_and_encrypted_archive(tmp_path: Path) -> None:
    archive = tmp_path / "text.npz"
    with open(archive, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UsageError, match="is not a packed archive or is damaged"):
        data.load_corpus(archive)

    data.load_corpus(numbered_files(tmp_path / "src", 5)).save(archive)
    content = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + flags] |= 1
    archive.write_bytes(content)
    with pytest.raises(UsageError, match="is not a packed archive or is damaged"):
        data.load_corpus(archive)


def test_unreadable_file_of_a_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered_files(tmp_path, 3)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "f1.py":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UsageError, match=r"cannot read '.*pkg1/f1\.py': Permission denied"):
        data.load_corpus(tmp_path)


def test_archive_with_other_content_than_its_digest(tmp_path: Path) -> None:
    archive = tmp_path / "text.npz"
    data.load_corpus(numbered_files(tmp_path / "src", 5)).save(archive)
    with np.load(archive) as loaded:
        parts = dict(loaded)
    parts["data"] = parts["data"][::-1]
    np.savez_compressed(archive, **parts)
    with pytest.raises(UsageError, match="does not match its digest"):
        data.load_corpus(archive)


def test_an_epoch_visits_every_window_once_and_the_next_differs() -> None:
    # Each byte pair tells its own position.
    stream = np.arange(16 * 21 + 3, dtype=np.int64).astype(np.uint16)
    sampler = data.WindowSampler(stream, context=16, seed=3)
    inputs, targets = sampler.batch(0, sampler.num_windows)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert len(inputs.unique()) == inputs.numel()
    again, _ = data.WindowSampler(stream, 16, seed=3).batch(5, 4)
    assert np.array_equal(again, inputs[5:9])
    later, _ = sampler.batch(sampler.num_windows, sampler.num_windows)
    assert len(later.unique()) == later.numel()
    assert not np.array_equal(later, inputs)
    other, _ = data.WindowSampler(stream, 16, seed=4).batch(0, sampler.num_windows)
    assert not np.array_equal(other, inputs)


@pytest.mark.parametrize("length", range(2 * 8, 2 * 8 + 9))
def test_windows_stay_within_the_stream(length: int) -> None:
    stream = np.arange(length, dtype=np.uint8)
    for seed in range(20):
        sampler = data.WindowSampler(stream, 8, seed)
        _, targets = sampler.batch(0, sampler.num_windows)
        assert targets.shape == (sampler.num_windows, 8)
        assert int(targets.max()) < length


def test_fixed_windows_are_apart_and_spread() -> None:
    stream = np.arange(200, dtype=np.uint8)
    inputs, targets = data.fixed_windows(stream, 10, 5)
    assert inputs[:, 0].tolist() == [0, 30, 70, 110, 150]
    assert np.array_equal(targets, inputs + 1)
    assert len(data.fixed_windows(stream, 10, 1000)[0]) == 19


def test_too_little_text() -> None:
    with pytest.raises(UsageError, match="training bytes are too few for a context of 64"):
        data.WindowSampler(np.zeros(100, np.uint8), 64, 0)
    with pytest.raises(UsageError, match="held-out bytes are too few"):
        data.fixed_windows(np.zeros(64, np.uint8), 64, 8)
