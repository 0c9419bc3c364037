"""torch.compile for what stands beside our kernels, so that it is as good as torch makes it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["compile_static", "resolve_compiled"]

# Each number of tokens is compiled anew, in inference and in training; torch's own limit, 8, is
# that of a program whose shapes should not change.
_RECOMPILES = 256


def resolve_compiled(compiled: bool | None, device: torch.device) -> bool:
    """Whether to compile: None stands for yes on CUDA devices where triton is installed.

    Raises:
        RuntimeError: ``compiled`` is True, the device CUDA and triton not installed.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if compiled is None:
        return device.type == "cuda" and has_triton
    if compiled and device.type == "cuda" and not has_triton:
        raise RuntimeError(
            "compiled: torch.compile needs triton for CUDA (pip install triton), which is not "
            "installed; compiled=False runs without it"
        )
    return compiled


@functools.cache
def compile_static(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """``function`` under torch.compile: one graph, or an error; kernels of its own for each shape.

    Args:
        mode: torch.compile's.
    """
    run = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    def call(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILES):
            return run(*args)

    return call
