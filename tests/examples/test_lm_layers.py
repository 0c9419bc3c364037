"""The example's blocks: mixture of experts, attention, the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ultramem_cuda.examples.lm import layers
from ultramem_cuda.examples.lm.config import KINDS, Kind, ModelConfig
from ultramem_cuda.examples.lm.layers import (
    Attention,
    MoE,
    experts_grouped,
    experts_loop,
    grouped_mm_runs,
)
from ultramem_cuda.examples.lm.model import ByteLM

SMALL = ModelConfig(
    d_model=32,
    num_layers=2,
    attention_heads=2,
    context=32,
    ffn_inner=64,
    num_experts=6,
    experts_per_token=2,
    expert_inner=16,
    num_keys=16,
    key_dim=8,
    topk=4,
    pre_value_dim=8,
    value_dim=8,
)


def small_moe() -> MoE:
    torch.manual_seed(0)
    moe = MoE(d_model=16, inner=8, num_experts=5, experts_per_token=2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def test_moe_is_the_weighted_sum_of_chosen_experts() -> None:
    moe = small_moe()
    x = torch.randn(11, 16)
    y, balance = moe(x)
    logits = x @ moe.router.weight.T
    probability = logits.softmax(-1)
    for token in range(11):
        best = logits[token].topk(2).indices.tolist()
        total = probability[token, best].sum()
        expected = torch.zeros(16)
        for expert in best:
            gate, up = (x[token] @ moe.gate_up[expert]).chunk(2)
            out = (F.silu(gate) * up) @ moe.down[expert]
            expected += probability[token, expert] / total * out
        torch.testing.assert_close(y[token], expected)
    chosen = logits.topk(2).indices
    share = torch.bincount(chosen.flatten(), minlength=5) / 22
    torch.testing.assert_close(balance, 5 * (share * probability.mean(0)).sum())


def test_balance_loss_is_one_for_uniform_routing() -> None:
    moe = small_moe()
    torch.nn.init.zeros_(moe.router.weight)
    _, balance = moe(torch.randn(7, 16))
    torch.testing.assert_close(balance, torch.tensor(1.0))


def run_experts(run, device: str, dtype: torch.dtype) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return values.to(device, dtype).requires_grad_()

    # Expert 1 gets nothing.
    counts = torch.tensor([24, 0, 9, 7], device=device)
    leaves = [leaf(40, 32), leaf(4, 32, 32), leaf(4, 16, 32)]
    out = run(leaves[0], counts, leaves[1], leaves[2])
    out.backward(torch.randn(out.shape, generator=generator).to(device, dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_grouped_and_loop_agree(dtype: torch.dtype, bound: float) -> None:
    for one, other in zip(
        run_experts(experts_grouped, "cpu", dtype),
        run_experts(experts_loop, "cpu", dtype),
        strict=True,
    ):
        assert (one - other).norm() <= bound * other.norm()


@pytest.mark.gpu
def test_grouped_and_loop_agree_on_the_gpu() -> None:
    if not grouped_mm_runs(torch.device("cuda"), torch.bfloat16):
        pytest.skip("grouped_mm has no kernel for this GPU")
    for one, other in zip(
        run_experts(experts_grouped, "cuda", torch.bfloat16),
        run_experts(experts_loop, "cuda", torch.bfloat16),
        strict=True,
    ):
        assert (one - other).norm() <= 2e-2 * other.norm()


def test_cpu_uses_the_loop() -> None:
    assert not grouped_mm_runs(torch.device("cpu"), torch.bfloat16)


def test_too_many_experts_a_token() -> None:
    with pytest.raises(ValueError, match=r"experts_per_token must be in \[1, num_experts = 2\]"):
        MoE(8, 8, num_experts=2, experts_per_token=3)


def test_rotary_attention_depends_on_distance_alone() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, 12)
    x = torch.randn(1, 4, 16)
    query, key, _ = attention.qkv(x).view(1, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)

    def score(i: int, j: int, shift: int) -> torch.Tensor:
        rows = torch.zeros(1, 2, 12, 8)
        columns = torch.zeros(1, 2, 12, 8)
        rows[:, :, i + shift] = query[:, :, i]
        columns[:, :, j + shift] = key[:, :, j]
        turned = attention._rotate(rows), attention._rotate(columns)
        return (turned[0][:, :, i + shift] * turned[1][:, :, j + shift]).sum(-1)

    torch.testing.assert_close(score(3, 1, 0), score(3, 1, 7))
    assert not torch.allclose(score(3, 1, 0), (query[:, :, 3] * key[:, :, 1]).sum(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_causal(kind: Kind) -> None:
    torch.manual_seed(0)
    model = ByteLM(dataclasses.replace(SMALL, kind=kind)).eval()
    inputs = torch.randint(256, (2, 32))
    changed = inputs.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 256
    with torch.no_grad():
        before, after = model(inputs)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: Kind) -> None:
    torch.manual_seed(0)
    model = ByteLM(dataclasses.replace(SMALL, kind=kind))
    inputs = torch.randint(256, (4, 33))
    loss, balance = model.loss(inputs[:, :-1], inputs[:, 1:])
    assert abs(loss.item() - 5.545) < 0.8
    (loss + 0.01 * balance).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_table_is_held_once() -> None:
    model = ByteLM(dataclasses.replace(SMALL, kind="ultramem_v2"))
    assert [name for name in model.state_dict() if "values" in name] == [
        "table.values",
        "table.pre_values",
    ]


def test_heads_must_fit() -> None:
    with pytest.raises(ValueError, match="d_model must be a multiple of 2 \\* attention_heads"):
        ByteLM(dataclasses.replace(SMALL, kind="dense", attention_heads=5))


@pytest.mark.parametrize(("inner", "expected"), [(16, "grouped"), (17, "loop")])
def test_unaligned_experts_have_no_grouped_product(
    inner: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    loop = layers.experts_loop

    def record(name: str):  # type: ignore[no-untyped-def]
        return lambda *tensors: (taken.append(name), loop(*tensors))[1]

    monkeypatch.setattr(layers, "grouped_mm_runs", lambda device, dtype: True)
    monkeypatch.setattr(layers, "experts_grouped", record("grouped"))
    monkeypatch.setattr(layers, "experts_loop", record("loop"))
    moe = MoE(8, inner, 4, 2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    moe(torch.randn(5, 8))
    assert taken == [expected]
