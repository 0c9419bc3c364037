"""The operators: public wrappers, fake implementations and autograd formulas.

Every function runs on CPU and CUDA, under torch.compile, CUDA-graph capture, activation
checkpointing and autocast, and never synchronises with the host. Accumulation is float32 (float64
for float64, which is offered on the CPU). Empty inputs (T = 0) are legal. Differentiating twice
and vmap raise.

Vocabulary: T tokens, D d_model, H heads, n keys per side, Kd key dimension, R Tucker rank, Q
queries per head and side (1, or R), C cores, m kept per axis, M kept in the end, N table rows, Dp
and Dv widths of a pre-value and a value row, E virtual copies of the table.

Errors: RuntimeError (or ValueError where Python decides) naming the operator, the argument, what
it was and what it must be, before any kernel runs. An index out of range raises on the CPU; on
CUDA it contributes zero, or raises with ULTRAMEM_DEBUG=1 in the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _library
from .addressing import SlotAddressing

__all__ = ["product_key_topk", "rms_norm", "tucker_filter", "tucker_query", "value_ffn"]

_MAX_AXIS_TOPK = 128
_MAX_TOPK = 1024
_MODES = ("tucker", "additive")


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _accumulation_cast(op: str, name: str, tensor: Tensor, like: torch.dtype) -> Tensor:
    """An argument that may have any float dtype, in the one that it is used in."""
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be of a floating-point dtype, got {tensor.dtype}")
    return tensor.to(_accumulation_dtype(like))


def _check_rank(op: str, name: str, tensor: Tensor, layout: str, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{op}: {name} must be {layout}, got {list(tensor.shape)}")


def _cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch's autocast would do to these arguments: float64 stays."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


# ---- rms_norm ------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """RMS normalisation over the last dimension: ``x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        x: [..., Kd], float32, bfloat16, float16 (float64 on the CPU).
        weight: [Kd], any float dtype; used in the accumulation dtype.

    Returns:
        Like x, rounded once.
    """
    _library.require(x.device.type)
    gain = _accumulation_cast("rms_norm", "weight", weight, x.dtype)
    return torch.ops.ultramem.rms_norm(x, gain, eps)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
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


# ---- tucker_query --------------------------------------------------------------------------------


def tucker_query(
    x: Tensor, weight: Tensor, norm_weight: Tensor, *, num_heads: int = 1, eps: float = 1e-6
) -> Tensor:
    """Projects tokens to normalised queries: ``q = RMSNorm_Kd(x W^T)`` for each side, head, rank.

    Args:
        x: [T, D].
        weight: [2*H*Q*Kd, D], dtype of x, rows ordered (side, head, query, Kd); Q is 1 (the Tucker
            ranks share a query) or R, and follows from the shapes.
        norm_weight: [Kd] gain of the norm, any float dtype.
        num_heads: H.

    Returns:
        query [T, 2, H, Q, Kd], dtype of x. Under autocast x and weight are cast first.

    Source: UltraMemV2 (arXiv 2508.18756), section 3.2.
    """
    _library.require(x.device.type)
    x, weight = _cast_for_autocast(x, weight)
    gain = _accumulation_cast("tucker_query", "norm_weight", norm_weight, x.dtype)
    query, _ = torch.ops.ultramem.tucker_query(x, weight, gain, num_heads, eps)
    return query


def _tucker_query_fake(
    x: Tensor, weight: Tensor, norm_weight: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    _check_rank("tucker_query", "x", x, "[T, D]", 2)
    _check_rank("tucker_query", "weight", weight, "[2*H*Q*Kd, D]", 2)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"tucker_query: weight must be [2*H*Q*Kd, D] = [*, {x.shape[1]}], "
            f"got {list(weight.shape)}"
        )
    key_dim = norm_weight.shape[0]
    num_queries = weight.shape[0] // (2 * num_heads * key_dim)
    query = x.new_empty((x.shape[0], 2, num_heads, num_queries, key_dim))
    return query, x.new_empty((x.shape[0], weight.shape[0]))


def _tucker_query_bwd_fake(
    grad_query: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    projection: Tensor,
    eps: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        norm_weight.new_empty(norm_weight.shape),
    )


def _tucker_query_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, norm_weight, _, ctx.eps = inputs
    _, projection = output
    ctx.mark_non_differentiable(projection)
    ctx.save_for_backward(x, weight, norm_weight, projection)


def _tucker_query_backward(ctx: Any, grad_query: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, weight, norm_weight, projection = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight, grad_norm_weight = torch.ops.ultramem.tucker_query_bwd(
        grad_query, x, weight, norm_weight, projection, ctx.eps, need_x, need_weight
    )
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_norm_weight,
        None,
        None,
    )


# ---- tucker_filter -------------------------------------------------------------------------------


def tucker_filter(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of the summed Tucker cores and the leading singular vectors.

    With ``Cbar = sum_c core_c``, u and t are its unit singular vectors for the largest singular
    value, signed so that sum(u) >= 0 (t follows); u = t = e_1 where Cbar is zero or its first two
    singular values are equal. Computed in float64 by Jacobi rotations, on the device.

    Args:
        core: [C, H, R, R], any float dtype, R and C in 1..4.

    Returns:
        (u [H, R], t [H, R], sigma [H, R] descending), float32 (float64 for float64). u and t carry
        no gradient; sigma does: d sigma_i / d core_c = u_i t_i^T.

    Source: UltraMem (arXiv 2411.12364), section 3.
    """
    _library.require(core.device.type)
    core = _accumulation_cast("tucker_filter", "core", core, core.dtype)
    u, t, sigma, _, _ = torch.ops.ultramem.tucker_filter(core)
    return u, t, sigma


def _tucker_filter_fake(core: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_rank("tucker_filter", "core", core, "[C, H, R, R]", 4)
    _, heads, rank, _ = core.shape
    vectors = [core.new_empty((heads, rank)) for _ in range(3)]
    matrices = [core.new_empty((heads, rank, rank)) for _ in range(2)]
    return vectors[0], vectors[1], vectors[2], matrices[0], matrices[1]


def _tucker_filter_setup(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
    (core,) = inputs
    u, t, _, left, right = output
    ctx.mark_non_differentiable(u, t, left, right)
    ctx.save_for_backward(core, left, right)


def _tucker_filter_backward(ctx: Any, *grads: Tensor) -> Tensor:
    core, left, right = ctx.saved_tensors
    return torch.ops.ultramem.tucker_filter_bwd(grads[2], core, left, right)


def _tucker_filter_bwd(grad_sigma: Tensor, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """d sigma_i / d core_c = u_i t_i^T, the same for every core: [H, R] -> [C, H, R, R].

    Takes core so that differentiating again is seen to depend on it, and refused.
    """
    grad = (left * grad_sigma.unsqueeze(-2)) @ right.transpose(-1, -2)
    return grad.repeat(core.shape[0], 1, 1, 1)


def _tucker_filter_bwd_fake(
    grad_sigma: Tensor, core: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    return core.new_empty(core.shape)


# ---- product_key_topk ----------------------------------------------------------------------------


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
) -> tuple[Tensor, Tensor]:
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
        u, t: [H, R], the filter; default ``tucker_filter(core)``. Detached.
        key_norm_weight: [Kd]; keys are then RMS-normalised first (and rounded to their dtype, so
            that normalising them ahead gives the same). None: they are used as they are.
        mode: "tucker", or "additive" for plain product keys (score = S_row + S_col, R = C = 1;
            needs axis_topk >= min(topk, n)), as PKM, PEER and Memory+ layers have them.

    Returns:
        scores [T, H, M, C] float32 (float64 for float64), indices [T, H, M] int64 = row * n + col.

    Under autocast query and keys are cast first; core, u and t never.

    Source: UltraMem (arXiv 2411.12364), section 3; PKM (arXiv 1907.05242).
    """
    _library.require(query.device.type)
    if mode not in _MODES:
        raise ValueError(f"product_key_topk: mode must be one of {_MODES}, got {mode!r}")
    _check_rank("product_key_topk", "query", query, "[T, 2, H, Q, Kd]", 5)
    _check_rank("product_key_topk", "keys", keys, "[H, 2, R, n, Kd]", 5)
    query, keys = _cast_for_autocast(query, keys)
    if key_norm_weight is not None:
        if key_norm_weight.shape != keys.shape[-1:]:
            raise ValueError(
                f"product_key_topk: key_norm_weight must be [Kd] = [{keys.shape[-1]}], "
                f"got {list(key_norm_weight.shape)}"
            )
        keys = rms_norm(keys, key_norm_weight, eps=eps)
    if axis_topk is None:
        axis_topk = min(keys.shape[-2], topk, _MAX_AXIS_TOPK)
    if core is not None:
        _check_rank("product_key_topk", "core", core, "[C, H, R, R]", 4)
        core = _accumulation_cast("product_key_topk", "core", core, query.dtype)
        if (u is None) != (t is None):
            raise ValueError("product_key_topk: u and t go together: give both or neither")
        if u is None or t is None:
            u, t, _ = tucker_filter(core.detach())
        u = _accumulation_cast("product_key_topk", "u", u.detach(), query.dtype)
        t = _accumulation_cast("product_key_topk", "t", t.detach(), query.dtype)
    scores, indices, _, _, _ = torch.ops.ultramem.product_key_topk(
        query, keys, core, u, t, topk, axis_topk, mode
    )
    return scores, indices


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
    tokens, _, heads, _, _ = query.shape
    rank, num_keys = keys.shape[2:4]
    if not 1 <= axis_topk <= min(num_keys, _MAX_AXIS_TOPK):
        raise ValueError(
            f"product_key_topk: axis_topk must be in 1..min(n, 128) with n = {num_keys}, "
            f"got {axis_topk}"
        )
    if not 1 <= topk <= min(axis_topk**2, _MAX_TOPK):
        raise ValueError(
            "product_key_topk: topk must be in 1..min(axis_topk^2, 1024) with "
            f"axis_topk = {axis_topk}, got {topk}"
        )
    cores = 1 if core is None else core.shape[0]
    acc = _accumulation_dtype(query.dtype)
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


# ---- value_ffn -----------------------------------------------------------------------------------


def value_ffn(
    indices: Tensor,
    scores: Tensor,
    values: Tensor,
    pre_values: Tensor | None = None,
    pre_input: Tensor | None = None,
    *,
    activation: str = "identity",
    addressing: SlotAddressing | None = None,
    sum_groups: bool = True,
) -> Tensor:
    """Sums the outputs of the retrieved slots, each an FFN of inner width one.

    ::

        a_s = <pre_input, pre_values[slot_s]>;  h_s = act(a_s)     (h = 1 without pre-values)
        out[group_s] += concat_c( h_s * scores[s,c] * values[slot_s, slice c] )

    Without pre_values this is a weighted embedding bag.

    Args:
        indices: [T, S] int64 or int32, S = H*M; virtual indices in [0, expand*window) with
            addressing, else rows in [0, N).
        scores: [T, S, C], any float dtype, C in 1..4 dividing Dv.
        values: [N, Dv], float32, bfloat16, float16 (float64 on the CPU).
        pre_values: [N, Dp], dtype of values.
        pre_input: [T, Dp], any of these dtypes (float64 exactly where values are).
        activation: "identity", "gelu" (erf form), "relu" or "silu".
        addressing: how indices become rows of the table; see `SlotAddressing`.
        sum_groups: sum the E groups of implicit value expansion (UltraMemV2); False keeps them
            apart (UltraMem).

    Returns:
        out [T, Dv], or [T, E, Dv] with sum_groups=False; dtype of pre_input, else of values.

    Gradients go to scores, pre_input, values and pre_values. Those of the tables are dense,
    accumulated in the accumulation dtype and rounded once. Where the tables have an attribute
    ``main_grad`` (contiguous, float32, or float64 for float64) they are accumulated there in place
    instead: ``.grad`` stays None and ``grad_added_to_main_grad`` is set to True by the backward
    (under torch.compile: by the forward). Any backward through the operator then adds to it, one
    that was asked for other gradients only (``torch.autograd.grad``) too; with
    ``create_graph=True`` it raises.

    Under autocast pre_input is cast; tables and scores never.

    Source: PEER (arXiv 2407.04153); UltraMemV2 (arXiv 2508.18756), section 3.
    """
    _library.require(values.device.type)
    if pre_input is not None:
        (pre_input,) = _cast_for_autocast(pre_input)
    permutation: Tensor | None = None
    window, offset, expand, shuffle, num_keys, seed = 0, 0, 1, "none", 0, 0
    if addressing is not None:
        if addressing.num_slots != values.shape[0]:
            raise ValueError(
                f"value_ffn: addressing.num_slots must be the table's {values.shape[0]} rows, "
                f"got {addressing.num_slots}"
            )
        window, offset, expand = addressing.window, addressing.offset, addressing.expand
        num_keys, seed = addressing.num_keys, addressing.seed
        if isinstance(addressing.shuffle, Tensor):
            permutation, shuffle = addressing.shuffle, "permutation"
        else:
            shuffle = addressing.shuffle or "none"
    values_main_grad, pre_values_main_grad = _main_grads(values, pre_values)
    out, _ = torch.ops.ultramem.value_ffn(
        indices,
        _accumulation_cast("value_ffn", "scores", scores, values.dtype),
        values,
        pre_values,
        pre_input,
        permutation,
        values_main_grad,
        pre_values_main_grad,
        activation,
        window,
        offset,
        expand,
        shuffle,
        num_keys,
        seed,
        sum_groups,
    )
    return out


def _main_grads(values: Tensor, pre_values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The buffers that the gradients of the tables go to, for those that train and have one."""
    tables = {"values": values, "pre_values": pre_values}
    trained = {name: t for name, t in tables.items() if t is not None and t.requires_grad}
    if not trained or not torch.is_grad_enabled():
        return None, None
    buffers = {name: getattr(table, "main_grad", None) for name, table in trained.items()}
    if all(buffer is None for buffer in buffers.values()):
        return None, None
    for name, buffer in buffers.items():
        table = trained[name]
        if buffer is None:
            raise ValueError(
                "value_ffn: values and pre_values must both have a main_grad, or neither"
            )
        layout = "[N, Dv]" if name == "values" else "[N, Dp]"
        if buffer.shape != table.shape:
            raise ValueError(
                f"value_ffn: {name}.main_grad must be {layout} = {list(table.shape)}, "
                f"got {list(buffer.shape)}"
            )
        expected = _accumulation_dtype(table.dtype)
        if buffer.dtype != expected or buffer.device != table.device:
            raise ValueError(
                f"value_ffn: {name}.main_grad must be {expected} on {table.device}, "
                f"got {buffer.dtype} on {buffer.device}"
            )
        if not buffer.is_contiguous():
            raise ValueError(f"value_ffn: {name}.main_grad must be contiguous")
        if torch.compiler.is_compiling():
            # The backward is then not run as Python, and cannot set it.
            table.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return buffers.get("values"), buffers.get("pre_values")


def _value_ffn_fake(
    indices: Tensor,
    scores: Tensor,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    permutation: Tensor | None,
    values_main_grad: Tensor | None,
    pre_values_main_grad: Tensor | None,
    activation: str,
    window: int,
    offset: int,
    expand: int,
    shuffle: str,
    num_keys: int,
    seed: int,
    sum_groups: bool,
) -> tuple[Tensor, Tensor]:
    _check_rank("value_ffn", "indices", indices, "[T, S]", 2)
    _check_rank("value_ffn", "scores", scores, "[T, S, C]", 3)
    _check_rank("value_ffn", "values", values, "[N, Dv]", 2)
    tokens, selected = indices.shape
    width = values.shape[1]
    shape = (tokens, width) if sum_groups else (tokens, expand, width)
    out = values.new_empty(shape, dtype=values.dtype if pre_input is None else pre_input.dtype)
    return out, scores.new_empty((0,) if pre_values is None else (tokens, selected))


def _value_ffn_bwd_fake(
    grad_out: Tensor,
    indices: Tensor,
    scores: Tensor,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    pre_activation: Tensor,
    permutation: Tensor | None,
    activation: str,
    window: int,
    offset: int,
    expand: int,
    shuffle: str,
    num_keys: int,
    seed: int,
    sum_groups: bool,
    need_values: bool,
    need_pre_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_pre_values = need_pre_values and pre_values is not None
    return (
        scores.new_empty(scores.shape),
        values.new_empty((0,)) if pre_input is None else pre_input.new_empty(pre_input.shape),
        values.new_empty(values.shape if need_values else (0,)),
        values.new_empty(pre_values.shape if need_pre_values and pre_values is not None else (0,)),
    )


def _value_ffn_bwd_main_grad_fake(
    grad_out: Tensor,
    indices: Tensor,
    scores: Tensor,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return (
        scores.new_empty(scores.shape),
        values.new_empty((0,)) if pre_input is None else pre_input.new_empty(pre_input.shape),
    )


def _value_ffn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    indices, scores, values, pre_values, pre_input, permutation = inputs[:6]
    # Not saved tensors: their version counters move between layers that share the table.
    ctx.values_main_grad, ctx.pre_values_main_grad = inputs[6:8]
    ctx.tables = (values, pre_values)
    ctx.options = inputs[8:]
    _, pre_activation = output
    ctx.mark_non_differentiable(pre_activation)
    optional = (pre_values, pre_input, permutation)
    ctx.present = tuple(tensor is not None for tensor in optional)
    ctx.save_for_backward(
        indices,
        scores,
        values,
        pre_activation,
        *[tensor for tensor in optional if tensor is not None],
    )


def _value_ffn_backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    indices, scores, values, pre_activation, *rest = ctx.saved_tensors
    remaining = iter(rest)
    pre_values, pre_input, permutation = (
        next(remaining) if present else None for present in ctx.present
    )
    arguments = (
        grad_out,
        indices,
        scores,
        values,
        pre_values,
        pre_input,
        pre_activation,
        permutation,
        *ctx.options,
    )
    _, need_scores, need_values, need_pre_values, need_pre_input = ctx.needs_input_grad[:5]
    grad_values: Tensor | None = None
    grad_pre_values: Tensor | None = None
    if ctx.values_main_grad is None and ctx.pre_values_main_grad is None:
        grad_scores, grad_pre_input, grad_values, grad_pre_values = (
            torch.ops.ultramem.value_ffn_bwd(*arguments, need_values, need_pre_values)
        )
    else:
        if torch.is_grad_enabled():
            _raise_double_backward("value_ffn")
        grad_scores, grad_pre_input = torch.ops.ultramem.value_ffn_bwd_main_grad(
            *arguments, ctx.values_main_grad, ctx.pre_values_main_grad
        )
        for table, buffer in zip(
            ctx.tables, (ctx.values_main_grad, ctx.pre_values_main_grad), strict=True
        ):
            if buffer is not None:
                table.grad_added_to_main_grad = True
    return (
        None,
        grad_scores if need_scores else None,
        grad_values if need_values else None,
        grad_pre_values if need_pre_values else None,
        grad_pre_input if need_pre_input else None,
        *[None] * 11,
    )


# ---- registration --------------------------------------------------------------------------------


def _raise_double_backward(op: str) -> NoReturn:
    raise RuntimeError(f"{op}: differentiating twice is not supported")


def _register(
    name: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Fake implementation, gradient formula and refusals of one operator.

    An operator without a formula is itself a gradient: differentiating it raises.
    """
    qualified = f"ultramem::{name}"
    torch.library.register_fake(qualified, fake)
    forward_name = name.removesuffix("_bwd")

    def refuse_vmap(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{forward_name}: vmap is not supported")

    def refuse_double_backward(*_: Any, **__: Any) -> NoReturn:
        _raise_double_backward(forward_name)

    torch.library.register_vmap(qualified, refuse_vmap)
    torch.library.register_autograd(
        qualified, backward or refuse_double_backward, setup_context=setup_context
    )


if _library.is_loaded():
    _register("rms_norm", _rms_norm_fake, _rms_norm_setup, _rms_norm_backward)
    _register("rms_norm_bwd", _rms_norm_bwd_fake)
    _register("tucker_query", _tucker_query_fake, _tucker_query_setup, _tucker_query_backward)
    _register("tucker_query_bwd", _tucker_query_bwd_fake)
    _register("tucker_filter", _tucker_filter_fake, _tucker_filter_setup, _tucker_filter_backward)
    # A few R x R products: torch's own serve every device.
    torch.library.custom_op("ultramem::tucker_filter_bwd", _tucker_filter_bwd, mutates_args=())
    _register("tucker_filter_bwd", _tucker_filter_bwd_fake)
    _register(
        "product_key_topk",
        _product_key_topk_fake,
        _product_key_topk_setup,
        _product_key_topk_backward,
    )
    _register("product_key_topk_bwd", _product_key_topk_bwd_fake)
    _register("value_ffn", _value_ffn_fake, _value_ffn_setup, _value_ffn_backward)
    _register("value_ffn_bwd", _value_ffn_bwd_fake)
    # Mutates its arguments, which register_autograd refuses; _value_ffn_backward guards it.
    torch.library.register_fake("ultramem::value_ffn_bwd_main_grad", _value_ffn_bwd_main_grad_fake)
