"""MemoryAdam and its like as torch.optim.Optimizers: options, schedulers, scaling, saving."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from factor_cases import OPTIMIZERS, deferred_table, dense_gradients, fill
from helpers import Data, array
from torch import Tensor, nn

import ultramem_cuda as um

KINDS = pytest.mark.parametrize("kind", OPTIMIZERS)


def copied(table: um.MemoryTable) -> list[Tensor]:
    return [param.detach().clone() for param in table.parameters()]


def unchanged(table: um.MemoryTable, before: list[Tensor]) -> bool:
    return all(torch.equal(p, old) for p, old in zip(table.parameters(), before, strict=True))


# ---- saving --------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_dict_round_trip(kind: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 0.01, "seed": 3, "master_weights": kind == "sgd"}
    if kind == "adam":
        options["state_dtype"] = torch.bfloat16

    def make() -> tuple[um.MemoryTable, nn.Parameter, torch.optim.Optimizer]:
        data = Data(0)
        table = deferred_table(data, 30, 24, 16, dtype=dtype)
        dense = nn.Parameter(data.normal(5, 3, dtype=dtype))
        return table, dense, OPTIMIZERS[kind]([*table.parameters(), dense], **options)

    def train(
        table: um.MemoryTable, dense: nn.Parameter, optimizer: torch.optim.Optimizer, seed: int
    ) -> None:
        data = Data(seed)
        for _ in range(3):
            fill(table, data, 7, 4)
            dense.grad = data.normal(5, 3, dtype=dtype)
            optimizer.step()
            optimizer.zero_grad()

    table, dense, optimizer = make()
    train(table, dense, optimizer, 1)
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "table": table.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)

    other_table, other_dense, other = make()
    other_table.load_state_dict(loaded["table"])
    with torch.no_grad():
        other_dense.copy_(dense)
    other.load_state_dict(loaded["optimizer"])
    params = [*table.parameters(), dense]
    other_params = [*other_table.parameters(), other_dense]
    states, other_states = optimizer.state_dict()["state"], other.state_dict()["state"]
    for state, other_state in zip(states.values(), other_states.values(), strict=True):
        assert state.keys() == other_state.keys()
        for name, value in state.items():
            assert other_state[name].dtype == value.dtype
            assert torch.equal(other_state[name], value)

    train(table, dense, optimizer, 2)
    train(other_table, other_dense, other, 2)
    for param, other_param in zip(params, other_params, strict=True):
        assert torch.equal(param, other_param)
    # The loaded tensors are the optimizer's own.
    assert loaded["optimizer"]["state"][0]["step"].item() == 3


@KINDS
def test_deepcopy_goes_on_alike(kind: str) -> None:
    data = Data(1)
    param = nn.Parameter(data.normal(6, 8))
    optimizer = OPTIMIZERS[kind]([param], lr=0.1)
    param.grad = data.normal(6, 8)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (twin_param,) = twin.param_groups[0]["params"]
    twin_param.grad = param.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(param, twin_param)


# ---- groups and schedules ------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, data: Data) -> None:
        super().__init__()
        self.table = deferred_table(data, 30, 16, 8)
        self.linear = nn.Linear(8, 8, device=data.device)


def test_param_groups_and_their_learning_rates(device: str) -> None:
    data = Data(2, device)
    model = Model(data)
    groups = um.optim.param_groups(model, 1e-2, 4.0, weight_decay=0.1)
    optimizer = um.optim.MemoryAdam(groups)
    lambdas = um.optim.lr_lambdas(optimizer.param_groups, lambda step: 1.0, max_steps=10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas)
    twin = um.optim.MemorySGD([{"params": [nn.Parameter(data.normal(30, 16))], "lr": 1.0}], lr=1e-2)
    assert twin.param_groups[0]["lr"] == 1.0
    for step in range(3):
        fill(model.table, data, 5, 4)
        for param in model.linear.parameters():
            param.grad = torch.ones_like(param)
        before = copied(model.table)
        optimizer.step()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["network"] == 1e-2
        assert rates["memory"] == pytest.approx(
            1e-2 * um.optim.value_lr_factor(step, times=4.0, max_steps=10)
        )
        if step == 0:  # Adam's first step is the learning rate, whatever the gradient
            moved = (model.table.values - before[0]).abs().max().item()
            assert moved == pytest.approx(rates["memory"], rel=1e-4)
        scheduler.step()
        optimizer.zero_grad()
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"network": 0.1, "network_no_decay": 0.0, "memory": 0.0}


def test_two_optimizers_share_a_clipped_table(device: str) -> None:
    data = Data(3, device)
    results = []
    for split in (False, True):
        data = Data(3, device)
        table = deferred_table(data, 30, 16, 8)
        fill(table, data, 5, 4)
        if split:
            optimizers = [um.optim.MemorySGD([param], lr=1.0) for param in table.parameters()]
        else:
            optimizers = [um.optim.MemorySGD(table.parameters(), lr=1.0)]
        um.optim.clip_grad_norm_(table, 0.5)
        for optimizer in optimizers:
            optimizer.step()
        results.append(copied(table))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_tensor_learning_rate_is_read_at_every_step(device: str) -> None:
    param = nn.Parameter(torch.zeros(2, 8, device=device))
    lr = torch.tensor(1.0, device=device)
    optimizer = um.optim.MemorySGD([param], lr=lr)
    param.grad = torch.full_like(param, -1.0)
    optimizer.step()
    lr.fill_(0.5)
    optimizer.step()
    assert (param == 1.5).all()


def test_closure(device: str) -> None:
    param = nn.Parameter(torch.full((2, 8), 2.0, device=device))
    optimizer = um.optim.MemorySGD([param], lr=0.25)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 64.0
    assert (param == 1.0).all()


def test_zero_grad_clears_factors_and_step_does_not(device: str) -> None:
    data = Data(4, device)
    table = deferred_table(data, 30, 16)
    fill(table, data, 5, 4)
    optimizer = um.optim.MemorySGD([table.values], lr=1.0)
    optimizer.step()
    assert table.factors.slots.shape[0] == 20
    optimizer.zero_grad()
    assert table.factors.slots.shape[0] == 0


def test_factors_written_anew_are_grouped_anew(device: str) -> None:
    data = Data(9, device)
    table = deferred_table(data, 30, 16)
    fill(table, data, 5, 4)
    optimizer = um.optim.MemorySGD([table.values], lr=1.0)
    um.optim.clip_grad_norm_(table, 1e-3)
    table.factors.slots.copy_(data.integers(30, 20))  # into the same buffer, unclipped
    before = array(table.values).copy()
    optimizer.step()
    moved = before - array(table.values)
    assert abs(moved - dense_gradients(table)["values"]).max() <= 2e-6


def test_they_say_that_they_take_deferred_gradients() -> None:
    for kind in OPTIMIZERS.values():
        assert kind.handles_deferred is True
        assert kind([nn.Parameter(torch.zeros(1))])._step_supports_amp_scaling


# ---- loss scaling --------------------------------------------------------------------------------


def scaled_factors(table: um.MemoryTable, scale: float) -> None:
    table.factors.grad_outs = table.factors.grad_outs * scale
    if table.factors.grad_a is not None:
        table.factors.grad_a = table.factors.grad_a * scale


class Scaled:
    """A table and a network parameter with gradients of a loss that is scaled."""

    def __init__(self, device: str, scaler: torch.amp.GradScaler, scale: float) -> None:
        data = Data(5, device)
        self.table = deferred_table(data, 30, 16, 8)
        self.dense = nn.Parameter(data.normal(4, 8))
        fill(self.table, data, 5, 4)
        self.grads = dense_gradients(self.table)
        self.dense.grad = data.normal(4, 8)
        self.grads["dense"] = array(self.dense.grad).copy()
        scaler.scale(torch.ones((), device=device))
        scaled_factors(self.table, scale)
        self.dense.grad *= scale
        self.params = {**dict(self.table.named_parameters()), "dense": self.dense}
        self.before = {name: array(param).copy() for name, param in self.params.items()}

    def check_moved_by(self, factor: float) -> None:
        for name, param in self.params.items():
            moved = array(param) - self.before[name]
            expected = -factor * self.grads[name]
            assert abs(moved - expected).max() <= 2e-6, name


SCALERS = pytest.mark.parametrize("scaler_type", [torch.amp.GradScaler, um.optim.GradScaler])
SCALE = 1024.0


@SCALERS
def test_scaled_losses(device: str, scaler_type: type[torch.amp.GradScaler]) -> None:
    scaler = scaler_type(device, init_scale=SCALE)
    case = Scaled(device, scaler, SCALE)
    optimizer = um.optim.MemorySGD(case.params.values(), lr=1.0)
    scaler.step(optimizer)
    scaler.update()
    case.check_moved_by(1.0)
    assert scaler.get_scale() == SCALE


@SCALERS
@pytest.mark.parametrize("where", ["grad_outs", "weights", "grad_a", "pre_inputs", "dense"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_nothing_moves_where_a_gradient_is_not_finite(
    device: str, scaler_type: type[torch.amp.GradScaler], where: str, value: float
) -> None:
    scaler = scaler_type(device, init_scale=SCALE)
    case = Scaled(device, scaler, SCALE)
    target = case.dense.grad if where == "dense" else getattr(case.table.factors, where)
    target.view(-1)[0] = value
    optimizer = um.optim.MemoryAdam(case.params.values(), lr=1.0)
    scaler.step(optimizer)
    case.check_moved_by(0.0)
    for state in optimizer.state.values():
        assert state["step"].item() == 0
        assert not state["exp_avg"].any()
    scaler.update()
    # torch's scaler learns of dense gradients alone.
    knows = where == "dense" or scaler_type is um.optim.GradScaler
    assert scaler.get_scale() == (SCALE / 2 if knows else SCALE)


def test_unscaling_and_clipping(device: str) -> None:
    scaler = um.optim.GradScaler(device, init_scale=SCALE)
    case = Scaled(device, scaler, SCALE)
    optimizer = um.optim.MemorySGD(case.params.values(), lr=1.0)
    scaler.unscale_(optimizer)
    norm = um.optim.clip_grad_norm_(case.params.values(), 0.5)
    expected = math.sqrt(sum((grad**2).sum() for grad in case.grads.values()))
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    scaler.step(optimizer)
    scaler.update()
    case.check_moved_by(0.5 / expected)


def test_a_scaler_for_factors_alone(device: str) -> None:
    scaler = um.optim.GradScaler(device, init_scale=SCALE)
    case = Scaled(device, scaler, SCALE)
    del case.params["dense"]
    optimizer = um.optim.MemorySGD(case.params.values(), lr=1.0)
    scaler.step(optimizer)
    scaler.update()
    case.check_moved_by(1.0)


def test_factors_that_were_not_unscaled_are_refused(device: str) -> None:
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)
    case = Scaled(device, scaler, SCALE)
    optimizer = um.optim.MemorySGD(case.params.values(), lr=1.0)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"use ultramem_cuda\.optim\.GradScaler"):
        scaler.step(optimizer)
    case.check_moved_by(0.0)


def test_main_grad_that_was_not_unscaled_is_refused(device: str) -> None:
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)
    case = Scaled(device, scaler, SCALE)
    other = nn.Parameter(torch.zeros(2, 8, device=device))
    other.main_grad = torch.ones_like(other)
    optimizer = um.optim.MemorySGD([case.dense, other], lr=1.0)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="does not reach main_grad"):
        scaler.step(optimizer)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "error", "match"),
    [
        ("adam", {"lr": -1.0}, ValueError, "lr: must be finite and not negative"),
        ("sgd", {"lr": math.nan}, ValueError, "lr: must be finite"),
        ("sgd", {"lr": "1"}, TypeError, "lr: must be a number"),
        ("sgd", {"lr": torch.ones(2)}, ValueError, "lr: a tensor must have one element"),
        ("adam", {"betas": (0.9, 1.0)}, ValueError, r"betas: must be in \[0, 1\)"),
        ("adam", {"betas": (-0.1, 0.9)}, ValueError, "betas: must be finite and not negative"),
        ("adam", {"betas": (0.9,)}, ValueError, "betas: must be two numbers"),
        ("adam", {"eps": -1e-8}, ValueError, "eps: must be"),
        ("adagrad", {"eps": math.inf}, ValueError, "eps: must be"),
        ("adagrad", {"initial_accumulator_value": -1.0}, ValueError, "initial_accumulator_value"),
        ("sgd", {"weight_decay": -0.1}, ValueError, "weight_decay: must be"),
        ("adam", {"state_dtype": torch.float16}, ValueError, "state_dtype: must be None"),
        ("adam", {"seed": 1.5}, TypeError, "seed: must be an int"),
    ],
)
def test_bad_options(
    kind: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        OPTIMIZERS[kind]([nn.Parameter(torch.zeros(2, 2))], **options)


def test_bad_parameters(device: str) -> None:
    param = nn.Parameter(torch.zeros(4, 6, device=device).t())
    with pytest.raises(ValueError, match="must be contiguous"):
        um.optim.MemorySGD([param])
    param = nn.Parameter(torch.zeros(2, dtype=torch.complex64, device=device))
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        um.optim.MemorySGD([param])
    optimizer = um.optim.MemorySGD([nn.Parameter(torch.zeros(2, device=device))])
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        um.optim.MemorySGD(table.parameters()).step()


def test_nothing_is_updated_where_step_raises(device: str) -> None:
    data = Data(7, device)
    dense = nn.Parameter(data.normal(3, 8))
    table = deferred_table(data, 30, 16)
    fill(table, data, 5, 4)
    dense.grad = torch.ones_like(dense)
    before, dense_before = copied(table), dense.detach().clone()
    optimizer = um.optim.MemorySGD([dense, *table.parameters()], lr=1.0)

    table.factors.overflow = True
    with pytest.raises(RuntimeError, match="overflowed"):
        optimizer.step()
    table.factors.overflow = False

    table.values.grad = torch.ones_like(table.values)
    with pytest.raises(RuntimeError, match=r"has a \.grad too"):
        optimizer.step()
    table.values.grad = None

    um.optim.clip_grad_norm_(table, 1.0)
    table.factors.slots = torch.cat([table.factors.slots] * 2)
    with pytest.raises(RuntimeError, match="40 entries where clipping or a step saw 20"):
        optimizer.step()
    assert unchanged(table, before)
    assert torch.equal(dense, dense_before)


def test_shapes_and_dtypes_are_checked(device: str) -> None:
    data = Data(8, device)
    table = deferred_table(data, 30, 16)
    fill(table, data, 5, 4)
    table.factors.weights = table.factors.weights[:-1]
    optimizer = um.optim.MemorySGD(table.parameters())
    with pytest.raises(RuntimeError, match=r"table_update: weights must be \[n, C\]"):
        optimizer.step()
    fill(table, data, 5, 4)
    table.factors.weights = table.factors.weights.bfloat16()
    with pytest.raises(RuntimeError, match="table_update: weights must be float32"):
        optimizer.step()
    fill(table, data, 5, 4)
    table.factors.num_selected = 3
    with pytest.raises(RuntimeError, match="n must be tokens"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)], ids=str)
def test_moments_are_like_the_parameter(device: str, shape: tuple[int, ...]) -> None:
    param = torch.nn.Parameter(torch.ones(shape, device=device))
    twin = torch.nn.Parameter(param.detach().clone())
    mine = um.optim.MemoryAdam([param], lr=0.1)
    theirs = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    for optimizer, p in ((mine, param), (theirs, twin)):
        p.grad = torch.arange(p.numel(), dtype=p.dtype, device=device).view(shape)
        optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert mine.state[param][name].shape == shape
    torch.testing.assert_close(param, twin)
