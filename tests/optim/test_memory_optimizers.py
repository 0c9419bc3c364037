"""Optimizer steps against float64 and against torch's own optimizers."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from factor_cases import (
    NOWHERE,
    OPTIMIZERS,
    Reference,
    deferred_table,
    dense_gradients,
    fill,
    touched_rows,
)
from helpers import Data, array, run_python
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ultramem_cuda as um

LR = 0.05
# Of one step, relative to the largest weight: the gradient's own error times the learning rate,
# then one rounding of the weight.
UNIT = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}

KINDS = pytest.mark.parametrize("kind", OPTIMIZERS)


def check_param(param: Tensor, expected: np.ndarray, steps: int = 1) -> None:
    size = np.abs(expected).max(initial=1.0)
    error = np.abs(array(param) - expected).max(initial=0.0)
    assert error <= UNIT[param.dtype] * size * steps, f"{error:.2e} of {size:.2e}"


shapes = st.fixed_dictionaries(
    {
        "num_slots": st.integers(1, 40),
        "dims": st.sampled_from([(8, 0), (24, 16), (6, 7), (32, 264), (264, 40), (1040, 8)]),
        "tokens": st.integers(0, 9),
        "selected": st.integers(1, 6),
        "cores": st.sampled_from([1, 2]),
        "groups": st.sampled_from([1, 3]),
        "source": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "seed": st.integers(0, 2**31),
    }
)


@KINDS
@given(shape=shapes)
def test_touched_rows_are_updated(
    device_dtype: tuple[str, torch.dtype], kind: str, shape: dict[str, Any]
) -> None:
    device, dtype = device_dtype
    data = Data(shape["seed"], device)
    table = deferred_table(data, shape["num_slots"], *shape["dims"], dtype=dtype)
    # Adam divides by the size of a gradient that may have cancelled to almost nothing.
    options = {"lr": LR, "eps": 1e-3} if kind == "adam" else {"lr": LR}
    optimizer = OPTIMIZERS[kind](table.parameters(), **options, stochastic_rounding=False)
    names = dict(table.named_parameters())
    references = {name: Reference(kind, array(p), **options) for name, p in names.items()}
    for step in range(2):
        before = {name: p.detach().clone() for name, p in names.items()}
        fill(
            table,
            data,
            shape["tokens"],
            shape["selected"],
            **{key: shape[key] for key in ("cores", "groups", "source")},
        )
        grads, rows = dense_gradients(table), touched_rows(table)
        optimizer.step()
        untouched = np.setdiff1d(np.arange(table.num_slots), rows)
        for name, param in names.items():
            if shape["tokens"] > 0:
                references[name].step(grads[name], rows)
            check_param(param, references[name].param, step + 1)
            assert torch.equal(param[untouched], before[name][untouched])
        optimizer.zero_grad()
        assert table.factors.slots.shape[0] == 0


@KINDS
@given(shape=shapes)
def test_dense_gradients(
    device_dtype: tuple[str, torch.dtype], kind: str, shape: dict[str, Any]
) -> None:
    device, dtype = device_dtype
    data = Data(shape["seed"], device)
    param = nn.Parameter(data.normal(shape["num_slots"], shape["dims"][0], dtype=dtype))
    options = {"lr": LR, "weight_decay": 0.1} if kind == "adam" else {"lr": LR}
    optimizer = OPTIMIZERS[kind]([param], **options, stochastic_rounding=False)
    reference = Reference(kind, array(param), **options)
    for step in range(3):
        param.grad = data.normal(*param.shape, dtype=dtype)
        reference.step(array(param.grad))
        optimizer.step()
        check_param(param, reference.param, step + 1)


def sparse(grad: np.ndarray, rows: np.ndarray, device: str) -> Tensor:
    values = torch.from_numpy(grad[rows]).to(device, torch.float32)
    return torch.sparse_coo_tensor(
        torch.from_numpy(rows)[None].to(device),
        values,
        grad.shape,
        is_coalesced=True,
        check_invariants=True,
    )


def test_adam_of_factors_is_sparse_adam(device: str) -> None:
    data = Data(0, device)
    table = deferred_table(data, 60, 24, 16)
    names = dict(table.named_parameters())
    twins = {name: nn.Parameter(param.detach().clone()) for name, param in names.items()}
    optimizer = um.optim.MemoryAdam(table.parameters(), lr=1e-2)
    expected = torch.optim.SparseAdam(list(twins.values()), lr=1e-2)
    for _ in range(100):
        fill(table, data, 5, 4, cores=2)
        grads, rows = dense_gradients(table), touched_rows(table)
        for name, twin in twins.items():
            twin.grad = sparse(grads[name], rows, device)
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
    for name, param in names.items():
        torch.testing.assert_close(param, twins[name], rtol=1e-6, atol=1e-6)


TORCH = {
    "adam": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2}),
}


@KINDS
@pytest.mark.parametrize("lr_is_tensor", [False, True])
def test_dense_steps_are_torchs(device: str, kind: str, lr_is_tensor: bool) -> None:
    torchs, options = TORCH[kind]
    data = Data(1, device)
    # Of one dimension where Adagrad's rows are to be its elements.
    shapes = [(19,), (1,)] if kind == "adagrad" else [(7, 19), (19,), (), (2, 3, 4, 5), (0, 3)]
    params = [nn.Parameter(data.normal(*shape)) for shape in shapes]
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    expected = torchs(twins, **options)
    if lr_is_tensor:
        options = {**options, "lr": torch.tensor(options["lr"])}
    optimizer = OPTIMIZERS[kind](params, **options)
    for _ in range(100):
        for param, twin in zip(params, twins, strict=True):
            twin.grad = data.normal(*param.shape)
            param.grad = twin.grad.clone()
        optimizer.step()
        expected.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


def test_main_grad_is_taken_and_zeroed(device: str) -> None:
    data = Data(2, device)
    params = [nn.Parameter(data.normal(5, 16, dtype=torch.bfloat16)) for _ in range(2)]
    grad = data.normal(5, 16)
    params[0].main_grad = grad.clone()
    params[1].main_grad = torch.zeros_like(grad)
    params[1].grad = torch.zeros_like(params[1])  # comes first
    before = [param.detach().float() for param in params]
    optimizer = um.optim.MemorySGD(params, lr=1.0, stochastic_rounding=False)
    optimizer.step()
    assert torch.equal(params[0].detach(), (before[0] - grad).bfloat16())
    assert torch.equal(params[1].detach().float(), before[1])
    optimizer.zero_grad()
    assert not params[0].main_grad.any()


@KINDS
@pytest.mark.parametrize("dims", [(16, 8), (6, 5)])
def test_many_entries_of_one_slot(device: str, kind: str, dims: tuple[int, int]) -> None:
    """Long runs are cut into pieces, very long ones into groups of pieces."""
    data = Data(3, device)
    table = deferred_table(data, 50, *dims)
    slots = torch.cat(
        [
            torch.full((9000,), 7),
            torch.full((64,), 8),
            torch.full((65,), 9),
            torch.full((600,), 49),
            data.integers(50, 1087).cpu(),
        ]
    )
    slots = slots[torch.randperm(slots.numel(), generator=data.generator)]
    fill(table, data, slots.numel() // 8, 8, slots=slots, cores=2)
    optimizer = OPTIMIZERS[kind](table.parameters(), lr=LR)
    references = {n: Reference(kind, array(p), lr=LR) for n, p in table.named_parameters()}
    grads, rows = dense_gradients(table), touched_rows(table)
    optimizer.step()
    for name, param in table.named_parameters():
        references[name].step(grads[name], rows)
        # Sums of thousands of terms of size 1 before lr; Adam divides by their size.
        np.testing.assert_allclose(array(param), references[name].param, rtol=2e-6, atol=2e-5)


@KINDS
def test_all_entries_of_one_slot_and_none_elsewhere(device: str, kind: str) -> None:
    data = Data(4, device)
    table = deferred_table(data, 3, 8, 8)
    fill(table, data, 100, 10, slots=torch.full((1000,), 1))
    before = table.values.detach().clone()
    OPTIMIZERS[kind](table.parameters(), lr=LR).step()
    assert (table.values[1] != before[1]).all()
    assert torch.equal(table.values[[0, 2]], before[[0, 2]])


@KINDS
def test_slots_out_of_range_contribute_nothing(device: str, kind: str) -> None:
    data = Data(5, device)
    table = deferred_table(data, 20, 16, 8)
    slots = data.integers(20, 24).cpu()
    slots[[0, 7, 23]] = torch.tensor([NOWHERE, 20, 2**31 - 1])
    fill(table, data, 6, 4, slots=slots)
    references = {n: Reference(kind, array(p), lr=LR) for n, p in table.named_parameters()}
    grads, rows = dense_gradients(table), touched_rows(table)
    OPTIMIZERS[kind](table.parameters(), lr=LR).step()
    for name, param in table.named_parameters():
        references[name].step(grads[name], rows)
        check_param(param, references[name].param)


@KINDS
def test_no_entries_no_step(device: str, kind: str) -> None:
    data = Data(6, device)
    table = deferred_table(data, 20, 16, 8)
    before = [param.detach().clone() for param in table.parameters()]
    optimizer = OPTIMIZERS[kind](table.parameters(), lr=LR)
    optimizer.step()
    assert not optimizer.state
    fill(table, data, 3, 4, slots=torch.full((12,), NOWHERE))
    optimizer.step()
    for param, old in zip(table.parameters(), before, strict=True):
        assert torch.equal(param, old)
        assert optimizer.state[param]["step"].item() == 1  # retrieved, if nothing in range


def test_values_without_pre_values(device: str) -> None:
    data = Data(7, device)
    table = deferred_table(data, 20, 16)
    fill(table, data, 6, 4)
    before, grads = array(table.values).copy(), dense_gradients(table)
    um.optim.MemorySGD([table.values], lr=1.0).step()
    check_param(table.values, before - grads["values"])


def bits_after_steps(
    kind: str,
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, int, int] = (300, 264, 13),
    tokens: int = 1200,
    cores: int = 2,
    **options: Any,
) -> list[Tensor]:
    """Parameters and states, on the CPU. One slot has a run of 9000 entries and more."""
    data = Data(8, device)
    num_slots = shape[0]
    table = deferred_table(data, *shape, dtype=dtype)
    dense = nn.Parameter(data.normal(5, 40, dtype=dtype))
    optimizer = OPTIMIZERS[kind]([*table.parameters(), dense], lr=LR, seed=5, **options)
    for _ in range(3):
        drawn = tokens * 8 - 9200
        slots = torch.cat([data.integers(num_slots, drawn).cpu(), torch.full((200 + 9000,), 11)])
        fill(table, data, tokens, 8, slots=slots, source=torch.bfloat16, cores=cores, groups=2)
        dense.grad = data.normal(5, 40, dtype=dtype)
        optimizer.step()
        optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [t.detach().cpu() for t in [*table.parameters(), dense, *states]]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"state_dtype": torch.bfloat16},
    "adagrad": {},
    "sgd": {"master_weights": True},
}


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_do_not_change_a_bit(kind: str, dtype: torch.dtype) -> None:
    one = bits_after_steps(kind, dtype, "cpu", **OPTIONS[kind])
    torch.set_num_threads(3)
    try:
        three = bits_after_steps(kind, dtype, "cpu", **OPTIONS[kind])
    finally:
        torch.set_num_threads(1)
    assert same_bits(one, three)


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_and_cpu_agree_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    cpu = bits_after_steps(kind, dtype, "cpu", **OPTIONS[kind])
    cuda = bits_after_steps(kind, dtype, "cuda", **OPTIONS[kind])
    assert same_bits(cpu, cuda)
    assert same_bits(cuda, bits_after_steps(kind, dtype, "cuda", **OPTIONS[kind]))


# More rows than warps, so that the groups of lanes of a warp have a row each; of 8, 16 and 32
# lanes, of one stretch and of several.
@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dims", "cores"), [((192, 24), 2), ((336, 8), 2), ((816, 400), 1)])
def test_many_rows_agree_to_the_bit(
    kind: str, dtype: torch.dtype, dims: tuple[int, int], cores: int
) -> None:
    case = {"shape": (20_000, *dims), "tokens": 8000, "cores": cores, **OPTIONS[kind]}
    cpu = bits_after_steps(kind, dtype, "cpu", **case)
    assert same_bits(cpu, bits_after_steps(kind, dtype, "cuda", **case))


def digest(kind: str, dtype: torch.dtype) -> str:
    hashed = hashlib.sha256()
    for tensor in bits_after_steps(kind, dtype, "cpu", **OPTIONS[kind]):
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets_do_not_change_a_bit(capability: str) -> None:
    code = (
        "import torch, test_memory_optimizers as t; torch.set_num_threads(1)\n"
        "print(*[t.digest(k, d) for k in t.OPTIMIZERS for d in (torch.float32, torch.bfloat16)])"
    )
    done = run_python(code, env={"ULTRAMEM_CPU_CAPABILITY": capability})
    assert done.returncode == 0, done.stderr
    expected = [digest(k, d) for k in OPTIMIZERS for d in (torch.float32, torch.bfloat16)]
    assert done.stdout.split() == expected


def test_tokens_may_come_in_micro_batches(device: str) -> None:
    """The order of the entries is all that counts."""
    results = []
    for split in (False, True):
        data = Data(9, device)
        table = deferred_table(data, 20, 16, 8)
        fill(table, data, 12, 4)
        if split:  # as if one backward had come after another: the same entries, appended
            f = table.factors
            for name in ("slots", "weights", "grad_a"):
                setattr(f, name, torch.cat([getattr(f, name)[:20], getattr(f, name)[20:]]))
        um.optim.MemoryAdam(table.parameters(), lr=LR).step()
        results.append([p.detach() for p in table.parameters()])
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@KINDS
def test_master_weights(device: str, kind: str, dtype: torch.dtype) -> None:
    data = Data(10, device)
    table = deferred_table(data, 20, 16, 8, dtype=dtype)
    options = {"lr": 1e-4}  # far below a unit in the last place of most weights
    optimizer = OPTIMIZERS[kind](table.parameters(), **options, master_weights=True)
    references = {n: Reference(kind, array(p), **options) for n, p in table.named_parameters()}
    for _ in range(20):
        fill(table, data, 6, 4)
        grads, rows = dense_gradients(table), touched_rows(table)
        optimizer.step()
        for name in references:
            references[name].step(grads[name], rows)
    for name, param in table.named_parameters():
        master = optimizer.state[param]["master"]
        assert master.dtype == torch.float32
        np.testing.assert_allclose(array(master), references[name].param, rtol=1e-5, atol=1e-5)
        assert torch.equal(param.detach(), master.to(dtype))


@pytest.mark.parametrize(
    ("kind", "options", "bound"),
    [("adagrad", {}, 2.1), ("adam", {"state_dtype": torch.bfloat16}, 6.1), ("sgd", {}, 2.1)],
)
def test_bytes_of_training_state(
    device: str, kind: str, options: dict[str, Any], bound: float
) -> None:
    data = Data(11, device)
    table = deferred_table(data, 2000, 192, 192, dtype=torch.bfloat16)
    optimizer = OPTIMIZERS[kind](table.parameters(), **options)
    fill(table, data, 3, 4, source=torch.bfloat16)
    optimizer.step()
    tensors = [*table.parameters()]
    tensors += [v for state in optimizer.state.values() for v in state.values()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    assert size <= bound * sum(p.numel() for p in table.parameters())


def test_only_the_grouped_entries_are_kept_between_calls(device: str) -> None:
    """One sort a step, for both parameters; dropped by zero_grad."""
    data = Data(12, device)
    table = deferred_table(data, 20, 16, 8)
    fill(table, data, 6, 4)
    optimizer = um.optim.MemoryAdam([table.values], lr=LR)
    other = um.optim.MemorySGD([table.pre_values], lr=LR)
    um.optim.clip_grad_norm_(table, 1.0)
    grouping = table.factors.step_cache.grouping
    optimizer.step()
    other.step()
    assert table.factors.step_cache.grouping is grouping
    optimizer.zero_grad()
    assert table.factors.step_cache is None
