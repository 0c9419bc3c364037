"""What ``ultramem profile`` finds, as data: written as JSON and CSV, drawn by the report.

Units: bytes, seconds, joules and FLOPs (a multiply-add is two), all of one pass over all tokens of
a point; rates are a second's. What was not measured is None, never zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .timing import Timing

SCHEMA = 1

Kind = Literal["memory", "pkm", "ffn", "block", "moe"]
Phase = Literal["decode", "training", "optimizer"]
"""decode: a forward pass without gradients. training: a forward and its backward pass.
optimizer: the step behind them."""


@dataclass(frozen=True)
class Subject:
    """A layer, or several side by side, that is counted and measured."""

    name: str
    """Unique within the preset: "block", "moe"."""
    title: str
    """For people: "FFN + memory layer"."""
    kind: Kind
    active_parameters: int
    """Those that one token uses."""
    total_parameters: int
    """Those of one layer; of a table that layers share, the layer's share."""
    detail: str
    """Its sizes in words: "8 of 64 experts, inner width 1024"."""


@dataclass(frozen=True)
class Preset:
    """Subjects of one model size, and which of them are compared."""

    name: str
    """As ``UltraMemConfig.preset`` has it: "1B-7B"."""
    d_model: int
    subjects: Sequence[Subject]
    comparisons: Sequence[tuple[str, str]]
    """Pairs of names, ours first: ("block", "moe")."""


@dataclass(frozen=True)
class Bytes:
    """Bytes to and from memory that one pass needs, by the model of ``traffic.py``."""

    dense: float = 0.0
    """Of parameters (and gradients, states) that every token uses."""
    gathered: float = 0.0
    """Of experts or rows, each counted for every token that uses it."""
    distinct: float = 0.0
    """Of experts or rows, each counted once."""
    activations: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(
            self.dense + other.dense,
            self.gathered + other.gathered,
            self.distinct + other.distinct,
            self.activations + other.activations,
        )

    @property
    def parameters(self) -> Bytes:
        """The same without activations."""
        return dataclasses.replace(self, activations=0.0)

    @property
    def lower(self) -> float:
        """If what is used twice is always found in a cache."""
        return self.dense + self.distinct + self.activations

    @property
    def upper(self) -> float:
        """If it never is."""
        return self.dense + self.gathered + self.activations


@dataclass(frozen=True)
class Sampled:
    """What NVML said of a window in which one pass followed the other."""

    seconds: float
    """Length of the window."""
    passes: float
    """Run in the window."""
    bytes: float | None
    """DRAM reads and writes of one pass: idle subtracted, calibrated by a copy in the same run."""
    joules: float | None
    """Of one pass, the idle GPU's included."""
    joules_above_idle: float | None
    sm_utilization: float | None
    """Shares from 0 to 1, as the next two."""
    sm_occupancy: float | None
    tensor_utilization: float | None
    sm_clock_mhz: float | None
    throttle_reasons: Sequence[str] = ()


@dataclass(frozen=True)
class Point:
    """One subject at one number of tokens."""

    preset: str
    subject: str
    phase: Phase
    tokens: int
    flops: float
    model: Bytes
    """Experts or slots drawn uniformly."""
    counted: Bytes | None = None
    """The same with the distinct experts or rows that the inputs of the run really used."""
    timing: Timing | None = None
    sampled: Sampled | None = None
    note: str = ""
    """Why something is missing, in a sentence."""

    @property
    def needed(self) -> Bytes:
        """The better count of the two."""
        return self.counted or self.model

    @property
    def seconds(self) -> float | None:
        return None if self.timing is None else self.timing.median_ms / 1e3

    def floor_seconds(self, ceilings: Ceilings) -> float:
        """The longer of least bytes over bandwidth and FLOPs over rate."""
        return max(
            self.needed.lower / ceilings.copy_bytes_per_second,
            self.flops / ceilings.matmul_flops_per_second,
        )

    def achieved(self, ceilings: Ceilings) -> float | None:
        """Fraction of the roofline: the floor over the time."""
        return None if self.seconds is None else self.floor_seconds(ceilings) / self.seconds

    def joules_per_token(self) -> float | None:
        if self.sampled is None or self.sampled.joules is None:
            return None
        return self.sampled.joules / self.tokens


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reaches at best."""

    copy_bytes_per_second: float
    """A large copy, reads and writes counted."""
    matmul_flops_per_second: float
    measured: bool
    """False: those of an H100, for a model without a GPU."""


@dataclass(frozen=True)
class Agreement:
    """Bytes of one pass of something simple, counted in three ways."""

    what: str
    model: float
    nvml: float | None
    ncu: float | None
    ncu_read: float | None = None
    ncu_write: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Profile:
    """The whole record."""

    machine: Mapping[str, Any]
    ceilings: Ceilings
    presets: Sequence[Preset]
    points: Sequence[Point]
    agreement: Sequence[Agreement] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    """What could not be measured, each with its reason, in a sentence."""

    def select(self, preset: str, subject: str, phase: Phase) -> list[Point]:
        """Points of one subject, by tokens."""
        wanted = (preset, subject, phase)
        found = [p for p in self.points if (p.preset, p.subject, p.phase) == wanted]
        return sorted(found, key=lambda point: point.tokens)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}
