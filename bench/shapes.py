"""The shapes that are measured, and the slots that their tokens retrieve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DISTRIBUTIONS", "SHAPES", "SMOKE", "Shape", "draw_slots"]

DISTRIBUTIONS = ("uniform", "zipf")


@dataclass(frozen=True)
class Shape:
    """One memory layer and a batch: the vocabulary of the operators, R = C = 2, Q = R, H = 1."""

    name: str
    num_tokens: int
    d_model: int
    num_keys: int
    key_dim: int
    axis_topk: int
    topk: int
    pre_value_dim: int
    value_dim: int
    num_slots: int
    tucker_rank: int = 2
    num_cores: int = 2
    num_heads: int = 1

    @property
    def window(self) -> int:
        """Rows that one layer reaches."""
        return min(self.num_keys**2, self.num_slots)

    @property
    def selected(self) -> int:
        """S, slots a token retrieves."""
        return self.num_heads * self.topk


SHAPES = {
    shape.name: shape
    for shape in (
        # One layer of the smallest published model, with the batch and table of a 2-core machine.
        Shape("cpu", 512, 768, 1138, 192, 32, 32, 192, 192, 200_000),
        # 227M/1.2B of the UltraMemV2 paper (table 10), share ratio 0.5.
        Shape("S", 8192, 768, 1138, 192, 32, 32, 192, 192, 2_592_000),
        # A wide value row.
        Shape("B", 8192, 2048, 1448, 512, 32, 32, 256, 768, 2_097_152),
        # 1B/7B of the paper: 528 keys a layer as published; four tables shared is assumed.
        Shape("M", 8192, 2048, 1056, 512, 128, 128, 384, 768, 4_460_544),
        # 2.5B/60B with 768 slots a token; the paper publishes no shape for it. N = n*n.
        Shape("L", 8192, 2560, 1928, 640, 128, 768, 320, 960, 3_717_184),
    )
}

SMOKE = Shape("smoke", 16, 32, 37, 16, 8, 8, 16, 24, 500)


def draw_slots(distribution: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """Independent draws from the layer's window, on the generator's device.

    "zipf": the k-th hottest slot is drawn with probability proportional to 1/k, and the hot slots
    lie anywhere in the window. A hot slot can come twice in one token, as it does when several
    virtual slots share a row.

    Returns:
        [T, S] int64.
    """
    size = (shape.num_tokens, shape.selected)
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    if distribution == "uniform":
        return torch.randint(shape.window, size, **options)
    if distribution == "zipf":
        ranks = torch.arange(1, shape.window + 1, dtype=torch.float64, device=generator.device)
        cumulative = (1.0 / ranks).cumsum(0)
        point = torch.rand(size, dtype=torch.float64, **options) * cumulative[-1]
        order = torch.searchsorted(cumulative, point).clamp_(max=shape.window - 1)
        return torch.randperm(shape.window, **options)[order]
    raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
