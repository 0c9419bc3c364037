"""Single operators and layers for a profiler, each with the bytes that one pass must move.

    python -m ultramem_cuda.profiling.nsight.targets value_ffn --shape M --tokens 8192 --passes 3

runs one of them under an NVTX range of its name, between cudaProfilerStart and cudaProfilerStop,
after a warm-up that lies outside of both. The same targets serve measurements in the process:

    target = TARGETS["value_ffn"](SHAPES["M"], 8192, torch.device("cuda"))
    target.run()
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ultramem_cuda import MemoryTable, UltraMemConfig, nvtx, ops
from ultramem_cuda.optim import MemoryAdam

from ..presets import profile_preset
from ..record import Bytes, Phase
from ..subjects import Runnable, make_memory, make_moe
from ..traffic import MemoryLayer, MoEFFN, Recipe, Table, total

__all__ = ["MODELS", "SHAPES", "TARGETS", "Model", "Target"]

DTYPE = torch.bfloat16
COPY_BYTES = 1 << 30
# What Runnable.train and _optimizer_step do.
RECIPE = Recipe(accumulate=True)
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
    """What one pass must read from and write to memory, by the byte model, with the distinct rows
    or experts that these very inputs use."""
    description: str

    @property
    def model_bytes(self) -> float:
        """Every gathered row counted.

        That is what DRAM sees of tables much larger than the L2 cache: two uses of a row lie, on
        average, a large part of the table apart, and the row is gone from the cache in between.
        ``model.lower`` counts each row once, and is what to expect of "optimizer_step" while the
        tokens' gradients, which are what it gathers, fit in the cache.
        """
        return self.model.upper


# ---- the model -----------------------------------------------------------------------------------


class Model(Protocol):
    """Bytes of one pass, by its sizes and the distinct rows or experts that its tokens use."""

    def __call__(
        self, config: UltraMemConfig, num_tokens: int, touched: float | None = None
    ) -> Bytes:
        """``touched``: what was counted; by default what uniform draws lead to expect."""
        ...


def _memory(config: UltraMemConfig) -> MemoryLayer:
    return MemoryLayer(config, DTYPE.itemsize, DTYPE.itemsize)


def _moe_layer() -> MoEFFN:
    """OLMoE's, whatever the shape."""
    layer = profile_preset("1B-7B")["moe"].layer
    assert isinstance(layer, MoEFFN)
    return layer


def _copy_bytes(config: UltraMemConfig, num_tokens: int, touched: float | None = None) -> Bytes:
    return Bytes(activations=2.0 * COPY_BYTES)


def _value_rows(config: UltraMemConfig) -> Table:
    return Table(
        config.num_slots,
        config.slots_per_token,
        config.value_dim,
        parameter_bytes=DTYPE.itemsize,
    )


def _gather_bytes(config: UltraMemConfig, num_tokens: int, touched: float | None = None) -> Bytes:
    """Rows read and written, an int64 index each; drawn without repetition."""
    rows = num_tokens * config.slots_per_token
    read = _value_rows(config).read(num_tokens, rows)
    return total([read]) + Bytes(activations=read.nbytes + 8.0 * rows)


def _operator_bytes(name: str) -> Model:
    """Of one operator in the layer's inference."""

    def model(config: UltraMemConfig, num_tokens: int, touched: float | None = None) -> Bytes:
        terms = _memory(config).terms("inference", num_tokens, touched=touched)
        return total(term for term in terms if term.operator == name)

    return model


def _layer_bytes(phase: Phase) -> Model:
    def model(config: UltraMemConfig, num_tokens: int, touched: float | None = None) -> Bytes:
        return _memory(config).traffic(phase, num_tokens, touched=touched, recipe=RECIPE)

    return model


def _moe_bytes(config: UltraMemConfig, num_tokens: int, touched: float | None = None) -> Bytes:
    return _moe_layer().traffic("decode", num_tokens, touched=touched)


def _step_bytes(config: UltraMemConfig, num_tokens: int, touched: float | None = None) -> Bytes:
    """Of the table alone, without the step of the layer's own parameters."""
    layer = _memory(config)
    rows = layer.touched(num_tokens) if touched is None else touched
    return total(layer.table.step_terms(num_tokens * layer.taken, rows, RECIPE))


MODELS: dict[str, Model] = {
    "copy": _copy_bytes,
    "gather": _gather_bytes,
    "tucker_query": _operator_bytes("tucker_query"),
    "product_key_topk": _operator_bytes("product_key_topk"),
    "value_ffn": _operator_bytes("value_ffn"),
    "memory_layer": _layer_bytes("decode"),
    "memory_layer_training": _layer_bytes("training"),
    "moe": _moe_bytes,
    "optimizer_step": _step_bytes,
}
"""Bytes of one pass of each target, for those who do not run it."""


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

    row_bytes = _value_rows(config).row_bytes
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
    row_bytes = _memory(config).table.row_bytes
    description = (
        f"{indices.numel()} rows of {row_bytes} bytes, {distinct} of them different, drawn from a "
        f"window of {config.window * row_bytes / 1e9:.1f} GB"
    )
    return Target("value_ffn", run, MODELS["value_ffn"](config, num_tokens, distinct), description)


def _memory_runnable(config: UltraMemConfig, device: torch.device) -> Runnable:
    torch.manual_seed(_SEED)
    return make_memory(config, layers=1, dtype=DTYPE, device=device)


def _memory_layer(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    runnable = _memory_runnable(config, device)
    runnable.start_decode()
    x = _normal(num_tokens, config.d_model, generator=_generator(device))

    def run() -> None:
        runnable.forward(0, x)

    rows = runnable.touched(0, x)
    description = f"forward of {num_tokens} tokens on {rows} rows, keys normalised ahead"
    model = MODELS["memory_layer"](config, num_tokens, rows)
    return Target("memory_layer", run, model, description)


def _training(
    config: UltraMemConfig, num_tokens: int, device: torch.device
) -> tuple[Callable[[], None], Runnable, int]:
    """A pass that leaves its factors in the table behind; and the rows that it touches."""
    runnable = _memory_runnable(config, device)
    generator = _generator(device)
    x = _normal(num_tokens, config.d_model, generator=generator)
    grad_y = _normal(num_tokens, config.d_model, generator=generator)
    rows = runnable.touched(0, x)
    runnable.start_training(num_tokens)

    def run() -> None:
        runnable.clear()
        runnable.train(0, x, grad_y)

    return run, runnable, rows


def _memory_layer_training(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    run, _, rows = _training(config, num_tokens, device)
    model = MODELS["memory_layer_training"](config, num_tokens, rows)
    description = (
        f"forward and backward of {num_tokens} tokens on {rows} rows, deferred gradients of the "
        "table"
    )
    return Target("memory_layer_training", run, model, description)


def _moe(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    sizes = _moe_layer()
    torch.manual_seed(_SEED)
    runnable = make_moe(
        sizes.d_model,
        sizes.inner,
        sizes.num_experts,
        sizes.experts_per_token,
        layers=1,
        dtype=DTYPE,
        device=device,
    )
    runnable.start_decode()
    x = _normal(num_tokens, sizes.d_model, generator=_generator(device))

    def run() -> None:
        runnable.forward(0, x)

    experts = runnable.touched(0, x)
    description = (
        f"forward of {num_tokens} tokens, {sizes.experts_per_token} of {sizes.num_experts} experts "
        f"each, {experts} in all (OLMoE-1B-7B's, whatever the shape)"
    )
    return Target("moe", run, MODELS["moe"](config, num_tokens, experts), description)


def _optimizer_step(config: UltraMemConfig, num_tokens: int, device: torch.device) -> Target:
    train, runnable, rows = _training(config, num_tokens, device)
    train()
    table = runnable.table
    assert table is not None
    assert table.factors is not None
    factors = table.factors
    optimizer = MemoryAdam(table.parameters(), lr=1e-4, state_dtype=torch.bfloat16)

    def run() -> None:
        # A step keeps the sorted entries for clipping that may follow; each is to sort its own.
        factors.step_cache = None
        optimizer.step()

    model = MODELS["optimizer_step"](config, num_tokens, rows)
    description = (
        f"MemoryAdam, bfloat16 moments, factors of {num_tokens} tokens: {factors.slots.numel()} "
        f"entries on {rows} rows"
    )
    return Target("optimizer_step", run, model, description)


TARGETS: dict[str, Callable[[UltraMemConfig, int, torch.device], Target]] = {
    "copy": _copy,
    "gather": _gather,
    "tucker_query": _tucker_query,
    "product_key_topk": _product_key_topk,
    "value_ffn": _value_ffn,
    "memory_layer": _memory_layer,
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
