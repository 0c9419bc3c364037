"""Product-key retrieval."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _library, nvtx
from ._checks import (
    ArgumentChecks,
    accumulation_dtype,
    check_cores,
    check_query_and_keys,
)
from ._common import accumulation_cast, cast_for_autocast, check_rank, register
from ._rms_norm import rms_norm

_MAX_AXIS_TOPK = 128
_MAX_TOPK = 1024
_MODES = ("tucker", "additive")


@overload
def product_key_topk(
    query: Tensor,
    keys: Tensor,
    core: Tensor | None,
    *,
    topk: int,
    axis_topk: int | None = ...,
    u: Tensor | None = ...,
    t: Tensor | None = ...,
    key_norm_weight: Tensor | None = ...,
    eps: float = ...,
    mode: str = ...,
    return_axis_indices: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def product_key_topk(
    query: Tensor,
    keys: Tensor,
    core: Tensor | None,
    *,
    topk: int,
    axis_topk: int | None = ...,
    u: Tensor | None = ...,
    t: Tensor | None = ...,
    key_norm_weight: Tensor | None = ...,
    eps: float = ...,
    mode: str = ...,
    return_axis_indices: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


@nvtx.annotate("ultramem::product_key_topk fwd")
def product_key_topk(
    query: Tensor,
    keys: Tensor,
    core: Tensor | None,
    *,
    topk: int,
    axis_topk: int | None = None,
    u: Tensor | None = None,
    t: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    mode: str = "tucker",
    return_axis_indices: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """The M best of n*n product keys for each token and head, with a score for each Tucker core.

    ::

        S_row[r,i] = <query[0,r], keys[0,r,i]>       S_col[s,j] = <query[1,s], keys[1,s,j]>
        I_row = top-m of u.S_row                     I_col = top-m of t.S_col
        score_c[i,j] = S_row[:,i]^T core_c S_col[:,j]
        kept = top-M of sum_c score_c over I_row x I_col

    Order, the same on every backend: descending; equal ranks (-0 equals +0) by the lower index;
    NaN below -inf. Selection carries no gradient; the scores do, to query, keys, core and
    key_norm_weight.

    Args:
        query: [T, 2, H, Q, Kd], Q = 1 or R; as `tucker_query` gives it.
        keys: [H, 2, R, n, Kd], dtype of query.
        core: [C, H, R, R], any float dtype; None in additive mode.
        topk: M, at most min(axis_topk^2, 1024).
        axis_topk: m, at most min(n, 128); default min(n, topk, 128).
        u, t: [H, R], the filter; default that of ``tucker_filter(core)``, computed by this
            operator. Detached.
        key_norm_weight: [Kd]; keys are then RMS-normalised first (and rounded to their dtype, so
            that normalising them ahead gives the same). None: they are used as they are.
        mode: "tucker", or "additive" for plain product keys (score = S_row + S_col, R = C = 1;
            needs axis_topk >= min(topk, n)), as PKM, PEER and Memory+ layers have them.
        return_axis_indices: also return I_row and I_col, which are there in any case: what
            `key_balance_loss` and :class:`~ultramem_cuda.stats.KeyUsage` count.

    Returns:
        scores [T, H, M, C] float32 (float64 for float64), indices [T, H, M] int64 = row * n + col;
        with return_axis_indices also axis_indices [T, H, 2, m] int32, the keys that each axis kept,
        rows and then columns, ascending.

    Under autocast query and keys are cast first; core, u and t never.

    Source: UltraMem (arXiv 2411.12364), section 3; PKM (arXiv 1907.05242).
    """
    _library.require(query.device.type)
    if mode not in _MODES:
        raise ValueError(f"product_key_topk: mode must be one of {_MODES}, got {mode!r}")
    check_rank("product_key_topk", "query", query, "[T, 2, H, Q, Kd]", 5)
    check_rank("product_key_topk", "keys", keys, "[H, 2, R, n, Kd]", 5)
    query, keys = cast_for_autocast(query, keys)
    if key_norm_weight is not None:
        if key_norm_weight.shape != keys.shape[-1:]:
            raise ValueError(
                f"product_key_topk: key_norm_weight must be [Kd] = [{keys.shape[-1]}], "
                f"got {list(key_norm_weight.shape)}"
            )
        if key_norm_weight.device != keys.device:
            raise ValueError(
                f"product_key_topk: key_norm_weight must be on the device of keys, {keys.device}, "
                f"got {key_norm_weight.device}"
            )
        keys = rms_norm(keys, key_norm_weight, eps=eps)
    if axis_topk is None:
        axis_topk = min(keys.shape[-2], topk, _MAX_AXIS_TOPK)
    if core is not None:
        check_rank("product_key_topk", "core", core, "[C, H, R, R]", 4)
        core = accumulation_cast("product_key_topk", "core", core, query.dtype)
        if (u is None) != (t is None):
            raise ValueError("product_key_topk: u and t go together: give both or neither")
        if u is not None and t is not None:
            u = accumulation_cast("product_key_topk", "u", u.detach(), query.dtype)
            t = accumulation_cast("product_key_topk", "t", t.detach(), query.dtype)
    scores, indices, axis_indices, _, _ = torch.ops.ultramem.product_key_topk(
        query, keys, core, u, t, topk, axis_topk, mode
    )
    if return_axis_indices:
        return scores, indices, axis_indices
    return scores, indices


def _check_tucker_arguments(
    checks: ArgumentChecks,
    core: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
    heads: int,
    rank: int,
    dtype: torch.dtype,
) -> None:
    if core is None:
        raise RuntimeError(f"{checks.op}: core is required in tucker mode")
    checks.shape("core", core, "[C, H, R, R]", (None, heads, rank, rank))
    checks.has_dtype("core", core, dtype)
    check_cores(checks, core.shape[0])
    if u is None or t is None:
        checks.check(u is None and t is None, "u and t go together")
        return
    for name, vector in (("u", u), ("t", t)):
        checks.shape(name, vector, "[H, R]", (heads, rank))
        checks.has_dtype(name, vector, dtype)


def _check_topk(
    checks: ArgumentChecks, num_keys: int, topk: int, axis_topk: int, mode: str
) -> None:
    topk_range = (
        f"topk must be in 1..min(axis_topk^2, {_MAX_TOPK}) with axis_topk = {axis_topk}, got {topk}"
    )
    checks.check(topk >= 1, topk_range)
    checks.check(
        1 <= axis_topk <= min(num_keys, _MAX_AXIS_TOPK),
        f"axis_topk must be in 1..min(n, {_MAX_AXIS_TOPK}) with n = {num_keys}, got {axis_topk}",
    )
    checks.check(topk <= min(axis_topk**2, _MAX_TOPK), topk_range)
    checks.check(
        mode == "tucker" or axis_topk >= topk or axis_topk == num_keys,
        "additive mode needs axis_topk >= min(topk, n), or the best sums can be missed; "
        f"got axis_topk = {axis_topk}, topk = {topk}",
    )


def _product_key_topk_fake(
    query: Tensor,
    keys: Tensor,
    core: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
    topk: int,
    axis_topk: int,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks = ArgumentChecks("product_key_topk", "query", query)
    check_query_and_keys(checks, query, keys)
    tokens, _, heads, _, _ = query.shape
    rank, num_keys = keys.shape[2:4]
    if mode == "tucker":
        _check_tucker_arguments(checks, core, u, t, heads, rank, accumulation_dtype(query.dtype))
    else:
        checks.check(core is None, "core must be None in additive mode")
        checks.check(rank == 1, f"additive mode has R = 1, keys.shape[2] is {rank}")
        checks.check(u is None and t is None, "u and t must be None in additive mode")
    _check_topk(checks, num_keys, topk, axis_topk, mode)
    cores = 1 if core is None else core.shape[0]
    acc = accumulation_dtype(query.dtype)
    return (
        query.new_empty((tokens, heads, topk, cores), dtype=acc),
        query.new_empty((tokens, heads, topk), dtype=torch.int64),
        query.new_empty((tokens, heads, 2, axis_topk), dtype=torch.int32),
        query.new_empty((tokens, heads, 2, rank, axis_topk), dtype=acc),
        query.new_empty((tokens, heads, topk), dtype=torch.int16),
    )


def _product_key_topk_bwd_fake(
    grad_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    core: Tensor | None,
    axis_indices: Tensor,
    axis_scores: Tensor,
    grid_positions: Tensor,
    mode: str,
    need_query: bool,
    need_keys: bool,
    need_core: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    has_core_grad = need_core and core is not None
    return (
        query.new_empty(query.shape if need_query else (0,)),
        keys.new_empty(keys.shape if need_keys else (0,)),
        axis_scores.new_empty(core.shape if has_core_grad and core is not None else (0,)),
    )


def _product_key_topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, keys, core, _, _, _, _, ctx.mode = inputs
    _, _, axis_indices, axis_scores, grid_positions = output
    ctx.mark_non_differentiable(axis_scores)
    ctx.has_core = core is not None
    saved = [query, keys, axis_indices, axis_scores, grid_positions]
    ctx.save_for_backward(*saved, *([core] if ctx.has_core else []))


def _product_key_topk_backward(ctx: Any, grad_scores: Tensor, *_: Any) -> tuple[Any, ...]:
    query, keys, axis_indices, axis_scores, grid_positions, *rest = ctx.saved_tensors
    core = rest[0] if ctx.has_core else None
    need_query, need_keys, need_core = ctx.needs_input_grad[:3]
    grad_query, grad_keys, grad_core = torch.ops.ultramem.product_key_topk_bwd(
        grad_scores,
        query,
        keys,
        core,
        axis_indices,
        axis_scores,
        grid_positions,
        ctx.mode,
        need_query,
        need_keys,
        need_core,
    )
    return (
        grad_query if need_query else None,
        grad_keys if need_keys else None,
        grad_core if need_core else None,
        *[None] * 5,
    )


if _library.is_loaded():
    register(
        "product_key_topk",
        _product_key_topk_fake,
        _product_key_topk_setup,
        _product_key_topk_backward,
    )
    register("product_key_topk_bwd", _product_key_topk_bwd_fake)
