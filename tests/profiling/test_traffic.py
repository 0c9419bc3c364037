"""The traffic formulas against counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ultramem_cuda.profiling import traffic


@pytest.mark.parametrize(
    ("population", "taken", "batch"), [(4, 2, 3), (5, 1, 4), (3, 2, 1), (4, 3, 2)]
)
def test_expected_distinct_against_every_outcome(population: int, taken: int, batch: int) -> None:
    draws = list(itertools.combinations(range(population), taken))
    outcomes = list(itertools.product(draws, repeat=batch))
    distinct = sum(len(set(itertools.chain(*outcome))) for outcome in outcomes)
    expected = traffic.expected_distinct(population, taken, batch)
    assert expected == pytest.approx(distinct / len(outcomes), rel=1e-12)


def test_expected_distinct_at_its_ends() -> None:
    assert traffic.expected_distinct(64, 8, 0) == 0
    assert traffic.expected_distinct(64, 8, 1) == pytest.approx(8)
    assert traffic.expected_distinct(64, 8, 1e6) == pytest.approx(64)
    assert traffic.expected_distinct(8, 8, 1) == 8
    assert traffic.expected_distinct(8, 8, 0) == 0
    # A share of 1e-12 a draw would vanish beside 1.
    assert traffic.expected_distinct(10**12, 1, 10) == pytest.approx(10, rel=1e-9)


def test_touched_rows_against_simulation() -> None:
    layer = traffic.MemoryLayer(
        d_model=8, num_keys=30, key_dim=4, topk=16, value_dim=8, window=900, num_heads=2
    )
    generator = np.random.default_rng(0)
    counts = []
    for _ in range(200):
        rows = [generator.choice(900, 32, replace=False) for _ in range(20)]
        counts.append(len(np.unique(rows)))
    assert layer.touched(20) == pytest.approx(np.mean(counts), rel=0.01)


def count_parameters(layer: traffic.MemoryLayer) -> int:
    """Elements that a pass reads whole, array by array."""
    arrays = [
        np.empty((2 * layer.num_heads * layer.tucker_rank * layer.key_dim, layer.d_model)),
        np.empty((layer.num_heads, 2, layer.tucker_rank, layer.num_keys, layer.key_dim)),
        np.empty((layer.num_cores, layer.num_heads, layer.tucker_rank, layer.tucker_rank)),
        np.empty((layer.pre_value_dim, layer.d_model)),
        np.empty((layer.d_model, layer.value_dim)),
        np.empty((2, layer.key_dim)),
    ]
    return sum(array.size for array in arrays)


def test_memory_layer_against_a_walk_over_its_reads() -> None:
    layer = traffic.MemoryLayer(
        d_model=24,
        num_keys=20,
        key_dim=6,
        topk=5,
        value_dim=8,
        pre_value_dim=4,
        window=400,
        num_heads=2,
        tucker_rank=3,
        num_cores=2,
        element_bytes=4,
    )
    assert layer.dense_parameters() == count_parameters(layer)
    generator = np.random.default_rng(1)
    gathered, rows = 0, set()
    for _ in range(7):
        for slot in generator.choice(400, 10, replace=False):
            gathered += (4 + 8) * 4
            rows.add(int(slot))
    read = layer.with_touched(7, len(rows))
    assert read.dense == count_parameters(layer) * 4
    assert read.gathered == gathered
    assert read.distinct == len(rows) * (4 + 8) * 4
    assert read.upper == read.dense + gathered
    assert layer.forward(7).gathered == gathered


def test_moe_against_a_walk_over_its_experts() -> None:
    moe = traffic.MoEFFN(d_model=16, inner=8, num_experts=6, experts_per_token=2)
    generator = np.random.default_rng(2)
    touched = {int(e) for _ in range(3) for e in generator.choice(6, 2, replace=False)}
    read = moe.with_touched(3, len(touched))
    assert read.dense == 16 * 6 * 2
    assert read.upper == read.lower == 16 * 6 * 2 + sum(3 * 16 * 8 * 2 for _ in touched)
    assert moe.forward(10**6).upper == pytest.approx(16 * 6 * 2 + 6 * 3 * 16 * 8 * 2)


def test_layers_add_up() -> None:
    ffn = traffic.DenseFFN(16, 40)
    assert ffn.forward(3).upper == 3 * 16 * 40 * 2
    both = ffn + traffic.MoEFFN(16, 8, 6, 2)
    for batch in (1, 5):
        parts = [part.forward(batch) for part in both.parts]
        assert both.forward(batch).upper == sum(part.upper for part in parts)
        assert both.forward(batch).lower == sum(part.lower for part in parts)
    assert both.forward(0) == traffic.Traffic()


def test_matching_configuration_has_these_parameters() -> None:
    from ultramem_cuda import UltraMemConfig

    config = UltraMemConfig(
        d_model=24,
        num_layers=1,
        num_keys=20,
        key_dim=6,
        num_slots=400,
        value_dim=8,
        pre_value_dim=4,
    )
    layer = traffic.MemoryLayer(
        d_model=24, num_keys=20, key_dim=6, topk=32, value_dim=8, pre_value_dim=4, window=400
    )
    assert layer.dense_parameters() == config.layer_parameters()


def test_per_token_divides_by_the_batch() -> None:
    rows = traffic.per_token(traffic.ULTRAMEM_BLOCK, (1, 64))
    assert [row.batch for row in rows] == [1, 64]
    assert rows[1].upper == traffic.ULTRAMEM_BLOCK.forward(64).upper / 64
    assert rows[1].lower < rows[1].upper


def scan(layer: traffic.Layer, other: traffic.Layer, limit: int) -> int:
    """One more than the last batch at which ``layer`` reads no more."""
    fine = [b for b in range(1, limit) if layer.forward(b).upper <= other.forward(b).upper]
    return fine[-1] + 1 if fine else 1


@pytest.mark.parametrize("inner", [0, 10, 700, 900, 20_000])
def test_crossover_against_a_scan(inner: int) -> None:
    moe = traffic.MoEFFN(d_model=32, inner=64, num_experts=16, experts_per_token=1)
    memory = traffic.MemoryLayer(
        d_model=32, num_keys=16, key_dim=8, topk=8, value_dim=16, pre_value_dim=16, window=256
    )
    block = traffic.DenseFFN(32, inner) + memory
    assert traffic.crossover(block, moe) == scan(block, moe, 3000)


def test_crossover_where_there_is_none() -> None:
    moe = traffic.OLMOE_MOE
    assert traffic.crossover(traffic.DenseFFN(16, 16), moe) is None


def test_published_shapes_cross_in_the_thousands() -> None:
    crossing = traffic.crossover(traffic.ULTRAMEM_BLOCK, traffic.OLMOE_MOE)
    assert crossing is not None
    assert 1000 < crossing < 10_000
    upper = [row.upper for row in traffic.per_token(traffic.ULTRAMEM_BLOCK, (1, 16, 64))]
    other = [row.upper for row in traffic.per_token(traffic.OLMOE_MOE, (1, 16, 64))]
    assert all(a < b for a, b in zip(upper, other, strict=True))
