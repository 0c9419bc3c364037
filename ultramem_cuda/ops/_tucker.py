"""Query projection and the filter of the Tucker cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library, nvtx
from ._checks import MAX_TUCKER_RANK, ArgumentChecks, check_rank_and_cores
from ._common import accumulation_cast, cast_for_autocast, gain_cast, register


@nvtx.annotate("ultramem::tucker_query fwd")
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
    x, weight = cast_for_autocast(x, weight)
    gain = gain_cast("tucker_query", "norm_weight", norm_weight, x.dtype)
    query, _ = torch.ops.ultramem.tucker_query(x, weight, gain, num_heads, eps)
    return query


def _tucker_query_fake(
    x: Tensor, weight: Tensor, norm_weight: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    checks = ArgumentChecks("tucker_query", "x", x)
    checks.dtype("x", x)
    checks.shape("x", x, "[T, D]", (None, None))
    checks.shape("weight", weight, "[2*H*Q*Kd, D]", (None, x.shape[1]))
    checks.has_dtype("weight", weight, x.dtype)
    checks.shape("norm_weight", norm_weight, "[Kd]", (None,))
    checks.gain_dtype("norm_weight", norm_weight, x.dtype)
    checks.check(num_heads >= 1, f"num_heads must be positive, got {num_heads}")
    checks.check(eps >= 0, f"eps must not be negative, got {eps}")
    rows, (key_dim,) = weight.shape[0], norm_weight.shape
    checks.check(key_dim >= 1, "norm_weight must not be empty")
    num_queries = rows // (2 * num_heads * key_dim)
    message = f"weight must have 2*H*Q*Kd rows with H = {num_heads}, Kd = {key_dim} and Q in 1..4"
    checks.check(rows == num_queries * 2 * num_heads * key_dim, f"{message}, got {rows}")
    checks.check(num_queries >= 1, f"{message}, got {rows}")
    checks.check(num_queries <= MAX_TUCKER_RANK, f"{message}, got {rows}")
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


@nvtx.annotate("ultramem::tucker_filter fwd")
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
    core = accumulation_cast("tucker_filter", "core", core, core.dtype)
    u, t, sigma, _, _ = torch.ops.ultramem.tucker_filter(core)
    return u, t, sigma


def _tucker_filter_fake(core: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks = ArgumentChecks("tucker_filter", "core", core)
    checks.dtype("core", core)
    checks.shape("core", core, "[C, H, R, R]", (None, None, None, None))
    cores, heads, rank, columns = core.shape
    checks.check(columns == rank, "the last two dimensions of core must be equal")
    check_rank_and_cores(checks, rank, cores)
    checks.check(heads >= 1, "core must have at least one head")
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


if _library.is_loaded():
    register("tucker_query", _tucker_query_fake, _tucker_query_setup, _tucker_query_backward)
    register("tucker_query_bwd", _tucker_query_bwd_fake)
    register("tucker_filter", _tucker_filter_fake, _tucker_filter_setup, _tucker_filter_backward)
    # A few R x R products: torch's own serve every device.
    torch.library.custom_op("ultramem::tucker_filter_bwd", _tucker_filter_bwd, mutates_args=())
    register("tucker_filter_bwd", _tucker_filter_bwd_fake)
