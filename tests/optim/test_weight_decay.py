"""Weight decay of tables with deferred gradients: of every row, through the table's scale."""

from __future__ import annotations

import copy
import gc
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from factor_cases import (
    OPTIMIZERS,
    Reference,
    deferred_table,
    dense_gradients,
    fill,
    touched_rows,
)
from helpers import Data, array
from torch import Tensor

import ultramem_cuda as um

KINDS = pytest.mark.parametrize("kind", OPTIMIZERS)
MIN_SCALE = 2.0**-8  # csrc/include/ultramem/table_update.h


def options_of(kind: str, **options: Any) -> dict[str, Any]:
    # Adam divides by the size of a gradient that may have cancelled to almost nothing.
    return {"eps": 1e-3, **options} if kind == "adam" else options


def effective(table: um.MemoryTable) -> dict[str, np.ndarray]:
    scale = table.scale.tolist()
    return {
        name: array(p) * s for (name, p), s in zip(table.named_parameters(), scale, strict=False)
    }


class Decayed:
    """A table's parameters in float64, where every step decays every row."""

    def __init__(self, kind: str, table: um.MemoryTable, **options: Any) -> None:
        self.table = table
        self.references = {
            name: Reference(kind, param, **options) for name, param in effective(table).items()
        }

    def step(self, lr: float, weight_decay: float, grad_scale: float = 1.0) -> None:
        grads, rows = dense_gradients(self.table), touched_rows(self.table)
        for name, reference in self.references.items():
            reference.param *= 1.0 - lr * weight_decay
            reference.options["lr"] = lr
            reference.step(grads[name] * grad_scale, rows)

    def check(self, bound: float) -> None:
        for name, mine in effective(self.table).items():
            wanted = self.references[name].param
            error = np.abs(mine - wanted).max() / np.abs(wanted).max()
            assert error <= bound, f"{name}: {error:.1e}"


BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}


@KINDS
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_every_row_decays_at_every_step(
    device_dtype: tuple[str, torch.dtype], kind: str, tensor_lr: bool
) -> None:
    device, dtype = device_dtype
    if dtype not in BOUND:
        pytest.skip("their rounding hides the decay; see below")
    data = Data(0, device)
    table = deferred_table(data, 60, 24, 16, dtype=dtype)
    lr = torch.tensor(0.0, device=device) if tensor_lr else 0.0
    optimizer = OPTIMIZERS[kind](table.parameters(), lr=lr, **options_of(kind, weight_decay=0.3))
    decayed = Decayed(kind, table, **options_of(kind, lr=0.0))
    for step in range(120):
        fill(table, data, 5, 4, cores=2)
        rate = float(np.float32(0.03 * (1.0 - step / 150)))
        if tensor_lr:
            lr.fill_(rate)
        else:
            optimizer.param_groups[0]["lr"] = rate
        decayed.step(rate, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    decayed.check(BOUND[dtype])
    scale = np.prod([1.0 - 0.3 * float(np.float32(0.03 * (1.0 - i / 150))) for i in range(120)])
    assert table.scale.tolist() == pytest.approx([scale, scale], rel=1e-12)
    assert scale < 0.6


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [0.5, 0.25, 1e-4])
def test_a_small_scale_comes_back(device: str, kind: str, dtype: torch.dtype, keep: float) -> None:
    """Weights that nobody touched are then what they were times a power of two, bit for bit."""
    data = Data(1, device)
    table = deferred_table(data, 40, 24, 16, dtype=dtype)
    # Nothing of them is subnormal, in float16 for one return of the scale.
    with torch.no_grad():
        for param in table.parameters():
            param.copy_(param.sign() * (param.abs() + 0.5))
    lr, steps = 0.01, 5 if dtype == torch.float16 else 12
    optimizer = OPTIMIZERS[kind](
        table.parameters(),
        lr=lr,
        **options_of(kind, weight_decay=(1.0 - keep) / lr, stochastic_rounding=False),
    )
    before = effective(table)
    decayed = Decayed(kind, table, **options_of(kind, lr=lr))
    touched = torch.arange(20)
    for step in range(steps):
        fill(table, data, 5, 4, slots=touched)
        exact = 1.0 - lr * ((1.0 - keep) / lr)
        decayed.step(lr, (1.0 - keep) / lr)
        optimizer.step()
        optimizer.zero_grad()
        assert all(MIN_SCALE <= s <= 1.0 for s in table.scale.tolist())
        if dtype == torch.float32:
            decayed.check(1e-6 * (step + 1))
        if exact == keep and (dtype != torch.float16 or keep ** (step + 1) >= 2.0**-10):
            for name, now in effective(table).items():
                np.testing.assert_array_equal(now[20:], before[name][20:] * keep ** (step + 1))
    if dtype != torch.float32:
        decayed.check(steps * torch.finfo(dtype).eps)


@KINDS
def test_a_master_comes_back_too(device: str, kind: str) -> None:
    data = Data(2, device)
    table = deferred_table(data, 40, 24, 16, dtype=torch.bfloat16)
    options = options_of(kind, lr=0.01, weight_decay=75.0, master_weights=True)
    optimizer = OPTIMIZERS[kind](table.parameters(), **options)
    decayed = Decayed(kind, table, **options_of(kind, lr=0.01))
    for step in range(12):
        fill(table, data, 5, 4)
        decayed.step(0.01, 75.0)
        optimizer.step()
        optimizer.zero_grad()
        for i, (name, param) in enumerate(table.named_parameters()):
            master = optimizer.state[param]["master"]
            assert torch.equal(param, master.bfloat16())
            wanted = decayed.references[name].param
            error = np.abs(array(master) * table.scale[i].item() - wanted).max()
            assert error <= 1e-6 * (step + 1) * np.abs(wanted).max()
    with pytest.raises(RuntimeError, match="fold_scale: the master_weights of an optimizer"):
        table.fold_scale()


def test_a_copy_of_a_table_with_a_master_can_be_folded() -> None:
    data = Data(2)
    table = deferred_table(data, 40, 24, dtype=torch.bfloat16)
    optimizer = um.optim.MemorySGD(
        table.parameters(), lr=0.1, weight_decay=1.0, master_weights=True
    )
    fill(table, data, 5, 4)
    optimizer.step()
    expected = effective(table)["values"]
    table.factors = None  # those of tests cannot be copied
    twin = copy.deepcopy(table)
    twin.fold_scale()
    np.testing.assert_array_equal(
        array(twin.values), array(torch.from_numpy(expected).to(torch.bfloat16))
    )
    other = deferred_table(data, 40, 24, dtype=torch.bfloat16)
    other_optimizer = um.optim.MemorySGD(other.parameters())
    other.fold_scale()
    other_optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="fold_scale: the master_weights of an optimizer"):
        other.fold_scale()


def through_torch_save(what: Any) -> Any:
    saved = io.BytesIO()
    torch.save(what, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, through_torch_save])
def test_a_copy_of_a_table_and_its_optimizer_cannot_be_folded(how: Callable[[Any], Any]) -> None:
    data = Data(2)
    table = deferred_table(data, 40, 24, 16, dtype=torch.bfloat16)
    optimizer = um.optim.MemorySGD(
        table.parameters(), lr=0.1, weight_decay=1.0, master_weights=True
    )
    fill(table, data, 5, 4)
    optimizer.step()
    table.factors = None  # those of tests cannot be copied
    for one, two in ((table, optimizer), (optimizer, table)):
        copies = how((one, two))
        twin, theirs = copies if one is table else copies[::-1]
        del copies
        assert theirs.param_groups[0]["params"][0] is twin.values
        with pytest.raises(RuntimeError, match="fold_scale: the master_weights of an optimizer"):
            twin.fold_scale()
        assert twin.scale.tolist() == pytest.approx([0.9, 0.9])
        del theirs
        gc.collect()
        twin.fold_scale()
        assert twin.scale.tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="fold_scale: the master_weights of an optimizer"):
        table.fold_scale()
    del optimizer, one, two
    gc.collect()
    table.fold_scale()
    assert table.scale.tolist() == [1.0, 1.0]


@KINDS
@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("into", ["its own", "deferred, of scale one", "dense"])
def test_masters_load_into_any_scale(
    device: str, kind: str, optimizer_first: bool, into: str
) -> None:
    data = Data(13, device)
    table = deferred_table(data, 40, 24, 16, dtype=torch.bfloat16)
    options = options_of(kind, lr=0.25, weight_decay=3.5, master_weights=True)
    optimizer = OPTIMIZERS[kind](table.parameters(), **options)
    fill(table, data, 5, 4)
    optimizer.step()
    assert table.scale.tolist() == [0.125, 0.125]
    table_state, state = table.state_dict(), optimizer.state_dict()
    assert [s["master_scale"].item() for s in state["state"].values()] == [0.125, 0.125]
    assert all("master_scale" not in s for s in optimizer.state.values())

    dense = um.MemoryTable(40, 24, 16, dtype=torch.bfloat16, device=device)
    if into != "its own":
        dense.load_state_dict(table_state)
        table_state = dense.state_dict()
    other = dense if into == "dense" else deferred_table(data, 40, 24, 16, dtype=torch.bfloat16)
    other_optimizer = OPTIMIZERS[kind](other.parameters(), **options)
    if optimizer_first:
        other_optimizer.load_state_dict(state)
        other.load_state_dict(table_state)
    else:
        other.load_state_dict(table_state)
        other_optimizer.load_state_dict(state)
    again = other_optimizer.state_dict()["state"]
    assert [s["master_scale"].item() for s in again.values()] == [0.125, 0.125]

    before = [p.detach().clone() for p in other.parameters()]
    if into == "dense":
        for param in other.parameters():
            param.grad = torch.zeros_like(param)
    else:
        fill(other, data, 5, 4)
    other_optimizer.param_groups[0].update(lr=0.0)
    other_optimizer.step()
    assert all(map(torch.equal, other.parameters(), before))
    scale = 0.125 if into == "its own" else 1.0
    for param, name in zip(other.parameters(), ("values", "pre_values"), strict=True):
        mine = optimizer.state[getattr(table, name)]["master"] * 0.125
        assert torch.equal(other_optimizer.state[param]["master"] * scale, mine)
    now = other_optimizer.state_dict()["state"]
    assert [s["master_scale"].item() for s in now.values()] == [scale, scale]


def test_a_state_from_before_there_was_a_master_scale() -> None:
    data = Data(14)
    table = deferred_table(data, 40, 24, dtype=torch.bfloat16)
    optimizer = um.optim.MemorySGD(table.parameters(), lr=0.1, master_weights=True)
    fill(table, data, 5, 4)
    optimizer.step()
    state = optimizer.state_dict()
    del state["state"][0]["master_scale"]
    before = optimizer.state[table.values]["master"].clone()
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[table.values]["master"], before)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_decay_a_scale_is_kept_and_heeded(
    device: str, kind: str, dtype: torch.dtype
) -> None:
    data = Data(3, device)
    table = deferred_table(data, 40, 24, 16, dtype=dtype)
    table.scale.copy_(torch.tensor([0.3, 0.7]))
    scale = table.scale.clone()
    options = options_of(kind, lr=0.05)
    optimizer = OPTIMIZERS[kind](table.parameters(), **options, stochastic_rounding=False)
    decayed = Decayed(kind, table, **options)
    for _ in range(3):
        fill(table, data, 5, 4)
        decayed.step(0.05, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    decayed.check(1e-6 if dtype == torch.float32 else 2**-6)
    assert torch.equal(table.scale, scale)


@KINDS
def test_saved_midway(kind: str, device: str) -> None:
    options = options_of(kind, lr=0.01, weight_decay=40.0)  # 0.6 a step: the scale comes back

    def make() -> tuple[um.MemoryTable, torch.optim.Optimizer]:
        table = deferred_table(Data(4, device), 40, 24, 16, dtype=torch.bfloat16)
        return table, OPTIMIZERS[kind](table.parameters(), **options)

    def train(table: um.MemoryTable, optimizer: torch.optim.Optimizer, seed: int) -> None:
        data = Data(seed, device)
        for _ in range(7):
            fill(table, data, 5, 4)
            optimizer.step()
            optimizer.zero_grad()

    table, optimizer = make()
    train(table, optimizer, 5)
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "table": table.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    other, other_optimizer = make()
    other.load_state_dict(loaded["table"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    train(table, optimizer, 6)
    train(other, other_optimizer, 6)
    for mine, theirs in zip(table.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert table.scale.max() > 0.6**14, "it came back"


def test_clipping_sees_gradients_of_effective_weights(device: str) -> None:
    data = Data(7, device)
    table = deferred_table(data, 40, 24, 16)
    table.scale.fill_(0.25)
    decayed = Decayed("sgd", table, lr=0.1)
    optimizer = um.optim.MemorySGD(table.parameters(), lr=0.1, weight_decay=0.5)
    fill(table, data, 5, 4)
    norm = um.optim.clip_grad_norm_(table, 0.5)
    expected = math.sqrt(sum((g**2).sum() for g in dense_gradients(table).values()))
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    decayed.step(0.1, 0.5, 0.5 / expected)
    optimizer.step()
    decayed.check(1e-6)


@KINDS
def test_a_step_that_is_skipped_does_not_decay(device: str, kind: str) -> None:
    data = Data(8, device)
    table = deferred_table(data, 40, 24, 16)
    optimizer = OPTIMIZERS[kind](table.parameters(), lr=0.1, weight_decay=9.99)
    scaler = um.optim.GradScaler(device, init_scale=2.0)
    for bad in (True, False):
        scaler.scale(torch.ones((), device=device))
        fill(table, data, 5, 4)
        if bad:
            table.factors.weights[3] = math.inf
        before = [tensor.clone() for tensor in table.state_dict().values()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = [
            torch.equal(old, new)
            for old, new in zip(before, table.state_dict().values(), strict=True)
        ]
        assert same == [bad] * 3


def test_a_step_without_factors_does_not_decay(device: str) -> None:
    table = deferred_table(Data(9, device), 40, 24, 16)
    um.optim.MemoryAdam(table.parameters(), lr=0.1, weight_decay=1.0).step()
    assert table.scale.tolist() == [1.0, 1.0]


def test_each_parameter_has_its_own(device: str) -> None:
    data = Data(10, device)
    table = deferred_table(data, 40, 24, 16)
    groups = [
        {"params": [table.values], "weight_decay": 0.5},
        {"params": [table.pre_values], "weight_decay": 0.25},
    ]
    optimizer = um.optim.MemoryAdam(groups, lr=0.1)
    fill(table, data, 5, 4)
    optimizer.step()
    assert table.scale.tolist() == pytest.approx([0.95, 0.975], rel=1e-15)
    optimizer.zero_grad()
    table.values.requires_grad_(False)
    fill(table, data, 5, 4)
    optimizer.step()
    assert table.scale.tolist() == pytest.approx([0.95, 0.975**2], rel=1e-15)


@KINDS
def test_decay_that_leaves_nothing_is_refused(kind: str) -> None:
    data = Data(11)
    table = deferred_table(data, 30, 16)
    message = r"weight_decay: lr \* weight_decay must be .* below 1 .* got 0\.5 \* 2\.0"
    for lr in (0.5, torch.tensor(0.5)):
        with pytest.raises(ValueError, match=message):
            OPTIMIZERS[kind](table.parameters(), lr=lr, weight_decay=2.0)
    optimizer = OPTIMIZERS[kind](table.parameters(), lr=0.1, weight_decay=2.0)
    fill(table, data, 5, 4)
    optimizer.param_groups[0]["lr"] = 0.5  # as a scheduler would
    before = table.values.detach().clone()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    optimizer.param_groups[0].update(lr=-0.1)
    with pytest.raises(ValueError, match=r"weight_decay: .* must be at least 0"):
        optimizer.step()
    optimizer.param_groups[0].update(lr=0.1, weight_decay=-5.0)
    with pytest.raises(ValueError, match=r"weight_decay: must be finite and not negative, got -5"):
        optimizer.step()
    assert torch.equal(table.values, before)
    assert table.scale.tolist() == [1.0, 1.0]
    dense = torch.nn.Parameter(torch.ones(2, 2))
    OPTIMIZERS[kind]([dense], lr=0.5, weight_decay=2.0)


def test_a_learning_rate_is_looked_at_in_float32() -> None:
    lr = torch.tensor(1.0 - 1e-9, dtype=torch.float64)
    table = deferred_table(Data(11), 30, 16)
    with pytest.raises(ValueError, match=r"below 1 .* got 1\.0 \* 1\.0"):
        um.optim.MemorySGD(table.parameters(), lr=lr, weight_decay=1.0)


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("lr", [1.0, 1.5, -0.1, math.inf, math.nan])
def test_a_learning_rate_on_a_gpu_that_leaves_nothing_is_skipped(kind: str, lr: float) -> None:
    data = Data(15, "cuda")
    table = deferred_table(data, 40, 24, 16)
    rate = torch.tensor(lr, device="cuda")
    optimizer = OPTIMIZERS[kind](table.parameters(), lr=rate, weight_decay=1.0)
    before = [tensor.clone() for tensor in table.state_dict().values()]
    fill(table, data, 5, 4)
    optimizer.step()
    assert all(map(torch.equal, table.state_dict().values(), before))
    assert optimizer.state[table.values]["step"].item() == 0.0
    rate.fill_(0.5)
    optimizer.step()
    assert table.scale.tolist() == [0.5, 0.5]
    optimizer.param_groups[0]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match="weight_decay: must be finite and not negative"):
        optimizer.step()


def test_decay_of_factors_needs_a_scale() -> None:
    data = Data(16)
    table = um.MemoryTable(40, 24, 16)
    table.grad_mode = "deferred"
    table.factors = deferred_table(data, 40, 24, 16).factors
    fill(table, data, 5, 4)
    optimizer = um.optim.MemorySGD(table.parameters(), lr=0.1, weight_decay=1.0)
    before = table.values.detach().clone()
    with pytest.raises(RuntimeError, match="step: weight_decay of a table with factors needs"):
        optimizer.step()
    assert torch.equal(table.values, before)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert not torch.equal(table.values, before)


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [False, True])
def test_every_device_has_the_same_bits(kind: str, dtype: torch.dtype, master: bool) -> None:
    results: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        # Rows of 1000 columns: more than a pass of the kernel that brings the scale back.
        start = deferred_table(Data(12), 400, 1000, 16, dtype=dtype)
        table = deferred_table(Data(12, device), 400, 1000, 16, dtype=dtype)
        with torch.no_grad():
            for mine, theirs in zip(table.parameters(), start.parameters(), strict=True):
                mine.copy_(theirs)
        optimizer = OPTIMIZERS[kind](
            table.parameters(), lr=0.01, weight_decay=80.0, master_weights=master
        )
        for step in range(8):
            fill(start, Data(step), 5, 4)
            for name in ("slots", "weights", "grad_outs", "grad_a", "pre_inputs"):
                setattr(table.factors, name, getattr(start.factors, name).to(device))
            table.factors.num_selected, table.factors.num_tokens = 4, 5
            optimizer.step()
            optimizer.zero_grad()
        results.append([tensor.cpu() for tensor in table.state_dict().values()])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
