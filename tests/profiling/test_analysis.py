"""Ratios, crossovers and the sentences about them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import synthetic_profile as synthetic
from hypothesis import given
from hypothesis import strategies as st

from ultramem_cuda.profiling import analysis, traffic
from ultramem_cuda.profiling.analysis import Comparison, Crossing
from ultramem_cuda.profiling.presets import profile_preset
from ultramem_cuda.profiling.record import (
    Agreement,
    Bytes,
    Preset,
    Profile,
    Sampled,
    Subject,
)


def block_against_moe(profile: Profile) -> Comparison:
    found = analysis.compare(profile, profile.presets[0], "decode")
    return next(one for one in found if one.ours.name == "block")


def test_ratios_are_ours_over_the_other() -> None:
    profile = synthetic.profile_of(
        [
            synthetic.point("moe", 4, 4e-3, amount=8e6, sampled_bytes=9e6, joules=2.0),
            synthetic.point("block", 4, 1e-3, amount=1e6, sampled_bytes=3e6, joules=0.5),
        ]
    )
    (comparison,) = analysis.compare(profile, profile.presets[0], "decode")
    (pair,) = comparison.pairs
    assert pair.ratio("time") == 0.25
    assert pair.ratio("lower") == pair.ratio("upper") == 0.125
    assert pair.ratio("nvml") == pytest.approx(1 / 3)
    assert pair.ratio("energy") == 0.25
    # 1 MB against 8 MB at the bandwidth; FLOPs are the same and fewer than that.
    assert pair.ratio("floor") == 0.125
    assert pair.time_range == pytest.approx((0.25 * 0.9 / 1.1, 0.25 * 1.1 / 0.9))


def test_counted_bytes_go_before_expected_ones() -> None:
    profile = synthetic.with_ratio(lambda tokens: 0.5)
    points = [
        dataclasses.replace(p, counted=Bytes(0, 0, 0, 1e5)) if p.subject == "block" else p
        for p in profile.points
    ]
    comparison = block_against_moe(dataclasses.replace(profile, points=tuple(points)))
    assert comparison.ratios("lower") == [(tokens, 0.1) for tokens in synthetic.TOKENS]


def test_what_is_missing_has_no_ratio() -> None:
    profile = synthetic.profile_of(
        [
            synthetic.point("moe", 1, 1e-3, joules=1.0),
            synthetic.point("block", 1, None, sampled_bytes=1e6, joules=0.0),
            synthetic.point("block", 4, 1e-3),
        ]
    )
    comparison = block_against_moe(profile)
    (pair,) = comparison.pairs
    assert pair.tokens == 1
    assert pair.ratio("time") is None
    assert pair.ratio("nvml") is None
    assert pair.ratio("energy") is None
    assert pair.time_range is None
    assert comparison.ratios("time") == []
    assert analysis.outcome(comparison, "time") is None
    assert analysis.trend(comparison, "time") == "Time: not measured."
    # Nothing of the memory layer: nothing to compare.
    assert len(analysis.compare(profile, profile.presets[0], "decode")) == 1
    assert analysis.compare(profile, profile.presets[0], "training") == []


def test_the_pair_at_a_number_of_tokens_is_the_nearest() -> None:
    comparison = block_against_moe(synthetic.with_ratio(lambda tokens: 0.5, (1, 16, 4096)))
    assert comparison.at(16).tokens == 16
    assert comparison.at(64).tokens == 16
    assert comparison.at(1024).tokens == 4096


def test_a_power_law_is_interpolated_exactly() -> None:
    ratios = [(tokens, (tokens / 300) ** 0.7) for tokens in synthetic.TOKENS]
    (crossing,) = analysis.crossings(ratios)
    assert crossing.tokens == pytest.approx(300)
    assert crossing.rising
    assert crossing.between == (256, 1024)
    (falling,) = analysis.crossings([(tokens, 1 / ratio) for tokens, ratio in ratios])
    assert falling.tokens == pytest.approx(300)
    assert not falling.rising


def test_crossings_at_and_beside_one() -> None:
    assert analysis.crossings([(1, 0.5), (4, 1.0), (16, 2.0)]) == [Crossing(4.0, True, (1, 16))]
    # It touches 1 and turns back; it starts or ends there; it is there all along; there is nothing.
    assert analysis.crossings([(1, 0.5), (4, 1.0), (16, 0.5)]) == []
    assert analysis.crossings([(1, 1.0), (4, 2.0), (16, 1.0)]) == []
    assert analysis.crossings([(1, 1.0), (4, 1.0)]) == []
    assert analysis.crossings([]) == []
    several = analysis.crossings([(1, 2.0), (4, 0.5), (16, 2.0), (64, 4.0), (256, 0.25)])
    assert [crossing.rising for crossing in several] == [False, True, False]
    assert [round(crossing.tokens, 6) for crossing in several] == [2, 8, 128]


def test_about_how_many_tokens_lies_between_the_measured() -> None:
    assert Crossing(3812.4, True, (1024, 4096)).about == "3,800"
    assert Crossing(4061.2, True, (1024, 4096)).about == "4,060"
    assert Crossing(4095.4, True, (1024, 4096)).about == "4,095"
    assert Crossing(1.18, False, (1, 4)).about == "1.2"


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=8))
def test_every_change_of_sides_is_found_between_its_neighbours(ratios: list[float]) -> None:
    pairs = [(4**i, ratio) for i, ratio in enumerate(ratios)]
    found = analysis.crossings(pairs)
    sides = [ratio > 1 for ratio in ratios if ratio != 1]
    assert len(found) == sum(a != b for a, b in itertools.pairwise(sides))
    for crossing in found:
        low, high = crossing.between
        assert low <= crossing.tokens <= high
    assert [c.tokens for c in found] == sorted(c.tokens for c in found)
    assert all(a.rising != b.rising for a, b in itertools.pairwise(found))


def test_interpolation_comes_close_to_the_formula() -> None:
    preset = profile_preset("1B-7B")
    ours, other = preset["block"].layer, preset["moe"].layer
    points = []
    for tokens in (256, 512, 1024, 2048, 4096, 8192):
        for name, layer in (("block", ours), ("moe", other)):
            point = synthetic.point(name, tokens, None)
            points.append(dataclasses.replace(point, model=layer.traffic("decode", tokens)))
    comparison = block_against_moe(synthetic.profile_of(points))
    (crossing,) = analysis.crossings(comparison.ratios("upper"))
    assert crossing.tokens == pytest.approx(traffic.crossover(ours, other), rel=0.05)


def test_trends_say_where_an_advantage_ends() -> None:
    ends = block_against_moe(synthetic.with_ratio(lambda tokens: (tokens / 300) ** 0.5))
    assert analysis.trend(ends, "time") == (
        "Time: less up to about 300 tokens (between 256 and 1,024), more beyond."
    )
    assert analysis.outcome(ends, "nvml") == "less to 300, then more"
    starts = block_against_moe(synthetic.with_ratio(lambda tokens: (300 / tokens) ** 0.5))
    assert analysis.trend(starts, "energy") == (
        "Energy: more up to about 300 tokens (between 256 and 1,024), less beyond."
    )
    twice = block_against_moe(synthetic.with_ratio(lambda tokens: 2.0 if tokens == 16 else 0.5))
    assert analysis.trend(twice, "time") == (
        "Time: less up to about 8 tokens (between 4 and 16), more up to about 32 tokens "
        "(between 16 and 64), less beyond."
    )
    assert analysis.outcome(twice, "time") == "less to 8, more to 32, then less"


def test_trends_say_that_there_is_no_crossover_or_no_advantage() -> None:
    less = block_against_moe(synthetic.with_ratio(lambda tokens: 0.5))
    assert analysis.trend(less, "time") == (
        "Time: less from 1 to 4,096 tokens, no crossover there."
    )
    assert analysis.outcome(less, "time") == "less throughout"
    more = block_against_moe(synthetic.with_ratio(lambda tokens: 2.0))
    assert analysis.trend(more, "upper") == (
        "Bytes by the model, never cached: no advantage, more from 1 to 4,096 tokens."
    )
    assert analysis.outcome(more, "time") == "more throughout"
    same = block_against_moe(synthetic.with_ratio(lambda tokens: 1.0, (1,)))
    assert analysis.trend(same, "time") == "Time: no advantage, the same at 1 token."
    assert analysis.verdict(same).startswith("At 1 token, FFN + memory takes 1.00 times")
    assert analysis.outcome(same, "time") == "the same"


def test_the_verdict_carries_the_numbers() -> None:
    comparison = block_against_moe(synthetic.with_ratio(lambda tokens: 0.2))
    assert analysis.verdict(comparison) == (
        "At 64 tokens, FFN + memory takes 1/5.0 of the time of MoE (200 µs against 1 ms), moves "
        "1/5.0 of the bytes by NVML, needs 1/5.0 of the bytes by the model and uses 1/5.0 of the "
        "energy."
    )
    worse = analysis.verdict(block_against_moe(synthetic.with_ratio(lambda tokens: 1.5)))
    assert "takes 1.50 times the time of MoE (1.5 ms against 1 ms)" in worse


def test_a_difference_within_the_spread_is_called_that() -> None:
    close = analysis.verdict(block_against_moe(synthetic.with_ratio(lambda tokens: 0.95)))
    assert (
        "0.95 times the time of MoE (950 µs against 1 ms, a difference within the spread" in close
    )
    clear = analysis.verdict(block_against_moe(synthetic.with_ratio(lambda tokens: 0.7)))
    assert "spread" not in clear


def test_without_measurements_the_verdict_is_of_the_model_and_says_so() -> None:
    comparison = block_against_moe(synthetic.model_only())
    text = analysis.verdict(comparison)
    assert "the least possible time of MoE (by the roofline; times were not measured)" in text
    assert "NVML" not in text
    assert "energy" not in text
    assert [line.partition(":")[0] for line in analysis.findings(comparison)[1:]] == [
        "Least time by the roofline",
        "Bytes by the model, repeats cached",
        "Bytes by the model, never cached",
    ]


def test_shares() -> None:
    assert analysis.share(0.19) == "1/5.3 of"
    assert analysis.share(0.125, 0.16) == "1/8.0 to 1/6.2 of"
    assert analysis.share(0.9, 1.24) == "0.90 to 1.24 times"
    assert analysis.share(0.2, 0.2) == "1/5.0 of"


def subject(name: str, active: int, total: int) -> Subject:
    return Subject(name, name, "moe", active, total, "")


@pytest.mark.parametrize(
    ("active", "total", "says"),
    [
        (1019, 8720, "a has 1.02 times the active and 1.09 times the total parameters of b: "
         "matched."),
        (1030, 8000, "not matched in active parameters."),
        (1000, 6000, "not matched in total parameters."),
        (500, 16000, "not matched in active and total parameters."),
    ],
)  # fmt: skip
def test_matching(active: int, total: int, says: str) -> None:
    pair = Comparison("decode", subject("a", active, total), subject("b", 1000, 8000), ())
    assert analysis.matching(pair).endswith(says)


def test_counts_that_disagree_are_named() -> None:
    assert analysis.disagreements(Agreement("copy", 100.0, 114.0, 86.0)) == [
        "NVML +33% against ncu"
    ]
    assert analysis.disagreements(Agreement("copy", 100.0, 80.0, None)) == [
        "NVML -20% against the model"
    ]
    assert analysis.disagreements(Agreement("copy", 100.0, 130.0, 120.0)) == [
        "NVML +30% against the model",
        "ncu +20% against the model",
    ]
    assert analysis.disagreements(Agreement("copy", 100.0, None, None)) == []


def test_held_back_clocks_are_counted_by_reason() -> None:
    window = Sampled(1.0, 1.0, None, None, None, None, None, None, None, ("power", "heat"))
    one = dataclasses.replace(synthetic.point("moe", 1, 1e-3), sampled=window)
    other = dataclasses.replace(
        one, tokens=4, sampled=dataclasses.replace(window, throttle_reasons=("power",))
    )
    profile = synthetic.profile_of([one, other, synthetic.point("moe", 16, 1e-3)])
    assert analysis.throttled(profile) == {"power": 2, "heat": 1}


def test_comparisons_keep_the_presets_order() -> None:
    profile = synthetic.full()
    turned = Preset("tiny", 16, profile.presets[0].subjects, (("memory", "moe"), ("block", "moe")))
    names = [one.ours.name for one in analysis.compare(profile, turned, "decode")]
    assert names == ["memory", "block"]
