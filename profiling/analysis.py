"""What a profile says: ratios of compared subjects, where they pass 1, and that in sentences.

A ratio is ours over the other: below 1 ours is faster, reads less, needs less energy. What was not
measured for both is None. Between measured numbers of tokens a ratio is interpolated on logarithmic
axes; ``traffic.crossover`` has the exact crossover of the byte formula.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ultramem_cuda.reporting.numbers import seconds_text, short, significant

from .presets import ACTIVE_TOLERANCE, TOTAL_TOLERANCE
from .record import Agreement, Phase, Point, Preset, Profile, Subject

Quantity = Literal["time", "floor", "nvml", "lower", "upper", "energy"]
"""time: the median. floor: the least time by the roofline. nvml: DRAM bytes by NVML. lower and
upper: bytes by the model, repeated rows or experts always found in a cache, and never. energy:
joules by NVML, the idle GPU's included."""

PHASES: Sequence[Phase] = ("decode", "training", "optimizer")
HEADLINE_TOKENS: Mapping[Phase, int] = {"decode": 64, "training": 8192, "optimizer": 8192}
NOT_MEASURED = "not measured"
TOLERANCE = 0.15
"""How far two counts of the same bytes may lie apart."""


def value(profile: Profile, point: Point, quantity: Quantity) -> float | None:
    """One quantity of one pass: seconds, bytes or joules."""
    if quantity == "time":
        return point.seconds
    if quantity == "floor":
        return point.floor_seconds(profile.ceilings)
    if quantity == "lower":
        return point.needed.lower
    if quantity == "upper":
        return point.needed.upper
    if point.sampled is None:
        return None
    return point.sampled.bytes if quantity == "nvml" else point.sampled.joules


@dataclass(frozen=True)
class Pair:
    """Two subjects at the same number of tokens."""

    profile: Profile
    ours: Point
    other: Point

    @property
    def tokens(self) -> int:
        return self.ours.tokens

    def ratio(self, quantity: Quantity) -> float | None:
        """Ours over the other's; None where one of them is missing or zero."""
        return _over(
            value(self.profile, self.ours, quantity), value(self.profile, self.other, quantity)
        )

    @property
    def time_range(self) -> tuple[float, float] | None:
        """The time's ratio between opposite quartiles: what the spread of the runs leaves open."""
        ours, other = self.ours.timing, self.other.timing
        if ours is None or other is None or other.q1_ms <= 0:
            return None
        return ours.q1_ms / other.q3_ms, ours.q3_ms / other.q1_ms


def _over(ours: float | None, other: float | None) -> float | None:
    # A ratio of 0 has no place on a logarithmic axis, and no pass reads, takes or burns nothing.
    return ours / other if ours and other else None


@dataclass(frozen=True)
class Comparison:
    """Ours against another, at all numbers of tokens that both have, ascending."""

    phase: Phase
    ours: Subject
    other: Subject
    pairs: Sequence[Pair]

    def ratios(self, quantity: Quantity) -> list[tuple[int, float]]:
        """(tokens, ratio) where there is one."""
        found = ((pair.tokens, pair.ratio(quantity)) for pair in self.pairs)
        return [(tokens, ratio) for tokens, ratio in found if ratio is not None]

    def at(self, tokens: int) -> Pair:
        """The pair at ``tokens``, or at what comes nearest."""
        return min(self.pairs, key=lambda pair: abs(math.log(pair.tokens / tokens)))


def compare(profile: Profile, preset: Preset, phase: Phase) -> list[Comparison]:
    """The preset's comparisons that have points of both subjects."""
    subjects = {subject.name: subject for subject in preset.subjects}
    found = []
    for ours, other in preset.comparisons:
        others = {point.tokens: point for point in profile.select(preset.name, other, phase)}
        pairs = [
            Pair(profile, point, others[point.tokens])
            for point in profile.select(preset.name, ours, phase)
            if point.tokens in others
        ]
        if pairs:
            found.append(Comparison(phase, subjects[ours], subjects[other], pairs))
    return found


@dataclass(frozen=True)
class Crossing:
    """Where a ratio passes 1."""

    tokens: float
    """Interpolated; where a measured ratio is 1, its own."""
    rising: bool
    """True: ours is less before and more behind."""
    between: tuple[int, int]
    """Measured numbers of tokens on either side."""

    @property
    def about(self) -> str:
        """The tokens in two digits, or as many more as keep them between those on either side."""
        low, high = self.between
        for digits in (2, 3, 4):
            text = short(self.tokens, digits)
            if low <= float(text.replace(",", "")) <= high:
                break
        return text


def crossings(ratios: Sequence[tuple[int, float]]) -> list[Crossing]:
    """All of them, ascending. Ratios that touch 1 and turn back do not pass it."""
    found = []
    sided = [(tokens, math.log(ratio)) for tokens, ratio in ratios if ratio != 1]
    for (left, before), (right, behind) in itertools.pairwise(sided):
        if (before < 0) == (behind < 0):
            continue
        equal = [tokens for tokens, ratio in ratios if ratio == 1 and left < tokens < right]
        share = before / (before - behind)
        interpolated = math.exp(math.log(left) + share * math.log(right / left))
        tokens = float(equal[0]) if equal else interpolated
        found.append(Crossing(tokens, behind > 0, (left, right)))
    return found


_NAMES: Mapping[Quantity, str] = {
    "time": "Time",
    "floor": "Least time by the roofline",
    "nvml": "Bytes by NVML",
    "lower": "Bytes by the model, repeats cached",
    "upper": "Bytes by the model, never cached",
    "energy": "Energy",
}


def trend(comparison: Comparison, quantity: Quantity) -> str:
    """One sentence: up to where ours is less, or more, or that it was not measured."""
    name, ratios = _NAMES[quantity], comparison.ratios(quantity)
    if not ratios:
        return f"{name}: {NOT_MEASURED}."
    found = crossings(ratios)
    if found:
        parts = [
            f"{'less' if c.rising else 'more'} up to about {c.about} tokens "
            f"(between {c.between[0]:,} and {c.between[1]:,})"
            for c in found
        ]
        beyond_it = "more" if found[-1].rising else "less"
        return f"{name}: {', '.join(parts)}, {beyond_it} beyond."
    first, last = ratios[0][0], ratios[-1][0]
    span = f"at {tokens_text(first)}" if first == last else f"from {first:,} to {last:,} tokens"
    side = _side(ratios)
    if side == "less":
        return f"{name}: less {span}, no crossover there."
    return f"{name}: no advantage, {side} {span}."


def outcome(comparison: Comparison, quantity: Quantity) -> str | None:
    """The same in a few words for a table: "less to 2,400, then more"; None: not measured."""
    ratios = comparison.ratios(quantity)
    found = crossings(ratios)
    if found:
        parts = [f"{'less' if c.rising else 'more'} to {c.about}" for c in found]
        return f"{', '.join(parts)}, then {'more' if found[-1].rising else 'less'}"
    if not ratios:
        return None
    return _side(ratios) if len(ratios) == 1 else f"{_side(ratios)} throughout"


def _side(ratios: Sequence[tuple[int, float]]) -> str:
    """Of ratios that do not pass 1."""
    if all(ratio == 1 for _, ratio in ratios):
        return "the same"
    return "less" if all(ratio <= 1 for _, ratio in ratios) else "more"


def verdict(comparison: Comparison) -> str:
    """One sentence at the phase's headline number of tokens, with the numbers."""
    pair = comparison.at(HEADLINE_TOKENS[comparison.phase])
    other = comparison.other.title
    time, floor, nvml, energy, lower, upper = (
        pair.ratio(quantity) for quantity in ("time", "floor", "nvml", "energy", "lower", "upper")
    )
    parts = []
    ours_s, other_s = pair.ours.seconds, pair.other.seconds
    if time is not None and ours_s is not None and other_s is not None:
        spread = ", a difference within the spread of the runs" if _undecided(pair) else ""
        against = f"{seconds_text(ours_s)} against {seconds_text(other_s)}{spread}"
        parts.append(f"takes {share(time)} the time of {other} ({against})")
    elif floor is not None:
        least = f"{share(floor)} the least possible time of {other}"
        parts.append(f"has {least} (by the roofline; times were not measured)")
    if nvml is not None:
        parts.append(f"moves {share(nvml)} the bytes by NVML")
    if lower is not None and upper is not None:
        parts.append(f"needs {share(lower, upper)} the bytes by the model")
    if energy is not None:
        parts.append(f"uses {share(energy)} the energy")
    return f"At {tokens_text(pair.tokens)}, {comparison.ours.title} {listing(parts)}."


def share(*ratios: float) -> str:
    """What ours takes of the other: "1/5.3 of", "1.24 times", "1/8.0 to 1/6.5 of"."""
    if max(ratios) < 2 / 3:
        texts, words = [f"1/{significant(1 / ratio, 2)}" for ratio in sorted(ratios)], "of"
    else:
        texts, words = [f"{ratio:.2f}" for ratio in sorted(ratios)], "times"
    return f"{' to '.join(dict.fromkeys(texts))} {words}"


def tokens_text(tokens: int) -> str:
    return f"{tokens:,} token{'' if tokens == 1 else 's'}"


def listing(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _undecided(pair: Pair) -> bool:
    span = pair.time_range
    return span is not None and span[0] <= 1 <= span[1]


def findings(comparison: Comparison) -> list[str]:
    """The verdict, then where each advantage ends: in what was measured, and in the model."""
    candidates: Sequence[Quantity] = ("time", "nvml", "energy")
    measured = [quantity for quantity in candidates if comparison.ratios(quantity)]
    model: Sequence[Quantity] = ("lower", "upper") if measured else ("floor", "lower", "upper")
    quantities = [*measured, *model]
    return [verdict(comparison), *(trend(comparison, quantity) for quantity in quantities)]


def matching(comparison: Comparison) -> str:
    """One sentence: how far the two match in parameters, and whether that is within what
    ``presets`` allows."""
    ours, other = comparison.ours, comparison.other
    active = ours.active_parameters / other.active_parameters
    total = ours.total_parameters / other.total_parameters
    wide = []
    if beyond(active, ACTIVE_TOLERANCE):
        wide.append("active")
    if beyond(total, TOTAL_TOLERANCE):
        wide.append("total")
    text = (
        f"{ours.title} has {active:.2f} times the active and {total:.2f} times the total "
        f"parameters of {other.title}"
    )
    if wide:
        return f"{text}: not matched in {' and '.join(wide)} parameters."
    return f"{text}: matched."


def beyond(ratio: float, tolerance: float) -> bool:
    return abs(ratio - 1) > tolerance


def disagreements(row: Agreement) -> list[str]:
    """Pairs of counts that lie further apart than ``TOLERANCE``, in words."""
    counts = (
        ("NVML", row.nvml, "the model", row.model),
        ("ncu", row.ncu, "the model", row.model),
        ("NVML", row.nvml, "ncu", row.ncu),
    )
    found = []
    for name, count, other_name, other in counts:
        ratio = _over(count, other)
        if ratio is not None and beyond(ratio, TOLERANCE):
            found.append(f"{name} {ratio - 1:+.0%} against {other_name}")
    return found


def throttled(profile: Profile) -> dict[str, int]:
    """Points measured while the GPU held its clocks back, by reason."""
    counts: dict[str, int] = {}
    for point in profile.points:
        for reason in () if point.sampled is None else point.sampled.throttle_reasons:
            counts[reason] = counts.get(reason, 0) + 1
    return counts
