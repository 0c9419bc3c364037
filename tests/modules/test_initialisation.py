"""Both initialisations, the paper's by measurement."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from module_cases import PKM, small_config, tokens

import ultramem_cuda as um
from ultramem_cuda import init


def measured_std(tensor: torch.Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


def test_release_standard_deviations() -> None:
    config = small_config(d_model=300, key_dim=50, value_dim=120, num_keys=14, pre_value_dim=80)
    layer, table = um.UltraMemLayer(config, 0), um.MemoryTable.from_config(config)
    assert layer.pre_proj is not None
    assert layer.cores is not None
    assert table.pre_values is not None
    for tensor, expected in (
        (table.values, 0.02),
        (table.pre_values, 0.02),
        (layer.query_proj.weight, 50**-0.5),
        (layer.keys, 50**-0.5),
        (layer.pre_proj.weight, 300**-0.5),
        (layer.value_proj.weight, 120**-0.5),
    ):
        assert measured_std(tensor) == pytest.approx(expected, rel=0.04)
    assert torch.all(layer.query_norm == torch.tensor(50**-0.4))
    assert torch.all(layer.key_norm == torch.tensor(50**-0.4))
    assert 0 <= layer.cores.min() < layer.cores.max() < 1
    apart = small_config(d_model=300, value_dim=120, key_expand=2, sum_groups=False)
    assert measured_std(um.UltraMemLayer(apart, 0).value_proj.weight) == pytest.approx(
        (4 * 120) ** -0.5, rel=0.04
    )


@pytest.mark.parametrize(
    ("shape", "gain", "sigma"),
    [
        # The benchmark shapes S, B, M, L: n, Kd, m, M.
        ((1138, 192, 32, 32), 0.155, 0.31),
        ((1448, 512, 32, 32), 0.120, 0.32),
        ((1056, 512, 128, 128), 0.126, 0.32),
        ((1928, 640, 128, 768), 0.122, 0.34),
    ],
)
def test_gain_and_spread_of_the_benchmark_shapes(
    shape: tuple[int, int, int, int], gain: float, sigma: float
) -> None:
    num_keys, key_dim, axis_topk, topk = shape
    config = um.UltraMemConfig.preset(
        "227M-1.2B",
        num_keys=num_keys,
        num_slots=num_keys**2,
        key_dim=key_dim,
        axis_topk=axis_topk,
        topk=topk,
        init="paper",
    )
    assert init.norm_gain(config) == pytest.approx(gain, abs=0.0011)
    assert init.sigma_s(config) == pytest.approx(sigma, abs=0.016)


def test_table_std_of_the_published_shape() -> None:
    config = um.UltraMemConfig.preset("227M-1.2B", init="paper")
    assert init.table_std(config) == pytest.approx(0.066, abs=0.0005)
    table = um.MemoryTable.from_config(
        um.UltraMemConfig.preset("227M-1.2B", init="paper", num_layers=20), device="meta"
    )
    assert table.init_std == init.table_std(config)


def test_simulation_is_cached_and_does_not_touch_the_generator() -> None:
    init.score_statistics.cache_clear()
    state = torch.get_rng_state()
    with torch.device("meta"):
        first = init.score_statistics(64, 8, 8, 2, 2, "tucker")
    assert torch.equal(torch.get_rng_state(), state)
    assert init.score_statistics(64, 8, 8, 2, 2, "tucker") is first
    init.score_statistics.cache_clear()
    assert init.score_statistics(64, 8, 8, 2, 2, "tucker") == first


@pytest.mark.parametrize("shape", [(64, 8, 8, 2, 2, "tucker"), (64, 8, 8, 1, 1, "additive")])
def test_simulation_does_not_depend_on_the_default_dtype(shape: Any) -> None:
    init.score_statistics.cache_clear()
    expected = init.score_statistics(*shape)
    init.score_statistics.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert init.score_statistics(*shape) == expected
    finally:
        torch.set_default_dtype(before)


def measured_variances(config: um.UltraMemConfig, repeats: int) -> tuple[float, float, float]:
    """Mean of the kept scores, and standard deviations of scores and of the memory output.

    Cores differ much between layers, so variances are averaged over many of them.
    """
    torch.manual_seed(11)
    table = um.MemoryTable.from_config(config)
    kept, output = [], []
    for repeat in range(repeats):
        layer = um.UltraMemLayer(config, repeat % config.num_layers)
        x = tokens(128, config.d_model, seed=100 + repeat)
        with torch.no_grad():
            query = um.ops.tucker_query(
                x, layer.query_proj.weight, layer.query_norm, num_heads=config.num_heads
            )
            scores, _ = layer._retrieve(query)
            kept.append(scores.double().flatten())
            output.append(layer(x, table).double().square().mean())
    scores = torch.cat(kept)
    return scores.mean().item(), scores.std().item(), torch.stack(output).mean().sqrt().item()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"pre_value_dim": 0},
        {"num_heads": 2, "query_per_rank": False},
        {**PKM, "pre_value_dim": 48, "axis_topk": 8},
        {"key_expand": 2, "sum_groups": False},
    ],
    ids=["tucker", "plain values", "two heads", "additive", "expanded"],
)
def test_paper_output_has_the_variance_of_the_ffn(overrides: dict[str, Any]) -> None:
    shape: dict[str, Any] = {
        "d_model": 96,
        "num_layers": 20,
        "num_keys": 128,
        "key_dim": 96,
        "num_slots": 20000,
        "value_dim": 64,
        "pre_value_dim": 48,
        "topk": 8,
        "axis_topk": 8,
        "ffn_inner_dim": 312,
        "init": "paper",
    }
    config = um.UltraMemConfig(**{**shape, **overrides})
    mean, std, output = measured_variances(config, repeats=60)
    assert mean == pytest.approx(1.0, rel=0.04)
    assert std == pytest.approx(init.sigma_s(config), rel=0.12)
    expected = math.sqrt(0.032 * (312 / 96) / 20)
    assert output == pytest.approx(expected, rel=0.04)
    assert init.memory_output_std(config) == pytest.approx(expected, rel=1e-12)


def test_output_std_needs_the_ffn() -> None:
    with pytest.raises(ValueError, match="ffn_inner_dim: must be given"):
        init.memory_output_std(small_config())
