"""RMS normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library, nvtx
from ._checks import ArgumentChecks
from ._common import gain_cast, register


@nvtx.annotate("ultramem::rms_norm fwd")
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """RMS normalisation over the last dimension: ``x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        x: [..., Kd], float32, bfloat16, float16 (float64 on the CPU).
        weight: [Kd], any float dtype; used in the accumulation dtype.

    Returns:
        Like x, rounded once.
    """
    _library.require(x.device.type)
    gain = gain_cast("rms_norm", "weight", weight, x.dtype)
    return torch.ops.ultramem.rms_norm(x, gain, eps)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    checks = ArgumentChecks("rms_norm", "x", x)
    checks.dtype("x", x)
    checks.check(x.dim() >= 1, "x must have at least one dimension")
    checks.check(x.shape[-1] >= 1, "the last dimension of x must not be empty")
    checks.shape("weight", weight, "[dim of x]", (x.shape[-1],))
    checks.gain_dtype("weight", weight, x.dtype)
    checks.check(eps >= 0, f"eps must not be negative, got {eps}")
    return x.new_empty(x.shape)


def _rms_norm_bwd_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.ultramem.rms_norm_bwd(grad_y, x, weight, ctx.eps)
    return grad_x, grad_weight, None


if _library.is_loaded():
    register("rms_norm", _rms_norm_fake, _rms_norm_setup, _rms_norm_backward)
    register("rms_norm_bwd", _rms_norm_bwd_fake)
