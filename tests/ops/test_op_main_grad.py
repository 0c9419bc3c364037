"""Gradients of the tables accumulated into `main_grad`, as Megatron has it."""

from __future__ import annotations

import pytest
import torch
from helpers import GRADIENT_BOUND, Data, accumulation_dtype, array, check_gradient
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ultramem_cuda import ops
from ultramem_cuda import python_ref as ref

ROWS, SLOTS, TOKENS = 40, 6, 11


class Layer:
    """Two tables and what one layer hands to value_ffn."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.data = Data(1, device)
        self.values = self.data.normal(ROWS, 8, dtype=dtype, requires_grad=True)
        self.pre_values = self.data.normal(ROWS, 5, dtype=dtype, requires_grad=True)
        self.acc = accumulation_dtype(dtype)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.values, self.pre_values

    def give_main_grads(self, *tables: Tensor) -> None:
        for table in tables or self.tables:
            table.main_grad = torch.zeros(table.shape, dtype=self.acc, device=table.device)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """indices, scores and pre_input, new ones in every call."""
        return (
            self.data.integers(ROWS, TOKENS, SLOTS),
            self.data.normal(TOKENS, SLOTS, 2, requires_grad=True),
            self.data.normal(TOKENS, 5, dtype=self.values.dtype, requires_grad=True),
        )

    def __call__(self, indices: Tensor, scores: Tensor, pre_input: Tensor) -> Tensor:
        return ops.value_ffn(indices, scores, *self.tables, pre_input, activation="silu")

    def expected(self, inputs: tuple[Tensor, ...], upstream: Tensor) -> ref.ValueFFNGrads:
        indices, scores, pre_input = (array(x) for x in inputs)
        tables = [array(table) for table in self.tables]
        return ref.value_ffn_bwd(
            array(upstream), indices, scores, *tables, pre_input, activation="silu"
        )


def bound(dtype: torch.dtype) -> float:
    """main_grad is never rounded to the table's dtype."""
    return GRADIENT_BOUND[accumulation_dtype(dtype)]


def test_accumulates_and_leaves_grad_none(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    layer = Layer(device, dtype)
    layer.give_main_grads()
    values_sum, pre_values_sum = 0.0, 0.0
    for _ in range(2):
        inputs = layer.inputs()
        upstream = layer.data.normal(TOKENS, 8, dtype=dtype)
        layer(*inputs).backward(upstream)
        expected = layer.expected(inputs, upstream)
        values_sum = values_sum + expected.values
        pre_values_sum = pre_values_sum + expected.pre_values
        check_gradient("grad_scores", inputs[1].grad, expected.scores)
        check_gradient("grad_pre_input", inputs[2].grad, expected.pre_input)
        check_gradient("values", layer.values.main_grad, values_sum, bound=bound(dtype))
        check_gradient("pre_values", layer.pre_values.main_grad, pre_values_sum, bound=bound(dtype))
    for table in layer.tables:
        assert table.grad is None
        assert table.grad_added_to_main_grad is True


def test_main_grad_equals_grad_in_float32(device: str) -> None:
    layer = Layer(device)
    inputs = layer.inputs()
    upstream = layer.data.normal(TOKENS, 8)
    wanted = torch.autograd.grad(layer(*inputs), [*layer.tables, *inputs[1:]], upstream)
    layer.give_main_grads()
    layer(*inputs).backward(upstream)
    got = layer.values.main_grad, layer.pre_values.main_grad, inputs[1].grad, inputs[2].grad
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_adds_to_what_is_there(device: str) -> None:
    layer = Layer(device)
    layer.give_main_grads()
    inputs, upstream = layer.inputs(), layer.data.normal(TOKENS, 8)
    layer(*inputs).backward(upstream)
    wanted = [table.main_grad.clone() for table in layer.tables]
    for table in layer.tables:
        table.main_grad.fill_(7.0)
    layer(*inputs).backward(upstream)
    for table, grad in zip(layer.tables, wanted, strict=True):
        torch.testing.assert_close(table.main_grad, grad + 7.0, rtol=1e-5, atol=1e-5)


def check_runs(device: str, tokens: int, distinct: int, dims: tuple[int, int], cores: int) -> None:
    """main_grad of tables of which few rows are named, each by many entries, against sums in
    float64; and the same bits twice."""
    data, selected, rows = Data(3, device), 64, distinct + 40
    values_dim, pre_values_dim = dims
    indices = data.integers(distinct, tokens, selected) + 11
    scores = data.normal(tokens, selected, cores)
    values, pre_values = (data.normal(rows, n) for n in dims)
    pre_input = data.normal(tokens, pre_values_dim, scale=pre_values_dim**-0.5)
    upstream = data.normal(tokens, values_dim)
    runs = []
    for _ in range(2):
        tables = [x.detach().requires_grad_() for x in (values, pre_values)]
        for table in tables:
            table.main_grad = torch.full_like(table, 0.5)
        ops.value_ffn(indices, scores, *tables, pre_input).backward(upstream)
        runs.append([table.main_grad for table in tables])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)

    x, g = pre_input.double(), upstream.double().view(tokens, cores, -1)
    s, v, p = scores.double(), values.double().view(rows, cores, -1), pre_values.double()
    expected = [torch.full_like(t, 0.5, dtype=torch.float64) for t in (values, pre_values)]
    sizes = [torch.zeros_like(t) for t in expected]
    for k in range(selected):
        slot = indices[:, k]
        a = (p[slot] * x).sum(-1)
        da = ((g * v[slot]).sum(-1) * s[:, k]).sum(-1)
        terms = (a[:, None, None] * s[:, k, :, None] * g).flatten(1), da[:, None] * x
        for total, size, term in zip(expected, sizes, terms, strict=True):
            total.index_add_(0, slot, term)
            size.index_add_(0, slot, term.abs())
    for got, wanted, size in zip(runs[0], expected, sizes, strict=True):
        assert ((got - wanted).abs() <= 1e-6 * size + 1e-5 * (size > 0)).all()


@pytest.mark.parametrize(
    ("dims", "cores"),
    [((64, 32), 2), ((640, 384), 2), ((760, 8), 4), ((30, 21), 3), ((130, 101), 1)],
)
@pytest.mark.parametrize("distinct", [1, 3, 700])
def test_runs_that_cross_pieces(
    device: str, distinct: int, dims: tuple[int, int], cores: int
) -> None:
    """Many warps have a part of a row's gradient; rows of one batch of columns and of several."""
    check_runs(device, 330, distinct, dims, cores)


@pytest.mark.gpu
@pytest.mark.parametrize("distinct", [1, 40])
def test_runs_of_half_a_million_entries(distinct: int) -> None:
    """From 2^19 entries on, pieces are longer."""
    check_runs("cuda", 9000, distinct, (16, 8), 2)


def test_no_tokens_change_nothing(device_dtype: tuple[str, torch.dtype]) -> None:
    layer = Layer(*device_dtype)
    layer.give_main_grads()
    for table in layer.tables:
        table.main_grad.fill_(7.0)
    indices, scores, pre_input = (tensor.detach()[:0] for tensor in layer.inputs())
    layer(indices, scores.requires_grad_(), pre_input).sum().backward()
    for table in layer.tables:
        assert (table.main_grad == 7.0).all()
        assert table.grad is None


@pytest.mark.parametrize("frozen", ["values", "pre_values"])
@pytest.mark.parametrize("frozen_has_buffer", [True, False])
def test_one_table_frozen(device: str, frozen: str, frozen_has_buffer: bool) -> None:
    layer = Layer(device)
    inputs, upstream = layer.inputs(), layer.data.normal(TOKENS, 8)
    expected = layer.expected(inputs, upstream)
    trained = "pre_values" if frozen == "values" else "values"
    still, moving = getattr(layer, frozen), getattr(layer, trained)
    still.requires_grad_(False)
    layer.give_main_grads(*(layer.tables if frozen_has_buffer else [moving]))
    layer(*inputs).backward(upstream)
    check_gradient(trained, moving.main_grad, getattr(expected, trained))
    check_gradient("grad_scores", inputs[1].grad, expected.scores)
    check_gradient("grad_pre_input", inputs[2].grad, expected.pre_input)
    assert not hasattr(still, "grad_added_to_main_grad")
    assert still.grad is None
    assert moving.grad is None
    assert not frozen_has_buffer or not still.main_grad.any()


@pytest.mark.parametrize("owner", ["values", "pre_values"])
def test_only_one_table_with_main_grad_raises(device: str, owner: str) -> None:
    layer = Layer(device)
    layer.give_main_grads(getattr(layer, owner))
    with pytest.raises(ValueError, match=r"value_ffn: .*both have a main_grad, or neither"):
        layer(*layer.inputs())


def test_main_grad_none_counts_as_absent(device: str) -> None:
    layer = Layer(device)
    for table in layer.tables:
        table.main_grad = None
    layer(*layer.inputs()).sum().backward()
    assert layer.values.grad is not None
    assert layer.pre_values.grad is not None
    assert not hasattr(layer.values, "grad_added_to_main_grad")


def test_no_grad_mode_touches_nothing(device: str) -> None:
    layer = Layer(device)
    layer.give_main_grads()
    with torch.no_grad():
        assert not layer(*layer.inputs()).requires_grad
    assert not hasattr(layer.values, "grad_added_to_main_grad")


def test_without_pre_values(device: str) -> None:
    layer = Layer(device)
    layer.give_main_grads(layer.values)
    indices, scores, _ = layer.inputs()
    upstream = layer.data.normal(TOKENS, 8)
    ops.value_ffn(indices, scores, layer.values).backward(upstream)
    expected = ref.value_ffn_bwd(
        array(upstream), array(indices), array(scores), array(layer.values)
    )
    check_gradient("values", layer.values.main_grad, expected.values)
    assert layer.values.grad is None


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("shape", r"values\.main_grad must be \[N, Dv\] = \[40, 8\], got \[39, 8\]"),
        ("dtype", r"values\.main_grad must be torch\.float32 on .*, got torch\.bfloat16"),
        ("layout", r"values\.main_grad must be contiguous"),
    ],
)
def test_unfit_main_grad_raises(device: str, problem: str, message: str) -> None:
    layer = Layer(device)
    layer.give_main_grads()
    layer.values.main_grad = {
        "shape": torch.zeros(39, 8, device=device),
        "dtype": torch.zeros(40, 8, dtype=torch.bfloat16, device=device),
        "layout": torch.zeros(8, 40, device=device).t(),
    }[problem]
    with pytest.raises(ValueError, match=message):
        layer(*layer.inputs())
    assert not layer.pre_values.main_grad.any()


def test_two_layers_share_the_tables(device: str) -> None:
    """Both backwards add to one buffer; the first does not invalidate what the second saved."""
    layer = Layer(device)
    layer.give_main_grads()
    first, second = layer.inputs(), layer.inputs()
    upstream = layer.data.normal(TOKENS, 8)
    (layer(*first) + layer(*second)).backward(upstream)
    a, b = layer.expected(first, upstream), layer.expected(second, upstream)
    check_gradient("values", layer.values.main_grad, a.values + b.values)
    check_gradient("pre_values", layer.pre_values.main_grad, a.pre_values + b.pre_values)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(device: str, use_reentrant: bool) -> None:
    """The forward runs twice, the gradient is added once."""
    layer = Layer(device)
    layer.give_main_grads()
    indices, scores, pre_input = inputs = layer.inputs()
    upstream = layer.data.normal(TOKENS, 8)
    out = checkpoint(layer, indices, scores, pre_input, use_reentrant=use_reentrant)
    out.backward(upstream)
    expected = layer.expected(inputs, upstream)
    check_gradient("values", layer.values.main_grad, expected.values)
    check_gradient("pre_values", layer.pre_values.main_grad, expected.pre_values)
    check_gradient("grad_scores", scores.grad, expected.scores)
    assert layer.values.grad is None


@pytest.mark.parametrize("shared", [False, True])
def test_under_compile(device: str, shared: bool) -> None:
    torch._dynamo.reset()
    layer = Layer(device)
    layer.give_main_grads()
    first, second = layer.inputs(), layer.inputs()

    def function(values: Tensor, pre_values: Tensor, *inputs: Tensor) -> Tensor:
        out = ops.value_ffn(*inputs[:2], values, pre_values, inputs[2], activation="silu")
        if shared:
            out = out + ops.value_ffn(
                *inputs[3:5], values, pre_values, inputs[5], activation="silu"
            )
        return out

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = layer.data.normal(TOKENS, 8)
    for steps in (1, 2):
        compiled(*layer.tables, *first, *second).backward(upstream)
        expected = layer.expected(first, upstream)
        values, pre_values = expected.values, expected.pre_values
        if shared:
            expected = layer.expected(second, upstream)
            values, pre_values = values + expected.values, pre_values + expected.pre_values
        check_gradient("values", layer.values.main_grad, steps * values)
        check_gradient("pre_values", layer.pre_values.main_grad, steps * pre_values)
    for table in layer.tables:
        assert table.grad is None
        assert table.grad_added_to_main_grad is True
