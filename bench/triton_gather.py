"""A gather of table rows in Triton: what reading them alone takes.

Import it only where Triton is, which comes with torch for CUDA.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows requested at once, and warps: each is the fastest for some shape.
_SETTINGS = ((4, 1), (8, 1), (8, 2), (8, 4), (16, 4), (32, 8))


@triton.jit
def _sum_rows(
    indices,
    values,
    pre_values,
    out,
    pre_out,
    selected,
    value_dim: tl.constexpr,
    pre_value_dim: tl.constexpr,
    value_block: tl.constexpr,
    pre_value_block: tl.constexpr,
    at_once: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, value_block)
    p = tl.arange(0, pre_value_block)
    value_sum = tl.zeros((value_block,), tl.float32)
    pre_value_sum = tl.zeros((pre_value_block,), tl.float32)
    for s in range(0, selected, at_once):
        rows = tl.load(indices + t * selected + s + tl.arange(0, at_once))
        x = tl.load(
            values + rows[:, None] * value_dim + v[None, :], mask=v[None, :] < value_dim, other=0.0
        )
        y = tl.load(
            pre_values + rows[:, None] * pre_value_dim + p[None, :],
            mask=p[None, :] < pre_value_dim,
            other=0.0,
        )
        value_sum += tl.sum(x.to(tl.float32), 0)
        pre_value_sum += tl.sum(y.to(tl.float32), 0)
    tl.store(out + t * value_dim + v, value_sum, mask=v < value_dim)
    tl.store(pre_out + t * pre_value_dim + p, pre_value_sum, mask=p < pre_value_dim)


def gathers(
    indices: Tensor, values: Tensor, pre_values: Tensor
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Functions that sum the rows of both tables by token, a program each, in several settings.

    Args:
        indices: [T, S] int64 rows.
        values: [N, Dv]; pre_values: [N, Dp].

    Returns:
        By setting, functions that return the sums [T, Dv] and [T, Dp], float32.
    """
    tokens, selected = indices.shape
    dims = values.shape[1], pre_values.shape[1]
    sums = [torch.empty(tokens, dim, device=values.device) for dim in dims]
    blocks = [triton.next_power_of_2(dim) for dim in dims]

    def run(at_once: int, warps: int) -> tuple[Tensor, Tensor]:
        _sum_rows[(tokens,)](
            indices, values, pre_values, *sums, selected, *dims, *blocks, at_once, num_warps=warps
        )
        return sums[0], sums[1]

    return {
        f"{at_once} rows, {warps} warps": partial(run, at_once, warps)
        for at_once, warps in _SETTINGS
        if selected % at_once == 0
    }
