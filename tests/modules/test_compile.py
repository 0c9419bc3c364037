"""Layers under torch.compile: how often they are compiled, and what around them is compiled too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from module_cases import layer_and_table, small_config, tokens
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import ultramem_cuda as um

WIDTH = 24
# The first is compiled as it is, the second for any number of tokens.
SIZES = (5, 6, 17, 2, 32, 64, 100, 3, 128, 9)


@pytest.fixture(autouse=True)
def _from_nothing() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


class Model(nn.Module):
    """By default more layers than compilations that torch._dynamo.config.recompile_limit allows."""

    def __init__(self, num_layers: int = 9, grad_mode: str = "dense", **overrides: Any) -> None:
        super().__init__()
        config = small_config(num_layers=num_layers, **overrides)
        torch.manual_seed(0)
        self.table = um.MemoryTable.from_config(config, grad_mode=grad_mode)
        self.memory = nn.ModuleList(um.UltraMemLayer(config, i) for i in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.memory:
            x = x + layer(x, self.table)
        return x


def gradients(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The output, and all gradients of its mean square."""
    x = x.detach().requires_grad_()
    y = forward(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(y.square().mean(), leaves, allow_unused=True)
    return [y.detach(), *(g for g in found if g is not None)]


# ---- numbers of compilations ---------------------------------------------------------------------


def test_layers_compiled_apart_share_the_code() -> None:
    """All layers are compiled once for the first number of tokens and once for all others."""
    model = Model()
    expected = [gradients(model, tokens(size, WIDTH), model) for size in SIZES]
    for layer in model.memory:
        layer.compile(fullgraph=True, backend="aot_eager")
    for size, wanted in zip(SIZES, expected, strict=True):
        torch.testing.assert_close(gradients(model, tokens(size, WIDTH), model), wanted)
    assert compilations() == 2


@pytest.mark.parametrize(
    "overrides",
    [
        {"shuffle": "none"},
        {"shuffle": "permutation"},
        {"key_expand": 2, "num_slots": 600, "sum_groups": False},
    ],
    ids=["no shuffle", "permutation", "groups apart"],
)
def test_however_slots_are_addressed(overrides: dict[str, Any]) -> None:
    model, x = Model(2, **overrides), tokens(7, WIDTH)
    expected = gradients(model, x, model)
    for layer in model.memory:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, x, model), expected)
    assert compilations() == 1


def test_dynamic_shapes_are_compiled_once() -> None:
    model = Model(2)
    for layer in model.memory:
        layer.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    for size in SIZES:
        model(tokens(size, WIDTH).requires_grad_()).sum().backward()
    assert compilations() == 1


@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
def test_a_dimension_marked_dynamic_is_compiled_once(grad_mode: str) -> None:
    layer, table = layer_and_table()
    if grad_mode == "deferred":
        table = um.MemoryTable.from_config(layer.config, grad_mode="deferred")
        table.reserve(sum(SIZES))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in SIZES:
        x = tokens(size, WIDTH)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x, table).sum().backward()
    assert compilations() == 1
    if grad_mode == "deferred":
        assert table.factors.num_tokens == sum(SIZES)


def test_none_and_one_token_are_compiled_apart() -> None:
    """torch's symbols for sizes begin at two."""
    layer, table = layer_and_table()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 1, 0, 7, 1, 0):
        x = tokens(size, WIDTH)
        torch.testing.assert_close(compiled(x, table), layer(x, table))
    assert compilations() == 3


def test_losses_do_not_compile_again() -> None:
    model = Model(3, tucker_penalty=0.1, key_balance=0.1)
    for layer in model.memory:
        layer.compile(fullgraph=True, backend="aot_eager")
    for size in (5, 6, 7):
        x = tokens(size, WIDTH).requires_grad_()
        (model(x).sum() + sum(um.losses.collect_aux_losses(model).values())).backward()
    assert compilations() == 2


def test_layers_compiled_apart_append_to_one_table() -> None:
    """With inductor, which appends in place."""
    deferred, dense = Model(2, "deferred"), Model(2)
    dense.load_state_dict(deferred.state_dict(), strict=False)
    deferred.table.reserve(2 * 2 * 7)
    for layer in deferred.memory:
        layer.compile(fullgraph=True)
    for seed in (1, 2):
        x = tokens(7, WIDTH, seed=seed).requires_grad_()
        for model in (deferred, dense):
            model(x).square().mean().backward()
    assert compilations() == 1
    assert deferred.table.factors.num_tokens == 2 * 2 * 7
    for mine, parameter in zip(
        deferred.table.factors.to_dense(), dense.table.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, parameter.grad)


def test_placement_follows_the_layer() -> None:
    """A buffer that is no part of the state dict, and right wherever the layer comes from."""
    layer, _ = layer_and_table()
    wanted = layer._placement.clone()
    assert "_placement" not in layer.state_dict()
    with torch.device("meta"):
        other = um.UltraMemLayer(layer.config, layer.layer_index)
    assigned = um.UltraMemLayer(layer.config, layer.layer_index, device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for made in (other.to_empty(device="cpu"), assigned):
        assert torch.equal(made._placement, wanted)


# ---- with what a trainer puts around them --------------------------------------------------------


def test_autocast() -> None:
    model = Model(2)
    x = tokens(7, WIDTH)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(
        gradients(model, x, compiled), gradients(model, x, forward), strict=True
    ):
        torch.testing.assert_close(mine, eager, rtol=2e-2, atol=2e-2)
    assert compilations() == 1


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each operator of this package runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ultramem":
            name = func._opname
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def keep_retrieval(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.ultramem.product_key_topk.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selectively(model: Model, x: Tensor) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, keep_retrieval)
    for layer in model.memory:
        x = x + checkpoint(layer, x, model.table, use_reentrant=False, context_fn=contexts)
    return x


@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
def test_selective_checkpointing(grad_mode: str) -> None:
    """Retrieval is kept, and the rest computed again."""
    model, x = Model(2, grad_mode), tokens(7, WIDTH)
    model.table.requires_grad_(grad_mode == "dense")
    expected = gradients(model, x, model)
    model.table.requires_grad_()
    with Counted() as counted:
        x = x.requires_grad_()
        y = selectively(model, x)
        leaves = (
            [x, *model.parameters()] if grad_mode == "dense" else [x, *model.memory.parameters()]
        )
        found = torch.autograd.grad(y.square().mean(), leaves)
    assert counted.calls["product_key_topk"] == 2
    assert counted.calls["value_ffn"] == 4
    torch.testing.assert_close([y.detach(), *found], expected)
    if grad_mode == "deferred":
        assert model.table.factors.num_tokens == 2 * 7


def test_selective_checkpointing_under_compile() -> None:
    model, x, calls = Model(2), tokens(7, WIDTH), []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls.extend(getattr(node.target, "_opname", None) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition
    )
    expected = gradients(model, x, model)
    compiled = torch.compile(partial(selectively, model), fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients(model, x, compiled), expected)
    assert calls.count("product_key_topk") == 2
    assert calls.count("value_ffn") == 4
    assert compilations() == 1


# ---- CUDA graphs by torch.compile ---------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
def test_reduce_overhead(grad_mode: str) -> None:
    """Forward and backward run as CUDA graphs: none is passed over for an input it writes to."""
    model, eager = Model(3, grad_mode).cuda(), Model(3).cuda()
    eager.load_state_dict(model.state_dict(), strict=False)
    steps = 5
    if grad_mode == "deferred":
        model.table.reserve(steps * 3 * 64)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for seed in range(steps):
        # What a replay returned, gradients too, is gone with the next one.
        model.memory.zero_grad()
        eager.memory.zero_grad()
        if grad_mode == "dense":
            model.table.zero_grad()
            eager.table.zero_grad()
        x = tokens(64, WIDTH, seed=seed).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).square().mean().backward()
        eager(x).square().mean().backward()
        parameters = (model.parameters(), eager.parameters())
        for a, b in zip(*parameters, strict=True):
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert compilations() == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    if grad_mode == "deferred":
        model.table.factors.check()
        assert model.table.factors.num_tokens == steps * 3 * 64
        found = model.table.factors.to_dense()
        for mine, parameter in zip(found, eager.table.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_inference_as_cuda_graphs() -> None:
    model = Model(3).cuda().eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):
            x = tokens(64, WIDTH, seed=seed).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counters["inductor"]["cudagraph_skips"] == 0
