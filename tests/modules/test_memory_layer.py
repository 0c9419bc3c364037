"""UltraMemLayer against the NumPy reference, and as a module among modules."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from module_cases import (
    PKM,
    layer_and_table,
    reference_config,
    reference_parameters,
    small_config,
    to_numpy,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ultramem_cuda as um
from ultramem_cuda import python_ref as ref

VARIANTS: dict[str, dict[str, Any]] = {
    "tucker": {},
    "wraps around the table": {"layer_index": 2},
    "two heads, shared query": {"num_heads": 2, "query_per_rank": False},
    "rank 3, one core": {"tucker_rank": 3, "num_cores": 1},
    "gelu": {"activation": "gelu"},
    "plain values": {"pre_value_dim": 0},
    "expanded, summed": {"key_expand": 2},
    "expanded, kept apart": {"key_expand": 2, "sum_groups": False},
    "permutation": {"shuffle": "permutation", "key_expand": 2},
    "no shuffle": {"shuffle": "none", "topology": "noring"},
    "additive": PKM,
    "additive with pre-values": {**PKM, "pre_value_dim": 5, "activation": "silu"},
}


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    scale = max(float(np.linalg.norm(expected)), 1e-300)
    return float(np.linalg.norm(to_numpy(actual) - expected)) / scale


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_forward_and_gradients_equal_the_reference(overrides: dict[str, Any]) -> None:
    layer, table = layer_and_table(torch.float64, **overrides)
    x = tokens(9, 24, dtype=torch.float64).requires_grad_()
    upstream = tokens(9, 24, dtype=torch.float64, seed=6)
    y = layer(x, table)
    y.backward(upstream)

    parameters, config = reference_parameters(layer, table), reference_config(layer)
    output = ref.memory_layer(to_numpy(x), parameters, config)
    grad_x, grads = ref.memory_layer_bwd(
        to_numpy(upstream), to_numpy(x), parameters, config, output
    )
    assert relative_error(y, output.y) < 1e-12
    pairs: dict[str, tuple[torch.Tensor | None, np.ndarray | None]] = {
        "x": (x.grad, grad_x),
        "query_proj": (layer.query_proj.weight.grad, grads.query_proj),
        "query_norm": (layer.query_norm.grad, grads.query_norm),
        "keys": (layer.keys.grad, grads.keys),
        "key_norm": (layer.key_norm.grad, grads.key_norm),
        "value_proj": (layer.value_proj.weight.grad, grads.value_proj),
        "values": (table.values.grad, grads.values),
    }
    if layer.cores is not None:
        pairs["cores"] = (layer.cores.grad, grads.cores)
    if layer.pre_proj is not None and table.pre_values is not None:
        pairs["pre_proj"] = (layer.pre_proj.weight.grad, grads.pre_proj)
        pairs["pre_values"] = (table.pre_values.grad, grads.pre_values)
    for name, (actual, expected) in pairs.items():
        assert actual is not None, name
        assert expected is not None, name
        assert np.abs(expected).max() > 0, name
        assert relative_error(actual, expected) < 1e-11, name


def test_softmax_scores_are_those_of_plain_product_keys() -> None:
    layer, table = layer_and_table(torch.float64, **PKM, score_norm="softmax")
    x = tokens(4, 24, dtype=torch.float64)
    output = ref.memory_layer(
        to_numpy(x), reference_parameters(layer, table), reference_config(layer)
    )
    weights = np.exp(output.scores - output.scores.max(axis=2, keepdims=True))
    weights = (weights / weights.sum(axis=2, keepdims=True)).reshape(4, -1)
    slot, _ = layer.addressing.slots(torch.from_numpy(output.indices.reshape(4, -1)))
    gathered = np.einsum("ts,tsd->td", weights, to_numpy(table.values)[slot.numpy()])
    expected = gathered @ to_numpy(layer.value_proj.weight).T
    assert relative_error(layer(x, table), expected) < 1e-12


def test_parameter_names_and_shapes() -> None:
    layer, _ = layer_and_table(num_heads=2, key_expand=2, sum_groups=False)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "query_proj.weight": (2 * 2 * 2 * 6, 24),
        "query_norm": (6,),
        "keys": (2, 2, 2, 12, 6),
        "key_norm": (6,),
        "cores": (2, 2, 2, 2),
        "pre_proj.weight": (5, 24),
        "value_proj.weight": (24, 4 * 8),
    }
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}
    additive, _ = layer_and_table(**PKM)
    assert additive.cores is None
    assert additive.pre_proj is None


def test_leading_dimensions_empty_input_and_strides() -> None:
    layer, table = layer_and_table()
    x = tokens(2, 3, 24)
    y = layer(x, table)
    assert y.shape == (2, 3, 24)
    torch.testing.assert_close(layer(x.view(6, 24), table), y.view(6, 24), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer(x[1, 2], table), y[1, 2], rtol=1e-5, atol=1e-4)
    for shape in ((0, 24), (2, 0, 24)):
        empty = tokens(*shape).requires_grad_()
        out = layer(empty, table)
        assert out.shape == shape
        out.sum().backward()
        assert empty.grad is not None
    strided = tokens(24, 3, 2).permute(2, 1, 0)
    assert not strided.is_contiguous()
    torch.testing.assert_close(layer(strided, table), layer(strided.contiguous(), table))


class _Calls(TorchDispatchMode):
    """Names of what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_gradient_of_x_is_begun_last() -> None:
    """It is as large as the queries: it must not wait while retrieval makes their gradients."""
    layer, table = layer_and_table()
    out = layer(tokens(9, 24).requires_grad_(), table)
    with _Calls() as calls:
        out.sum().backward()
    begun = calls.names.index("ultramem::tucker_query_bwd")
    # Two products of value_proj come before, and those of pre_proj after.
    products = [i for i, name in enumerate(calls.names) if name == "aten::mm"]
    assert len(products) == 4
    assert sum(i < begun for i in products) == 2
    assert calls.names.index("ultramem::product_key_topk_bwd") < begun


def test_wrong_width_and_layer_index() -> None:
    layer, table = layer_and_table()
    with pytest.raises(ValueError, match=r"x: last dimension must be d_model = 24, got shape"):
        layer(tokens(2, 23), table)
    with pytest.raises(ValueError, match=r"layer_index: must be in \[0, 3\), got 3"):
        um.UltraMemLayer(small_config(), 3)


def test_layers_differ_in_window_and_shuffle() -> None:
    config = small_config()
    addressings = [um.UltraMemLayer(config, i).addressing for i in range(3)]
    assert [a.offset for a in addressings] == [0, 83, 166]
    assert len({a.seed for a in addressings}) == 3
    again = um.UltraMemLayer(config, 1).addressing
    assert again == addressings[1]
    other_seed = um.UltraMemLayer(small_config(seed=4), 1).addressing
    assert other_seed.seed not in {a.seed for a in addressings}


def test_autocast_casts_all_but_tables_scores_and_cores() -> None:
    layer, table = layer_and_table()
    x = tokens(16, 24).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, table)
    assert y.dtype == torch.bfloat16

    low = copy.deepcopy(layer)
    low.query_proj.bfloat16()
    low.value_proj.bfloat16()
    assert low.pre_proj is not None
    low.pre_proj.bfloat16()
    low.keys.data = low.keys.data.bfloat16()
    assert torch.equal(low(x.detach().bfloat16(), table), y)

    y.float().square().sum().backward()
    for parameter in [x, *layer.parameters(), *table.parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("pre_value_dim", [0, 5])
def test_table_of_its_own_dtype(pre_value_dim: int) -> None:
    layer, table = layer_and_table(pre_value_dim=pre_value_dim)
    low, wide = copy.deepcopy(table).bfloat16(), copy.deepcopy(table).bfloat16().float()
    x = tokens(5, 24)
    y = layer(x, low)
    assert y.dtype == torch.float32
    # Without pre-values the operator's output is rounded to the rows' dtype.
    assert relative_error(y, to_numpy(layer(x, wide))) < (1e-6 if pre_value_dim else 1e-2)


@pytest.mark.parametrize(
    "overrides", [{}, {"tucker_penalty": 0.1, "key_balance": 0.1}], ids=["plain", "losses"]
)
def test_compile_without_graph_breaks(overrides: dict[str, Any]) -> None:
    layer, table = layer_and_table(**overrides)
    x = tokens(6, 24)
    expected = layer(x, table)
    losses = dict(layer.last_losses)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    y = compiled(x, table)
    torch.testing.assert_close(y, expected)
    assert layer.last_losses.keys() == losses.keys()
    torch.testing.assert_close(layer.last_losses, losses)
    y.sum().backward()
    assert layer.keys.grad is not None
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, table), expected)
    assert layer._cache == {}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    layer, table = layer_and_table(torch.float64)
    x = tokens(6, 24, dtype=torch.float64).requires_grad_()
    layer(x, table).square().sum().backward()
    plain = [p.grad for p in (x, *layer.parameters(), *table.parameters())]
    for p in (x, *layer.parameters(), *table.parameters()):
        p.grad = None
    checkpoint(layer, x, table, use_reentrant=use_reentrant).square().sum().backward()
    again = [p.grad for p in (x, *layer.parameters(), *table.parameters())]
    torch.testing.assert_close(again, plain)


def test_meta_construction_then_materialisation() -> None:
    config = small_config(shuffle="permutation")
    with torch.device("meta"):
        layer, table = um.UltraMemLayer(config, 1), um.MemoryTable.from_config(config)
    assert all(t.is_meta for t in [*layer.state_dict().values(), *table.parameters()])
    layer.to_empty(device="cpu")
    table.to_empty(device="cpu")
    layer.reset_parameters()
    table.reset_parameters()
    reference = um.UltraMemLayer(config, 1)
    assert layer.addressing == reference.addressing
    reference.load_state_dict(layer.state_dict())
    x = tokens(4, 24)
    assert torch.equal(layer(x, table), reference(x, table))


def test_permutation_is_state() -> None:
    overrides = {"shuffle": "permutation", "key_expand": 2}
    layer, table = layer_and_table(**overrides)
    given = torch.randperm(144, generator=torch.Generator().manual_seed(1))
    explicit = um.UltraMemLayer(small_config(**overrides), 1, permutation=given)
    assert torch.equal(explicit.state_dict()["shuffle_index"], given)
    assert explicit.addressing != layer.addressing
    explicit.load_state_dict(layer.state_dict())
    assert explicit.addressing == layer.addressing
    x = tokens(4, 24)
    assert torch.equal(explicit(x, table), layer(x, table))
    assert given.sort().values.equal(torch.arange(144)), "the argument must not be written to"

    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert twin.addressing.shuffle is twin.shuffle_index
        assert torch.equal(twin(x, table), layer(x, table))


def test_bad_permutations() -> None:
    config = small_config(shuffle="permutation")
    with pytest.raises(ValueError, match="shuffle: must be a permutation"):
        um.UltraMemLayer(config, 0, permutation=torch.zeros(144, dtype=torch.int64))
    with pytest.raises(ValueError, match="permutation: must be None unless"):
        um.UltraMemLayer(small_config(), 0, permutation=torch.randperm(144))
    layer = um.UltraMemLayer(config, 0)
    corrupt = {**layer.state_dict(), "shuffle_index": torch.zeros(144, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match="shuffle_index: shuffle: must be a permutation"):
        layer.load_state_dict(corrupt)


def test_tables_that_cannot_be_read_are_refused() -> None:
    layer, table = layer_and_table()
    with pytest.raises(TypeError, match="table: must be a MemoryTable, got Parameter"):
        layer(tokens(2, 24), table.values)
