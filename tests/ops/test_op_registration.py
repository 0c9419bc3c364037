"""Operators as torch sees them: opcheck, fake tensors, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Data, accumulation_dtype
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ultramem_cuda import GradientFactors, SlotAddressing, ops

MakeArgs = Callable[..., tuple[Any, ...]]


def rms_norm_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    x = data.normal(2, tokens, 12, dtype=dtype, requires_grad=grad)
    return x, data.gains(12, accumulation_dtype(dtype), grad), 1e-6


def rms_norm_bwd_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    return data.normal(2, tokens, 12, dtype=dtype), *rms_norm_args(data, dtype, grad, tokens)


def tucker_query_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    x = data.normal(tokens, 10, dtype=dtype, requires_grad=grad)
    weight = data.normal(2 * 2 * 3 * 6, 10, dtype=dtype, requires_grad=grad)
    return x, weight, data.gains(6, accumulation_dtype(dtype), grad), 2, 1e-6


def tucker_query_bwd_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    x, weight, gain, num_heads, eps = tucker_query_args(data, dtype, grad, tokens)
    query, projection = torch.ops.ultramem.tucker_query(x, weight, gain, num_heads, eps)
    return torch.ones_like(query), x, weight, gain, projection.detach(), eps, True, True


def tucker_filter_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    return (data.normal(3, 2, 4, 4, dtype=accumulation_dtype(dtype), requires_grad=grad),)


def tucker_filter_bwd_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    (core,) = tucker_filter_args(data, dtype, grad, tokens)
    _, _, sigma, left, right = torch.ops.ultramem.tucker_filter(core.detach())
    return torch.ones_like(sigma), core, left, right


def product_key_topk_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    query = data.normal(tokens, 2, 2, 3, 8, dtype=dtype, requires_grad=grad)
    keys = data.normal(2, 2, 3, 20, 8, dtype=dtype, requires_grad=grad)
    core = data.cores(2, 2, 3, accumulation_dtype(dtype), grad)
    u, t, _ = ops.tucker_filter(core.detach())
    return query, keys, core, u, t, 9, 4, "tucker"


def product_key_topk_bwd_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    query, keys, core, *rest = product_key_topk_args(data, dtype, grad, tokens)
    scores, _, *saved = torch.ops.ultramem.product_key_topk(query, keys, core, *rest)
    saved = [tensor.detach() for tensor in saved]
    return torch.ones_like(scores), query, keys, core, *saved, "tucker", True, True, True


def additive_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    query = data.normal(tokens, 2, 2, 1, 8, dtype=dtype, requires_grad=grad)
    keys = data.normal(2, 2, 1, 20, 8, dtype=dtype, requires_grad=grad)
    return query, keys, None, None, None, 4, 4, "additive"


def additive_bwd_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    query, keys, *rest = additive_args(data, dtype, grad, tokens)
    scores, _, *saved = torch.ops.ultramem.product_key_topk(query, keys, *rest)
    saved = [tensor.detach() for tensor in saved]
    return torch.ones_like(scores), query, keys, None, *saved, "additive", True, True, False


OPTIONS = ("silu", 9, 4, 4, "feistel", 6, 3)


def value_ffn_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    indices = data.integers(36, tokens, 4)
    scores = data.normal(tokens, 4, 2, dtype=accumulation_dtype(dtype), requires_grad=grad)
    values = data.normal(12, 6, dtype=dtype, requires_grad=grad)
    pre_values = data.normal(12, 7, dtype=dtype, requires_grad=grad)
    pre_input = data.normal(tokens, 7, dtype=dtype, requires_grad=grad)
    tensors = indices, scores, values, pre_values, pre_input, *[None] * 5
    return *tensors, *OPTIONS, False


def scaled_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    """Without gradients of the tables, which have none."""
    arguments = value_ffn_args(data, dtype, grad, tokens)
    tables = [table.detach() for table in arguments[2:4]]
    scale = torch.tensor([0.3, 0.7], dtype=torch.float64, device=data.device)
    return *arguments[:2], *tables, *arguments[4:6], scale, *arguments[7:]


def bag_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    scores = data.normal(tokens, 4, 2, dtype=accumulation_dtype(dtype), requires_grad=grad)
    values = data.normal(12, 6, dtype=dtype, requires_grad=grad)
    tensors = data.integers(12, tokens, 4, dtype=torch.int32), scores, values, *[None] * 7
    return *tensors, "identity", 0, 0, 1, "none", 0, 0, True


def value_slots_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    addressing = SlotAddressing(12, 9, 4, expand=4, shuffle="feistel", seed=3)
    indices = data.integers(36, tokens, 4)
    return indices, addressing.placement(data.device), None, 12, 9, 4, "feistel", 6, True


def saved_of_value_ffn(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """grad_out, the inputs, pre_activation, permutation, table_scale and options, as the backward
    takes them."""
    out, pre_activation = torch.ops.ultramem.value_ffn(*arguments)
    tensors, optional, options = arguments[:5], arguments[5:7], arguments[10:]
    return torch.ones_like(out), *tensors, pre_activation.detach(), *optional, *options


def value_ffn_bwd_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    return *saved_of_value_ffn(value_ffn_args(data, dtype, grad, tokens)), True, True


def bag_bwd_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    return *saved_of_value_ffn(bag_args(data, dtype, grad, tokens)), True, False


def scaled_bwd_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    return *saved_of_value_ffn(scaled_args(data, dtype, grad, tokens)), False, False


def main_grad_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    acc = accumulation_dtype(dtype)
    buffers = [torch.zeros(12, width, dtype=acc, device=data.device) for width in (6, 7)]
    saved = saved_of_value_ffn(value_ffn_args(data, dtype, False, tokens))
    return *saved[:8], *saved[9:], *buffers  # there is no scale


def deferred_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    factors = GradientFactors(12, 6, 7, dtype=dtype, device=data.device)
    factors.reserve(8, num_selected=4, num_cores=2, num_groups=4)
    return *saved_of_value_ffn(scaled_args(data, dtype, False, tokens)), factors.arena


# A table of 12 rows, from row 5 on, of 20: the options of a shard.
SHARD = ("silu", 16, 9, 4, "feistel", 8, 3)


def of_shard(make: MakeArgs, num_tensors: int) -> MakeArgs:
    """The same call where the table in memory is a shard. The options follow the tensors."""

    def make_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
        arguments = make(data, dtype, grad, tokens)
        return *arguments[:num_tensors], *SHARD, *arguments[num_tensors + 7 :], 5, 20

    return make_args


ADDRESSING = (None, 9, 4, 4, "feistel", 6, 3)


def slot_dots_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    other = torch.float64 if dtype == torch.float64 else torch.float32
    inputs, rows = data.normal(tokens, 4, 6, dtype=other), data.normal(12, 6, dtype=dtype)
    scale = torch.tensor(0.3, dtype=torch.float64, device=data.device)
    return data.integers(36, tokens, 4), inputs, rows, 2, scale, *ADDRESSING, False


def slot_sum_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    other = torch.float64 if dtype == torch.float64 else torch.float16
    weights = data.normal(tokens, 4, 2, dtype=accumulation_dtype(dtype))
    rows = data.normal(7, 6, dtype=dtype)
    return data.integers(36, tokens, 4), weights, rows, other, None, *ADDRESSING, True, 4, 12


def append_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
    acc = accumulation_dtype(dtype)
    factors = GradientFactors(12, 6, 7, dtype=dtype, device=data.device)
    factors.reserve(8, num_selected=4, num_cores=2, num_groups=4)
    weights, grad_a = data.normal(tokens, 4, 2, dtype=acc), data.normal(tokens, 4, dtype=acc)
    grad_out, pre_input = (
        data.normal(tokens, 4, 6, dtype=dtype),
        data.normal(tokens, 7, dtype=dtype),
    )
    tensors = data.integers(36, tokens, 4), weights, grad_a, grad_out, pre_input
    return *tensors, 12, *ADDRESSING, False, factors.arena


def key_balance_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    query, keys, _, u, t, *_ = product_key_topk_args(data, dtype, grad, tokens)
    return query, keys, data.integers(20, tokens, 2, 2, 4, dtype=torch.int32), u, t, "paper"


def key_balance_bwd_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    query, keys, indices, u, t, normalize = key_balance_args(data, dtype, grad, tokens)
    loss, frequencies = torch.ops.ultramem.key_balance_loss(query, keys, indices, u, t, normalize)
    return torch.ones_like(loss), query, keys, frequencies.detach(), u, t


def additive_balance_args(
    data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5
) -> tuple[Any, ...]:
    query, keys, *_ = additive_args(data, dtype, grad, tokens)
    return query, keys, data.integers(20, tokens, 2, 2, 4), None, None, "release"


def gain_of_x(make: MakeArgs) -> MakeArgs:
    """The same arguments, but for a norm's gain in the dtype of what is normalised."""

    def make_args(data: Data, dtype: torch.dtype, grad: bool, tokens: int = 5) -> tuple[Any, ...]:
        arguments = make(data, dtype, grad, tokens)
        return tuple(
            x.detach().to(dtype).requires_grad_(grad)
            if isinstance(x, Tensor) and x.dim() == 1
            else x
            for x in arguments
        )

    return make_args


FORWARDS: dict[str, tuple[str, MakeArgs]] = {
    "rms_norm": ("rms_norm", rms_norm_args),
    "rms_norm_gain_of_x": ("rms_norm", gain_of_x(rms_norm_args)),
    "tucker_query": ("tucker_query", tucker_query_args),
    "tucker_query_gain_of_x": ("tucker_query", gain_of_x(tucker_query_args)),
    "tucker_filter": ("tucker_filter", tucker_filter_args),
    "product_key_topk": ("product_key_topk", product_key_topk_args),
    "product_key_topk_additive": ("product_key_topk", additive_args),
    "key_balance_loss": ("key_balance_loss", key_balance_args),
    "key_balance_loss_additive": ("key_balance_loss", additive_balance_args),
    "value_ffn": ("value_ffn", value_ffn_args),
    "value_ffn_bag": ("value_ffn", bag_args),
    "value_ffn_scaled": ("value_ffn", scaled_args),
    "value_ffn_shard": ("value_ffn", of_shard(value_ffn_args, 10)),
    "value_slots": ("value_slots", value_slots_args),
}
BACKWARDS: dict[str, tuple[str, MakeArgs]] = {
    "rms_norm_bwd": ("rms_norm_bwd", rms_norm_bwd_args),
    "rms_norm_bwd_gain_of_x": ("rms_norm_bwd", gain_of_x(rms_norm_bwd_args)),
    "tucker_query_bwd": ("tucker_query_bwd", tucker_query_bwd_args),
    "tucker_query_bwd_gain_of_x": ("tucker_query_bwd", gain_of_x(tucker_query_bwd_args)),
    "tucker_filter_bwd": ("tucker_filter_bwd", tucker_filter_bwd_args),
    "product_key_topk_bwd": ("product_key_topk_bwd", product_key_topk_bwd_args),
    "product_key_topk_bwd_additive": ("product_key_topk_bwd", additive_bwd_args),
    "key_balance_loss_bwd": ("key_balance_loss_bwd", key_balance_bwd_args),
    "value_ffn_bwd": ("value_ffn_bwd", value_ffn_bwd_args),
    "value_ffn_bwd_bag": ("value_ffn_bwd", bag_bwd_args),
    "value_ffn_bwd_scaled": ("value_ffn_bwd", scaled_bwd_args),
    "value_ffn_bwd_main_grad": ("value_ffn_bwd_main_grad", main_grad_args),
    "value_ffn_bwd_deferred": ("value_ffn_bwd_deferred", deferred_args),
    "value_ffn_bwd_shard": ("value_ffn_bwd", of_shard(value_ffn_bwd_args, 9)),
    "value_ffn_bwd_main_grad_shard": ("value_ffn_bwd_main_grad", of_shard(main_grad_args, 8)),
    "value_ffn_bwd_deferred_shard": ("value_ffn_bwd_deferred", of_shard(deferred_args, 9)),
    "slot_dots": ("slot_dots", slot_dots_args),
    "slot_sum": ("slot_sum", slot_sum_args),
    "table_factors_append": ("table_factors_append", append_args),
}
ALL = FORWARDS | BACKWARDS


def test_every_operator_is_checked() -> None:
    registered = {
        name.removeprefix("ultramem::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ultramem::")
    }
    # Those of the optimizers, which nobody calls by themselves: tests/optim/test_table_ops.py.
    elsewhere = {"table_group", "table_grad_sum_sq", "table_grad_row_sq", "table_update"}
    assert registered == {name for name, _ in ALL.values()} | elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALL)
def test_opcheck(device: str, case: str, dtype: torch.dtype) -> None:
    name, make = ALL[case]
    # A gradient operator is not differentiable; that is tested below.
    arguments = make(Data(1, device), dtype, case in FORWARDS)
    options = {}
    if device == "cpu" and dtype != torch.float32:
        # Tracing, which takes nearly all of the time, sees the same operators in either dtype.
        options["test_utils"] = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.ultramem, name).default, arguments, **options)


@pytest.mark.parametrize("case", [case for case in ALL if case != "tucker_filter"])
def test_opcheck_without_tokens(device: str, case: str) -> None:
    name, make = ALL[case]
    arguments = make(Data(2, device), torch.float32, case in FORWARDS, 0)
    torch.library.opcheck(getattr(torch.ops.ultramem, name).default, arguments)


def tensors_of(outputs: Any) -> list[Tensor]:
    if outputs is None:
        return []
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ALL)
def test_meta_agrees_with_cpu(case: str, dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides of every output."""
    name, make = ALL[case]
    arguments = make(Data(3), dtype, False)
    op = getattr(torch.ops.ultramem, name)
    real = tensors_of(op(*arguments))
    meta = tensors_of(op(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments)))
    for a, b in zip(real, meta, strict=True):
        assert b.is_meta
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


# ---- refusals ------------------------------------------------------------------------------------


def public_calls(data: Data) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each public operator as a function of its differentiable inputs."""
    core = data.cores(2, 1, 2, requires_grad=True)
    u, t, _ = ops.tucker_filter(core.detach())
    query = data.normal(4, 2, 1, 2, 6, requires_grad=True)
    keys = data.normal(1, 2, 2, 9, 6, requires_grad=True)
    indices = data.integers(9, 4, 3)
    kept = data.integers(9, 4, 1, 2, 3)
    slots = tuple(
        data.normal(*shape, requires_grad=True) for shape in ((4, 3, 2), (9, 4), (9, 5), (4, 5))
    )
    return {
        "rms_norm": (
            ops.rms_norm,
            (data.normal(3, 6, requires_grad=True), data.gains(6, requires_grad=True)),
        ),
        "tucker_query": (
            ops.tucker_query,
            (
                data.normal(3, 5, requires_grad=True),
                data.normal(12, 5, requires_grad=True),
                data.gains(6, requires_grad=True),
            ),
        ),
        "tucker_filter": (lambda core: ops.tucker_filter(core)[2], (core,)),
        "product_key_topk": (
            lambda *inputs: ops.product_key_topk(*inputs, topk=4, u=u, t=t)[0],
            (query, keys, core),
        ),
        "key_balance_loss": (
            lambda *inputs: ops.key_balance_loss(*inputs, kept, u=u, t=t),
            (query, keys),
        ),
        "value_ffn": (lambda *inputs: ops.value_ffn(indices, *inputs), slots),
    }


PUBLIC = [
    "rms_norm",
    "tucker_query",
    "tucker_filter",
    "product_key_topk",
    "key_balance_loss",
    "value_ffn",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_double_backward_raises(device: str, name: str) -> None:
    function, inputs = public_calls(Data(4, device))[name]

    def differentiate_twice() -> None:
        grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    with pytest.raises(RuntimeError, match=f"{name}: differentiating twice is not supported"):
        differentiate_twice()


def test_double_backward_with_main_grad_raises(device: str) -> None:
    function, inputs = public_calls(Data(4, device))["value_ffn"]
    for table in inputs[1:3]:
        table.main_grad = torch.zeros_like(table)
    with pytest.raises(RuntimeError, match="value_ffn: differentiating twice is not supported"):
        function(*inputs).sum().backward(create_graph=True)
    assert not any(table.main_grad.any() for table in inputs[1:3])


@pytest.mark.parametrize("name", PUBLIC)
def test_vmap_raises(device: str, name: str) -> None:
    function, inputs = public_calls(Data(5, device))[name]
    batch = tuple(torch.stack([tensor.detach()] * 2) for tensor in inputs)
    with pytest.raises(NotImplementedError, match=f"{name}: vmap is not supported"):
        torch.vmap(function)(*batch)


def test_create_graph_is_accepted_where_nobody_differentiates_twice(device: str) -> None:
    """A gradient penalty elsewhere in the model runs every backward with create_graph=True."""
    core = Data(12, device).normal(2, 1, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.tucker_filter(core)[2].sum(), core, create_graph=True)
    with pytest.raises(RuntimeError, match="tucker_filter: differentiating twice"):
        grad.sum().backward()


# ---- gradients that nobody has -------------------------------------------------------------------


class CreatedZeros(TorchDispatchMode):
    """Counts the tensors that are filled with zeros."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += function in (torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PUBLIC)
def test_the_backward_makes_no_gradients_of_integers_and_saved_outputs(
    device: str, name: str
) -> None:
    """torch would: 1 KB a token at shape S, more than is saved."""
    function, inputs = public_calls(Data(6, device))[name]
    out = function(*inputs)
    upstream = torch.ones_like(out)
    with CreatedZeros() as created:
        torch.autograd.grad(out, inputs, upstream)
    assert created.count == 0


class Detached(torch.autograd.Function):
    """Gives its input no gradient, though it is differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("name", PUBLIC)
def test_no_gradient_of_the_output_gives_none_to_the_inputs(device: str, name: str) -> None:
    function, inputs = public_calls(Data(7, device))[name]
    Detached.apply(function(*inputs)).sum().backward()
    assert all(tensor.grad is None for tensor in inputs)
