"""MemoryTable: construction, initialisation, its place in a model."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from module_cases import layer_and_table, small_config, tokens
from torch import nn

import ultramem_cuda as um


class TwoLayerModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = small_config()
        self.table = um.MemoryTable.from_config(config)
        self.memory = nn.ModuleList(um.UltraMemLayer(config, i) for i in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.memory:
            x = x + layer(x, self.table)
        return x


def test_shapes_dtype_and_spread() -> None:
    table = um.MemoryTable(3000, 8, 5, dtype=torch.bfloat16, init_std=0.05)
    assert table.values.shape == (3000, 8)
    assert table.pre_values is not None
    assert table.pre_values.shape == (3000, 5)
    for parameter in table.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.float().std().item() == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize("pre_value_dim", [None, 0])
def test_without_pre_values(pre_value_dim: int | None) -> None:
    table = um.MemoryTable(30, 8, pre_value_dim)
    assert table.pre_values is None
    assert list(table.state_dict()) == ["values"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_slots": 4.0}, TypeError, r"num_slots: must be an int, got 4\.0"),
        ({"num_slots": "4"}, TypeError, r"num_slots: must be an int, got '4'"),
        ({"num_slots": True}, TypeError, r"num_slots: must be an int, got True"),
        ({"value_dim": None}, TypeError, r"value_dim: must be an int, got None"),
        ({"pre_value_dim": 0.0}, TypeError, r"pre_value_dim: must be an int or None, got 0\.0"),
        ({"init_std": "1"}, TypeError, r"init_std: must be a number, got '1'"),
        ({"init_std": -1.0}, ValueError, r"init_std: must be finite and not negative, got -1\.0"),
        ({"dtype": "half"}, TypeError, r"dtype: must be a torch\.dtype or None, got 'half'"),
        ({"num_slots": 0}, ValueError, r"num_slots: must be at least 1, got 0"),
        ({"value_dim": -3}, ValueError, r"value_dim: must be at least 1, got -3"),
        ({"pre_value_dim": -1}, ValueError, r"pre_value_dim: must be at least 0, got -1"),
        ({"dtype": torch.int8}, ValueError, r"dtype: must be a floating-point type, got"),
        (
            {"grad_mode": "sparse"},
            ValueError,
            r"grad_mode: must be 'dense' or 'deferred', got 'sparse'",
        ),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        um.MemoryTable(**{"num_slots": 4, "value_dim": 2, **arguments})


def test_more_than_two_to_the_31_elements_on_meta() -> None:
    config = um.UltraMemConfig.preset("2.5B-120B")
    table = um.MemoryTable.from_config(config, dtype=torch.bfloat16, device="meta")
    assert table.values.is_meta
    assert table.values.numel() > 2**31
    assert sum(p.numel() for p in table.parameters()) == config.table_parameters()


def test_appears_once_in_a_model() -> None:
    model = TwoLayerModel()
    rows = [name for name, tensor in model.state_dict().items() if tensor.shape[0] == 250]
    assert rows == ["table.values", "table.pre_values"]
    assert len(list(model.memory.parameters())) == 2 * 7
    assert not any(isinstance(m, um.MemoryTable) for m in model.memory.modules())


def test_gradients_of_sharing_layers_add_up() -> None:
    model, x = TwoLayerModel().double(), tokens(6, 24, dtype=torch.float64)
    outputs = [layer(x, model.table) for layer in model.memory]
    separate = [
        torch.autograd.grad(y.square().sum(), model.table.values, retain_graph=True)[0]
        for y in outputs
    ]
    torch.autograd.backward([y.square().sum() for y in outputs])
    torch.testing.assert_close(model.table.values.grad, separate[0] + separate[1])
    assert separate[0].abs().sum() > 0
    assert separate[1].abs().sum() > 0


def test_state_dict_round_trip_and_copies() -> None:
    model, other, x = TwoLayerModel(), TwoLayerModel(), tokens(6, 24)
    assert not torch.equal(model(x), other(x))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(model(x), other(x))
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), twin(x))
    with torch.no_grad():
        twin.table.values.mul_(2.0)
    assert not torch.equal(model(x), twin(x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_slots": 251}, r"table: num_slots must be 250.*got 251"),
        ({"value_dim": 10}, r"table: value_dim must be 8.*got 10"),
        ({"pre_value_dim": 0}, r"table: pre_value_dim must be 5.*got 0"),
    ],
)
def test_a_table_of_another_config_is_refused(overrides: dict[str, int], message: str) -> None:
    layer, _ = layer_and_table()
    with pytest.raises(ValueError, match=message):
        layer(tokens(2, 24), um.MemoryTable.from_config(small_config(**overrides)))


def test_main_grad_is_accumulated_into() -> None:
    layer, table = layer_and_table()
    x = tokens(6, 24)
    layer(x, table).square().sum().backward()
    dense = [p.grad.clone() for p in table.parameters() if p.grad is not None]
    for parameter in table.parameters():
        parameter.grad = None
        parameter.main_grad = torch.full_like(parameter, 0.5)  # type: ignore[attr-defined]
    layer(x, table).square().sum().backward()
    assert len(dense) == 2
    for parameter, expected in zip(table.parameters(), dense, strict=True):
        assert parameter.grad is None
        torch.testing.assert_close(parameter.main_grad, expected + 0.5)
