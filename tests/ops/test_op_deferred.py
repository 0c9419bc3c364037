"""Deferred gradients of the tables: factors appended to buffers instead of gradient tables."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from helpers import GRADIENT_BOUND, Data, accumulation_dtype, array, check_gradient, root, square
from hypothesis import given
from test_op_value_ffn import ACTIVATIONS, FIXED, Case, cases
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ultramem_cuda import GradientFactors, ops
from ultramem_cuda import python_ref as ref

ROWS, SLOTS, TOKENS, CORES, DV, DP = 40, 6, 11, 2, 8, 5


class Layer:
    """Two tables with deferred gradients and what one layer hands to value_ffn."""

    def __init__(
        self, device: str, dtype: torch.dtype = torch.float32, pre_values: bool = True
    ) -> None:
        self.data = Data(1, device)
        self.values = self.data.normal(ROWS, DV, dtype=dtype, requires_grad=True)
        self.pre_values: Tensor | None = None
        if pre_values:
            self.pre_values = self.data.normal(ROWS, DP, dtype=dtype, requires_grad=True)
        self.factors = GradientFactors(
            ROWS, DV, DP if pre_values else 0, dtype=dtype, device=device
        )

    def reserve(self, num_tokens: int) -> None:
        self.factors.reserve(num_tokens, num_selected=SLOTS, num_cores=CORES)

    def inputs(self, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor | None]:
        """indices, scores and pre_input, new ones in every call."""
        return (
            self.data.integers(ROWS, tokens, SLOTS),
            self.data.normal(tokens, SLOTS, CORES, requires_grad=True),
            None
            if self.pre_values is None
            else self.data.normal(tokens, DP, dtype=self.values.dtype, requires_grad=True),
        )

    def upstream(self, tokens: int = TOKENS) -> Tensor:
        return self.data.normal(tokens, DV, dtype=self.values.dtype)

    def __call__(
        self, indices: Tensor, scores: Tensor, pre_input: Tensor | None, factors: bool = True
    ) -> Tensor:
        return ops.value_ffn(
            indices,
            scores,
            self.values,
            self.pre_values,
            pre_input,
            activation="identity" if self.pre_values is None else "silu",
            factors=self.factors if factors else None,
        )

    def dense(self, *steps: tuple[tuple[Tensor, ...], Tensor]) -> list[Tensor | None]:
        """Gradients of the tables in the accumulation dtype, from the dense backward."""
        tables = [t for t in (self.values, self.pre_values) if t is not None]
        acc = accumulation_dtype(self.values.dtype)
        for table in tables:
            table.main_grad = torch.zeros(table.shape, dtype=acc, device=table.device)
        for inputs, upstream in steps:
            detached = [None if x is None else x.detach() for x in inputs]
            self(*detached, factors=False).backward(upstream)
        grads: list[Tensor | None] = []
        for table in tables:
            grads.append(table.main_grad)
            table.main_grad = None
        return grads if self.pre_values is not None else [*grads, None]

    def check(self, *steps: tuple[tuple[Tensor, ...], Tensor]) -> None:
        """The factors held are those of these steps, and the tables have no gradients."""
        assert self.factors.num_tokens == sum(inputs[0].shape[0] for inputs, _ in steps)
        for got, wanted in zip(self.factors.to_dense(), self.dense(*steps), strict=True):
            if wanted is None:
                assert got is None
            else:
                atol = 1e-5 * wanted.abs().max().item()
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=atol)
        assert self.values.grad is None
        assert self.pre_values is None or self.pre_values.grad is None


# ---- against the reference -------------------------------------------------------------------


def check_case(case: Case, device: str, dtype: torch.dtype) -> None:
    data, acc = Data(case.seed, device), accumulation_dtype(dtype)
    high = case.num_slots if case.window is None else case.expand * case.window
    indices = data.integers(high, case.tokens, case.selected, dtype=case.index_dtype)
    scores = data.normal(case.tokens, case.selected, case.cores, dtype=case.score_dtype)
    values = data.normal(case.num_slots, case.cores * case.slice_dim, dtype=dtype)
    pre_values = pre_input = None
    if case.pre_value_dim is not None:
        input_dtype = torch.float64 if dtype == torch.float64 else case.pre_input_dtype or dtype
        scale = case.pre_value_dim**-0.5
        pre_values = data.normal(case.num_slots, case.pre_value_dim, dtype=dtype)
        pre_input = data.normal(case.tokens, case.pre_value_dim, dtype=input_dtype, scale=scale)
    addressing = case.addressing(data)
    options = {"activation": case.activation, "sum_groups": case.sum_groups}
    factors = GradientFactors(
        case.num_slots, values.shape[1], case.pre_value_dim or 0, dtype=dtype, device=device
    )

    def run(factors: GradientFactors | None) -> tuple[list[Tensor | None], Tensor, Tensor]:
        leaves = [
            None if x is None else x.detach().requires_grad_()
            for x in (scores, values, pre_values, pre_input)
        ]
        out = ops.value_ffn(indices, *leaves, addressing=addressing, factors=factors, **options)
        upstream = Data(case.seed, device).normal(*out.shape, dtype=out.dtype)
        out.backward(upstream)
        return [None if leaf is None else leaf.grad for leaf in leaves], upstream, out.detach()

    dense, upstream, out = run(None)
    deferred, _, deferred_out = run(factors)
    assert torch.equal(out, deferred_out)
    for a, b in ((dense[0], deferred[0]), (dense[3], deferred[3])):
        assert (a is None and b is None) or torch.equal(a, b)
    assert deferred[1] is None
    assert deferred[2] is None
    assert factors.num_tokens == case.tokens

    where = None if addressing is None else addressing.to("cpu")
    inputs = [array(scores.to(acc)), array(values)]
    inputs += [None if x is None else array(x) for x in (pre_values, pre_input)]
    squares = [square(x) for x in inputs]
    g, slots = array(upstream), array(indices)
    expected = ref.value_ffn_bwd(g, slots, *inputs, addressing=where, **options)
    plain = {"sum_groups": case.sum_groups, "addressing": where}
    sizes = ref.value_ffn_bwd(g**2, slots, *squares, **plain)
    # Nothing is rounded to the dtype of the table.
    bound = GRADIENT_BOUND[acc]
    dense_grads, sparse_grads = factors.to_dense(), factors.to_sparse()
    assert dense_grads[0].dtype == acc
    for full, sparse, name in zip(dense_grads, sparse_grads, ("values", "pre_values"), strict=True):
        if full is None:
            assert sparse is None
            assert pre_values is None
            continue
        assert sparse.is_coalesced()
        wanted, size = getattr(expected, name), root(getattr(sizes, name))
        check_gradient(name, full, wanted, size, bound=bound)
        check_gradient(f"{name}, sparse", sparse.to_dense(), wanted, size, bound=bound)


@given(case=cases())
def test_drawn_shapes(device_dtype: tuple[str, torch.dtype], case: Case) -> None:
    check_case(case, *device_dtype)


@pytest.mark.parametrize("name", FIXED)
def test_fixed_shapes(device_dtype: tuple[str, torch.dtype], name: str) -> None:
    check_case(FIXED[name], *device_dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device_dtype: tuple[str, torch.dtype], activation: str) -> None:
    check_case(Case(31, 17, 2, 16, 120, 40, activation=activation, seed=7), *device_dtype)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 9, 15, 16, 17])
def test_rows_of_all_alignments(device_dtype: tuple[str, torch.dtype], dim: int) -> None:
    check_case(Case(12, 9, 1, dim, 40, dim, seed=dim), *device_dtype)


# ---- what is held ----------------------------------------------------------------------------


@pytest.mark.parametrize("pre_values", [True, False])
def test_the_views(device_dtype: tuple[str, torch.dtype], pre_values: bool) -> None:
    device, dtype = device_dtype
    layer = Layer(device, dtype, pre_values)
    first, second = layer.inputs(), layer.inputs(3)
    upstreams = layer.upstream(), layer.upstream(3)
    for inputs, upstream in zip((first, second), upstreams, strict=True):
        layer(*inputs).backward(upstream)
    factors, tokens = layer.factors, TOKENS + 3
    assert (factors.num_tokens, factors.num_selected) == (tokens, SLOTS)
    indices = torch.cat([first[0], second[0]])
    assert factors.slots.dtype == torch.int32
    assert torch.equal(factors.slots, indices.flatten().int())
    assert torch.equal(factors.grad_outs, torch.cat(upstreams).unsqueeze(1))
    assert factors.weights.shape == (tokens * SLOTS, CORES)
    assert factors.weights.dtype == accumulation_dtype(dtype)
    assert factors.groups is None
    if pre_values:
        assert torch.equal(factors.pre_inputs, torch.cat([first[2], second[2]]))
        assert factors.grad_a.shape == (tokens * SLOTS,)
    else:
        scores = torch.cat([first[1], second[1]]).detach()
        assert torch.equal(factors.weights, scores.flatten(0, 1).to(factors.weights.dtype))
        assert factors.pre_inputs is None
        assert factors.grad_a is None


def test_before_the_first_use(device: str) -> None:
    factors = Layer(device).factors
    assert (factors.num_tokens, factors.capacity, factors.shape) == (0, 0, None)
    assert factors.nbytes == 256
    assert factors.slots.numel() == 0
    values, pre_values = factors.to_dense()
    assert values.shape == (ROWS, DV)
    assert pre_values.shape == (ROWS, DP)
    assert not values.any()
    assert not pre_values.any()
    values, pre_values = factors.to_sparse()
    assert values._nnz() == pre_values._nnz() == 0
    factors.clear()
    factors.check()


def test_bytes_are_as_documented(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    layer = Layer(device, dtype)
    layer.reserve(1000)
    acc = accumulation_dtype(dtype).itemsize
    per_token = SLOTS * (4 + acc * CORES + acc) + (DV + DP) * dtype.itemsize
    assert layer.factors.bytes_per_token == per_token
    assert layer.factors.capacity == 1024
    assert layer.factors.nbytes == 256 + 1024 * per_token


def test_layers_and_micro_batches_add_up(device: str) -> None:
    layer, steps = Layer(device), []
    for _ in range(2):
        first, second = layer.inputs(), layer.inputs(5)
        up_first, up_second = layer.upstream(), layer.upstream(5)
        torch.autograd.backward([layer(*first), layer(*second)], [up_first, up_second])
        steps += [(first, up_first), (second, up_second)]
    layer.check(*steps)
    assert first[1].grad is not None


@pytest.mark.parametrize("pre_values", [True, False])
def test_norm_is_that_of_the_gradients(device: str, pre_values: bool) -> None:
    factors = GradientFactors(50, 16, 8 if pre_values else 0, device=device)
    assert factors.grad_norm().item() == 0.0
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(50, (40, 12), generator=generator)
    indices[:, 0] = 3
    leaves = [
        torch.randn(*shape, generator=generator)
        for shape in ((40, 12, 2), (50, 16), *(((50, 8), (40, 8)) if pre_values else ()))
    ]
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    for _ in range(2):
        ops.value_ffn(indices.to(device), *leaves, factors=factors).square().sum().backward()
    dense = [grad.double().square().sum() for grad in factors.to_dense() if grad is not None]
    norm = factors.grad_norm()
    assert (norm.shape, norm.dtype, norm.device.type) == ((), torch.float32, device)
    torch.testing.assert_close(norm.double(), torch.stack(dense).sum().sqrt(), rtol=1e-6, atol=0)


def test_clear_empties_and_keeps_the_buffers(device: str) -> None:
    layer = Layer(device)
    layer(*layer.inputs()).backward(layer.upstream())
    nbytes = layer.factors.nbytes
    layer.factors.clear()
    assert layer.factors.num_tokens == 0
    assert layer.factors.nbytes == nbytes
    inputs, upstream = layer.inputs(), layer.upstream()
    layer(*inputs).backward(upstream)
    layer.check((inputs, upstream))


def test_release_gives_memory_and_shape_back(device: str) -> None:
    layer = Layer(device)
    layer(*layer.inputs()).backward(layer.upstream())
    layer.factors.release()
    assert (layer.factors.nbytes, layer.factors.shape) == (256, None)
    inputs, upstream = layer.inputs(), layer.upstream()
    layer(*inputs).backward(upstream)
    layer.check((inputs, upstream))


def test_the_buffers_grow_and_keep_what_they_hold(device_dtype: tuple[str, torch.dtype]) -> None:
    device, dtype = device_dtype
    layer, steps, capacities = Layer(device, dtype), [], []
    for tokens in (200, 100, 300, 700, 1):
        inputs, upstream = layer.inputs(tokens), layer.upstream(tokens)
        layer(*inputs).backward(upstream)
        steps.append((inputs, upstream))
        capacities.append(layer.factors.capacity)
    assert capacities == [256, 512, 1024, 2048, 2048]
    layer.check(*steps)


def test_the_buffers_grow_between_forward_and_backward(device: str) -> None:
    """What a graph holds is still the arena that the next backward grew."""
    layer = Layer(device)
    first, second = layer.inputs(), layer.inputs(400)
    up_first, up_second = layer.upstream(), layer.upstream(400)
    out = layer(*first)
    layer(*second).backward(up_second)
    out.backward(up_first)
    layer.check((second, up_second), (first, up_first))


def test_reserve_is_exact_and_never_shrinks(device: str) -> None:
    layer = Layer(device)
    layer.reserve(257)
    assert layer.factors.capacity == 512
    inputs, upstream = layer.inputs(), layer.upstream()
    layer(*inputs).backward(upstream)
    layer.factors.reserve(1500)
    assert layer.factors.capacity == 1536
    layer.factors.reserve(3)
    assert layer.factors.capacity == 1536
    layer.check((inputs, upstream))


def test_out_of_memory_leaves_everything_as_it_was(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(device)
    inputs, upstream = layer.inputs(), layer.upstream()
    layer(*inputs).backward(upstream)
    with pytest.raises(RuntimeError, match=r"[Mm]emory"):
        layer.factors.reserve(1 << 42)
    layer.check((inputs, upstream))
    # Where doubling does not fit, what is needed might.
    allocate = GradientFactors._allocate

    def little_memory(self: GradientFactors, num_tokens: int, device: torch.device) -> Tensor:
        if num_tokens > 300:
            raise torch.OutOfMemoryError("out of memory")
        return allocate(self, num_tokens, device)

    monkeypatch.setattr(GradientFactors, "_allocate", little_memory)
    more, up_more = layer.inputs(250), layer.upstream(250)
    layer(*more).backward(up_more)
    layer.check((inputs, upstream), (more, up_more))
    with pytest.raises(torch.OutOfMemoryError):
        layer(*layer.inputs(300)).backward(layer.upstream(300))
    layer.check((inputs, upstream), (more, up_more))


def test_no_tokens(device_dtype: tuple[str, torch.dtype]) -> None:
    layer = Layer(*device_dtype)
    layer(*layer.inputs(0)).sum().backward()
    assert layer.factors.num_tokens == 0
    assert not any(grad.any() for grad in layer.factors.to_dense())


# ---- autograd --------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["values", "pre_values"])
def test_one_table_frozen(device: str, trained: str) -> None:
    layer = Layer(device)
    inputs, upstream = layer.inputs(), layer.upstream()
    frozen = layer.pre_values if trained == "values" else layer.values
    frozen.requires_grad_(False)
    layer(*inputs).backward(upstream)
    assert layer.factors.num_tokens == TOKENS
    frozen.requires_grad_(True)
    layer.check((inputs, upstream))


def test_frozen_tables_write_nothing(device: str) -> None:
    layer = Layer(device)
    layer.values.requires_grad_(False)
    layer.pre_values.requires_grad_(False)
    inputs = layer.inputs()
    layer(*inputs).sum().backward()
    assert inputs[1].grad is not None
    assert layer.factors.num_tokens == layer.factors.capacity == 0


def test_no_grad_writes_nothing(device: str) -> None:
    layer = Layer(device)
    with torch.no_grad():
        assert not layer(*layer.inputs()).requires_grad
    assert layer.factors.shape is None


def test_double_backward_raises(device: str) -> None:
    layer = Layer(device)
    with pytest.raises(RuntimeError, match="value_ffn: differentiating twice is not supported"):
        layer(*layer.inputs()).sum().backward(create_graph=True)
    assert layer.factors.num_tokens == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(device: str, use_reentrant: bool) -> None:
    """The forward runs twice, the factors are appended once."""
    layer = Layer(device)
    steps = [(layer.inputs(), layer.upstream()) for _ in range(3)]
    outs = [checkpoint(layer, *inputs, use_reentrant=use_reentrant) for inputs, _ in steps]
    torch.autograd.backward(outs, [upstream for _, upstream in steps])
    assert layer.factors.num_tokens == 3 * TOKENS
    layer.check(*steps)


def test_backwards_of_several_threads(device: str) -> None:
    layer = Layer(device)
    steps = [(layer.inputs(50), layer.upstream(50)) for _ in range(8)]

    def run(inputs: tuple[Tensor, ...], upstream: Tensor) -> None:
        layer(*inputs).backward(upstream)

    threads = [threading.Thread(target=run, args=step) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    layer.check(*steps)


def test_meta_device() -> None:
    factors = GradientFactors(ROWS, DV, DP, device="meta")
    values = torch.empty(ROWS, DV, device="meta", requires_grad=True)
    pre_values = torch.empty(ROWS, DP, device="meta", requires_grad=True)
    indices = torch.empty(300, SLOTS, dtype=torch.int64, device="meta")
    scores = torch.empty(300, SLOTS, 1, device="meta", requires_grad=True)
    pre_input = torch.empty(300, DP, device="meta")
    ops.value_ffn(indices, scores, values, pre_values, pre_input, factors=factors).sum().backward()
    assert (factors.num_tokens, factors.capacity) == (0, 512)
    assert scores.grad.shape == scores.shape


# ---- compiled --------------------------------------------------------------------------------


def compiled_pair(
    layer: Layer, backend: str
) -> Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]:
    """Two layers that share the tables, as one compiled function."""

    @torch.compile(fullgraph=True, backend=backend)
    def function(values: Tensor, pre_values: Tensor, *inputs: Tensor) -> Tensor:
        def one(indices: Tensor, scores: Tensor, pre_input: Tensor) -> Tensor:
            return ops.value_ffn(
                indices,
                scores,
                values,
                pre_values,
                pre_input,
                activation="silu",
                factors=layer.factors,
            )

        return one(*inputs[:3]) + one(*inputs[3:])

    return lambda first, second: function(layer.values, layer.pre_values, *first, *second)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_under_compile(device: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = Layer(device)
    layer.reserve(1000)
    function = compiled_pair(layer, backend)
    upstream, steps = layer.upstream(), []
    for _ in range(3):
        first, second = layer.inputs(), layer.inputs()
        function(first, second).backward(upstream)
        steps += [(first, upstream), (second, upstream)]
        layer.factors.check()
        layer.check(*steps)
    # Cleared between a forward and its backward, too.
    out = function(first, second)
    layer.factors.clear()
    out.backward(upstream)
    layer.check((first, upstream), (second, upstream))


def test_compiled_code_needs_a_reservation(device: str) -> None:
    torch._dynamo.reset()
    layer = Layer(device)
    function = compiled_pair(layer, "aot_eager")
    with pytest.raises(Exception, match=r"table\.reserve\(num_tokens\)"):
        function(layer.inputs(), layer.inputs())


def test_overflow_in_compiled_code_is_flagged(device: str) -> None:
    torch._dynamo.reset()
    layer = Layer(device)
    layer.reserve(256)
    function = compiled_pair(layer, "aot_eager")
    first, second, upstream = layer.inputs(200), layer.inputs(200), layer.upstream(200)
    function(first, second).backward(upstream)
    # One of the two fits; the other's gradients, but for the tables, are there all the same.
    assert layer.factors.num_tokens == 200
    for inputs in (first, second):
        (wanted,) = torch.autograd.grad(layer(*inputs, factors=False), inputs[1], upstream)
        torch.testing.assert_close(inputs[1].grad, wanted)
    with pytest.raises(RuntimeError, match=r"200 tokens did not fit beside 200 .* at least 400"):
        layer.factors.check()
    layer.factors.clear()
    layer.factors.check()
    layer.factors.reserve(400)
    function(first, second).backward(upstream)
    layer.factors.check()
    layer.check((first, upstream), (second, upstream))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_and_eager_layers_share_the_factors(device: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = Layer(device)
    layer.reserve(256)
    function = compiled_pair(layer, backend)
    first, second, third = layer.inputs(), layer.inputs(), layer.inputs(500)
    upstream, up_third = layer.upstream(), layer.upstream(500)
    function(first, second).backward(upstream)
    layer(*third).backward(up_third)  # grows
    function(first, second).backward(upstream)
    layer.factors.check()
    once = [(first, upstream), (second, upstream)]
    layer.check(*once, (third, up_third), *once)


def test_compiled_graph_outlives_growth(device: str) -> None:
    """A compiled forward, then an eager backward that grows, then the compiled backward. (Inductor
    raises instead: it asserts the sizes that it was compiled for.)"""
    torch._dynamo.reset()
    layer = Layer(device)
    layer.reserve(256)
    function = compiled_pair(layer, "aot_eager")
    first, second, third = layer.inputs(), layer.inputs(), layer.inputs(400)
    upstream, up_third = layer.upstream(), layer.upstream(400)
    out = function(first, second)
    layer(*third).backward(up_third)
    out.backward(upstream)
    layer.factors.check()
    layer.check((third, up_third), (first, upstream), (second, upstream))


def test_layers_compiled_apart(device: str) -> None:
    """Each saves the arena that the other's backward writes to; inductor's do so in place."""
    torch._dynamo.reset()
    layer = Layer(device)
    layer.reserve(256)
    functions = [torch.compile(lambda *inputs: layer(*inputs), fullgraph=True) for _ in range(2)]
    steps = [(layer.inputs(), layer.upstream()) for _ in range(4)]
    outs = [functions[i % 2](*inputs) for i, (inputs, _) in enumerate(steps)]
    torch.autograd.backward(outs, [upstream for _, upstream in steps])
    layer.check(*steps)


def test_compiled_for_any_number_of_tokens(device: str) -> None:
    torch._dynamo.reset()
    layer, steps = Layer(device), []
    layer.reserve(256)
    function = torch.compile(
        lambda *inputs: layer(*inputs), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (5, 9, 40):
        inputs, upstream = layer.inputs(tokens), layer.upstream(tokens)
        function(*inputs).backward(upstream)
        steps.append((inputs, upstream))
    layer.check(*steps)


# ---- CUDA ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_graph_capture_and_replay(compiled: bool) -> None:
    torch._dynamo.reset()
    layer = Layer("cuda")
    layer.reserve(1000)
    inputs, upstream = layer.inputs(), layer.upstream()
    inputs = tuple(x.detach() for x in inputs)
    function = torch.compile(layer, fullgraph=True) if compiled else layer

    def run() -> None:
        function(*inputs).backward(upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    layer.factors.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    assert layer.factors.num_tokens == 0, "capturing executes nothing"
    steps = []
    for _ in range(3):
        others, up_others = layer.inputs(), layer.upstream()
        with torch.no_grad():
            for to, from_ in zip((*inputs, upstream), (*others, up_others), strict=True):
                to.copy_(from_)
        graph.replay()
        steps.append((others, up_others))
    layer.check(*steps)
    # The graph writes to these buffers: they may not move.
    with pytest.raises(RuntimeError, match="captured CUDA graph writes to them"):
        layer.factors.reserve(5000)
    with pytest.raises(RuntimeError, match="captured CUDA graph writes to"):
        layer.factors.release()
    # Eager layers append beside it while there is room.
    layer(*others).backward(up_others)
    layer.check(*steps, (others, up_others))
    layer.factors.clear()
    graph.replay()
    layer.check(steps[-1])
    for _ in range(1024 // TOKENS):
        graph.replay()
    with pytest.raises(RuntimeError, match="did not fit"):
        layer.factors.check()


@pytest.mark.gpu
def test_capture_needs_a_reservation() -> None:
    layer = Layer("cuda")
    inputs, upstream = layer.inputs(), layer.upstream()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"table\.reserve\(num_tokens\)"),
        torch.cuda.graph(graph),
    ):
        layer(*inputs).backward(upstream)


@pytest.mark.gpu
def test_layers_on_several_streams() -> None:
    """Each append waits for the one before, wherever it ran."""
    layer, steps = Layer("cuda"), []
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for i in range(9):
        inputs, upstream = layer.inputs(300), layer.upstream(300)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[i % 3]):
            torch.cuda._sleep(10_000_000 * (3 - i % 3))
            layer(*inputs).backward(upstream)
        steps.append((inputs, upstream))
    layer.check(*steps)


@pytest.mark.gpu
def test_never_synchronises() -> None:
    layer = Layer("cuda")
    steps = [(layer.inputs(tokens), layer.upstream(tokens)) for tokens in (11, 300, 900)]
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for inputs, upstream in steps:
            layer(*inputs).backward(upstream)
        assert layer.factors.num_tokens == 1211
        layer.factors.check()
        assert layer.factors.slots.numel() == 1211 * SLOTS
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    layer.check(*steps)


@pytest.mark.gpu
def test_out_of_range_contributes_nothing_on_cuda() -> None:
    layer = Layer("cuda")
    inputs, upstream = layer.inputs(), layer.upstream()
    for (t, s), bad in {(0, 0): -1, (3, 2): ROWS, (5, 5): 2**62, (10, 1): -(2**62)}.items():
        inputs[0][t, s] = bad
    layer(*inputs).backward(upstream)
    bad = (inputs[0] < 0) | (inputs[0] >= ROWS)
    assert torch.equal(layer.factors.slots.view_as(bad) == -1, bad)
    assert not layer.factors.weights[bad.flatten()].any()
    assert not layer.factors.grad_a[bad.flatten()].any()
    layer.check((inputs, upstream))
    values, _ = layer.factors.to_sparse()
    torch.testing.assert_close(values.to_dense(), layer.factors.to_dense()[0])


# ---- refusals --------------------------------------------------------------------------------


def test_out_of_range_raises_on_the_cpu() -> None:
    """An index that went bad after the forward."""
    layer = Layer("cpu")
    inputs = layer.inputs()
    out = layer(*inputs)
    inputs[0].data[3, 2] = ROWS
    with pytest.raises(RuntimeError, match=r"value_ffn.*indices must"):
        out.sum().backward()
    assert layer.factors.num_tokens == 0
    assert not layer.factors.to_dense()[0].any()


@pytest.mark.parametrize("what", ["num_selected", "num_cores", "dtype", "groups"])
def test_another_shape_raises(device: str, what: str) -> None:
    layer = Layer(device)
    layer(*layer.inputs()).backward(layer.upstream())
    indices, scores, pre_input = layer.inputs()
    options = {}
    if what == "num_selected":
        indices, scores = indices[:, 1:], scores[:, 1:]
    elif what == "num_cores":
        scores = scores[:, :, :1]
    elif what == "dtype":
        pre_input = pre_input.bfloat16()
    else:
        from ultramem_cuda import SlotAddressing

        options = {"addressing": SlotAddressing(ROWS, ROWS // 2, expand=2), "sum_groups": False}
    with pytest.raises(ValueError, match="value_ffn: factors are those of S = 6, C = 2, E = 1"):
        ops.value_ffn(
            indices,
            scores,
            layer.values,
            layer.pre_values,
            pre_input,
            factors=layer.factors,
            **options,
        )
    assert layer.factors.num_tokens == TOKENS


def test_factors_of_another_table_raise(device: str) -> None:
    layer = Layer(device)
    for other in (
        GradientFactors(ROWS + 1, DV, DP, device=device),
        GradientFactors(ROWS, DV, DP + 1, device=device),
        GradientFactors(ROWS, DV, 0, device=device),
        GradientFactors(ROWS, DV, DP, dtype=torch.bfloat16, device=device),
    ):
        layer.factors = other
        with pytest.raises(ValueError, match="value_ffn: factors are those of a table with N"):
            layer(*layer.inputs())


def test_main_grad_raises(device: str) -> None:
    layer = Layer(device)
    for table in (layer.values, layer.pre_values):
        table.main_grad = torch.zeros_like(table)
    with pytest.raises(ValueError, match="factors and a main_grad of the tables exclude"):
        layer(*layer.inputs())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_tokens": 1.5}, TypeError, "reserve: num_tokens must be an int, got 1.5"),
        ({"num_tokens": -1}, ValueError, "reserve: num_tokens must not be negative, got -1"),
        ({"num_tokens": 5}, ValueError, "reserve: no backward has said"),
        (
            {"num_tokens": 5, "num_selected": 3, "num_groups": 300},
            ValueError,
            "reserve: factors offer up to 256 groups",
        ),
    ],
)
def test_bad_reservations(arguments: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layer("cpu").factors.reserve(**arguments)


def test_the_operator_refuses_other_arenas(device: str) -> None:
    layer = Layer(device)
    indices, scores, pre_input = layer.inputs()
    tensors = indices, scores, layer.values, layer.pre_values, pre_input
    options = ("silu", 0, 0, 1, "none", 0, 0, True)
    with torch.no_grad():
        out, a = torch.ops.ultramem.value_ffn(*tensors, *[None] * 5, *options)

    def backward(arena: Tensor) -> None:
        torch.ops.ultramem.value_ffn_bwd_deferred(
            torch.ones_like(out), *(t.detach() for t in tensors), a, None, None, *options, arena
        )

    def zeros(*shape: int, **kwargs: torch.dtype) -> Tensor:
        return torch.zeros(*shape, device=device, **{"dtype": torch.uint8, **kwargs})

    for arena, message in (
        (zeros(100), r"factors must have the size of an arena for S = 6, C = 2, E = 1"),
        (zeros(257), r"factors must have the size of an arena"),
        (zeros(256, dtype=torch.int8), r"factors must be"),
        (zeros(1, 256), r"factors must be \[bytes\]"),
        (zeros(512)[::2], r"factors must be contiguous"),
        (zeros(260)[4:], r"factors must begin at a multiple of 16 bytes"),
    ):
        with pytest.raises(RuntimeError, match=f"value_ffn_bwd_deferred: {message}"):
            backward(arena)


# ---- copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_empty_and_work(
    device: str, how: Callable[[GradientFactors], GradientFactors]
) -> None:
    layer = Layer(device)
    layer(*layer.inputs()).backward(layer.upstream())
    original, layer.factors = layer.factors, how(layer.factors)
    assert layer.factors.num_tokens == 0
    assert layer.factors.shape == original.shape
    inputs, upstream = layer.inputs(), layer.upstream()
    layer(*inputs).backward(upstream)
    layer.check((inputs, upstream))
    assert original.num_tokens == TOKENS
