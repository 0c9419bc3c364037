"""Bytes per token and crossovers, against scans over all batches."""

from __future__ import annotations

import dataclasses
import itertools
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultramem_cuda import UltraMemConfig
from ultramem_cuda.profiling import traffic
from ultramem_cuda.profiling.presets import profile_preset
from ultramem_cuda.profiling.record import Phase

LIMIT = 400
MOE = traffic.MoEFFN(d_model=32, inner=64, num_experts=16, experts_per_token=1)
PHASES: tuple[Phase, ...] = ("decode", "training", "optimizer")


def memory(topk: int = 8, num_keys: int = 16, exponent: float | None = None) -> traffic.MemoryLayer:
    config = UltraMemConfig(
        d_model=32,
        num_layers=1,
        num_keys=num_keys,
        key_dim=8,
        num_slots=num_keys**2,
        value_dim=16,
        pre_value_dim=16,
        topk=topk,
    )
    routing = None
    if exponent is not None:
        routing = traffic.Routing.zipf(config.window, config.slots_per_token, exponent)
    return traffic.MemoryLayer(config, routing=routing)


@st.composite
def layers(draw: st.DrawFn) -> traffic.Layer:
    ffn = traffic.DenseFFN(32, draw(st.integers(0, 300)))
    kind = draw(st.sampled_from(["ffn", "moe", "memory", "block"]))
    if kind == "ffn":
        return ffn
    if kind == "moe":
        experts = draw(st.integers(1, 40))
        taken = draw(st.integers(1, min(experts, 8)))
        return traffic.MoEFFN(32, draw(st.integers(1, 64)), experts, taken)
    layer = memory(
        draw(st.integers(1, 16)),
        draw(st.integers(8, 24)),
        draw(st.none() | st.floats(0.0, 2.0)),
    )
    return layer if kind == "memory" else ffn + layer


def scan(
    layer: traffic.Layer, other: traffic.Layer, phase: Phase, count: str, activations: bool
) -> int | None:
    """One more than the last batch at which ``layer`` moves no more."""

    def moved(one: traffic.Layer, batch: int) -> float:
        found = one.traffic(phase, batch)
        return float(getattr(found if activations else found.parameters, count))

    for batch in range(LIMIT, 0, -1):
        if moved(layer, batch) <= moved(other, batch):
            return None if batch == LIMIT else batch + 1
    return 1


@given(
    layer=layers(),
    other=layers(),
    phase=st.sampled_from(PHASES),
    count=st.sampled_from(["upper", "lower"]),
    activations=st.booleans(),
)
def test_crossover_against_a_scan(
    layer: traffic.Layer, other: traffic.Layer, phase: Phase, count: str, activations: bool
) -> None:
    with mock.patch.object(traffic, "LARGEST_BATCH", LIMIT):
        found = traffic.crossover(
            layer,
            other,
            phase,
            count=count,  # type: ignore[arg-type]
            activations=activations,
        )
    assert found == scan(layer, other, phase, count, activations)


@pytest.mark.parametrize("inner", [0, 10, 200, 350, 20_000])
@pytest.mark.parametrize("count", ["upper", "lower"])
def test_crossover_of_blocks_against_a_scan(inner: int, count: traffic.Count) -> None:
    block = traffic.DenseFFN(32, inner) + memory()
    with mock.patch.object(traffic, "LARGEST_BATCH", LIMIT):
        found = traffic.crossover(block, MOE, count=count, activations=False)
    assert found == scan(block, MOE, "decode", count, False)


def test_crossover_after_several_crossings() -> None:
    """Concave counts can cross twice: more experts early, rows that go on being new later."""
    a = [5, 9, 12, 14, 15, 15.5, 15.75, 15.8, 15.8]
    b = [6, 8.5, 11, 13, 15, 16, 16.5, 16.6, 16.6]

    def last(f: list[float], g: list[float], largest: int) -> int | None:
        return traffic._last_not_above(lambda n: f[n - 1], lambda n: g[n - 1], largest)

    assert last(a, b, 4) == 1
    assert last(a, b, 9) == 9
    assert last(b, a, 9) == 5
    assert last(b, a, 1) is None


@given(layer=layers(), phase=st.sampled_from(PHASES), recipe=st.sampled_from(["deferred", "main"]))
def test_bytes_are_concave_in_the_batch(layer: traffic.Layer, phase: Phase, recipe: str) -> None:
    """What the search for a crossover relies on."""
    options = traffic.Recipe(table_gradient="deferred" if recipe == "deferred" else "main_grad")
    for count in ("upper", "lower"):
        found = [
            getattr(layer.traffic(phase, batch, recipe=options), count) for batch in range(1, 60)
        ]
        steps = [b - a for a, b in itertools.pairwise(found)]
        rounding = 1e-9 * found[-1]
        assert all(step >= -rounding for step in steps)
        assert all(b <= a + rounding for a, b in itertools.pairwise(steps))


def test_crossover_at_its_ends() -> None:
    moe, ffn = profile_preset("1B-7B")["moe"].layer, traffic.DenseFFN(2048, 16)
    assert traffic.crossover(ffn, moe) is None
    assert traffic.crossover(moe, ffn) == 1
    assert traffic.crossover(ffn, ffn) is None
    with pytest.raises(ValueError, match="must be 'upper' or 'lower', got 'middle'"):
        traffic.crossover(ffn, moe, count="middle")  # type: ignore[arg-type]


def test_published_shapes_cross_in_the_thousands() -> None:
    preset = profile_preset("1B-7B")
    block, moe = preset["block"].layer, preset["moe"].layer
    crossing = traffic.crossover(block, moe, activations=False)
    assert crossing is not None
    assert 1000 < crossing < 10_000
    ours, theirs = (
        [row.upper for row in traffic.per_token(layer, (1, 16, 64), activations=False)]
        for layer in (block, moe)
    )
    assert all(a < b for a, b in zip(ours, theirs, strict=True))
    # 64 experts of 12.6 MB against an FFN, the layer's matrices and 64 * 128 rows of 2304 bytes.
    assert 7 < theirs[2] / ours[2] < 8


def test_skewed_slots_move_fewer_bytes() -> None:
    preset = profile_preset("1B-7B")
    layer = preset["memory"].layer
    assert isinstance(layer, traffic.MemoryLayer)
    routing = traffic.Routing.zipf(layer.population, layer.taken)
    skewed = dataclasses.replace(layer, routing=routing)
    for tokens in (64, 4096):
        uniform, zipf = (one.traffic("decode", tokens) for one in (layer, skewed))
        assert zipf.lower < uniform.lower
        assert zipf.upper == uniform.upper


def test_per_token_divides_by_the_batch() -> None:
    block = profile_preset("1B-7B")["block"].layer
    rows = traffic.per_token(block, (1, 64), "training")
    assert [row.batch for row in rows] == [1, 64]
    assert rows[1].upper == block.traffic("training", 64).upper / 64
    assert rows[1].lower == block.traffic("training", 64).lower / 64
    assert rows[1].lower < rows[1].upper
    (bare,) = traffic.per_token(block, (64,), "training", activations=False)
    assert bare.upper == block.traffic("training", 64).parameters.upper / 64
