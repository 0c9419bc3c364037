"""The sparse FFN of the retrieved slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library, nvtx
from ..addressing import SlotAddressing
from ..factors import FactorShape, GradientFactors, owner_of
from ._checks import ArgumentChecks, accumulation_dtype, check_cores
from ._common import (
    accumulation_cast,
    cast_for_autocast,
    raise_double_backward,
    register,
)

_ACTIVATIONS = ("identity", "gelu", "relu", "silu")


@nvtx.annotate("ultramem::value_ffn fwd")
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
    table_scale: Tensor | None = None,
    factors: GradientFactors | None = None,
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
        values: [N, Dv], float32, bfloat16, float16 (float64 on the CPU). Contiguous, or it is
            copied whole at every call.
        pre_values: [N, Dp], dtype of values.
        pre_input: [T, Dp], any of these dtypes (float64 exactly where values are).
        activation: "identity", "gelu" (erf form), "relu" or "silu".
        addressing: how indices become rows of the table; see `SlotAddressing`.
        sum_groups: sum the E groups of implicit value expansion (UltraMemV2); False keeps them
            apart (UltraMem).
        table_scale: float64 [2] on the tables' device, without gradient: the tables are taken as
            values * table_scale[0] and pre_values * table_scale[1]. The kernels read it, so that a
            CUDA graph does at every replay. Where the tables train it needs factors, which are then
            those of the gradients of these products.
        factors: deferred gradients of the tables: where one of them trains, the backward appends
            the factors of their gradients there and gives the tables none. Those of a MemoryTable
            go with ``table_scale=table.scale``: without it this is the function, and these are the
            gradients, of the parameters as they are, not of the effective weights.

    Returns:
        out [T, Dv], or [T, E, Dv] with sum_groups=False; dtype of pre_input, else of values.

    Gradients go to scores, pre_input, values and pre_values. Those of the tables are dense,
    accumulated in the accumulation dtype and rounded once. Where the tables have an attribute
    ``main_grad`` (contiguous, float32, or float64 for float64) they are accumulated there in place
    instead: ``.grad`` stays None and ``grad_added_to_main_grad`` is set to True by the backward
    (under torch.compile: by the forward). The buffer is the one that the attribute holds when the
    forward runs; a slice of a table has no such attribute. Any backward through the operator then
    adds to it, one that was asked for other gradients only (``torch.autograd.grad``) too; with
    ``create_graph=True`` it raises. All of this holds for ``factors`` as well, which exclude a
    main_grad; see :class:`~ultramem_cuda.GradientFactors` for compiled code and CUDA graphs.

    Under autocast pre_input is cast; tables and scores never.

    Source: PEER (arXiv 2407.04153); UltraMemV2 (arXiv 2508.18756), section 3.
    """
    _library.require(values.device.type)
    if pre_input is not None:
        (pre_input,) = cast_for_autocast(pre_input)
    if addressing is not None and addressing.num_slots != values.shape[0]:
        raise ValueError(
            f"value_ffn: addressing.num_slots must be the table's {values.shape[0]} rows, "
            f"got {addressing.num_slots}"
        )
    permutation, *place = addressing_arguments(addressing)
    trains = _tables_train(values, pre_values)
    if table_scale is not None:
        if table_scale.requires_grad:
            raise ValueError("value_ffn: table_scale has no gradient; it must not require one")
        if trains and factors is None:
            raise ValueError(
                "value_ffn: table_scale needs factors where the tables train: their dense "
                "gradients are not offered with it"
            )
    values_main_grad, pre_values_main_grad = _main_grads(values, pre_values)
    arena: Tensor | None = None
    if factors is not None and trains:
        if values_main_grad is not None or pre_values_main_grad is not None:
            raise ValueError("value_ffn: factors and a main_grad of the tables exclude each other")
        if indices.dim() == 2 and scores.dim() == 3:  # else the operator says so
            like = values if pre_input is None else pre_input
            num_groups = 1 if sum_groups or addressing is None else addressing.expand
            shape = FactorShape(indices.shape[1], scores.shape[2], num_groups, like.dtype)
            arena = factors._for_forward(values, pre_values, shape)
    out, _ = torch.ops.ultramem.value_ffn(
        indices,
        accumulation_cast("value_ffn", "scores", scores, values.dtype),
        values,
        pre_values,
        pre_input,
        permutation,
        table_scale,
        values_main_grad,
        pre_values_main_grad,
        arena,
        activation,
        *place,
        sum_groups,
    )
    return out


def addressing_arguments(addressing: SlotAddressing | None) -> tuple[Any, ...]:
    """How it reaches the operators: permutation, window, offset, expand, shuffle, num_keys, seed.

    Without addressing, the index is the slot.
    """
    if addressing is None:
        return None, 0, 0, 1, "none", 0, 0
    explicit = isinstance(addressing.shuffle, Tensor)
    permutation = addressing.shuffle if explicit else None
    shuffle = "permutation" if explicit else addressing.shuffle or "none"
    return (
        permutation,
        addressing.window,
        addressing.offset,
        addressing.expand,
        shuffle,
        addressing.num_keys,
        addressing.seed,
    )


def _tables_train(values: Tensor, pre_values: Tensor | None) -> bool:
    trains = values.requires_grad or (pre_values is not None and pre_values.requires_grad)
    return trains and torch.is_grad_enabled()


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
        expected = accumulation_dtype(table.dtype)
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


def _check_pre_values(
    checks: ArgumentChecks,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    activation: str,
    tokens: int,
) -> None:
    checks.check(
        (pre_values is None) == (pre_input is None),
        "pre_values and pre_input go together: give both or neither",
    )
    if pre_values is None or pre_input is None:
        checks.check(
            activation == "identity",
            "activation needs pre_values; without them it must be 'identity'",
        )
        return
    checks.shape("pre_values", pre_values, "[N, Dp]", (values.shape[0], None))
    checks.has_dtype("pre_values", pre_values, values.dtype)
    checks.check(pre_values.shape[1] >= 1, "pre_values must not be empty")
    checks.dtype("pre_input", pre_input)
    checks.shape("pre_input", pre_input, "[T, Dp]", (tokens, pre_values.shape[1]))
    checks.check(
        (pre_input.dtype == torch.float64) == (values.dtype == torch.float64),
        "values and pre_input must both be float64 or neither",
    )


def _value_ffn_fake(
    indices: Tensor,
    scores: Tensor,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    permutation: Tensor | None,
    table_scale: Tensor | None,
    values_main_grad: Tensor | None,
    pre_values_main_grad: Tensor | None,
    factors: Tensor | None,
    activation: str,
    window: int,
    offset: int,
    expand: int,
    shuffle: str,
    num_keys: int,
    seed: int,
    sum_groups: bool,
    first_row: int = 0,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor]:
    checks = ArgumentChecks("value_ffn", "values", values)
    checks.check(
        table_scale is None or (values_main_grad is None and pre_values_main_grad is None),
        "table_scale and a main_grad of the tables exclude each other",
    )
    checks.check(
        activation in _ACTIVATIONS,
        f"activation must be 'identity', 'gelu', 'relu' or 'silu', got '{activation}'",
    )
    checks.dtype("values", values)
    checks.shape("values", values, "[N, Dv]", (None, None))
    checks.shape("indices", indices, "[T, S]", (None, None))
    checks.check(indices.dtype in (torch.int64, torch.int32), "indices must be int64 or int32")
    (tokens, selected), (num_rows, width) = indices.shape, values.shape
    checks.check(num_rows >= 1, "values must not be empty")
    checks.check(width >= 1, "values must not be empty")
    _check_pre_values(checks, values, pre_values, pre_input, activation, tokens)
    checks.shape("scores", scores, "[T, S, C]", (tokens, selected, None))
    checks.has_dtype("scores", scores, accumulation_dtype(values.dtype))
    cores = scores.shape[2]
    check_cores(checks, cores, " (scores.shape[2])")
    checks.check(
        width % cores == 0,
        f"the number of cores C must divide Dv, got C = {cores}, Dv = {width}",
    )
    if table_scale is not None:
        checks.shape("table_scale", table_scale, "[2]", (2,))
        checks.has_dtype("table_scale", table_scale, torch.float64)
    if permutation is not None:
        checks.shape("permutation", permutation, "[expand * window]", (expand * window,))
        checks.has_dtype("permutation", permutation, torch.int64)
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
    table_scale: Tensor | None,
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
    first_row: int = 0,
    num_slots: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks = ArgumentChecks("value_ffn_bwd", "values", values)
    need_pre_values = need_pre_values and pre_values is not None
    checks.check(
        table_scale is None or not (need_values or need_pre_values),
        "dense gradients of the tables are not offered where these have scales",
    )
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


def _value_ffn_bwd_deferred_fake(
    grad_out: Tensor,
    indices: Tensor,
    scores: Tensor,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    factors = rest[11]  # behind pre_activation, permutation, table_scale and eight options
    checks = ArgumentChecks("value_ffn_bwd_deferred", "values", values)
    checks.shape("factors", factors, "[bytes]", (None,))
    checks.has_dtype("factors", factors, torch.uint8)
    return _value_ffn_bwd_main_grad_fake(
        grad_out, indices, scores, values, pre_values, pre_input, *rest
    )


def _value_ffn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    indices, scores, values, pre_values, pre_input, permutation, table_scale = inputs[:7]
    # Not saved tensors: their version counters move between layers that share the table.
    ctx.values_main_grad, ctx.pre_values_main_grad, ctx.factors = inputs[7:10]
    ctx.tables = (values, pre_values)
    ctx.options, ctx.shard = inputs[10:18], inputs[18:]
    _, pre_activation = output
    ctx.mark_non_differentiable(pre_activation)
    optional = (pre_values, pre_input, permutation, table_scale)
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
    pre_values, pre_input, permutation, table_scale = (
        next(remaining) if present else None for present in ctx.present
    )
    tensors = (
        grad_out,
        indices,
        scores,
        values,
        pre_values,
        pre_input,
        pre_activation,
        permutation,
    )
    scaled = (*tensors, table_scale, *ctx.options)
    _, need_scores, need_values, need_pre_values, need_pre_input = ctx.needs_input_grad[:5]
    grad_values: Tensor | None = None
    grad_pre_values: Tensor | None = None
    if ctx.factors is not None:
        grad_scores, grad_pre_input = _append_factors(ctx.factors, scaled, ctx.shard)
    elif ctx.values_main_grad is None and ctx.pre_values_main_grad is None:
        grad_scores, grad_pre_input, grad_values, grad_pre_values = (
            torch.ops.ultramem.value_ffn_bwd(*scaled, need_values, need_pre_values, *ctx.shard)
        )
    else:
        if torch.is_grad_enabled():
            raise_double_backward("value_ffn")
        grad_scores, grad_pre_input = torch.ops.ultramem.value_ffn_bwd_main_grad(
            *tensors, *ctx.options, ctx.values_main_grad, ctx.pre_values_main_grad, *ctx.shard
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
        *[None] * 15,
    )


def _append_factors(
    arena: Tensor, arguments: tuple[Any, ...], shard: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients of scores and pre_input; the factors of the tables' go to the arena."""
    if torch.is_grad_enabled():
        raise_double_backward("value_ffn")
    owner = owner_of(arena)
    if owner is None:
        return torch.ops.ultramem.value_ffn_bwd_deferred(*arguments, arena, *shard)
    indices: Tensor = arguments[1]
    with owner._appending(indices.shape[0]) as grown:
        return torch.ops.ultramem.value_ffn_bwd_deferred(*arguments, grown, *shard)


if _library.is_loaded():
    register("value_ffn", _value_ffn_fake, _value_ffn_setup, _value_ffn_backward)
    register("value_ffn_bwd", _value_ffn_bwd_fake)
    # They mutate their arguments, which register_autograd refuses; _value_ffn_backward guards them.
    torch.library.register_fake("ultramem::value_ffn_bwd_main_grad", _value_ffn_bwd_main_grad_fake)
    torch.library.register_fake("ultramem::value_ffn_bwd_deferred", _value_ffn_bwd_deferred_fake)
