"""What profilers are given to run: that it runs, and that its bytes are those of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import shapes
from ultramem_cuda import MemoryTable, UltraMemConfig, UltraMemLayer, nvtx
from ultramem_cuda.profiling import traffic
from ultramem_cuda.profiling.nsight import targets
from ultramem_cuda.profiling.nsight.targets import MODELS, SHAPES, TARGETS, Target
from ultramem_cuda.profiling.presets import profile_preset
from ultramem_cuda.profiling.record import Bytes
from ultramem_cuda.profiling.subjects import Runnable

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
LAYER = traffic.MemoryLayer(CONFIG)
MOE = traffic.MoEFFN(32, 16, 48, 2)
ROW_BYTES = (CONFIG.value_dim + CONFIG.pre_value_dim) * 2


@pytest.fixture
def build(device: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(targets, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(targets, "_moe_layer", lambda: MOE)

    def build(name: str) -> Target:
        return TARGETS[name](CONFIG, TOKENS, torch.device(device))

    return build


@pytest.fixture
def runnables(monkeypatch: pytest.MonkeyPatch) -> list[Runnable]:
    """Those that targets make."""
    found: list[Runnable] = []

    def spied(make: Callable[..., Runnable]) -> Callable[..., Runnable]:
        def spy(*args: Any, **kwargs: Any) -> Runnable:
            found.append(make(*args, **kwargs))
            return found[-1]

        return spy

    for name in ("make_memory", "make_moe"):
        monkeypatch.setattr(targets, name, spied(getattr(targets, name)))
    return found


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


@pytest.mark.parametrize("name", TARGETS)
def test_runs_again_and_again(name: str, build: Any) -> None:
    target = build(name)
    for _ in range(3):
        target.run()
    assert target.name == name
    assert target.description
    # By its sizes alone it is the same but for the rows or experts that were counted.
    expected = MODELS[name](CONFIG, TOKENS)
    assert target.model.dense == expected.dense
    assert target.model.activations == expected.activations
    assert target.model_bytes == target.model.upper > 0


@pytest.mark.parametrize("name", ["tucker_query", "product_key_topk"])
def test_bytes_of_operators_are_those_of_their_tensors(name: str, build: Any) -> None:
    """What lies between an operator's kernels is written and read."""
    target = build(name)
    with Calls() as calls:
        target.run()
    ((called, found),) = calls.found.items()
    assert called == name
    if name == "tucker_query":
        *_, projection = found
        assert target.model_bytes == nbytes(*found, projection)
        return
    query, keys, core, _, _, scores, indices, axis_indices, axis_scores, _ = found
    # The filter is made of the cores, which are a parameter; grid positions are for a backward.
    cores = CONFIG.num_cores * CONFIG.num_heads * CONFIG.tucker_rank**2
    assert core.numel() == cores
    between = nbytes(axis_indices, axis_scores)
    tensors = nbytes(query, keys, scores, indices) + 2 * between
    assert target.model_bytes == tensors + 2 * (cores + CONFIG.key_dim)


def test_bytes_of_value_ffn_are_those_of_its_tensors_and_rows(build: Any) -> None:
    target = build("value_ffn")
    with Calls() as calls:
        target.run()
    # Pre-activations are for a backward.
    indices, scores, values, pre_values, pre_input, out, _ = calls.found["value_ffn"]
    assert nbytes(indices, scores, pre_input, out) == target.model.activations
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


@pytest.mark.parametrize(("name", "passes"), [("memory_layer", 1), ("memory_layer_training", 2)])
def test_rows_of_the_layer_are_those_that_it_reads(name: str, passes: int, build: Any) -> None:
    target = build(name)
    with Calls() as calls:
        target.run()
    indices, *_ = calls.found["value_ffn"]
    assert indices.numel() == TOKENS * CONFIG.slots_per_token
    assert target.model.gathered == passes * indices.numel() * ROW_BYTES
    assert target.model.distinct == passes * indices.unique().numel() * ROW_BYTES
    assert f" {indices.unique().numel()} rows" in target.description


def test_bytes_of_the_layer() -> None:
    layer = UltraMemLayer(CONFIG, 0, dtype=torch.bfloat16)
    parameters = nbytes(*layer.parameters())
    assert MODELS["memory_layer"](CONFIG, TOKENS) == LAYER.traffic("decode", TOKENS)
    assert MODELS["memory_layer"](CONFIG, TOKENS).dense == parameters
    training = MODELS["memory_layer_training"](CONFIG, TOKENS)
    # Read twice, their gradients added to what is there. Normalised keys are written, read by both
    # passes, and have a gradient that is written and read.
    assert training.dense == 4 * parameters + 5 * nbytes(layer.keys)
    table = MemoryTable.from_config(CONFIG, dtype=torch.bfloat16, grad_mode="deferred")
    table.reserve(TOKENS)
    assert table.factors is not None
    backward = LAYER.terms("backward", TOKENS)
    factors = sum(term.nbytes * term.writes for term in backward if "factors" in term.name)
    assert factors == TOKENS * table.factors.bytes_per_token


def test_training_leaves_the_factors_of_one_pass(build: Any, runnables: list[Runnable]) -> None:
    target = build("memory_layer_training")
    for _ in range(2):
        target.run()
    (runnable,) = runnables
    assert runnable.table is not None
    assert runnable.table.factors is not None
    assert runnable.table.factors.slots.numel() == TOKENS * CONFIG.slots_per_token
    gradients = [p.grad for p in runnable.layers.parameters()]
    assert all(grad is not None and grad.any() for grad in gradients)


def test_optimizer_step_updates_touched_rows_alone(build: Any, runnables: list[Runnable]) -> None:
    target = build("optimizer_step")
    (runnable,) = runnables
    table = runnable.table
    assert table is not None
    before = table.values.detach().clone()
    for _ in range(3):
        target.run()
    changed = int((table.values != before).any(1).sum())
    # A row and its two moments, read and written; each token's grad_out and pre_input, once or by
    # each entry.
    rows, copies = changed * ROW_BYTES * 3 * 2, TOKENS * ROW_BYTES
    assert target.model.distinct == rows + copies
    assert target.model.gathered == rows + copies * CONFIG.slots_per_token
    assert target.model.dense == 0  # the layer's own parameters take no part


def test_moe_counts_the_experts_that_are_used(build: Any, runnables: list[Runnable]) -> None:
    target = build("moe")
    (runnable,) = runnables
    (layer,) = runnable.layers
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    target.run()
    (x,) = inputs
    assert x.shape == (TOKENS, MOE.d_model)
    experts = layer.route(x)[1].unique()
    assert 1 < experts.numel() < MOE.num_experts
    used = nbytes(layer.gate_up[experts], layer.down[experts])
    assert target.model.gathered == target.model.distinct == used
    assert target.model.dense == layer.router.nbytes


def test_moe_is_that_of_the_preset() -> None:
    moe = targets._moe_layer()
    assert moe == profile_preset("1B-7B")["moe"].layer
    assert MODELS["moe"](CONFIG, TOKENS) == moe.traffic("decode", TOKENS)


def test_shapes_are_those_that_are_measured() -> None:
    assert SHAPES.keys() == shapes.SHAPES.keys() - {"cpu"}
    for name, config in SHAPES.items():
        shape = shapes.SHAPES[name]
        assert config.kept_per_axis == shape.axis_topk
        assert config.window == shape.window
        fields = {field.name for field in dataclasses.fields(shape)}
        for field in fields - {"name", "num_tokens", "axis_topk"}:
            assert getattr(config, field) == getattr(shape, field), (name, field)
        for model in MODELS.values():
            assert model(config, shape.num_tokens).lower > 0


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
