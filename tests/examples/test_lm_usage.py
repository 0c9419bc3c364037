"""Counting the experts and slots that a model uses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ultramem_cuda.examples.lm.config import KINDS, Kind, ModelConfig
from ultramem_cuda.examples.lm.model import ByteLM
from ultramem_cuda.examples.lm.usage import mean_distinct, sparse_choices

MODEL = ModelConfig(
    d_model=32,
    num_layers=2,
    attention_heads=2,
    context=16,
    ffn_inner=32,
    num_experts=8,
    experts_per_token=2,
    expert_inner=8,
    num_keys=16,
    key_dim=8,
    topk=4,
    pre_value_dim=8,
    value_dim=8,
)


@pytest.mark.parametrize("kind", KINDS)
def test_choices_of_every_token(kind: Kind) -> None:
    torch.manual_seed(0)
    model = ByteLM(dataclasses.replace(MODEL, kind=kind)).train()
    inputs = torch.randint(256, (6, 16))
    choices = sparse_choices(model, inputs, batch=4)
    assert model.training
    if kind == "dense":
        assert choices == []
        return
    per_token = 2 if kind == "moe" else 4
    assert [tuple(layer.shape) for layer in choices] == [(96, per_token)] * 2
    for number, layer in enumerate(choices):
        assert all(row.unique().numel() == per_token for row in layer)
        # Windows are private: the second layer's rows follow the first's.
        low, high = (0, 8) if kind == "moe" else (number * 256, (number + 1) * 256)
        assert low <= int(layer.min())
        assert int(layer.max()) < high
    # The same choices one window at a time.
    again = sparse_choices(model, inputs, batch=1)
    assert all(torch.equal(a, b) for a, b in zip(choices, again, strict=True))


def test_mean_distinct_counts() -> None:
    same = torch.zeros(50, 1, dtype=torch.int64)
    different = torch.arange(100).view(50, 2)
    assert mean_distinct([same], 20) == 1.0
    assert mean_distinct([different], 20) == 40.0
    assert mean_distinct([same, different[:, :1]], 20) == 10.5
    with pytest.raises(ValueError, match="at most the 50 tokens"):
        mean_distinct([same], 51)
