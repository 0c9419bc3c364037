"""Bad input raises before any kernel runs, and says which operator, which argument, what it was and
what it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Data
from torch import Tensor

from ultramem_cuda import SlotAddressing, ops

Arguments = dict[str, Any]
ERRORS = (RuntimeError, ValueError, TypeError)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def rms_norm_args(device: str) -> Arguments:
    data = Data(1, device)
    return {"x": data.normal(4, 6), "weight": data.gains(6)}


def tucker_query_args(device: str) -> Arguments:
    data = Data(1, device)
    # D = 5, H = 3, Q = 2, Kd = 6.
    return {
        "x": data.normal(4, 5),
        "weight": data.normal(72, 5),
        "norm_weight": data.gains(6),
        "num_heads": 3,
    }


def tucker_filter_args(device: str) -> Arguments:
    return {"core": Data(1, device).cores(2, 3, 2)}


def topk_args(device: str) -> Arguments:
    data = Data(1, device)
    # T = 4, H = 3, R = Q = 2, Kd = 6, n = 10, C = 2.
    return {
        "query": data.normal(4, 2, 3, 2, 6),
        "keys": data.normal(3, 2, 2, 10, 6),
        "core": data.cores(2, 3, 2),
        "topk": 9,
        "axis_topk": 4,
    }


def additive_args(device: str) -> Arguments:
    data = Data(1, device)
    return {
        "query": data.normal(4, 2, 3, 1, 6),
        "keys": data.normal(3, 2, 1, 10, 6),
        "core": None,
        "topk": 4,
        "mode": "additive",
    }


def balance_args(device: str) -> Arguments:
    data = Data(1, device)
    # T = 4, H = 3, R = Q = 2, Kd = 6, n = 10, m = 4.
    return {
        "query": data.normal(4, 2, 3, 2, 6),
        "keys": data.normal(3, 2, 2, 10, 6),
        "axis_indices": data.integers(10, 4, 3, 2, 4, dtype=torch.int32),
        "u": data.normal(3, 2),
        "t": data.normal(3, 2),
    }


def ffn_args(device: str) -> Arguments:
    data = Data(1, device)
    # T = 4, S = 3, C = 2, N = 20, Dv = 8, Dp = 5.
    return {
        "indices": data.integers(20, 4, 3),
        "scores": data.normal(4, 3, 2),
        "values": data.normal(20, 8),
        "pre_values": data.normal(20, 5),
        "pre_input": data.normal(4, 5),
    }


def bag_args(device: str) -> Arguments:
    arguments = ffn_args(device)
    del arguments["pre_values"], arguments["pre_input"]
    return arguments


CALLS: dict[str, tuple[Callable[..., Any], Callable[[str], Arguments]]] = {
    "rms_norm": (ops.rms_norm, rms_norm_args),
    "tucker_query": (ops.tucker_query, tucker_query_args),
    "tucker_filter": (ops.tucker_filter, tucker_filter_args),
    "topk": (ops.product_key_topk, topk_args),
    "additive": (ops.product_key_topk, additive_args),
    "balance": (ops.key_balance_loss, balance_args),
    "ffn": (ops.value_ffn, ffn_args),
    "bag": (ops.value_ffn, bag_args),
}

I64, I32, F64 = torch.int64, torch.int32, torch.float64
BF16, F16, C64 = torch.bfloat16, torch.float16, torch.complex64
FLOAT = "must be float32, bfloat16, float16 or float64, got"

# call, what is changed, the start of the message. Tensors are given as (shape, dtype).
BAD: list[tuple[str, Arguments, str]] = [
    # rms_norm
    ("rms_norm", {"x": ((4, 6), I64)}, f"rms_norm: x {FLOAT} int64"),
    ("rms_norm", {"x": ((4, 6), C64)}, f"rms_norm: x {FLOAT}"),
    ("rms_norm", {"x": ((4, 6), torch.bool)}, f"rms_norm: x {FLOAT}"),
    ("rms_norm", {"x": ()}, "rms_norm: x must have at least one dimension"),
    ("rms_norm", {"x": (4, 0), "weight": (0,)}, "rms_norm: the last dimension of x must not be"),
    ("rms_norm", {"weight": (7,)}, "rms_norm: weight must be [dim of x] = [6], got [7]"),
    ("rms_norm", {"weight": (1, 6)}, "rms_norm: weight must be [dim of x] = [6], got [1, 6]"),
    (
        "rms_norm",
        {"weight": ((6,), C64)},
        "rms_norm: weight must be of a floating-point dtype, got torch.complex64",
    ),
    (
        "rms_norm",
        {"weight": ((6,), I64)},
        "rms_norm: weight must be of a floating-point dtype, got",
    ),
    ("rms_norm", {"eps": -1.0}, "rms_norm: eps must not be negative, got -1"),
    ("rms_norm", {"eps": float("nan")}, "rms_norm: eps must"),
    # tucker_query
    ("tucker_query", {"x": ((4, 5), I64)}, f"tucker_query: x {FLOAT} int64"),
    ("tucker_query", {"x": ((4, 5), C64)}, f"tucker_query: x {FLOAT}"),
    ("tucker_query", {"x": (5,)}, "tucker_query: x must be [T, D], got [5]"),
    ("tucker_query", {"x": (2, 4, 5)}, "tucker_query: x must be [T, D], got [2, 4, 5]"),
    ("tucker_query", {"weight": (72, 6)}, "tucker_query: weight must be [2*H*Q*Kd, D] = [*, 5]"),
    (
        "tucker_query",
        {"weight": (73, 5)},
        "tucker_query: weight must have 2*H*Q*Kd rows with H = 3",
    ),
    ("tucker_query", {"weight": (0, 5)}, "tucker_query: weight must have 2*H*Q*Kd rows"),
    ("tucker_query", {"weight": (36 * 5, 5)}, "tucker_query: weight must have 2*H*Q*Kd rows"),
    (
        "tucker_query",
        {"weight": ((72, 5), F16)},
        "tucker_query: weight must be float32, got float16",
    ),
    (
        "tucker_query",
        {"weight": ((72, 5), F64)},
        "tucker_query: weight must be float32, got float64",
    ),
    ("tucker_query", {"norm_weight": (6, 1)}, "tucker_query: norm_weight must be [Kd], got"),
    ("tucker_query", {"norm_weight": (0,)}, "tucker_query: norm_weight must not be empty"),
    (
        "tucker_query",
        {"norm_weight": ((6,), C64)},
        "tucker_query: norm_weight must be of a floating-point dtype",
    ),
    ("tucker_query", {"num_heads": 0}, "tucker_query: num_heads must be positive, got 0"),
    ("tucker_query", {"num_heads": -2}, "tucker_query: num_heads must be positive, got -2"),
    ("tucker_query", {"eps": -1.0}, "tucker_query: eps must not be negative, got -1"),
    # tucker_filter
    ("tucker_filter", {"core": (3, 2, 2)}, "tucker_filter: core must be [C, H, R, R]"),
    ("tucker_filter", {"core": (2, 3, 2, 3)}, "tucker_filter: the last two dimensions of core"),
    (
        "tucker_filter",
        {"core": (2, 3, 5, 5)},
        "tucker_filter: the Tucker rank R must be 1..4, got 5",
    ),
    (
        "tucker_filter",
        {"core": (2, 3, 0, 0)},
        "tucker_filter: the Tucker rank R must be 1..4, got 0",
    ),
    ("tucker_filter", {"core": (5, 3, 2, 2)}, "tucker_filter: the number of cores C must be 1..4"),
    ("tucker_filter", {"core": (0, 3, 2, 2)}, "tucker_filter: the number of cores C must be 1..4"),
    ("tucker_filter", {"core": (2, 0, 2, 2)}, "tucker_filter: core must have at least one head"),
    (
        "tucker_filter",
        {"core": ((2, 3, 2, 2), C64)},
        "tucker_filter: core must be of a floating-point dtype, got",
    ),
    (
        "tucker_filter",
        {"core": ((2, 3, 2, 2), I64)},
        "tucker_filter: core must be of a floating-point",
    ),
    # product_key_topk
    ("topk", {"query": ((4, 2, 3, 2, 6), I64)}, f"product_key_topk: query {FLOAT} int64"),
    ("topk", {"query": ((4, 2, 3, 2, 6), C64)}, f"product_key_topk: query {FLOAT}"),
    ("topk", {"query": (4, 2, 3, 6)}, "product_key_topk: query must be [T, 2, H, Q, Kd]"),
    ("topk", {"query": (4, 3, 3, 2, 6)}, "product_key_topk: query must be [T, 2, H, Q, Kd]"),
    ("topk", {"query": (4, 2, 3, 3, 6)}, "product_key_topk: query.shape[3] must be 1 or R = 2"),
    ("topk", {"keys": (3, 2, 2, 6)}, "product_key_topk: keys must be [H, 2, R, n, Kd]"),
    ("topk", {"keys": (2, 2, 2, 10, 6)}, "product_key_topk: keys must be [H, 2, R, n, Kd]"),
    ("topk", {"keys": (3, 1, 2, 10, 6)}, "product_key_topk: keys must be [H, 2, R, n, Kd]"),
    ("topk", {"keys": (3, 2, 2, 10, 7)}, "product_key_topk: keys must be [H, 2, R, n, Kd]"),
    ("topk", {"keys": (3, 2, 2, 0, 6)}, "product_key_topk: "),
    (
        "topk",
        {"keys": ((3, 2, 2, 10, 6), BF16)},
        "product_key_topk: keys must be float32, got bfloat16",
    ),
    (
        "topk",
        {"keys": ((3, 2, 2, 10, 6), F64)},
        "product_key_topk: keys must be float32, got float64",
    ),
    (
        "topk",
        {"keys": ((3, 2, 2, 10, 6), I64)},
        "product_key_topk: keys must be float32, got int64",
    ),
    (
        "topk",
        {"query": (4, 2, 3, 5, 6), "keys": (3, 2, 5, 10, 6), "core": (2, 3, 5, 5)},
        "the Tucker rank R",
    ),
    ("topk", {"core": (3, 2, 2)}, "core must be [C, H, R, R]"),
    ("topk", {"core": (2, 2, 2, 2)}, "product_key_topk: core must be [C, H, R, R] = [*, 3, 2, 2]"),
    ("topk", {"core": (2, 3, 3, 3)}, "product_key_topk: core must be [C, H, R, R] = [*, 3, 2, 2]"),
    ("topk", {"core": (5, 3, 2, 2)}, "the number of cores C must be 1..4, got 5"),
    ("topk", {"core": ((2, 3, 2, 2), C64)}, "product_key_topk: core must be of a floating-point"),
    ("topk", {"core": None}, "product_key_topk: core is required in tucker mode"),
    ("topk", {"u": (3, 2)}, "product_key_topk: u and t go together"),
    ("topk", {"t": (3, 2)}, "product_key_topk: u and t go together"),
    ("topk", {"u": (3, 1), "t": (3, 2)}, "product_key_topk: u must be [H, R] = [3, 2], got [3, 1]"),
    ("topk", {"u": (3, 2), "t": (2, 2)}, "product_key_topk: t must be [H, R] = [3, 2], got [2, 2]"),
    (
        "topk",
        {"topk": 17},
        "product_key_topk: topk must be in 1..min(axis_topk^2, 1024) with axis_topk = 4, got",
    ),
    ("topk", {"topk": 0}, "product_key_topk: topk must be in 1..min(axis_topk^2, 1024)"),
    ("topk", {"topk": -3}, "product_key_topk: topk must be in 1..min(axis_topk^2, 1024)"),
    (
        "topk",
        {"topk": 0, "axis_topk": None},
        "product_key_topk: topk must be in 1..min(axis_topk^2, 1024)",
    ),
    (
        "topk",
        {"topk": 101, "axis_topk": None},
        "product_key_topk: topk must be in 1..min(axis_topk^2, 1024) with axis_topk = 10, got",
    ),
    (
        "topk",
        {"axis_topk": 11},
        "product_key_topk: axis_topk must be in 1..min(n, 128) with n = 10",
    ),
    ("topk", {"axis_topk": 0}, "product_key_topk: axis_topk must be in 1..min(n, 128)"),
    (
        "topk",
        {"keys": (3, 2, 2, 200, 6), "axis_topk": 129},
        "product_key_topk: axis_topk must be in 1..min(n, 128) with n = 200, got 129",
    ),
    (
        "topk",
        {"keys": (3, 2, 2, 200, 6), "axis_topk": 128, "topk": 1025},
        "topk must be in 1..min(axis_topk^2, 1024) with axis_topk = 128, got 1025",
    ),
    ("topk", {"mode": "sum"}, "product_key_topk: mode must be"),
    (
        "topk",
        {"key_norm_weight": (5,)},
        "product_key_topk: key_norm_weight must be [Kd] = [6], got [5]",
    ),
    ("topk", {"key_norm_weight": (6,), "eps": -1.0}, "eps must not be negative"),
    ("topk", {"mode": "additive"}, "product_key_topk: core must be None in additive mode"),
    ("additive", {"u": (3, 1), "t": (3, 1)}, "product_key_topk: u and t must be None in additive"),
    (
        "additive",
        {"query": (4, 2, 3, 2, 6), "keys": (3, 2, 2, 10, 6)},
        "product_key_topk: additive mode has R = 1, keys.shape[2] is 2",
    ),
    (
        "additive",
        {"axis_topk": 3},
        "product_key_topk: additive mode needs axis_topk >= min(topk, n)",
    ),
    ("additive", {"mode": "tucker"}, "product_key_topk: core is required in tucker mode"),
    # key_balance_loss
    ("balance", {"query": ((4, 2, 3, 2, 6), I64)}, f"key_balance_loss: query {FLOAT} int64"),
    ("balance", {"query": (4, 3, 3, 2, 6)}, "query must be [T, 2, H, Q, Kd] = [*, 2, *, *, *]"),
    ("balance", {"query": (4, 2, 3, 6)}, "query must be [T, 2, H, Q, Kd], got [4, 2, 3, 6]"),
    ("balance", {"query": (4, 2, 3, 3, 6)}, "query.shape[3] must be 1 or R = 2, got 3"),
    ("balance", {"keys": (3, 2, 2, 10, 5)}, "keys must be [H, 2, R, n, Kd] = [3, 2, *, *, 6], got"),
    ("balance", {"keys": ((3, 2, 2, 10, 6), BF16)}, "keys must be float32, got bfloat16"),
    ("balance", {"keys": (3, 2, 2, 0, 6)}, "key_balance_loss: H, Kd and n must be positive"),
    ("balance", {"keys": (3, 2, 5, 10, 6)}, "the Tucker rank R (keys.shape[2]) must be 1..4"),
    ("balance", {"axis_indices": ((4, 3, 4), I32)}, "axis_indices must be [T, H, 2, m] = [4, 3, 2"),
    ("balance", {"axis_indices": ((5, 3, 2, 4), I32)}, "axis_indices must be [T, H, 2, m] = [4, 3"),
    ("balance", {"axis_indices": (4, 3, 2, 4)}, "axis_indices must be int32 or int64, got float32"),
    ("balance", {"axis_indices": ((4, 3, 2, 0), I64)}, "axis_indices must hold at least one key"),
    ("balance", {"u": None}, "key_balance_loss: u and t go together"),
    ("balance", {"u": None, "t": None}, "u and t are required for R > 1 (keys.shape[2] is 2)"),
    ("balance", {"t": (3, 3)}, "key_balance_loss: t must be [H, R] = [3, 2], got [3, 3]"),
    ("balance", {"u": ((3, 2), I64)}, "key_balance_loss: u must be of a floating-point dtype"),
    ("balance", {"normalize": "mean"}, "normalize must be 'paper' or 'release', got 'mean'"),
    # value_ffn
    ("ffn", {"indices": (4, 3)}, "value_ffn: indices must be int64 or int32"),
    ("ffn", {"indices": ((4, 3), torch.int16)}, "value_ffn: indices must be int64 or int32"),
    ("ffn", {"indices": ((4, 3), torch.bool)}, "value_ffn: indices must be int64 or int32"),
    ("ffn", {"indices": ((12,), I64)}, "value_ffn: indices must be [T, S], got [12]"),
    ("ffn", {"indices": ((5, 3), I64)}, "value_ffn: "),
    ("ffn", {"scores": (4, 3)}, "value_ffn: scores must be [T, S, C] = [4, 3, *], got [4, 3]"),
    (
        "ffn",
        {"scores": (4, 2, 2)},
        "value_ffn: scores must be [T, S, C] = [4, 3, *], got [4, 2, 2]",
    ),
    (
        "ffn",
        {"scores": (4, 3, 3)},
        "value_ffn: the number of cores C must divide Dv, got C = 3, Dv",
    ),
    (
        "ffn",
        {"scores": (4, 3, 5)},
        "value_ffn: the number of cores C (scores.shape[2]) must be 1..4",
    ),
    (
        "ffn",
        {"scores": (4, 3, 0)},
        "value_ffn: the number of cores C (scores.shape[2]) must be 1..4",
    ),
    (
        "ffn",
        {"scores": ((4, 3, 2), C64)},
        "value_ffn: scores must be of a floating-point dtype, got torch.com",
    ),
    ("ffn", {"values": (20,)}, "value_ffn: values must be [N, Dv], got [20]"),
    ("ffn", {"values": ((20, 8), I64)}, f"value_ffn: values {FLOAT} int64"),
    ("ffn", {"values": ((20, 8), C64)}, f"value_ffn: values {FLOAT}"),
    ("bag", {"values": (0, 8)}, "value_ffn: values must not be empty"),
    ("bag", {"values": (20, 0)}, "value_ffn: values must not be empty"),
    ("ffn", {"pre_values": (20, 6)}, "value_ffn: pre_input must be [T, Dp] = [4, 6], got [4, 5]"),
    (
        "ffn",
        {"pre_values": (19, 5)},
        "value_ffn: pre_values must be [N, Dp] = [20, *], got [19, 5]",
    ),
    (
        "ffn",
        {"pre_values": (20, 0), "pre_input": (4, 0)},
        "value_ffn: pre_values must not be empty",
    ),
    ("ffn", {"pre_values": ((20, 5), BF16)}, "value_ffn: pre_values must be float32, got bfloat16"),
    ("ffn", {"pre_values": ((20, 5), F64)}, "value_ffn: pre_values must be float32, got float64"),
    ("ffn", {"pre_values": None}, "value_ffn: pre_values and pre_input go together"),
    ("ffn", {"pre_input": None}, "value_ffn: pre_values and pre_input go together"),
    ("ffn", {"pre_input": (3, 5)}, "value_ffn: pre_input must be [T, Dp] = [4, 5], got [3, 5]"),
    ("ffn", {"pre_input": ((4, 5), I64)}, f"value_ffn: pre_input {FLOAT} int64"),
    ("ffn", {"activation": "swish"}, "value_ffn: activation must be 'identity', 'gelu'"),
    ("bag", {"activation": "gelu"}, "value_ffn: activation needs pre_values"),
    (
        "bag",
        {"addressing": SlotAddressing(21, 9)},
        "value_ffn: addressing.num_slots must be the tab",
    ),
]

# float64 is legal on the CPU alone, so that mixing it is a mistake only there.
BAD_ON_CPU: list[tuple[str, Arguments, str]] = [
    (
        "balance",
        {"axis_indices": torch.full((4, 3, 2, 4), 10)},
        "key_balance_loss: axis_indices must be in [0, 10), found one outside",
    ),
    (
        "balance",
        {"axis_indices": torch.full((4, 3, 2, 4), -1)},
        "key_balance_loss: axis_indices must be in [0, 10), found one outside",
    ),
    ("ffn", {"pre_input": ((4, 5), F64)}, "value_ffn: values and pre_input must both be float64"),
    (
        "ffn",
        {"values": ((20, 8), F64), "pre_values": ((20, 5), F64)},
        "value_ffn: values and pre_input must both be float64",
    ),
]

BAD_ON_CUDA: list[tuple[str, Arguments, str]] = [
    ("rms_norm", {"x": ((4, 6), F64)}, "rms_norm: x is float64, which is offered on the CPU only"),
    (
        "tucker_query",
        {"x": ((4, 5), F64), "weight": ((72, 5), F64)},
        "tucker_query: x is float64, which is offered on the CPU only",
    ),
    (
        "tucker_filter",
        {"core": ((2, 3, 2, 2), F64)},
        "tucker_filter: core is float64, which is off",
    ),
    *(
        (
            call,
            {"query": ((4, 2, 3, 2, 6), F64), "keys": ((3, 2, 2, 10, 6), F64)},
            "is float64, which is offered on the CPU only",
        )
        for call in ("topk", "balance")
    ),
    (
        "bag",
        {"values": ((20, 8), F64)},
        "value_ffn: values is float64, which is offered on the CPU",
    ),
    ("ffn", {"pre_input": ((4, 5), F64)}, "value_ffn: pre_input is float64, which is offered on"),
]


def is_shape(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) for size in value)


def build(change: object, device: str) -> object:
    """A changed argument: a shape, or (shape, dtype), stands for a tensor of zeros."""
    if is_shape(change):
        return zeros(*change, device=device) if change else torch.zeros((), device=device)
    if isinstance(change, tuple):
        shape, dtype = change
        return zeros(*shape, dtype=dtype, device=device)
    return change


def describe(value: object) -> str:
    return str(value).replace("torch.", "").replace(" ", "")


def ids(cases: list[tuple[str, Arguments, str]]) -> list[str]:
    return [
        f"{call}-" + "-".join(f"{name}={describe(value)}" for name, value in changes.items())
        for call, changes, _ in cases
    ]


def check_refused(device: str, call: str, changes: Arguments, message: str) -> None:
    function, make = CALLS[call]
    arguments = make(device)
    arguments |= {name: build(change, device) for name, change in changes.items()}
    with pytest.raises(ERRORS) as error:
        function(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("call", CALLS)
def test_unchanged_arguments_are_accepted(device: str, call: str) -> None:
    """Otherwise the refusals below would prove nothing."""
    function, make = CALLS[call]
    function(**make(device))


@pytest.mark.parametrize(("call", "changes", "message"), BAD, ids=ids(BAD))
def test_refused(device: str, call: str, changes: Arguments, message: str) -> None:
    check_refused(device, call, changes, message)


@pytest.mark.parametrize(("call", "changes", "message"), BAD, ids=ids(BAD))
def test_refused_on_meta(call: str, changes: Arguments, message: str) -> None:
    """A model that is tried out without memory must fail where the real one would."""
    check_refused("meta", call, changes, message)


@pytest.mark.parametrize("call", CALLS)
def test_unchanged_arguments_are_accepted_on_meta(call: str) -> None:
    function, make = CALLS[call]
    function(**make("meta"))


@pytest.mark.parametrize(("call", "changes", "message"), BAD_ON_CPU, ids=ids(BAD_ON_CPU))
def test_refused_on_the_cpu(call: str, changes: Arguments, message: str) -> None:
    check_refused("cpu", call, changes, message)


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "changes", "message"), BAD_ON_CUDA, ids=ids(BAD_ON_CUDA))
def test_refused_on_cuda(call: str, changes: Arguments, message: str) -> None:
    check_refused("cuda", call, changes, message)


MIXED = [
    ("rms_norm", "weight"),
    ("tucker_query", "weight"),
    ("tucker_query", "norm_weight"),
    ("topk", "keys"),
    ("topk", "core"),
    ("balance", "keys"),
    ("balance", "axis_indices"),
    ("balance", "u"),
    ("ffn", "indices"),
    ("ffn", "scores"),
    ("ffn", "pre_values"),
    ("ffn", "pre_input"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("stray_device", ["cpu", "cuda"])
@pytest.mark.parametrize(("call", "name"), MIXED)
def test_mixed_devices_are_refused(call: str, name: str, stray_device: str) -> None:
    function, make = CALLS[call]
    other = "cuda" if stray_device == "cpu" else "cpu"
    arguments = make(other)
    arguments[name] = arguments[name].to(stray_device)
    message = rf"{name} must be on the device of \w+, {other}(:0)?, got {stray_device}(:0)?$"
    with pytest.raises(ERRORS, match=message):
        function(**arguments)


@pytest.mark.parametrize(("call", "name"), [*MIXED, ("topk", "key_norm_weight"), ("topk", "u")])
def test_a_stray_meta_tensor_is_refused(call: str, name: str) -> None:
    """torch then calls the fake implementation, whose result would be uninitialised memory."""
    function, make = CALLS[call]
    arguments = make("cpu")
    if (call, name) == ("topk", "u"):
        arguments |= {"u": torch.ones(3, 2), "t": torch.ones(3, 2)}
    if name == "key_norm_weight":
        arguments[name] = torch.ones(6)
    arguments[name] = arguments[name].to("meta")
    message = rf"{name} must be on the device of \w+, cpu, got meta$"
    with pytest.raises(ERRORS, match=message):
        function(**arguments)


@pytest.mark.gpu
def test_permutation_on_another_device_is_refused() -> None:
    addressing = SlotAddressing(20, 20, shuffle=torch.arange(20))
    with pytest.raises(RuntimeError, match="value_ffn: permutation must be on the device"):
        ops.value_ffn(**bag_args("cuda"), addressing=addressing)


def test_feistel_needs_a_square() -> None:
    with pytest.raises(ValueError, match=r"expand \* window: must be the square"):
        SlotAddressing(20, 10, expand=2, shuffle="feistel")


def test_nothing_is_written_before_a_refusal(device: str) -> None:
    """A main_grad that does not fit is found before the other one is added to."""
    arguments = ffn_args(device)
    for name in ("values", "pre_values"):
        arguments[name].requires_grad_().main_grad = torch.zeros_like(arguments[name])
    arguments["pre_values"].main_grad = zeros(20, 4, device=device)
    with pytest.raises(ValueError, match=r"pre_values.main_grad must be \[N, Dp\] = \[20, 5\]"):
        ops.value_ffn(**arguments)
    assert not arguments["values"].main_grad.any()
