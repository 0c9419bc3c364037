"""What test_distributed.py runs in four processes (gloo): python distributed_worker.py RANK FOLDER.

Parameters of tables are made DTensors here, as sharded tables have them. Every process knows what
the whole must be: it has trained the same plain model.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_model import Model, make_model, same_states, same_tensors, train
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ultramem_cuda as um
from ultramem_cuda.checkpoint import _pieces, _safetensors

WORLD_SIZE = 4
MIB = 1 << 20


class Folder:
    """Where the processes work, and the groups of some of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pair = dist.new_group([0, 1])
        self.first = dist.new_group([0])
        self.all_ranks = DeviceMesh("cpu", list(range(WORLD_SIZE)))
        self.two_ranks = DeviceMesh("cpu", [0, 1])
        self.square = DeviceMesh("cpu", [[0, 1], [2, 3]])

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def shard(module: nn.Module, mesh: DeviceMesh, placements: Sequence[Any]) -> nn.Module:
    """Make a module's own parameters DTensors."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        distributed = distribute_tensor(parameter.detach(), mesh, placements)
        setattr(module, name, nn.Parameter(distributed))
    return module


class Odd(nn.Module):
    """Parameters that four processes cannot share evenly: some have none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 3))
        self.vector = nn.Parameter(torch.randn(7))


def make(seed: int, mesh: DeviceMesh | None = None, placements: Sequence[Any] = ()) -> Any:
    """A model with a deferred table, and the table's optimizer."""
    model: Any = make_model(seed, grad_mode="deferred")
    model.odd = Odd()
    if mesh is not None:
        shard(model.table, mesh, placements)
        rows = [Shard(0) if p == Shard(1) else p for p in placements]
        shard(model.odd, mesh, rows)
    optimizer = um.optim.MemoryAdam(
        model.table.parameters(), lr=1e-2, weight_decay=0.1, state_dtype=torch.bfloat16
    )
    return model, optimizer


def check_equal(model: Any, optimizer: Any, expected: Any, expected_optimizer: Any) -> None:
    assert same_tensors(model.state_dict(), expected.state_dict())
    assert same_states(optimizer, expected_optimizer)


def check_resharding(folder: Folder, reference: Model, optimizer: Any) -> None:
    """Replicated -> columns on 4 -> rows on 4 -> columns on 2 -> one, bit-equal all along."""
    rank = dist.get_rank()
    extra = {"rank": rank}
    um.checkpoint.save(folder / "plain", reference, optimizer, step=1, extra=extra)

    columns = make(1, folder.all_ranks, [Shard(1)])
    found = um.checkpoint.load(folder / "plain", *columns)
    assert (found.step, found.world_size, found.extra) == (1, 4, extra)
    assert um.checkpoint.read_extra(folder / "plain", 2) == {"rank": 2}
    check_equal(*columns, reference, optimizer)
    moments = columns[1].state[columns[0].table.values]["exp_avg"]
    assert moments.placements == (Shard(1),)
    assert moments.to_local().shape == (250, 2)
    um.checkpoint.save(folder / "columns", *columns, step=2)
    # torch's own way to load an optimizer leaves the placements as well.
    again = make(1, folder.all_ranks, [Shard(1)])[1]
    again.load_state_dict(columns[1].state_dict())
    assert next(iter(again.state.values()))["exp_avg_sq"].placements == (Shard(1),)
    assert same_states(again, columns[1])

    rows = make(2, folder.all_ranks, [Shard(0)])
    um.checkpoint.load(folder / "columns", *rows)
    check_equal(*rows, reference, optimizer)
    um.checkpoint.save(folder / "rows", *rows)

    replicated = make(3, folder.square, [Replicate(), Shard(1)])
    um.checkpoint.load(folder / "rows", *replicated)
    check_equal(*replicated, reference, optimizer)

    if rank < 2:
        two = make(4, folder.two_ranks, [Shard(1)])
        um.checkpoint.load(folder / "rows", *two, process_group=folder.pair)
        check_equal(*two, reference, optimizer)
        um.checkpoint.save(folder / "two", *two, process_group=folder.pair)
    if rank == 0:
        one = make(5)
        found = um.checkpoint.load(folder / "two", *one, process_group=folder.first)
        assert found.world_size == 2
        check_equal(*one, reference, optimizer)
    dist.barrier()


def check_dense_tables(folder: Folder, reference: Model) -> None:
    """A sharded dense table takes the effective weights of a deferred one, shard by shard."""
    expected: Any = make_model(1)
    expected.odd = Odd()
    expected.load_state_dict(reference.state_dict())
    for placement in (Shard(0), Shard(1)):
        dense: Any = make_model(2)
        dense.odd = Odd()
        shard(dense.table, folder.all_ranks, [placement])
        um.checkpoint.load(folder / "columns", dense)
        assert same_tensors(dense.state_dict(), expected.state_dict())


def check_safetensors(folder: Folder, reference: Model, optimizer: Any) -> None:
    """However a table is sharded, the files are the same, and every sharding reads them."""
    if dist.get_rank() == 0:
        um.checkpoint.export_safetensors(
            folder / "weights", reference, max_shard_bytes=5000, process_group=folder.first
        )
    dist.barrier()
    expected: Any = make_model(1)
    expected.odd = Odd()
    expected.load_state_dict(reference.state_dict())
    for index, (mesh, placements) in enumerate(
        [
            (folder.all_ranks, [Shard(1)]),
            (folder.all_ranks, [Shard(0)]),
            (folder.square, [Replicate(), Shard(1)]),
            (folder.square, [Shard(0), Replicate()]),
        ]
    ):
        sharded = make(1, mesh, placements)
        um.checkpoint.load(folder / "plain", *sharded)
        path = folder / f"weights-{index}"
        um.checkpoint.export_safetensors(path, sharded[0], max_shard_bytes=5000)
        written = sorted(p.name for p in path.iterdir())
        assert written == sorted(p.name for p in (folder / "weights").iterdir())
        for name in written:
            assert (path / name).read_bytes() == (folder / "weights" / name).read_bytes()

        other, _ = make(3, mesh, placements)
        um.checkpoint.load_safetensors(path, other)
        scale = other.table.scale
        assert (scale == 1).all()
        other.table._buffers["scale"] = None
        assert same_tensors(other.state_dict(), expected.state_dict())


def check_errors_reach_all(folder: Folder, reference: Model, optimizer: Any) -> None:
    """What only one process finds wrong raises in all, and none waits for it."""

    mine = dist.get_rank() == 1

    def raises(kind: type[Exception], *arguments: Any, **named: Any) -> None:
        message = ""
        try:
            um.checkpoint.save(*arguments, **named)
        except kind as error:
            message = str(error)
        assert message.startswith("extra: " if mine else "rank 1 failed: TypeError: extra: ")

    extra = {"path": Path("x")} if mine else {}
    raises(TypeError if mine else RuntimeError, folder / "bad", reference, extra=extra)
    assert not (folder / "bad").exists()


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process has had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def check_peak_memory(folder: Folder) -> None:
    """A process saves and loads its shard of a table of 96 MiB with far less than the table."""

    num_rows, width = 98304, 256
    size = num_rows * width * 4
    rows, columns = torch.arange(num_rows)[:, None], torch.arange(width) / width
    if dist.get_rank() == 0:
        whole = um.MemoryTable(num_rows, width, device="meta").to_empty(device="cpu")
        torch.add(rows, columns, out=whole.values.detach())
        um.checkpoint.save(folder / "large", whole, process_group=folder.first)
        del whole
    for dim in range(2):
        # Never whole, nor by distribute_tensor, which needs it whole.
        part = um.MemoryTable(num_rows, width, device="meta")
        shape = [num_rows, width]
        shape[dim] //= WORLD_SIZE
        local = torch.zeros(shape)
        part.values = nn.Parameter(DTensor.from_local(local, folder.all_ranks, [Shard(dim)]))
        dist.barrier()
        start = peak_bytes(reset=True)
        um.checkpoint.load(folder / "large", part)
        um.checkpoint.save(folder / f"large-{dim}", part)
        um.checkpoint.export_safetensors(folder / f"large-weights-{dim}", part)
        um.checkpoint.load_safetensors(folder / f"large-weights-{dim}", part)
        grown = peak_bytes() - start
        assert grown < size // 2, f"grew by {grown / MIB} MiB"
        mine = slice(dist.get_rank() * shape[dim], (dist.get_rank() + 1) * shape[dim])
        expected = rows[mine] + columns if dim == 0 else rows + columns[mine]
        assert torch.equal(local, expected)


def be_killed(folder: Folder, reference: Model) -> None:
    """Rank 0 dies while all are writing; the others notice."""
    if dist.get_rank() == 0:
        resolve = _pieces.PiecewiseSavePlanner.resolve_data
        written = 0

        def resolve_data(self: Any, item: Any) -> Any:
            nonlocal written
            written += 1
            if written == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return resolve(self, item)

        _pieces.PiecewiseSavePlanner.resolve_data = resolve_data  # type: ignore[method-assign]
    try:
        um.checkpoint.save(folder / "killed", reference, step=9)
    except RuntimeError:
        return
    raise AssertionError("a save without rank 0 returned")


def main() -> None:
    rank, path = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    reference, optimizer = make(0)
    train(reference, [optimizer])
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=WORLD_SIZE
    )
    folder = Folder(path)
    # So that even small tensors are cut, across shards of rows and of columns.
    whole = _pieces.PIECE_BYTES, _pieces.MAX_PIECES, _safetensors._PIECE_BYTES
    _pieces.PIECE_BYTES, _pieces.MAX_PIECES, _safetensors._PIECE_BYTES = 300, 100, 300
    check_resharding(folder, reference, optimizer)
    check_dense_tables(folder, reference)
    check_safetensors(folder, reference, optimizer)
    check_errors_reach_all(folder, reference, optimizer)
    _pieces.PIECE_BYTES, _pieces.MAX_PIECES, _safetensors._PIECE_BYTES = whole
    _pieces.PIECE_BYTES = _safetensors._PIECE_BYTES = 4 * MIB
    check_peak_memory(folder)
    be_killed(folder, reference)
    # Without the others there is no orderly end.
    sys.stdout.write("done\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
