"""Small configurations and the layer's parameters as the NumPy reference takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import ultramem_cuda as um
from ultramem_cuda import python_ref as ref

BASE: dict[str, Any] = {
    "d_model": 24,
    "num_layers": 3,
    "num_keys": 12,
    "key_dim": 6,
    "num_slots": 250,
    "value_dim": 8,
    "pre_value_dim": 5,
    "topk": 7,
    "axis_topk": 5,
    "seed": 3,
}
PKM: dict[str, Any] = {
    "mode": "additive",
    "tucker_rank": 1,
    "num_cores": 1,
    "pre_value_dim": 0,
    "axis_topk": 7,
    "num_heads": 2,
}


def small_config(**overrides: Any) -> um.UltraMemConfig:
    return um.UltraMemConfig(**{**BASE, **overrides})


def layer_and_table(
    dtype: torch.dtype = torch.float32, layer_index: int = 1, **overrides: Any
) -> tuple[um.UltraMemLayer, um.MemoryTable]:
    """A layer and its table, with parameters large enough for every gradient to matter."""
    config = small_config(**overrides)
    generator = torch.Generator().manual_seed(17)
    table = um.MemoryTable.from_config(config, dtype=dtype)
    layer = um.UltraMemLayer(config, layer_index, dtype=dtype)
    with torch.no_grad():
        for parameter in [*layer.parameters(), *table.parameters()]:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.7 * noise + (1.0 if parameter.dim() == 1 else 0.0))
    return layer, table


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def reference_parameters(layer: um.UltraMemLayer, table: um.MemoryTable) -> ref.LayerParams:
    def optional(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else to_numpy(tensor)

    return ref.LayerParams(
        query_proj=to_numpy(layer.query_proj.weight),
        query_norm=to_numpy(layer.query_norm),
        keys=to_numpy(layer.keys),
        key_norm=to_numpy(layer.key_norm),
        cores=optional(layer.cores),
        value_proj=to_numpy(layer.value_proj.weight),
        values=to_numpy(table.values),
        pre_proj=None if layer.pre_proj is None else to_numpy(layer.pre_proj.weight),
        pre_values=optional(table.pre_values),
    )


def reference_config(layer: um.UltraMemLayer) -> ref.LayerConfig:
    config, addressing = layer.config, layer.addressing
    shuffle = addressing.shuffle
    return ref.LayerConfig(
        topk=config.topk,
        axis_topk=config.kept_per_axis,
        num_heads=config.num_heads,
        mode=config.mode,
        activation=config.activation,
        addressing=ref.SlotAddressing(
            addressing.num_slots,
            addressing.window,
            addressing.offset,
            addressing.expand,
            shuffle.numpy() if isinstance(shuffle, torch.Tensor) else shuffle,
            addressing.seed,
        ),
        sum_groups=config.sum_groups,
        eps=config.eps,
    )
