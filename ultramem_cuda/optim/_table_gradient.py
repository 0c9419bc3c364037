"""The gradients that the optimizers take: dense ones, and the factors that a table keeps."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _library, nvtx
from .._local import local
from .._retrieval_cache import capture_id
from ..factors import GradientFactors
from ..table import MemoryTable, table_of


class Grouping(NamedTuple):
    """Entries in the order of their slots, see csrc/include/ultramem/table_update.h."""

    keys: Tensor  # [n] int32
    entries: Tensor  # [n] int32
    run_begins: Tensor  # [min(n, N) + 1] int32
    pieces: Tensor  # [*, 2] int32
    counts: Tensor  # [2] int32


@dataclasses.dataclass
class StepCache:
    """What clipping leaves for the step, as ``factors.step_cache``; ``factors.clear()`` drops it.

    Attributes:
        num_entries, version: which entries of the table's factors it belongs to.
        factors: the table's; where copies of the table have more of them, those of all copies.
        grouping: computed once a step, for both parameters and for norm and update.
        grad_scale: float32 scalar on the device that multiplies the gradients; None for 1.
        unscaled: a :class:`GradScaler` has looked at the factors and put its scale in grad_scale.
        capture, appends: the CUDA graph that computes it (0: none), and how many appends there had
            been.
    """

    num_entries: int
    version: int
    factors: GradientFactors
    grouping: Grouping
    grad_scale: Tensor | None = None
    unscaled: bool = False
    capture: int = 0
    appends: int = 0

    def multiply(self, factor: Tensor) -> None:
        factor = factor.to(self.grouping.keys.device, torch.float32)
        self.grad_scale = factor if self.grad_scale is None else self.grad_scale * factor


def deferred_table(param: Tensor) -> MemoryTable | None:
    """The table that keeps this parameter's gradient as factors, or None."""
    table = table_of(param)
    return table if table is not None and table.grad_mode == "deferred" else None


def dense_gradient(param: Tensor) -> Tensor | None:
    """``.grad``, or Megatron's ``main_grad`` where there is none."""
    return param.grad if param.grad is not None else getattr(param, "main_grad", None)


def factors_of(table: MemoryTable) -> GradientFactors:
    """Those of a table with deferred gradients."""
    assert table.factors is not None
    return table.factors


def rows_here(table: MemoryTable) -> int:
    """Rows of the table on this rank."""
    return int(local(table.values).shape[0])


def has_entries(table: MemoryTable) -> bool:
    return table.factors is not None and table.factors.slots.shape[0] > 0


def check_copies(table: MemoryTable) -> None:
    """With ULTRAMEM_DEBUG=1: that the copies of a table have factors of as many tokens.

    Raises:
        RuntimeError: they have not, and an exchange would hang or mix them up.
    """
    if os.environ.get("ULTRAMEM_DEBUG") == "1" and table.sharding is not None:
        table.sharding.check_copies(factors_of(table).num_tokens)


def has_gradient(table: MemoryTable, param: Tensor) -> bool:
    """Whether the table's factors hold a gradient of this parameter of it."""
    return has_entries(table) and (param is table.values or factors_of(table).grad_a is not None)


def step_cache(table: MemoryTable) -> StepCache:
    """That of the table's present factors; at the first call of a step they are exchanged with the
    table's copies, and sorted.

    Raises:
        RuntimeError: gradients came after it was computed; or it belongs to another CUDA graph than
            the one that is being captured, if any.
    """
    factors = factors_of(table)
    capture = capture_id(table.values.device)
    if capture or (factors.step_cache is not None and factors.step_cache.capture):
        return _captured_step_cache(table, capture)
    slots = factors.slots
    num_entries = slots.shape[0]
    # Entries that were written anew tell themselves by their version, where there is one.
    version = 0 if slots.is_inference() else slots._version
    cache: StepCache | None = factors.step_cache
    if cache is None or (cache.num_entries == num_entries and cache.version != version):
        cache = _new_cache(table, num_entries, version)
        factors.step_cache = cache
    elif cache.num_entries != num_entries:
        raise RuntimeError(
            f"table: {num_entries} entries where clipping or a step saw {cache.num_entries}; run "
            "every backward before clip_grad_norm_, and zero_grad() after step()"
        )
    return cache


def _new_cache(table: MemoryTable, num_entries: int, version: int) -> StepCache:
    factors, sharding = factors_of(table), table.sharding
    if sharding is not None and sharding.replica_group is not None:
        factors = factors.gathered(sharding.replica_group)
    grouping = _group(factors.slots, rows_here(table))
    cache = StepCache(num_entries, version, factors, grouping)
    if sharding is not None:
        cache.multiply(torch.full((), sharding.gradient_scale, device=factors.device))
    return cache


def _captured_step_cache(table: MemoryTable, capture: int) -> StepCache:
    """`step_cache` of the graph that is being captured, whose entries cannot be counted."""
    factors = factors_of(table)
    cache: StepCache | None = factors.step_cache
    if cache is None:
        if table.sharding is not None and table.sharding.num_replicas > 1:
            raise RuntimeError(
                "table: clipping and steps of a table with copies on other ranks, whose factors "
                "they exchange, cannot be captured in a CUDA graph"
            )
        cache = _new_cache(table, factors.slots.shape[0], 0)
        cache.capture, cache.appends = capture, factors.appends
        factors.step_cache = cache
    elif cache.capture != capture:
        raise RuntimeError(
            "table: clipping or a step saw the factors outside the CUDA graph that is captured, or "
            "in another one; capture backward, clip_grad_norm_ and step together, and call "
            "zero_grad() before and after"
        )
    elif cache.appends != factors.appends:
        raise RuntimeError(
            "table: a backward was captured after clipping or a step; run every backward before "
            "clip_grad_norm_, and zero_grad() after step()"
        )
    return cache


@nvtx.annotate("ultramem::table_group")
def _group(slots: Tensor, num_slots: int) -> Grouping:
    return Grouping(*torch.ops.ultramem.table_group(slots, num_slots))


class FactoredGradient(NamedTuple):
    """grad[slots[e], slice c] += weights[e, c] * source[e // num_selected, groups[e], slice c]."""

    weights: Tensor  # [n, C] float32, float64 for float64 tables
    groups: Tensor | None  # [n] uint8
    source: Tensor  # [tokens, G, dim]
    num_selected: int


def factored_gradient(table: MemoryTable, param: Tensor) -> FactoredGradient | None:
    """One parameter's share of the table's factors; None where the backward kept none for it."""
    factors = step_cache(table).factors
    if param is table.values:
        return FactoredGradient(
            factors.weights, factors.groups, factors.grad_outs, factors.num_selected
        )
    if factors.grad_a is None or factors.pre_inputs is None:
        return None
    return FactoredGradient(
        factors.grad_a[:, None], None, factors.pre_inputs[:, None], factors.num_selected
    )


@nvtx.annotate("ultramem::table_grad_sum_sq")
def sum_of_squares(table: MemoryTable, param: Tensor) -> Tensor:
    """Of the gradient of the parameter's part on this rank, a float64 scalar on the device;
    step_cache's scale is not applied.

    Every row is summed first, in float32 (float64 for float64 tables), so that the result is exact
    where entries of a slot cancel. A second pass over the factors; no gradient table is made.
    """
    gradient = factored_gradient(table, param) if has_entries(table) else None
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device=param.device)
    weights, groups, source, num_selected = gradient
    result: Tensor = torch.ops.ultramem.table_grad_sum_sq(
        *step_cache(table).grouping,
        weights,
        groups,
        source,
        num_selected,
        rows_here(table),
    )
    return result


def found_nonfinite(table: MemoryTable) -> Tensor:
    """float32 scalar on the device: 1 where a factor is NaN or infinite, else 0; of a table over
    several ranks, on any of them.

    One pass over the factors, through their largest magnitudes.
    """
    factors = step_cache(table).factors
    parts = (factors.weights, factors.grad_a, factors.grad_outs, factors.pre_inputs)
    largest = [
        torch.linalg.vector_norm(part, float("inf")).float()
        for part in parts
        if part is not None and part.numel()
    ]
    found = (~torch.stack(largest).isfinite().all()).float()
    return found if table.sharding is None else table.sharding.max_over_mesh(found)


def trained_parameters(table: MemoryTable) -> list[nn.Parameter]:
    return [param for param in table.parameters() if param.requires_grad]


def _group_fake(slots: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    torch._check(
        slots.dim() == 1 and slots.dtype == torch.int32,
        lambda: f"table_group: slots must be int32 [n], got {slots.dtype} {list(slots.shape)}",
    )
    n = slots.shape[0]
    length = 64
    while n // length > 65536:
        length *= 2
    sums = 2 * -(-n // length) if n > length else 0
    shapes: list[tuple[Any, ...]] = [(n,), (n,), (min(n, num_rows) + 1,), (sums, 2), (2,)]
    return tuple(slots.new_empty(shape) for shape in shapes)


def _sum_sq_fake(*arguments: Any) -> Tensor:
    return arguments[5].new_empty((), dtype=torch.float64)


def _row_sq_fake(*arguments: Any) -> Tensor:
    weights: Tensor = arguments[5]
    return weights.new_empty((min(arguments[0].shape[0], arguments[9]),))


def _update_fake(*_: Any) -> None:
    return None


if _library.is_loaded():
    torch.library.register_fake("ultramem::table_group", _group_fake)
    torch.library.register_fake("ultramem::table_grad_sum_sq", _sum_sq_fake)
    torch.library.register_fake("ultramem::table_grad_row_sq", _row_sq_fake)
    torch.library.register_fake("ultramem::table_update", _update_fake)
