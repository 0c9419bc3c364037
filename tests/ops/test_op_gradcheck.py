"""torch.autograd.gradcheck in float64 on the CPU, away from where selections and relu jump."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import Data
from torch import Tensor
from torch.autograd import gradcheck

from ultramem_cuda import SlotAddressing, ops

F64 = torch.float64


def leaf(data: Data, *shape: int) -> Tensor:
    return data.normal(*shape, dtype=F64, requires_grad=True)


def test_rms_norm() -> None:
    data = Data(1)
    assert gradcheck(ops.rms_norm, (leaf(data, 3, 2, 7), leaf(data, 7)))


@pytest.mark.parametrize("num_queries", [1, 3])
def test_tucker_query(num_queries: int) -> None:
    data = Data(2)
    weight = leaf(data, 2 * 2 * num_queries * 5, 4)
    function = partial(ops.tucker_query, num_heads=2)
    assert gradcheck(function, (leaf(data, 3, 4), weight, leaf(data, 5)))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_tucker_filter(rank: int) -> None:
    core = leaf(Data(3), 2, 2, rank, rank)
    assert gradcheck(lambda core: ops.tucker_filter(core)[2], (core,))


@pytest.mark.parametrize("shared_query", [True, False])
@pytest.mark.parametrize("key_norm", [True, False])
@pytest.mark.parametrize(("rank", "num_cores"), [(1, 1), (2, 2), (3, 4)])
def test_product_key_topk(rank: int, num_cores: int, key_norm: bool, shared_query: bool) -> None:
    data = Data(4)
    query = leaf(data, 3, 2, 2, 1 if shared_query else rank, 5)
    keys, core = leaf(data, 2, 2, rank, 9, 5), leaf(data, num_cores, 2, rank, rank)
    gain = leaf(data, 5) if key_norm else None
    u, t, _ = ops.tucker_filter(core.detach())

    def function(query: Tensor, keys: Tensor, core: Tensor, gain: Tensor | None) -> Tensor:
        scores, _ = ops.product_key_topk(
            query, keys, core, topk=6, axis_topk=3, u=u, t=t, key_norm_weight=gain
        )
        return scores

    assert gradcheck(function, (query, keys, core, gain))


@pytest.mark.parametrize("normalize", ["paper", "release"])
@pytest.mark.parametrize("shared_query", [True, False])
def test_key_balance_loss(shared_query: bool, normalize: str) -> None:
    data = Data(14)
    query, keys = leaf(data, 3, 2, 2, 1 if shared_query else 3, 4), leaf(data, 2, 2, 3, 6, 4)
    kept = data.integers(6, 3, 2, 2, 4)
    u, t = data.normal(2, 3, dtype=F64), data.normal(2, 3, dtype=F64)
    function = partial(ops.key_balance_loss, axis_indices=kept, u=u, t=t, normalize=normalize)
    assert gradcheck(function, (query, keys))


def test_product_key_topk_additive() -> None:
    data = Data(5)

    def function(query: Tensor, keys: Tensor) -> Tensor:
        return ops.product_key_topk(query, keys, None, topk=4, mode="additive")[0]

    assert gradcheck(function, (leaf(data, 3, 2, 2, 1, 5), leaf(data, 2, 2, 1, 9, 5)))


ADDRESSINGS = {
    "rows": None,
    "window": SlotAddressing(12, 5, offset=9, expand=2),
    "feistel": SlotAddressing(12, 9, offset=4, expand=4, shuffle="feistel", seed=3),
    "tensor": SlotAddressing(12, 4, expand=3, shuffle=torch.arange(12).flip(0)),
}


@pytest.mark.parametrize("sum_groups", [True, False])
@pytest.mark.parametrize("addressing", ADDRESSINGS)
@pytest.mark.parametrize("activation", ["identity", "gelu", "relu", "silu"])
def test_value_ffn(activation: str, addressing: str, sum_groups: bool) -> None:
    data = Data(6)
    where = ADDRESSINGS[addressing]
    indices = data.integers(12 if where is None else where.num_virtual, 3, 5)
    inputs = (leaf(data, 3, 5, 2), leaf(data, 12, 4), leaf(data, 12, 3), leaf(data, 3, 3))

    def function(*inputs: Tensor) -> Tensor:
        return ops.value_ffn(
            indices, *inputs, activation=activation, addressing=where, sum_groups=sum_groups
        )

    assert gradcheck(function, inputs)


def test_value_ffn_without_pre_values() -> None:
    data = Data(7)
    indices = data.integers(12, 3, 5)
    function = partial(ops.value_ffn, indices)
    assert gradcheck(function, (leaf(data, 3, 5, 3), leaf(data, 12, 6)))
