"""value_ffn of scaled tables: as if they had been multiplied before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    FORWARD_BOUND,
    GRADIENT_BOUND,
    LONG_SUM,
    LONG_SUM_BOUND,
    Data,
    accumulation_dtype,
    array,
    check_close,
    check_gradient,
    root,
    square,
)
from hypothesis import given
from test_op_value_ffn import ACTIVATIONS, FIXED, Case, cases
from torch import Tensor

from ultramem_cuda import GradientFactors, ops
from ultramem_cuda import python_ref as ref

SCALE = (0.37, 0.083)


class Inputs:
    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        data = Data(case.seed, device)
        high = case.num_slots if case.window is None else case.expand * case.window
        shape = (case.tokens, case.selected)
        self.indices = data.integers(high, *shape, dtype=case.index_dtype)
        scores = data.normal(*shape, case.cores, dtype=case.score_dtype)
        values = data.normal(case.num_slots, case.cores * case.slice_dim, dtype=dtype)
        self.tensors: list[Tensor | None] = [scores, values, None, None]
        if case.pre_value_dim is not None:
            input_dtype = torch.float64 if dtype == torch.float64 else case.pre_input_dtype or dtype
            self.tensors[2] = data.normal(case.num_slots, case.pre_value_dim, dtype=dtype)
            self.tensors[3] = data.normal(
                case.tokens, case.pre_value_dim, dtype=input_dtype, scale=case.pre_value_dim**-0.5
            )
        self.addressing = case.addressing(data)
        self.options = {"activation": case.activation, "sum_groups": case.sum_groups}
        self.case, self.device, self.dtype = case, device, dtype

    def factors(self) -> GradientFactors:
        case = self.case
        width, pre_width = case.cores * case.slice_dim, case.pre_value_dim or 0
        return GradientFactors(
            case.num_slots, width, pre_width, dtype=self.dtype, device=self.device
        )

    def run(
        self, scale: Tensor | None, factors: GradientFactors | None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The output, its gradient, and those of scores and pre_input; without factors the tables
        are frozen."""
        leaves = [None if x is None else x.detach().clone() for x in self.tensors]
        for i, leaf in enumerate(leaves):
            if leaf is not None and (factors is not None or i in (0, 3)):
                leaf.requires_grad_()
        out = ops.value_ffn(
            self.indices,
            *leaves,
            addressing=self.addressing,
            table_scale=scale,
            factors=factors,
            **self.options,
        )
        upstream = Data(self.case.seed, self.device).normal(*out.shape, dtype=out.dtype)
        out.backward(upstream)
        assert all(table is None or table.grad is None for table in leaves[1:3])
        return out.detach(), upstream, [None if x is None else x.grad for x in leaves[::3]]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or torch.equal(a, b)


def check_case(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs, acc = Inputs(case, device, dtype), accumulation_dtype(dtype)
    scale = torch.tensor(SCALE, dtype=torch.float64, device=device)
    factors = inputs.factors()
    out, upstream, grads = inputs.run(scale, factors)

    where = None if inputs.addressing is None else inputs.addressing.to("cpu")
    g, slots = array(upstream), array(inputs.indices)
    arrays = [None if x is None else array(x) for x in inputs.tensors]
    squares = [None if x is None else square(x) for x in arrays]
    options = {**inputs.options, "addressing": where, "table_scale": SCALE}
    plain = {
        "sum_groups": case.sum_groups,
        "addressing": where,
        "table_scale": np.square(SCALE),
    }
    bound = FORWARD_BOUND[out.dtype]
    if out.dtype == torch.float32 and max(case.selected, case.pre_value_dim or 0) > LONG_SUM:
        bound = LONG_SUM_BOUND
    size = root(ref.value_ffn(slots, *squares, **plain))
    check_close("out", out, ref.value_ffn(slots, *arrays, **options), bound, size)

    expected = ref.value_ffn_bwd(g, slots, *arrays, **options)
    sizes = ref.value_ffn_bwd(g**2, slots, *squares, **plain)
    check_gradient("scores", grads[0], expected.scores, root(sizes.scores))
    # Of the scaled tables, not rounded to the dtype of the tables.
    bound = GRADIENT_BOUND[acc]
    values, pre_values = factors.to_dense()
    check_gradient("values", values, expected.values, root(sizes.values), bound=bound)
    if case.pre_value_dim is not None:
        check_gradient("pre_input", grads[1], expected.pre_input, root(sizes.pre_input))
        size = root(sizes.pre_values)
        check_gradient("pre_values", pre_values, expected.pre_values, size, bound=bound)

    frozen_out, _, frozen_grads = inputs.run(scale, None)
    assert torch.equal(out, frozen_out)
    assert all(same(a, b) for a, b in zip(grads, frozen_grads, strict=True))


@given(case=cases())
def test_drawn_shapes(device_dtype: tuple[str, torch.dtype], case: Case) -> None:
    check_case(case, *device_dtype)


@pytest.mark.parametrize("name", FIXED)
def test_fixed_shapes(device_dtype: tuple[str, torch.dtype], name: str) -> None:
    check_case(FIXED[name], *device_dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device_dtype: tuple[str, torch.dtype], activation: str) -> None:
    check_case(Case(31, 17, 2, 16, 120, 40, activation=activation, seed=7), *device_dtype)


@pytest.mark.parametrize("name", FIXED)
def test_a_scale_of_one_changes_no_bit(device_dtype: tuple[str, torch.dtype], name: str) -> None:
    inputs = Inputs(FIXED[name], *device_dtype)
    one = torch.ones(2, dtype=torch.float64, device=inputs.device)
    scaled, plain = inputs.factors(), inputs.factors()
    out, _, grads = inputs.run(one, scaled)
    plain_out, _, plain_grads = inputs.run(None, plain)
    assert torch.equal(out, plain_out)
    assert all(same(a, b) for a, b in zip(grads, plain_grads, strict=True))
    for part in ("slots", "weights", "grad_a", "groups", "grad_outs", "pre_inputs"):
        assert same(getattr(scaled, part), getattr(plain, part))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_follows_the_scale(device: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    inputs = Inputs(Case(5, 6, 2, 8, 40, 16, activation="silu"), device, torch.float32)
    scores, values, pre_values, pre_input = inputs.tensors
    scale = torch.ones(2, dtype=torch.float64, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(scores: Tensor, pre_input: Tensor) -> Tensor:
        return ops.value_ffn(
            inputs.indices, scores, values, pre_values, pre_input, table_scale=scale
        )

    for factor in (1.0, 0.5, 0.25):
        scale.fill_(factor)
        leaves = [x.detach().clone().requires_grad_() for x in (scores, pre_input)]
        out = compiled(*leaves)
        expected = ops.value_ffn(
            inputs.indices, leaves[0], values * factor, pre_values * factor, leaves[1]
        )
        torch.testing.assert_close(out, expected)
        for mine, theirs in zip(
            torch.autograd.grad(out.sum(), leaves),
            torch.autograd.grad(expected.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.gpu
def test_a_graph_reads_the_scale_at_replay() -> None:
    inputs = Inputs(FIXED["layer"], "cuda", torch.bfloat16)
    scale = torch.ones(2, dtype=torch.float64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inputs.run(scale, None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.value_ffn(
            inputs.indices, *inputs.tensors, addressing=inputs.addressing, table_scale=scale
        )
    for factor in (1.0, 0.3):
        scale.fill_(factor)
        graph.replay()
        expected = ops.value_ffn(
            inputs.indices, *inputs.tensors, addressing=inputs.addressing, table_scale=scale
        )
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_of_a_graph_reads_the_scale_at_replay(dtype: torch.dtype) -> None:
    inputs = Inputs(FIXED["layer"], "cuda", dtype)
    scale = torch.ones(2, dtype=torch.float64, device="cuda")
    leaves = [x.detach().clone().requires_grad_() for x in inputs.tensors]
    upstream = inputs.run(scale, None)[1]

    def run(factors: GradientFactors) -> tuple[Tensor, ...]:
        out = ops.value_ffn(
            inputs.indices,
            *leaves,
            addressing=inputs.addressing,
            table_scale=scale,
            factors=factors,
            **inputs.options,
        )
        return torch.autograd.grad(out, leaves[::3], upstream)

    captured, eager = inputs.factors(), inputs.factors()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(captured)
    torch.cuda.current_stream().wait_stream(stream)
    captured.clear()
    captured.reserve(inputs.case.tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = run(captured)
    for factors in ((1.0, 1.0), (0.3, 0.7), (0.01, 0.5)):
        scale.copy_(torch.tensor(factors))
        captured.clear()
        eager.clear()
        graph.replay()
        assert all(map(torch.equal, grads, run(eager)))
        for part in ("slots", "weights", "grad_a", "groups", "grad_outs", "pre_inputs"):
            assert same(getattr(captured, part), getattr(eager, part))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3, dtype=torch.float64), r"table_scale must be \[2\]"),
        (torch.ones(2, 1, dtype=torch.float64), r"table_scale must be \[2\]"),
        (torch.ones(2), "table_scale must be float64, got float32"),
    ],
    ids=["length", "rank", "dtype"],
)
@pytest.mark.parametrize("meta", [False, True])
def test_bad_scales(device: str, scale: Tensor, message: str, meta: bool) -> None:
    to = "meta" if meta else device
    indices = torch.zeros(1, 2, dtype=torch.int64, device=to)
    with pytest.raises(RuntimeError, match=f"value_ffn: {message}"):
        ops.value_ffn(
            indices,
            torch.ones(1, 2, 1, device=to),
            torch.ones(5, 4, device=to),
            table_scale=scale.to(to),
        )


@pytest.mark.gpu
def test_a_scale_on_another_device_raises() -> None:
    inputs = Inputs(FIXED["bag"], "cuda", torch.float32)
    with pytest.raises(RuntimeError, match="table_scale must be on the device of values"):
        ops.value_ffn(
            inputs.indices,
            *inputs.tensors[:2],
            table_scale=torch.ones(2, dtype=torch.float64),
        )


def test_it_has_no_gradient(device: str) -> None:
    inputs = Inputs(FIXED["bag"], device, torch.float32)
    scale = torch.ones(2, dtype=torch.float64, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="table_scale has no gradient"):
        inputs.run(scale, inputs.factors())


def test_dense_gradients_of_the_tables_are_refused(device: str) -> None:
    inputs = Inputs(FIXED["bag"], device, torch.float32)
    scale = torch.ones(2, dtype=torch.float64, device=device)
    scores, values = inputs.tensors[:2]
    values.requires_grad_()
    with pytest.raises(ValueError, match="table_scale needs factors where the tables train"):
        ops.value_ffn(inputs.indices, scores, values, table_scale=scale)
    options = ("identity", 0, 0, 1, "none", 0, 0, True)
    raw = torch.ops.ultramem.value_ffn
    out, _ = raw(inputs.indices, scores, values, *[None] * 3, scale, *[None] * 3, *options)
    with pytest.raises(RuntimeError, match="dense gradients of the tables are not offered"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="table_scale and a main_grad of the tables exclude"):
        raw(inputs.indices, scores, values, *[None] * 3, scale, values, None, None, *options)
