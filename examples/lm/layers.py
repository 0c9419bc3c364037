"""The parts of a block that all kinds share, and the two feed-forward kinds without a memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions. x and the result are [B, L, D].

    Queries and keys are RMS-normalised per head: without it, when attention learns to copy from
    far back decides the loss of a short run, and that moves by a hundred steps from seed to seed.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, d_model: int, num_heads: int, context: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.key_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        frequency = ROTARY_BASE ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angle = torch.outer(torch.arange(context), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d_model = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        # In float32, like the norms' gains; under autocast the result is cast back.
        query = self._rotate(self.query_norm(query.float())).to(value.dtype)
        key = self._rotate(self.key_norm(key.float())).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, d_model))

    def _rotate(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        cos, sin = self.cos[:length], self.sin[:length]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), x [..., D]."""

    def __init__(self, d_model: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * inner, bias=False)
        self.down = nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products on ``x`` take: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def grouped_mm_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``F.grouped_mm`` has a real grouped kernel for these: bf16 on sm_90 and later."""
    return (
        hasattr(F, "grouped_mm")
        and device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


class MoE(nn.Module):
    """Dropless top-k mixture of SwiGLU experts.

    Gates are the softmax over all experts, renormalised over the chosen ones. ``forward`` takes
    x [T, D] and returns (y [T, D], balance), where balance is the Switch Transformer's load
    balance loss (arXiv 2101.03961, eq. 4), 1 for uniform routing, not yet weighted.
    """

    def __init__(self, d_model: int, inner: int, num_experts: int, experts_per_token: int) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(
                f"experts_per_token must be in [1, num_experts = {num_experts}], "
                f"got {experts_per_token}"
            )
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, d_model, 2 * inner))
        self.down = nn.Parameter(torch.empty(num_experts, inner, d_model))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> probabilities [T, X], gates [T, k] and chosen experts, int64 [T, k]."""
        # In fp32: bf16 logits tie often, and ties pile up on the first experts.
        with torch.autocast(x.device.type, enabled=False):
            probability = F.linear(x.float(), self.router.weight.float()).softmax(dim=-1)
        gates, chosen = probability.topk(self.experts_per_token, dim=-1)
        return probability, gates / gates.sum(dim=-1, keepdim=True), chosen

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probability, gates, chosen = self.route(x)
        # Rows are sorted by expert for the products and put back for the weighted sum: no atomics.
        order = chosen.flatten().argsort(stable=True)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        dtype = compute_dtype(x)
        rows = x.to(dtype).index_select(0, order // self.experts_per_token)
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        # Rows of the expert's inner width start at multiples of 16 bytes, or grouped_mm refuses.
        aligned = self.down.shape[1] * dtype.itemsize % 16 == 0
        run = experts_grouped if aligned and grouped_mm_runs(x.device, dtype) else experts_loop
        outputs = run(rows, counts, gate_up, down).index_select(0, order.argsort())
        y = (outputs.view(*chosen.shape, -1) * gates[..., None].to(dtype)).sum(dim=1)

        share = counts.to(probability.dtype) / max(1, chosen.numel())
        balance = self.num_experts * (share * probability.mean(dim=0)).sum()
        return y, balance

    def active_parameters(self) -> int:
        """Parameters that one token uses: the router and the chosen experts."""
        experts = self.gate_up.numel() + self.down.numel()
        return self.router.weight.numel() + experts * self.experts_per_token // self.num_experts


def experts_grouped(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each expert on its rows, by two grouped matrix products and no host synchronisation.

    rows [S, D] sorted by expert; counts [X]; gate_up [X, D, 2I]; down [X, I, D]; result [S, D].
    """
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down, offs=ends)


def experts_loop(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What ``experts_grouped`` computes, one expert after the other."""
    outputs = []
    for expert, part in enumerate(rows.split(counts.tolist())):
        gate, up = (part @ gate_up[expert]).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up) @ down[expert])
    return torch.cat(outputs)
