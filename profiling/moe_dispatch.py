"""A dropless top-k mixture of experts, as fast as plain torch makes it: what the memory layer is
measured against.

Router, sort by expert, gather, grouped product, SwiGLU, grouped product, sum; forward and backward,
without a host synchronisation or a shape that depends on the data, so that a CUDA graph can hold
it. torch.compile fuses what lies between the products:

* Softmax and choice of the experts are one kernel beside the router's product. Few rows are placed
  by comparing them all, which is less to launch than a sort; many are sorted, by keys of 8 or 16
  bits.
* Dispatch and collection are each other's gradient. Both are gathers: no atomics, no zero fill.
* The routing weight is multiplied into SwiGLU's product, in the same kernel; what is collected is a
  pure sum.
* A few tokens alone, without gradients, are multiplied by their experts' matrices one by one, in
  kernels that read each matrix where it lies. Grouped products pay for all experts' bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compilation import compile_static, resolve_compiled

__all__ = ["DroplessMoE", "arrange", "grouped_mm_runs", "route"]

# Rows (tokens times experts_per_token) whose places are found by comparing each with each.
MAX_COMPARED = 4096
# Tokens that are multiplied one by one. At 8 of 64 experts their matrices would be read 32 times
# where 26 are distinct.
ONE_BY_ONE_TOKENS = 4
# torch's kernel takes fewer groups than a block has threads.
MAX_EXPERTS = 1023


def grouped_mm_runs(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    """Whether ``F.grouped_mm`` multiplies matrices of these widths without asking the host.

    CUDA: bfloat16 from sm_90 on (elsewhere torch copies the offsets to the host and loops). CPU:
    float32, bfloat16 and float16. Everywhere rows must start at multiples of 16 bytes.
    """
    if any(width * dtype.itemsize % 16 for width in widths):
        return False
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= (9, 0)
        return capable and dtype == torch.bfloat16
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def route(
    x: Tensor, router: Tensor, experts_per_token: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Experts of each token and their weights.

    Args:
        x: [T, D].
        router: [X, D]. The softmax over all experts is taken in float32 (float64 for float64).
        normalize: let the chosen experts' weights sum to 1.

    Returns:
        weights [T, k], of the softmax's dtype, largest first; experts [T, k], int64.
    """
    logits = F.linear(x, router)
    probability = logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    # Compiled, a sort of so few is one kernel with the softmax; a topk would be three of its own.
    weights, experts = probability.sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :experts_per_token], experts[:, :experts_per_token]
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def arrange(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in order of their experts, those of one expert in order of their tokens.

    Args:
        experts: int64 [T, k]. Entry (t, j) is row t*k + j before it is arranged.

    Returns:
        order: int64 [T*k], which entry each arranged row is.
        place: int64 [T, k], which arranged row each entry is: the inverse.
        ends: int32 [X], where each expert's rows end.
    """
    ids = experts.flatten()
    rows = torch.arange(ids.numel(), device=ids.device)
    every_expert = torch.arange(num_experts, device=ids.device)
    ends = (ids <= every_expert[:, None]).sum(1, dtype=torch.int32)
    if ids.numel() <= MAX_COMPARED:
        keys = ids * ids.numel() + rows
        place = (keys < keys[:, None]).sum(1)
        order = torch.empty_like(rows).scatter(0, place, rows)
    else:
        # Radix sorts take a pass for every 8 bits.
        keys = ids.to(torch.uint8 if num_experts <= 256 else torch.int16)
        order = keys.argsort(stable=True)
        place = torch.empty_like(rows).scatter(0, order, rows)
    return order, place.view(experts.shape), ends


class _Dispatch(torch.autograd.Function):
    """rows[r] = x[order[r] // k]: x [T, D], order [T*k], place [T, k] -> [T*k, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x[order // place.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad[place].sum(1), None, None


class _Collect(torch.autograd.Function):
    """y[t] = sum_j rows[place[t, j]], the adjoint of ``_Dispatch``: rows [T*k, D] -> [T, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        ctx.experts_per_token = place.shape[1]
        return rows[place].sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order // ctx.experts_per_token], None, None


def _grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows times its matrix: [S, K], [X, N, K] -> [S, N].

    Both operands have the summed dimension innermost, the layout that tensor cores of Hopper read
    without transposing.
    """
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _looped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As ``_grouped_product``, one expert after the other; waits for the device."""
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    return torch.cat(
        [
            rows[start:stop] @ matrix.T
            for start, stop, matrix in zip(starts, stops, weight, strict=True)
        ]
    )


def _arranged_moe(
    x: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    experts_per_token: int,
    normalize: bool,
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = _grouped_product,
) -> Tensor:
    """x [T, D] -> [T, D] by rows arranged by expert."""
    weights, experts = route(x, router, experts_per_token, normalize)
    order, place, ends = arrange(experts, router.shape[0])
    rows = _Dispatch.apply(x, order, place)
    row_weights = _Dispatch.apply(weights.reshape(-1, 1), order, place.view(-1, 1))
    gate, up = product(rows, gate_up, ends).chunk(2, dim=-1)
    inner = (F.silu(gate) * up * row_weights).to(x.dtype)
    return _Collect.apply(product(inner, down, ends), order, place)


def _one_by_one_inner(
    x: Tensor, router: Tensor, gate_up: Tensor, experts_per_token: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Weighted SwiGLU products [T, k, I] of each token's experts, and the experts [T, k].

    Compiled, no gathered matrix exists.
    """
    weights, experts = route(x, router, experts_per_token, normalize)
    wide = weights.dtype
    gate, up = gate_up.chunk(2, dim=1)
    tokens = x.to(wide)[:, None, None]
    inner = F.silu((gate[experts].to(wide) * tokens).sum(-1))
    inner = inner * (up[experts].to(wide) * tokens).sum(-1) * weights[..., None]
    return inner.to(x.dtype), experts


def _one_by_one_down(inner: Tensor, experts: Tensor, down: Tensor) -> Tensor:
    """y [T, D]. Compiled apart: in one graph, every output would compute SwiGLU once more."""
    wide = torch.promote_types(inner.dtype, torch.float32)
    products = down[experts].to(wide) * inner[:, :, None].to(wide)
    return products.sum((1, 3)).to(inner.dtype)


class DroplessMoE(nn.Module):
    """Dropless top-k mixture of SwiGLU experts: y = sum_e weight_e down_e(silu(gate_e x) * up_e x).

    Parameters: ``router`` [X, D]; ``gate_up`` [X, 2I, D], the gates' rows first; ``down``
    [X, D, I].

    Captured CUDA graphs and ``torch.cuda.set_sync_debug_mode("error")`` are fine after a first call
    of the same shape, in which torch compiles, where ``products`` is "grouped_mm".

    Args:
        d_model: D.
        inner: I, an expert's inner width.
        num_experts: X, at most 1023.
        experts_per_token: k.
        normalize: let the weights of a token's experts sum to 1; OLMoE leaves them as the softmax
            over all experts gives them.
        compiled: fuse what lies between the products with torch.compile; by default on CUDA where
            triton is installed.
        mode: torch.compile's; "max-autotune-no-cudagraphs" times Triton's grouped products against
            torch's own, too.
        one_by_one_tokens: up to so many tokens without gradients skip the grouped products; only
            where the layer is compiled.
        dtype, device: of the parameters. The layer is made for them and must not be moved.

    Raises:
        ValueError: sizes that do not fit; or ``compiled=True`` where torch cannot compile a grouped
            product.
        RuntimeError: see :func:`~.compilation.resolve_compiled`.
    """

    def __init__(
        self,
        d_model: int,
        inner: int,
        num_experts: int,
        experts_per_token: int,
        *,
        normalize: bool = False,
        compiled: bool | None = None,
        mode: str | None = None,
        one_by_one_tokens: int = ONE_BY_ONE_TOKENS,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts <= MAX_EXPERTS:
            raise ValueError(
                f"must be 1 <= experts_per_token <= num_experts <= {MAX_EXPERTS}, got "
                f"experts_per_token = {experts_per_token}, num_experts = {num_experts}"
            )

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.d_model = d_model
        self.inner = inner
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.normalize = normalize
        self.mode = mode
        self.one_by_one_tokens = one_by_one_tokens
        self.router = parameter(num_experts, d_model)
        self.gate_up = parameter(num_experts, 2 * inner, d_model)
        self.down = parameter(num_experts, d_model, inner)
        grouped = grouped_mm_runs(self.down.device, self.down.dtype, (d_model, inner))
        self.products = "grouped_mm" if grouped else "loop"
        """How experts are multiplied: "grouped_mm", or "loop" (over the experts, waiting for the
        device) where torch has no grouped product for the device, dtype or widths."""
        compilable = grouped and self.down.dtype == torch.bfloat16
        if compiled and not compilable:
            raise ValueError(
                "compiled: torch compiles grouped products of bfloat16 alone, with widths that are "
                f"multiples of 8, got {self.down.dtype}, d_model = {d_model}, inner = {inner}"
            )
        self.compiled = compilable and resolve_compiled(compiled, self.down.device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters from N(0, 1/fan_in): random tokens use the experts evenly."""
        for parameter in self.parameters():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D], of the parameters' dtype -> the same shape and dtype."""
        tokens = self._tokens(x)
        options = (self.experts_per_token, self.normalize)
        arguments = (tokens, self.router, self.gate_up, self.down, *options)
        if self.products == "loop" or not tokens.shape[0]:
            y = _arranged_moe(*arguments, product=_looped_product)
        elif not self.compiled:
            y = _arranged_moe(*arguments)
        elif tokens.shape[0] <= self.one_by_one_tokens and not torch.is_grad_enabled():
            run = compile_static(_one_by_one_inner, self.mode)
            inner, experts = run(tokens, self.router, self.gate_up, *options)
            y = compile_static(_one_by_one_down, self.mode)(inner, experts, self.down)
        else:
            y = compile_static(_arranged_moe, self.mode)(*arguments)
        return y.view(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts of each token of x [..., D], both [T, k]; see :func:`route`."""
        return route(self._tokens(x), self.router, self.experts_per_token, self.normalize)

    @torch.no_grad()
    def distinct_experts(self, x: Tensor) -> Tensor:
        """Number of experts that the tokens of x [..., D] use: int64 scalar on the device."""
        used = torch.zeros(self.num_experts, dtype=torch.bool, device=x.device)
        return used.index_fill(0, self.route(x)[1].flatten(), True).sum()

    def _tokens(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise ValueError(
                f"x: last dimension must be d_model = {self.d_model}, got shape {list(x.shape)}"
            )
        return x.reshape(-1, self.d_model)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, inner={self.inner}, num_experts={self.num_experts}, "
            f"experts_per_token={self.experts_per_token}, products={self.products!r}, "
            f"compiled={self.compiled}"
        )
