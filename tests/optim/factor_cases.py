"""Tables with deferred gradients, filled by hand, and what their factors add up to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from helpers import Data, accumulation_dtype, array
from torch import Tensor

import ultramem_cuda as um
from ultramem_cuda import python_ref as ref

NOWHERE = -1  # as uint32 0xffffffff: contributes nothing


class Factors:
    """What a backward in deferred mode leaves, as the optimizers read it."""

    def __init__(self, device: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
        acc = accumulation_dtype(dtype)
        self.slots = torch.empty(0, dtype=torch.int32, device=device)
        self.weights = torch.empty(0, 1, dtype=acc, device=device)
        self.grad_a: Tensor | None = None
        self.groups: Tensor | None = None
        self.grad_outs = torch.empty(0, 1, dims[0], dtype=acc, device=device)
        self.pre_inputs: Tensor | None = None
        self.num_selected = 0
        self.num_tokens = 0
        self.step_cache: Any = None
        self.overflow = False

    def check(self) -> None:
        if self.overflow:
            raise RuntimeError("the table's buffers overflowed")

    def clear(self) -> None:
        self.slots, self.weights = self.slots[:0], self.weights[:0]
        self.grad_outs = self.grad_outs[:0]
        for name in ("grad_a", "groups", "pre_inputs"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[:0])
        self.num_tokens = 0
        self.step_cache = None


def deferred_table(
    data: Data,
    num_slots: int,
    value_dim: int,
    pre_value_dim: int = 0,
    dtype: torch.dtype = torch.float32,
) -> um.MemoryTable:
    table = um.MemoryTable(
        num_slots, value_dim, pre_value_dim, dtype=dtype, device=data.device, grad_mode="deferred"
    )
    with torch.no_grad():
        for param in table.parameters():
            param.copy_(data.normal(*param.shape, dtype=dtype))
    table.factors = Factors(data.device, dtype, (value_dim, pre_value_dim))
    return table


def fill(
    table: um.MemoryTable,
    data: Data,
    tokens: int,
    selected: int,
    *,
    cores: int = 1,
    groups: int = 1,
    source: torch.dtype | None = None,
    slots: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """As the backwards of a step do. slots: int64 [tokens * selected], drawn if None."""
    factors = table.factors
    acc = accumulation_dtype(table.values.dtype)
    source = acc if source is None or acc == torch.float64 else source
    n = tokens * selected
    if slots is None:
        slots = data.integers(table.num_slots, n)
    factors.slots = slots.to(data.device).to(torch.int32)
    factors.weights = data.normal(n, cores, dtype=acc, scale=scale)
    factors.grad_outs = data.normal(tokens, groups, table.value_dim, dtype=source)
    factors.groups = data.integers(groups, n, dtype=torch.uint8) if groups > 1 else None
    if table.pre_value_dim:
        factors.grad_a = data.normal(n, dtype=acc, scale=scale)
        factors.pre_inputs = data.normal(tokens, table.pre_value_dim, dtype=source)
    factors.num_selected, factors.num_tokens = selected, tokens
    factors.step_cache = None


def dense_gradients(table: um.MemoryTable) -> dict[str, np.ndarray]:
    """In float64, by parameter."""
    f = table.factors
    slots = f.slots.cpu().numpy().astype(np.int64) & 0xFFFFFFFF
    kept = np.flatnonzero(slots < table.num_slots)
    token = kept // max(f.num_selected, 1)
    group = 0 if f.groups is None else f.groups.cpu().numpy()[kept]
    weights = array(f.weights)[kept]
    slice_of = np.arange(table.value_dim) // (table.value_dim // weights.shape[1])
    grads = {"values": np.zeros((table.num_slots, table.value_dim))}
    np.add.at(grads["values"], slots[kept], weights[:, slice_of] * array(f.grad_outs)[token, group])
    if table.pre_value_dim:
        grads["pre_values"] = np.zeros((table.num_slots, table.pre_value_dim))
        terms = array(f.grad_a)[kept, None] * array(f.pre_inputs)[token]
        np.add.at(grads["pre_values"], slots[kept], terms)
    return grads


def touched_rows(table: um.MemoryTable) -> np.ndarray:
    slots = np.unique(table.factors.slots.cpu().numpy().astype(np.int64) & 0xFFFFFFFF)
    return slots[slots < table.num_slots]


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": um.optim.MemoryAdam,
    "adagrad": um.optim.MemoryAdagrad,
    "sgd": um.optim.MemorySGD,
}


class Reference:
    """One parameter's updates in float64, of touched rows alone where rows are given."""

    def __init__(self, kind: str, param: np.ndarray, **options: Any) -> None:
        param = param.copy()  # float64 arrays share their tensor's memory
        self.param, self.options = param, options
        self.state: Any = {
            "adam": ref.adam_init,
            "adagrad": ref.adagrad_init,
            "sgd": ref.sgd_init,
        }[kind](param)
        self.update = {
            "adam": ref.adam_update,
            "adagrad": ref.adagrad_update,
            "sgd": ref.sgd_update,
        }[kind]

    def step(self, grad: np.ndarray, rows: np.ndarray | None = None) -> None:
        options = dict(self.options)
        if rows is not None:
            grad = grad[rows]
            if isinstance(self.state, ref.AdamState):  # as SparseAdam adds it
                options["eps"] = options.get("eps", 1e-8) / np.sqrt(
                    1.0 - 0.999 ** (self.state.step + 1)
                )
        self.param, self.state = self.update(self.param, grad, self.state, rows=rows, **options)
