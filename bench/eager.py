"""The operators in plain torch: the peers that `bench.ops` measures against.

Each function takes and returns what its namesake in `ultramem_cuda.ops` does and computes the same
thing, the way it is written without kernels of one's own: batched matmuls, topk, gather, einsum,
autograd for the backward. Where torch offers several spellings, the one that was fastest forward
and backward on the CPU was taken. All run under torch.compile.

They are not a reference (that is `python_ref`): in bfloat16 and float16 scores are rounded before
they are ranked, and the order of equal ranks is whatever torch.topk makes of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["product_key_topk", "tucker_filter", "tucker_query", "value_ffn", "value_ffn_bag"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def tucker_query(
    x: Tensor, weight: Tensor, norm_weight: Tensor, *, num_heads: int = 1, eps: float = 1e-6
) -> Tensor:
    """``RMSNorm_Kd(x W^T)`` for each side, head and rank.

    Args:
        x: [T, D].
        weight: [2*H*Q*Kd, D], rows ordered (side, head, query, Kd).
        norm_weight: [Kd].

    Returns:
        query [T, 2, H, Q, Kd].
    """
    key_dim = norm_weight.shape[0]
    projection = F.linear(x, weight).view(x.shape[0], 2, num_heads, -1, key_dim)
    return F.rms_norm(projection, (key_dim,), norm_weight.to(projection.dtype), eps)


def tucker_filter(core: Tensor) -> tuple[Tensor, Tensor]:
    """Leading singular vectors (u [H, R], t [H, R]) of the summed cores, sum(u) >= 0.

    Args:
        core: [C, H, R, R], float32 or float64, with distinct singular values.
    """
    left, _, right = torch.linalg.svd(core.detach().sum(0))
    u, t = left[..., :, 0], right[..., 0, :]
    sign = torch.where(u.sum(-1, keepdim=True) < 0, -1.0, 1.0).to(core.dtype)
    return u * sign, t * sign


def product_key_topk(
    query: Tensor,
    keys: Tensor,
    core: Tensor,
    *,
    topk: int,
    axis_topk: int | None = None,
    u: Tensor | None = None,
    t: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The M best of n*n product keys under the Tucker rule (no additive mode).

    Args:
        query: [T, 2, H, Q, Kd], Q = 1 or R.
        keys: [H, 2, R, n, Kd].
        core: [C, H, R, R]; scores are computed in its dtype.
        u, t: [H, R], default `tucker_filter`.
        key_norm_weight: [Kd], or None where keys are normalised already.

    Returns:
        scores [T, H, M, C], indices [T, H, M] = row * n + col, descending by the sum over cores.
    """
    num_cores, _, rank, _ = core.shape
    num_keys, key_dim = keys.shape[-2:]
    if axis_topk is None:
        axis_topk = min(num_keys, topk, 128)
    if u is None or t is None:
        u, t = tucker_filter(core)
    if key_norm_weight is not None:
        keys = F.rms_norm(keys, (key_dim,), key_norm_weight.to(keys.dtype), eps)

    scores = query.permute(2, 1, 3, 0, 4) @ keys.transpose(-1, -2)  # [H, 2, R, T, n]
    with torch.no_grad():
        filters = torch.stack((u, t), dim=1).to(scores.dtype)  # [H, 2, R]
        axis_rank = torch.einsum("hxr,hxrtn->hxtn", filters, scores)
        axis = axis_rank.topk(axis_topk, dim=-1, sorted=False).indices  # [H, 2, T, m]
    kept = scores.gather(-1, axis.unsqueeze(2).expand(-1, -1, rank, -1, -1)).to(core.dtype)
    row, col = kept.unbind(1)  # [H, R, T, m] each

    folded = torch.einsum("chrs,hrti->htcsi", core, row)
    grid = torch.einsum("htcsi,hstj->htcij", folded, col).flatten(-2)  # [H, T, C, m*m]
    best = grid.detach().sum(2).topk(topk, dim=-1).indices  # [H, T, M]
    selected = grid.gather(-1, best.unsqueeze(2).expand(-1, -1, num_cores, -1))
    rows = axis[:, 0].gather(-1, best // axis_topk)
    cols = axis[:, 1].gather(-1, best % axis_topk)
    return selected.permute(1, 0, 3, 2), (rows * num_keys + cols).transpose(0, 1)


def _slot_weights(
    indices: Tensor,
    scores: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    activation: str,
) -> Tensor:
    """w [T, S, C] = act(<pre_input, pre_value>) * score; the score alone without pre-values."""
    if pre_values is None or pre_input is None:
        return scores
    pre_rows = F.embedding(indices, pre_values)  # [T, S, Dp]
    hidden = _ACTIVATIONS[activation](torch.einsum("td,tsd->ts", pre_input, pre_rows))
    return hidden.unsqueeze(-1) * scores


def value_ffn(
    indices: Tensor,
    scores: Tensor,
    values: Tensor,
    pre_values: Tensor | None = None,
    pre_input: Tensor | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    """The sum over the retrieved slots of ``act(<pre_input, pre_value>) * score * value``.

    Args:
        indices: [T, S] rows of the table (no addressing).
        scores: [T, S, C].
        values: [N, Dv]; C divides Dv.
        pre_values: [N, Dp], pre_input: [T, Dp], dtype of values; both or neither.

    Returns:
        out [T, Dv], dtype of values.
    """
    weights = _slot_weights(indices, scores, pre_values, pre_input, activation)
    rows = F.embedding(indices, values).unflatten(-1, (scores.shape[-1], -1))  # [T, S, C, Dv/C]
    return torch.einsum("tsc,tscd->tcd", weights.to(values.dtype), rows).flatten(1)


def value_ffn_bag(
    indices: Tensor,
    scores: Tensor,
    values: Tensor,
    pre_values: Tensor | None = None,
    pre_input: Tensor | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    """`value_ffn` with its second half as torch's fused weighted sum, F.embedding_bag.

    The table is seen as N*C rows of Dv/C, and each token as C bags of S rows.
    """
    tokens, selected = indices.shape
    num_cores = scores.shape[-1]
    weights = _slot_weights(indices, scores, pre_values, pre_input, activation).to(values.dtype)
    core_ids = torch.arange(num_cores, device=indices.device)
    slices = (indices.unsqueeze(1) * num_cores + core_ids.unsqueeze(-1)).view(-1, selected)
    out = F.embedding_bag(
        slices,
        values.view(values.shape[0] * num_cores, -1),
        mode="sum",
        per_sample_weights=weights.transpose(1, 2).reshape(-1, selected),
    )
    return out.view(tokens, -1)
