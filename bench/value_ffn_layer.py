"""The section `layer` of `bench.value_ffn`: the whole layer, its times and its memory."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ultramem_cuda import MemoryTable, UltraMemConfig, UltraMemLayer
from ultramem_cuda.profiling.timing import Candidate

from .report import Quantity, Row
from .retrieval_cases import DTYPE, FWD, FWD_BWD, Settings, graph_candidates, is_standard
from .shapes import SMOKE, Shape
from .value_ffn_cases import factors_of

FORWARD_BACKWARD_US = {"S": 600.0, "B": 1450.0, "M": 3200.0}
ACTIVATION_MB = {"S": 60.0, "M": 180.0}
# One after the other, so that the host's time shows where it is longer than the GPU's.
EAGER_CALLS = 10


def layer_config(shape: Shape) -> UltraMemConfig:
    if shape == SMOKE:  # whose window is the whole table
        shape = dataclasses.replace(shape, num_slots=shape.num_keys**2)
    names = (
        *("d_model", "num_keys", "key_dim", "value_dim", "pre_value_dim", "num_heads"),
        *("tucker_rank", "num_cores", "topk", "axis_topk", "num_slots"),
    )
    return UltraMemConfig(num_layers=1, **{name: getattr(shape, name) for name in names})


def layer_measures(settings: Settings, shape: Shape, wrong: list[str]) -> Iterator[Row | Quantity]:
    """UltraMemLayer with a deferred table as a CUDA graph and eager, and its memory."""
    torch.manual_seed(settings.seed)
    config, inputs = layer_config(shape), settings.inputs()
    options: dict[str, Any] = {"dtype": DTYPE, "device": settings.device}
    layer = UltraMemLayer(config, 0, **options)
    table = MemoryTable.from_config(config, grad_mode="deferred", **options)
    table.reserve(EAGER_CALLS * shape.num_tokens)
    factors = factors_of(table)
    x = inputs.normal(shape.num_tokens, shape.d_model).requires_grad_()
    grad = inputs.normal(shape.num_tokens, shape.d_model)
    leaves = (x, *layer.parameters())

    def forward() -> None:
        with torch.no_grad():
            layer(x, table)

    def forward_backward() -> None:
        torch.autograd.grad(layer(x, table), leaves, grad)

    calls = {FWD_BWD: forward_backward, FWD: forward}
    repeated = {
        what: Candidate(partial(_repeat, call, EAGER_CALLS), factors.clear)
        for what, call in calls.items()
    }
    # Before any capture: after one, eager backwards wait for the GPU.
    eager_timings = settings.times(repeated, EAGER_CALLS)
    memory = []
    if settings.device.type == "cuda":
        memory = _activation_memory(shape, layer, table, leaves, grad)
    graphs = {
        what: dataclasses.replace(graph, reset=factors.clear)
        for what, graph in graph_candidates({w: [call] for w, call in calls.items()}).items()
    }
    factors.clear()
    if FWD_BWD in graphs:
        graphs[FWD_BWD].run()
        if factors.num_tokens != shape.num_tokens:
            wrong.append(f"layer, {shape.name}: a replay appends {factors.num_tokens} tokens")
        factors.clear()
    graph_timings = settings.times(graphs)
    for what in calls:
        found = {"ours": graph_timings[what]} if what in graph_timings else {}
        found |= {"eager": eager_timings[what]} if what in eager_timings else {}
        target = (
            FORWARD_BACKWARD_US.get(shape.name) if is_standard(shape) and what == FWD_BWD else None
        )
        note = f"graph; eager: {EAGER_CALLS} calls on end"
        yield Row(shape.name, what, found, ("eager",), target, note=note)
    yield from memory
    factor_bytes = shape.num_tokens * factors.bytes_per_token
    yield Quantity(shape.name, "factors of a layer's tokens", factor_bytes / 1e6, "MB")


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _activation_memory(
    shape: Shape,
    layer: UltraMemLayer,
    table: MemoryTable,
    leaves: Sequence[Tensor],
    grad: Tensor,
) -> list[Quantity]:
    """Peak of torch's allocator over a forward and backward, less what was there before.

    Without y and the parameters' gradients. These come one by one: each counts until it is whole,
    and so does that of x throughout. The bound leaves all gradients in.
    """
    parameters = leaves[1:]

    def step() -> tuple[int, int, int]:
        factors_of(table).clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = layer(leaves[0], table)
        forward = torch.cuda.max_memory_allocated() - before - y.nbytes
        torch.cuda.reset_peak_memory_stats()
        backward = bound = whole = 0

        def look(gradient: Tensor | None = None) -> None:
            nonlocal backward, bound, whole
            peak = torch.cuda.max_memory_allocated() - before - y.nbytes
            backward, bound = max(backward, peak - whole), max(bound, peak)
            whole += 0 if gradient is None else gradient.nbytes
            torch.cuda.reset_peak_memory_stats()

        hooks = [parameter.register_hook(look) for parameter in parameters]
        gradients = torch.autograd.grad(y, leaves, grad)
        look()
        for hook in hooks:
            hook.remove()
        del gradients
        return forward, backward, bound

    step()  # what is allocated once and kept is no part of it
    gc.collect()
    forward, backward, bound = step()
    factors_of(table).clear()
    target = ACTIVATION_MB.get(shape.name) if is_standard(shape) else None
    note = f"forward {forward / 1e6:.1f}, backward {backward / 1e6:.1f}"
    what = "activations, peak"
    return [
        Quantity(shape.name, what, max(forward, backward) / 1e6, "MB", target, note),
        Quantity(shape.name, f"{what}, with gradients", max(forward, bound) / 1e6, "MB"),
    ]
