"""The two initialisations of memory layers and their table.

"release" sets fixed standard deviations, as the code published with UltraMemV2 does. "paper"
follows UltraMemV2, appendix A: it makes the mean score 1 and the variance of the memory output
equal to that of the block's FFN,

    var_mem = 0.16 (1 + sigma_s^2) sigma_V^4 Dp Dv H M / D  =  0.4 * 0.16 * k_inner / (2 L) =
    var_ffn

(k_inner is the FFN's inner width after gating over D), which gives sigma_V. The mean and the spread
of a score that survives two top-k selections have no closed form and are measured on random scores.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .config import UltraMemConfig

if TYPE_CHECKING:
    from .layer import UltraMemLayer

_RELEASE_TABLE_STD = 0.02
_RELEASE_GAIN_POWER = -0.4
# Appendix A: projections are N(0, 2 / (5 D)).
_PAPER_PROJECTION_VARIANCE = 0.4
_SIMULATED_ENTRIES = 1 << 24
_SIMULATION_SEED = 20250826


@dataclasses.dataclass(frozen=True)
class ScoreStatistics:
    """Kept per-core scores of unit-variance axis scores: their mean, and standard deviation over
    mean."""

    mean: float
    relative_std: float


@functools.lru_cache(maxsize=256)
def score_statistics(
    num_keys: int, axis_topk: int, topk: int, tucker_rank: int, num_cores: int, mode: str
) -> ScoreStatistics:
    """Simulate the retrieval of random tokens, each with cores of its own, with a fixed seed (below
    a second on one core).

    Axis scores are drawn from N(0, 1) and cores from U(0, 1); the real top-m and top-M are run.
    Statistics are over tokens, kept slots and cores. The result does not depend on torch's global
    generator, default device or default dtype.
    """
    generator = torch.Generator(device="cpu").manual_seed(_SIMULATION_SEED)
    rank, cores = tucker_rank, num_cores
    entries_per_token = axis_topk**2 + 2 * rank * num_keys
    tokens = min(4096, max(512, _SIMULATED_ENTRIES // entries_per_token))

    def axis() -> Tensor:
        shape = (tokens, rank, num_keys)
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    def keep_best(scores: Tensor, direction: Tensor) -> Tensor:
        ranking = torch.einsum("tr,trn->tn", direction, scores)
        kept = ranking.topk(axis_topk, dim=1).indices
        return scores.gather(2, kept[:, None].expand(-1, rank, -1))

    with torch.no_grad():
        if mode == "additive":
            ones = torch.ones(tokens, 1, device="cpu", dtype=torch.float32)
            row, col = keep_best(axis(), ones), keep_best(axis(), ones)
            per_core = row[:, :, :, None] + col[:, :, None, :]
        else:
            shape = (tokens, cores, rank, rank)
            core = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
            left, _, right = torch.linalg.svd(core.sum(1).double())
            u, t = left[:, :, 0].float(), right[:, 0, :].float()
            flip = u.sum(1, keepdim=True) < 0
            row = keep_best(axis(), torch.where(flip, -u, u))
            col = keep_best(axis(), torch.where(flip, -t, t))
            per_core = torch.einsum("tri,tcrs,tsj->tcij", row, core, col)
        best = per_core.sum(1).flatten(1).topk(topk, dim=1, sorted=False).indices
        kept = per_core.flatten(2).gather(2, best[:, None].expand(-1, per_core.shape[1], -1))
        kept = kept.double()
        mean = kept.mean().item()
        return ScoreStatistics(mean, kept.std(correction=0).item() / mean)


def _statistics(config: UltraMemConfig) -> ScoreStatistics:
    return score_statistics(
        config.num_keys,
        config.kept_per_axis,
        config.topk,
        config.tucker_rank,
        config.num_cores,
        config.mode,
    )


def norm_gain(config: UltraMemConfig) -> float:
    """Initial gain of the query and the key norm.

    A dot product of normalised query and key is Kd^(1/2) gain^2 N(0, 1); a Tucker score is a
    product of two, an additive score a sum. "paper" makes the mean kept score 1.
    """
    if config.init == "release":
        return float(config.key_dim**_RELEASE_GAIN_POWER)
    mean = _statistics(config).mean
    if config.mode == "additive":
        return float((math.sqrt(config.key_dim) * mean) ** -0.5)
    return float((config.key_dim * mean) ** -0.25)


def sigma_s(config: UltraMemConfig) -> float:
    """Standard deviation of a kept score, once its mean is 1 (UltraMemV2, appendix A.2)."""
    return _statistics(config).relative_std


def table_std(config: UltraMemConfig) -> float:
    """Initial standard deviation of values and pre-values (UltraMemV2, eq. 26, for "paper")."""
    if config.init == "release":
        return _RELEASE_TABLE_STD
    spread = 1.0 + sigma_s(config) ** 2
    # 0.032 k_inner / L is the variance of the FFN's output; the constants are those of the module
    # docstring's equation.
    target = memory_output_std(config) ** 2 * config.d_model
    slots = config.slots_per_token * spread * config.value_dim
    if config.pre_value_dim:
        return float((target / (0.16 * slots * config.pre_value_dim)) ** 0.25)
    return float((target / (0.4 * slots)) ** 0.5)


def memory_output_std(config: UltraMemConfig) -> float:
    """Standard deviation that init="paper" gives the output of a memory layer with unit-variance
    input."""
    if config.ffn_inner_dim is None:
        raise ValueError("ffn_inner_dim: must be given to match the FFN's output, got None")
    return math.sqrt(0.032 * config.ffn_inner_dim / config.d_model / config.num_layers)


@torch.no_grad()
def initialize_layer(layer: UltraMemLayer) -> None:
    """Draw the parameters of a layer as ``layer.config.init`` says, with torch's default
    generator."""
    config = layer.config
    key_std = config.key_dim**-0.5
    if config.init == "release":
        query_std, pre_std = key_std, config.d_model**-0.5
        value_std = (config.output_groups * config.value_dim) ** -0.5
    else:
        query_std = pre_std = value_std = math.sqrt(_PAPER_PROJECTION_VARIANCE / config.d_model)
    gain = norm_gain(config)
    layer.query_proj.weight.normal_(0.0, query_std)
    layer.value_proj.weight.normal_(0.0, value_std)
    if layer.pre_proj is not None:
        layer.pre_proj.weight.normal_(0.0, pre_std)
    # The paper is silent on keys, and their norm removes the scale.
    layer.keys.normal_(0.0, key_std)
    if layer.cores is not None:
        nn.init.uniform_(layer.cores, 0.0, 1.0)
    layer.query_norm.fill_(gain)
    layer.key_norm.fill_(gain)
