"""Makes the kinds comparable: equal active parameters, and equal totals for the sparse ones.

Everything is counted on real modules, built on torch's meta device where they cost nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .config import ModelConfig
from .layers import MoE
from .model import ByteLM

# Widths are multiples of this: 16 bytes of bf16, which grouped_mm wants of its strides.
WIDTH_STEP = 8
# How far from those they are matched to the counts may lie.
ACTIVE_TOLERANCE = 0.01
TOTAL_TOLERANCE = 0.02


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model: all of them, those a token uses, and those in the memory table.

    A token uses everything but the experts it is not sent to and the slots it does not read.
    """

    total: int
    active: int
    table: int


def count_parameters(model: ByteLM) -> ParameterCounts:
    """Counts the parameters of a built model."""
    total = sum(parameter.numel() for parameter in model.parameters())
    table = 0 if model.table is None else sum(p.numel() for p in model.table.parameters())
    active = total - table
    for block in model.typed_blocks():
        if isinstance(block.ffn, MoE):
            held = sum(parameter.numel() for parameter in block.ffn.parameters())
            active += block.ffn.active_parameters() - held
        if block.memory is not None:
            layer = block.memory.config
            active += layer.slots_per_token * (layer.pre_value_dim + layer.value_dim)
    return ParameterCounts(total=total, active=active, table=table)


@functools.lru_cache(maxsize=256)
def counts_of(config: ModelConfig) -> ParameterCounts:
    """Counts of the model that ``config`` describes, without allocating it."""
    with torch.device("meta"):
        return count_parameters(ByteLM(config))


def matched(config: ModelConfig, *, keep_expert_inner: bool = False) -> ModelConfig:
    """``config`` with the sizes that make its kind comparable with the dense one.

    The dense model of ``config.ffn_inner`` sets the active parameters: the memory kinds get a
    narrower FFN, ``moe`` another ``expert_inner`` where its own does not match within
    ``ACTIVE_TOLERANCE`` (unless told to keep it). UltraMemV2, so narrowed, sets the total: ``moe``
    gets its number of experts from it, ``pkm`` its value width.
    """
    if config.kind == "dense":
        return config
    dense = counts_of(dataclasses.replace(config, kind="dense"))
    memory = _match_ffn(dataclasses.replace(config, kind="ultramem_v2"), dense.active)
    if config.kind == "ultramem_v2":
        return memory
    total = counts_of(memory).total
    if config.kind == "moe":
        return _match_experts(config, dense.active, total, keep_expert_inner)
    wide = config
    # Two rounds: a wider value row takes a little from the FFN, which gives back a little total.
    for _ in range(2):
        wide = _match_ffn(_solve(wide, "value_dim", "total", total, step=WIDTH_STEP), dense.active)
    return wide


def deviations(base: ModelConfig, models: Iterable[ModelConfig]) -> list[str]:
    """A line for each count of ``models``, matched from ``base``, that is out of tolerance."""
    dense = counts_of(dataclasses.replace(base, kind="dense"))
    lines = []
    for model in models:
        counts = counts_of(model)
        active = counts.active / dense.active - 1
        if abs(active) > ACTIVE_TOLERANCE:
            lines.append(f"{model.kind} has {active:+.1%} active parameters against dense")
        if model.kind not in ("moe", "pkm"):
            continue
        memory = counts_of(matched(dataclasses.replace(base, kind="ultramem_v2")))
        total = counts.total / memory.total - 1
        if abs(total) > TOTAL_TOLERANCE:
            lines.append(f"{model.kind} has {total:+.1%} parameters in total against ultramem_v2")
    return lines


def _match_experts(config: ModelConfig, active: int, total: int, keep_width: bool) -> ModelConfig:
    """Width and number of experts; the first width within both tolerances, starting with its own.

    Widths between the multiples of ``WIDTH_STEP`` come last: they have no grouped product.
    """
    enough = max(config.num_experts, config.experts_per_token)
    config = dataclasses.replace(config, num_experts=enough)

    def with_width(inner: int) -> ModelConfig:
        return _solve(_with(config, "expert_inner", inner), "num_experts", "total", total, step=1)

    def miss(inner: int) -> tuple[bool, bool, float]:
        """Smaller is better; active parameters come first."""
        try:
            counts = counts_of(with_width(inner))
        except ValueError:
            return True, True, math.inf
        off_active = abs(counts.active / active - 1) / ACTIVE_TOLERANCE
        off_total = abs(counts.total / total - 1) / TOTAL_TOLERANCE
        return off_active > 1, off_total > 1, max(off_active, off_total)

    def fits(inner: int) -> bool:
        return miss(inner)[:2] == (False, False)

    best = config.expert_inner
    if keep_width or fits(best):
        return with_width(best)
    for step in (WIDTH_STEP, 1):
        wide = config
        # Rounds, because every expert also adds a row to the router, which is always active.
        for _ in range(3):
            wide = _solve(wide, "expert_inner", "active", active, step)
            wide = _solve(wide, "num_experts", "total", total, step=1)
        # Neighbours, because a whole number of experts may miss the total where theirs does not.
        near = range(wide.expert_inner - 3 * step, wide.expert_inner + 4 * step, step)
        best = min((inner for inner in near if inner > 0), key=miss)
        if fits(best):
            break
    return with_width(best)


def _match_ffn(config: ModelConfig, active: int) -> ModelConfig:
    return _solve(config, "ffn_inner", "active", active, step=WIDTH_STEP)


def _solve(config: ModelConfig, field: str, count: str, target: int, step: int) -> ModelConfig:
    """Sets an integer field to the multiple of ``step`` that brings a count closest to target.

    Every count is linear in every size solved for, so two models determine the line.
    """
    start: int = getattr(config, field)
    here = getattr(counts_of(config), count)
    there = getattr(counts_of(_with(config, field, start + step)), count)
    solution = start + step * round((target - here) / (there - here))
    if solution < step:
        raise ValueError(
            f"{field}: no positive value matches {target:,} {count} parameters; "
            f"make ffn_inner larger or the memory layer smaller"
        )
    return _with(config, field, solution)


def _with(config: ModelConfig, field: str, value: int) -> ModelConfig:
    changes: dict[str, Any] = {field: value}
    return dataclasses.replace(config, **changes)
