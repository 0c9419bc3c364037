"""Laying a table over the processes of a mesh."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ..table import MemoryTable
from .sharding import TableSharding


def shard_table(table: MemoryTable, mesh: DeviceMesh, *, by: str) -> MemoryTable:
    """Leave to every process its part of the table; in place.

    ``values`` and ``pre_values`` become DTensors, sharded by dimension 1 ("columns") or 0 ("rows"),
    new parameters: make optimizers afterwards. Layers take the table as before; in a forward or
    backward pass all ranks of a memory group must bring the same number of tokens to the same
    layers in the same order. A step's gradients are averaged over all ranks of the mesh, as DDP and
    FSDP average those of the network; see also :func:`ignore_tables_in_ddp` and
    :func:`table_parameters`.

    A table on the meta device is drawn anew, by each rank its part, on the mesh's type of device:
    no rank ever holds the whole. Else the weights are those of the mesh's first rank.

    Args:
        table: of either ``grad_mode``; "deferred" needs no memory for gradients of the table.
        mesh: of one dimension, the memory group; or of two, copies (outer) and memory groups
            (inner), where every memory group holds the table once.
        by: "columns": each rank has columns of all rows; "rows": each has whole rows. docs/
            parallel.md compares them.

    Returns:
        The table.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be. "columns" needs
            value_dim and pre_value_dim to be multiples of the memory group's size.
    """
    if by not in ("columns", "rows"):
        raise ValueError(f"by: must be 'columns' or 'rows', got {by!r}")
    _check_fresh(table, mesh, "shard_table")
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh: must have one or two dimensions, got {mesh.ndim}")
    replica_dim = 0 if mesh.ndim == 2 and mesh.size(0) > 1 else None
    _place(table, TableSharding(mesh, by, mesh.ndim - 1, replica_dim))
    return table


def replicate_table(table: MemoryTable, mesh: DeviceMesh) -> MemoryTable:
    """Have every process keep a copy of a table with deferred gradients; in place.

    DDP cannot average such gradients, which are never tensors. Clipping and steps then exchange the
    factors of all ranks and apply them alike everywhere, so that copies stay equal to the bit. (The
    factors of a step are held once more, for the tokens of all ranks; a shard needs less.) The
    weights are those of the mesh's first rank.

    Args:
        table: with ``grad_mode="deferred"``. Dense tables are DDP's.
        mesh: of one dimension, the data-parallel ranks, which bring equal numbers of tokens.

    Returns:
        The table.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_fresh(table, mesh, "replicate_table")
    if table.grad_mode != "deferred":
        raise ValueError(
            "replicate_table: the table's grad_mode must be 'deferred', got 'dense', whose "
            "gradients DDP averages"
        )
    if mesh.ndim != 1:
        raise ValueError(f"mesh: must have one dimension, got {mesh.ndim}")
    _place(table, TableSharding(mesh, None, None, 0 if mesh.size() > 1 else None))
    return table


def _check_fresh(table: MemoryTable, mesh: DeviceMesh, op: str) -> None:
    if not isinstance(table, MemoryTable):
        raise TypeError(f"table: must be a MemoryTable, got {type(table).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: must be a DeviceMesh, got {type(mesh).__name__}")
    if table.sharding is not None or isinstance(table.values, DTensor):
        raise ValueError(f"{op}: the table lies over a mesh already")
    if table.factors is not None and table.factors.num_tokens:
        raise ValueError(f"{op}: the table has gradients; clear them first")
    on = table.values.device
    if not table.values.is_meta and on.type != mesh.device_type:
        raise ValueError(f"{op}: the table must be on {mesh.device_type}, as the mesh, got {on}")


def _place(table: MemoryTable, sharding: TableSharding) -> None:
    widths = {"value_dim": table.value_dim, "pre_value_dim": table.pre_value_dim}
    sharding.check_table(table.num_slots, {k: width for k, width in widths.items() if width})
    was_meta = table.values.is_meta
    for name in ("values", "pre_values"):
        parameter: nn.Parameter | None = getattr(table, name)
        if parameter is None:
            continue
        with torch.no_grad():
            placed = _placed(parameter.detach(), sharding)
        new = nn.Parameter(placed, requires_grad=parameter.requires_grad)
        table.register_parameter(name, new)
    if table.scale is not None:
        scale = torch.ones(2, dtype=torch.float64, device=table.values.device)
        if not was_meta:
            scale.copy_(table.scale)
            sharding.broadcast(scale)
        table.scale = scale
    table._set_sharding(sharding)
    if was_meta:
        table.reset_parameters()


def _placed(tensor: Tensor, sharding: TableSharding) -> Tensor:
    mesh = sharding.mesh
    if tensor.is_meta:
        shape = sharding.local_shape(*tensor.shape)
        part = torch.empty(shape, dtype=tensor.dtype, device=sharding.device)
        if sharding.by is None:
            return part
        return DTensor.from_local(
            part,
            mesh,
            sharding.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    if sharding.by is None:
        return sharding.broadcast(tensor.clone())
    return distribute_tensor(tensor, mesh, sharding.placements)
