"""The key balance loss, from queries and keys: the scores of all keys are never held at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _library, nvtx
from ._checks import ArgumentChecks, accumulation_dtype, check_query_and_keys, dtype_name
from ._common import (
    accumulation_cast,
    cast_for_autocast,
    check_rank,
    register,
    without_autocast,
)

_NORMALIZE = ("paper", "release")
# Of all that is made for the tokens that are worked on together. It fits in the L2 cache of the
# larger GPUs.
_PART_BYTES = 16_000_000


@nvtx.annotate("ultramem::key_balance_loss fwd")
def key_balance_loss(
    query: Tensor,
    keys: Tensor,
    axis_indices: Tensor,
    *,
    u: Tensor | None = None,
    t: Tensor | None = None,
    normalize: str = "paper",
) -> Tensor:
    """Key balance loss of rows and columns (UltraMemV2, eq. 18-20), without its weight.

    ::

        P[t,h,i] = softmax_i(u.S_row[:,i])    (columns: t.S_col)               (eq. 18)
        loss     = n * sum_i f_i p_i                                           (eq. 19)
        f_i      = Count_i / T,   p_i = mean over tokens and heads of P_i      (eq. 20)

    Count_i is how often key i was kept. Heads are pooled by key id, as in the release. Even use
    gives H*m a side, or 1 with "release". Only p carries a gradient: to query and keys.

    Scores [T, H, n] are never held: they are computed for some tokens at a time, in the backward
    again. Either pass takes at most 16 MB for them, however many tokens there are, and a few copies
    of one side's keys in the accumulation dtype; f, [2, n], is what is saved for the backward.
    Products are torch's own, in the accumulation dtype, and follow its TF32 setting.

    Args:
        query: [T, 2, H, Q, Kd], Q = 1 or R; as `product_key_topk` takes it.
        keys: [H, 2, R, n, Kd], dtype of query; normalised (`rms_norm`) where those scored were.
        axis_indices: [T, H, 2, m], int32 or int64, the kept keys: the third output of
            ``product_key_topk(..., return_axis_indices=True)``.
        u, t: [H, R], any float dtype, the filter that ranked them, from `tucker_filter`. Detached.
            None for both: ones, which is the additive mode's (R = 1).
        normalize: counts are divided by T ("paper", eq. 20), or by T*H*m ("release", which makes
            f sum to 1).

    Returns:
        [2], the losses of rows and of columns, float32 (float64 for float64); zeros without tokens.
        A layer adds the two. Under autocast query and keys are cast first.

    Source: UltraMemV2 (arXiv 2508.18756), section 3.6.
    """
    _library.require(query.device.type)
    check_rank("key_balance_loss", "query", query, "[T, 2, H, Q, Kd]", 5)
    check_rank("key_balance_loss", "keys", keys, "[H, 2, R, n, Kd]", 5)
    query, keys = cast_for_autocast(query, keys)
    if (u is None) != (t is None):
        raise ValueError("key_balance_loss: u and t go together: give both or neither")
    if u is not None and t is not None:
        u = accumulation_cast("key_balance_loss", "u", u.detach(), query.dtype)
        t = accumulation_cast("key_balance_loss", "t", t.detach(), query.dtype)
    loss, _ = torch.ops.ultramem.key_balance_loss(query, keys, axis_indices, u, t, normalize)
    return loss


def _check(
    query: Tensor,
    keys: Tensor,
    axis_indices: Tensor,
    u: Tensor | None,
    t: Tensor | None,
    normalize: str,
) -> None:
    checks = ArgumentChecks("key_balance_loss", "query", query)
    check_query_and_keys(checks, query, keys)
    tokens, _, heads, _, _ = query.shape
    rank = keys.shape[2]
    checks.shape("axis_indices", axis_indices, "[T, H, 2, m]", (tokens, heads, 2, None))
    checks.check(
        axis_indices.dtype in (torch.int32, torch.int64),
        f"axis_indices must be int32 or int64, got {dtype_name(axis_indices.dtype)}",
    )
    checks.check(axis_indices.shape[3] >= 1, "axis_indices must hold at least one key, got m = 0")
    if u is None or t is None:
        checks.check(u is None and t is None, "u and t go together: give both or neither")
        checks.check(rank == 1, f"u and t are required for R > 1 (keys.shape[2] is {rank})")
    else:
        for name, vector in (("u", u), ("t", t)):
            checks.shape(name, vector, "[H, R]", (heads, rank))
            checks.has_dtype(name, vector, accumulation_dtype(query.dtype))
    checks.check(
        normalize in _NORMALIZE, f"normalize must be 'paper' or 'release', got {normalize!r}"
    )


# ---- what both directions share ------------------------------------------------------------------


def _filter_keys(keys: Tensor, direction: Tensor | None, queries: int) -> Tensor:
    """Keys of one side, folded with the filter: [H, R, n, Kd] and [H, R] -> [H, n, Q*Kd].

    Their product with a token's queries is the filter score: it contracts rank and Kd at once.
    """
    keys = keys.to(accumulation_dtype(keys.dtype))
    if direction is not None:
        keys = keys * direction[:, :, None, None]
    return keys.sum(1) if queries == 1 else keys.transpose(1, 2).flatten(2)


def _token_parts(query: Tensor, keys: Tensor) -> Iterator[slice]:
    """Slices of the tokens, as many at once as _PART_BYTES allow, at least one."""
    tokens, _, heads, queries, key_dim = query.shape
    # Live together: scores and what becomes of them, queries and their gradient.
    token_elements = heads * (2 * keys.shape[3] + 2 * queries * key_dim)
    token_bytes = token_elements * accumulation_dtype(query.dtype).itemsize
    step = max(1, _PART_BYTES // token_bytes)
    for start in range(0, tokens, step):
        yield slice(start, start + step)


def _head_queries(query: Tensor, filtered: Tensor) -> Tensor:
    """[tokens, H, Q, Kd] of one side -> [H, tokens, Q*Kd] in the dtype of the filtered keys."""
    return query.flatten(2).to(filtered.dtype).transpose(0, 1)


def _probabilities(head_queries: Tensor, filtered: Tensor) -> Tensor:
    """P [H, tokens, n] (eq. 18)."""
    return torch.bmm(head_queries, filtered.transpose(1, 2)).softmax(-1)


def kept_key_counts(axis_indices: Tensor, num_keys: int) -> Tensor:
    """How often each key of either side was kept: [T, H, 2, m] -> int64 [2, n].

    An index outside [0, n) counts as none.
    """
    # Beside the keys of either side, a bin for what is none.
    in_range = (axis_indices >= 0) & (axis_indices < num_keys)
    bins = torch.where(in_range, axis_indices, num_keys)
    sides = torch.arange(2, dtype=bins.dtype, device=bins.device)[:, None]
    bins = (bins + sides * (num_keys + 1)).flatten()
    counts = bins.new_zeros(2 * (num_keys + 1), dtype=torch.int64)
    counts.index_add_(0, bins, counts.new_ones(1).expand(bins.shape))
    return counts.view(2, num_keys + 1)[:, :num_keys]


def _check_range(axis_indices: Tensor, num_keys: int) -> None:
    if axis_indices.device.type != "cpu" and os.environ.get("ULTRAMEM_DEBUG") != "1":
        return  # it would wait for the GPU
    in_range = ((axis_indices >= 0) & (axis_indices < num_keys)).all()
    if not in_range:
        raise RuntimeError(
            f"key_balance_loss: axis_indices must be in [0, {num_keys}), found one outside"
        )


# ---- forward and backward ------------------------------------------------------------------------


def _forward(
    query: Tensor,
    keys: Tensor,
    axis_indices: Tensor,
    u: Tensor | None,
    t: Tensor | None,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    """(loss [2], f [2, n])."""
    _check(query, keys, axis_indices, u, t, normalize)
    tokens, _, heads, queries, _ = query.shape
    num_keys, dtype = keys.shape[3], accumulation_dtype(query.dtype)
    if tokens == 0:
        zeros = query.new_zeros(2, 1 + num_keys, dtype=dtype)
        return zeros[:, 0].clone(), zeros[:, 1:].clone()
    _check_range(axis_indices, num_keys)
    with without_autocast(query.device.type):
        counts = query.new_zeros(2, num_keys, dtype=torch.int64)
        for part in _token_parts(query, keys):
            counts += kept_key_counts(axis_indices[part], num_keys)
        selections = tokens if normalize == "paper" else axis_indices[:, :, 0].numel()
        frequencies = counts.to(dtype) / selections
        sums = query.new_zeros(2, num_keys, dtype=dtype)
        for side, direction in enumerate((u, t)):
            filtered = _filter_keys(keys[:, side], direction, queries)
            for part in _token_parts(query, keys):
                head_queries = _head_queries(query[part, side], filtered)
                sums[side] += _probabilities(head_queries, filtered).sum((0, 1))
        loss = (frequencies * sums).sum(1) * (num_keys / (tokens * heads))
    return loss, frequencies


def _backward(
    grad_loss: Tensor,
    query: Tensor,
    keys: Tensor,
    frequencies: Tensor,
    u: Tensor | None,
    t: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(grad_query, grad_keys).

    With z the filter scores and g = grad_loss * n / (T H)

        dz[t,h,i] = P[t,h,i] * (g f_i - sum_j P[t,h,j] g f_j)
        dq_r = sum_i dz_i u_r K_{r,i}       dK_{r,i} = sum_t dz_i u_r q_r
    """
    tokens, _, heads, queries, key_dim = query.shape
    rank, num_keys = keys.shape[2:4]
    grad_query = query.new_empty(query.shape)
    grad_keys = keys.new_zeros(keys.shape)
    if tokens == 0:
        return grad_query, grad_keys
    with without_autocast(query.device.type):
        weights = frequencies * (grad_loss * (num_keys / (tokens * heads)))[:, None]
        for side, direction in enumerate((u, t)):
            filtered = _filter_keys(keys[:, side], direction, queries)
            grad_filtered = torch.zeros_like(filtered)
            weight = weights[side]
            for part in _token_parts(query, keys):
                head_queries = _head_queries(query[part, side], filtered)
                grad_scores = _probabilities(head_queries, filtered)
                mean = grad_scores @ weight
                grad_scores.mul_(weight - mean[..., None])
                grad_heads = torch.bmm(grad_scores, filtered)
                grad_query[part, side] = grad_heads.transpose(0, 1).unflatten(2, (queries, key_dim))
                grad_filtered.baddbmm_(grad_scores.transpose(1, 2), head_queries)
            # With shared queries the filtered keys are a sum over the ranks.
            ranks = grad_filtered.view(heads, num_keys, queries, key_dim).transpose(1, 2)
            if direction is not None:
                ranks = ranks * direction[:, :, None, None]
            grad_keys[:, side] = ranks.expand(heads, rank, num_keys, key_dim)
    return grad_query, grad_keys


def _forward_fake(
    query: Tensor,
    keys: Tensor,
    axis_indices: Tensor,
    u: Tensor | None,
    t: Tensor | None,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    _check(query, keys, axis_indices, u, t, normalize)
    dtype = accumulation_dtype(query.dtype)
    return query.new_empty(2, dtype=dtype), query.new_empty((2, keys.shape[3]), dtype=dtype)


def _backward_fake(
    grad_loss: Tensor,
    query: Tensor,
    keys: Tensor,
    frequencies: Tensor,
    u: Tensor | None,
    t: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, _, u, t, _ = inputs
    _, frequencies = output
    ctx.mark_non_differentiable(frequencies)
    ctx.has_filter = u is not None
    ctx.save_for_backward(query, keys, frequencies, *([u, t] if ctx.has_filter else []))


def _differentiate(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Any, ...]:
    query, keys, frequencies, *rest = ctx.saved_tensors
    u, t = rest if ctx.has_filter else (None, None)
    need_query, need_keys = ctx.needs_input_grad[:2]
    grad_query, grad_keys = torch.ops.ultramem.key_balance_loss_bwd(
        grad_loss, query, keys, frequencies, u, t
    )
    return grad_query if need_query else None, grad_keys if need_keys else None, *[None] * 4


if _library.is_loaded():
    # Matrix products and elementwise passes: torch's own serve every device.
    torch.library.custom_op("ultramem::key_balance_loss", _forward, mutates_args=())
    register("key_balance_loss", _forward_fake, _setup, _differentiate)
    torch.library.custom_op("ultramem::key_balance_loss_bwd", _backward, mutates_args=())
    register("key_balance_loss_bwd", _backward_fake)
