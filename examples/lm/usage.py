"""Which experts and slots a trained model really uses, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ultramem_cuda.stats import SlotUsage

from .layers import MoE
from .model import ByteLM

DRAWS = 16


class _SlotRecorder(SlotUsage):
    """Keeps the rows that every token reads, which the counts of its base class do not tell."""

    def __init__(self, base: Any) -> None:
        super().__init__(base.addressing, base.keys.device)
        self.rows: list[Tensor] = []

    def update(self, indices: Tensor) -> None:
        rows, _ = self.addressing.slots(indices)
        self.rows.append(rows.cpu())


@torch.no_grad()
def sparse_choices(model: ByteLM, inputs: Tensor, batch: int) -> list[Tensor]:
    """What every token of ``inputs`` [windows, L] uses in each sparse layer.

    Returns one int64 tensor [windows * L, k] a layer: the experts of a MoE, the table rows of a
    memory layer; an empty list for a dense model. Runs ``batch`` windows at a time.
    """
    moes = [block.ffn for block in model.typed_blocks() if isinstance(block.ffn, MoE)]
    memories = [block.memory for block in model.typed_blocks() if block.memory is not None]
    recorders = [_SlotRecorder(memory) for memory in memories]
    experts: list[list[Tensor]] = [[] for _ in moes]

    def record(moe: MoE, arguments: tuple[Tensor, ...], into: list[Tensor]) -> None:
        into.append(moe.route(arguments[0])[2].cpu())

    hooks = [
        moe.register_forward_pre_hook(
            lambda module, arguments, into=into: record(module, arguments, into)
        )
        for moe, into in zip(moes, experts, strict=True)
    ]
    was_training = model.training
    model.eval()
    try:
        for memory, recorder in zip(memories, recorders, strict=True):
            memory.usage = recorder
        device = model.head.weight.device
        for part in inputs.split(batch):
            model(part.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        for memory in memories:
            memory.usage = None
        model.train(was_training)
    return [torch.cat(parts) for parts in [*experts, *(recorder.rows for recorder in recorders)]]


def mean_distinct(choices: Sequence[Tensor], batch: int, seed: int = 0) -> float:
    """Distinct experts or rows that ``batch`` random tokens use, mean over layers and draws.

    Tokens are drawn from all windows, as those of a decoding batch come from unrelated sequences.

    Raises:
        ValueError: ``choices`` holds fewer tokens than ``batch``.
    """
    tokens = len(choices[0])
    if batch > tokens:
        raise ValueError(f"batch must be at most the {tokens} tokens recorded, got {batch}")
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for _ in range(DRAWS):
        drawn = torch.randperm(tokens, generator=generator)[:batch]
        total += sum(layer[drawn].unique().numel() for layer in choices)
    return total / (DRAWS * len(choices))
