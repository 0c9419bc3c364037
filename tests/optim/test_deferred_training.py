"""Tables that train without a gradient table, layers and optimizers together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ultramem_cuda as um

STEPS = 100


def config() -> um.UltraMemConfig:
    return um.UltraMemConfig(
        d_model=16,
        num_layers=2,
        num_keys=12,
        key_dim=8,
        topk=6,
        axis_topk=6,
        num_slots=200,
        pre_value_dim=8,
        value_dim=16,
    )


class Memory(nn.Module):
    """Two layers that share a table. They do not train themselves: which slots they retrieve would
    hang on the last bits of what the table has learnt."""

    def __init__(self, grad_mode: str, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = um.MemoryTable.from_config(config(), device="cpu", grad_mode=grad_mode)
        self.layers = nn.ModuleList(um.UltraMemLayer(config(), i) for i in range(2))
        self.layers.requires_grad_(False)
        self.to(device)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x, self.table) for layer in self.layers])


def batches(device: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(7, 16, generator=generator).to(device),
            torch.randn(2, 7, 16, generator=generator).to(device),
        )
        for _ in range(STEPS)
    ]


def loss_of(memory: Memory, x: Tensor, target: Tensor) -> Tensor:
    return (memory(x) - target).square().mean()


def make_sparse(parameter: nn.Parameter) -> None:
    """As if only the touched rows had a gradient."""
    assert parameter.grad is not None
    rows = parameter.grad.abs().amax(1).nonzero().flatten()
    parameter.grad = torch.sparse_coo_tensor(
        rows[None], parameter.grad[rows], parameter.shape, check_invariants=True
    )


def test_adam_is_sparse_adam(device: str) -> None:
    deferred, dense = Memory("deferred", device), Memory("dense", device)
    dense.load_state_dict(deferred.state_dict())
    mine = um.optim.MemoryAdam(deferred.table.parameters(), lr=1e-2)
    theirs = torch.optim.SparseAdam(list(dense.table.parameters()), lr=1e-2)
    for x, target in batches(device):
        for memory, optimizer in ((deferred, mine), (dense, theirs)):
            optimizer.zero_grad()
            loss_of(memory, x, target).backward()
            if memory is dense:
                for parameter in dense.table.parameters():
                    make_sparse(parameter)
            optimizer.step()
    for a, b in zip(deferred.table.parameters(), dense.table.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_decay_is_that_of_every_row(device: str) -> None:
    deferred, dense = Memory("deferred", device), Memory("dense", device)
    dense.load_state_dict(deferred.state_dict())
    mine = um.optim.MemoryAdam(deferred.table.parameters(), lr=1e-2, weight_decay=1.0)
    theirs = torch.optim.SparseAdam(list(dense.table.parameters()), lr=1e-2)
    for step, (x, target) in enumerate(batches(device)):
        lr = 1e-2 * (1.0 - step / (2 * STEPS))
        mine.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = lr
        for memory, optimizer in ((deferred, mine), (dense, theirs)):
            optimizer.zero_grad()
            loss_of(memory, x, target).backward()
        for parameter in dense.table.parameters():
            make_sparse(parameter)
            with torch.no_grad():
                parameter.mul_(1.0 - lr)
        mine.step()
        theirs.step()
    assert deferred.table.scale is not None
    assert deferred.table.scale.max() < 0.5
    x, _ = batches(device)[0]
    torch.testing.assert_close(deferred(x), dense(x), rtol=1e-5, atol=1e-7)
    deferred.table.fold_scale()
    for a, b in zip(deferred.table.parameters(), dense.table.parameters(), strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_compiled_layers_follow_the_scale(device: str) -> None:
    torch._dynamo.reset()
    eager, traced = Memory("deferred", device), Memory("deferred", device)
    traced.load_state_dict(eager.state_dict())
    traced.table.reserve(2 * 7, config())
    forwards = (eager, torch.compile(traced, fullgraph=True, backend="aot_eager"))
    optimizers = [
        um.optim.MemoryAdam(memory.table.parameters(), lr=1e-2, weight_decay=30.0)
        for memory in (eager, traced)
    ]
    for x, target in batches(device)[:6]:
        for forward, optimizer in zip(forwards, optimizers, strict=True):
            (forward(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert eager.table.scale is not None
    assert eager.table.scale.max() < 0.2
    for mine, theirs in zip(traced.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_micro_batches_add_up(device: str) -> None:
    whole, parts = Memory("deferred", device), Memory("deferred", device)
    parts.load_state_dict(whole.state_dict())
    (x, target), *_ = batches(device)
    for memory, splits in ((whole, (7,)), (parts, (3, 4))):
        optimizer = um.optim.MemorySGD(memory.table.parameters(), lr=0.5)
        for piece, wanted in zip(x.split(splits), target.split(splits, dim=1), strict=True):
            loss = loss_of(memory, piece, wanted) * (piece.shape[0] / x.shape[0])
            loss.backward()
        total = um.optim.clip_grad_norm_(memory, 1e-3)
        assert total > 1e-3
        optimizer.step()
        optimizer.zero_grad()
        assert memory.table.factors is not None
        assert memory.table.factors.num_tokens == 0
    before = Memory("deferred", device)
    for a, b, start in zip(
        whole.table.parameters(), parts.table.parameters(), before.table.parameters(), strict=True
    ):
        assert not torch.equal(a, start)
        torch.testing.assert_close(a - start, b - start, rtol=1e-4, atol=1e-8)


def test_a_frozen_half_stays(device: str) -> None:
    memory = Memory("deferred", device)
    optimizer = um.optim.MemoryAdam(memory.table.parameters(), lr=1e-2)
    memory.table.values.requires_grad_(False)
    before = [p.detach().clone() for p in memory.table.parameters()]
    (x, target), *_ = batches(device)
    loss_of(memory, x, target).backward()
    um.optim.clip_grad_norm_(memory, 1.0)
    optimizer.step()
    values, pre_values = memory.table.parameters()
    assert torch.equal(values, before[0])
    assert not torch.equal(pre_values, before[1])


def test_a_table_is_clipped_as_a_whole() -> None:
    memory = Memory("deferred", "cpu")
    (x, target), *_ = batches("cpu")
    loss_of(memory, x, target).backward()
    with pytest.raises(ValueError, match="clipped together"):
        um.optim.clip_grad_norm_(memory.table.values, 1.0)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory("deferred", "cpu")
    optimizer = um.optim.MemorySGD(memory.table.parameters(), lr=0.1)
    (x, target), *_ = batches("cpu")
    loss_of(memory, x, target).backward()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match="several processes"):
        optimizer.step()


def test_a_backward_after_the_step_is_not_taken_for_new() -> None:
    memory = Memory("deferred", "cpu")
    optimizer = um.optim.MemorySGD(memory.table.parameters(), lr=0.1)
    (x, target), *_ = batches("cpu")
    loss_of(memory, x, target).backward()
    optimizer.step()
    loss_of(memory, x, target).backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) after step\(\)"):
        optimizer.step()
