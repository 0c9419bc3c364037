"""Optional auxiliary losses of memory layers, in plain torch. Both are off by default, as in
UltraMemV2."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn


def tucker_penalty(sigma: Tensor, *, margin: float = 0.15) -> Tensor:
    """Penalty on all but the largest singular value of the summed Tucker core (UltraMem, section
    3.3), without its weight.

        1 / (R - 1) * sum_{i >= 2} max(0, sigma_i - margin)^2,   averaged over heads; 0 where R = 1

    It keeps the core close to rank one, so that the filter along its leading singular vectors loses
    little.

    Args:
        sigma: singular values [H, R], descending, from ``ops.tucker_filter``.
        margin: tau.
    """
    if sigma.dim() != 2:
        raise ValueError(f"sigma: must have shape [H, R], got {list(sigma.shape)}")
    if sigma.shape[1] == 1:
        return sigma.sum() * 0.0
    return (sigma[:, 1:] - margin).clamp_min(0.0).square().mean()


def key_balance_loss(
    axis_scores: Tensor, axis_indices: Tensor, *, normalize: str = "paper"
) -> Tensor:
    """Key balance loss of one axis (UltraMemV2, eq. 18-20), without its weight.

        n * sum_i f_i p_i

    p_i is the mean over tokens and heads of softmax(scores)_i; f_i counts how often key i was kept,
    divided by T ("paper", eq. 20) or by T*H*m ("release", which makes f sum to 1). Heads are pooled
    by key id, as in the release. Only p is differentiable. A layer adds the losses of its two axes.

    Args:
        axis_scores: filter scores [T, H, n] of every key.
        axis_indices: kept keys [T, H, m], integer.
        normalize: "paper" or "release".

    Returns:
        A scalar; 0 without tokens.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    if normalize not in ("paper", "release"):
        raise ValueError(f"normalize: must be 'paper' or 'release', got {normalize!r}")
    if axis_scores.dim() != 3:
        raise ValueError(f"axis_scores: must have shape [T, H, n], got {list(axis_scores.shape)}")
    num_tokens, num_heads, num_keys = axis_scores.shape
    if axis_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"axis_indices: must be int32 or int64, got {axis_indices.dtype}")
    if axis_indices.dim() != 3 or axis_indices.shape[:2] != axis_scores.shape[:2]:
        raise ValueError(
            f"axis_indices: must have shape [{num_tokens}, {num_heads}, m], "
            f"got {list(axis_indices.shape)}"
        )
    if num_tokens == 0:
        return axis_scores.sum()
    probability = axis_scores.softmax(-1).mean((0, 1))
    kept = axis_indices.flatten().to(torch.int64)
    counts = torch.zeros_like(probability, requires_grad=False)
    counts = counts.index_add(0, kept, torch.ones_like(kept, dtype=counts.dtype))
    total = num_tokens if normalize == "paper" else kept.numel()
    return num_keys * torch.dot(counts / total, probability)


def axis_filter_scores(query: Tensor, keys: Tensor, directions: Tensor) -> Tensor:
    """Scores by which each axis ranks its keys, sum_r d_r (q_r . k_{i,r}), for all keys.

    Args:
        query: [T, 2, H, Q, Kd], Q = R or 1.
        keys: normalised keys [H, 2, R, n, Kd].
        directions: u and t, [2, H, R].

    Returns:
        [2, T, H, n] in the type that the arguments promote to, at least fp32. It holds all scores
        of all keys; the retrieval itself never does.
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    with _without_autocast(query.device.type):
        # Folding the direction into the query contracts rank and Kd at once and needs no [T, R, n].
        scaled = query.to(dtype) * directions.to(dtype)[None, ..., None]
        return torch.einsum("tahrk,harnk->athn", scaled, keys.to(dtype))


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    # The meta device has no autocast to turn off.
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def collect_aux_losses(model: nn.Module) -> dict[str, Tensor]:
    """Sum, by name, of the weighted losses that the memory layers of ``model`` left behind in their
    last forward pass.

    Add the values to the training loss. Empty where all penalties are off, and after a forward pass
    in eval mode.
    """
    from .layer import UltraMemLayer

    totals: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, UltraMemLayer):
            for name, value in module.last_losses.items():
                totals[name] = totals[name] + value if name in totals else value
    return totals
