"""A memory layer beside a block's FFN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._retrieval_cache import is_capturing
from .layer import UltraMemLayer
from .table import MemoryTable

# By device, the caller's stream and their priority.
_side_streams: dict[tuple[torch.device, int, int], torch.cuda.Stream] = {}


def ffn_with_memory(
    ffn: Callable[[Tensor], Tensor], memory: UltraMemLayer, x: Tensor, table: MemoryTable
) -> Tensor:
    """``ffn(x) + memory(x, table)``, the two side by side on a GPU.

    Few tokens leave a GPU unused in different ways: the FFN waits for its weights, retrieval for
    one small kernel after the other. Without gradients on CUDA, retrieval and the reading of rows
    run on streams of their own while the FFN runs on the caller's, and the memory's output
    projection adds to what the FFN has returned. Under autocast, with hooks on ``memory`` or a
    subclass of it, one runs after the other.

    A table that is sharded over several GPUs makes them wait for each other. With it the whole
    memory layer runs beside the FFN, with gradients as well: what goes over the wire, forward and
    backward, goes while the FFN computes.

    Ordered with the caller's stream at both ends, and capturable in a CUDA graph. With gradients
    and a table that is not sharded, under ``torch.compile`` and on the CPU, one runs after the
    other.

    Args:
        ffn: [..., D] to [..., D]; what it returns must be a tensor of its own, which is written to
            without gradients.
        memory: the block's memory layer.
        x: [..., D], the normed input of both, in a dtype that both take.
        table: the model's table.

    Returns:
        [..., D], of the dtype of the sum.

    Raises:
        ValueError, TypeError: as the memory layer's forward does; and what ``ffn`` raises.
    """
    if _shares_wires(table, x):
        return _whole_beside(ffn, memory, x, table)
    if not _runs_beside(memory, x):
        return ffn(x) + memory(x, table)
    tokens = memory.flat_tokens(x, table)
    main = torch.cuda.current_stream(x.device)
    retriever, reader = _side_stream(main, priority=-1), _side_stream(main, priority=0)
    retriever.wait_stream(main)
    reader.wait_stream(retriever)
    try:
        with torch.cuda.stream(retriever):
            query = memory.query(tokens)
            asked = retriever.record_event()
            scores, indices = memory.retrieve_for(query)
            found = retriever.record_event()
        with torch.cuda.stream(reader):
            pre_input = memory.pre_input(tokens)
        # All of retrieval waits for the queries, so that the FFN does not come before them.
        main.wait_event(asked)
        y = ffn(x)
        with torch.cuda.stream(reader):
            reader.wait_event(found)
            read = memory.read(table, scores, indices, pre_input)
    finally:
        # Also where something was raised: what the sides read may be freed then, by either.
        retriever.wait_stream(reader)
        main.wait_stream(retriever)
    if not is_capturing(x.device):
        # It is used on a stream that has not allocated it. What a capture allocates is its own, and
        # the next use of the side stream there waits for this one's end.
        read.record_stream(main)
    return _add_projected(memory.value_proj, read, y, x)


def _whole_beside(
    ffn: Callable[[Tensor], Tensor], memory: UltraMemLayer, x: Tensor, table: MemoryTable
) -> Tensor:
    """Backwards run on the streams of their forwards, which autograd orders."""
    main = torch.cuda.current_stream(x.device)
    side = _side_stream(main, priority=-1)
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            out = memory(x, table)
        y = ffn(x)
    finally:
        main.wait_stream(side)
    if not is_capturing(x.device):
        x.record_stream(side)
        out.record_stream(main)
    return y + out


def _shares_wires(table: MemoryTable, x: Tensor) -> bool:
    return (
        x.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and isinstance(table, MemoryTable)
        and table.sharding is not None
        and table.sharding.num_shards > 1
    )


def _runs_beside(memory: UltraMemLayer, x: Tensor) -> bool:
    return (
        x.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and type(memory) is UltraMemLayer
        and not _has_hooks(memory)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _side_stream(main: torch.cuda.Stream, priority: int) -> torch.cuda.Stream:
    key = main.device, main.cuda_stream, priority
    if key not in _side_streams:
        stream = torch.cuda.Stream(main.device, priority=priority)
        # Streams are taken in turn from those that torch has: one may be the caller's.
        while stream == main:
            stream = torch.cuda.Stream(main.device, priority=priority)
        _side_streams[key] = stream
    return _side_streams[key]


def _add_projected(value_proj: nn.Linear, read: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """y + value_proj(read), in one product where that is all of it and y may be written to."""
    plain = type(value_proj) is nn.Linear and value_proj.bias is None
    writable = (
        y.shape == x.shape
        and y.is_contiguous()
        and y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        and (torch.is_inference_mode_enabled() or not y.is_inference())
    )
    same_dtype = y.dtype == read.dtype == value_proj.weight.dtype
    if plain and writable and same_dtype and not _has_hooks(value_proj):
        y.view(-1, y.shape[-1]).addmm_(read, value_proj.weight.t())
        return y
    return y + value_proj(read).reshape(x.shape)
