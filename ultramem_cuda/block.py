"""A memory layer beside a block's FFN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layer import UltraMemLayer
from .table import MemoryTable

# By device and the caller's stream: a stream of its own for each, so that what it has allocated is
# only ever reused behind what that caller has enqueued.
_side_streams: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


def ffn_with_memory(
    ffn: Callable[[Tensor], Tensor], memory: UltraMemLayer, x: Tensor, table: MemoryTable
) -> Tensor:
    """``ffn(x) + memory(x, table)``, the two side by side on a GPU.

    Few tokens leave a GPU unused in different ways: the FFN waits for its weights, retrieval for
    one small kernel after the other. Without gradients on CUDA, retrieval runs on a stream of its
    own while the FFN runs on the caller's, and the memory's output projection adds to what the FFN
    has returned. Ordered with the caller's stream at both ends, and capturable in a CUDA graph.
    With gradients, under autocast or ``torch.compile`` and elsewhere, one runs after the other.

    Args:
        ffn: [..., D] to [..., D]; what it returns must be a tensor of its own, which is written to.
        memory: the block's memory layer.
        x: [..., D], the normed input of both.
        table: the model's table.

    Returns:
        [..., D].
    """
    if not _runs_beside(x):
        return ffn(x) + memory(x, table)
    tokens = memory.flat_tokens(x, table)
    main = torch.cuda.current_stream(x.device)
    side = _side_stream(main)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        scores, indices = memory.retrieve(tokens)
    pre_input = memory.pre_input(tokens)
    projected = main.record_event()
    y = ffn(x)
    with torch.cuda.stream(side):
        side.wait_event(projected)
        read = memory.read(table, scores, indices, pre_input)
    main.wait_stream(side)
    return _add_projected(memory.value_proj, read, y, x)


def _runs_beside(x: Tensor) -> bool:
    return (
        x.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
    )


def _side_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    key = main.device, main.cuda_stream
    if key not in _side_streams:
        _side_streams[key] = torch.cuda.Stream(main.device, priority=-1)
    return _side_streams[key]


def _add_projected(value_proj: nn.Linear, read: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """y + value_proj(read), in place where y is nobody else's and nothing is hooked on."""
    plain = (
        type(value_proj) is nn.Linear
        and value_proj.bias is None
        and not (value_proj._forward_hooks or value_proj._forward_pre_hooks)
    )
    own = y.is_contiguous() and y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    if plain and own and y.dtype == read.dtype == value_proj.weight.dtype:
        y.view(-1, y.shape[-1]).addmm_(read, value_proj.weight.t())
        return y
    return y + value_proj(read).reshape(y.shape)
