"""The decoder: x <- x + attention(norm x); x <- x + FFN(norm x) + memory(norm x)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ultramem_cuda as um

from .config import VOCABULARY, ModelConfig
from .layers import Attention, MoE, SwiGLU
from .memory import memory_config


class Block(nn.Module):
    """One transformer block of any kind. ``memory`` is None where the kind has none."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.d_model
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, config.attention_heads, config.context)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.ffn: SwiGLU | MoE
        if config.kind == "moe":
            self.ffn = MoE(width, config.expert_inner, config.num_experts, config.experts_per_token)
        else:
            self.ffn = SwiGLU(width, config.ffn_inner)
        self.memory: um.UltraMemLayer | None = None
        if config.kind in ("pkm", "ultramem_v2"):
            self.memory = um.UltraMemLayer(memory_config(config), layer)

    def forward(self, x: Tensor, table: um.MemoryTable | None) -> tuple[Tensor, Tensor | None]:
        """x [B, L, D]; returns the new x and the unweighted balance loss of a MoE."""
        x = x + self.attention(self.attention_norm(x))
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            y, balance = self.ffn(normed.flatten(0, 1))
            return x + y.view_as(x), balance
        if self.memory is None or table is None:
            return x + self.ffn(normed), None
        return x + um.ffn_with_memory(self.ffn, self.memory, normed, table), None


class ByteLM(nn.Module):
    """A causal language model over bytes.

    The memory table is held here, once; blocks are handed a reference.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.d_model % (2 * config.attention_heads):
            raise ValueError(
                f"d_model must be a multiple of 2 * attention_heads (rotary pairs), got "
                f"{config.d_model} and {config.attention_heads} heads"
            )
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.d_model)
        self.table: um.MemoryTable | None = None
        if config.kind in ("pkm", "ultramem_v2"):
            self.table = um.MemoryTable.from_config(memory_config(config))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.head = nn.Linear(config.d_model, VOCABULARY, bias=False)
        self._initialise()

    def typed_blocks(self) -> list[Block]:
        """The blocks, as what they are rather than as modules."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def _initialise(self) -> None:
        """N(0, 1/D) weights, output projections scaled down with depth. Memory has its own."""
        if self.embedding.weight.is_meta:
            return  # There are no values; the model is built for its shapes.
        std = self.config.d_model**-0.5
        depth_scale = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or ".memory." in name or name.startswith("table."):
                continue
            output = name.endswith(("attention.out.weight", "ffn.down.weight", "ffn.down"))
            nn.init.normal_(parameter, std=std * (depth_scale if output else 1.0))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """inputs int64 [B, L]; logits [B, L, 256] and the mean balance loss (0 without experts)."""
        x = self.embedding(inputs)
        balances = []
        for block in self.blocks:
            x, balance = block(x, self.table)
            if balance is not None:
                balances.append(balance)
        mean_balance = torch.stack(balances).mean() if balances else x.new_zeros(())
        return self.head(self.norm(x)), mean_balance

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood in nats a byte, and the balance loss; inputs [B, L]."""
        logits, balance = self(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), balance
