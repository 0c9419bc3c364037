"""Profiles of round, invented numbers: no machine has ever produced them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ultramem_cuda.profiling.record import (
    Agreement,
    Bytes,
    Ceilings,
    Phase,
    Point,
    Preset,
    Profile,
    Sampled,
    Subject,
)
from ultramem_cuda.profiling.timing import Timing

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TRAINING_TOKENS = (1024, 8192, 65536)
CEILINGS = Ceilings(1e12, 1e14, measured=True)
BLOCK = Subject("block", "FFN + memory", "block", 1000, 8000, "both")
MEMORY = Subject("memory", "Memory layer", "memory", 400, 7000, "keys and rows")
MOE = Subject("moe", "MoE", "moe", 1000, 8100, "8 of 64 experts")
PRESET = Preset("tiny", 16, (BLOCK, MEMORY, MOE), (("block", "moe"), ("memory", "moe")))


def bytes_of(amount: float) -> Bytes:
    """Lower bound ``amount``, upper 1.25 times that."""
    return Bytes(
        dense=0.5 * amount, gathered=0.5 * amount, distinct=0.25 * amount, activations=0.25 * amount
    )


def point(
    subject: str,
    tokens: int,
    seconds: float | None,
    *,
    phase: Phase = "decode",
    preset: str = "tiny",
    amount: float = 1e6,
    sampled_bytes: float | None = None,
    joules: float | None = None,
    note: str = "",
) -> Point:
    timing = None
    if seconds is not None:
        timing = Timing(seconds * 1e3, seconds * 0.9e3, seconds * 1.1e3, 20)
    sampled = None
    if sampled_bytes is not None or joules is not None:
        sampled = Sampled(2.0, 1000.0, sampled_bytes, joules, None, 0.9, 0.5, None, 1700.0)
    return Point(
        preset, subject, phase, tokens, 1e6 * tokens, bytes_of(amount), None, timing, sampled, note
    )


def profile_of(
    points: Sequence[Point],
    preset: Preset = PRESET,
    agreement: Sequence[Agreement] = (),
    notes: Sequence[str] = (),
) -> Profile:
    return Profile(
        {"gpu": "Invented GPU", "time": "2000-01-01T00:00:00+00:00", "nvml": {"calibration": 1.25}},
        CEILINGS,
        (preset,),
        tuple(points),
        tuple(agreement),
        tuple(notes),
        "ultramem profile --out here",
    )


def with_ratio(ratio: Callable[[int], float], tokens: Sequence[int] = TOKENS) -> Profile:
    """Block against MoE: time, bytes and energy all in that ratio."""
    points = []
    for count in tokens:
        share = ratio(count)
        points.append(point("moe", count, 1e-3, amount=1e6, sampled_bytes=2e6, joules=0.5))
        points.append(
            point(
                "block",
                count,
                1e-3 * share,
                amount=1e6 * share,
                sampled_bytes=2e6 * share,
                joules=0.5 * share,
            )
        )
    return profile_of(points)


def full() -> Profile:
    """All subjects, decode and training, some things missing."""
    points = []
    for phase, counts in (("decode", TOKENS), ("training", TRAINING_TOKENS)):
        for count in counts:
            for factor, name in ((1.0, "block"), (0.4, "memory"), (2.5, "moe")):
                seconds = factor * 1e-5 * (1 + count / (300 if name != "moe" else 3000))
                amount = factor * 1e5 * (1 + count / (200 if name != "moe" else 2000))
                missing = name == "memory" and count == 4096
                points.append(
                    point(
                        name,
                        count,
                        None if missing else seconds,
                        phase=phase,  # type: ignore[arg-type]
                        amount=amount,
                        sampled_bytes=None if missing else 1.1 * amount,
                        joules=None if missing else 300 * seconds,
                        note="Did not fit in memory." if missing else "",
                    )
                )
    agreement = (
        Agreement("copy", 1e9, 1.02e9, 1.01e9, 0.5e9, 0.51e9),
        Agreement("gather", 1e9, 1.25e9, None, note="Rows share sectors."),
        Agreement("value FFN forward", 1e9, None, None),
        Agreement("MoE forward", 1e9, 1.05e9, 1.3e9),
    )
    return profile_of(points, agreement=agreement, notes=("ncu was not allowed to count gathers.",))


def model_only() -> Profile:
    profile = full()
    points = [
        Point(p.preset, p.subject, p.phase, p.tokens, p.flops, p.model) for p in profile.points
    ]
    return Profile(
        {"cpu": "Invented CPU"},
        Ceilings(1e12, 1e14, measured=False),
        profile.presets,
        tuple(points),
        notes=("No GPU was found.",),
    )
