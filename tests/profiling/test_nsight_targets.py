"""What profilers are given to run: that it runs, and that its bytes are those of its tensors."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultramem_cuda import MemoryTable, UltraMemConfig, UltraMemLayer, nvtx
from ultramem_cuda.profiling import traffic
from ultramem_cuda.profiling.nsight import targets
from ultramem_cuda.profiling.nsight.targets import MODELS, SHAPES, TARGETS, Target
from ultramem_cuda.profiling.record import Bytes

CONFIG = UltraMemConfig(
    d_model=64,
    num_layers=1,
    num_keys=32,
    key_dim=16,
    topk=4,
    axis_topk=6,
    pre_value_dim=16,
    value_dim=32,
    num_slots=2048,
)
TOKENS = 24
OURS = [name for name in TARGETS if name != "moe"]


@pytest.fixture
def build(device: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(targets, "COPY_BYTES", 1 << 20)

    def build(name: str) -> Target:
        return TARGETS[name](CONFIG, TOKENS, torch.device(device))

    return build


class Calls(TorchDispatchMode):
    """Arguments and results of every operator of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "ultramem":
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.found[func.__name__.split(".")[0]] = tensors
        return result


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", OURS)
def test_runs_again_and_again(name: str, build: Any) -> None:
    target = build(name)
    for _ in range(3):
        target.run()
    assert target.name == name
    assert target.description
    expected = MODELS[name](CONFIG, TOKENS)
    assert target.model.activations == expected.activations
    assert target.model.dense == expected.dense
    # Drawn here or expected of uniform draws.
    assert target.model.distinct == pytest.approx(expected.distinct, rel=0.1)
    assert target.model_bytes == target.model.upper > 0


@pytest.mark.parametrize("name", ["tucker_query", "product_key_topk"])
def test_bytes_of_operators_are_those_of_their_tensors(name: str, build: Any) -> None:
    target = build(name)
    with Calls() as calls:
        target.run()
    (found,) = calls.found.values()
    if name == "product_key_topk":
        # The core and its filter are a few numbers, and not counted.
        found = [tensor for tensor in found if tensor.numel() > CONFIG.num_cores * 4]
    assert nbytes(*found) == target.model_bytes


def test_bytes_of_value_ffn_are_those_of_its_tensors_and_rows(build: Any) -> None:
    target = build("value_ffn")
    with Calls() as calls:
        target.run()
    indices, scores, values, pre_values, *rest = calls.found["value_ffn"]
    assert nbytes(indices, scores, *rest) == target.model.activations
    assert indices.max() < CONFIG.window
    rows = (values[indices], pre_values[indices])
    assert nbytes(*rows) == target.model.gathered
    distinct = indices.unique()
    assert nbytes(values[distinct], pre_values[distinct]) == target.model.distinct


def test_gather_reads_no_row_twice(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    select = torch.index_select

    def spy(values: Tensor, dim: int, indices: Tensor, *, out: Tensor) -> Tensor:
        found.extend([values, indices, out])
        return select(values, dim, indices, out=out)

    monkeypatch.setattr(torch, "index_select", spy)
    target = build("gather")
    target.run()
    values, indices, out = found
    assert indices.unique().numel() == indices.numel() == TOKENS * CONFIG.slots_per_token
    assert torch.equal(out, values[indices])
    assert target.model_bytes == 2 * nbytes(out) + nbytes(indices)


def test_gather_refuses_more_rows_than_there_are() -> None:
    with pytest.raises(ValueError, match="gather: tokens"):
        TARGETS["gather"](CONFIG, 1000, torch.device("cpu"))


def test_bytes_of_the_layer() -> None:
    layer = UltraMemLayer(CONFIG, 0, dtype=torch.bfloat16)
    model = MODELS["memory_layer"](CONFIG, TOKENS)
    assert model.dense == nbytes(*layer.parameters())
    assert model.activations == 2 * TOKENS * CONFIG.d_model * 2
    training = MODELS["memory_layer_training"](CONFIG, TOKENS)
    assert training.dense == 3 * model.dense
    assert training.gathered == 2 * model.gathered
    table = MemoryTable.from_config(CONFIG, dtype=torch.bfloat16, grad_mode="deferred")
    table.reserve(TOKENS)
    assert table.factors is not None
    vectors = 5 * TOKENS * CONFIG.d_model * 2
    assert training.activations == vectors + TOKENS * table.factors.bytes_per_token


def test_optimizer_step_updates_touched_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[MemoryTable] = []
    make = targets._layer_and_table

    def spy(*arguments: Any) -> tuple[UltraMemLayer, MemoryTable]:
        layer, table = make(*arguments)
        tables.append(table)
        return layer, table

    monkeypatch.setattr(targets, "_layer_and_table", spy)
    target = TARGETS["optimizer_step"](CONFIG, TOKENS, torch.device("cpu"))
    (table,) = tables
    before = table.values.detach().clone()
    for _ in range(3):
        target.run()
    changed = (table.values != before).any(1).sum()
    row_bytes = (CONFIG.value_dim + CONFIG.pre_value_dim) * 2
    assert target.model.distinct == changed * row_bytes * 6


def test_moe_has_the_sizes_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Experts(nn.Module):
        def __init__(self, *sizes: int, dtype: torch.dtype, device: torch.device) -> None:
            super().__init__()
            made.append((sizes, dtype, device))

        def forward(self, x: Tensor) -> Tensor:
            made.append((x.shape, torch.is_grad_enabled()))
            return x

    module = types.ModuleType("moe_dispatch")
    module.DroplessMoE = Experts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ultramem_cuda.profiling.moe_dispatch", module)
    device = torch.device("cpu")
    target = TARGETS["moe"](CONFIG, TOKENS, device)
    target.run()
    assert made == [((2048, 1024, 64, 8), torch.bfloat16, device), ((TOKENS, 2048), False)]
    read = traffic.OLMOE_MOE.forward(TOKENS)
    assert target.model_bytes == read.upper + 2 * TOKENS * 2048 * 2


def test_shapes_are_those_of_the_traffic_model() -> None:
    layer = targets._memory_layer(SHAPES["M"])
    assert layer == traffic.ULTRAMEM_MEMORY
    for config in SHAPES.values():
        for model in MODELS.values():
            assert model(config, 8192).lower > 0


# ---- the command ---------------------------------------------------------------------------------


def test_profiler_sees_the_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def event(name: str) -> Any:
        return lambda *arguments: events.append(" ".join([name, *arguments]))

    monkeypatch.setattr(torch.cuda, "synchronize", event("synchronize"))
    monkeypatch.setattr(torch.cuda.profiler, "start", event("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", event("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", event("push"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", event("pop"))
    monkeypatch.setattr(nvtx, "_is_available", lambda: True)
    target = Target("named", event("run"), Bytes(0.0, 0.0, 0.0, 0.0), "")
    with nvtx.enable(False):
        targets.profile(target, passes=2)
        assert not nvtx.is_enabled()
    begin = events.index("start")
    assert set(events[:begin]) == {"run", "synchronize"}
    assert events[begin - 1] == "synchronize"
    assert events[begin:] == ["start", "push named", "run", "run", "synchronize", "pop", "stop"]


def test_passes_must_be_positive() -> None:
    target = Target("named", lambda: None, Bytes(0.0, 0.0, 0.0, 0.0), "")
    with pytest.raises(ValueError, match="passes"):
        targets.profile(target, passes=0)


def test_command_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert targets.main(["copy"]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["value_ffn", "memory_layer_training", "optimizer_step"])
def test_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main([name, "--shape", "S", "--tokens", "64", "--passes", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ")
