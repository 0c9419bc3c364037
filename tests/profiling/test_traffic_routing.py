"""Expected distinct members against every outcome, against draws and against plain sums."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.shapes import SMOKE, draw_slots
from ultramem_cuda.profiling.traffic import MoEFFN, Routing, expected_distinct


@pytest.mark.parametrize(
    ("population", "taken", "batch"), [(4, 2, 3), (5, 1, 4), (3, 2, 1), (4, 3, 2)]
)
def test_expected_distinct_against_every_outcome(population: int, taken: int, batch: int) -> None:
    draws = list(itertools.combinations(range(population), taken))
    outcomes = list(itertools.product(draws, repeat=batch))
    distinct = sum(len(set(itertools.chain(*outcome))) for outcome in outcomes)
    expected = expected_distinct(population, taken, batch)
    assert expected == pytest.approx(distinct / len(outcomes), rel=1e-12)


def test_expected_distinct_at_its_ends() -> None:
    assert expected_distinct(64, 8, 0) == 0
    assert expected_distinct(64, 8, 1) == pytest.approx(8)
    assert expected_distinct(64, 8, 1e6) == pytest.approx(64)
    assert expected_distinct(8, 8, 1) == 8
    assert expected_distinct(8, 8, 0) == 0
    # A share of 1e-12 a draw would vanish beside 1.
    assert expected_distinct(10**12, 1, 10) == pytest.approx(10, rel=1e-9)


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    unseen=st.integers(0, 30),
    tokens=st.integers(1, 10**5),
)
def test_counts_against_a_plain_sum(counts: list[int], unseen: int, tokens: int) -> None:
    sample = 40 + unseen
    routing = Routing.from_counts(counts, sample)
    expected = sum(1 - (1 - count / sample) ** tokens for count in counts)
    assert routing.population == len(counts)
    assert routing.expected_distinct(tokens) == pytest.approx(expected, rel=1e-9)
    assert routing.expected_distinct(0) == 0


def test_even_counts_are_uniform() -> None:
    routing = Routing.from_counts(np.full(64, 125), 1000)
    for tokens in (1, 5, 64, 300):
        assert routing.expected_distinct(tokens) == pytest.approx(expected_distinct(64, 8, tokens))


def test_counts_of_skewed_choices_against_subsets_of_the_sample() -> None:
    """Experts of tokens drawn with fixed preferences; batches taken from the same tokens."""
    generator = np.random.default_rng(0)
    preference = generator.normal(size=32)
    tokens = 20_000
    noisy = preference + generator.gumbel(size=(tokens, 32))
    chosen = np.argsort(noisy, axis=1)[:, -4:]
    counts = np.bincount(chosen.ravel(), minlength=32)
    routing = Routing.from_counts(counts, tokens)
    for batch in (1, 4, 16, 100):
        parts = chosen[: tokens // batch * batch].reshape(-1, batch * 4)
        found = np.mean([len(np.unique(part)) for part in parts])
        assert routing.expected_distinct(batch) == pytest.approx(found, rel=0.01)
        assert routing.expected_distinct(batch) <= expected_distinct(32, 4, batch) * (1 + 1e-9)


def test_zipf_against_drawn_slots() -> None:
    shape = dataclasses.replace(
        SMOKE, num_tokens=50, num_keys=40, num_slots=1600, topk=16, axis_topk=16
    )
    generator = torch.Generator().manual_seed(0)
    found = [draw_slots("zipf", shape, generator).unique().numel() for _ in range(200)]
    routing = Routing.zipf(shape.window, shape.selected)
    assert routing.expected_distinct(50) == pytest.approx(np.mean(found), rel=0.01)


@given(exponent=st.floats(0, 3), draws=st.integers(1, 8), tokens=st.integers(1, 100))
def test_zipf_against_a_plain_sum(exponent: float, draws: int, tokens: int) -> None:
    weights = [k**-exponent for k in range(1, 51)]
    expected = sum(1 - (1 - w / sum(weights)) ** (draws * tokens) for w in weights)
    routing = Routing.zipf(50, draws, exponent)
    assert routing.expected_distinct(tokens) == pytest.approx(expected, rel=1e-9)


def test_a_window_of_millions_keeps_its_precision() -> None:
    window, draws = 3_000_000, 128
    routing = Routing.zipf(window, draws)
    harmonic = (1 / np.arange(1, window + 1)).sum()
    # The coldest slots: first order in their probability, 1 / (window * harmonic).
    assert 0 < -routing.log_missed[-1] == pytest.approx(draws / (window * harmonic), rel=1e-6)
    assert routing.expected_distinct(1e9) == pytest.approx(window, rel=1e-6)
    even = Routing.zipf(window, draws, exponent=0)
    assert even.expected_distinct(4096) == pytest.approx(
        expected_distinct(window, 1, 4096 * draws), rel=1e-9
    )


def test_a_single_member() -> None:
    assert Routing.zipf(1, 3).expected_distinct(2) == 1
    assert Routing.from_counts([5], 5).expected_distinct(1) == 1
    assert Routing.from_counts([0], 5).expected_distinct(9) == 0


@pytest.mark.parametrize(
    ("counts", "tokens", "message"),
    [
        ([1, 6], 5, "in \\[0, tokens\\]"),
        ([-1, 2], 5, "in \\[0, tokens\\]"),
        ([[1, 2]], 5, "\\[population\\]"),
        ([0], 0, "in \\[0, tokens\\]"),
    ],
)
def test_wrong_counts(counts: list[int], tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Routing.from_counts(counts, tokens)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="integers"):
        Routing.from_counts([0.5, 1.0], 5)
    with pytest.raises(ValueError, match="empty"):
        Routing.from_counts(np.zeros(0, dtype=np.int64), 5)
    for arguments in ((0, 1, 1.0), (5, 0, 1.0), (5, 1, -1.0)):
        with pytest.raises(ValueError, match="at least 1"):
            Routing.zipf(*arguments)
    with pytest.raises(ValueError, match="over the layer's 6 members"):
        MoEFFN(16, 8, 6, 2, routing=Routing.zipf(5, 2))
