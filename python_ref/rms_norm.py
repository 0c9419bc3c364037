"""RMS norm over the last axis: queries and keys are normalised over each segment of key_dim values.

UltraMemV2 (arXiv 2508.18756) normalises both before they are multiplied in equation 10.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ._arrays import FloatArray, f64, non_finite_ok


@non_finite_ok
def rms_norm(x: npt.ArrayLike, weight: npt.ArrayLike, eps: float = 1e-6) -> FloatArray:
    """y = weight * x / sqrt(mean(x^2) + eps), the mean over the last axis.

    x [..., Kd], weight [Kd], any real dtype; returns float64 [..., Kd].
    Raises ValueError where the last axis of x is not weight's.
    """
    x, weight = _checked(x, weight)
    return weight * x * _inverse_rms(x, eps)


@non_finite_ok
def rms_norm_bwd(
    grad_out: npt.ArrayLike, x: npt.ArrayLike, weight: npt.ArrayLike, eps: float = 1e-6
) -> tuple[FloatArray, FloatArray]:
    """Gradients of rms_norm: (grad_x [..., Kd], grad_weight [Kd]).

    With r = 1 / sqrt(mean(x^2) + eps), z = r x and g = weight * grad_out, dr/dx_k = -r^2 z_k / Kd,
    so

        grad_x      = r * (g - z * mean(g * z))
        grad_weight = sum over everything but the last axis of grad_out * z
    """
    x, weight = _checked(x, weight)
    grad_out = f64(grad_out)
    inverse_rms = _inverse_rms(x, eps)
    normed = x * inverse_rms
    grad_normed = grad_out * weight
    projection = (grad_normed * normed).mean(axis=-1, keepdims=True)
    grad_x = inverse_rms * (grad_normed - normed * projection)
    grad_weight = (grad_out * normed).reshape(-1, weight.size).sum(axis=0)
    return grad_x, grad_weight


def _checked(x: npt.ArrayLike, weight: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, weight = f64(x), f64(weight)
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.size or weight.size == 0:
        raise ValueError(
            f"rms_norm: x {x.shape} and weight {weight.shape} must be [..., Kd] and [Kd]"
        )
    return x, weight


def _inverse_rms(x: FloatArray, eps: float) -> FloatArray:
    inverse: FloatArray = 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return inverse
