"""Parameter groups and the learning rate of the table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from module_cases import small_config, tokens
from torch import nn

import ultramem_cuda as um


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = small_config()
        self.inputs = nn.Linear(24, 24)
        self.outputs = nn.Linear(24, 24)
        self.outputs.weight = self.inputs.weight
        self.table = um.MemoryTable.from_config(config)
        self.memory = um.UltraMemLayer(config, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inputs(x)
        return self.outputs(x + self.memory(x, self.table))


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf])
def test_learning_rates_are_checked(lr: float) -> None:
    with pytest.raises(ValueError, match="lr: must be finite and not negative"):
        um.optim.param_groups(Model(), lr)
    with pytest.raises(ValueError, match="step: must not be negative"):
        um.optim.value_lr_factor(-10, times=4, max_steps=100)


def test_layers_without_their_table_are_pointed_out() -> None:
    with pytest.warns(UserWarning, match="holds no MemoryTable"):
        um.optim.param_groups(Model().memory, 1e-3)


def test_groups_partition_the_parameters() -> None:
    model = Model()
    model.outputs.bias.requires_grad_(False)
    groups = um.optim.param_groups(model, 1e-3, 4.0, weight_decay=0.1, value_weight_decay=0.01)
    by_name = {group["name"]: group for group in groups}
    identities = [id(p) for group in groups for p in group["params"]]
    assert len(identities) == len(set(identities))
    assert set(identities) == {id(p) for p in model.parameters() if p.requires_grad}
    memory = by_name["memory"]
    assert {id(p) for p in memory["params"]} == {id(p) for p in model.table.parameters()}
    assert (memory["lr"], memory["weight_decay"]) == (4e-3, 0.01)
    vectors = by_name["network_no_decay"]
    assert (vectors["lr"], vectors["weight_decay"]) == (1e-3, 0.0)
    assert {id(p) for p in vectors["params"]} == {
        id(p) for p in (model.inputs.bias, model.memory.query_norm, model.memory.key_norm)
    }
    assert (by_name["network"]["lr"], by_name["network"]["weight_decay"]) == (1e-3, 0.1)


def test_models_without_tables_have_no_memory_group() -> None:
    groups = um.optim.param_groups(nn.Linear(3, 3, bias=False), 1e-3)
    assert [group["name"] for group in groups] == ["network"]


def test_adamw_with_schedule() -> None:
    torch.manual_seed(0)
    model = Model()
    max_steps, rate = 10, 0.5
    optimizer = torch.optim.AdamW(um.optim.param_groups(model, 1e-2, 4.0))

    def schedule(step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * step / max_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        um.optim.lr_lambdas(optimizer.param_groups, schedule, max_steps=max_steps, rate=rate),
    )
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(max_steps):
        for group in optimizer.param_groups:
            factor = 1.0
            if group["name"] == "memory":
                factor = 1.0 + 3.0 * max(0.0, 1.0 - step / (max_steps * rate))
            assert group["lr"] == pytest.approx(1e-2 * schedule(step) * factor)
        optimizer.zero_grad()
        model(tokens(6, 24)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.parametrize(
    ("step", "rate", "expected"),
    [(0, 1.0, 4.0), (50, 1.0, 2.5), (100, 1.0, 1.0), (150, 1.0, 1.0), (25, 0.5, 2.5)],
)
def test_value_lr_factor(step: int, rate: float, expected: float) -> None:
    factor = um.optim.value_lr_factor(step, times=4.0, max_steps=100, rate=rate)
    assert factor == pytest.approx(expected)


def test_constant_multiplier_of_one() -> None:
    assert um.optim.value_lr_factor(3, times=1.0, max_steps=10) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": 0.0}, r"times: must be positive, got 0\.0"),
        ({"max_steps": 0}, r"max_steps: must be at least 1, got 0"),
        ({"rate": 0.0}, r"rate: must be positive, got 0\.0"),
    ],
)
def test_bad_factor_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        um.optim.value_lr_factor(0, **{"times": 4.0, "max_steps": 10, **arguments})
    with pytest.raises(ValueError, match="value_lr_multiplier: must be positive, got -1"):
        um.optim.param_groups(nn.Linear(2, 2), 1e-3, -1.0)
