"""A user's program, which test_packaging.py checks with mypy and runs, on the installed wheel.

Checked strictly: mypy calls the ignored errors unused where it finds no types.
"""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import assert_type

import ultramem_cuda as um
from ultramem_cuda import ops, optim


class Block(torch.nn.Module):
    def __init__(self, config: um.UltraMemConfig, layer_index: int) -> None:
        super().__init__()
        self.memory = um.UltraMemLayer(config, layer_index=layer_index)
        self.ffn = torch.nn.Linear(config.d_model, config.d_model)

    def forward(self, x: torch.Tensor, table: um.MemoryTable) -> torch.Tensor:
        return x + um.ffn_with_memory(self.ffn, self.memory, x, table)


def train() -> None:
    config = um.UltraMemConfig(
        d_model=16,
        num_layers=2,
        num_keys=8,
        key_dim=8,
        tucker_rank=2,
        num_cores=1,
        topk=4,
        pre_value_dim=8,
        value_dim=8,
        num_slots=64,
    )
    table = um.MemoryTable.from_config(config)
    assert_type(table, um.MemoryTable)
    assert_type(table.values, torch.nn.Parameter)
    blocks = torch.nn.ModuleList(Block(config, index) for index in range(config.num_layers))
    model = torch.nn.ModuleList([table, blocks])
    groups = optim.param_groups(model, lr=1e-3)
    assert_type(groups, list[dict[str, Any]])
    optimizer = torch.optim.AdamW(groups)
    x = torch.randn(5, config.d_model)
    for block in blocks:
        x = block(x, table)
    torch.autograd.backward(x.square().mean())
    before = table.values.detach().clone()
    optimizer.step()
    assert not torch.equal(before, table.values)


def operate() -> None:
    x, weight, norm_weight = torch.randn(5, 16), torch.randn(2 * 2 * 8, 16), torch.ones(8)
    keys, core = torch.randn(1, 2, 2, 8, 8), torch.rand(1, 1, 2, 2)
    query = ops.tucker_query(x, weight, norm_weight)
    assert_type(query, torch.Tensor)
    scores, indices = ops.product_key_topk(query, keys, core, topk=4)
    assert_type(scores, torch.Tensor)
    indices, scores = indices.flatten(1), scores.flatten(1, 2)
    values, pre_values = torch.randn(64, 8), torch.randn(64, 8)
    out = ops.value_ffn(indices, scores, values, pre_values, torch.randn(5, 8), activation="gelu")
    assert_type(out, torch.Tensor)
    assert_type(ops.rms_norm(out, torch.ones(8)), torch.Tensor)
    assert out.shape == (5, 8)


def refused() -> None:
    um.UltraMemConfig(d_model="16")  # type: ignore[arg-type, call-arg]
    ops.rms_norm([1.0], None)  # type: ignore[arg-type]
    um.no_such_name  # type: ignore[attr-defined]  # noqa: B018


if __name__ == "__main__":
    train()
    operate()
