"""UltraMemConfig: validation, presets, counts, round trips."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
from module_cases import PKM, small_config

import ultramem_cuda as um

BAD_FIELDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"d_model": 0}, ValueError, r"d_model: must be at least 1, got 0"),
    ({"d_model": 24.0}, TypeError, r"d_model: must be an int, got 24\.0"),
    ({"d_model": True}, TypeError, r"d_model: must be an int, got True"),
    ({"num_layers": 0}, ValueError, r"num_layers: must be in \[1, 65536\], got 0"),
    ({"num_keys": 0}, ValueError, r"num_keys: must be in"),
    ({"num_keys": 2**31}, ValueError, r"num_keys: must be in"),
    ({"key_dim": -1}, ValueError, r"key_dim: must be at least 1, got -1"),
    ({"num_slots": 143}, ValueError, r"num_slots: must be at least .* 144 rows .*, got 143"),
    ({"num_slots": 0}, ValueError, r"num_slots: must be in"),
    ({"value_dim": 0}, ValueError, r"value_dim: must be at least 1, got 0"),
    ({"value_dim": 9}, ValueError, r"value_dim: must be a multiple of num_cores = 2, got 9"),
    ({"pre_value_dim": -1}, ValueError, r"pre_value_dim: must be at least 0, got -1"),
    ({"num_heads": 0}, ValueError, r"num_heads: must be at least 1, got 0"),
    ({"tucker_rank": 5}, ValueError, r"tucker_rank: must be in \[1, 4\], got 5"),
    ({"num_cores": 0}, ValueError, r"num_cores: must be in \[1, 4\], got 0"),
    ({"topk": 0}, ValueError, r"topk: must be in \[1, 1024\], got 0"),
    ({"topk": 1025, "axis_topk": None}, ValueError, r"topk: must be in \[1, 1024\], got 1025"),
    ({"topk": 26}, ValueError, r"topk: must be at most axis_topk\^2 = 25 .*, got 26"),
    ({"axis_topk": 13}, ValueError, r"axis_topk: must be at most num_keys = 12, got 13"),
    ({"axis_topk": 129}, ValueError, r"axis_topk: must be in \[1, 128\], got 129"),
    ({"axis_topk": 2.0}, TypeError, r"axis_topk: must be an int, got 2\.0"),
    ({**PKM, "axis_topk": 6}, ValueError, r"axis_topk: must be at least .* = 7 in additive"),
    ({**PKM, "tucker_rank": 2}, ValueError, r"tucker_rank: must be 1 in additive mode.*got 2"),
    ({**PKM, "num_cores": 2}, ValueError, r"num_cores: must be 1 in additive mode.*got 2"),
    ({**PKM, "tucker_penalty": 0.1}, ValueError, r"tucker_penalty: must be 0 in additive mode"),
    ({"query_per_rank": 1}, TypeError, r"query_per_rank: must be a bool, got 1"),
    ({"sum_groups": None}, TypeError, r"sum_groups: must be a bool, got None"),
    ({"activation": "tanh"}, ValueError, r"activation: must be one of identity, .*got 'tanh'"),
    ({"activation": "relu", "pre_value_dim": 0}, ValueError, r"activation: must be 'identity'"),
    ({"key_expand": 0}, ValueError, r"key_expand: must be at least 1, got 0"),
    ({"key_expand": 5}, ValueError, r"num_keys: must be a multiple of key_expand = 5, got 12"),
    ({"topology": "star"}, ValueError, r"topology: must be one of ring, .*got 'star'"),
    ({"topology": "private"}, ValueError, r"num_slots: with private windows .* 432, got 250"),
    ({"shuffle": None}, ValueError, r"shuffle: must be one of feistel, .*got None"),
    ({"mode": "pkm"}, ValueError, r"mode: must be one of tucker, additive, got 'pkm'"),
    ({"score_norm": "l2"}, ValueError, r"score_norm: must be one of none, softmax, got 'l2'"),
    ({"score_norm": "softmax"}, ValueError, r"score_norm: must be 'none' with more than one core"),
    ({"init": "xavier"}, ValueError, r"init: must be one of release, paper, got 'xavier'"),
    ({"init": "paper"}, ValueError, r"ffn_inner_dim: must be given with init='paper'.*got None"),
    (
        {**PKM, "score_norm": "softmax", "init": "paper", "ffn_inner_dim": 8},
        ValueError,
        r"score_norm: must be 'none' with init='paper'",
    ),
    ({"ffn_inner_dim": 0}, ValueError, r"ffn_inner_dim: must be at least 1, got 0"),
    ({"eps": -1e-6}, ValueError, r"eps: must be finite and not negative, got -1e-06"),
    ({"eps": "small"}, TypeError, r"eps: must be a number, got 'small'"),
    ({"tucker_penalty": math.nan}, ValueError, r"tucker_penalty: must be finite"),
    ({"tucker_margin": -0.1}, ValueError, r"tucker_margin: must be finite and not negative"),
    ({"key_balance": math.inf}, ValueError, r"key_balance: must be finite"),
    ({"key_balance_normalize": "mean"}, ValueError, r"key_balance_normalize: must be one of paper"),
    ({"seed": -1}, ValueError, r"seed: must be in"),
    ({"seed": 2**47}, ValueError, r"seed: must be in"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_FIELDS)
def test_bad_field_is_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_config(**fields)


def test_every_field_has_a_bad_value() -> None:
    tested = {name for fields, _, _ in BAD_FIELDS for name in fields}
    assert tested == {field.name for field in dataclasses.fields(um.UltraMemConfig)}


def test_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_config().topk = 3  # type: ignore[misc]


def test_axis_topk_default_follows_other_fields() -> None:
    assert small_config(axis_topk=None, topk=7).kept_per_axis == 7
    assert small_config(axis_topk=None, topk=30).kept_per_axis == 12
    wide = {"num_keys": 400, "num_slots": 160000, "axis_topk": None}
    assert small_config(**wide, topk=200).kept_per_axis == 128


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Shapes S and M of the benchmarks, which are UltraMemV2's table 10.
        ("227M-1.2B", (768, 20, 1138, 192, 32, 32, 192, 192, 2_592_000)),
        ("1B-7B", (2048, 16, 1056, 512, 128, 128, 384, 768, 4_460_544)),
        ("2.5B-60B", (2560, 24, 1928, 640, 128, 768, 320, 960, 44_651_904)),
        ("2.5B-120B", (2560, 24, 2728, 640, 128, 256, 320, 960, 89_304_984)),
    ],
)
def test_presets(name: str, expected: tuple[int, ...]) -> None:
    c = um.UltraMemConfig.preset(name)
    shape = (c.d_model, c.num_layers, c.num_keys, c.key_dim, c.kept_per_axis, c.topk)
    assert (*shape, c.pre_value_dim, c.value_dim, c.num_slots) == expected
    assert (c.tucker_rank, c.num_cores, c.num_heads, c.query_per_rank) == (2, 2, 1, True)
    assert (c.activation, c.init, c.topology, c.shuffle) == (
        "identity",
        "release",
        "ring",
        "feistel",
    )


@pytest.mark.parametrize(("name", "billions"), [("2.5B-60B", 57.5), ("2.5B-120B", 114.7)])
def test_large_presets_reach_their_names(name: str, billions: float) -> None:
    c = um.UltraMemConfig.preset(name)
    assert c.total_parameters() / 1e9 == pytest.approx(billions, abs=0.1)
    network = 4 * c.d_model**2 + 3 * c.d_model * (c.ffn_inner_dim or 0)
    active = c.num_layers * (network + c.active_parameters())
    assert active / 1e9 == pytest.approx(2.5, abs=0.05)


def test_preset_overrides_and_unknown_names() -> None:
    assert um.UltraMemConfig.preset("1B-7B", topk=64).topk == 64
    with pytest.raises(ValueError, match=r"name: must be one of 227M-1\.2B, .*got '3B'"):
        um.UltraMemConfig.preset("3B")
    with pytest.raises(ValueError, match=r"num_key: is not a field"):
        um.UltraMemConfig.preset("1B-7B", num_key=3)


def test_dict_json_and_pickle_round_trips() -> None:
    config = small_config(pre_value_dim=None, topology="noring", key_balance=0.01)
    assert config.pre_value_dim == 0
    assert um.UltraMemConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="typo: is not a field"):
        um.UltraMemConfig.from_dict({**config.to_dict(), "typo": 1})


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        PKM,
        {"query_per_rank": False, "num_heads": 2},
        {"pre_value_dim": 0},
        {"key_expand": 2, "sum_groups": False},
    ],
)
def test_counts_are_those_of_the_modules(overrides: dict[str, Any]) -> None:
    config = small_config(**overrides)
    layer = um.UltraMemLayer(config, 0, device="meta")
    table = um.MemoryTable.from_config(config, device="meta")
    in_layer = sum(p.numel() for p in layer.parameters())
    in_table = sum(p.numel() for p in table.parameters())
    assert config.layer_parameters() == in_layer
    assert config.table_parameters() == in_table
    assert config.total_parameters() == 3 * in_layer + in_table
    row = config.value_dim + config.pre_value_dim
    assert config.active_parameters() == in_layer + config.num_heads * config.topk * row


def test_additive_mode_needs_all_that_it_may_keep() -> None:
    with pytest.raises(ValueError, match="topk: must be at most 128 in additive mode"):
        small_config(
            **{**PKM, "num_keys": 256, "num_slots": 256**2, "topk": 200, "axis_topk": None}
        )
