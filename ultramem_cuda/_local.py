"""This rank's part of a DTensor."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    # There are none before their module is imported, which takes a while.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """A DTensor's part on this rank, differentiable; anything else as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


class Part(NamedTuple):
    """Which part of a tensor this rank has."""

    dim: int | None  # that the tensor is cut along; None: the rank has all of it
    offset: int  # where the part begins
    group: Any  # the ranks that have the other parts
    copies: tuple[Any, ...] = ()  # groups of ranks that have the same part


def part_of(tensor: Any) -> Part:
    """The part of a DTensor; of any other tensor, all of it.

    Raises:
        NotImplementedError: cut along two dimensions, along other than the first into parts of
            different sizes, or sums that are still to be taken.
    """
    if not is_dtensor(tensor):
        return Part(None, 0, None)
    cut = [(i, p) for i, p in enumerate(tensor.placements) if not p.is_replicate()]
    if len(cut) > 1 or any(type(placement).__name__ != "Shard" for _, placement in cut):
        raise NotImplementedError(
            "a DTensor must be replicated, or sharded over one dimension of its mesh, got "
            f"{list(tensor.placements)}"
        )
    mesh = tensor.device_mesh
    copies = tuple(
        mesh.get_group(i)
        for i, placement in enumerate(tensor.placements)
        if placement.is_replicate() and mesh.size(i) > 1
    )
    if not cut:
        return Part(None, 0, None, copies)
    mesh_dim, placement = cut[0]
    length = tensor.shape[placement.dim]
    if placement.dim > 0 and length % mesh.size(mesh_dim):
        raise NotImplementedError(
            f"a DTensor must be cut into equal parts along dimension {placement.dim}, got "
            f"{length} columns over {mesh.size(mesh_dim)} ranks"
        )
    chunk = -(-length // mesh.size(mesh_dim))
    offset = min(chunk * mesh.get_local_rank(mesh_dim), length)
    return Part(placement.dim, offset, mesh.get_group(mesh_dim), copies)
