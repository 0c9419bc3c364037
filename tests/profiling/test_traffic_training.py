"""Gradients and steps of the byte model, against real buffers and real optimizers' states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ultramem_cuda import GradientFactors, MemoryTable, UltraMemConfig, UltraMemLayer, ops
from ultramem_cuda.optim import MemoryAdagrad, MemoryAdam, MemorySGD
from ultramem_cuda.profiling import traffic
from ultramem_cuda.profiling.traffic import Bytes, DenseFFN, MemoryLayer, MoEFFN, Recipe

CONFIG = UltraMemConfig(
    d_model=24,
    num_layers=2,
    num_keys=10,
    key_dim=6,
    num_slots=300,
    value_dim=8,
    pre_value_dim=4,
    topk=6,
)
# Of ten tokens.
ENTRIES = 60
ROWS = 30
MAIN_GRAD = Recipe(table_gradient="main_grad")

Make = Callable[[Any], torch.optim.Optimizer]
TABLE_OPTIMIZERS: list[tuple[traffic.Optimizer, Make]] = [
    (traffic.SGD, lambda p: MemorySGD(p, lr=1e-3)),
    (traffic.ADAGRAD, lambda p: MemoryAdagrad(p, lr=1e-3)),
    (traffic.ADAM_BF16, lambda p: MemoryAdam(p, lr=1e-3, state_dtype=torch.bfloat16)),
    (traffic.ADAM_FP32, lambda p: MemoryAdam(p, lr=1e-3)),
    (
        dataclasses.replace(traffic.ADAM_FP32, master_bytes=4),
        lambda p: MemoryAdam(p, lr=1e-3, master_weights=True),
    ),
]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all states but the count of steps."""
    return sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )


def trained_table(make: Make) -> tuple[MemoryTable, torch.optim.Optimizer]:
    """After a step in which every row was retrieved."""
    torch.manual_seed(0)
    table = MemoryTable(ROWS, 8, 4, dtype=torch.bfloat16, grad_mode="deferred")
    optimizer = make(table.parameters())
    out = ops.value_ffn(
        torch.arange(ENTRIES).view(10, 6) % ROWS,
        torch.randn(10, 6, 2),
        table.values,
        table.pre_values,
        torch.randn(10, 4, dtype=torch.bfloat16),
        table_scale=table.scale,
        factors=table.factors,
    )
    out.sum().backward()
    optimizer.step()
    return table, optimizer


@pytest.mark.parametrize(("model", "make"), TABLE_OPTIMIZERS)
def test_steps_against_real_states(model: traffic.Optimizer, make: Make) -> None:
    table, optimizer = trained_table(make)
    weights = sum(p.nbytes for p in table.parameters())
    # Each read and written; with a master copy the weights are only written.
    update = 2 * state_bytes(optimizer) + (1 if model.master_bytes else 2) * weights
    shape = traffic.Table(ROWS, 6, 8, 4, 2)
    recipe = Recipe(table_optimizer=model)
    copies = (8 + 4) * 2

    step = traffic.total(shape.step_terms(ENTRIES, ROWS, recipe))
    assert step.dense == 0
    assert step.gathered == update + ENTRIES * copies
    assert step.distinct == update + 10 * copies
    # Slots, two weights and grad_a; keys of five bits are sorted in one pass.
    assert step.activations == ENTRIES * (4 + 8 + 4) + ENTRIES * 8 * 2
    clipped = traffic.total(shape.step_terms(ENTRIES, ROWS, dataclasses.replace(recipe, clip=True)))
    assert clipped.upper - step.upper == ENTRIES * copies

    # From a float32 gradient of the table's shape: read, and zeroed.
    gradient = sum(p.numel() for p in table.parameters()) * 4
    dense = traffic.total(shape.dense_step_terms(ROWS, recipe))
    assert dense == Bytes(dense=update + 2 * gradient)


@pytest.mark.parametrize(("pre_value_dim", "num_groups"), [(4, 1), (0, 1), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_against_their_buffers(
    pre_value_dim: int, num_groups: int, dtype: torch.dtype
) -> None:
    factors = GradientFactors(50, 8, pre_value_dim, dtype=dtype)
    factors.reserve(256, num_selected=6, num_cores=2, num_groups=num_groups, dtype=dtype)
    table = traffic.Table(50, 6, 8, pre_value_dim, 2, num_groups, activation_bytes=dtype.itemsize)
    written = traffic.total(table.factor_terms(7))
    assert written == Bytes(activations=7 * factors.bytes_per_token)


def test_gradients_into_main_grad() -> None:
    layer = MemoryLayer(CONFIG)
    deferred = traffic.total(layer.terms("backward", 10, touched=25))
    dense = traffic.total(layer.terms("backward", 10, touched=25, recipe=MAIN_GRAD))
    copies = (8 + 4) * 2
    assert dense.dense == deferred.dense
    # Rows of the gradient read and written, in float32; grad_out and pre_input by entry.
    assert dense.distinct - deferred.distinct == 25 * 12 * 4 * 2 + 10 * copies
    assert dense.gathered - deferred.gathered == 25 * 12 * 4 * 2 + ENTRIES * copies
    # Weights and grad_a handed on, keys of nine bits sorted in two passes; no factors.
    handed_on = ENTRIES * 2 * (8 + 4) + ENTRIES * 8 * 2 * 2
    factors = ENTRIES * (4 + 8 + 4) + 10 * copies
    assert dense.activations - deferred.activations == handed_on - factors
    # The step goes over the layer's share of the table, however few rows were touched.
    few, many = (layer.traffic("optimizer", tokens, recipe=MAIN_GRAD) for tokens in (1, 1000))
    assert few == many
    assert few.gathered == few.activations == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clip", [False, True])
def test_dense_steps_against_torchs_states(dtype: torch.dtype, clip: bool) -> None:
    size = dtype.itemsize
    module = UltraMemLayer(CONFIG, 0, dtype=dtype)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    weights = sum(p.nbytes for p in module.parameters())
    adamw = traffic.ADAMW_BF16 if size == 2 else traffic.ADAMW_FP32
    recipe = Recipe(optimizer=adamw, grad_bytes=size, clip=clip)
    layer = MemoryLayer(CONFIG, size, size)
    gradient_reads = 2 if clip else 1
    step = layer.traffic("optimizer", 10, recipe=recipe)
    assert step.dense == 2 * state_bytes(optimizer) + (2 + gradient_reads) * weights
    zeroing = layer.traffic("optimizer", 10, recipe=dataclasses.replace(recipe, accumulate=True))
    assert zeroing.dense == step.dense + weights


def test_accumulated_gradients_are_read_too() -> None:
    accumulate = Recipe(accumulate=True, grad_bytes=4)
    plain = Recipe(grad_bytes=4)
    for layer in (DenseFFN(24, 40), MemoryLayer(CONFIG)):
        added = traffic.total(layer.terms("backward", 10, recipe=accumulate))
        written = traffic.total(layer.terms("backward", 10, recipe=plain))
        parameters = (
            CONFIG.layer_parameters()
            if isinstance(layer, MemoryLayer)
            else layer.active_parameters()
        )
        assert added.dense - written.dense == parameters * 4
        assert added.distinct == written.distinct

    moe = MoEFFN(24, 16, 12, 2)
    # Gradients of experts without tokens are then left as they are.
    added = traffic.total(moe.terms("backward", 3, touched=5, recipe=accumulate))
    written = traffic.total(moe.terms("backward", 3, touched=5, recipe=plain))
    assert added.distinct - written.distinct == 5 * moe.expert_parameters * 4 * 2
    assert written.dense - added.dense == (
        12 * moe.expert_parameters * 4 - moe.router_parameters * 4
    )


def test_wrong_recipes() -> None:
    with pytest.raises(ValueError, match="grad_bytes: must be 2 or 4, got 3"):
        Recipe(grad_bytes=3)
    with pytest.raises(ValueError, match="must be one of deferred, main_grad"):
        Recipe(table_gradient="sparse")  # type: ignore[arg-type]
