"""Single operators and layers for a profiler, each with the bytes that one pass must move.

    python -m ultramem_cuda.profiling.nsight.targets value_ffn --shape M --tokens 8192 --passes 3

runs one of them under an NVTX range of its name, between cudaProfilerStart and cudaProfilerStop,
after a warm-up that lies outside of both. The same targets serve measurements in the process:

    target = TARGETS["value_ffn"](SHAPES["M"], 8192, torch.device("cuda"))
    target.run()
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultramem_cuda import MemoryTable, UltraMemConfig, UltraMemLayer, nvtx, ops
from ultramem_cuda.optim import MemoryAdam

from .. import traffic
from ..record import Bytes

__all__ = ["MODELS", "SHAPES", "TARGETS", "Target"]

DTYPE = torch.bfloat16
COPY_BYTES = 1 << 30
_ELEMENT = 2  # bytes of DTYPE
_SEED = 1234
_WARMUP = 3

# The shapes of docs/performance.md. The tables of B and L are those that one GPU holds.
SHAPES: dict[str, UltraMemConfig] = {
    "S": UltraMemConfig.preset("227M-1.2B"),
    "B": UltraMemConfig(
        d_model=2048,
        num_layers=1,
        num_keys=1448,
        key_dim=512,
        topk=32,
        pre_value_dim=256,
        value_dim=768,
        num_slots=1 << 21,
    ),
    "M": UltraMemConfig.preset("1B-7B"),
    "L": UltraMemConfig.preset("2.5B-60B", num_layers=1, num_slots=1928**2),
}


@dataclass(frozen=True)
class Target:
    """Something to run, ready on its device."""

    name: str
    run: Callable[[], None]
    """One pass; on a GPU it is enqueued."""
    model: Bytes
    """What one pass must read from and write to memory. Where the rows are drawn here, ``distinct``
    counts those that were; else it is what uniform draws lead to expect."""
    description: str

    @property
    def model_bytes(self) -> float:
        """Every gathered row counted.

        That is what DRAM sees of tables much larger than the L2 cache: two uses of a row lie, on
        average, a large part of the table apart, and the row is gone from the cache in between.
        ``model.lower`` counts each row once.
        """
        return self.model.upper


# ---- the model -----------------------------------------------------------------------------------


def _memory_layer(config: UltraMemConfig) -> traffic.MemoryLayer:
    return traffic.MemoryLayer(
        d_model=config.d_model,
        num_keys=config.num_keys,
        key_dim=config.key_dim,
        topk=config.topk,
        value_dim=config.value_dim,
        window=config.window,
        pre_value_dim=config.pre_value_dim,
        num_heads=config.num_heads,
        tucker_rank=config.tucker_rank,
        num_cores=config.num_cores,
        element_bytes=_ELEMENT,
    )


def _copy_bytes(config: UltraMemConfig, num_tokens: int) -> Bytes:
    return Bytes(dense=0.0, gathered=0.0, distinct=0.0, activations=2.0 * COPY_BYTES)


def _gather_bytes(config: UltraMemConfig, num_tokens: int) -> Bytes:
    """Rows read and written, an int64 index each; drawn without repetition."""
    rows = num_tokens * config.slots_per_token
    read = float(rows * config.value_dim * _ELEMENT)
    return Bytes(dense=0.0, gathered=read, distinct=read, activations=read + 8.0 * rows)


def _tucker_query_bytes(config: UltraMemConfig, num_tokens: int) -> Bytes:
    """The weight; x read, the projection (kept for the backward) and the query written."""
    width = 2 * config.num_heads * config.num_queries * config.key_dim
    weight = width * config.d_model + config.key_dim
    activations = num_tokens * (config.d_model + 2 * width)
    return Bytes(float(weight * _ELEMENT), 0.0, 0.0, float(activations * _ELEMENT))


def _product_key_topk_bytes(config: UltraMemConfig, num_tokens: int) -> Bytes:
    """Keys; the query read, and the five outputs written."""
    heads, kept = config.num_heads, config.kept_per_axis
    keys = 2 * heads * config.tucker_rank * config.num_keys * config.key_dim * _ELEMENT
    query = 2 * heads * config.num_queries * config.key_dim * _ELEMENT
    # float32 score a core, int64 index, int16 position in the grid.
    slots = config.slots_per_token * (4 * config.num_cores + 8 + 2)
    # int32 key, float32 score a rank.
    axes = 2 * heads * kept * (4 + 4 * config.tucker_rank)
    return Bytes(float(keys), 0.0, 0.0, float(num_tokens * (query + slots + axes)))


def _value_ffn_bytes(config: UltraMemConfig, num_tokens: int) -> Bytes:
    """Rows; indices, scores and pre_input read, out and pre-activations written."""
    rows = _memory_layer(config).forward(num_tokens)
    # int64 index, float32 score a core, float32 pre-activation.
    slots = config.slots_per_token * (8 + 4 * config.num_cores + 4)
    vectors = (config.pre_value_dim + config.value_dim) * _ELEMENT
    return Bytes(0.0, rows.gathered, rows.distinct, float(num_tokens * (slots + vectors)))


def _memory_layer_bytes(config: UltraMemConfig, num_tokens: int) -> Bytes:
    """Parameters and rows; x read and y written. What the operators hand on is not counted."""
    layer = _memory_layer(config).forward(num_tokens)
    activations = 2.0 * num_tokens * config.d_model * _ELEMENT
    return Bytes(layer.dense, layer.gathered, layer.distinct, activations)


def _factor_bytes(config: UltraMemConfig) -> int:
    """Of one token: int32 slot, float32 weight a core and grad_a; grad_out and pre_input."""
    slots = config.slots_per_token * (4 + 4 * config.num_cores + 4)
    return slots + (config.pre_value_dim + config.value_dim) * _ELEMENT


def _memory_layer_training_bytes(config: UltraMemConfig, num_tokens: int) -> Bytes:
    """Parameters read twice and their gradients written; rows read twice; x read twice and its
    gradient written, y written and its gradient read; factors written."""
    layer = _memory_layer(config).forward(num_tokens)
    vectors = 5 * config.d_model * _ELEMENT
    activations = float(num_tokens * (vectors + _factor_bytes(config)))
    return Bytes(3 * layer.dense, 2 * layer.gathered, 2 * layer.distinct, activations)


def _moe_bytes(config: UltraMemConfig, num_tokens: int) -> Bytes:
    """Router and experts used; x read and y written. What dispatch moves on top is not counted."""
    moe = traffic.OLMOE_MOE
    read = moe.forward(num_tokens)
    activations = 2.0 * num_tokens * moe.d_model * _ELEMENT
    return Bytes(read.dense, read.gathered, read.distinct, activations)


def _optimizer_step_bytes(config: UltraMemConfig, num_tokens: int) -> Bytes:
    """Touched rows and their two bfloat16 moments read and written; factors read; keys and entries
    of 4 bytes each sorted in 3 passes, each read and written."""
    layer = _memory_layer(config)
    rows = layer.touched(num_tokens) * layer.row_bytes * (1 + 2) * 2
    entries = num_tokens * config.slots_per_token
    return Bytes(0.0, rows, rows, num_tokens * _factor_bytes(config) + 48.0 * entries)


MODELS: dict[str, Callable[[UltraMemConfig, int], Bytes]] = {
    "copy": _copy_bytes,
    "gather": _gather_bytes,
    "tucker_query": _tucker_query_bytes,
    "product_key_topk": _product_key_topk_bytes,
    "value_ffn": _value_ffn_bytes,
    "memory_layer": _memory_layer_bytes,
    "memory_layer_training": _memory_layer_training_bytes,
    "moe": _moe_bytes,
    "optimizer_step": _optimizer_step_bytes,
}
"""Bytes of one pass of each target, by its sizes alone: (config, num_tokens) -> Bytes."""


# ---- what runs -----------------------------------------------------------------------------------


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(_SEED)


def _normal(*shape: int, generator: torch.Generator, dtype: torch.dtype = DTYPE) -> Tensor:
    device = generator.device
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)


def _copy(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    source = torch.empty(COPY_BYTES // 4, dtype=torch.int32, device=device)
    source.random_(generator=_generator(device))
    destination = torch.empty_like(source)

    def run() -> None:
        # A kernel: torch's copy_ between alike tensors is a cudaMemcpy, which ncu does not see.
        torch.neg(source, out=destination)

    description = f"{COPY_BYTES >> 20} MiB read and as many written by an elementwise kernel"
    return Target("copy", run, MODELS["copy"](config, num_tokens), description)


def _gather(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    rows = num_tokens * config.slots_per_token
    if rows > config.num_slots:
        raise ValueError(
            f"gather: tokens * slots a token must be at most the table's {config.num_slots} rows, "
            f"got {num_tokens} * {config.slots_per_token}"
        )
    generator = _generator(device)
    values = _normal(config.num_slots, config.value_dim, generator=generator)
    indices = torch.randperm(config.num_slots, generator=generator, device=device)[:rows].clone()
    out = torch.empty(rows, config.value_dim, dtype=DTYPE, device=device)

    def run() -> None:
        torch.index_select(values, 0, indices, out=out)

    row_bytes = config.value_dim * _ELEMENT
    description = (
        f"{rows} different rows of {row_bytes} bytes, anywhere in a table of "
        f"{config.num_slots * row_bytes / 1e9:.1f} GB, written in order"
    )
    return Target("gather", run, MODELS["gather"](config, num_tokens), description)


def _tucker_query(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    generator = _generator(device)
    width = 2 * config.num_heads * config.num_queries * config.key_dim
    x = _normal(num_tokens, config.d_model, generator=generator)
    weight = _normal(width, config.d_model, generator=generator)
    gain = torch.ones(config.key_dim, dtype=DTYPE, device=device)

    @torch.no_grad()
    def run() -> None:
        ops.tucker_query(x, weight, gain, num_heads=config.num_heads, eps=config.eps)

    description = f"{num_tokens} tokens of width {config.d_model} to queries of {width}"
    return Target("tucker_query", run, MODELS["tucker_query"](config, num_tokens), description)


def _product_key_topk(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    generator = _generator(device)
    heads, rank = config.num_heads, config.tucker_rank
    query = _normal(num_tokens, 2, heads, config.num_queries, config.key_dim, generator=generator)
    keys = _normal(heads, 2, rank, config.num_keys, config.key_dim, generator=generator)
    core = torch.rand(config.num_cores, heads, rank, rank, generator=generator, device=device)
    u, t, _ = ops.tucker_filter(core)

    @torch.no_grad()
    def run() -> None:
        ops.product_key_topk(
            query,
            keys,
            core,
            topk=config.topk,
            axis_topk=config.kept_per_axis,
            u=u,
            t=t,
        )

    description = f"{config.topk} of {config.num_keys}^2 keys for each of {num_tokens} tokens"
    model = MODELS["product_key_topk"](config, num_tokens)
    return Target("product_key_topk", run, model, description)


def _value_ffn(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    generator = _generator(device)
    table = MemoryTable.from_config(config, dtype=DTYPE, device=device).requires_grad_(False)
    size = (num_tokens, config.slots_per_token)
    indices = torch.randint(config.window, size, generator=generator, device=device)
    scores = _normal(*size, config.num_cores, generator=generator, dtype=torch.float32)
    pre_input = (
        _normal(num_tokens, config.pre_value_dim, generator=generator)
        if config.pre_value_dim
        else None
    )

    def run() -> None:
        ops.value_ffn(
            indices,
            scores,
            table.values,
            table.pre_values,
            pre_input,
            activation=config.activation,
        )

    distinct = int(indices.unique().numel())
    row_bytes = _memory_layer(config).row_bytes
    model = MODELS["value_ffn"](config, num_tokens)
    model = dataclasses.replace(model, distinct=float(distinct * row_bytes))
    description = (
        f"{indices.numel()} rows of {row_bytes} bytes, {distinct} of them different, drawn from a "
        f"window of {config.window * row_bytes / 1e9:.1f} GB"
    )
    return Target("value_ffn", run, model, description)


def _layer_and_table(
    config: UltraMemConfig, device: torch.device, grad_mode: str = "dense"
) -> tuple[UltraMemLayer, MemoryTable]:
    torch.manual_seed(_SEED)
    table = MemoryTable.from_config(config, dtype=DTYPE, device=device, grad_mode=grad_mode)
    return UltraMemLayer(config, 0, dtype=DTYPE, device=device), table


def _memory_layer_forward(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    layer, table = _layer_and_table(config, device)
    layer.eval()
    x = _normal(num_tokens, config.d_model, generator=_generator(device))

    @torch.no_grad()
    def run() -> None:
        layer(x, table)

    description = f"forward of {num_tokens} tokens, keys normalised ahead"
    return Target("memory_layer", run, MODELS["memory_layer"](config, num_tokens), description)


def _forward_backward(
    config: UltraMemConfig, num_tokens: int, device: torch.device
) -> tuple[Callable[[], None], MemoryTable]:
    """A pass that leaves its factors in the table behind."""
    layer, table = _layer_and_table(config, device, "deferred")
    table.reserve(num_tokens, dtype=DTYPE)
    generator = _generator(device)
    x = _normal(num_tokens, config.d_model, generator=generator).requires_grad_()
    grad_y = _normal(num_tokens, config.d_model, generator=generator)
    leaves = [x, *layer.parameters()]

    def run() -> None:
        table.zero_grad()
        # Values and pre-values are no leaves here: their gradients are the factors.
        torch.autograd.grad(layer(x, table), leaves, grad_y)

    return run, table


def _memory_layer_training(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    run, _ = _forward_backward(config, num_tokens, device)
    model = MODELS["memory_layer_training"](config, num_tokens)
    description = f"forward and backward of {num_tokens} tokens, deferred gradients of the table"
    return Target("memory_layer_training", run, model, description)


def _moe(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    moe_dispatch = importlib.import_module("..moe_dispatch", __package__)
    sizes = traffic.OLMOE_MOE
    torch.manual_seed(_SEED)
    layer: Any = moe_dispatch.DroplessMoE(
        sizes.d_model,
        sizes.inner,
        sizes.num_experts,
        sizes.experts_per_token,
        dtype=DTYPE,
        device=device,
    )
    x = _normal(num_tokens, sizes.d_model, generator=_generator(device))

    @torch.no_grad()
    def run() -> None:
        layer(x)

    description = (
        f"forward of {num_tokens} tokens, {sizes.experts_per_token} of {sizes.num_experts} experts "
        "each (OLMoE-1B-7B's, whatever the shape)"
    )
    return Target("moe", run, MODELS["moe"](config, num_tokens), description)


def _optimizer_step(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    backward, table = _forward_backward(config, num_tokens, device)
    backward()
    factors = table.factors
    assert factors is not None
    optimizer = MemoryAdam(table.parameters(), lr=1e-4, state_dtype=torch.bfloat16)

    def run() -> None:
        # A step keeps the sorted entries for clipping that may follow; each is to sort its own.
        factors.step_cache = None
        optimizer.step()

    distinct = int(factors.slots.unique().numel())
    layer = _memory_layer(config)
    rows = float(distinct * layer.row_bytes * (1 + 2) * 2)
    model = MODELS["optimizer_step"](config, num_tokens)
    model = dataclasses.replace(model, gathered=rows, distinct=rows)
    description = (
        f"MemoryAdam, bfloat16 moments, factors of {num_tokens} tokens: {factors.slots.numel()} "
        f"entries on {distinct} rows"
    )
    return Target("optimizer_step", run, model, description)


TARGETS: dict[str, Callable[[UltraMemConfig, int, torch.device], Target]] = {
    "copy": _copy,
    "gather": _gather,
    "tucker_query": _tucker_query,
    "product_key_topk": _product_key_topk,
    "value_ffn": _value_ffn,
    "memory_layer": _memory_layer_forward,
    "memory_layer_training": _memory_layer_training,
    "moe": _moe,
    "optimizer_step": _optimizer_step,
}
"""Builders of the targets: (config, num_tokens, device) -> Target."""


# ---- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, which the commands of this package share."""
    parser.add_argument("--shape", choices=SHAPES, default="M", help="sizes (default: M)")
    parser.add_argument("--tokens", type=int, default=8192, help="of one pass (default: 8192)")
    parser.add_argument("--passes", type=int, default=3, help="profiled (default: 3)")


def profile(target: Target, passes: int) -> None:
    """Runs a target on the current GPU so that a profiler sees ``passes`` passes of it alone."""
    if passes < 1:
        raise ValueError(f"passes: must be positive, got {passes}")
    for _ in range(_WARMUP):
        target.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    # Ranges belong to a thread: in one of autograd's own a backward would be outside of this one.
    with (
        torch.autograd.set_multithreading_enabled(False),
        nvtx.enable(),
        torch.cuda.nvtx.range(target.name),
    ):
        for _ in range(passes):
            target.run()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ultramem_cuda.profiling.nsight.targets",
        description="Runs one operator or layer for a profiler to look at.",
    )
    parser.add_argument("name", choices=TARGETS)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("targets: no CUDA GPU that torch can use", file=sys.stderr)
        return 1
    target = TARGETS[options.name](SHAPES[options.shape], options.tokens, torch.device("cuda"))
    profile(target, options.passes)
    print(f"{target.name}: {target.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
