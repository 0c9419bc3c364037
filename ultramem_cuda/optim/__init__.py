"""Parameter groups and learning rates for models with a memory table; they work with
``torch.optim``."""

from __future__ import annotations

from .groups import lr_lambdas, param_groups, value_lr_factor

__all__ = ["lr_lambdas", "param_groups", "value_lr_factor"]
