"""NVTX ranges: which there are, that they nest and end, and that nobody gets them unasked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Data
from torch import Tensor, nn

from ultramem_cuda import MemoryTable, SlotAddressing, UltraMemConfig, UltraMemLayer, nvtx, ops
from ultramem_cuda.optim import MemoryAdam, MemorySGD, clip_grad_norm_

CONFIG = UltraMemConfig(
    d_model=24,
    num_layers=1,
    num_keys=16,
    key_dim=8,
    topk=4,
    pre_value_dim=12,
    value_dim=16,
    num_slots=256,
)
LAYER_FORWARD = (
    "UltraMemLayer fwd",
    [
        ("ultramem::tucker_query fwd", []),
        ("ultramem::product_key_topk fwd", [("ultramem::rms_norm fwd", [])]),
        ("ultramem::value_ffn fwd", []),
    ],
)
LAYER_BACKWARD = [
    ("ultramem::value_ffn bwd", []),
    ("ultramem::product_key_topk bwd", []),
    ("ultramem::rms_norm bwd", []),
    ("ultramem::tucker_query bwd", []),
]

Tree = list[tuple[str, Any]]


class Recorder:
    """Stands in for torch's functions and keeps the ranges of each thread as a tree."""

    def __init__(self) -> None:
        self.threads: dict[int, list[Tree]] = {}

    def stack(self) -> list[Tree]:
        return self.threads.setdefault(threading.get_ident(), [[]])

    def push(self, name: str) -> None:
        stack = self.stack()
        stack[-1].append((name, []))
        stack.append(stack[-1][-1][1])

    def pop(self) -> None:
        self.stack().pop()
        assert self.stack(), "a pop without its push"

    def take(self) -> Tree:
        """The ranges of this thread so far, all of which must have ended."""
        (tree,) = self.threads.pop(threading.get_ident(), [[]])
        return tree


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """torch's NVTX, recorded; the switch is off before and after."""
    found = Recorder()
    monkeypatch.setattr(nvtx, "_is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", found.push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", found.pop)
    with nvtx.enable(False):
        yield found


def names(tree: Tree) -> set[str]:
    return {name for name, _ in tree}.union(*(names(inner) for _, inner in tree))


class Model(nn.Module):
    def __init__(self, device: str, grad_mode: str = "dense") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = MemoryTable.from_config(CONFIG, device=device, grad_mode=grad_mode)
        self.layer = UltraMemLayer(CONFIG, 0, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.table)


def tokens(device: str) -> Tensor:
    return Data(1, device).normal(5, 24, requires_grad=True)


def test_off_unless_asked_for(recorder: Recorder, device: str) -> None:
    model = Model(device, "deferred")
    optimizer = MemoryAdam(model.parameters())
    model(tokens(device)).sum().backward()
    clip_grad_norm_(model, 1.0)
    optimizer.step()
    assert not nvtx.is_enabled()
    assert recorder.threads == {}


def test_layer_and_step(recorder: Recorder) -> None:
    model = Model("cpu", "deferred")
    optimizer = MemoryAdam(model.table.parameters())
    nvtx.enable()
    y = model(tokens("cpu"))
    assert recorder.take() == [LAYER_FORWARD]
    y.sum().backward()
    assert recorder.take() == LAYER_BACKWARD
    clip_grad_norm_(model.table, 1.0)
    squares = "ultramem::table_grad_sum_sq"
    assert recorder.take() == [
        ("clip_grad_norm_", [(squares, [("ultramem::table_group", [])]), (squares, [])])
    ]
    optimizer.step()
    update = ("ultramem::table_update", [])
    assert recorder.take() == [("MemoryAdam step", [update, update])]
    assert model.table.factors is not None
    model.table.factors.grad_norm()
    assert recorder.take() == [("GradientFactors.grad_norm", [])]


def test_every_operator_both_ways(recorder: Recorder) -> None:
    data = Data(2)
    query = data.normal(6, 2, 1, 2, 8, requires_grad=True)
    keys = data.normal(1, 2, 2, 16, 8, requires_grad=True)
    core = data.cores(2, 1, 2, requires_grad=True)
    with nvtx.enable():
        u, t, sigma = ops.tucker_filter(core)
        _, _, kept = ops.product_key_topk(
            query, keys, core, topk=4, u=u, t=t, return_axis_indices=True
        )
        loss = sigma.sum() + ops.key_balance_loss(query, keys, kept, u=u, t=t).sum()
        loss = loss + Model("cpu")(tokens("cpu")).sum()
        loss.backward()
        addressing = SlotAddressing(256, 256, shuffle="feistel")
        ops.value_slots(data.integers(256, 5), addressing.placement(), addressing=addressing)
    expected = {f"ultramem::{op} {way}" for op in ops.__all__ for way in ("fwd", "bwd")}
    expected.remove("ultramem::value_slots bwd")  # of indices there is none
    assert names(recorder.take()) - {"UltraMemLayer fwd"} == expected


def test_steps_bear_the_name_of_the_class(recorder: Recorder) -> None:
    class Mine(MemorySGD):
        pass

    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2)
    with nvtx.enable():
        Mine([parameter]).step()
    assert recorder.take() == [("Mine step", [("ultramem::table_update", [])])]


def test_ranges_end_where_something_raises(recorder: Recorder) -> None:
    model = Model("cpu")
    with nvtx.enable():
        with pytest.raises(ValueError, match="last dimension"):
            model(torch.ones(2, 3))
        with pytest.raises(RuntimeError, match="value_ffn"):
            ops.value_ffn(torch.full((1, 1), 9), torch.ones(1, 1, 1), torch.ones(4, 2))
        y = model(tokens("cpu"))
        recorder.take()
        with pytest.raises(RuntimeError, match="twice"):
            torch.autograd.grad(y.sum(), list(model.parameters()), create_graph=True)[
                0
            ].sum().backward()
    recorder.take()


def test_turned_inside_a_range(recorder: Recorder) -> None:
    @nvtx.annotate("outer")
    def turn(on: bool) -> None:
        nvtx.enable(on)

    turn(True)
    assert recorder.take() == []
    turn(False)
    assert recorder.take() == [("outer", [])]
    assert not nvtx.is_enabled()


def test_switch_goes_back(recorder: Recorder) -> None:
    with nvtx.enable():
        assert nvtx.is_enabled()
        with nvtx.enable(False):
            assert not nvtx.is_enabled()
        assert nvtx.is_enabled()
    assert not nvtx.is_enabled()


def test_torch_without_nvtx_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvtx, "_is_available", lambda: False)
    nvtx._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="has no NVTX"):
        nvtx.enable()
    assert not nvtx.is_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nvtx.enable()
    Model("cpu")(tokens("cpu"))  # where a push would raise


@pytest.mark.parametrize("value", ["1", "0", None])
def test_environment(value: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "ULTRAMEM_NVTX"}
    if value is not None:
        environment["ULTRAMEM_NVTX"] = value
    code = "from ultramem_cuda import nvtx; print(nvtx.is_enabled())"
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    )
    available = nvtx._is_available()
    assert result.stdout.strip() == str(value == "1" and available)
    assert ("has no NVTX" in result.stderr) == (value == "1" and not available)


# ---- compiled code -------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])
def test_compiled_code_has_none_and_is_not_compiled_again(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    torch._dynamo.reset()
    if not told:  # torch 2.11 traces backwards without saying that it compiles
        context = "_compile_session_context"
        monkeypatch.setattr(torch.compiler, context, contextlib.nullcontext, raising=False)
    model, x = Model("cpu"), tokens("cpu")
    expected = torch.autograd.grad(model(x).sum(), x)
    compilations = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for on in (True, False, True):
        with nvtx.enable(on):
            torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), expected)
    assert recorder.take() == []
    assert compilations == 1


@pytest.mark.parametrize("strict", [True, False])
def test_exported_code_has_none(recorder: Recorder, strict: bool) -> None:
    torch._dynamo.reset()
    model, x = Model("cpu").requires_grad_(False), tokens("cpu").detach()
    with nvtx.enable():
        exported = torch.export.export(model, (x,), strict=strict).module()
        assert recorder.take() == []
        torch.testing.assert_close(exported(x), model(x))
    assert recorder.take() == [LAYER_FORWARD]


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_backward_is_in_ranges_of_the_thread_that_runs_it(recorder: Recorder) -> None:
    model = Model("cuda")
    with nvtx.enable():
        y = model(tokens("cuda"))
        assert recorder.take() == [LAYER_FORWARD]
        y.sum().backward()
    assert recorder.take() == []
    (stack,) = recorder.threads.values()
    assert stack == [LAYER_BACKWARD]


@pytest.mark.gpu
def test_graph_capture_with_ranges() -> None:
    """With torch's own NVTX."""
    model, x = Model("cuda"), tokens("cuda").detach()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), nvtx.enable():
        expected = model(x)
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
    assert torch.equal(y, expected)
