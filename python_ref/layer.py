"""The whole memory layer, put together from the operators.

UltraMemV2 (arXiv 2508.18756), beside the FFN of every block and on the same normed input x:

    q = RMSNorm(x W_q),  K = RMSNorm(K)            section 3.2, equation 10
    g, index = TopM(S_row^T C S_col)               equations 10 and 11
    s_hat = Shuffle(vec(S_grid))                   equation 8
    y = W_v^T V^T ((P W_p x) * s_hat)              equation 15; W_p makes x as narrow as P

With sum_groups=False every virtual copy of the table has its own slice of the value projection, the
first UltraMem's implicit value expansion (equation 9); mode="additive" without pre-values is PKM
(equations 3 to 5, without its softmax).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ._arrays import FloatArray, IntArray, f64, non_finite_ok
from .addressing import Addressing
from .product_key import (
    Mode,
    ProductKeyResult,
    product_key_scores_at,
    product_key_topk,
    product_key_topk_bwd,
)
from .rms_norm import rms_norm, rms_norm_bwd
from .tucker import tucker_query, tucker_query_bwd
from .value_ffn import Activation, value_ffn, value_ffn_bwd


@dataclass(frozen=True)
class LayerParams:
    """Everything a layer trains; as gradients, the same fields hold the gradient of each.

    values and pre_values are the table, which other layers may share.
    """

    query_proj: FloatArray  # [2 * H * Q * Kd, D]
    query_norm: FloatArray  # [Kd]
    keys: FloatArray  # [H, 2, R, n, Kd]
    key_norm: FloatArray  # [Kd]
    cores: FloatArray | None  # [C, H, R, R]; None in additive mode
    value_proj: FloatArray  # [D, Dv], or [D, E * Dv] with a slice a group
    values: FloatArray  # [N, Dv]
    pre_proj: FloatArray | None = None  # [Dp, D]
    pre_values: FloatArray | None = None  # [N, Dp]


@dataclass(frozen=True)
class LayerConfig:
    """What is fixed while a layer trains."""

    topk: int
    axis_topk: int | None = None
    num_heads: int = 1
    mode: Mode = "tucker"
    activation: Activation = "identity"
    addressing: Addressing | None = None
    sum_groups: bool = True
    eps: float = 1e-6


@dataclass(frozen=True)
class LayerOutput:
    """The output, and what the backward reads again."""

    y: FloatArray  # [T, D]
    query: FloatArray  # [T, 2, H, Q, Kd]
    selection: ProductKeyResult | None  # None where the indices were given
    indices: IntArray  # [T, H, M] before addressing
    scores: FloatArray  # [T, H, M, C]
    pre_input: FloatArray | None  # [T, Dp]
    gathered: FloatArray  # [T, Dv] or [T, E * Dv], what value_proj is applied to


@non_finite_ok
def memory_layer(
    x: npt.ArrayLike,
    params: LayerParams,
    config: LayerConfig,
    indices: IntArray | None = None,
) -> LayerOutput:
    """y [T, D] from x [T, D].

    Given indices [T, H, M], those slots are used in place of the best: the smooth function that
    memory_layer_bwd differentiates. Raises what the operators raise.
    """
    x = f64(x)
    query = tucker_query(x, params.query_proj, params.query_norm, config.num_heads, config.eps)
    selection = None
    if indices is None:
        keys = rms_norm(params.keys, params.key_norm, config.eps)
        selection = product_key_topk(
            query,
            keys,
            params.cores,
            topk=config.topk,
            axis_topk=config.axis_topk,
            mode=config.mode,
        )
        indices, scores = selection.indices, selection.scores
    else:
        scores = product_key_scores_at(
            query,
            params.keys,
            params.cores,
            indices,
            config.mode,
            key_norm_weight=params.key_norm,
            eps=config.eps,
        )

    pre_input = None if params.pre_proj is None else x @ f64(params.pre_proj).T
    flat_indices, flat_scores = _flat_heads(indices, scores)
    gathered = value_ffn(
        flat_indices,
        flat_scores,
        params.values,
        params.pre_values,
        pre_input,
        activation=config.activation,
        addressing=config.addressing,
        sum_groups=config.sum_groups,
    )
    gathered = gathered.reshape(x.shape[0], params.value_proj.shape[1])
    y = gathered @ f64(params.value_proj).T
    return LayerOutput(y, query, selection, indices, scores, pre_input, gathered)


@non_finite_ok
def memory_layer_bwd(
    grad_y: npt.ArrayLike,
    x: npt.ArrayLike,
    params: LayerParams,
    config: LayerConfig,
    output: LayerOutput,
) -> tuple[FloatArray, LayerParams]:
    """(grad_x [T, D], the gradient of every parameter) at the slots that output used.

    The operators' backwards in reverse order; x is read by the query and by the pre-value
    projection, and collects the gradient of both.
    """
    x, grad_y = f64(x), f64(grad_y)
    value_proj = f64(params.value_proj)
    grad_value_proj = grad_y.T @ output.gathered
    grad_gathered = grad_y @ value_proj
    if not config.sum_groups:
        value_dim = params.values.shape[1]
        num_groups = value_proj.shape[1] // value_dim
        grad_gathered = grad_gathered.reshape(x.shape[0], num_groups, value_dim)

    flat_indices, flat_scores = _flat_heads(output.indices, output.scores)
    ffn = value_ffn_bwd(
        grad_gathered,
        flat_indices,
        flat_scores,
        params.values,
        params.pre_values,
        output.pre_input,
        activation=config.activation,
        addressing=config.addressing,
        sum_groups=config.sum_groups,
    )

    keys = rms_norm(params.keys, params.key_norm, config.eps)
    grad_query, grad_normed_keys, grad_cores = product_key_topk_bwd(
        ffn.scores.reshape(output.scores.shape),
        output.query,
        keys,
        params.cores,
        output.indices,
        mode=config.mode,
    )
    grad_keys, grad_key_norm = rms_norm_bwd(
        grad_normed_keys, params.keys, params.key_norm, config.eps
    )
    grad_x, grad_query_proj, grad_query_norm = tucker_query_bwd(
        grad_query, x, params.query_proj, params.query_norm, config.num_heads, config.eps
    )
    grad_pre_proj = None
    if params.pre_proj is not None and ffn.pre_input is not None:
        grad_pre_proj = ffn.pre_input.T @ x
        grad_x = grad_x + ffn.pre_input @ f64(params.pre_proj)
    grads = LayerParams(
        query_proj=grad_query_proj,
        query_norm=grad_query_norm,
        keys=grad_keys,
        key_norm=grad_key_norm,
        cores=grad_cores,
        value_proj=grad_value_proj,
        values=ffn.values,
        pre_proj=grad_pre_proj,
        pre_values=ffn.pre_values,
    )
    return grad_x, grads


def _flat_heads(indices: IntArray, scores: FloatArray) -> tuple[IntArray, FloatArray]:
    """A token's heads side by side: [T, H, M] -> [T, S], [T, H, M, C] -> [T, S, C], S = H * M."""
    num_tokens, num_heads, topk, num_cores = scores.shape
    num_retrieved = num_heads * topk
    return (
        np.asarray(indices).reshape(num_tokens, num_retrieved),
        scores.reshape(num_tokens, num_retrieved, num_cores),
    )
