"""The example language model under torch.compile: whole, and block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ultramem_cuda.examples.lm.config import VOCABULARY, ModelConfig
from ultramem_cuda.examples.lm.model import ByteLM

# Batch and length.
SIZES = ((2, 5), (3, 7), (4, 16), (2, 33), (5, 24), (6, 6), (7, 8), (2, 12), (3, 40), (8, 3))


@pytest.fixture(autouse=True)
def _from_nothing() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model(num_layers: int) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(
        ModelConfig(
            d_model=32,
            num_layers=num_layers,
            attention_heads=2,
            context=40,
            ffn_inner=48,
            num_keys=16,
            key_dim=8,
            topk=4,
            pre_value_dim=8,
            value_dim=8,
        )
    )


def outcome(lm: ByteLM, loss_of: Any, size: tuple[int, int], device: str = "cpu") -> list[Tensor]:
    """The loss and the gradients of everything."""
    generator = torch.Generator().manual_seed(size[1])
    text = torch.randint(VOCABULARY, size, generator=generator).to(device)
    loss, _ = loss_of(text, text.roll(-1, 1))
    return [loss.detach(), *torch.autograd.grad(loss, list(lm.parameters()))]


def compilations() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_whole() -> None:
    lm = model(1)
    compiled = torch.compile(lm.loss, fullgraph=True, backend="aot_eager")
    for size in SIZES:
        torch.testing.assert_close(outcome(lm, compiled, size), outcome(lm, lm.loss, size))
    assert compilations() == 2


def test_block_by_block() -> None:
    """More blocks than torch._dynamo.config.recompile_limit allows compilations."""
    lm = model(9)
    expected = [outcome(lm, lm.loss, size) for size in SIZES[:3]]
    for block in lm.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for size, wanted in zip(SIZES, expected, strict=False):
        torch.testing.assert_close(outcome(lm, lm.loss, size), wanted)
    assert compilations() == 2


@pytest.mark.gpu
def test_reduce_overhead() -> None:
    lm = model(3).cuda()
    compiled = torch.compile(lm.loss, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        mine = [tensor.clone() for tensor in outcome(lm, compiled, (4, 16), "cuda")]
        expected = outcome(lm, lm.loss, (4, 16), "cuda")
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5)
    assert compilations() == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
