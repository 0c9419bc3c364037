"""Memory layers as the code published with UltraMemV2 has them: random state dicts with its names
and shapes, and its forward pass, written anew in plain torch from what its
``olmo/ultramem_layer_v2.py`` (and the fused lookups that it calls) computes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PREFIX = "transformer."
RANK = 2
CORES = 2


def options(**overrides: Any) -> dict[str, Any]:
    """Those of its configuration that a forward depends on, and some that it does not."""
    return {
        "d_model": 24,
        "n_layers": 3,
        "layer_norm_type": "rms",
        "layer_norm_eps": 1e-5,
        "rope": True,
        "mem_type": "ultramem_v2",
        "mem_insert_way": "full",
        "mem_knum": 12,
        "mem_kdim": 6,
        "mem_vdim": 8,
        "mem_pre_vdim": 10,
        "mem_knn": 7,
        "mem_head": 1,
        "mem_share_ratio": 0.5,
        "mem_key_expand_time": 1,
        "mem_value_expand_time": 1,
        "mem_q_for_each_tucker_rank": True,
        "mem_use_glu_act": False,
        "mem_log_interval": 50,
        **overrides,
    }


def shared_keys(o: dict[str, Any]) -> int:
    rows = o["n_layers"] * o["mem_knum"] ** 2
    return int((rows * o["mem_share_ratio"]) ** 0.5)


def state_dict(o: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of a whole model, of which the memory layers are a part.

    The filter's buffers are singular vectors of the cores' sum with a sign that alternates over
    layers and heads: both signs occur.
    """
    generator = torch.Generator().manual_seed(29)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    heads, width, num_keys = o["mem_head"], o["mem_kdim"], shared_keys(o)
    key_num = o["mem_key_expand_time"] * num_keys
    state = {
        PREFIX + "wte.weight": normal(50, o["d_model"]),
        PREFIX + "blocks.0.ff_proj.weight": normal(8, o["d_model"]),
    }
    for layer in range(o["n_layers"]):
        name = f"{PREFIX}mem_blocks.{layer}."
        state[name + "query_proj.weight"] = normal(2 * RANK * width, o["d_model"])
        state[name + "keys"] = normal(heads, 2, key_num, width, RANK)
        values_in = o["mem_vdim"] * o["mem_value_expand_time"]
        state[name + "values_proj.weight"] = normal(o["d_model"], values_in)
        if o["mem_pre_vdim"]:
            state[name + "pre_values_proj.weight"] = normal(o["mem_pre_vdim"], o["d_model"])
        for norm in ("query_norm", "keys_norm"):
            state[f"{name}{norm}.weight"] = 0.5 + normal(width, std=0.1)
        cores = []
        for core in range(CORES):
            uniform = torch.rand((heads, RANK, RANK), generator=generator, dtype=torch.float64)
            cores.append(uniform.to(dtype))
            state[f"{name}tucker_core.{core}"] = cores[-1]
        state[name + "shuffle_index"] = torch.randperm(key_num**2, generator=generator)
        u, _, v = torch.svd(torch.stack(cores).sum(0).double())
        sign = (-1.0) ** (layer + torch.arange(heads))
        state[name + "tucker_core_u"] = (u[..., 0] * sign[:, None]).to(dtype)[None, :, None]
        state[name + "tucker_core_v"] = (v[..., 0] * sign[:, None]).to(dtype)[None, :, None]
    table = PREFIX + "full_memory_layer."
    rows = o["n_layers"] * o["mem_knum"] ** 2
    state[table + "values_for_look_up"] = normal(rows, o["mem_vdim"])
    if o["mem_pre_vdim"]:
        state[table + "pre_values_for_look_up"] = normal(rows, o["mem_pre_vdim"])
    return state


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def forward(state: dict[str, Tensor], o: dict[str, Any], layer: int, x: Tensor) -> Tensor:
    """The output of one memory layer for x [tokens, D], as the published code makes it."""
    name = f"{PREFIX}mem_blocks.{layer}."

    def weight(suffix: str) -> Tensor:
        return state[name + suffix]

    tokens, eps, knn = x.shape[0], o["layer_norm_eps"], o["mem_knn"]
    heads, width = o["mem_head"], o["mem_kdim"]
    query = (x @ weight("query_proj.weight").T).view(tokens, 2, RANK, width)
    query = _rms_norm(query, weight("query_norm.weight"), eps).view(tokens, 2, RANK * width)
    # The norm runs over the width of a key, the last dimension but one.
    keys = _rms_norm(weight("keys").transpose(3, 4), weight("keys_norm.weight"), eps)
    keys = keys.transpose(3, 4)
    num_keys = keys.shape[2]

    half = query.shape[-1] // 2
    sides = []
    for side in range(2):
        per_head = []
        for head in range(heads):
            of_head = query[:, head // 2]  # two heads share a query
            of_side = of_head[:, :half] if side == 0 else of_head[:, half:]
            per_head.append(torch.einsum("bk,nkr->bnr", of_side, keys[head, side]))
        sides.append(torch.stack(per_head, 1))  # [tokens, heads, n, rank]
    row, column = sides
    row_best = (row * weight("tucker_core_u")).sum(-1).topk(knn, dim=2).indices
    column_best = (column * weight("tucker_core_v")).sum(-1).topk(knn, dim=2).indices
    row = row.gather(2, row_best[..., None].expand(-1, -1, -1, RANK))
    column = column.gather(2, column_best[..., None].expand(-1, -1, -1, RANK))

    grids = [
        (row @ weight(f"tucker_core.{core}") @ column.transpose(-1, -2)).flatten(2)
        for core in range(CORES)
    ]
    chosen = torch.stack(grids).sum(0).topk(knn, dim=2).indices
    pairs = (row_best[..., :, None] * num_keys + column_best[..., None, :]).flatten(2)
    index = pairs.gather(2, chosen).flatten(1)
    scores = torch.stack([grid.gather(2, chosen).flatten(1) for grid in grids], -1)

    index = weight("shuffle_index")[index]
    rows_seen = (num_keys // o["mem_key_expand_time"]) ** 2
    values = state[PREFIX + "full_memory_layer.values_for_look_up"]
    slot = (index % rows_seen + layer * o["mem_knum"] ** 2) % values.shape[0]
    group = index // rows_seen
    if o["mem_pre_vdim"]:
        pre_values = state[PREFIX + "full_memory_layer.pre_values_for_look_up"]
        pre_input = x @ weight("pre_values_proj.weight").T
        inner = torch.einsum("bd,bsd->bs", pre_input, pre_values[slot])
        scores = scores * (F.gelu(inner) if o["mem_use_glu_act"] else inner)[..., None]
    # The columns of a value are cut into one block for each core, with a score of its own.
    found = values[slot].view(tokens, -1, CORES, o["mem_vdim"] // CORES)
    found = (found * scores[..., None]).flatten(2)
    expand = o["mem_key_expand_time"] ** 2
    out = torch.zeros(tokens, expand, o["mem_vdim"], dtype=x.dtype)
    out.scatter_add_(1, group[..., None].expand(-1, -1, o["mem_vdim"]), found)
    out = out.sum(1) if o["mem_value_expand_time"] == 1 else out.flatten(1)
    return out @ weight("values_proj.weight").T


def tokens(o: dict[str, Any], count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(31)
    return torch.randn(count, o["d_model"], generator=generator) / math.sqrt(o["d_model"])
