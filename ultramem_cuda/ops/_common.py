"""What the operators share: argument checks, autocast, registration with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._checks import accumulation_dtype


def accumulation_cast(op: str, name: str, tensor: Tensor, like: torch.dtype) -> Tensor:
    """An argument that may have any float dtype, in the one that it is used in."""
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be of a floating-point dtype, got {tensor.dtype}")
    return tensor.to(accumulation_dtype(like))


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


def raise_double_backward(op: str) -> NoReturn:
    raise RuntimeError(f"{op}: differentiating twice is not supported")


def register(
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
        raise_double_backward(forward_name)

    torch.library.register_vmap(qualified, refuse_vmap)
    torch.library.register_autograd(
        qualified, backward or refuse_double_backward, setup_context=setup_context
    )
