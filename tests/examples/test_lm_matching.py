"""Kinds are comparable: equal active parameters, equal totals of the sparse ones."""

from __future__ import annotations

import dataclasses

import pytest

from ultramem_cuda.examples.lm.config import KINDS, Kind, ModelConfig
from ultramem_cuda.examples.lm.matching import (
    count_parameters,
    counts_of,
    deviations,
    matched,
)
from ultramem_cuda.examples.lm.model import ByteLM
from ultramem_cuda.examples.lm.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_match(preset: str) -> None:
    base = PRESETS[preset].model
    counts = {k: counts_of(matched(dataclasses.replace(base, kind=k))) for k in KINDS}
    for kind in KINDS:
        assert abs(counts[kind].active / counts["dense"].active - 1) < 0.01, kind
    for kind in ("moe", "pkm"):
        assert abs(counts[kind].total / counts["ultramem_v2"].total - 1) < 0.02, kind
    assert counts["dense"].total == counts["dense"].active
    assert counts["ultramem_v2"].total > 1.5 * counts["dense"].total


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny", {"ffn_inner": 1536}),
        ("tiny", {"ffn_inner": 400}),
        ("tiny", {"experts_per_token": 1}),
        ("tiny", {"experts_per_token": 2}),
        ("small", {"ffn_inner": 1536}),
        ("small", {"experts_per_token": 4}),
        ("small", {"experts_per_token": 32}),
    ],
)
def test_moe_matches_at_other_sizes(preset: str, changes: dict[str, int]) -> None:
    base = dataclasses.replace(PRESETS[preset].model, **changes)  # type: ignore[arg-type]
    kinds: tuple[Kind, ...] = ("dense", "moe", "ultramem_v2")
    models = [matched(dataclasses.replace(base, kind=kind)) for kind in kinds]
    dense, moe, memory = (counts_of(model) for model in models)
    assert abs(moe.active / dense.active - 1) < 0.01
    assert abs(moe.total / memory.total - 1) < 0.02
    assert deviations(base, models) == []


@pytest.mark.parametrize(("preset", "width", "experts"), [("small", 128, 93), ("tiny", 64, 16)])
def test_experts_of_the_presets_stay(preset: str, width: int, experts: int) -> None:
    moe = matched(dataclasses.replace(PRESETS[preset].model, kind="moe"))
    assert (moe.expert_inner, moe.num_experts) == (width, experts)


def test_a_width_that_is_kept_is_reported() -> None:
    base = dataclasses.replace(PRESETS["tiny"].model, kind="moe", expert_inner=32)
    moe = matched(base, keep_expert_inner=True)
    assert moe.expert_inner == 32
    assert deviations(base, [moe]) == ["moe has -28.8% active parameters against dense"]


def tiny(kind: Kind) -> ModelConfig:
    return ModelConfig(
        kind=kind,
        d_model=16,
        num_layers=2,
        attention_heads=2,
        context=8,
        ffn_inner=24,
        num_experts=6,
        experts_per_token=2,
        expert_inner=8,
        num_keys=8,
        key_dim=4,
        topk=3,
        pre_value_dim=6,
        value_dim=10,
    )


def by_hand(kind: Kind) -> tuple[int, int]:
    """(total, active), from the shapes in the papers."""
    width, layers = 16, 2
    head_dim = width // 2
    attention = 4 * width * width + 2 * head_dim
    shared = 2 * 256 * width + width + layers * (attention + 2 * width)
    ffn = 3 * width * 24
    if kind == "dense":
        return (shared + layers * ffn,) * 2
    if kind == "moe":
        expert = 3 * width * 8
        router = width * 6
        return shared + layers * (router + 6 * expert), shared + layers * (router + 2 * expert)
    rank, cores, pre = (1, 0, 0) if kind == "pkm" else (2, 2, 6)
    query = 2 * rank * 4 * width
    keys = 2 * rank * 8 * 4
    layer = query + keys + 2 * 4 + cores * rank * rank + width * (pre + 10)
    always = shared + layers * (ffn + layer)
    return always + layers * 64 * (pre + 10), always + layers * 3 * (pre + 10)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_against_shapes(kind: Kind) -> None:
    counts = counts_of(tiny(kind))
    assert (counts.total, counts.active) == by_hand(kind)
    # The same on a model that is really built.
    assert count_parameters(ByteLM(tiny(kind))) == counts


def test_impossible_match_is_refused() -> None:
    config = dataclasses.replace(tiny("ultramem_v2"), key_dim=256)
    with pytest.raises(ValueError, match="ffn_inner: no positive value matches"):
        matched(config)
