"""The reference: every operator in NumPy float64, forward and hand-derived backward.

It is written to be read beside the papers, UltraMemV2 (arXiv 2508.18756) first of all, whose
equation numbers the docstrings cite. It needs nothing but NumPy. In reading order: rms_norm and
tucker (the query, the filter), product_key (retrieval), addressing (from index to slot), value_ffn
(from slots to output), layer (all of it), losses, optim; numerics holds what other implementations
are judged by.
"""

from .addressing import SlotAddressing, feistel, mix64, slots
from .layer import LayerConfig, LayerOutput, LayerParams, memory_layer, memory_layer_bwd
from .losses import (
    key_balance_loss,
    key_balance_loss_bwd,
    tucker_penalty,
    tucker_penalty_bwd,
)
from .numerics import (
    KeptSetComparison,
    axis_band,
    compare_kept_sets,
    cosine,
    directional_derivative,
    grid_band,
    missing_rows,
    relative_l2,
    signed_bias,
)
from .optim import (
    AdagradState,
    AdamState,
    SGDState,
    adagrad_init,
    adagrad_update,
    adam_init,
    adam_update,
    sgd_init,
    sgd_update,
)
from .product_key import (
    ProductKeyResult,
    product_key_scores_at,
    product_key_topk,
    product_key_topk_bwd,
)
from .rms_norm import rms_norm, rms_norm_bwd
from .tucker import tucker_filter, tucker_filter_bwd, tucker_query, tucker_query_bwd
from .value_ffn import ValueFFNGrads, value_ffn, value_ffn_bwd

__all__ = [
    "AdagradState",
    "AdamState",
    "KeptSetComparison",
    "LayerConfig",
    "LayerOutput",
    "LayerParams",
    "ProductKeyResult",
    "SGDState",
    "SlotAddressing",
    "ValueFFNGrads",
    "adagrad_init",
    "adagrad_update",
    "adam_init",
    "adam_update",
    "axis_band",
    "compare_kept_sets",
    "cosine",
    "directional_derivative",
    "feistel",
    "grid_band",
    "key_balance_loss",
    "key_balance_loss_bwd",
    "memory_layer",
    "memory_layer_bwd",
    "missing_rows",
    "mix64",
    "product_key_scores_at",
    "product_key_topk",
    "product_key_topk_bwd",
    "relative_l2",
    "rms_norm",
    "rms_norm_bwd",
    "sgd_init",
    "sgd_update",
    "signed_bias",
    "slots",
    "tucker_filter",
    "tucker_filter_bwd",
    "tucker_penalty",
    "tucker_penalty_bwd",
    "tucker_query",
    "tucker_query_bwd",
    "value_ffn",
    "value_ffn_bwd",
]
