"""Tables learn at a rate of their own (UltraMemV2, section 4.2.9)."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..layer import UltraMemLayer
from ..table import MemoryTable


def value_lr_factor(step: float, *, times: float, max_steps: int, rate: float = 1.0) -> float:
    """Learning rate of the table over that of the network: 1 + (times - 1) * max(0, 1 - step /
    (max_steps * rate)).

    It falls linearly from ``times`` to 1 over the fraction ``rate`` of the run. UltraMemV2 uses 4
    to 1; a high rate helps short runs.

    Args:
        step: optimizer steps done, from 0.
        times: factor at the start.
        max_steps: steps of the run.
        rate: fraction of the run after which the factor is 1.
    """
    if not (math.isfinite(times) and times > 0.0):
        raise ValueError(f"times: must be positive, got {times}")
    if max_steps < 1:
        raise ValueError(f"max_steps: must be at least 1, got {max_steps}")
    if not step >= 0.0:
        raise ValueError(f"step: must not be negative, got {step}")
    if not rate > 0.0:
        raise ValueError(f"rate: must be positive, got {rate}")
    return 1.0 + (times - 1.0) * max(0.0, 1.0 - step / (max_steps * rate))


def param_groups(
    model: nn.Module,
    lr: float,
    value_lr_multiplier: float = 4.0,
    *,
    weight_decay: float = 0.1,
    value_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups of all trainable parameters for :class:`MemoryAdam`, ``torch.optim.AdamW`` and their
    like.

    Args:
        model: holds the network and its tables.
        lr: learning rate of the network.
        value_lr_multiplier: the tables' learning rate over the network's at the start; see
            :func:`lr_lambdas` for its decay.
        weight_decay: of the network's parameters of two dimensions and more (keys, cores and
            embeddings are among them); gains, biases and other vectors get none.
        value_weight_decay: of the tables, of every row at every step, read or not. Those with
            deferred gradients take it at no cost, with the optimizers of this package.

    Returns:
        Up to three non-empty groups, named ("name") "network", "network_no_decay" and "memory".
        Each carries "value_lr_multiplier" (1 for the network) for :func:`lr_lambdas`.

    Warns:
        UserWarning: ``model`` has memory layers and no table.
    """
    if not (math.isfinite(lr) and lr >= 0.0):
        raise ValueError(f"lr: must be finite and not negative, got {lr}")
    if not (math.isfinite(value_lr_multiplier) and value_lr_multiplier > 0.0):
        raise ValueError(f"value_lr_multiplier: must be positive, got {value_lr_multiplier}")
    tables = [m for m in model.modules() if isinstance(m, MemoryTable)]
    if not tables and any(isinstance(m, UltraMemLayer) for m in model.modules()):
        warnings.warn(
            "param_groups: model has memory layers but holds no MemoryTable, so its rows are in no "
            "group; pass the module that holds the table too",
            stacklevel=2,
        )
    in_tables = {id(p) for table in tables for p in table.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    memory = [p for p in trainable if id(p) in in_tables]
    network = [p for p in trainable if id(p) not in in_tables]
    groups: list[dict[str, Any]] = [
        {
            "name": "network",
            "params": [p for p in network if p.dim() >= 2],
            "lr": lr,
            "weight_decay": weight_decay,
            "value_lr_multiplier": 1.0,
        },
        {
            "name": "network_no_decay",
            "params": [p for p in network if p.dim() < 2],
            "lr": lr,
            "weight_decay": 0.0,
            "value_lr_multiplier": 1.0,
        },
        {
            "name": "memory",
            "params": memory,
            "lr": lr * value_lr_multiplier,
            "weight_decay": value_weight_decay,
            "value_lr_multiplier": value_lr_multiplier,
        },
    ]
    return [group for group in groups if group["params"]]


def lr_lambdas(
    groups: Iterable[Mapping[str, Any]],
    schedule: Callable[[int], float],
    *,
    max_steps: int,
    rate: float = 1.0,
) -> list[Callable[[int], float]]:
    """One function a group for ``torch.optim.lr_scheduler.LambdaLR``.

    The network follows ``schedule`` (step -> factor of its learning rate), the tables ``schedule``
    times :func:`value_lr_factor`::

        optimizer = torch.optim.AdamW(um.optim.param_groups(model, 1e-3))
        factors = um.optim.lr_lambdas(optimizer.param_groups, cosine, max_steps=10_000)
        scheduler = LambdaLR(optimizer, factors)

    Args:
        groups: from :func:`param_groups`, or ``optimizer.param_groups`` made of them; other groups
            follow ``schedule``.
        schedule: factor of the network's learning rate at a step.
        max_steps, rate: of :func:`value_lr_factor`.
    """

    def scaled(step: int, *, times: float) -> float:
        # A group's initial rate already holds the factor's start.
        factor = value_lr_factor(step, times=times, max_steps=max_steps, rate=rate)
        return schedule(step) * factor / times

    return [
        functools.partial(scaled, times=float(group.get("value_lr_multiplier", 1.0)))
        for group in groups
    ]
