"""Tiny decoders of transformers with random weights. Import after importorskip("transformers")."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

# Of UltraMemConfig; d_model and num_layers are the model's.
MEMORY: dict[str, Any] = {
    "num_keys": 12,
    "key_dim": 6,
    "num_slots": 500,
    "value_dim": 8,
    "pre_value_dim": 5,
    "topk": 7,
    "seed": 3,
}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 64,
    # Weights at which layers matter for what is generated.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def decoder(family: str = "Llama", head: str = "ForCausalLM", **overrides: Any) -> Any:
    """A model of transformers in eval mode, such as LlamaForCausalLM, seeded."""
    config_class = getattr(transformers, f"{family}Config")
    torch.manual_seed(11)
    return getattr(transformers, family + head)(config_class(**{**SIZES, **overrides})).eval()


@torch.no_grad()
def enlarge_memory(model: Any) -> Any:
    """Scale up what memory adds, which the initialisation keeps small beside such weights."""
    model.memory_table.values.mul_(30.0)
    if model.memory_table.pre_values is not None:
        model.memory_table.pre_values.mul_(30.0)
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Two prompts of unequal length, padded on the left: ids [2, 6] and their mask."""
    ids = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    return ids, mask


def generate(model: Any, use_cache: bool = True) -> Tensor:
    ids, mask = prompts()
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=use_cache
    )


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids, mask = prompts()
    return model(ids, attention_mask=mask).logits


def loss_of(model: Any) -> Tensor:
    ids, mask = prompts()
    return model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
