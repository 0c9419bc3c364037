"""The layers that are profiled, as they are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import no_host_sync
from torch import Tensor

from ultramem_cuda import UltraMemConfig, UltraMemLayer
from ultramem_cuda.profiling import subjects
from ultramem_cuda.profiling.moe_dispatch import DroplessMoE
from ultramem_cuda.profiling.subjects import (
    FFNWithMemory,
    Runnable,
    SwiGLUFFN,
    make_block,
    make_ffn,
    make_memory,
    make_moe,
)
from ultramem_cuda.profiling.timing import capture

D, INNER, LAYERS = 32, 24, 2

CONFIG = UltraMemConfig(
    d_model=D,
    num_layers=4,
    num_keys=12,
    key_dim=8,
    num_slots=500,
    value_dim=16,
    pre_value_dim=8,
    topk=6,
)
PKM = UltraMemConfig(
    d_model=D,
    num_layers=4,
    num_keys=12,
    key_dim=8,
    num_slots=500,
    value_dim=16,
    topk=6,
    tucker_rank=1,
    num_cores=1,
    mode="additive",
    score_norm="softmax",
)

MAKERS: dict[str, Callable[..., Runnable]] = {
    "ffn": lambda **options: make_ffn(D, INNER, **options),
    "memory": lambda **options: make_memory(CONFIG, **options),
    "pkm": lambda **options: make_memory(PKM, name="pkm", **options),
    "block": lambda **options: make_block(CONFIG, INNER, **options),
    "moe": lambda **options: make_moe(D, INNER, 10, 3, **options),
}
WITH_TABLE = ("memory", "pkm", "block")
every_kind = pytest.mark.parametrize("kind", MAKERS)


def make(kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Runnable:
    torch.manual_seed(0)
    runnable = MAKERS[kind](layers=LAYERS, dtype=dtype, device=device)
    assert runnable.name == kind
    return runnable


def tokens(count: int, runnable: Runnable, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    like = next(runnable.layers.parameters())
    return torch.randn(count, D, generator=generator).to(like.device, like.dtype)


def gradients(runnable: Runnable, layer: int) -> list[Tensor]:
    found = [parameter.grad for parameter in runnable.layers[layer].parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


@every_kind
def test_layers_differ(kind: str) -> None:
    runnable = make(kind)
    assert len(runnable.layers) == LAYERS
    runnable.start_decode()
    x = tokens(5, runnable)
    first, second = runnable.forward(0, x), runnable.forward(1, x)
    assert first.shape == (5, D)
    assert not first.requires_grad
    assert not torch.allclose(first, second)


@every_kind
def test_training_adds_to_gradients_in_place(kind: str) -> None:
    runnable = make(kind)
    x, grad = tokens(5, runnable), tokens(5, runnable, seed=2)
    runnable.start_training(2 * 5)
    places = [p.grad.data_ptr() for p in runnable.layers.parameters() if p.grad is not None]
    assert len(places) == len(list(runnable.layers.parameters()))
    assert not any(gradient.any() for gradient in gradients(runnable, 0))
    runnable.train(0, x, grad)
    once = gradients(runnable, 0)
    assert all(gradient.any() for gradient in once)
    runnable.train(0, x, grad)
    for gradient, single in zip(gradients(runnable, 0), once, strict=True):
        torch.testing.assert_close(gradient, 2 * single)
    assert not any(gradient.any() for gradient in gradients(runnable, 1))
    assert places == [p.grad.data_ptr() for p in runnable.layers.parameters() if p.grad is not None]


@every_kind
def test_training_is_what_autograd_says(kind: str) -> None:
    runnable = make(kind)
    x, grad = tokens(5, runnable), tokens(5, runnable, seed=2)
    runnable.start_training(5)
    runnable.train(1, x, grad)
    layer = runnable.layers[1]
    y = layer(x) if runnable.table is None else layer(x, runnable.table)
    expected = torch.autograd.grad(y, list(layer.parameters()), grad)
    for gradient, wanted in zip(gradients(runnable, 1), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@every_kind
def test_table_is_shared_and_its_factors_are_cleared(kind: str) -> None:
    runnable = make(kind)
    if kind not in WITH_TABLE:
        assert runnable.table is None
        runnable.clear()
        return
    table = runnable.table
    assert table is not None
    assert table.factors is not None
    runnable.start_training(2 * 7)
    assert table.factors.capacity >= 14
    x, grad = tokens(7, runnable), tokens(7, runnable, seed=2)
    for layer in range(LAYERS):
        runnable.train(layer, x, grad)
    assert table.factors.num_tokens == 14
    assert table.values.grad is None
    runnable.clear()
    assert table.factors.num_tokens == 0


@every_kind
def test_decoding_frees_gradients(kind: str) -> None:
    runnable = make(kind)
    x = tokens(3, runnable)
    runnable.start_training(3)
    runnable.train(0, x, torch.ones_like(x))
    runnable.start_decode()
    assert all(parameter.grad is None for parameter in runnable.layers.parameters())
    assert not any(module.training for module in runnable.layers.modules())
    if runnable.table is not None and runnable.table.factors is not None:
        assert runnable.table.factors.num_tokens == 0


def test_memory_layers_have_windows_of_their_own() -> None:
    for kind in ("memory", "pkm"):
        offsets = [layer.addressing.offset for layer in make(kind).layers]
        assert offsets == [CONFIG.layer_window(index)[1] for index in range(LAYERS)]
        assert len(set(offsets)) == LAYERS


def rows_read(memory: UltraMemLayer, x: Tensor) -> int:
    """Distinct rows of the table, from what the layer's retrieval returns."""
    seen = []
    retrieve = memory._retrieve

    def look(query: Tensor) -> tuple[Tensor, Tensor]:
        scores, indices = retrieve(query)
        seen.append(memory.addressing.slots(indices.flatten())[0])
        return scores, indices

    memory._retrieve = look  # type: ignore[method-assign]
    torch.manual_seed(0)
    table = subjects._table(memory.config, {"dtype": x.dtype, "device": x.device})
    memory(x, table)
    del memory._retrieve
    return torch.cat(seen).unique().numel()


@every_kind
@pytest.mark.parametrize("count", [1, 9])
def test_touched(kind: str, count: int) -> None:
    runnable = make(kind)
    runnable.start_decode()
    x = tokens(count, runnable)
    module = runnable.layers[1]
    if isinstance(module, DroplessMoE):
        expected = module.route(x)[1].unique().numel()
        assert count != 1 or expected == 3
    elif kind == "ffn":
        expected = 0
    else:
        memory = module.memory if isinstance(module, FFNWithMemory) else module
        expected = rows_read(memory, x)
        assert count != 1 or expected == CONFIG.topk
        assert memory.usage is None
    assert runnable.touched(1, x) == expected
    if kind in WITH_TABLE:
        assert memory.usage is None


def test_swiglu_is_its_formula() -> None:
    torch.manual_seed(0)
    ffn = SwiGLUFFN(D, INNER, dtype=torch.float64)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    gate, up = ffn.gate_up[:INNER], ffn.gate_up[INNER:]
    torch.testing.assert_close(ffn(x), (F.silu(x @ gate.T) * (x @ up.T)) @ ffn.down.T)


def test_compiled_swiglu_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = []

    def trace(function: Any) -> Any:
        functions.append(function)
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(subjects, "compile_static", trace)
    torch.manual_seed(0)
    plain, compiled = SwiGLUFFN(D, INNER), SwiGLUFFN(D, INNER, compiled=True)
    compiled.load_state_dict(plain.state_dict())
    x = torch.randn(3, D)
    torch.testing.assert_close(compiled(x), plain(x))
    assert functions == [subjects._swiglu]


def test_block_is_ffn_and_memory() -> None:
    runnable = make("block")
    block, table = runnable.layers[0], runnable.table
    x = tokens(4, runnable)
    torch.testing.assert_close(block(x, table), block.ffn(x) + block.memory(x, table))


@pytest.mark.parametrize("kind", WITH_TABLE)
def test_more_layers_than_the_model_has(kind: str) -> None:
    with pytest.raises(ValueError, match=r"layers: must be at most config.num_layers = 4, got 5"):
        MAKERS[kind](layers=5)


@every_kind
def test_no_layers(kind: str) -> None:
    with pytest.raises(ValueError, match="layers: must be at least 1, got 0"):
        MAKERS[kind](layers=0)


# ---- GPU -----------------------------------------------------------------------------------------


def check_same(replayed: list[Tensor], eager: list[Tensor]) -> None:
    for one, other in zip(replayed, eager, strict=True):
        distance = (one.double() - other.double()).norm()
        assert float(distance) <= 1e-2 * float(other.double().norm())


def make_on_gpu(kind: str) -> Runnable:
    runnable = make(kind, torch.bfloat16, "cuda")
    if isinstance(runnable.layers[0], DroplessMoE) and runnable.layers[0].products == "loop":
        pytest.skip("grouped_mm has no kernel for this GPU")
    return runnable


@pytest.mark.gpu
@every_kind
@pytest.mark.parametrize("count", [1, 7, 64])
def test_graphs_replay_what_eager_computes(kind: str, count: int) -> None:
    runnable = make_on_gpu(kind)
    x, grad = tokens(count, runnable), tokens(count, runnable, seed=2)
    runnable.start_decode()
    outputs: list[Tensor] = [runnable.forward(layer, x) for layer in range(LAYERS)]
    expected = [output.clone() for output in outputs]

    def decode(layer: int) -> None:
        outputs[layer] = runnable.forward(layer, x)

    graph = capture([lambda: decode(0), lambda: decode(1)])
    graph.replay()
    check_same(outputs, expected)

    runnable.start_training(2 * LAYERS * count)
    for layer in range(LAYERS):
        runnable.train(layer, x, grad)
    expected = [gradient for layer in range(LAYERS) for gradient in gradients(runnable, layer)]
    runnable.clear()
    graph = capture([lambda: runnable.train(0, x, grad), lambda: runnable.train(1, x, grad)])
    for parameter in runnable.layers.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    runnable.clear()
    graph.replay()
    check_same(
        [gradient for layer in range(LAYERS) for gradient in gradients(runnable, layer)], expected
    )
    if runnable.table is not None and runnable.table.factors is not None:
        assert runnable.table.factors.num_tokens == LAYERS * count


@pytest.mark.gpu
@every_kind
def test_nothing_waits_for_the_gpu(kind: str) -> None:
    runnable = make_on_gpu(kind)
    x, grad = tokens(7, runnable), tokens(7, runnable, seed=2)

    runnable.start_decode()
    runnable.forward(0, x)  # compiles, and fills what eval mode caches
    with no_host_sync():
        runnable.forward(0, x)
    runnable.start_training(14)
    runnable.train(0, x, grad)
    with no_host_sync():
        runnable.train(0, x, grad)
        runnable.clear()
