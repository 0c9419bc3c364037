"""Sizes to start from: ``small`` and (minutes) ``brief`` for a GPU, ``tiny`` for two cores."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig, TrainConfig


@dataclass(frozen=True)
class Preset:
    """A model and how to train it; ``kind``, seed and precision are set by the caller."""

    model: ModelConfig
    train: TrainConfig


PRESETS: dict[str, Preset] = {
    "small": Preset(ModelConfig(), TrainConfig()),
    "brief": Preset(ModelConfig(), TrainConfig(steps=300, warmup=60, eval_every=30)),
    "tiny": Preset(
        ModelConfig(
            d_model=64,
            num_layers=2,
            attention_heads=2,
            context=128,
            ffn_inner=264,
            num_experts=16,
            experts_per_token=4,
            expert_inner=64,
            num_keys=48,
            key_dim=16,
            topk=16,
            pre_value_dim=32,
            value_dim=32,
        ),
        TrainConfig(
            steps=800,
            batch=16,
            lr=6e-3,
            # A table this small is read thousands of times a row: it needs no higher rate.
            table_lr_multiplier=1.0,
            warmup=50,
            val_windows=256,
            eval_every=100,
            checkpoint_every=400,
            log_every=10,
        ),
    ),
}
