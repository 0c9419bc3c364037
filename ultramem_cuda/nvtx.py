"""NVTX ranges: the names under which NVIDIA's profilers show operators, layers and optimizer steps.

Off by default. ``ULTRAMEM_NVTX=1`` in the environment turns them on, as does :class:`enable`. The
ranges are torch's (``torch.cuda.nvtx``, the default domain), pushed and popped by the thread that
launches the kernels; a backward's are those of autograd's thread.

==============================  =======================================================
``ultramem::value_ffn fwd``     an operator's forward; likewise of every function of
                                ``ultramem_cuda.ops``
``ultramem::value_ffn bwd``     its backward
``ultramem::table_group``       an operator of the optimizers, which has no backward;
                                likewise ``table_grad_sum_sq`` and ``table_update``
``UltraMemLayer fwd``           a layer, around its operators
``clip_grad_norm_``             clipping; also ``GradientFactors.grad_norm``
``MemoryAdam step``             a step, by the name of the optimizer's class
==============================  =======================================================

Compiled code has no ranges: torch.compile and torch.export leave the Python of the operators
behind. Of a CUDA graph the capture is in ranges, its replays are not.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["annotate", "enable", "is_enabled"]

P = ParamSpec("P")
R = TypeVar("R")

_on = False


def is_enabled() -> bool:
    """Whether ranges are pushed."""
    return _on


class enable:
    """Turns ranges on or off, for all threads: for good, or until the end of a ``with`` block.

    ::

        nvtx.enable(True)
        with nvtx.enable():
            layer(x, table)

    A torch without NVTX, as those for the CPU are, warns once, and ranges stay off.
    """

    def __init__(self, on: bool = True) -> None:
        self._before = _on
        _switch(on)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        _switch(self._before)


def annotate(name: str | Callable[..., str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: every call of the function is a range.

    Args:
        name: of the range, or a function that makes it of the call's arguments.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def annotated(*args: P.args, **kwargs: P.kwargs) -> R:
            # In this order: code that was compiled with the switch read would be compiled again
            # when it is turned.
            if torch.compiler.is_compiling() or not _on or _is_traced():
                return function(*args, **kwargs)
            torch.cuda.nvtx.range_push(name if isinstance(name, str) else name(*args, **kwargs))
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.nvtx.range_pop()

        return annotated

    return decorate


def _is_traced() -> bool:
    # A backward that AOTAutograd traces: torch 2.11 does not call that compiling.
    return torch._guards.TracingContext.try_get() is not None


def _switch(on: bool) -> None:
    global _on
    if on and not _is_available():
        _warn_once()
        on = False
    _on = on


def _is_available() -> bool:
    # What torch.cuda.nvtx itself looks for; without it every function of that module raises.
    return hasattr(torch._C, "_nvtx")


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"ultramem_cuda.nvtx: torch {torch.__version__} has no NVTX, so there will be no ranges; "
        "builds of torch for CUDA have it",
        stacklevel=4,
    )


if os.environ.get("ULTRAMEM_NVTX") == "1":
    _switch(True)
