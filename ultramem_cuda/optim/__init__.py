"""Optimizers for memory tables; parameter groups and learning rates that also work with
``torch.optim``.

    optimizer = um.optim.MemoryAdam(um.optim.param_groups(model, 1e-3, weight_decay=0.1))
    loss.backward()
    um.optim.clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

from .clipping import GradScaler, clip_grad_norm_
from .groups import lr_lambdas, param_groups, value_lr_factor
from .memory import MemoryAdagrad, MemoryAdam, MemorySGD

__all__ = [
    "GradScaler",
    "MemoryAdagrad",
    "MemoryAdam",
    "MemorySGD",
    "clip_grad_norm_",
    "lr_lambdas",
    "param_groups",
    "value_lr_factor",
]
