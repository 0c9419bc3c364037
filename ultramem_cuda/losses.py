"""Optional auxiliary losses of memory layers. Both are off by default, as in UltraMemV2.

The key balance loss is an operator: :func:`ultramem_cuda.ops.key_balance_loss`.
"""

from __future__ import annotations

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
