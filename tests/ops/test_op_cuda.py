"""What only CUDA has: streams, graphs, several devices, no synchronisation."""

from __future__ import annotations

import pytest
import torch
from helpers import Data
from torch import Tensor

from ultramem_cuda import SlotAddressing, ops

pytestmark = pytest.mark.gpu

ADDRESSING = SlotAddressing(500, 400, offset=250, expand=4, shuffle="feistel", seed=5)


def make_inputs(device: str, tokens: int = 33, seed: int = 1) -> list[Tensor]:
    data = Data(seed, device)
    return [
        data.normal(tokens, 24, dtype=torch.bfloat16, requires_grad=True),
        data.normal(2 * 2 * 2 * 16, 24, dtype=torch.bfloat16, scale=0.2, requires_grad=True),
        data.gains(16, requires_grad=True),
        data.normal(2, 2, 2, 40, 16, dtype=torch.bfloat16, requires_grad=True),
        data.cores(2, 2, 2, requires_grad=True),
        data.normal(500, 32, dtype=torch.bfloat16, requires_grad=True),
        data.normal(500, 24, dtype=torch.bfloat16, requires_grad=True),
    ]


def layer(
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    keys: Tensor,
    core: Tensor,
    values: Tensor,
    pre_values: Tensor,
) -> Tensor:
    query = ops.tucker_query(x, weight, gain, num_heads=2)
    scores, indices = ops.product_key_topk(query, keys, core, topk=12, key_norm_weight=gain)
    scores, indices = scores.flatten(1, 2), indices.flatten(1)
    return ops.value_ffn(
        indices, scores, values, pre_values, x, activation="silu", addressing=ADDRESSING
    )


def balance(inputs: list[Tensor]) -> Tensor:
    x, weight, gain, keys, core, *_ = inputs
    query, normed = ops.tucker_query(x, weight, gain, num_heads=2), ops.rms_norm(keys, gain)
    u, t, _ = ops.tucker_filter(core)
    _, _, kept = ops.product_key_topk(
        query, normed, core, topk=12, u=u, t=t, return_axis_indices=True
    )
    return ops.key_balance_loss(query, normed, kept, u=u, t=t)


def forward_backward(inputs: list[Tensor]) -> list[Tensor]:
    out, loss = layer(*inputs), balance(inputs)
    outputs, upstream = (out, loss), (torch.ones_like(out), torch.ones_like(loss))
    return [out.detach(), loss.detach(), *torch.autograd.grad(outputs, inputs, upstream)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_runs_on_the_current_stream() -> None:
    """Behind a slow kernel on another stream that makes the inputs: work on the wrong stream would
    read them too early."""
    expected = forward_backward(make_inputs("cuda"))
    inputs = make_inputs("cuda")
    right = [tensor.detach().clone() for tensor in inputs]
    with torch.no_grad():
        for tensor in inputs:
            tensor.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        with torch.no_grad():
            for tensor, values in zip(inputs, right, strict=True):
                tensor.copy_(values)
        actual = forward_backward(inputs)
    assert not stream.query(), "an operator waited for the GPU"
    stream.synchronize()
    assert_equal(actual, expected)


def test_never_synchronises() -> None:
    inputs = make_inputs("cuda")
    forward_backward(inputs)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(inputs)
        ops.tucker_filter(inputs[4])
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_graph_capture_and_replay(tokens: int) -> None:
    inputs = make_inputs("cuda", tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(inputs)
    # Other numbers in the same tensors.
    others = make_inputs("cuda", tokens, seed=2)
    expected = forward_backward(others)
    with torch.no_grad():
        for tensor, values in zip(inputs, others, strict=True):
            tensor.copy_(values)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured, expected)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    expected = forward_backward(make_inputs("cuda:0"))
    # The current device stays cuda:0: the operators go where their tensors are.
    actual = forward_backward(make_inputs("cuda:1"))
    assert all(tensor.device == torch.device("cuda:1") for tensor in actual)
    assert torch.cuda.current_device() == 0
    assert_equal(actual, expected)


def test_tensors_of_two_gpus_are_refused() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    inputs = make_inputs("cuda:0")
    with pytest.raises(RuntimeError, match="rms_norm: weight must be on the device"):
        ops.rms_norm(inputs[0][:, :16], inputs[2].to("cuda:1"))


def test_agrees_with_the_cpu() -> None:
    """In float32: with bfloat16 between the operators a last bit can become another slot."""
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs("cuda")]
    host = [tensor.detach().cpu().requires_grad_() for tensor in inputs]
    for a, b in zip(forward_backward(inputs), forward_backward(host), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
