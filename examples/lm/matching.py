"""Makes the kinds comparable: equal active parameters, and equal totals for the sparse ones.

Everything is counted on real modules, built on torch's meta device where they cost nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from .config import ModelConfig
from .layers import MoE
from .model import ByteLM

# Widths are multiples of this: 16 bytes of bf16, which grouped_mm wants of its strides.
WIDTH_STEP = 8


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


def matched(config: ModelConfig) -> ModelConfig:
    """``config`` with the sizes that make its kind comparable with the dense one.

    The dense model of ``config.ffn_inner`` sets the active parameters: the memory kinds get a
    narrower FFN. UltraMemV2, so narrowed, sets the total: ``moe`` gets its number of experts from
    it (and stands for active parameters as ``expert_inner`` makes it), ``pkm`` its value width.
    """
    if config.kind == "dense":
        return config
    dense = counts_of(dataclasses.replace(config, kind="dense"))
    memory = _match_ffn(dataclasses.replace(config, kind="ultramem_v2"), dense.active)
    if config.kind == "ultramem_v2":
        return memory
    total = counts_of(memory).total
    if config.kind == "moe":
        return _solve(config, "num_experts", "total", total, step=1)
    wide = config
    # Two rounds: a wider value row takes a little from the FFN, which gives back a little total.
    for _ in range(2):
        wide = _match_ffn(_solve(wide, "value_dim", "total", total, step=WIDTH_STEP), dense.active)
    return wide


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
