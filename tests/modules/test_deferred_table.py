"""MemoryTable(grad_mode="deferred") in a model: checkpointing, compile, copies, optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_cases import small_config, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ultramem_cuda as um
from ultramem_cuda.table import table_of


class Model(nn.Module):
    def __init__(self, grad_mode: str, **overrides: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = small_config(**overrides)
        self.table = um.MemoryTable.from_config(config, grad_mode=grad_mode)
        self.memory = nn.ModuleList(um.UltraMemLayer(config, i) for i in range(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.memory:
            x = x + layer(x, self.table)
        return x


def pair(**options: Any) -> tuple[Model, Model]:
    """Two models of the same parameters, deferred and dense."""
    deferred, dense = Model("deferred", **options), Model("dense", **options)
    dense.load_state_dict(deferred.state_dict())
    return deferred, dense


def assert_same_gradients(deferred: Model, dense: Model) -> None:
    assert deferred.table.factors is not None
    grads = dict(zip(("values", "pre_values"), deferred.table.factors.to_dense(), strict=True))
    for name, parameter in dense.named_parameters():
        mine = deferred.get_parameter(name)
        if name.startswith("table."):
            assert mine.grad is None
            wanted = grads[name.removeprefix("table.")]
        else:
            wanted = mine.grad
        assert wanted is not None
        assert parameter.grad is not None
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(wanted, parameter.grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"activation": "gelu"},
        {"pre_value_dim": 0},
        {"num_heads": 2},
        {"key_expand": 2, "sum_groups": False},
    ],
    ids=str,
)
def test_gradients_are_the_dense_ones(overrides: dict[str, Any]) -> None:
    deferred, dense = pair(**overrides)
    for seed in (1, 2):
        x = tokens(7, 24, seed=seed)
        for model in (deferred, dense):
            model(x).square().mean().backward()
    assert deferred.table.factors.num_tokens == 2 * 3 * 7
    assert_same_gradients(deferred, dense)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(use_reentrant: bool) -> None:
    deferred, dense = pair()
    x = tokens(7, 24).requires_grad_()
    y = x
    for layer in deferred.memory:
        y = y + checkpoint(layer, y, deferred.table, use_reentrant=use_reentrant)
    y.square().mean().backward()
    dense(x).square().mean().backward()
    assert deferred.table.factors.num_tokens == 3 * 7
    assert_same_gradients(deferred, dense)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_without_a_graph_break(checkpointed: bool) -> None:
    torch._dynamo.reset()
    deferred, dense = pair()
    deferred.table.reserve(3 * 3 * 7)

    def forward(x: Tensor) -> Tensor:
        for layer in deferred.memory:
            if checkpointed:
                x = x + checkpoint(layer, x, deferred.table, use_reentrant=False)
            else:
                x = x + layer(x, deferred.table)
        return x

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3):
        x = tokens(7, 24, seed=seed)
        compiled(x).square().mean().backward()
        dense(x).square().mean().backward()
    deferred.table.factors.check()
    assert deferred.table.factors.num_tokens == 3 * 3 * 7
    assert_same_gradients(deferred, dense)


def test_autocast() -> None:
    deferred, dense = pair()
    x = tokens(7, 24)
    for model in (deferred, dense):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
    assert deferred.table.factors.shape.dtype == torch.bfloat16
    assert_same_gradients(deferred, dense)


def test_zero_grad_clears() -> None:
    model = Model("deferred")
    model(tokens(7, 24)).sum().backward()
    model.zero_grad()
    assert model.table.factors.num_tokens == 21, "a module's zero_grad does not reach the table's"
    model.table.zero_grad(set_to_none=False)
    assert model.table.factors.num_tokens == 0


def test_reserve_knows_the_config() -> None:
    config = small_config(key_expand=2, sum_groups=False, num_heads=2)
    table = um.MemoryTable.from_config(config, grad_mode="deferred")
    table.reserve(1000)
    assert table.factors.shape == um.factors.FactorShape(14, 2, 4, torch.float32)
    assert table.factors.capacity == 1024
    other = um.MemoryTable(config.num_slots, 8, 5, grad_mode="deferred", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="reserve: no backward has said"):
        other.reserve(1000)
    other.reserve(300, config, dtype=torch.float16)
    assert other.factors.shape == um.factors.FactorShape(14, 2, 4, torch.float16)
    other.reserve(700)
    assert other.factors.capacity == 768
    with pytest.raises(ValueError, match="factors are those of S = 14"):
        other.reserve(300, config, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="reserve: the table's grad_mode must be 'deferred'"):
        um.MemoryTable.from_config(config).reserve(5)


def test_parameters_know_their_table() -> None:
    model = Model("deferred")
    assert all(table_of(p) is model.table for p in model.table.parameters())
    assert table_of(model.memory[0].keys) is None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.bfloat16)):
        assert all(table_of(p) is twin.table for p in twin.table.parameters())
    model.table.values = nn.Parameter(torch.zeros(250, 8))
    assert table_of(model.table.values) is model.table
    state = {name: nn.Parameter(p) for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert table_of(model.table.values) is model.table
    assert model.table.values is state["table.values"]
    shallow = copy.copy(model.table)
    assert table_of(shallow.values) is model.table
    parameters = list(model.table.parameters())
    del shallow, model, twin
    assert all(table_of(p) is None for p in parameters), "a parameter keeps no table alive"


def test_parameters_alone_can_be_saved() -> None:
    table = Model("deferred").table
    buffer = io.BytesIO()
    torch.save(list(table.parameters()), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded[0], table.values)
    assert table_of(loaded[0]) is None


def test_state_dict_is_that_of_a_dense_table() -> None:
    deferred, dense = pair()
    deferred(tokens(7, 24)).sum().backward()
    names = [name for name in deferred.state_dict() if name != "table.scale"]
    assert names == list(dense.state_dict())
    dense.load_state_dict(deferred.state_dict())
    x = tokens(7, 24)
    assert torch.equal(dense(x), deferred(x))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_factors_of_their_own(how: Callable[[Model], Model]) -> None:
    model = Model("deferred")
    model(tokens(7, 24)).sum().backward()
    twin = how(model)
    assert twin.table.grad_mode == "deferred"
    assert twin.table.factors.num_tokens == 0
    twin(tokens(5, 24)).sum().backward()
    assert (model.table.factors.num_tokens, twin.table.factors.num_tokens) == (21, 15)


def test_moves() -> None:
    model = Model("deferred")
    model(tokens(7, 24)).sum().backward()
    model.to("cpu")
    assert model.table.factors.num_tokens == 21, "nothing moved"
    model.double()
    assert model.table.factors.num_tokens == 0
    assert model.table.factors.dtype == torch.float64
    model(tokens(7, 24, dtype=torch.float64)).sum().backward()
    assert model.table.factors.to_dense()[0].dtype == torch.float64
    assert model.to("meta").table.factors.device.type == "meta"


# ---- optimizers ------------------------------------------------------------------------------


def test_an_optimizer_that_would_skip_the_table_raises() -> None:
    model = Model("deferred")
    model(tokens(7, 24)).square().mean().backward()
    before = model.memory[0].keys.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"SGD would skip .* grad_mode='deferred'"):
        optimizer.step()
    assert torch.equal(model.memory[0].keys, before)


def test_other_optimizers_step() -> None:
    class Knowing(torch.optim.SGD):
        handles_deferred = True

    deferred, dense = pair()
    x = tokens(7, 24)
    for model in (deferred, dense):
        model(x).square().mean().backward()
    torch.optim.SGD(dense.parameters(), lr=0.1).step()
    torch.optim.SGD(deferred.memory.parameters(), lr=0.1).step()
    Knowing(deferred.table.parameters(), lr=0.1).step()
    # A frozen table is left out by right.
    deferred.table.requires_grad_(False)
    torch.optim.SGD(deferred.parameters(), lr=0.1).step()


def test_training_through_to_sparse() -> None:
    """What the documentation offers to optimizers that take sparse gradients."""
    deferred, dense = pair()
    x = tokens(7, 24)
    table = deferred.table
    shadow = [p.detach().requires_grad_() for p in table.parameters()]
    sparse_adam = torch.optim.SparseAdam(shadow, lr=0.1)
    optimizer = torch.optim.Adam(dense.table.parameters(), lr=0.1)
    for model in (deferred, dense):
        model(x).square().mean().backward()
    for parameter, grad in zip(shadow, table.factors.to_sparse(), strict=True):
        parameter.grad = grad
    sparse_adam.step()
    optimizer.step()
    for mine, theirs in zip(table.parameters(), dense.table.parameters(), strict=True):
        touched = theirs.grad.abs().sum(1) > 1e-4
        torch.testing.assert_close(mine[touched], theirs[touched], rtol=1e-3, atol=1e-3)
