"""The value table: one pair of parameters that all memory layers of a model share."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import UltraMemConfig
from .init import table_std


class MemoryTable(nn.Module):
    """Rows (pre-value, value), the slots that memory layers read: each an FFN of inner width 1
    (PEER).

    Hold it in one module of the model and pass it to the layers' ``forward``; so it appears once in
    the state dict.

    Attributes:
        values: parameter [num_slots, value_dim].
        pre_values: parameter [num_slots, pre_value_dim], or None without pre-values.

    Args:
        num_slots: rows, N; N times the width may pass 2^31.
        value_dim: Dv.
        pre_value_dim: Dp; 0 or None for plain values.
        dtype: of both parameters, any that ``ops.value_ffn`` takes.
        grad_mode: "dense", ordinary gradients (accumulated in ``param.main_grad`` where that
            exists). No other mode is available in this version.
        init_std: standard deviation of the normal initialisation of both parameters.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        NotImplementedError: ``grad_mode="deferred"``.
    """

    values: nn.Parameter
    pre_values: nn.Parameter | None

    def __init__(
        self,
        num_slots: int,
        value_dim: int,
        pre_value_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grad_mode: str = "dense",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("num_slots", num_slots, 1),
            ("value_dim", value_dim, 1),
            ("pre_value_dim", 0 if pre_value_dim is None else pre_value_dim, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                wanted = "an int or None" if name == "pre_value_dim" else "an int"
                raise TypeError(f"{name}: must be {wanted}, got {value!r}")
            if value < low:
                raise ValueError(f"{name}: must be at least {low}, got {value}")
        if isinstance(init_std, bool) or not isinstance(init_std, int | float):
            raise TypeError(f"init_std: must be a number, got {init_std!r}")
        if not (math.isfinite(init_std) and init_std >= 0.0):
            raise ValueError(f"init_std: must be finite and not negative, got {init_std}")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: must be a torch.dtype or None, got {dtype!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: must be a floating-point type, got {dtype}")
        if grad_mode == "deferred":
            raise NotImplementedError(
                "grad_mode: must be 'dense', got 'deferred'; deferred gradients are not available "
                "in this version"
            )
        if grad_mode != "dense":
            raise ValueError(f"grad_mode: must be 'dense', got {grad_mode!r}")
        self.num_slots = num_slots
        self.value_dim = value_dim
        self.pre_value_dim = pre_value_dim or 0
        self.grad_mode = grad_mode
        self.init_std = init_std
        self.values = nn.Parameter(torch.empty(num_slots, value_dim, dtype=dtype, device=device))
        if self.pre_value_dim:
            pre_values = torch.empty(num_slots, self.pre_value_dim, dtype=dtype, device=device)
            self.pre_values = nn.Parameter(pre_values)
        else:
            self.register_parameter("pre_values", None)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: UltraMemConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grad_mode: str = "dense",
    ) -> MemoryTable:
        """The table of ``config``, initialised as ``config.init`` says."""
        return cls(
            config.num_slots,
            config.value_dim,
            config.pre_value_dim,
            dtype=dtype,
            device=device,
            grad_mode=grad_mode,
            init_std=table_std(config),
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both parameters from N(0, init_std^2) with torch's default generator."""
        self.values.normal_(0.0, self.init_std)
        if self.pre_values is not None:
            self.pre_values.normal_(0.0, self.init_std)

    def check_matches(self, config: UltraMemConfig) -> None:
        """Raise where a layer of ``config`` cannot read this table.

        Raises:
            ValueError: another number or width of rows.
            NotImplementedError: the rows are sharded.
        """
        if hasattr(self.values, "device_mesh"):
            raise NotImplementedError(
                "table: its rows are a DTensor, which is not available in this version; leave the "
                "table in FSDP's root unit, or exclude it from sharding"
            )
        for name in ("num_slots", "value_dim", "pre_value_dim"):
            mine, theirs = getattr(self, name), getattr(config, name)
            if mine != theirs:
                raise ValueError(
                    f"table: {name} must be {theirs}, as in the layer's config, got {mine}"
                )

    def extra_repr(self) -> str:
        return (
            f"num_slots={self.num_slots}, value_dim={self.value_dim}, "
            f"pre_value_dim={self.pre_value_dim}, dtype={self.values.dtype}, "
            f"grad_mode={self.grad_mode!r}"
        )
