"""What ``ultramem profile`` finds, as data: written as JSON and CSV, drawn by the report.

JSON holds everything and is read again (``read_json``); CSV holds the points, one a row, for
spreadsheets and data frames.

Units: bytes, seconds, joules and FLOPs (a multiply-add is two), all of one pass over all tokens of
a point; rates are a second's. What was not measured is None, never zero.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .timing import Timing, write_json, write_text

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

    def of_one(self, calls: int) -> Sampled:
        """The share of one call, where a pass was that many."""

        def share(amount: float | None) -> float | None:
            return None if amount is None else amount / calls

        return dataclasses.replace(
            self,
            passes=self.passes * calls,
            bytes=share(self.bytes),
            joules=share(self.joules),
            joules_above_idle=share(self.joules_above_idle),
        )


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
    command: str = ""
    """The command line that repeats it."""

    def __post_init__(self) -> None:
        _check(self)

    def preset(self, name: str) -> Preset:
        return next(preset for preset in self.presets if preset.name == name)

    def select(self, preset: str, subject: str, phase: Phase) -> list[Point]:
        """Points of one subject, by tokens."""
        wanted = (preset, subject, phase)
        found = [p for p in self.points if (p.preset, p.subject, p.phase) == wanted]
        return sorted(found, key=lambda point: point.tokens)

    @property
    def measured(self) -> bool:
        """Whether anything was: without a GPU a profile holds the model alone."""
        return any(point.timing is not None or point.sampled is not None for point in self.points)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: object) -> Profile:
        """The profile that ``to_json`` wrote; ValueError names what is missing or wrong."""
        if not isinstance(data, Mapping) or "schema" not in data:
            raise ValueError("not a profile: it has no schema")
        if data["schema"] != SCHEMA:
            raise ValueError(f"a profile of schema {data['schema']!r}; this version reads {SCHEMA}")
        profile: Profile = _decode(cls, {k: v for k, v in data.items() if k != "schema"}, "")
        return profile

    def write_json(self, path: Path) -> None:
        """Writes all of it, whole or not at all."""
        write_json(path, self.to_json())

    def write_csv(self, path: Path) -> None:
        """Writes the points, a row each, whole or not at all; what is missing stays empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for point in self.points:
            preset = self.preset(point.preset)
            (subject,) = (s for s in preset.subjects if s.name == point.subject)
            values = [get(subject, point, self.ceilings) for get in CSV_COLUMNS.values()]
            writer.writerow("" if value is None else value for value in values)
        write_text(path, text.getvalue())


def read_json(path: Path) -> Profile:
    """Reads what ``Profile.write_json`` wrote; ValueError names the file and what is wrong."""
    try:
        return Profile.from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _check(profile: Profile) -> None:
    """Names that do not resolve would be points that no table shows."""
    subjects = {preset.name: [s.name for s in preset.subjects] for preset in profile.presets}
    if len(subjects) < len(profile.presets):
        raise ValueError("presets must have different names")
    for preset in profile.presets:
        names = subjects[preset.name]
        if len(set(names)) < len(names):
            raise ValueError(f"preset {preset.name!r}: subjects must have different names")
        if any(min(s.active_parameters, s.total_parameters) < 1 for s in preset.subjects):
            raise ValueError(f"preset {preset.name!r}: every subject must have parameters")
        unknown = {name for pair in preset.comparisons for name in pair}.difference(names)
        if unknown:
            raise ValueError(f"preset {preset.name!r} compares unknown subjects {sorted(unknown)}")
    seen = set()
    for point in profile.points:
        key = (point.preset, point.subject, point.phase, point.tokens)
        if point.subject not in subjects.get(point.preset, []):
            raise ValueError(f"a point of an unknown subject: {key}")
        if point.tokens < 1:
            raise ValueError(f"tokens must be positive: {key}")
        if key in seen:
            raise ValueError(f"two points of the same subject, phase and tokens: {key}")
        seen.add(key)


def _decode(kind: Any, value: object, at: str) -> Any:
    """``value``, read from JSON, as the type ``kind``; sequences become tuples."""
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, value, at)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _decode(kind, value, at)
    if origin is Literal:
        return _expect(value in arguments, value, at, f"one of {', '.join(arguments)}")
    if origin is Sequence:
        items = _expect(isinstance(value, list | tuple), value, at, "a list")
        return tuple(_decode(arguments[0], item, f"{at}[{i}]") for i, item in enumerate(items))
    if origin is tuple:
        fits = isinstance(value, list | tuple) and len(value) == len(arguments)
        items = _expect(fits, value, at, f"a list of {len(arguments)}")
        pairs = zip(arguments, items, strict=True)
        return tuple(_decode(kind, item, f"{at}[{i}]") for i, (kind, item) in enumerate(pairs))
    if origin is Mapping:
        return _expect(isinstance(value, dict), value, at, "an object")
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and math.isfinite(typing.cast(float, value))
        return _expect(fits, value, at, "a finite number")
    if kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
        return _expect(fits, value, at, "a whole number")
    names = {str: "a string", bool: "true or false"}
    return _expect(isinstance(value, kind), value, at, names[kind])


def _decode_fields(kind: Any, value: object, at: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{at or 'the profile'} must be an object, got {value!r:.60}")
    types_of = _field_types(kind)
    unknown = sorted(set(value) - set(types_of))
    if unknown:
        raise ValueError(f"{_within(at, str(unknown[0]))} is unknown")
    for name in types_of:
        # Also where there is a default: every field is written, and nothing is 0 for want of it.
        if name not in value:
            raise ValueError(f"{_within(at, name)} is missing")
    return kind(
        **{name: _decode(types_of[name], item, _within(at, name)) for name, item in value.items()}
    )


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _within(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _expect(fits: bool, value: Any, at: str, what: str) -> Any:
    if not fits:
        raise ValueError(f"{at} must be {what}, got {value!r:.60}")
    return value


_Column = Callable[[Subject, Point, Ceilings], object]


def _of_bytes(part: str, count: str) -> _Column:
    return lambda subject, point, ceilings: getattr(getattr(point, part), count, None)


def _of_timing(name: str) -> _Column:
    return lambda subject, point, ceilings: getattr(point.timing, name, None)


def _of_sampled(name: str) -> _Column:
    return lambda subject, point, ceilings: getattr(point.sampled, name, None)


CSV_COLUMNS: Mapping[str, _Column] = {
    "preset": lambda subject, point, ceilings: point.preset,
    "phase": lambda subject, point, ceilings: point.phase,
    "subject": lambda subject, point, ceilings: point.subject,
    "title": lambda subject, point, ceilings: subject.title,
    "kind": lambda subject, point, ceilings: subject.kind,
    "active_parameters": lambda subject, point, ceilings: subject.active_parameters,
    "total_parameters": lambda subject, point, ceilings: subject.total_parameters,
    "tokens": lambda subject, point, ceilings: point.tokens,
    "flops": lambda subject, point, ceilings: point.flops,
    **{
        f"{part}_{count}_bytes": _of_bytes(part, count)
        for part in ("model", "counted")
        for count in ("dense", "gathered", "distinct", "activations", "lower", "upper")
    },
    "floor_ms": lambda subject, point, ceilings: point.floor_seconds(ceilings) * 1e3,
    "time_median_ms": _of_timing("median_ms"),
    "time_q1_ms": _of_timing("q1_ms"),
    "time_q3_ms": _of_timing("q3_ms"),
    "time_repeats": _of_timing("repeats"),
    "achieved_fraction": lambda subject, point, ceilings: point.achieved(ceilings),
    "nvml_bytes": _of_sampled("bytes"),
    "nvml_energy_j": _of_sampled("joules"),
    "nvml_energy_above_idle_j": _of_sampled("joules_above_idle"),
    "nvml_energy_per_token_j": lambda subject, point, ceilings: point.joules_per_token(),
    "nvml_window_s": _of_sampled("seconds"),
    "nvml_passes": _of_sampled("passes"),
    "sm_utilization_fraction": _of_sampled("sm_utilization"),
    "sm_occupancy_fraction": _of_sampled("sm_occupancy"),
    "tensor_utilization_fraction": _of_sampled("tensor_utilization"),
    "sm_clock_mhz": _of_sampled("sm_clock_mhz"),
    "throttle_reasons": lambda subject, point, ceilings: (
        None if point.sampled is None else "; ".join(point.sampled.throttle_reasons)
    ),
    "note": lambda subject, point, ceilings: point.note,
}
"""What the CSV says of a point, by column, with the unit in the name."""
