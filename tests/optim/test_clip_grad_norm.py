"""One norm over network gradients and tables' factors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from factor_cases import deferred_table, dense_gradients, fill
from helpers import Data, array
from torch import nn

import ultramem_cuda as um


class Case:
    """A model with a deferred table, and the same with dense gradients of its own."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, cores: int = 2) -> None:
        data = Data(0, device)
        self.model = nn.Module()
        self.model.table = deferred_table(data, 40, 24, 16, dtype=dtype)
        self.model.linear = nn.Linear(6, 5, device=device, dtype=dtype)
        slots = torch.cat([data.integers(40, 200).cpu(), torch.full((1200,), 3)])
        fill(self.model.table, data, 350, 4, slots=slots, cores=cores)
        self.grads = list(dense_gradients(self.model.table).values())
        for param in self.model.linear.parameters():
            param.grad = data.normal(*param.shape, dtype=dtype)
            self.grads.append(array(param.grad).copy())
        self.norm = math.sqrt(sum((grad**2).sum() for grad in self.grads))

    @property
    def table(self) -> um.MemoryTable:
        return self.model.table

    def moves(self) -> list[np.ndarray]:
        """What a step of learning rate 1 takes away."""
        params = [*self.table.parameters(), *self.model.linear.parameters()]
        before = [array(param).copy() for param in params]
        um.optim.MemorySGD(params, lr=1.0).step()
        return [old - array(param) for param, old in zip(params, before, strict=True)]


@pytest.mark.parametrize("max_norm", [0.0, 1.5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_and_table_together(device: str, dtype: torch.dtype, max_norm: float) -> None:
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is offered on the CPU")
    case = Case(device, dtype)
    norm = um.optim.clip_grad_norm_(case.model, max_norm)
    assert norm.dtype == dtype
    assert norm.device.type == device
    assert norm.item() == pytest.approx(case.norm, rel=1e-6)
    coefficient = min(1.0, max_norm / (case.norm + 1e-6))
    for moved, grad in zip(case.moves(), case.grads, strict=True):
        bound = 1e-5 * np.abs(grad).max() * max(coefficient, 1e-3)
        assert np.abs(moved - coefficient * grad).max() <= max(bound, 5e-7)


def test_bfloat16_gradients_are_summed_in_float32(device: str) -> None:
    case = Case(device, torch.bfloat16)
    norm = um.optim.clip_grad_norm_(case.model, 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(case.norm, rel=1e-6)


def test_it_is_torchs_without_tables(device: str) -> None:
    data = Data(1, device)
    params = [nn.Parameter(data.normal(*shape)) for shape in [(3, 4), (7,), ()]]
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    for param, twin in zip(params, twins, strict=True):
        param.grad = data.normal(*param.shape)
        twin.grad = param.grad.clone()
    params.append(nn.Parameter(data.normal(2)))  # without a gradient
    norm = um.optim.clip_grad_norm_(params, 0.7)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twins, 0.7))
    for param, twin in zip(params, twins, strict=False):
        torch.testing.assert_close(param.grad, twin.grad)


def test_ways_to_name_the_tables(device: str) -> None:
    whole = um.optim.clip_grad_norm_(Case(device).model, 1.0)
    case = Case(device)
    linear = list(case.model.linear.parameters())
    assert um.optim.clip_grad_norm_(linear, 1.0, tables=[case.table]) == whole
    case = Case(device)
    assert um.optim.clip_grad_norm_(case.model, 1.0, tables=[case.table, case.table]) == whole
    case = Case(device)
    assert um.optim.clip_grad_norm_(list(case.model.parameters()), 1.0) == whole
    case = Case(device)
    only = um.optim.clip_grad_norm_(case.table.parameters(), 1.0)
    squares = sum((grad**2).sum() for grad in case.grads[:2])
    assert only.item() == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_frozen_parameters_do_not_count(device: str) -> None:
    case = Case(device)
    case.table.pre_values.requires_grad_(False)
    norm = um.optim.clip_grad_norm_(case.model, 1.0)
    assert norm.item() == pytest.approx(math.sqrt(case.norm**2 - (case.grads[1] ** 2).sum()))


def test_entries_of_a_slot_that_cancel(device: str) -> None:
    """The rows are summed before they are squared."""
    data = Data(2, device)
    table = deferred_table(data, 40, 8)
    fill(table, data, 2, 1, slots=torch.tensor([5, 5]))
    table.factors.weights = torch.tensor([[1.0], [-1.0]], device=device)
    table.factors.grad_outs[1] = table.factors.grad_outs[0]
    assert um.optim.clip_grad_norm_(table, 1.0).item() == 0.0


def test_a_second_call_sees_clipped_gradients(device: str) -> None:
    case = Case(device)
    um.optim.clip_grad_norm_(case.model, 2.0)
    assert um.optim.clip_grad_norm_(case.model, 0.5).item() == pytest.approx(2.0, rel=1e-5)
    assert um.optim.clip_grad_norm_(case.model, 0.5).item() == pytest.approx(0.5, rel=1e-5)
    size = math.sqrt(sum((moved**2).sum() for moved in case.moves()))
    assert size == pytest.approx(0.5, rel=1e-5)


def test_no_gradients() -> None:
    data = Data(3)
    table = deferred_table(data, 40, 8)
    assert um.optim.clip_grad_norm_([], 1.0).item() == 0.0
    assert um.optim.clip_grad_norm_(table, 1.0).item() == 0.0
    fill(table, data, 0, 3)
    assert um.optim.clip_grad_norm_(table, 1.0).item() == 0.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_norms_that_are_not_finite(device: str, value: float) -> None:
    case = Case(device)
    case.table.factors.grad_outs[0] = value
    with pytest.raises(RuntimeError, match="total norm of the gradients is"):
        um.optim.clip_grad_norm_(case.model, 1.0, error_if_nonfinite=True)
    assert not um.optim.clip_grad_norm_(case.model, 1.0).isfinite()


def test_main_grad_counts_and_is_scaled(device: str) -> None:
    param = nn.Parameter(torch.zeros(1, 2, dtype=torch.bfloat16, device=device))
    param.main_grad = torch.tensor([[3.0, 4.0]], device=device)
    assert um.optim.clip_grad_norm_(param, 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(param.main_grad.cpu(), torch.tensor([[0.6, 0.8]]))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="max_norm: must not be negative"):
        um.optim.clip_grad_norm_([], -1.0)
    with pytest.raises(ValueError, match="must have grad_mode='deferred'"):
        um.optim.clip_grad_norm_([], 1.0, tables=[um.MemoryTable(4, 8)])
