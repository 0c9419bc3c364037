"""Steps in a CUDA graph: what they compute, and what they refuse.

A step that is being captured sees factors of the whole capacity and counts nothing on the host. On
the CPU the same is done by telling the package that a graph is being captured while the operators
run as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ultramem_cuda as um
from ultramem_cuda import _retrieval_cache, factors
from ultramem_cuda.optim import _table_gradient, memory

OPTIMIZERS = [um.optim.MemoryAdam, um.optim.MemoryAdagrad, um.optim.MemorySGD]
TOKENS = 7


def config() -> um.UltraMemConfig:
    return um.UltraMemConfig(
        d_model=16,
        num_layers=2,
        num_keys=12,
        key_dim=8,
        topk=6,
        axis_topk=6,
        num_slots=200,
        pre_value_dim=8,
        value_dim=16,
    )


class Memory(nn.Module):
    """Two layers that share a table; only the table trains where it is deferred."""

    def __init__(self, device: str, grad_mode: str = "deferred") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = um.MemoryTable.from_config(config(), grad_mode=grad_mode)
        self.layers = nn.ModuleList(um.UltraMemLayer(config(), i) for i in range(2))
        self.layers.requires_grad_(False)
        self.to(device)
        if grad_mode == "deferred":
            self.table.reserve(2 * TOKENS, config())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x, self.table) for layer in self.layers]).square().mean()


def batches(device: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(TOKENS, 16, generator=generator).to(device) for _ in range(count)]


def assert_same_table(a: um.MemoryTable, b: um.MemoryTable) -> None:
    for mine, other in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(mine, other)
    if a.scale is not None:
        assert torch.equal(a.scale, b.scale)


@contextlib.contextmanager
def as_if_captured(monkeypatch: pytest.MonkeyPatch, number: int = 1) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in (factors, memory):
            patch.setattr(module, "is_capturing", lambda device: True)
        patch.setattr(_table_gradient, "capture_id", lambda device: number)
        yield


# ---- what a step computes -----------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("clipped", [False, True])
def test_a_step_over_the_capacity_is_one_over_what_is_held(
    monkeypatch: pytest.MonkeyPatch, make: Any, clipped: bool
) -> None:
    """Bit for bit, though memory beyond the held tokens is full of what earlier steps left."""
    eager, captured = Memory("cpu"), Memory("cpu")
    optimizers = [make(m.table.parameters(), lr=1e-2, weight_decay=1.0) for m in (eager, captured)]
    norms: list[list[Tensor]] = [[], []]
    for step, x in enumerate(batches("cpu", 4)):
        x = x[: TOKENS if step == 0 else TOKENS - step]
        for i, (model, optimizer) in enumerate(zip((eager, captured), optimizers, strict=True)):
            model(x).backward()
            replayed = i == 1 and step > 0
            around = as_if_captured(monkeypatch, step) if replayed else contextlib.nullcontext()
            with around:
                if clipped:
                    norms[i].append(um.optim.clip_grad_norm_(model, 1e-4))
                optimizer.step()
                optimizer.zero_grad()
    assert_same_table(captured.table, eager.table)
    for a, b in zip(*norms, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)
    assert captured.table.factors.num_tokens == 0


def test_tokens_without_room_stop_a_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot raise; and clearing must not hide what check() has to tell."""
    model = Memory("cpu")
    optimizer = um.optim.MemoryAdam(model.table.parameters(), lr=1e-2, weight_decay=1.0)
    (x,) = batches("cpu", 1)
    model(x).backward()
    optimizer.step()
    before = [p.detach().clone() for p in (*model.table.parameters(), model.table.scale)]
    arena = model.table.factors.arena
    with as_if_captured(monkeypatch):
        arena[8:16].view(torch.int64).fill_(3)
        optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    for was, now in zip(before, (*model.table.parameters(), model.table.scale), strict=True):
        assert torch.equal(was, now)
    with pytest.raises(RuntimeError, match="3 tokens did not fit"):
        model.table.factors.check()
    optimizer.zero_grad()
    model.table.factors.check()


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
def test_state_must_be_there(monkeypatch: pytest.MonkeyPatch, grad_mode: str) -> None:
    model = Memory("cpu", grad_mode)
    optimizer = um.optim.MemoryAdam(model.table.parameters())
    (x,) = batches("cpu", 1)
    model(x).backward()
    with as_if_captured(monkeypatch), pytest.raises(RuntimeError, match="step once before"):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()


def test_a_learning_rate_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Memory("cpu")
    optimizer = um.optim.MemorySGD(model.table.parameters(), lr=torch.tensor(0.1))
    (x,) = batches("cpu", 1)
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
    with as_if_captured(monkeypatch), pytest.raises(ValueError, match="lr: must be on the GPU"):
        optimizer.step()


def test_a_gradient_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Memory("cpu")
    optimizer = um.optim.MemorySGD(model.table.parameters())
    (x,) = batches("cpu", 1)
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.found_inf = torch.zeros(())
    with as_if_captured(monkeypatch), pytest.raises(RuntimeError, match="GradScaler"):
        optimizer.step()


@pytest.mark.parametrize("captures", [(0, 1), (1, 0), (1, 2)])
def test_clipping_and_step_belong_to_one_graph(
    monkeypatch: pytest.MonkeyPatch, captures: tuple[int, int]
) -> None:
    """Else a step would take another graph's clipping, or none."""
    model = Memory("cpu")
    optimizer = um.optim.MemorySGD(model.table.parameters())
    (x,) = batches("cpu", 1)
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(x).backward()

    def during(number: int) -> contextlib.AbstractContextManager[None]:
        return as_if_captured(monkeypatch, number) if number else contextlib.nullcontext()

    with during(captures[0]):
        um.optim.clip_grad_norm_(model, 1.0)
    with during(captures[1]), pytest.raises(RuntimeError, match="zero_grad\\(\\) before and after"):
        optimizer.step()
    optimizer.zero_grad()
    model(x).backward()
    optimizer.step()


def test_a_backward_after_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Memory("cpu")
    optimizer = um.optim.MemorySGD(model.table.parameters())
    (x,) = batches("cpu", 1)
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(x).backward()
    with as_if_captured(monkeypatch):
        um.optim.clip_grad_norm_(model, 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(um.GradientFactors, "appends", property(lambda self: 5))
            with pytest.raises(RuntimeError, match="a backward was captured after clipping"):
                optimizer.step()


def test_what_is_not_known_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Memory("cpu")
    held = model.table.factors
    with as_if_captured(monkeypatch):
        for ask in (lambda: held.num_tokens, held.check):
            with pytest.raises(RuntimeError, match="not known while a CUDA graph is captured"):
                ask()
        assert held.slots.shape[0] == held.capacity * held.num_selected
        assert (held.slots == -1).all()
        assert held.slots.dtype == torch.int32
    assert held.slots.shape[0] == 0


# ---- graphs --------------------------------------------------------------------------------------


def capture(run: Any) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
def test_whole_step_in_a_graph(make: Any, grad_mode: str) -> None:
    """Replays are the eager steps, with a learning rate that changes between them."""
    eager, captured = Memory("cuda", grad_mode), Memory("cuda", grad_mode)
    lrs = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    optimizers = [
        make(m.table.parameters(), lr=lr, weight_decay=0.1)
        for m, lr in zip((eager, captured), lrs, strict=True)
    ]
    inputs = batches("cuda", 6)
    x = inputs[0].clone()

    def step(model: Memory, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).backward()
        um.optim.clip_grad_norm_(model, 1e-3)
        optimizer.step()

    graph = capture(lambda: step(captured, optimizers[1], x))
    step(eager, optimizers[0], inputs[0])
    for number, batch in enumerate(inputs[1:]):
        for lr in lrs:
            lr.fill_(1e-2 / (number + 1))
        x.copy_(batch)
        graph.replay()
        step(eager, optimizers[0], batch)
    # Not to the bit: squares are added in an order that may follow the number of entries.
    for a, b in zip(captured.table.parameters(), eager.table.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    if grad_mode == "deferred":
        assert captured.table.factors.num_tokens == 2 * TOKENS
        captured.table.factors.check()


@pytest.mark.gpu
def test_a_graph_that_clears_at_its_end() -> None:
    model = Memory("cuda")
    optimizer = um.optim.MemoryAdam(model.table.parameters())
    (x,) = batches("cuda", 1)

    def step() -> None:
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    graph = capture(step)
    before = model.table.values.detach().clone()
    graph.replay()
    assert model.table.factors.num_tokens == 0
    assert not torch.equal(model.table.values, before)
    # A graph whose backward appends and clears nothing leaves its tokens to an eager step.
    eager = capture(lambda: model(x).backward())
    model.table.zero_grad()
    eager.replay()
    assert model.table.factors.num_tokens == 2 * TOKENS
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.gpu
def test_overflow_in_a_graph_changes_nothing() -> None:
    model = Memory("cuda")
    optimizer = um.optim.MemoryAdam(model.table.parameters(), weight_decay=0.1)
    (x,) = batches("cuda", 1)

    def step() -> None:
        model(x).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(256 // (2 * TOKENS)):  # the capacity, in replays
        graph.replay()
    before = model.table.values.detach().clone()
    graph.replay()
    assert torch.equal(model.table.values, before)
    with pytest.raises(RuntimeError, match="did not fit"):
        model.table.factors.check()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_of_torch_step_a_dense_table_in_a_graph(make: Any) -> None:
    eager, captured = Memory("cuda", "dense"), Memory("cuda", "dense")
    options = {"capturable": True} if make is torch.optim.AdamW else {}
    optimizers = [make(m.table.parameters(), lr=1e-2, **options) for m in (eager, captured)]
    (x,) = batches("cuda", 1)

    def step(model: Memory, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    graph = capture(lambda: step(captured, optimizers[1]))
    graph.replay()
    for _ in range(2):
        step(eager, optimizers[0])
    for a, b in zip(captured.table.parameters(), eager.table.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_arena_has_an_address_for_good() -> None:
    """What torch.compile(mode="reduce-overhead") asks of an input that a graph writes to."""
    marked = torch.empty(1)
    torch._dynamo.mark_static_address(marked, guard=False)
    attributes = {name: value for name, value in vars(marked).items() if "static" in name}
    arena = vars(Memory("cpu").table.factors.arena)
    assert attributes.items() <= arena.items()


def test_no_capture_on_the_cpu() -> None:
    assert _retrieval_cache.capture_id(torch.device("cpu")) == 0
