"""Export of weights in the layout of Hugging Face's libraries, and loading it.

Files are written here, byte by byte, since the library writes whole tensors: a table is written
in pieces, each by the process that holds it. A file is the length of a header (8 bytes,
little-endian), the header (JSON: dtype, shape and range of bytes of each tensor), and the bytes.
Files are read with the library.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn

from ..table import write_scaled
from ._directory import Ranks, write_directory, write_file
from ._model import check_layers, describe_layers, model_tensors

if TYPE_CHECKING:
    import torch.distributed as dist

FORMAT_VERSION = 1
_METADATA = "ultramem_cuda"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PIECE_BYTES = 1 << 25

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def export_safetensors(
    path: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Tensor],
    *,
    max_shard_bytes: int = 5_000_000_000,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a model's tensors as safetensors files into the directory ``path``.

    It is ``model.safetensors``, or where that would be larger than ``max_shard_bytes``
    ``model-00001-of-0000N.safetensors`` and so on with ``model.safetensors.index.json``. A tensor
    is in one file, which is larger where the tensor is. Configurations of memory layers are in the
    metadata of each file, under "ultramem_cuda", as JSON.

    Tables with deferred gradients are exported as their effective weights, rounded once, without
    their scale. Where torch.distributed is set up every process calls this; none ever holds more of
    a sharded tensor than its shard and a piece. The directory appears when it is complete, as with
    :func:`save`.

    Args:
        path: must not exist.
        model: a module, whose names are as in :func:`save`; or a state dict, in which a float64
            tensor [2] called "scale" beside "values" is taken for a table's scale.
        max_shard_bytes: of tensors in a file.
        process_group: the processes that export, by default all.

    Returns:
        The path, absolute.

    Raises:
        FileExistsError: there is something at ``path``.
        TypeError, ValueError: naming the argument and what is wrong with it.
        RuntimeError: another process failed.
    """
    ranks = Ranks(process_group)
    target = Path(os.path.abspath(path))
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: must be at least 1, got {max_shard_bytes}")
    files = ranks.each(lambda: _Files.divided(*_described(model), max_shard_bytes))

    def write(directory: Path) -> None:
        ranks.first(lambda: files.create(directory))
        files.fill(directory, ranks)

    write_directory(target, ranks, write, files.write_index)
    return target


def load_safetensors(
    path: str | os.PathLike[str], model: nn.Module, *, check_config: bool = True
) -> None:
    """Load what :func:`export_safetensors` wrote, or any files of that layout, into a model.

    Tensors are read in pieces, of a sharded parameter this process's shard alone, into parameters
    of whatever dtype and device. Tables with deferred gradients get a scale of one.

    Args:
        path: a directory with ``model.safetensors`` or an index, or one file.
        model: with the same names and shapes. A name of the model's state dict that is the same
            tensor as another, as tied weights are, may be missing.
        check_config: raise where a memory layer would read other rows or use them otherwise, if the
            files say how it was configured.

    Raises:
        ImportError: the package safetensors is missing.
        FileNotFoundError: no such files.
        ValueError: a name, a shape or a configuration is another than in the files. Nothing has
            then been loaded.
    """
    open_file = _library()
    source = Path(os.path.abspath(path))
    files = _find_files(source)
    mine = model_tensors(model)
    owners: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for file in files:
        with open_file(file, framework="pt", device="cpu") as handle:
            for name in handle.keys():  # noqa: SIM118  (it is no mapping)
                owners[name] = file
                shapes[name] = list(handle.get_slice(name).get_shape())
            _check_metadata(file, handle.metadata() or {}, model, check_config)
    for name in _check_entries(mine, shapes):

        def read(index: Any, name: str = name) -> Tensor:
            # Opened anew, since pages of a file count as this process's memory once they are read.
            with open_file(owners[name], framework="pt", device="cpu") as handle:
                return handle.get_slice(name)[index]

        _read(read, mine[name][1])
    # As in load(): what is copied is in place, layers and tables have more to do.
    missing_scales = _table_scales({name: tensor for name, (_, tensor) in mine.items()})
    model.load_state_dict(
        {full: tensor for name, (full, tensor) in mine.items() if name not in missing_scales}
    )


def _library() -> Any:
    try:
        from safetensors import safe_open
    except ImportError:
        raise ImportError(
            "load_safetensors needs the package safetensors: "
            "pip install 'ultramem_cuda[safetensors]'"
        ) from None
    return safe_open


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor to write, and what it is multiplied by: a float64 scalar, or None."""

    name: str
    tensor: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.dtype.itemsize


def _described(model: nn.Module | Mapping[str, Tensor]) -> tuple[list[_Entry], dict[str, str]]:
    """What is to be written, and the metadata of each file."""
    layers: dict[str, Any] = {}
    if isinstance(model, nn.Module):
        entries = _entries({name: tensor for name, (_, tensor) in model_tensors(model).items()})
        layers = describe_layers(model)
    else:
        entries = _entries(model)
    description = {"format_version": FORMAT_VERSION, "layers": layers}
    return entries, {"format": "pt", _METADATA: json.dumps(description)}


def _table_scales(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the scales of tables with deferred gradients."""
    return {
        name
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] == "scale"
        and tensor.dtype == torch.float64
        and tensor.shape == (2,)
        and name.removesuffix("scale") + "values" in tensors
    }


def _entries(tensors: Mapping[str, Tensor]) -> list[_Entry]:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"model: {name} must be a tensor, got {type(tensor).__name__}")
    scales = _table_scales(tensors)
    factors: dict[str, Tensor] = {}
    for name in scales:
        prefix = name.removesuffix("scale")
        factors[prefix + "values"], factors[prefix + "pre_values"] = tensors[name]
    entries = []
    for name, tensor in tensors.items():
        if name in scales:
            continue
        if tensor.dtype not in _CODES:
            raise TypeError(f"model: {name} is {tensor.dtype}, which safetensors files do not hold")
        _check_placements(name, tensor)
        entries.append(_Entry(name, tensor.detach(), factors.get(name)))
    if not entries:
        raise ValueError("model: has no tensors")
    return entries


def _check_placements(name: str, tensor: Any) -> None:
    if not hasattr(tensor, "device_mesh"):
        return
    from torch.distributed.tensor import Shard

    by_rows = [p.is_shard(0) for p in tensor.placements if not p.is_replicate()]
    plain = all(type(p) is Shard or p.is_replicate() for p in tensor.placements)
    if not plain or (any(by_rows) and not all(by_rows)):
        raise ValueError(
            f"model: {name} must be replicated, or sharded by rows or by other dimensions and not "
            f"by both, got {tensor.placements}"
        )


@dataclasses.dataclass
class _Files:
    """What goes into which file, and where.

    Attributes:
        headers: of each file by name, its first bytes.
        places: for each entry the file and the offset of its first byte.
    """

    headers: dict[str, bytes]
    places: list[tuple[_Entry, str, int]]

    @classmethod
    def divided(cls, entries: Sequence[_Entry], metadata: dict[str, str], max_bytes: int) -> _Files:
        groups: list[list[_Entry]] = []
        size = 0
        for entry in entries:
            if not groups or size + entry.nbytes > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(entry)
            size += entry.nbytes
        made = cls({}, [])
        for number, group in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            made._lay_out(_SINGLE if len(groups) == 1 else file, group, metadata)
        return made

    def _lay_out(self, file: str, group: list[_Entry], metadata: dict[str, str]) -> None:
        # Wide types first, so that every tensor is aligned in memory that a file is mapped to.
        group = sorted(group, key=lambda entry: (-entry.tensor.dtype.itemsize, entry.name))
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        offsets = []
        for entry in group:
            offsets.append(offset)
            header[entry.name] = {
                "dtype": _CODES[entry.tensor.dtype],
                "shape": list(entry.tensor.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.headers[file] = len(text).to_bytes(8, "little") + text
        start = len(self.headers[file])
        self.places += [(entry, file, start + at) for entry, at in zip(group, offsets, strict=True)]

    def create(self, directory: Path) -> None:
        """Files of their full size, with their headers."""
        for file, header in self.headers.items():
            write_file(directory / file, header)
        ends: dict[str, int] = {}
        for entry, file, start in self.places:
            ends[file] = max(ends.get(file, 0), start + entry.nbytes)
        for file, end in ends.items():
            os.truncate(directory / file, end)

    def fill(self, directory: Path, ranks: Ranks) -> None:
        """Write this process's part of the tensors; every process calls it, in step."""
        open_files: dict[str, BinaryIO] = {}
        try:
            for entry, file, start in self.places:
                for at, piece in _pieces(entry, ranks):
                    if file not in open_files:
                        open_files[file] = (directory / file).open("r+b")
                    stream = open_files[file]
                    stream.seek(start + at * piece.dtype.itemsize)
                    flat = piece.contiguous().cpu().reshape(-1)
                    stream.write(flat.view(torch.uint8).numpy().data)
            for stream in open_files.values():
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            for stream in open_files.values():
                stream.close()

    def write_index(self, directory: Path) -> None:
        if _SINGLE in self.headers:
            return
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry, _, _ in self.places)},
            "weight_map": {entry.name: file for entry, file, _ in self.places},
        }
        write_file(directory / _INDEX, json.dumps(index, indent=2).encode())


def _pieces(entry: _Entry, ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
    """What this process is to write of a tensor: the index of its first element, and a piece."""
    tensor = entry.tensor
    if not hasattr(tensor, "device_mesh"):
        if ranks.rank == 0:
            for rows, start in _row_blocks(tensor):
                yield start * _row_size(tensor.shape), _scaled(rows, entry.scale)
        return
    yield from _dtensor_pieces(tensor, entry.scale)


def _dtensor_pieces(tensor: Any, scale: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Of a DTensor. Shards of rows lie together in a file, and each process writes its own. Others
    are joined, some rows at a time, and the processes take turns in writing them."""
    mesh, placements, local = tensor.device_mesh, tensor.placements, tensor.to_local()
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return
    (shard,) = tensor.__create_chunk_list__()
    row_size = _row_size(tensor.shape)
    if all(placement.is_replicate() or placement.is_shard(0) for placement in placements):
        first_copy = all(
            at == 0 or not placement.is_replicate()
            for at, placement in zip(coordinate, placements, strict=True)
        )
        if first_copy and local.numel():
            base = shard.offsets[0] if shard.offsets else 0
            for rows, start in _row_blocks(local):
                yield (base + start) * row_size, _scaled(rows, scale)
        return
    turn = mesh.mesh.flatten().tolist()
    me = int(mesh.mesh[tuple(coordinate)])
    step = _rows_at_once(tensor.shape, tensor.dtype.itemsize)
    for number, start in enumerate(range(0, tensor.shape[0], step)):
        whole = _joined(local[start : start + step], tensor)
        if turn[number % len(turn)] == me:
            yield start * row_size, _scaled(whole, scale)


def _joined(rows: Tensor, tensor: Any) -> Tensor:
    """Some rows of a DTensor that is not sharded by rows, from this process's part of them.

    Without DTensors, each of which leaves a cycle behind that holds its pieces until the garbage
    collector comes.
    """
    import torch.distributed as dist

    mesh, sizes = tensor.device_mesh, list(tensor.shape)
    splits = []  # mesh dimension, tensor dimension, size there, largest part
    for mesh_dim, (placement, at) in enumerate(
        zip(tensor.placements, mesh.get_coordinate(), strict=True)
    ):
        if placement.is_shard():
            size = sizes[placement.dim]
            part = -(-size // mesh.size(mesh_dim))
            splits.append((mesh_dim, placement.dim, size, part))
            sizes[placement.dim] = max(0, min(part, size - at * part))
    for mesh_dim, dim, size, part in reversed(splits):
        padded = rows.new_zeros([*rows.shape[:dim], part, *rows.shape[dim + 1 :]])
        padded.narrow(dim, 0, rows.shape[dim]).copy_(rows)
        parts = [torch.empty_like(padded) for _ in range(mesh.size(mesh_dim))]
        dist.all_gather(parts, padded, group=mesh.get_group(mesh_dim))
        rows = torch.cat(parts, dim).narrow(dim, 0, size)
    return rows


def _row_size(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _rows_at_once(shape: Sequence[int], itemsize: int) -> int:
    return max(1, _PIECE_BYTES // max(1, _row_size(shape) * itemsize))


def _row_blocks(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    if tensor.dim() == 0:
        yield tensor, 0
        return
    step = _rows_at_once(tensor.shape, tensor.dtype.itemsize)
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step], start


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return rows
    out = torch.empty_like(rows)
    write_scaled(out, rows, scale)
    return out


def _find_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    index = source / _INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [source / name for name in names]
    if (source / _SINGLE).exists():
        return [source / _SINGLE]
    raise FileNotFoundError(f"path: neither {_SINGLE} nor {_INDEX} at {source}")


def _check_metadata(
    file: Path, metadata: Mapping[str, str], model: nn.Module, check_config: bool
) -> None:
    if _METADATA not in metadata:
        return
    description = json.loads(metadata[_METADATA])
    version = description["format_version"]
    if version > FORMAT_VERSION:
        raise ValueError(
            f"path: {file} is in format {version} of a newer ultramem_cuda; this one reads formats "
            f"up to {FORMAT_VERSION}"
        )
    if check_config:
        check_layers(model, description["layers"])


def _check_entries(
    mine: Mapping[str, tuple[str, Tensor]], shapes: Mapping[str, list[int]]
) -> list[str]:
    """The names to read, once they are known to be those of the model."""
    tensors = {name: tensor for name, (_, tensor) in mine.items()}
    wanted = tensors.keys() - _table_scales(tensors)
    unexpected = sorted(shapes.keys() - wanted)
    if unexpected:
        raise ValueError(f"model: has no tensor {unexpected[0]}, which the files hold")
    present = {_identity(tensors[name]) for name in shapes}
    missing = sorted(
        name for name in wanted - shapes.keys() if _identity(tensors[name]) not in present
    )
    if missing:
        raise ValueError(f"path: the files lack {missing[0]}, which the model has")
    for name, shape in shapes.items():
        if shape != list(tensors[name].shape):
            raise ValueError(
                f"model: {name} has shape {list(tensors[name].shape)}, in the files {shape}"
            )
    return [name for name in tensors if name in shapes]


def _identity(tensor: Any) -> tuple[Any, ...]:
    local = tensor.to_local() if hasattr(tensor, "device_mesh") else tensor
    return local.data_ptr() or id(local), local.shape, local.stride(), local.dtype


@torch.no_grad()
def _read(source: Callable[[Any], Tensor], tensor: Any) -> None:
    """Read a tensor, or this process's shard of it, in pieces: what source returns for an
    index."""
    offsets: Sequence[int] = [0] * tensor.dim()
    local = tensor
    if hasattr(tensor, "device_mesh"):
        local = tensor.to_local()
        if not local.numel():
            return
        (shard,) = tensor.__create_chunk_list__()
        offsets = shard.offsets
    if local.dim() == 0:
        local.copy_(source(...))
        return
    # Pieces by the rows of the file: the library reads whole rows before it takes columns.
    step = _rows_at_once(tensor.shape, local.dtype.itemsize)
    others = tuple(
        slice(offset, offset + size)
        for offset, size in zip(offsets[1:], local.shape[1:], strict=True)
    )
    for start in range(0, local.shape[0], step):
        rows = local[start : start + step]
        at = offsets[0] + start
        index = (slice(at, at + rows.shape[0]), *others)
        rows.copy_(source(index))
