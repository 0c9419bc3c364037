"""What a profile compares: sizes from one source, equal parameters where that is said."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from bench.shapes import SHAPES
from ultramem_cuda import MemoryTable, UltraMemConfig, UltraMemLayer
from ultramem_cuda.examples.lm.layers import MoE, SwiGLU
from ultramem_cuda.profiling import analysis, presets, traffic
from ultramem_cuda.profiling.presets import profile_preset


@pytest.fixture(params=presets.NAMES)
def preset(request: pytest.FixtureRequest) -> presets.ProfilePreset:
    return profile_preset(request.param)


def test_names(preset: presets.ProfilePreset) -> None:
    names = [case.name for case in preset.cases]
    expected = ["memory", "ffn", "block", "moe", "moe-matched", "moe-fine", "pkm"]
    if preset.name == "227M-1.2B":
        expected.remove("moe-matched")
    assert names == expected
    pairs = [("block", "moe"), ("block", "moe-matched"), ("memory", "moe-fine"), ("memory", "pkm")]
    assert list(preset.comparisons) == [pair for pair in pairs if set(pair) <= set(names)]
    with pytest.raises(KeyError, match="'moon' is none of the subjects"):
        preset["moon"]
    with pytest.raises(ValueError, match=r"must be one of 227M-1\.2B, 1B-7B"):
        profile_preset("7B")


def test_matched_in_parameters(preset: presets.ProfilePreset) -> None:
    """All that are compared, but for OLMoE's own experts."""
    for ours, other in preset.comparisons:
        a, b = preset[ours], preset[other]
        active = a.layer.active_parameters() / b.layer.active_parameters()
        total = a.layer.total_parameters() / b.layer.total_parameters()
        matched = abs(active - 1) <= 0.02 and abs(total - 1) <= 0.10
        assert matched == ((preset.name, other) != ("1B-7B", "moe"))
        sentence = analysis.matching(analysis.Comparison("decode", a.subject, b.subject, ()))
        assert sentence.endswith(": matched.") == matched


def test_the_memory_layer_is_the_benchs_shape() -> None:
    for name, shape in (("227M-1.2B", SHAPES["S"]), ("1B-7B", SHAPES["M"])):
        config = profile_preset(name).config
        assert config == UltraMemConfig.preset(name)
        fields = {field.name for field in dataclasses.fields(shape)} - {"name", "num_tokens"}
        assert all(getattr(config, field) == getattr(shape, field) for field in fields)
        assert config.window == shape.window


def built(layer: traffic.Layer) -> tuple[int, int]:
    """Active and total parameters of the modules that the sizes describe."""
    if isinstance(layer, traffic.Layers):
        active, total = zip(*map(built, layer.parts), strict=True)
        return sum(active), sum(total)
    with torch.device("meta"):
        if isinstance(layer, traffic.DenseFFN):
            numel = sum(p.numel() for p in SwiGLU(layer.d_model, layer.inner).parameters())
            return numel, numel
        if isinstance(layer, traffic.MoEFFN):
            moe = MoE(layer.d_model, layer.inner, layer.num_experts, layer.experts_per_token)
            return moe.active_parameters(), sum(p.numel() for p in moe.parameters())
        assert isinstance(layer, traffic.MemoryLayer)
        config = layer.config
        table = MemoryTable.from_config(config)
        own = sum(p.numel() for p in UltraMemLayer(config, 0).parameters())
        rows = sum(p.shape[1] for p in table.parameters()) * config.slots_per_token
        return own + rows, own + sum(p.numel() for p in table.parameters()) // config.num_layers


def test_parameters_are_those_of_modules(preset: presets.ProfilePreset) -> None:
    record = preset.record()
    assert (record.name, record.d_model) == (preset.name, preset.config.d_model)
    for case, subject in zip(preset.cases, record.subjects, strict=True):
        assert subject == case.subject
        assert (subject.active_parameters, subject.total_parameters) == built(case.layer)


def test_widths_suit_grouped_products(preset: presets.ProfilePreset) -> None:
    for case in preset.cases:
        if isinstance(case.layer, traffic.MoEFFN):
            assert case.layer.inner % (8 if case.name == "moe-fine" else 16) == 0
            assert case.layer.experts_per_token == 8
            assert f"{case.layer.inner}" in case.detail
    assert profile_preset("1B-7B")["moe"].layer == traffic.MoEFFN(2048, 1024, 64, 8)


@pytest.mark.parametrize("active", [3_000_000, 7_522_184, 40_000_000])
def test_no_other_width_is_nearer(active: int) -> None:
    found = presets.match_experts(768, active)
    others = [traffic.MoEFFN(768, inner, 64, 8) for inner in range(16, 4096, 16)]
    best = min(abs(moe.active_parameters() - active) for moe in others)
    assert abs(found.active_parameters() - active) == best


def test_no_other_fine_experts_are_nearer() -> None:
    active, total = 30_000, 800_000
    found = presets.match_fine_experts(32, active, total)

    def miss(inner: int, experts: int) -> float:
        a = 32 * experts + 8 * 3 * 32 * inner
        t = 32 * experts + experts * 3 * 32 * inner
        return max(abs(a / active - 1) / 0.02, abs(t / total - 1) / 0.10)

    best = min(miss(i, x) for i, x in itertools.product(range(8, 200, 8), range(8, 2000)))
    assert miss(found.inner, found.num_experts) == pytest.approx(best)


def test_pkm_has_the_memory_layers_slots_and_rows(preset: presets.ProfilePreset) -> None:
    memory, pkm = preset["memory"].layer, preset["pkm"].layer
    assert isinstance(memory, traffic.MemoryLayer)
    assert isinstance(pkm, traffic.PKMLayer)
    assert pkm.population == memory.population
    assert pkm.taken == memory.taken
    assert pkm.table.row_bytes == memory.table.row_bytes
    assert pkm.config.mode == "additive"
    assert pkm.config.tucker_rank == pkm.config.num_cores == 1
    assert pkm.config.pre_value_dim == 0


def test_pkm_needs_what_it_splits() -> None:
    config = UltraMemConfig.preset("227M-1.2B", query_per_rank=False)
    with pytest.raises(ValueError, match="a query for each rank"):
        presets.pkm_config(config)
    config = UltraMemConfig.preset("227M-1.2B", topk=31)
    with pytest.raises(ValueError, match="topk = 31"):
        presets.pkm_config(config)


def test_token_grids() -> None:
    assert {1, 4, 16, 64, 256, 1024, 4096} <= set(presets.DECODE_TOKENS)
    assert presets.DECODE_TOKENS[-1] == 4096
    assert (presets.TRAINING_TOKENS[0], presets.TRAINING_TOKENS[-1]) == (1024, 65536)
    assert 8192 in presets.TRAINING_TOKENS
    for grid in (presets.DECODE_TOKENS, presets.TRAINING_TOKENS):
        assert all(a < b <= 4 * a for a, b in itertools.pairwise(grid))
