"""What csrc/torch refuses, in the same words, for tensors that no kernel ever sees.

torch calls the fake implementations for torch.compile and for the meta device, and wherever a
single meta tensor is among real ones. `torch._check` takes sizes that are symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_TUCKER_RANK = 4
MAX_NUM_CORES = 4
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class ArgumentChecks:
    """Checks of one call. ``reference`` is the tensor whose device all others must be on."""

    def __init__(self, op: str, reference_name: str, reference: Tensor) -> None:
        self.op = op
        self.reference_name = reference_name
        self.reference = reference

    def check(self, condition: Any, message: str) -> None:
        torch._check(condition, lambda: f"{self.op}: {message}")

    def dtype(self, name: str, tensor: Tensor) -> None:
        """One of the types that operators compute in."""
        self.check(
            tensor.dtype in FLOAT_DTYPES,
            f"{name} must be float32, bfloat16, float16 or float64, got {dtype_name(tensor.dtype)}",
        )
        self.check(
            tensor.dtype != torch.float64 or self.reference.device.type != "cuda",
            f"{name} is float64, which is offered on the CPU only; use float32, bfloat16 or "
            "float16 on CUDA",
        )

    def has_dtype(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        self.check(
            tensor.dtype == dtype,
            f"{name} must be {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}",
        )

    def gain_dtype(self, name: str, gain: Tensor, like: torch.dtype) -> None:
        """That of a norm's gain, see `gain_cast`."""
        if gain.dtype != like:
            self.has_dtype(name, gain, accumulation_dtype(like))

    def shape(self, name: str, tensor: Tensor, layout: str, sizes: Sequence[Any]) -> None:
        """Device and shape; a size of None may be anything."""
        self.check(
            tensor.device == self.reference.device,
            f"{name} must be on the device of {self.reference_name}, {self.reference.device}, "
            f"got {tensor.device}",
        )
        known = ", ".join("*" if size is None else str(size) for size in sizes)
        wanted = layout if all(size is None for size in sizes) else f"{layout} = [{known}]"
        message = f"{name} must be {wanted}, got {list(tensor.shape)}"
        self.check(tensor.dim() == len(sizes), message)
        for actual, size in zip(tensor.shape, sizes, strict=True):
            if size is not None:
                self.check(actual == size, message)


def check_rank_and_cores(checks: ArgumentChecks, rank: Any, cores: Any, where: str = "") -> None:
    ranks = f"the Tucker rank R{where} must be 1..{MAX_TUCKER_RANK}, got {rank}"
    checks.check(rank >= 1, ranks)
    checks.check(rank <= MAX_TUCKER_RANK, ranks)
    check_cores(checks, cores)


def check_cores(checks: ArgumentChecks, cores: Any, where: str = "") -> None:
    message = f"the number of cores C{where} must be 1..{MAX_NUM_CORES}, got {cores}"
    checks.check(cores >= 1, message)
    checks.check(cores <= MAX_NUM_CORES, message)


def check_query_and_keys(checks: ArgumentChecks, query: Tensor, keys: Tensor) -> None:
    """query [T, 2, H, Q, Kd] and keys [H, 2, R, n, Kd] of one dtype, Q 1 or R."""
    checks.dtype("query", query)
    checks.shape("query", query, "[T, 2, H, Q, Kd]", (None, 2, None, None, None))
    heads, queries, key_dim = query.shape[2:]
    checks.shape("keys", keys, "[H, 2, R, n, Kd]", (heads, 2, None, None, key_dim))
    checks.has_dtype("keys", keys, query.dtype)
    rank, num_keys = keys.shape[2:4]
    for size in (heads, key_dim, num_keys):
        checks.check(size >= 1, "H, Kd and n must be positive")
    check_rank_and_cores(checks, rank, 1, " (keys.shape[2])")
    if queries != 1:
        checks.check(queries == rank, f"query.shape[3] must be 1 or R = {rank}, got {queries}")
