"""Rounding up or down at random: unbiased, exact where it can be, reproducible."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from factor_cases import deferred_table, fill
from helpers import Data
from torch import Tensor, nn

import ultramem_cuda as um

NARROW = [torch.bfloat16, torch.float16]
TABLES = pytest.mark.parametrize("dtype", NARROW)


def rounded(
    values: Tensor, dtype: torch.dtype, *, seed: int = 0, steps: int = 1, position: int = 0
) -> Tensor:
    """float32 [rows, columns] in `dtype`, as a step of SGD rounds weights that come from 0."""
    params = [nn.Parameter(torch.zeros(1, 1, device=values.device)) for _ in range(position)]
    param = nn.Parameter(torch.zeros_like(values, dtype=dtype))
    optimizer = um.optim.MemorySGD([*params, param], lr=1.0, seed=seed)
    for _ in range(steps):
        with torch.no_grad():
            param.zero_()
        param.main_grad = -values
        optimizer.step()
    return param.detach()


def neighbours(values: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The largest number of the dtype that is not above, and the smallest that is not below."""
    nearest = torch.from_numpy(values).to(dtype)
    below = torch.nextafter(nearest, torch.full_like(nearest, -math.inf))
    above = torch.nextafter(nearest, torch.full_like(nearest, math.inf))
    low = torch.where(nearest.double() <= torch.from_numpy(values).double(), nearest, below)
    high = torch.where(nearest.double() >= torch.from_numpy(values).double(), nearest, above)
    return low.double().numpy(), high.double().numpy()


@TABLES
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-7, 1e-39])
def test_between_neighbours_and_unbiased(device: str, dtype: torch.dtype, size: float) -> None:
    count = 20_000
    value = np.float32(-1.2345678 * size)
    if dtype == torch.float16 and size < 1e-30:
        pytest.skip("far below half of the smallest float16")
    values = torch.full((count // 40, 40), float(value), device=device)
    results = rounded(values, dtype).double().cpu().numpy()
    low, high = (float(side[0]) for side in neighbours(np.array([value]), dtype))
    assert set(np.unique(results)) <= {low, high}
    share = (float(value) - low) / (high - low)
    seen = (results == high).mean()
    assert abs(seen - share) <= 5 * math.sqrt(max(share * (1 - share), 1e-4) / count)


@TABLES
def test_a_spread_of_numbers(device: str, dtype: torch.dtype) -> None:
    """The mean of 400 roundings of each, against the standard error of its mean."""
    values = Data(0).normal(30, 24) * torch.logspace(-6, 3, 30)[:, None]
    total = np.zeros(values.shape)
    for seed in range(400):
        total += rounded(values.to(device), dtype, seed=seed).double().cpu().numpy()
    low, high = neighbours(values.numpy(), dtype)
    step = high - low
    share = np.where(step > 0, (values.double().numpy() - low) / np.where(step > 0, step, 1), 0)
    deviation = step * np.sqrt(share * (1 - share) / 400)
    error = np.abs(total / 400 - values.double().numpy())
    # Of 720 numbers, none beyond six deviations, or the 2^-16 of a step that float16 loses.
    assert (error <= 6 * deviation + 2e-4 * step).all()
    assert np.sqrt(np.mean((error / (deviation + 1e-30))[deviation > 0] ** 2)) < 1.1


@TABLES
def test_representable_numbers_stay(device: str, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).reshape(-1, 64).to(device)
    results = rounded(values.float(), dtype)
    finite = values.isfinite()
    assert torch.equal(results[finite], values[finite])
    assert torch.equal(results.isnan(), values.isnan())
    assert torch.equal(results[values.isinf()], values[values.isinf()])


@TABLES
def test_the_ends_of_the_range(device: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    above = float(np.nextafter(np.float32(largest), np.float32(np.inf)))
    values = torch.tensor([[largest, -largest, above, -above, math.inf, -math.inf, math.nan, 0.0]])
    results = rounded(values.repeat(64, 1).to(device), dtype).float().cpu()
    assert (results[:, [0, 2]] == largest).all()
    assert (results[:, [1, 3]] == -largest).all()
    assert (results[:, 4] == math.inf).all()
    assert (results[:, 5] == -math.inf).all()
    assert results[:, 6].isnan().all()
    assert (results[:, 7] == 0).all()


def test_float16_overflows_to_infinity(device: str) -> None:
    values = torch.tensor([[65536.0, -1e6]], device=device)
    assert rounded(values, torch.float16).tolist() == [[math.inf, -math.inf]]


@TABLES
def test_what_the_random_numbers_depend_on(device: str, dtype: torch.dtype) -> None:
    values = Data(1).normal(40, 72).to(device)
    base = rounded(values, dtype)
    assert torch.equal(base, rounded(values, dtype))
    # Rows and columns are numbered: what lies beside them does not matter.
    assert torch.equal(base[:7], rounded(values[:7].contiguous(), dtype))
    assert torch.equal(base[:, :33], rounded(values[:, :33].contiguous(), dtype))
    for other in ({"seed": 1}, {"steps": 2}, {"position": 1}):
        assert not torch.equal(base, rounded(values, dtype, **other)), other


def test_neighbouring_numbers_are_independent(device: str) -> None:
    """Pairs of columns, rows and steps: the correlation of their roundings."""
    count = 256
    values = torch.full((count, count), 1.0 + 2**-8, device=device)  # up or down alike
    first = (rounded(values, torch.bfloat16) > 1).double() * 2 - 1
    second = (rounded(values, torch.bfloat16, steps=2) > 1).double() * 2 - 1
    for left, right in (
        (first[:, 1:], first[:, :-1]),
        (first[1:], first[:-1]),
        (first[:, 8:], first[:, :-8]),
        (first, second),
    ):
        assert abs((left * right).mean().item()) <= 5 / count


def test_bfloat16_moments_fall_and_rise(device: str) -> None:
    """v times 0.999 rounded to nearest bfloat16 stays where it is."""
    results: dict[bool, Tensor] = {}
    for stochastic in (False, True):
        param = nn.Parameter(torch.zeros(64, 64, device=device))
        optimizer = um.optim.MemoryAdam(
            [param], lr=0.0, state_dtype=torch.bfloat16, stochastic_rounding=stochastic
        )
        param.grad = torch.ones_like(param)
        optimizer.step()
        start = optimizer.state[param]["exp_avg_sq"].float().mean().item()
        param.grad = torch.zeros_like(param)
        for _ in range(300):
            optimizer.step()
        state = optimizer.state[param]["exp_avg_sq"]
        assert state.dtype == torch.bfloat16
        results[stochastic] = state.float().mean() / start
    assert results[False].item() == 1.0
    assert abs(results[True].item() / 0.999**300 - 1) < 2e-3


def test_small_steps_are_not_lost(device: str) -> None:
    """300 steps of a hundredth of a unit in the last place, of rows that are touched."""
    data = Data(2, device)
    table = deferred_table(data, 30, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        table.values.fill_(1.0)
    optimizer = um.optim.MemorySGD([table.values], lr=1e-2 * 2**-7)
    fill(table, data, 20, 1, slots=torch.arange(20))
    table.factors.weights.fill_(-1.0)
    table.factors.grad_outs.fill_(1.0)
    for _ in range(300):
        optimizer.step()
    mean = table.values[:20].float().mean().item()
    assert abs((mean - 1.0) / (3.0 * 2**-7) - 1) < 0.05
    assert (table.values[20:] == 1).all()


def test_without_it_weights_go_to_the_nearest(device: str) -> None:
    data = Data(3, device)
    param = nn.Parameter(data.normal(9, 21, dtype=torch.bfloat16))
    param.main_grad = data.normal(9, 21)
    expected = (param.detach().float() - param.main_grad).bfloat16()
    um.optim.MemorySGD([param], lr=1.0, stochastic_rounding=False).step()
    assert torch.equal(param.detach(), expected)


@pytest.mark.gpu
@TABLES
@pytest.mark.parametrize("options", [{}, {"seed": -3}, {"steps": 3}])
def test_cuda_draws_the_same_numbers(dtype: torch.dtype, options: dict[str, Any]) -> None:
    values = Data(4).normal(50, 100) * torch.logspace(-8, 4, 50)[:, None]
    cpu = rounded(values, dtype, **options)
    assert torch.equal(cpu, rounded(values.cuda(), dtype, **options).cpu())
