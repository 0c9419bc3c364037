"""What a run is: the model, the optimisation, and the presets the command line starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["dense", "moe", "pkm", "ultramem_v2"]
KINDS: tuple[Kind, ...] = get_args(Kind)
VOCABULARY = 256


@dataclass(frozen=True)
class ModelConfig:
    """One decoder. ``examples.lm.matching.matched`` fills in what makes the kinds comparable.

    ``ffn_inner`` is the SwiGLU width of the dense kind; the matched memory kinds have a smaller
    one, by as much as their memory layer costs. ``memory_*`` and the names after them are those of
    ``UltraMemConfig``; every layer has a window of ``num_keys ** 2`` slots of its own.
    """

    kind: Kind = "ultramem_v2"
    d_model: int = 384
    num_layers: int = 6
    attention_heads: int = 6
    context: int = 512
    ffn_inner: int = 1056

    num_experts: int = 92
    experts_per_token: int = 8
    expert_inner: int = 128
    balance_loss: float = 0.01

    num_keys: int = 256
    key_dim: int = 64
    memory_heads: int = 1
    topk: int = 32
    pre_value_dim: int = 96
    value_dim: int = 96
    memory_init: Literal["release", "paper"] = "release"


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    A step takes ``batch`` windows of ``context`` bytes, in ``accumulate`` micro-batches. The
    learning rate warms up linearly over ``warmup`` steps and falls as a cosine to
    ``final_lr_ratio`` of ``lr``; that of the memory tables is ``table_lr_multiplier`` times as
    high at first, a factor that decays linearly to 1 at the last step. Tables are clipped apart
    and not decayed.
    """

    steps: int = 1500
    batch: int = 64
    accumulate: int = 1
    lr: float = 1.5e-3
    final_lr_ratio: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.1
    table_lr_multiplier: float = 4.0
    clip: float = 1.0
    table_clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    val_fraction: float = 0.03
    val_windows: int = 256
    eval_every: int = 250
    checkpoint_every: int = 500
    log_every: int = 10
