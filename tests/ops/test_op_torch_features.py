"""Operators, chained as in a layer, under torch.compile, activation checkpointing and autocast."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import Data
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ultramem_cuda import SlotAddressing, ops

ADDRESSING = SlotAddressing(500, 400, offset=250, expand=4, shuffle="feistel", seed=5)
NAMES = ("x", "weight", "gain", "keys", "core", "values", "pre_values", "pre_weight")


def layer(
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    keys: Tensor,
    core: Tensor,
    values: Tensor,
    pre_values: Tensor,
    pre_weight: Tensor,
) -> Tensor:
    query = ops.tucker_query(x, weight, gain, num_heads=2)
    scores, indices = ops.product_key_topk(query, keys, core, topk=12, key_norm_weight=gain)
    return ops.value_ffn(
        indices.flatten(1),
        scores.flatten(1, 2),
        values,
        pre_values,
        torch.nn.functional.linear(x, pre_weight),
        activation="gelu",
        addressing=ADDRESSING,
    )


def make_inputs(
    device: str, dtype: torch.dtype = torch.float32, seed: int = 1, tokens: int = 17
) -> list[Tensor]:
    data = Data(seed, device)
    return [
        data.normal(tokens, 24, dtype=dtype, requires_grad=True),
        data.normal(2 * 2 * 2 * 16, 24, dtype=dtype, scale=0.2, requires_grad=True),
        data.gains(16, requires_grad=True),
        data.normal(2, 2, 2, 40, 16, dtype=dtype, requires_grad=True),
        data.cores(2, 2, 2, requires_grad=True),
        data.normal(500, 30, dtype=dtype, requires_grad=True),
        data.normal(500, 20, dtype=dtype, requires_grad=True),
        data.normal(20, 24, dtype=dtype, scale=0.2, requires_grad=True),
    ]


def outcome(function: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    """The output and all gradients of the output's weighted sum."""
    out = function(*inputs)
    upstream = torch.linspace(-1.0, 1.0, out.numel(), device=out.device).reshape(out.shape)
    grads = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    return {"out": out.detach(), **dict(zip(NAMES, grads, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, msg=lambda message, name=name: f"{name}: {message}"
        )


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile(device: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(device, dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, inputs), outcome(layer, inputs))


def test_compile_with_inductor(device: str) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(device)
    compiled = torch.compile(layer, fullgraph=True)
    assert_same(outcome(compiled, inputs), outcome(layer, inputs))


def test_compile_each_operator_alone(device: str) -> None:
    """Also those whose gradient nobody wants, and the parts that the layer leaves unused."""
    torch._dynamo.reset()
    x, weight, gain, keys, core, values, _, _ = (t.detach() for t in make_inputs(device))
    query = ops.tucker_query(x, weight, gain, num_heads=2)
    _, indices = ops.product_key_topk(query, keys, core, topk=12)
    permutation = torch.randperm(1600, generator=Data(2).generator).to(device)
    shuffled = SlotAddressing(500, 400, expand=4, shuffle=permutation)

    def additive() -> tuple[Tensor, Tensor]:
        return ops.product_key_topk(
            query[:, :, :, :1], keys[:, :, :1], None, topk=7, mode="additive"
        )

    def apart() -> Tensor:
        scores = torch.ones(17, 24, 3, device=device)
        return ops.value_ffn(
            indices.flatten(1), scores, values, addressing=shuffled, sum_groups=False
        )

    functions = (additive, apart, lambda: ops.tucker_filter(core), lambda: ops.rms_norm(keys, gain))
    for function in functions:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), function())


def test_compile_raises_what_eager_raises(device: str) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(device)
    query = ops.tucker_query(*inputs[:3], num_heads=2).detach()

    def function(query: Tensor, keys: Tensor, core: Tensor) -> Tensor:
        return ops.product_key_topk(query, keys, core, topk=30, axis_topk=5)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="product_key_topk: topk must be in"):
        compiled(query, *inputs[3:5])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_key_balance_loss(device: str, backend: str) -> None:
    """Along with what gives it the kept keys, forward and backward."""
    torch._dynamo.reset()
    x, weight, gain, keys, core, *_ = make_inputs(device)

    def balance(x: Tensor, weight: Tensor, gain: Tensor, keys: Tensor, core: Tensor) -> Tensor:
        query = ops.tucker_query(x, weight, gain, num_heads=2)
        u, t, _ = ops.tucker_filter(core)
        normed = ops.rms_norm(keys, gain)
        scores, _, kept = ops.product_key_topk(
            query, normed, core, topk=12, u=u, t=t, return_axis_indices=True
        )
        return scores.sum() + ops.key_balance_loss(query, normed, kept, u=u, t=t).sum()

    inputs = [x, weight, gain, keys, core]
    compiled = torch.compile(balance, fullgraph=True, backend=backend)
    expected, actual = balance(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs)
    )


# ---- checkpointing -------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(device: str, use_reentrant: bool) -> None:
    inputs = make_inputs(device)
    expected = outcome(layer, inputs)
    out = checkpoint(layer, *inputs, use_reentrant=use_reentrant)
    upstream = torch.linspace(-1.0, 1.0, out.numel(), device=device).reshape(out.shape)
    out.backward(upstream)
    actual = {"out": out.detach(), **{n: t.grad for n, t in zip(NAMES, inputs, strict=True)}}
    assert_same(actual, expected)


def test_checkpoint_under_compile(device: str) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(device)

    def checkpointed(*inputs: Tensor) -> Tensor:
        return checkpoint(layer, *inputs, use_reentrant=False)

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, inputs), outcome(layer, inputs))


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_query(device: str, dtype: torch.dtype) -> None:
    x, weight, gain = make_inputs(device)[:3]
    with torch.autocast(device, dtype=dtype):
        query = ops.tucker_query(x, weight, gain, num_heads=2)
    assert query.dtype == dtype
    assert torch.equal(query, ops.tucker_query(x.to(dtype), weight.to(dtype), gain, num_heads=2))
    for grad in torch.autograd.grad(query.float().sum(), [x, weight, gain]):
        assert grad.dtype == torch.float32


@pytest.mark.parametrize("key_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_product_key_topk(device: str, dtype: torch.dtype, key_norm: bool) -> None:
    data = Data(3, device)
    query, keys = data.normal(7, 2, 2, 2, 16), data.normal(2, 2, 2, 40, 16)
    # Cores and filter that bfloat16 cannot hold: casting them would show.
    core = data.cores(2, 2, 2)
    gain = data.gains(16) if key_norm else None
    with torch.autocast(device, dtype=dtype):
        scores, indices = ops.product_key_topk(query, keys, core, topk=9, key_norm_weight=gain)
    expected = ops.product_key_topk(
        query.to(dtype), keys.to(dtype), core, topk=9, key_norm_weight=gain
    )
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_key_balance_loss(device: str, dtype: torch.dtype) -> None:
    data = Data(13, device)
    query = data.normal(7, 2, 2, 2, 16, requires_grad=True)
    keys = data.normal(2, 2, 2, 40, 16, requires_grad=True)
    kept = data.integers(40, 7, 2, 2, 5)
    u, t = data.normal(2, 2), data.normal(2, 2)
    with torch.autocast(device, dtype=dtype):
        loss = ops.key_balance_loss(query, keys, kept, u=u, t=t)
        # Inside the region, too: its products are in float32 all the same.
        grads = torch.autograd.grad(loss.sum(), [query, keys])
    low = [x.detach().to(dtype).requires_grad_() for x in (query, keys)]
    expected = ops.key_balance_loss(*low, kept, u=u, t=t)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), low), strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, wanted.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_value_ffn(device: str, dtype: torch.dtype) -> None:
    data = Data(4, device)
    indices, scores = data.integers(30, 7, 5), data.normal(7, 5, 2)
    tables = [data.normal(30, 8, requires_grad=True), data.normal(30, 6, requires_grad=True)]
    pre_input = data.normal(7, 6, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        out = ops.value_ffn(indices, scores, *tables, pre_input)
        bag = ops.value_ffn(indices, scores, tables[0])
    assert out.dtype == dtype
    assert torch.equal(out, ops.value_ffn(indices, scores, *tables, pre_input.to(dtype)))
    assert bag.dtype == torch.float32
    for grad in torch.autograd.grad(out.float().sum(), [*tables, pre_input]):
        assert grad.dtype == torch.float32


def test_autocast_leaves_the_raw_operator_alone(device: str) -> None:
    """Called under torch.ops, float32 stays float32: its product is not autocast's to change."""
    data = Data(11, device)
    x, weight, gain = data.normal(5, 16), data.normal(2 * 2 * 8, 16), data.normal(8)
    expected, _ = torch.ops.ultramem.tucker_query(x, weight, gain, 1, 1e-6)
    with torch.autocast(device, dtype=torch.bfloat16):
        query, projection = torch.ops.ultramem.tucker_query(x, weight, gain, 1, 1e-6)
    assert projection.dtype == torch.float32
    assert torch.equal(query, expected)


def test_autocast_leaves_float64_alone() -> None:
    data = Data(5)
    x, weight = data.normal(3, 5, dtype=torch.float64), data.normal(12, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query = ops.tucker_query(x, weight, torch.ones(6))
    assert query.dtype == torch.float64


def test_autocast_layer_under_compile(device: str) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(device)

    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return layer(*inputs)

    expected = outcome(function, inputs)
    assert expected["out"].dtype == torch.bfloat16
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, inputs), expected)


# ---- determinism ---------------------------------------------------------------------------------


def test_bitwise_equal_from_run_to_run(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    outcomes = [outcome(layer, make_inputs(device, dtype, tokens=300)) for _ in range(3)]
    for name, other in itertools.product(outcomes[0], outcomes[1:]):
        assert torch.equal(outcomes[0][name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_cpu_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    """But for torch's own matrix products, which have no part in this."""
    data = Data(6)
    query = data.normal(200, 2, 2, 2, 24, dtype=dtype, requires_grad=True)
    keys = data.normal(2, 2, 2, 60, 24, dtype=dtype, requires_grad=True)
    gain = data.gains(24, requires_grad=True)
    core = data.cores(2, 2, 2, requires_grad=True)
    values = data.normal(500, 30, dtype=dtype, requires_grad=True)
    pre_values = data.normal(500, 20, dtype=dtype, requires_grad=True)
    pre_input = data.normal(200, 20, dtype=dtype, requires_grad=True)
    leaves = [query, keys, gain, core, values, pre_values, pre_input]
    addressing = SlotAddressing(500, 400, expand=9, shuffle="feistel")

    def run() -> list[Tensor]:
        scores, indices = ops.product_key_topk(query, keys, core, topk=20, key_norm_weight=gain)
        out = ops.value_ffn(
            indices.flatten(1),
            scores.flatten(1, 2),
            values,
            pre_values,
            pre_input,
            addressing=addressing,
        )
        return [scores, indices, out, *torch.autograd.grad(out.sum(), leaves)]

    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            outcomes.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            assert torch.equal(a, b)
