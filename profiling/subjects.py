"""The layers that are profiled, made runnable: many of one kind, so that none finds its own weights
in a cache, each with its forward and its training pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_cuda import MemoryTable, UltraMemConfig, UltraMemLayer, ffn_with_memory
from ultramem_cuda.stats import SlotUsage

from .compilation import compile_static, resolve_compiled
from .moe_dispatch import DroplessMoE

__all__ = [
    "FFNWithMemory",
    "Runnable",
    "SwiGLUFFN",
    "make_block",
    "make_ffn",
    "make_memory",
    "make_moe",
]


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class SwiGLUFFN(nn.Module):
    """down(silu(gate x) * up x), x [..., D].

    Parameters: ``gate_up`` [2I, D], the gate's rows first; ``down`` [D, I].

    Args:
        d_model: D.
        inner: I.
        compiled: one kernel for what lies between the products; by default on CUDA where triton is
            installed.
    """

    def __init__(
        self,
        d_model: int,
        inner: int,
        *,
        compiled: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.gate_up = nn.Parameter(torch.empty(2 * inner, d_model, **options))
        self.down = nn.Parameter(torch.empty(d_model, inner, **options))
        self.compiled = resolve_compiled(compiled, self.down.device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both parameters from N(0, 1/fan_in)."""
        for parameter in self.parameters():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        run = compile_static(_swiglu) if self.compiled else _swiglu
        return run(x, self.gate_up, self.down)


class FFNWithMemory(nn.Module):
    """A dense FFN and the memory layer beside it: what a block adds to its residual stream."""

    def __init__(self, ffn: SwiGLUFFN, memory: UltraMemLayer) -> None:
        super().__init__()
        self.ffn = ffn
        self.memory = memory

    def forward(self, x: Tensor, table: MemoryTable) -> Tensor:
        return ffn_with_memory(self.ffn, self.memory, x, table)


@dataclass
class Runnable:
    """Layers of one kind, each with weights of its own; those with a memory share a table.

    x and grad_output are [T, D]. Layers are numbered from 0.
    """

    name: str
    layers: nn.ModuleList
    table: MemoryTable | None = None
    """With deferred gradients; None where no layer has a memory."""

    def start_decode(self) -> None:
        """Has :meth:`forward` follow: memory layers keep what their eval mode caches. Gradients are
        freed."""
        self.layers.eval()
        self.layers.zero_grad(set_to_none=True)
        self.clear()

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """A pass without gradients."""
        with torch.no_grad():
            return self._call(layer, x)

    def start_training(self, tokens: int) -> None:
        """Has :meth:`train` follow: allocates the gradients of the layers' parameters, zero, and
        room for the factors of ``tokens`` tokens, the sum over all passes between two
        :meth:`clear`. A CUDA graph that is captured afterwards allocates neither; the room cannot
        grow any more then, so start with the largest number."""
        self.layers.train()
        for parameter in self.layers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if self.table is not None:
            self.table.reserve(tokens)

    def train(self, layer: int, x: Tensor, grad_output: Tensor) -> None:
        """A forward and a backward pass, down to the gradient of x.

        Those of the layer's parameters are added to their ``.grad``, those of the table are
        appended to its factors.
        """
        leaf = x.detach().requires_grad_()
        self._call(layer, leaf).backward(grad_output)

    def clear(self) -> None:
        """Drops the factors that training passes left, which would else grow from pass to pass."""
        if self.table is not None and self.table.factors is not None:
            self.table.factors.clear()

    def touched(self, layer: int, x: Tensor) -> int:
        """Distinct experts, or rows of the table, that the tokens of x use; 0 for a dense layer.

        Routes or retrieves, no more, and waits for the device.
        """
        module = self.layers[layer]
        if isinstance(module, DroplessMoE):
            return int(module.distinct_experts(x))
        memory = module.memory if isinstance(module, FFNWithMemory) else module
        if not isinstance(memory, UltraMemLayer):
            return 0
        usage = SlotUsage(memory.addressing, memory.keys.device)
        with torch.no_grad():
            usage.update(memory.retrieve(x)[1])
        return int(usage.counts.count_nonzero())

    def _call(self, layer: int, x: Tensor) -> Tensor:
        return self.layers[layer](x) if self.table is None else self.layers[layer](x, self.table)


def make_ffn(
    d_model: int,
    inner: int,
    *,
    layers: int,
    name: str = "ffn",
    compiled: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Runnable:
    """``layers`` dense FFNs."""
    options: dict[str, Any] = {"compiled": compiled, "dtype": dtype, "device": device}
    return Runnable(name, _stack(layers, lambda _: SwiGLUFFN(d_model, inner, **options)))


def make_moe(
    d_model: int,
    inner: int,
    num_experts: int,
    experts_per_token: int,
    *,
    layers: int,
    name: str = "moe",
    compiled: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Runnable:
    """``layers`` mixtures of experts."""
    sizes = (d_model, inner, num_experts, experts_per_token)
    options: dict[str, Any] = {"compiled": compiled, "dtype": dtype, "device": device}
    return Runnable(name, _stack(layers, lambda _: DroplessMoE(*sizes, **options)))


def make_memory(
    config: UltraMemConfig,
    *,
    layers: int,
    name: str = "memory",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Runnable:
    """The first ``layers`` memory layers of a model and its table, each with the window that its
    index gives it. With ``mode="additive"`` and no pre-values they are PKM layers.

    Raises:
        ValueError: more layers than the configuration has.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    _check_layers(config, layers)
    memories = _stack(layers, lambda index: UltraMemLayer(config, index, **options))
    return Runnable(name, memories, _table(config, options))


def make_block(
    config: UltraMemConfig,
    ffn_inner: int,
    *,
    layers: int,
    name: str = "block",
    compiled: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Runnable:
    """As :func:`make_memory`, each layer beside a dense FFN of inner width ``ffn_inner``."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    _check_layers(config, layers)

    def block(index: int) -> nn.Module:
        ffn = SwiGLUFFN(config.d_model, ffn_inner, compiled=compiled, **options)
        return FFNWithMemory(ffn, UltraMemLayer(config, index, **options))

    return Runnable(name, _stack(layers, block), _table(config, options))


def _stack(layers: int, make: Callable[[int], nn.Module]) -> nn.ModuleList:
    if layers < 1:
        raise ValueError(f"layers: must be at least 1, got {layers}")
    return nn.ModuleList(make(index) for index in range(layers))


def _check_layers(config: UltraMemConfig, layers: int) -> None:
    if layers > config.num_layers:
        raise ValueError(
            f"layers: must be at most config.num_layers = {config.num_layers}, got {layers}"
        )


def _table(config: UltraMemConfig, options: dict[str, Any]) -> MemoryTable:
    """On its device from the start: drawn there, and never a second time on the host."""
    return MemoryTable.from_config(config, grad_mode="deferred", **options)
