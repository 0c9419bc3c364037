"""value_ffn against the reference, over drawn and fixed shapes."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from helpers import Data, array, check_only_some_train, check_value_ffn, proper_subsets
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ultramem_cuda import SlotAddressing, ops
from ultramem_cuda import python_ref as ref

ACTIVATIONS = ["identity", "gelu", "relu", "silu"]


@dataclasses.dataclass
class Case:
    """Shapes and options; the tensors come from the seed."""

    tokens: int
    selected: int
    cores: int
    slice_dim: int  # Dv / C
    num_slots: int
    pre_value_dim: int | None = None
    pre_input_dtype: torch.dtype | None = None  # None: the table's
    score_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    activation: str = "identity"
    window: int | None = None  # None: no addressing
    offset: int = 0
    expand: int = 1
    shuffle: str | None = None  # None, "feistel" or "tensor"
    sum_groups: bool = True
    seed: int = 0

    def addressing(self, data: Data) -> SlotAddressing | None:
        if self.window is None:
            return None
        shuffle: str | Tensor | None = self.shuffle
        if shuffle == "tensor":
            permutation = torch.randperm(self.expand * self.window, generator=data.generator)
            shuffle = permutation.to(data.device)
        return SlotAddressing(
            self.num_slots, self.window, self.offset, self.expand, shuffle, self.seed % 2**40
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    case = Case(
        tokens=draw(st.sampled_from([0, 1, 7, 129])),
        selected=draw(st.integers(1, 40)),
        cores=draw(st.integers(1, 4)),
        slice_dim=draw(st.integers(1, 40)),
        num_slots=draw(st.integers(1, 300)),
        score_dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        index_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        seed=draw(st.integers(0, 2**32)),
    )
    if draw(st.booleans()):
        case.pre_value_dim = draw(st.integers(1, 90))
        case.activation = draw(st.sampled_from(ACTIVATIONS))
        case.pre_input_dtype = draw(
            st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16])
        )
    if draw(st.booleans()):
        case.expand = draw(st.integers(1, 4))
        case.shuffle = draw(st.sampled_from([None, "feistel", "tensor"]))
        case.sum_groups = draw(st.booleans())
        # expand * window = (expand * k)^2
        root = draw(st.integers(1, 8))
        case.window = (
            case.expand * root**2 if case.shuffle == "feistel" else draw(st.integers(1, 250))
        )
        case.num_slots = case.window + draw(st.integers(0, 60))
        case.offset = draw(st.integers(0, case.num_slots - 1))
    return case


def check(case: Case, device: str, dtype: torch.dtype) -> None:
    data = Data(case.seed, device)
    high = case.num_slots if case.window is None else case.expand * case.window
    shape = (case.tokens, case.selected)
    pre_values = pre_input = None
    if case.pre_value_dim is not None:
        input_dtype = case.pre_input_dtype or dtype
        if dtype == torch.float64:
            input_dtype = torch.float64
        pre_values = data.normal(case.num_slots, case.pre_value_dim, dtype=dtype)
        # Pre-activations of variance 1, where the activations bend.
        scale = case.pre_value_dim**-0.5
        pre_input = data.normal(case.tokens, case.pre_value_dim, dtype=input_dtype, scale=scale)
    check_value_ffn(
        data.integers(high, *shape, dtype=case.index_dtype),
        data.normal(*shape, case.cores, dtype=case.score_dtype),
        data.normal(case.num_slots, case.cores * case.slice_dim, dtype=dtype),
        pre_values,
        pre_input,
        activation=case.activation,
        addressing=case.addressing(data),
        sum_groups=case.sum_groups,
        seed=case.seed,
    )


@given(case=cases())
def test_drawn_shapes(device_dtype: tuple[str, torch.dtype], case: Case) -> None:
    check(case, *device_dtype)


FIXED = {
    "layer": Case(64, 32, 2, 96, 5000, 192, window=3600, offset=2000, shuffle="feistel", seed=1),
    "expanded": Case(
        33, 64, 2, 100, 700, 80, window=576, offset=333, expand=4, shuffle="feistel", seed=2
    ),
    "apart": Case(
        17, 40, 3, 20, 500, 48, window=400, expand=4, shuffle="tensor", sum_groups=False, seed=3
    ),
    "bag": Case(129, 100, 4, 48, 3000, seed=4),
    "long": Case(3, 3000, 1, 72, 900, 130, activation="silu", seed=5),
    "wide": Case(5, 8, 2, 700, 64, 2500, activation="gelu", seed=6),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_shapes(device_dtype: tuple[str, torch.dtype], name: str) -> None:
    check(FIXED[name], *device_dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device_dtype: tuple[str, torch.dtype], activation: str) -> None:
    check(Case(31, 17, 2, 16, 120, 40, activation=activation, seed=7), *device_dtype)


@pytest.mark.parametrize("pre_input_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_table_and_input_are_independent(
    device: str, table_dtype: torch.dtype, pre_input_dtype: torch.dtype
) -> None:
    case = Case(40, 12, 2, 24, 60, 33, pre_input_dtype, activation="silu", seed=8)
    check(case, device, table_dtype)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65])
def test_row_widths_around_multiples_of_vector_widths(
    device_dtype: tuple[str, torch.dtype], dim: int
) -> None:
    check(Case(12, 9, 1, dim, 40, dim, seed=dim), *device_dtype)
    check(Case(12, 9, 3, dim, 40, seed=dim), *device_dtype)


# Dp and Dv: rows of whole 16-byte vectors from short ones to one that is too long for registers.
VECTOR_ROWS = [(192, 192), (24, 768), (768, 256), (1000, 800), (1024, 2048), (2056, 64)]


@pytest.mark.parametrize("dims", VECTOR_ROWS, ids=str)
@pytest.mark.parametrize(("tokens", "selected"), [(1, 300), (20, 40), (900, 3)])
def test_few_tokens_with_many_slots_and_many_with_few(
    device_dtype: tuple[str, torch.dtype], tokens: int, selected: int, dims: tuple[int, int]
) -> None:
    """Few tokens are shared by many warps of the GPU, many take one each."""
    if device_dtype[0] == "cpu":
        tokens = min(tokens, 90)
    case = Case(tokens, selected, 2, dims[1] // 2, 200, dims[0], activation="gelu", seed=13)
    check(case, *device_dtype)


@pytest.mark.parametrize("dims", VECTOR_ROWS, ids=str)
def test_a_token_does_not_depend_on_how_many_there_are(
    device_dtype: tuple[str, torch.dtype], dims: tuple[int, int]
) -> None:
    """Not in the last bit."""
    device, dtype = device_dtype
    data = Data(14, device)
    tokens = 900
    indices = data.integers(200, tokens, 90)
    scores = data.normal(tokens, 90, 2, requires_grad=True)
    tables = [data.normal(200, dim, dtype=dtype) for dim in reversed(dims)]
    pre_input = data.normal(tokens, dims[0], dtype=dtype, scale=dims[0] ** -0.5, requires_grad=True)
    upstream = data.normal(tokens, dims[1], dtype=dtype)

    def outcome(count: int) -> tuple[Tensor, ...]:
        out = ops.value_ffn(
            indices[:count], scores[:count], *tables, pre_input[:count], activation="silu"
        )
        grads = torch.autograd.grad(out, (scores, pre_input), upstream[:count])
        return out, *(grad[:count] for grad in grads)

    of_all = outcome(tokens)
    for few in (1, 30, 200, 300):
        for a, b in zip(outcome(few), of_all, strict=True):
            assert torch.equal(a, b[:few])


@pytest.mark.parametrize("shuffle", [None, "feistel", "tensor"])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_slots_are_the_addressings(
    device: str, shuffle: str | None, index_dtype: torch.dtype
) -> None:
    """Reading a table of its own row numbers gives SlotAddressing.slots and the reference's, for
    every virtual index."""
    case = Case(1, 1, 1, 1, 1500, window=1296, offset=700, expand=4, shuffle=shuffle, seed=9)
    addressing = case.addressing(Data(case.seed, device))
    assert addressing is not None
    indices = torch.arange(addressing.num_virtual, device=device)
    table = torch.arange(case.num_slots, device=device).float().unsqueeze(1)
    ones = torch.ones(addressing.num_virtual, 1, 1, device=device)
    out = ops.value_ffn(
        indices.unsqueeze(1).to(index_dtype), ones, table, addressing=addressing, sum_groups=False
    )
    slot, group = addressing.slots(indices)
    expected = torch.zeros(addressing.num_virtual, 4, 1, device=device)
    expected[indices, group, 0] = slot.float()
    assert torch.equal(out, expected)
    cpu = addressing.to("cpu")
    fields = {field: getattr(cpu, field) for field in ("num_slots", "window", "offset", "expand")}
    ref_slot, ref_group = ref.slots(array(indices), shuffle=cpu.shuffle, seed=cpu.seed, **fields)
    np.testing.assert_array_equal(array(slot), ref_slot)
    np.testing.assert_array_equal(array(group), ref_group)


@pytest.mark.parametrize(
    "trained", proper_subsets("scores", "values", "pre_values", "pre_input"), ids="-".join
)
def test_only_some_inputs_train(device: str, trained: tuple[str, ...]) -> None:
    data = Data(10, device)
    inputs = {
        "scores": data.normal(6, 5, 2, requires_grad=True),
        "values": data.normal(30, 8, requires_grad=True),
        "pre_values": data.normal(30, 9, requires_grad=True),
        "pre_input": data.normal(6, 9, requires_grad=True),
    }
    indices = data.integers(30, 6, 5)
    check_only_some_train(functools.partial(ops.value_ffn, indices), inputs, trained)


def test_not_contiguous(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    data = Data(11, device)
    indices = data.integers(30, 5, 12).t()[::2]
    scores = data.normal(2, 5, 6).permute(2, 1, 0)
    values = data.normal(16, 30, dtype=dtype).t()[:, ::2]
    pre_values = data.normal(60, 9, dtype=dtype)[::2]
    pre_input = data.normal(9, 6, dtype=dtype).t()
    inputs = (scores, values, pre_values, pre_input)
    assert not any(tensor.is_contiguous() for tensor in (indices, *inputs))
    outcomes = []
    for make in (torch.clone, torch.detach):
        leaves = [make(tensor).requires_grad_() for tensor in inputs]
        out = ops.value_ffn(make(indices), *leaves, activation="silu")
        upstream = torch.ones((), dtype=dtype, device=device).expand_as(out)
        outcomes.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)
