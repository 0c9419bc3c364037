"""Laying tables over a mesh: what they hold then, and what is refused."""

from __future__ import annotations

import copy
import os
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ultramem_cuda as um


def meta_table(by: str, shape: tuple[int, ...]) -> tuple[list[Any], dict[str, Tensor], int]:
    """Placements, this rank's parts of a table drawn on the ranks, and the most memory a tensor
    of them has."""
    config = cases.layer_config(num_slots=4001, value_dim=48)
    table = um.MemoryTable.from_config(config, device="meta", grad_mode="deferred")
    torch.manual_seed(100 + dist.get_rank())
    um.parallel.shard_table(table, cases.mesh_of("cpu", shape), by=by)
    assert isinstance(table.values, DTensor)
    parts = {name: p.to_local().detach().clone() for name, p in table.named_parameters()}
    assert table.scale is not None
    assert table.scale.tolist() == [1.0, 1.0]
    assert table.values.shape == (4001, 48)
    assert (table.num_slots, table.value_dim, table.pre_value_dim) == (4001, 48, 8)
    storage = max(p.to_local().untyped_storage().nbytes() for p in table.parameters())
    return list(table.values.placements), parts, storage


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_a_table_is_drawn_in_parts(pool: Any, by: str) -> None:
    results = pool(4).run(meta_table, by, (4,))
    dim = 1 if by == "columns" else 0
    assert all(placements == [Shard(dim)] for placements, _, _ in results)
    assert max(storage for _, _, storage in results) <= 4 * -(-4001 // 4) * 48
    for name, width in (("values", 48), ("pre_values", 8)):
        whole = torch.cat([parts[name] for _, parts, _ in results], dim)
        assert whole.shape == (4001, width)
        assert whole.std().item() == pytest.approx(0.02, rel=0.05)
        # No two parts are of the same random numbers.
        rows = whole.reshape(-1, 1).unique()
        assert rows.numel() > 0.99 * whole.numel()


def test_copies_of_a_part_are_drawn_alike(pool: Any) -> None:
    results = pool(4).run(meta_table, "rows", (2, 2))
    assert all(placements == [Replicate(), Shard(0)] for placements, _, _ in results)
    parts = [parts["values"] for _, parts, _ in results]
    assert torch.equal(parts[0], parts[2])
    assert torch.equal(parts[1], parts[3])
    assert not torch.equal(parts[0][:2000], parts[1][:2000])


def filled_table(by: str) -> dict[str, Tensor]:
    torch.manual_seed(dist.get_rank())
    table = um.MemoryTable.from_config(cases.layer_config(), grad_mode="deferred")
    mine = {name: p.detach().clone() for name, p in table.named_parameters()}
    mesh = cases.mesh_of("cpu", (dist.get_world_size(),))
    if by == "copies":
        um.parallel.replicate_table(table, mesh)
    else:
        um.parallel.shard_table(table, mesh, by=by)
    held = cases.effective(table)
    return {**held, **{f"my {name}": rows for name, rows in mine.items()}}


@pytest.mark.parametrize("by", ["columns", "rows", "copies"])
def test_weights_are_those_of_the_first_rank(pool: Any, by: str) -> None:
    results = pool(2).run(filled_table, by)
    for name in ("values", "pre_values"):
        assert not torch.equal(results[0][f"my {name}"], results[1][f"my {name}"])
        for held in results:
            assert torch.equal(held[name], results[0][f"my {name}"].double())


def refusals() -> list[str]:
    mesh = cases.mesh_of("cpu", (2,))

    def table(grad_mode: str = "deferred", **changes: Any) -> um.MemoryTable:
        return um.MemoryTable.from_config(cases.layer_config(**changes), grad_mode=grad_mode)

    def message(call: Any) -> str:
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
            call()
        return str(caught.value)

    shard, copies = um.parallel.shard_table, um.parallel.replicate_table
    placed = shard(table(), mesh, by="columns")
    used = table()
    layer = um.UltraMemLayer(cases.layer_config(), 0)
    layer(torch.randn(3, 16), used).sum().backward()
    foreign = table("dense")
    foreign.values = torch.nn.Parameter(distribute_tensor(foreign.values.detach(), mesh))
    main_grad = shard(table("dense"), mesh, by="columns")
    main_grad.values.main_grad = torch.zeros(203, 24)  # type: ignore[attr-defined]
    return [
        message(lambda: shard(table(), mesh, by="diagonal")),
        message(lambda: shard(torch.nn.Linear(2, 2), mesh, by="rows")),  # type: ignore[arg-type]
        message(lambda: shard(table(), "cpu", by="rows")),  # type: ignore[arg-type]
        message(lambda: shard(placed, mesh, by="rows")),
        message(lambda: shard(used, mesh, by="rows")),
        message(lambda: shard(table(value_dim=15, num_cores=1), mesh, by="columns")),
        message(lambda: shard(um.MemoryTable(1, 4), mesh, by="rows")),
        message(lambda: copies(table("dense"), mesh)),
        message(lambda: layer(torch.randn(3, 16), main_grad)),
        message(lambda: layer(torch.randn(3, 16), foreign)),
    ]


def test_what_is_refused(pool: Any) -> None:
    expected = [
        "by: must be 'columns' or 'rows', got 'diagonal'",
        "table: must be a MemoryTable, got Linear",
        "mesh: must be a DeviceMesh, got str",
        "shard_table: the table lies over a mesh already",
        "shard_table: the table has gradients; clear them first",
        "value_dim: must be a multiple of the memory group's 2 ranks to be sharded by columns, "
        "got 15",
        "num_slots: must leave each of the 2 ranks a row to be sharded by rows, got 1",
        "replicate_table: the table's grad_mode must be 'deferred', got 'dense', whose gradients "
        "DDP averages",
    ]
    for messages in pool(2).run(refusals):
        assert messages[:8] == expected
        assert messages[8].startswith("table: main_grad is not offered where the table is sharded")
        assert messages[9].endswith("(or leave the table in FSDP's root unit)")


def without_anything_to_exchange() -> None:
    """An unsharded table with deferred gradients would drift apart on the ranks."""
    table = um.MemoryTable.from_config(cases.layer_config(), grad_mode="deferred")
    um.UltraMemLayer(cases.layer_config(), 0)(torch.randn(3, 16), table).sum().backward()
    with pytest.raises(NotImplementedError, match="shard_table or replicate_table"):
        um.optim.MemorySGD(table.parameters()).step()


def test_tables_that_nothing_exchanges_are_not_stepped(pool: Any) -> None:
    pool(2).run(without_anything_to_exchange)


def nothing_at_all(by: str) -> None:
    config = cases.layer_config()
    table = um.MemoryTable.from_config(config, grad_mode="deferred")
    um.parallel.shard_table(table, cases.mesh_of("cpu", (2,)), by=by)
    layer = um.UltraMemLayer(config, 0)
    x = torch.randn(0, 16, requires_grad=True)
    out = layer(x, table)
    assert out.shape == (0, 16)
    out.sum().backward()
    assert x.grad is not None
    assert table.factors is not None
    assert table.factors.num_tokens == 0
    with torch.no_grad():
        assert layer(torch.randn(2, 16), table).shape == (2, 16)
    assert "num_shards=2" in repr(table)


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_no_tokens(pool: Any, by: str) -> None:
    pool(2).run(nothing_at_all, by)


def copied(by: str) -> None:
    config = cases.layer_config()
    table = um.MemoryTable.from_config(config, grad_mode="deferred")
    um.parallel.shard_table(table, cases.mesh_of("cpu", (2,)), by=by)
    layer, x = um.UltraMemLayer(config, 0), torch.randn(4, 16)
    other = copy.deepcopy(table)
    assert other.sharding is table.sharding
    assert torch.equal(layer(x, other), layer(x, table))
    with torch.no_grad():
        other.values.zero_()
    assert not torch.equal(layer(x, other), layer(x, table))
    table.load_state_dict(other.state_dict())
    assert torch.equal(layer(x, other), layer(x, table))


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_copies_and_state_dicts(pool: Any, by: str) -> None:
    pool(2).run(copied, by)


def recomputed(by: str) -> None:
    config = cases.layer_config()
    model = cases.Memory(config, "deferred", torch.float64, "cpu")
    um.parallel.shard_table(model.table, cases.mesh_of("cpu", (2,)), by=by)
    factors = model.table.factors
    assert factors is not None
    x = cases.batch(2, torch.float64, "cpu")[dist.get_rank()]
    found = []
    for recompute in (False, True):
        x = x.detach().requires_grad_()
        if recompute:
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        else:
            out = model(x)
        out.square().sum().backward()
        assert x.grad is not None
        found.append((x.grad, *(g for g in factors.to_dense() if g is not None)))
        factors.clear()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_activation_checkpointing(pool: Any, by: str) -> None:
    pool(2).run(recomputed, by)


def overflown(by: str) -> tuple[bool, bool]:
    """A step in float16 in which one rank's gradients are not finite."""
    config = cases.layer_config()
    table = um.MemoryTable.from_config(config, grad_mode="deferred")
    um.parallel.shard_table(table, cases.mesh_of("cpu", (2,)), by=by)
    layer = um.UltraMemLayer(config, 0)
    optimizer = um.optim.MemorySGD(table.parameters(), lr=1.0)
    scaler = um.optim.GradScaler("cpu", init_scale=4.0)
    moved = []
    for bad in (float("inf"), 1.0):
        before = cases.effective(table)
        loss = layer(torch.randn(4, 16), table).square().sum()
        loss = loss * (bad if dist.get_rank() == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not torch.equal(cases.effective(table)["values"], before["values"]))
    return moved[0], moved[1]


class Both(torch.nn.Module):
    def __init__(self, table: um.MemoryTable) -> None:
        super().__init__()
        self.table, self.layer = table, um.UltraMemLayer(cases.layer_config(), 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.table)


def overflown_beside_ddp(network: str) -> tuple[list[bool], float]:
    """Dense gradients of the table, not finite on one rank, and those of a network that are."""
    torch.manual_seed(0)
    table = um.MemoryTable.from_config(cases.layer_config())
    um.parallel.shard_table(table, cases.mesh_of("cpu", (2,)), by="rows")
    model = Both(table)
    wrapped: torch.nn.Module = model
    if network == "ddp":
        um.parallel.ignore_tables_in_ddp(model)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
        fully_shard(model, mesh=other, ignored_params=um.parallel.table_parameters(model))
    optimizer = um.optim.MemorySGD(model.parameters(), lr=1.0)
    scaler = um.optim.GradScaler("cpu", init_scale=4.0)
    moved = []
    for bad in (float("inf"), 1.0):
        before = cases.effective(table)
        scaler.scale(wrapped(torch.randn(4, 16)).square().sum()).backward()
        gradient = table.values.grad
        assert isinstance(gradient, DTensor)
        if dist.get_rank() == 1:
            gradient.to_local()[0, 0] *= bad
            gradient.to_local()[0, 0] += bad
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not torch.equal(cases.effective(table)["values"], before["values"]))
    return moved, scaler.get_scale()


@pytest.mark.parametrize("network", ["ddp", "fsdp"])
def test_dense_gradients_that_are_not_finite_on_one_rank(pool: Any, network: str) -> None:
    assert pool(2).run(overflown_beside_ddp, network) == [([False, True], 2.0)] * 2


def stale(by: str) -> None:
    table = um.MemoryTable.from_config(cases.layer_config(), grad_mode="deferred")
    optimizer = um.optim.MemorySGD(table.parameters(), lr=1.0)
    mesh = cases.mesh_of("cpu", (2,))
    if by == "copies":
        um.parallel.replicate_table(table, mesh)
    else:
        um.parallel.shard_table(table, mesh, by=by)
    um.UltraMemLayer(cases.layer_config(), 0)(torch.randn(3, 16), table).sum().backward()
    with pytest.raises(RuntimeError, match="make the optimizer afterwards"):
        optimizer.step()


@pytest.mark.parametrize("by", ["rows", "copies"])
def test_optimizers_of_the_parameters_before(pool: Any, by: str) -> None:
    pool(2).run(stale, by)


def uneven_copies() -> None:
    table = um.MemoryTable.from_config(cases.layer_config(), grad_mode="deferred")
    um.parallel.replicate_table(table, cases.mesh_of("cpu", (2,)))
    tokens = 3 * dist.get_rank()
    um.UltraMemLayer(cases.layer_config(), 0)(torch.randn(tokens, 16), table).sum().backward()
    optimizer = um.optim.MemorySGD(table.parameters(), lr=1.0)
    os.environ["ULTRAMEM_DEBUG"] = "1"
    try:
        for call in (optimizer.step, lambda: um.optim.clip_grad_norm_([], 1.0, tables=[table])):
            with pytest.raises(RuntimeError, match=r"to a step, got \[0, 3\]"):
                call()
    finally:
        del os.environ["ULTRAMEM_DEBUG"]


def test_copies_of_different_batches_are_found_when_asked(pool: Any) -> None:
    pool(2).run(uneven_copies)


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_one_rank_without_finite_gradients_stops_all(pool: Any, by: str) -> None:
    assert pool(2).run(overflown, by) == [(False, True)] * 2


def uneven(by: str) -> None:
    config = cases.layer_config()
    table = um.MemoryTable.from_config(config, grad_mode="deferred")
    um.parallel.shard_table(table, cases.mesh_of("cpu", (2,)), by=by)
    os.environ["ULTRAMEM_DEBUG"] = "1"
    try:
        with pytest.raises(RuntimeError, match=r"a memory group, to a layer, got \[3, 4\]"):
            um.UltraMemLayer(config, 0)(torch.randn(3 + dist.get_rank(), 16), table)
        um.UltraMemLayer(config, 0)(torch.randn(3, 16), table)
    finally:
        del os.environ["ULTRAMEM_DEBUG"]


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_uneven_batches_are_found_when_asked(pool: Any, by: str) -> None:
    pool(2).run(uneven, by)


def table_alone(by: str) -> None:
    """The network is frozen; no gradient as large as the table appears."""
    config = cases.layer_config()
    table = um.MemoryTable.from_config(config, grad_mode="deferred")
    um.parallel.shard_table(table, cases.mesh_of("cpu", (2,)), by=by)
    layer = um.UltraMemLayer(config, 0).requires_grad_(False)
    layer(torch.randn(3, 16), table).sum().backward()
    assert table.factors is not None
    assert table.factors.num_tokens == 6
    assert all(p.grad is None for p in table.parameters())
    table.requires_grad_(False)
    assert not layer(torch.randn(3, 16), table).requires_grad


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_tables_that_train_alone(pool: Any, by: str) -> None:
    pool(2).run(table_alone, by)
