"""A memory layer beside a FFN: `ffn_with_memory` against one after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from module_cases import PKM, layer_and_table, tokens
from torch import Tensor, nn

import ultramem_cuda as um


def make_ffn(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 24)).to(device, dtype)


def one_after_the_other(
    ffn: Callable[[Tensor], Tensor], layer: um.UltraMemLayer, x: Tensor, table: um.MemoryTable
) -> Tensor:
    return ffn(x) + layer(x, table)


@pytest.mark.parametrize("overrides", [{}, PKM, {"num_heads": 2, "key_expand": 2}])
def test_it_is_the_sum(overrides: dict[str, object], device: str) -> None:
    layer, table = layer_and_table(**overrides)
    layer, table, ffn = layer.to(device), table.to(device), make_ffn(device=device)
    x = tokens(2, 9, 24).to(device)
    for grad in (True, False):
        for module in (layer.train(grad), layer.eval()):
            with torch.set_grad_enabled(grad):
                expected = one_after_the_other(ffn, module, x, table)
                actual = um.ffn_with_memory(ffn, module, x, table)
            torch.testing.assert_close(actual, expected)
            assert actual.requires_grad == grad


def test_gradients_are_those_of_the_sum(device: str) -> None:
    layer, table = layer_and_table()
    layer, table, ffn = layer.to(device), table.to(device), make_ffn(device=device)
    leaves = [tokens(9, 24).to(device).requires_grad_(), *layer.parameters(), *table.parameters()]
    found = []
    for block in (one_after_the_other, um.ffn_with_memory):
        y = block(ffn, layer, leaves[0], table)
        found.append(torch.autograd.grad(y.square().sum(), [*leaves, *ffn.parameters()]))
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("batch", [(0,), (1,), (3, 0)])
def test_hardly_any_tokens(batch: tuple[int, ...], device: str) -> None:
    layer, table = layer_and_table()
    layer, table, ffn = layer.to(device).eval(), table.to(device), make_ffn(device=device)
    x = tokens(*batch, 24).to(device)
    with torch.no_grad():
        actual = um.ffn_with_memory(ffn, layer, x, table)
        torch.testing.assert_close(actual, one_after_the_other(ffn, layer, x, table))


def test_what_does_not_fit_is_refused(device: str) -> None:
    layer, table = layer_and_table()
    layer, table = layer.to(device), table.to(device)
    with torch.no_grad():
        with pytest.raises(ValueError, match="d_model = 24"):
            um.ffn_with_memory(nn.Identity(), layer, tokens(9, 23).to(device), table)
        with pytest.raises(TypeError, match="must be a MemoryTable"):
            um.ffn_with_memory(nn.Identity(), layer, tokens(9, 24).to(device), layer)  # type: ignore[arg-type]


def test_the_input_is_not_written_to(device: str) -> None:
    """Nor what a FFN gives out that is a view of it, or not contiguous."""
    layer, table = layer_and_table()
    layer, table = layer.to(device).eval(), table.to(device)
    x = tokens(6, 24).to(device)
    before = x.clone()
    wide = tokens(24, 6).to(device)
    ffns: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.view(-1, 24),
        lambda t: wide.t(),
        lambda t: t.double(),
        lambda t: t[:1],
    ]
    with torch.no_grad():
        for ffn in ffns:
            expected = one_after_the_other(ffn, layer, x, table)
            torch.testing.assert_close(um.ffn_with_memory(ffn, layer, x, table), expected)
            assert torch.equal(x, before)


@pytest.mark.gpu
@pytest.mark.parametrize("replaced", ["hook", "bias", "subclass"])
def test_a_value_projection_that_is_more_than_a_product(replaced: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer, table = (module.cuda() for module in layer_and_table())
    if replaced == "hook":
        layer.value_proj.register_forward_hook(lambda module, args, output: output + 1)
    elif replaced == "bias":
        layer.value_proj = nn.Linear(8, 24, device="cuda")
    else:
        layer.value_proj = Doubled(8, 24, bias=False, device="cuda")
    ffn, x = make_ffn(device="cuda"), tokens(9, 24).cuda()
    layer.eval()
    with torch.no_grad():
        expected = one_after_the_other(ffn, layer, x, table)
        torch.testing.assert_close(um.ffn_with_memory(ffn, layer, x, table), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_mode_around_it_or_inside(mode: Callable[[], Any], device: str) -> None:
    layer, table = (module.to(device) for module in layer_and_table())
    ffn, x = make_ffn(device=device), tokens(9, 24).to(device)
    layer.eval()

    @torch.inference_mode()
    def inferred(x: Tensor) -> Tensor:
        return ffn(x)

    with mode():
        expected = one_after_the_other(ffn, layer, x, table)
        torch.testing.assert_close(um.ffn_with_memory(ffn, layer, x, table), expected)
        torch.testing.assert_close(um.ffn_with_memory(inferred, layer, x, table), expected)


def test_hooks_and_counts_of_the_memory(device: str) -> None:
    layer, table = (module.to(device) for module in layer_and_table())
    ffn, x = make_ffn(device=device), tokens(9, 24).to(device)
    layer.eval()
    layer.usage = um.stats.SlotUsage(layer.addressing)
    with torch.no_grad():
        expected = um.ffn_with_memory(ffn, layer, x, table)
        assert int(layer.usage.counts.sum()) == 9 * layer.config.num_heads * layer.config.topk
        layer.register_forward_hook(lambda module, args, output: output + 1)
        torch.testing.assert_close(um.ffn_with_memory(ffn, layer, x, table), expected + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_ffn_that_raises_leaves_nothing_behind(captured: bool) -> None:
    (layer,), table, ffn = bf16_block()
    x = torch.randn(65, 256, device="cuda", dtype=torch.bfloat16)

    def raising(x: Tensor) -> Tensor:
        raise ArithmeticError("in the middle")

    with torch.no_grad():
        expected = um.ffn_with_memory(ffn, layer, x, table)
        around = torch.cuda.graph(torch.cuda.CUDAGraph()) if captured else nullcontext()
        with pytest.raises(ArithmeticError, match="in the middle"), around:
            um.ffn_with_memory(raising, layer, x, table)
        torch.cuda.synchronize()
        assert torch.equal(um.ffn_with_memory(ffn, layer, x, table), expected)


@pytest.mark.gpu
def test_threads_on_one_stream() -> None:
    (layer,), table, ffn = bf16_block()
    inputs = [torch.randn(200, 256, device="cuda", dtype=torch.bfloat16) for _ in range(60)]
    with torch.no_grad():
        expected = [um.ffn_with_memory(ffn, layer, x, table) for x in inputs]
    torch.cuda.synchronize()

    @torch.no_grad()
    def block(x: Tensor) -> Tensor:
        return um.ffn_with_memory(ffn, layer, x, table)

    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(block, inputs))
    torch.cuda.synchronize()
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


BF16 = {"d_model": 256, "num_keys": 200, "key_dim": 64, "num_slots": 40_000, "value_dim": 128}


def bf16_block(num_layers: int = 1) -> tuple[list[um.UltraMemLayer], um.MemoryTable, nn.Module]:
    config = um.UltraMemConfig(**BF16, pre_value_dim=64, topk=32, num_layers=num_layers)
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    table = um.MemoryTable.from_config(config, **options)
    layers = [um.UltraMemLayer(config, i, **options).eval() for i in range(num_layers)]
    ffn = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, 256)).to(**options)
    return layers, table, ffn


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 300, 1500])
def test_a_captured_chain_of_blocks(num_tokens: int) -> None:
    """Each block's input is the last one's output: a missing wait would show."""
    torch.manual_seed(0)
    layers, table, ffn = bf16_block(4)
    x = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16)

    def chain(block: Callable[..., Tensor], start: Tensor) -> Tensor:
        for layer in layers:
            start = nn.functional.rms_norm(start, (256,))
            start = start + block(ffn, layer, start, table)
        return start

    with torch.no_grad():
        expected = chain(one_after_the_other, x)
        for _ in range(3):
            torch.testing.assert_close(chain(um.ffn_with_memory, x), expected, rtol=0.05, atol=0.05)
        static = torch.zeros_like(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(um.ffn_with_memory, static)
        static.copy_(x)
        for _ in range(3):
            y.fill_(float("nan"))
            graph.replay()
            torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_callers_on_several_streams() -> None:
    torch.manual_seed(0)
    (layer,), table, ffn = bf16_block()
    inputs = [torch.randn(65, 256, device="cuda", dtype=torch.bfloat16) for _ in range(40)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad():
        expected = [um.ffn_with_memory(ffn, layer, x, table) for x in inputs]
        torch.cuda.synchronize()
        actual: list[Tensor] = []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                actual.append(um.ffn_with_memory(ffn, layer, x, table))
        torch.cuda.synchronize()
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_autocast_and_compile_run_one_after_the_other() -> None:
    layer, table = (module.cuda() for module in layer_and_table())
    ffn, x = make_ffn(device="cuda"), tokens(9, 24).cuda()
    layer.eval()
    with torch.no_grad():
        with torch.autocast("cuda", torch.bfloat16):
            expected = one_after_the_other(ffn, layer, x, table)
            assert torch.equal(um.ffn_with_memory(ffn, layer, x, table), expected)
        expected = one_after_the_other(ffn, layer, x, table)
        compiled = torch.compile(um.ffn_with_memory, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ffn, layer, x, table), expected)
