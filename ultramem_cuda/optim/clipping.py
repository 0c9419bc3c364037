"""Clipping and loss scaling of network gradients and of tables' factors together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import nvtx
from .._local import is_dtensor, local, part_of
from .._retrieval_cache import is_capturing
from ..table import MemoryTable, table_of
from ._table_gradient import (
    check_copies,
    deferred_table,
    dense_gradient,
    found_nonfinite,
    has_entries,
    step_cache,
    sum_of_squares,
    trained_parameters,
)


@torch.no_grad()
@nvtx.annotate("clip_grad_norm_")
def clip_grad_norm_(
    model_or_params: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    tables: Iterable[MemoryTable] = (),
    error_if_nonfinite: bool = False,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ that counts tables with deferred gradients, too.

    The norm is that of all gradients as one vector, exact: the rows of a deferred gradient are
    summed before they are squared. Dense gradients (``.grad``, or ``main_grad``) are scaled in
    place; the coefficient of a table stays on the device, and the next ``step()`` of an optimizer
    of this package applies it. Nothing waits for the device, but with error_if_nonfinite.

    Over several processes all ranks call it, and get the norm of all gradients: those of sharded
    tables and of DTensors (FSDP) are added up over their ranks; other dense gradients must be the
    same on every rank, as DDP leaves them.

    Call it after the last backward of a step. A further call sees the gradients clipped.

    Args:
        model_or_params: a module, with its tables, or parameters; those of a table stand for their
            factors.
        max_norm: the norm is scaled down to it where it is greater.
        tables: further tables with deferred gradients.
        error_if_nonfinite: raise where the norm is NaN or infinite; else such a norm makes the
            gradients so.

    Returns:
        The norm before clipping, a float32 scalar on the device of the first gradient (float64
        where gradients are).

    Raises:
        RuntimeError: the norm is not finite; or factors came after an earlier call.
        ValueError: max_norm is negative, a table's gradients are not deferred, or only one of its
            trained parameters is among those given.
    """
    if not max_norm >= 0.0:
        raise ValueError(f"max_norm: must not be negative, got {max_norm}")
    params: list[Tensor]
    if isinstance(model_or_params, nn.Module):
        params = list(model_or_params.parameters())
    elif isinstance(model_or_params, Tensor):
        params = [model_or_params]
    else:
        params = list(model_or_params)
    for table in tables:
        if table.grad_mode != "deferred":
            raise ValueError(
                "tables: must have grad_mode='deferred'; the parameters of others belong to "
                "model_or_params"
            )
        params += trained_parameters(table)
    params = list({id(param): param for param in params}.values())

    deferred = [(p, t) for p in params if (t := deferred_table(p)) and p.requires_grad]
    for table in {id(t): t for _, t in deferred}.values():
        if not is_capturing(table.values.device):
            check_copies(table)
    deferred = [(p, t) for p, t in deferred if has_entries(t)]
    clipped = {id(p) for p, _ in deferred}
    for _, table in deferred:
        if any(id(p) not in clipped for p in trained_parameters(table)):
            raise ValueError(
                "clip_grad_norm_: a table's values and pre_values are clipped together, for one "
                "coefficient serves both; pass both, or the table in tables"
            )
    dense = [p for p in params if deferred_table(p) is None]
    grads = [grad for p in dense if (grad := dense_gradient(p)) is not None]
    if not grads and not deferred:
        return torch.zeros(())

    device = grads[0].device if grads else deferred[0][0].device
    is_double = any(t.dtype == torch.float64 for t in [*grads, *(p for p, _ in deferred)])
    squares = [(part_of(grad).group, square) for grad, square in _squares(grads)]
    for param, table in deferred:
        square = sum_of_squares(table, param)
        scale = step_cache(table).grad_scale
        square = square if scale is None else square * scale.double().square()
        squares.append((part_of(param).group, square))
    total = _sum_over_ranks(squares, device).sqrt()
    total = total.to(torch.float64 if is_double else torch.float32)
    for _, table in deferred:
        # Copies step alike to the bit, whatever order each memory group has summed in.
        if table.sharding is not None and table.sharding.num_replicas > 1:
            torch.distributed.broadcast(total, group=table.sharding.replica_group, group_src=0)
            break
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"clip_grad_norm_: the total norm of the gradients is {total.item()}; to clip "
            "nevertheless, set error_if_nonfinite=False"
        )

    coefficient = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for group in _by_device_and_dtype([local(grad) for grad in grads]):
        torch._foreach_mul_(group, coefficient.to(group[0].device))
    for table in {id(table): table for _, table in deferred}.values():
        step_cache(table).multiply(coefficient)
    return total


def _squares(grads: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """With each gradient the float64 sum of its squares, of a DTensor of this rank's part; from
    norms in float32 at least."""
    parts = [local(grad) for grad in grads]
    wholes = {id(part): grad for part, grad in zip(parts, grads, strict=True)}
    for group in _by_device_and_dtype(parts):
        dtype = torch.float64 if group[0].dtype == torch.float64 else torch.float32
        for part, norm in zip(group, torch._foreach_norm(group, 2.0, dtype=dtype), strict=True):
            yield wholes[id(part)], norm.double().square()


def _sum_over_ranks(squares: list[tuple[Any, Tensor]], device: torch.device) -> Tensor:
    """The sum of all, each over the ranks that have a part of it: one reduction a group."""
    by_group: dict[Any, list[Tensor]] = {}
    for group, square in squares:
        by_group.setdefault((group, square.device), []).append(square)
    totals = []
    for (group, _), parts in by_group.items():
        total = torch.stack(parts).sum()
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
        totals.append(total.to(device))
    return torch.stack(totals).sum()


def _by_device_and_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler that looks at the factors of tables with deferred gradients, too.

    Needed where all parameters of an optimizer are such tables', and for ``unscale_`` (before
    clip_grad_norm_). Where one rank finds an infinite factor, all skip the step. torch's own
    reaches dense gradients alone; with it, a step of this package's optimizers still scales the
    factors and skips those that are not finite, but the scaler does not learn of them.
    """

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = [param.grad for param in params if param.grad is not None]
        if any(is_dtensor(grad) for grad in grads):
            # torch's takes no DTensors beside tensors, and asks the mesh of the first alone.
            found = _unscale([local(grad) for grad in grads], inv_scale, found_inf, allow_fp16)
        else:
            found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        tables = {id(t): t for param in params if (t := deferred_table(param)) and has_entries(t)}
        for table in tables.values():
            cache = step_cache(table)
            bad = found_nonfinite(table)
            seen = found.get(bad.device)
            found[bad.device] = bad if seen is None else torch.maximum(seen, bad)
            if not cache.unscaled:
                cache.multiply(inv_scale)
                cache.unscaled = True
        for mesh in _meshes(params):
            for device in found:
                if device.type == mesh.device_type:
                    for dim in range(mesh.ndim):
                        torch.distributed.all_reduce(
                            found[device],
                            op=torch.distributed.ReduceOp.MAX,
                            group=mesh.get_group(dim),
                        )
        return found


def _unscale(
    grads: list[Tensor], inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
) -> dict[torch.device, Tensor]:
    """In place, and for each device whether a value on it is not finite."""
    found: dict[torch.device, Tensor] = {}
    for group in _by_device_and_dtype(grads):
        if group[0].dtype == torch.float16 and not allow_fp16:
            raise ValueError("Attempting to unscale FP16 gradients.")
        device = group[0].device
        if device not in found:
            found[device] = found_inf.to(device, copy=True)
        torch._amp_foreach_non_finite_check_and_unscale_(group, found[device], inv_scale.to(device))
    return found


def _meshes(params: list[Tensor]) -> list[Any]:
    """Those that parameters, or tables, lie over: ranks that must agree on a step."""
    meshes: list[Any] = []
    for param in params:
        table = table_of(param)
        placed = [param.device_mesh] if is_dtensor(param) else []  # type: ignore[attr-defined]
        if table is not None and table.sharding is not None:
            placed.append(table.sharding.mesh)
        meshes += [mesh for mesh in placed if mesh not in meshes]
    return meshes
