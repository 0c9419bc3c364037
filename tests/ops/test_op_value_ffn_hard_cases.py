"""value_ffn where it can go wrong: nothing to do, hot slots, NaN and Inf, indices out of range,
tables past 2^31 elements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    FORWARD_BOUND,
    Data,
    array,
    check_close,
    check_gradient,
    check_value_ffn,
    check_zero_gradients,
    run_python,
)

from ultramem_cuda import SlotAddressing, ops
from ultramem_cuda import python_ref as ref


@pytest.mark.parametrize("sum_groups", [True, False])
@pytest.mark.parametrize(("tokens", "selected"), [(0, 5), (4, 0), (0, 0)])
def test_nothing_retrieved(
    device_dtype: tuple[str, torch.dtype], tokens: int, selected: int, sum_groups: bool
) -> None:
    device, dtype = device_dtype
    data = Data(1, device)
    indices = torch.zeros(tokens, selected, dtype=torch.int64, device=device)
    scores = data.normal(tokens, selected, 2, requires_grad=True)
    values = data.normal(32, 6, dtype=dtype, requires_grad=True)
    pre_values = data.normal(32, 5, dtype=dtype, requires_grad=True)
    pre_input = data.normal(tokens, 5, dtype=dtype, requires_grad=True)
    addressing = SlotAddressing(32, 16, expand=4, shuffle="feistel")
    out = ops.value_ffn(
        indices,
        scores,
        values,
        pre_values,
        pre_input,
        addressing=addressing,
        sum_groups=sum_groups,
    )
    assert out.shape == ((tokens, 6) if sum_groups else (tokens, 4, 6))
    assert not out.any()
    out.sum().backward()
    check_zero_gradients([scores, values, pre_values, pre_input])


def test_no_tokens_without_pre_values(device: str) -> None:
    data = Data(2, device)
    scores = data.normal(0, 3, 1, requires_grad=True)
    values = data.normal(9, 6, requires_grad=True)
    out = ops.value_ffn(data.integers(9, 0, 3), scores, values)
    assert out.shape == (0, 6)
    out.sum().backward()
    check_zero_gradients([scores, values])


def test_one_token(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(3, device)
    check_value_ffn(
        data.integers(300, 1, 64),
        data.normal(1, 64, 2),
        data.normal(300, 70, dtype=dtype),
        data.normal(300, 50, dtype=dtype),
        data.normal(1, 50, dtype=dtype, scale=50**-0.5),
        activation="gelu",
    )


def test_one_slot_of_one_element(device: str) -> None:
    indices = torch.zeros(1, 1, dtype=torch.int64, device=device)
    scores = torch.full((1, 1, 1), 3.0, device=device, requires_grad=True)
    values = torch.full((1, 1), 2.0, device=device, requires_grad=True)
    out = ops.value_ffn(indices, scores, values)
    out.sum().backward()
    assert (out.item(), scores.grad.item(), values.grad.item()) == (6.0, 2.0, 3.0)


def test_a_slot_twice_within_a_token(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(4, device)
    indices = torch.tensor([[5, 3, 5, 5], [3, 3, 3, 3], [1, 2, 2, 5]], device=device)
    check_value_ffn(
        indices,
        data.normal(3, 4, 2),
        data.normal(8, 10, dtype=dtype),
        data.normal(8, 7, dtype=dtype),
        data.normal(3, 7, dtype=dtype),
        activation="silu",
    )


@pytest.mark.parametrize("tokens", [129, 2000])
def test_all_tokens_hit_one_slot(device_dtype: tuple[str, torch.dtype], tokens: int) -> None:
    """The row's gradient is a sum of thousands of terms, accumulated in float32 and rounded once:
    in bfloat16 the sum would stop growing at 256 terms."""
    device, dtype = device_dtype
    data = Data(5, device)
    indices = torch.full((tokens, 4), 3, device=device)
    scores = data.normal(tokens, 4, 1).abs().requires_grad_()
    values = data.normal(6, 20, dtype=dtype, requires_grad=True)
    pre_values = data.normal(6, 12, dtype=dtype, requires_grad=True)
    pre_input = data.normal(tokens, 12, dtype=dtype).abs().requires_grad_()
    upstream = data.normal(tokens, 20, dtype=dtype).abs() * tokens**-0.5
    out = ops.value_ffn(indices, scores, values, pre_values, pre_input)
    grads = torch.autograd.grad(out, [values, pre_values], upstream)
    inputs = [array(x) for x in (scores, values, pre_values, pre_input)]
    expected = ref.value_ffn_bwd(array(upstream), array(indices), *inputs)
    bound = max(FORWARD_BOUND[dtype], 1e-13)
    check_gradient("grad_values", grads[0], expected.values, bound=bound)
    check_gradient("grad_pre_values", grads[1], expected.pre_values, bound=bound)
    assert grads[0].any(-1).nonzero().flatten().tolist() == [3]


def test_zipf_distributed_slots(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(6, device)
    uniform = torch.rand(200, 16, generator=data.generator)
    indices = (uniform.mul(math.log(400)).exp().long() - 1).clamp(0, 399).to(device)
    check_value_ffn(
        indices,
        data.normal(200, 16, 2),
        data.normal(400, 24, dtype=dtype),
        data.normal(400, 18, dtype=dtype),
        data.normal(200, 18, dtype=dtype, scale=18**-0.5),
    )


@pytest.mark.parametrize("where", ["values", "pre_values"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_row_nobody_retrieved(device: str, where: str, value: float) -> None:
    data = Data(7, device)
    indices = data.integers(20, 9, 6)
    tables = {"values": data.normal(21, 8), "pre_values": data.normal(21, 5)}
    tables[where][20] = value
    leaves = [data.normal(9, 6, 2), *tables.values(), data.normal(9, 5)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = ops.value_ffn(indices, *leaves)
    assert torch.isfinite(out).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_row_stays_with_its_tokens(device: str, value: float) -> None:
    data = Data(8, device)
    indices = data.integers(20, 9, 6)
    indices[4, 2] = 20
    scores, pre_input = data.normal(9, 6, 2), data.normal(9, 5)
    values, pre_values = data.normal(21, 8), data.normal(21, 5)
    clean = ops.value_ffn(indices, scores, values, pre_values, pre_input)
    values[20] = value
    out = ops.value_ffn(indices, scores, values, pre_values, pre_input)
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[rest], clean[rest])
    assert not torch.isfinite(out[4]).any()


def test_nan_gradient_stays_with_its_token_and_slots(device: str) -> None:
    data = Data(9, device)
    indices = torch.arange(40, device=device).reshape(8, 5)
    values = data.normal(40, 6, requires_grad=True)
    pre_values = data.normal(40, 5, requires_grad=True)
    pre_input = data.normal(8, 5, requires_grad=True)
    out = ops.value_ffn(indices, data.normal(8, 5, 1), values, pre_values, pre_input)
    upstream = torch.ones_like(out)
    upstream[3, 2] = math.nan
    grads = torch.autograd.grad(out, [values, pre_values, pre_input], upstream)
    spoiled = [torch.isnan(grad).any(-1).nonzero().flatten().tolist() for grad in grads]
    assert spoiled == [list(range(15, 20)), list(range(15, 20)), [3]]


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_extreme_pre_activations(device_dtype: tuple[str, torch.dtype], activation: str) -> None:
    """Far from zero the activations are 0 or the identity, and so are their gradients."""
    device, dtype = device_dtype
    pre_input = torch.tensor([[1e4], [-1e4]], dtype=dtype, device=device, requires_grad=True)
    pre_values = torch.ones(1, 1, dtype=dtype, device=device, requires_grad=True)
    values = torch.ones(1, 1, dtype=dtype, device=device)
    indices = torch.zeros(2, 1, dtype=torch.int64, device=device)
    scores = torch.ones(2, 1, 1, device=device)
    out = ops.value_ffn(indices, scores, values, pre_values, pre_input, activation=activation)
    assert torch.equal(out, pre_input.relu())
    out.sum().backward()
    assert pre_input.grad.flatten().tolist() == [1.0, 0.0]


def test_relu_at_zero(device: str) -> None:
    """Derivative 0 at 0, as torch has it; NaN passes, forward and backward."""
    pre_input = torch.tensor([[0.0], [-0.0], [math.nan]], device=device, requires_grad=True)
    one = torch.ones(1, 1, device=device)
    indices = torch.zeros(3, 1, dtype=torch.int64, device=device)
    scores = torch.ones(3, 1, 1, device=device)
    out = ops.value_ffn(indices, scores, one, one, pre_input, activation="relu")
    out.backward(torch.ones_like(out))
    assert out[:2].flatten().tolist() == [0.0, 0.0]
    assert torch.isnan(out[2]).all()
    # The upstream gradient of the NaN row is finite, and its relu is passed: as torch has it.
    assert pre_input.grad.flatten().tolist() == [0.0, 0.0, 1.0]


def test_gelu_keeps_its_left_tail(device: str) -> None:
    """Where 1 + erf cancels: the relative error stays that of float32."""
    pre_input = torch.tensor([[-3.0], [-4.0], [-5.0], [-6.0]], device=device, requires_grad=True)
    one = torch.ones(1, 1, device=device)
    indices = torch.zeros(4, 1, dtype=torch.int64, device=device)
    scores = torch.ones(4, 1, 1, device=device)
    out = ops.value_ffn(indices, scores, one, one, pre_input, activation="gelu")
    out.sum().backward()
    exact = pre_input.detach().double().requires_grad_()
    expected = exact * torch.special.erfc(exact * -(0.5**0.5)) / 2
    expected.sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(pre_input.grad.double(), exact.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_vectorised_activations_of_the_cpu(activation: str) -> None:
    """Every element, not only the norm: the CPU computes exp and erfc of float32 by series."""
    pre_input = torch.linspace(-14, 14, 40_001).unsqueeze(1).requires_grad_()
    one = torch.ones(1, 1)
    indices = torch.zeros(len(pre_input), 1, dtype=torch.int64)
    scores = torch.ones(len(pre_input), 1, 1)
    out = ops.value_ffn(indices, scores, one, one, pre_input, activation=activation)
    out.sum().backward()
    exact = pre_input.detach().double().requires_grad_()
    if activation == "gelu":
        expected = exact * torch.special.erfc(exact * -(0.5**0.5)) / 2
    else:
        expected = torch.nn.functional.silu(exact)
    expected.sum().backward()
    smallest = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=smallest)
    # The derivative passes through zero.
    torch.testing.assert_close(pre_input.grad.double(), exact.grad, rtol=1e-6, atol=1e-7)


def test_window_goes_around_the_end_of_the_table(device: str) -> None:
    table = torch.arange(10.0, device=device).unsqueeze(1)
    indices = torch.arange(6, device=device).unsqueeze(1)
    ones = torch.ones(6, 1, 1, device=device)
    out = ops.value_ffn(indices, ones, table, addressing=SlotAddressing(10, 6, offset=7))
    assert out.flatten().tolist() == [7.0, 8.0, 9.0, 0.0, 1.0, 2.0]


# ---- indices out of range ------------------------------------------------------------------------

# No addressing: rows of a table of 20. With it: virtual indices below 2 * 12 = 24.
OUT_OF_RANGE = [
    pytest.param(None, 20, id="rows-high"),
    pytest.param(None, -1, id="rows-negative"),
    pytest.param(None, 2**31 - 1, id="rows-far"),
    pytest.param(SlotAddressing(20, 12, expand=2), 24, id="window-high"),
    pytest.param(SlotAddressing(20, 12, expand=2), -1, id="window-negative"),
    pytest.param(SlotAddressing(20, 18, expand=2, shuffle="feistel"), 36, id="feistel-high"),
    pytest.param(SlotAddressing(20, 3, expand=2, shuffle=torch.arange(6)), 6, id="tensor-high"),
    pytest.param(SlotAddressing(20, 3, expand=2, shuffle=torch.arange(6)), -7, id="tensor-low"),
]


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("addressing", "bad"), OUT_OF_RANGE)
def test_index_out_of_range_raises_on_the_cpu(
    addressing: SlotAddressing | None, bad: int, index_dtype: torch.dtype
) -> None:
    data = Data(10)
    indices = data.integers(6, 7, 5, dtype=index_dtype)
    indices[4, 3] = bad
    scores, values = data.normal(7, 5, 1), data.normal(20, 6)
    end = 20 if addressing is None else addressing.expand * addressing.window
    message = rf"^value_ffn: indices must be in \[0, {end}\), got {bad} at \[4, 3\]$"
    with pytest.raises(RuntimeError, match=message):
        ops.value_ffn(indices, scores, values, addressing=addressing)


def test_index_out_of_range_in_int64_only_raises_on_the_cpu() -> None:
    """2^32 + 3 must not be read as 3."""
    indices = torch.full((2, 2), 2**32 + 3)
    with pytest.raises(RuntimeError, match=r"^value_ffn: indices must be in \[0, 20\)"):
        ops.value_ffn(indices, torch.ones(2, 2, 1), torch.ones(20, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("sum_groups", [True, False])
@pytest.mark.parametrize(("addressing", "bad"), OUT_OF_RANGE)
def test_index_out_of_range_contributes_zero_on_cuda(
    addressing: SlotAddressing | None, bad: int, sum_groups: bool
) -> None:
    data = Data(11, "cuda")
    indices = data.integers(6, 7, 5)
    indices[4, 3] = bad
    indices[2] = bad
    leaves = [data.normal(7, 5, 1), data.normal(20, 6), data.normal(20, 9), data.normal(7, 9)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    where = None if addressing is None else addressing.to("cuda")
    options = {"activation": "silu", "sum_groups": sum_groups}
    out = ops.value_ffn(indices, *leaves, addressing=where, **options)
    upstream = data.normal(*out.shape)
    grads = torch.autograd.grad(out, leaves, upstream)
    options |= {"addressing": addressing, "out_of_range": "zero"}
    inputs = [array(indices), *(array(leaf) for leaf in leaves)]
    check_close("out", out, ref.value_ffn(*inputs, **options), FORWARD_BOUND[torch.float32])
    expected = ref.value_ffn_bwd(array(upstream), *inputs, **options)
    check_gradient("grad_scores", grads[0], expected.scores)
    check_gradient("grad_values", grads[1], expected.values)
    check_gradient("grad_pre_values", grads[2], expected.pre_values)
    check_gradient("grad_pre_input", grads[3], expected.pre_input)


@pytest.mark.gpu
def test_index_out_of_range_raises_on_cuda_in_debug() -> None:
    code = """
import torch
from ultramem_cuda import ops
scores, values = torch.ones(2, 3, 1, device="cuda"), torch.ones(20, 6, device="cuda")
indices = torch.tensor([[0, 19, 5], [1, 2, 3]], device="cuda")
print(ops.value_ffn(indices, scores, values).sum().item())
indices[1, 1] = 20
try:
    ops.value_ffn(indices, scores, values)
except RuntimeError as error:
    print("raised", error)
print(ops.value_ffn(indices[:1], scores[:1], values).sum().item())
"""
    done = run_python(code, env={"ULTRAMEM_DEBUG": "1"})
    assert done.returncode == 0, done.stderr
    before, raised, after = done.stdout.strip().splitlines()
    assert float(before) == 36.0
    assert raised.startswith("raised value_ffn: indices must be in [0, 20)")
    assert float(after) == 18.0


# ---- large tables --------------------------------------------------------------------------------


def test_table_past_2_31_elements_on_meta() -> None:
    num_slots, width = 2**24 + 7, 2**8 + 2
    meta = {"device": "meta", "dtype": torch.bfloat16}
    values = torch.empty(num_slots, width, requires_grad=True, **meta)
    pre_values = torch.empty(num_slots, width, requires_grad=True, **meta)
    pre_input = torch.empty(9, width, requires_grad=True, **meta)
    scores = torch.empty(9, 4, 2, device="meta", requires_grad=True)
    indices = torch.empty(9, 4, dtype=torch.int64, device="meta")
    out = ops.value_ffn(indices, scores, values, pre_values, pre_input)
    assert (out.shape, out.dtype, out.device.type) == ((9, width), torch.bfloat16, "meta")
    out.sum().backward()
    for leaf in (values, pre_values, pre_input, scores):
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.dtype == leaf.dtype


def test_table_past_2_31_elements(device: str) -> None:
    """Rows beyond 2^31 elements are found. On the CPU only the rows touched take memory."""
    num_slots, width = 2**24 + 7, 130
    assert num_slots * width > 2**31
    try:
        tables = [
            torch.empty(num_slots, width, dtype=torch.bfloat16, device=device) for _ in range(2)
        ]
    except RuntimeError as error:
        pytest.skip(f"this machine has no room for two tables of 4.4 GB: {error}")
    data = Data(12, device)
    last = num_slots - 1
    rows = [0, 2**31 // width, 2**31 // width + 1, last, last - 1]
    for table in tables:
        table[rows] = data.normal(len(rows), width, dtype=torch.bfloat16)
    indices = torch.tensor(
        [[rows[0], rows[3], rows[1]], [rows[4], rows[2], rows[3]]], device=device
    )
    scores = data.normal(2, 3, 2)
    pre_input = data.normal(2, width, scale=width**-0.5)
    out = ops.value_ffn(indices, scores, *tables, pre_input)
    # The same with the five rows alone.
    position = {row: i for i, row in enumerate(rows)}
    compact = np.vectorize(position.__getitem__)(array(indices))
    small = [array(table[rows]) for table in tables]
    expected = ref.value_ffn(compact, array(scores), *small, array(pre_input))
    check_close("out", out, expected, FORWARD_BOUND[torch.float32])
    # A window that begins beyond 2^31 elements.
    addressing = SlotAddressing(num_slots, 4, offset=last - 1)
    index = torch.tensor([[1, 0, 2]], device=device)  # the last row, the one before, the first
    out = ops.value_ffn(index, scores[:1], *tables, pre_input[:1], addressing=addressing)
    compact = np.array([[3, 4, 0]])
    expected = ref.value_ffn(compact, array(scores[:1]), *small, array(pre_input[:1]))
    check_close("out", out, expected, FORWARD_BOUND[torch.float32])


@pytest.mark.gpu
def test_gradient_of_a_table_past_2_31_elements_on_cuda() -> None:
    num_slots, width = 2**24 + 7, 130
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    data = Data(13, "cuda")
    values = torch.zeros(num_slots, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    last = num_slots - 1
    indices = torch.tensor([[0, last], [last, last - 1]], device="cuda")
    scores = data.normal(2, 2, 1)
    upstream = data.normal(2, width, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(ops.value_ffn(indices, scores, values), [values], upstream)
    touched = [0, last - 1, last]
    dense = torch.einsum("tsc,td->tsd", scores, upstream.float())
    expected = torch.stack([dense[0, 0], dense[1, 1], dense[0, 1] + dense[1, 0]])
    check_gradient("grad_values", grad[touched], array(expected))
    grad[touched] = 0
    assert not grad.any()


def test_accumulation_is_not_in_the_tables_dtype(device: str) -> None:
    """4096 terms of 1: bfloat16 would stop at 256."""
    ones = torch.ones(1, 4096, 1, device=device)
    values = torch.ones(3, 5, dtype=torch.bfloat16, device=device)
    indices = torch.zeros(1, 4096, dtype=torch.int64, device=device)
    out = ops.value_ffn(indices, ones, values)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.full_like(out, 4096.0))
