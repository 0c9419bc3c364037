"""The scale of a table with deferred gradients: part of the state, and what it means for others."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from module_cases import small_config, tokens
from torch import Tensor, nn

import ultramem_cuda as um

SCALE = torch.tensor([0.3, 0.7], dtype=torch.float64)


def make(grad_mode: str, scaled: bool = True, **options: object) -> um.MemoryTable:
    torch.manual_seed(0)
    table = um.MemoryTable.from_config(small_config(), grad_mode=grad_mode, **options)
    if scaled and table.scale is not None:
        table.scale.copy_(SCALE)
    return table


def effective(table: um.MemoryTable) -> list[Tensor]:
    scale = [1.0, 1.0] if table.scale is None else table.scale.tolist()
    return [p.detach().double() * s for p, s in zip(table.parameters(), scale, strict=True)]


def assert_rounded(table: um.MemoryTable, wanted: list[Tensor]) -> None:
    for parameter, exact in zip(table.parameters(), wanted, strict=True):
        assert torch.equal(parameter, exact.to(parameter.dtype))


def test_a_dense_table_has_none() -> None:
    dense, deferred = make("dense"), make("deferred", scaled=False)
    assert dense.scale is None
    assert "scale" not in dense.state_dict()
    assert torch.equal(deferred.scale, torch.ones(2, dtype=torch.float64))
    assert list(deferred.state_dict()) == ["values", "pre_values", "scale"]
    assert [name for name, _ in deferred.named_parameters()] == ["values", "pre_values"]


def test_it_stays_float64() -> None:
    table = make("deferred")
    for move in (table.bfloat16, table.half, table.float, lambda: table.to(torch.bfloat16)):
        move()
        assert torch.equal(table.scale, SCALE)
    assert table.to("meta").scale.is_meta
    assert table.to_empty(device="cpu").scale.dtype == torch.float64
    table.reset_parameters()
    assert torch.equal(table.scale, torch.ones(2, dtype=torch.float64))


@pytest.mark.gpu
def test_it_moves_with_the_table() -> None:
    table = make("deferred").to("cuda", torch.bfloat16)
    assert table.scale.is_cuda
    assert torch.equal(table.scale.cpu(), SCALE)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(how: Callable[[um.MemoryTable], um.MemoryTable]) -> None:
    table = make("deferred")
    twin = how(table)
    assert torch.equal(twin.scale, SCALE)
    twin.scale.fill_(1.0)
    assert torch.equal(table.scale, SCALE)


def test_a_pickle_from_before_there_was_one() -> None:
    table = make("deferred")
    state = table.__dict__.copy()
    state["_buffers"] = {}
    del state["_awaits_scale"]
    old = um.MemoryTable.__new__(um.MemoryTable)
    old.__setstate__(state)
    assert torch.equal(old.scale, torch.ones(2, dtype=torch.float64))
    old.load_state_dict({"values": table.values}, strict=False)


def test_layers_see_effective_weights() -> None:
    table, dense = make("deferred"), make("dense")
    layer = um.UltraMemLayer(small_config(), 0)
    with torch.no_grad():
        for parameter, exact in zip(dense.parameters(), effective(table), strict=True):
            parameter.copy_(exact)
    x = tokens(7, 24)
    torch.testing.assert_close(layer(x, table), layer(x, dense))
    assert not torch.allclose(layer(x, table), layer(x, make("deferred", scaled=False)))


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_its_own_state(assign: bool) -> None:
    table, other = make("deferred"), make("deferred", scaled=False)
    buffer = io.BytesIO()
    torch.save(table.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert torch.equal(other.scale, SCALE)
    assert all(map(torch.equal, other.parameters(), table.parameters()))


def test_a_state_cast_whole() -> None:
    """What exports do; the scale is then as exact as that dtype."""
    state = {name: tensor.bfloat16() for name, tensor in make("deferred").state_dict().items()}
    for assign in (False, True):
        table = make("deferred", scaled=False)
        table.load_state_dict(state, assign=assign)
        assert torch.equal(table.scale, SCALE.bfloat16().double())
        assert type(table.scale) is Tensor


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_without_one_means_one(assign: bool) -> None:
    table, dense = make("deferred"), make("dense")
    table.load_state_dict(dense.state_dict(), assign=assign)
    assert torch.equal(table.scale, torch.ones(2, dtype=torch.float64))
    assert all(map(torch.equal, table.parameters(), dense.parameters()))


def test_a_state_without_one_on_meta() -> None:
    state = make("dense").state_dict()
    table = make("deferred", device="meta")
    table.load_state_dict(state, assign=True)
    assert torch.equal(table.scale, torch.ones(2, dtype=torch.float64))
    parts = make("deferred", device="meta")
    whole = make("deferred").state_dict()
    parts.load_state_dict({"values": whole.pop("values")}, strict=False, assign=True)
    parts.load_state_dict(whole, strict=False, assign=True)
    assert torch.equal(parts.scale, SCALE)


PARTS = [
    *itertools.permutations([("values",), ("pre_values",), ("scale",)]),
    [("values",), ("pre_values", "scale")],
    [("pre_values",), ("values", "scale")],
    [("values", "pre_values"), ("scale",)],
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_state_in_parts(parts: list[tuple[str, ...]], assign: bool) -> None:
    state = make("deferred").state_dict()
    table = make("deferred", scaled=False)
    for table_of_another_scale in (False, True):
        if table_of_another_scale:
            table.scale.copy_(torch.tensor([0.25, 0.125]))
        for part in parts:
            there = {name: state[name].clone() for name in part}
            report = table.load_state_dict(there, strict=False, assign=assign)
            if "values" not in part or "pre_values" not in part:
                assert ("scale" in report.missing_keys) == ("scale" not in part)
        assert torch.equal(table.scale, SCALE)
        assert all(torch.equal(table.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_not_loaded_keep_theirs(assign: bool) -> None:
    table, dense = make("deferred"), make("dense")
    table.load_state_dict({}, strict=False)
    assert torch.equal(table.scale, SCALE)
    report = table.load_state_dict({"values": dense.values}, strict=False, assign=assign)
    assert report.missing_keys == ["pre_values", "scale"]
    assert torch.equal(table.scale, SCALE)

    table, scale = make("deferred"), torch.tensor([0.5, 0.25], dtype=torch.float64)
    before = effective(table)[1]
    part = {"values": dense.values, "scale": scale}
    report = table.load_state_dict(part, strict=False, assign=assign)
    assert report.missing_keys == ["pre_values"]
    assert table.scale.tolist() == [0.5, 0.7]
    assert scale.tolist() == [0.5, 0.25]
    assert torch.equal(effective(table)[1], before)


def test_without_pre_values() -> None:
    torch.manual_seed(0)
    table, other = (um.MemoryTable(9, 4, grad_mode="deferred") for _ in range(2))
    table.scale.copy_(SCALE)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.scale, SCALE)
    other.load_state_dict({"values": table.values})
    assert other.scale.tolist() == [1.0, 1.0]


def test_a_dense_table_takes_weights_and_scale_together() -> None:
    table, dense = make("deferred"), make("dense")
    state = table.state_dict()
    report = dense.load_state_dict({"scale": state["scale"]}, strict=False)
    assert report.unexpected_keys == ["scale"]
    part = {"values": state["values"], "scale": state["scale"]}
    report = dense.load_state_dict(part, strict=False)
    assert report.unexpected_keys == ["scale"]
    assert report.missing_keys == ["pre_values"]
    assert torch.equal(dense.values, effective(table)[0].float())


@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
@pytest.mark.parametrize(
    "scale", [torch.ones(3), torch.ones(2, 1), torch.ones(()), [1.0, 1.0], 2.0], ids=str
)
def test_a_malformed_scale(grad_mode: str, scale: object) -> None:
    model = nn.ModuleDict({"table": make(grad_mode)})
    state = {**model.state_dict(), "table.scale": scale}
    message = r"size mismatch for table\.scale|parameter named \"table\.scale\", expected torch"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("values", [torch.ones(()), torch.ones(3, 4), 2.0], ids=str)
def test_malformed_values_with_a_scale(values: object) -> None:
    state = {**make("deferred").state_dict(), "values": values}
    with pytest.raises(RuntimeError, match=r'size mismatch for values|parameter named "values"'):
        make("dense").load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_dense_table_loads_effective_weights(assign: bool, dtype: torch.dtype) -> None:
    table, dense = make("deferred"), make("dense", dtype=dtype)
    state = table.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    dense.load_state_dict(state, assign=assign)
    assert dense.values.dtype == (torch.float32 if assign else dtype)
    assert_rounded(dense, effective(table))
    assert dense.scale is None
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_within_a_model() -> None:
    class Model(nn.Module):
        def __init__(self, grad_mode: str) -> None:
            super().__init__()
            self.memory = nn.ModuleDict({"table": make(grad_mode)})

    deferred, dense = Model("deferred"), Model("dense")
    expected = effective(deferred.memory["table"])
    dense.load_state_dict(deferred.state_dict())
    assert_rounded(dense.memory["table"], expected)
    deferred.load_state_dict(dense.state_dict())
    assert_rounded(deferred.memory["table"], expected)
    assert deferred.memory["table"].scale.tolist() == [1.0, 1.0]


# ---- folding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fold(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype == torch.float64:
        dtype = torch.float32
    table = make("deferred", dtype=dtype, device=device)
    expected = effective(table)
    table.fold_scale()
    assert_rounded(table, expected)
    assert table.scale.tolist() == [1.0, 1.0]
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in table.parameters())


def test_folding_a_dense_table_does_nothing() -> None:
    table = make("dense")
    expected = effective(table)
    table.fold_scale()
    assert_rounded(table, expected)
