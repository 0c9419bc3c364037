"""The memory layer's configuration for one of the example's models."""

from __future__ import annotations

from ultramem_cuda import UltraMemConfig

from .config import ModelConfig


def memory_config(config: ModelConfig) -> UltraMemConfig:
    """The layers of ``config``, each with a window of ``num_keys ** 2`` rows of its own.

    ``pkm`` scores as product-key memory does (arXiv 1907.05242): row plus column, a softmax over
    what was kept, and plain values of ``value_dim``.
    """
    common = {
        "d_model": config.d_model,
        "num_layers": config.num_layers,
        "num_keys": config.num_keys,
        "key_dim": config.key_dim,
        "num_slots": config.num_layers * config.num_keys**2,
        "num_heads": config.memory_heads,
        "topk": config.topk,
        "topology": "private",
        "value_dim": config.value_dim,
        "init": config.memory_init,
    }
    if config.kind == "pkm":
        own = {"mode": "additive", "tucker_rank": 1, "num_cores": 1, "score_norm": "softmax"}
    else:
        own = {"pre_value_dim": config.pre_value_dim, "ffn_inner_dim": config.ffn_inner}
    return UltraMemConfig.from_dict({**common, **own})
