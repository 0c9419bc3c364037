"""A table of which some rows alone are in memory: it adds what those rows add to the whole."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    FORWARD_BOUND,
    Data,
    array,
    check_close,
    root,
    run_python,
    square,
)
from hypothesis import given, settings
from shard_cases import Calls, addressing_args, check_same, check_same_sums, row_shards
from test_op_value_ffn import FIXED, VECTOR_ROWS, Case, cases
from torch import Tensor

from ultramem_cuda import SlotAddressing
from ultramem_cuda import python_ref as ref

SMALL = Case(9, 7, 2, 4, 30, 5, activation="silu", seed=1)


def check_shards(calls: Calls) -> None:
    """Each shard against the whole table with zeros elsewhere; and their sum against the
    reference."""
    total: Tensor | None = None
    upstream: Tensor | None = None
    for shard in row_shards(calls.num_slots):
        part, masked, where = calls.of_shard(shard), calls.masked(shard), calls.where(shard)
        out, a = part.forward(*where)
        expected_out, expected_a = masked.forward()
        check_same("out", out, expected_out)
        check_same("pre_activation", a, expected_a)
        total = out.double() if total is None else total + out.double()

        upstream = calls.upstream(out)
        grads = part.backward(upstream, a, *where)
        expected = masked.backward(upstream, expected_a)
        rows = slice(*shard)
        check_same("grad_scores", grads[0], expected[0])
        check_same("grad_pre_input", grads[1], expected[1])
        check_same_sums("grad_values", grads[2], expected[2][rows])
        if calls.pre_values is not None:
            check_same_sums("grad_pre_values", grads[3], expected[3][rows])

        *deferred, factors = part.backward_deferred(upstream, a, *where)
        assert torch.equal(deferred[0], grads[0])
        assert torch.equal(deferred[1], grads[1])
        slots = calls.slots().flatten() - shard[0]
        here = (slots >= 0) & (slots < part.num_slots)
        assert torch.equal(factors.slots.long(), torch.where(here, slots, -1))
        assert not factors.weights[~here].any()
        assert factors.grad_a is None or not factors.grad_a[~here].any()
        dense = part.backward_main_grad(upstream, a, *where)
        for got, wanted in zip(factors.to_dense(), dense, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None and wanted is not None:
                check_same_sums("factors", got, wanted)

    inputs, addressing = calls.reference_inputs()
    options = {"sum_groups": calls.sum_groups, "addressing": addressing}
    whole = ref.value_ffn(*inputs, activation=calls.activation, **options)
    sizes = ref.value_ffn(inputs[0], *(square(x) for x in inputs[1:]), **options)
    assert total is not None
    assert upstream is not None
    check_close("out", total, whole, FORWARD_BOUND[upstream.dtype], root(sizes))


@settings(max_examples=12)
@given(case=cases())
def test_drawn_shapes(device_dtype: tuple[str, torch.dtype], case: Case) -> None:
    check_shards(Calls.of(case, *device_dtype))


@pytest.mark.parametrize("name", ["expanded", "apart", "bag"])
def test_fixed_shapes(device_dtype: tuple[str, torch.dtype], name: str) -> None:
    check_shards(Calls.of(FIXED[name], *device_dtype))


@pytest.mark.parametrize("dims", VECTOR_ROWS, ids=str)
@pytest.mark.parametrize(("tokens", "selected"), [(1, 60), (200, 3)])
def test_rows_of_whole_vectors(
    device_dtype: tuple[str, torch.dtype], tokens: int, selected: int, dims: tuple[int, int]
) -> None:
    case = Case(tokens, selected, 2, dims[1] // 2, 50, dims[0], activation="gelu", seed=2)
    check_shards(Calls.of(case, *device_dtype))


@pytest.mark.parametrize("shuffle", [None, "feistel", "tensor"])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_every_index_is_in_one_shard(
    device: str, shuffle: str | None, index_dtype: torch.dtype
) -> None:
    """Shards of a table of its own row numbers, of which each row's is read in one place."""
    case = Case(1, 1, 1, 1, 190, window=144, offset=120, expand=4, shuffle=shuffle, seed=9)
    calls = Calls.of(case, device, torch.float32)
    assert calls.addressing is not None
    indices = torch.arange(calls.addressing.num_virtual, device=device)
    calls.indices = indices.unsqueeze(1).to(index_dtype)
    calls.scores = torch.ones(len(indices), 1, 1, device=device)
    calls.values = torch.arange(1.0, case.num_slots + 1, device=device).unsqueeze(1)
    outs = []
    for shard in row_shards(case.num_slots):
        outs.append(calls.of_shard(shard).forward(*calls.where(shard))[0])
    reads = torch.stack(outs)
    assert torch.equal((reads != 0).sum(0), torch.ones_like(reads[0], dtype=torch.int64))
    assert torch.equal(reads.sum(0).squeeze(1), calls.addressing.slots(indices)[0] + 1.0)


@pytest.mark.parametrize("vectors", [False, True])
def test_nothing_in_memory_is_zero(device_dtype: tuple[str, torch.dtype], vectors: bool) -> None:
    """Also where what comes in is not finite."""
    device, dtype = device_dtype
    dims = (32, 64) if vectors else (5, 6)
    calls = Calls.of(Case(7, 40, 2, dims[1] // 2, 30, dims[0], seed=3), device, dtype)
    assert calls.pre_input is not None
    calls.indices = calls.indices % 20
    calls.pre_input.fill_(float("nan"))
    shard = (20, 30)
    part, where = calls.of_shard(shard), calls.where(shard)
    out, a = part.forward(*where)
    assert not out.any()
    assert not a.any()
    upstream = torch.full_like(out, float("inf"))
    for grad in part.backward(upstream, a, *where):
        assert not grad.any()
    *_, factors = part.backward_deferred(upstream, a, *where)
    assert (factors.slots == -1).all()
    assert not factors.weights.any()
    assert factors.grad_a is not None
    assert not factors.grad_a.any()


def test_many_entries_of_few_rows(device: str) -> None:
    """Runs of a gradient that are cut into pieces, beside entries that name no row."""
    case = Case(700, 9, 2, 8, 12, 16, activation="relu", seed=4)
    check_shards(Calls.of(case, device, torch.float32))


def test_autograd_of_a_shard(device: str) -> None:
    calls = Calls.of(SMALL, device, torch.float32)
    shard = row_shards(calls.num_slots)[2]
    part, where = calls.of_shard(shard), calls.where(shard)
    out, a = part.forward(*where)
    upstream = calls.upstream(out)
    expected = part.backward(upstream, a, *where)
    leaves = [part.scores, part.pre_input, part.values, part.pre_values]
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    grads = torch.autograd.grad(part.forward(*where)[0], leaves, upstream)
    for got, wanted in zip(grads, expected, strict=True):
        assert torch.equal(got, wanted)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 30])
def test_out_of_range_is_still_an_error(bad: int) -> None:
    """Which is not that a slot lies elsewhere."""
    calls = Calls.of(SMALL, "cpu", torch.float32)
    shard = row_shards(calls.num_slots)[0]
    part, where = calls.of_shard(shard), calls.where(shard)
    out, a = part.forward(*where)
    part.indices = part.indices.clone()
    part.indices[3, 2] = bad
    with pytest.raises(RuntimeError, match=rf"indices must be in \[0, 30\), got {bad} at \[3, 2\]"):
        part.forward(*where)
    with pytest.raises(RuntimeError, match="value_ffn: indices must lie in"):
        part.backward(torch.ones_like(out), a, *where)


@pytest.mark.parametrize(("first_row", "num_slots"), [(-1, 40), (11, 40), (1, 0), (0, 29)])
def test_rows_beyond_the_table_raise(device: str, first_row: int, num_slots: int) -> None:
    calls = Calls.of(SMALL, device, torch.float32)
    total = num_slots or 30
    message = (
        r"rows \[first_row, first_row \+ N\) must lie in \[0, num_slots\), got first_row = "
        f"{first_row}, N = 30, num_slots = {total}"
    )
    with pytest.raises(RuntimeError, match=f"value_ffn: {message}"):
        calls.forward(first_row, num_slots)


def test_the_window_is_of_the_whole_table(device: str) -> None:
    calls = Calls.of(SMALL, device, torch.float32)
    calls.addressing = SlotAddressing(60, 50, 45)
    calls.indices = torch.arange(50, device=device).repeat(9, 1)[:, :7].contiguous()
    out, _ = calls.forward(30, 60)
    assert out.any()
    with pytest.raises(RuntimeError, match=r"window must be in 1\.\.num_slots = 30, got 50"):
        calls.forward()


# ---- CUDA ----------------------------------------------------------------------------------------

DEBUG = """
import torch
indices = torch.tensor([[0, 5, 29]], device="cuda")
values = torch.ones(10, 8, device="cuda")
def read():
    return torch.ops.ultramem.value_ffn(
        indices, torch.ones(1, 3, 1, device="cuda"), values, *[None] * 7, "identity", 0, 0, 1,
        "none", 0, 0, True, 20, 30
    )[0]
import ultramem_cuda
print(read().sum().item())
indices[0, 0] = 30
try:
    read()
except RuntimeError as error:
    print(error)
"""


@pytest.mark.gpu
def test_elsewhere_is_no_error_in_debug_mode() -> None:
    result = run_python(DEBUG, env={"ULTRAMEM_DEBUG": "1"})
    assert result.returncode == 0, result.stderr
    first, *message = result.stdout.splitlines()
    assert float(first) == 8.0
    assert "indices must be in [0, 30), found one outside" in message[0]


@pytest.mark.gpu
def test_out_of_range_contributes_nothing_on_cuda() -> None:
    calls = Calls.of(SMALL, "cuda", torch.float32)
    shard = row_shards(calls.num_slots)[2]
    good = calls.of_shard(shard)
    good.scores[2, 4] = 0.0
    bad = calls.of_shard(shard)
    bad.scores, bad.indices = good.scores, calls.indices.clone()
    bad.indices[2, 4] = 2**40
    assert torch.equal(good.forward(*calls.where(shard))[0], bad.forward(*calls.where(shard))[0])


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    """On a table of which a shard begins beyond 2^31 rows."""
    addressing = SlotAddressing(2**33, 2**32, 2**32 + 5, 2, None)
    first = 2**32 + 1000
    data = Data(6)
    indices = first - addressing.offset + data.integers(600, 40, 9)
    rows, weights = data.normal(500, 16), data.normal(40, 9, 2)
    out = [
        torch.ops.ultramem.slot_sum(
            *(x.to(where) for x in (indices, weights, rows)),
            torch.float32,
            None,
            *addressing_args(addressing),
            True,
            first,
            2**33,
        )
        for where in ("cpu", "cuda")
    ]
    assert out[0].any()
    check_close("out", out[1], array(out[0]), FORWARD_BOUND[torch.float32])
