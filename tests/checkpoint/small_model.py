"""A model with memory layers on one table, small enough for many checkpoints of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ultramem_cuda as um

CONFIG = um.UltraMemConfig(
    d_model=16,
    num_layers=2,
    num_keys=12,
    key_dim=4,
    num_slots=250,
    value_dim=8,
    pre_value_dim=4,
    topk=6,
    seed=3,
)


class Model(nn.Module):
    def __init__(self, grad_mode: str = "dense", config: um.UltraMemConfig = CONFIG) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, config.d_model)
        self.table = um.MemoryTable.from_config(config, grad_mode=grad_mode)
        self.layers = nn.ModuleList(
            um.UltraMemLayer(config, index) for index in range(config.num_layers)
        )
        self.head = nn.Linear(config.d_model, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x, self.table)
        return self.head(x)


def make_model(seed: int = 0, **arguments: Any) -> Model:
    torch.manual_seed(seed)
    return Model(**arguments)


def make_optimizers(
    model: Model, table_optimizer: type[um.optim.memory.MemoryOptimizer] = um.optim.MemoryAdam
) -> list[torch.optim.Optimizer]:
    """AdamW for the network, one of this package for the table."""
    network = [p for name, p in model.named_parameters() if not name.startswith("table.")]
    return [
        torch.optim.AdamW(network, lr=1e-2),
        table_optimizer(model.table.parameters(), lr=1e-2, weight_decay=0.1),
    ]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 2) -> list[float]:
    losses = []
    for step in range(steps):
        ids = torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(step))
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "device_mesh") else tensor


def same_tensors(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return mine.keys() == theirs.keys() and all(
        torch.equal(whole(mine[name]), whole(theirs[name])) for name in mine
    )


def same_states(mine: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> bool:
    """Options and states of two optimizers are bit-equal."""
    a, b = mine.state_dict(), theirs.state_dict()
    return (
        a["param_groups"] == b["param_groups"]
        and a["state"].keys() == b["state"].keys()
        and all(same_tensors(a["state"][n], b["state"][n]) for n in a["state"])
    )
