"""A layer on a sharded table is the layer on the whole table."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from ranks import Ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one core": {"num_cores": 1},
    "three cores": {"num_cores": 3},
    "gelu": {"activation": "gelu", "num_heads": 2},
    "relu": {"activation": "relu", "query_per_rank": False},
    "silu": {"activation": "silu", "shuffle": "none"},
    "groups summed": {"key_expand": 2, "shuffle": "permutation"},
    "groups apart": {"key_expand": 2, "sum_groups": False},
    "values alone": {"pre_value_dim": 0, "num_cores": 4},
    "additive": {"mode": "additive", "tucker_rank": 1, "num_cores": 1, "score_norm": "softmax"},
}


# What four ranks cut otherwise than two: cores into pieces, groups, narrow columns.
ON_FOUR = ("plain", "one core", "three cores", "groups apart", "values alone")


def check(ranks: Ranks, config: Any, by: str, grad_mode: str, dtype: torch.dtype) -> None:
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    device = ranks.device_type
    expected = cases.layer_gradients(ranks.size, config, grad_mode, dtype, device)
    for actual in ranks.run(cases.sharded_layer_gradients, config, by, grad_mode, dtype, device):
        assert cases.relative_error(actual.out, expected.out) <= bound
        assert cases.relative_error(actual.x, expected.x) <= bound
        assert actual.network.keys() == expected.network.keys()
        for name, gradient in expected.network.items():
            assert cases.relative_error(actual.network[name], gradient) <= bound, name
        assert len(actual.table) == len(expected.table) == 1 + bool(config.pre_value_dim)
        for mine, theirs in zip(actual.table, expected.table, strict=True):
            assert cases.relative_error(mine, theirs) <= bound


@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
@pytest.mark.parametrize("by", ["columns", "rows"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients(ranks: Ranks, variant: str, by: str, grad_mode: str) -> None:
    if ranks.size == 4 and variant not in ON_FOUR:
        pytest.skip("two ranks show it")
    dtype = torch.float64 if ranks.device_type == "cpu" else torch.float32
    check(ranks, cases.layer_config(**VARIANTS[variant]), by, grad_mode, dtype)


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_bfloat16(ranks: Ranks, by: str) -> None:
    # One layer, of which retrieval does not hang on the last bits of what another has read.
    config = cases.layer_config(num_layers=1)
    check(ranks, config, by, "deferred", torch.bfloat16)
