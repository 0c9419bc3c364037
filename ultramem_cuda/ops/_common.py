"""What the operators share: argument checks, autocast, registration with torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import nvtx
from ._checks import accumulation_dtype


def accumulation_cast(op: str, name: str, tensor: Tensor, like: torch.dtype) -> Tensor:
    """An argument that may have any float dtype, in the one that it is used in."""
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be of a floating-point dtype, got {tensor.dtype}")
    return tensor.to(accumulation_dtype(like))


def gain_cast(op: str, name: str, gain: Tensor, like: torch.dtype) -> Tensor:
    """A norm's gain: the dtype of what is normalised, the usual one, is taken as it is.

    Casts of it and of its gradient would be kernels of their own, each as long as that of a short
    norm.
    """
    return gain if gain.dtype == like else accumulation_cast(op, name, gain, like)


def check_rank(op: str, name: str, tensor: Tensor, layout: str, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{op}: {name} must be {layout}, got {list(tensor.shape)}")


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch's autocast would do to these arguments: float64 stays."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """For torch's own products inside an operator, which autocast is not to change."""
    # The meta device has no autocast to turn off.
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def raise_double_backward(op: str) -> NoReturn:
    raise RuntimeError(f"{op}: differentiating twice is not supported")


def register(
    name: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Fake implementation, gradient formula, its NVTX range and refusals of one operator.

    An operator without a formula is itself a gradient: differentiating it raises. A formula gets
    None for the outputs that nobody differentiates: torch would otherwise fill a tensor of zeros
    for each of them, those that are saved for the backward included.
    """
    qualified = f"ultramem::{name}"
    torch.library.register_fake(qualified, fake)
    forward_name = name.removesuffix("_bwd")

    def refuse_vmap(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{forward_name}: vmap is not supported")

    torch.library.register_vmap(qualified, refuse_vmap)

    if setup_context is None or backward is None:

        def refuse_double_backward(*_: Any, **__: Any) -> NoReturn:
            raise_double_backward(forward_name)

        torch.library.register_autograd(qualified, refuse_double_backward)
        return

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    @nvtx.annotate(f"{qualified} bwd")
    def differentiate(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            # Of a later function that gives its input no gradient.
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    torch.library.register_autograd(qualified, differentiate, setup_context=setup)
