"""``python -m bench.compare OLD NEW``: what became slower or larger between two records."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .record import OURS, Entry, Record, RecordError, load
from .report import aligned

EXIT_OK, EXIT_REGRESSION, EXIT_USAGE = 0, 1, 2
THRESHOLD = 1.05

By = Literal["time", "peer"]

# What times depend on, by the device that was measured.
_MACHINE = {
    "cuda": ("device", "gpu", "torch"),
    "cpu": ("device", "cpu", "threads", "cpu_capability", "torch"),
}
# Peers that are our own kernels, on other inputs, without a graph or summed: no measure of a
# machine.
_OURS_TOO = {
    ("retrieval", "adversarial", "random"),
    ("value_ffn", "table", "uniform"),
    ("value_ffn", "layer", "eager"),
    ("graph_step", "layer_step", "kernels"),
    ("graph_step", "lm_step", "kernels"),
}


@dataclass(frozen=True)
class Point:
    """A median with its quartiles, which an amount has not."""

    value: float
    q1: float | None = None
    q3: float | None = None

    def __str__(self) -> str:
        quartiles = "" if self.q1 is None else f" [{self.q1:.4g}, {self.q3:.4g}]"
        return f"{self.value:.4g}{quartiles}"


@dataclass(frozen=True)
class Change:
    """One row of both records."""

    entry: Entry
    """That of the new one: ours, or the peer that ours is divided by."""
    unit: str
    old: Point | None
    """None: out of memory."""
    new: Point | None
    threshold: float

    @property
    def ratio(self) -> float | None:
        """New over old; None where either is missing, or old is not positive."""
        if self.old is None or self.new is None or self.old.value <= 0:
            return None
        return self.new.value / self.old.value

    @property
    def overlap(self) -> bool | None:
        """Whether the spreads between the quartiles have something in common; None for amounts."""
        if self.old is None or self.new is None:
            return None
        if None in (self.old.q1, self.old.q3, self.new.q1, self.new.q3):
            return None
        return self.old.q1 <= self.new.q3 and self.new.q1 <= self.old.q3  # type: ignore[operator]

    @property
    def verdict(self) -> str:
        """Regression, improvement, or nothing where it is neither or noise may be the cause."""
        if self.old is None or self.new is None:
            if self.old is self.new:
                return ""
            return "regression" if self.new is None else "improvement"
        if self.overlap:
            return ""
        if self.old.value <= 0:
            # No ratio: any growth from nothing is one.
            return "regression" if self.new.value > max(self.old.value, 0.0) else ""
        if self.new.value > self.threshold * self.old.value:
            return "regression"
        return "improvement" if self.new.value * self.threshold < self.old.value else ""


@dataclass(frozen=True)
class Comparison:
    """Two records, row by row."""

    by: By
    threshold: float
    changes: Sequence[Change]
    only_old: Sequence[str]
    """Keys of what was compared of one record alone."""
    only_new: Sequence[str]
    verdicts: Sequence[tuple[Entry, Entry]]
    """Old and new where "met" became "missed", or the other way about."""
    machines: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Old and new where they differ."""
    other_shapes: Sequence[str] = ()
    """Names that stand for other sizes in the two: their rows are left out."""

    def named(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]


# ---- comparing -----------------------------------------------------------------------------------


def compare(
    old: Record, new: Record, threshold: float = THRESHOLD, by: By | None = None
) -> Comparison:
    """Matches the rows of two records by their keys.

    Args:
        threshold: how many times the old value a regression exceeds; at least 1.
        by: "time" compares our times, "peer" ours divided by each peer's of the same run, which
            two machines have in common; amounts that are no times are compared in either. Default:
            "time" where the machines are alike.

    Raises:
        RecordError: the records have nothing in common.
    """
    if old.dtype != new.dtype or old.cold != new.cold:
        kinds = [f"{r.dtype}, {'cold' if r.cold else 'warm'} caches" for r in (old, new)]
        raise RecordError(f"the records cannot be compared: {kinds[0]} against {kinds[1]}")
    machines = _machine_differences(old.machine, new.machine)
    by = by or ("peer" if machines else "time")
    other_shapes = _other_shapes(old, new)
    points = [dict(_points(record, by, other_shapes)) for record in (old, new)]
    changes = [
        Change(entry, unit, points[0][key][2], point, threshold)
        for key, (entry, unit, point) in points[1].items()
        if key in points[0]
    ]
    if not changes:
        raise RecordError("the records cannot be compared: nothing to compare is in both")
    return Comparison(
        by,
        threshold,
        changes,
        [key for key in points[0] if key not in points[1]],
        [key for key in points[1] if key not in points[0]],
        list(_verdict_changes(old, new, other_shapes)),
        machines,
        other_shapes,
    )


def _machine_differences(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    names = _MACHINE["cuda" if "cuda" in (old.get("device"), new.get("device")) else "cpu"]
    pairs = {name: (old.get(name), new.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _other_shapes(old: Record, new: Record) -> list[str]:
    sizes = {shape["name"]: shape for shape in old.shapes}
    return [s["name"] for s in new.shapes if sizes.get(s["name"], s) != s]


def _points(
    record: Record, by: By, other_shapes: Sequence[str]
) -> Iterator[tuple[str, tuple[Entry, str, Point | None]]]:
    """What is compared of a record: by key, its entry, unit and value."""
    ours = {entry.row: entry for entry in record.entries if entry.peer == OURS}
    for entry in record.entries:
        if entry.shape in other_shapes:
            continue
        is_amount = entry.peer == OURS and entry.unit != "us"
        if is_amount or (by == "time" and entry.peer == OURS):
            yield entry.key, (entry, entry.unit, _point(entry))
        elif by == "peer" and entry.peer != OURS and not _is_ours_too(entry):
            own, peer = _point(ours[entry.row]), _point(entry)
            if peer is not None:
                point = None if own is None else _quotient(own, peer)
                yield entry.key, (entry, f"ours / {entry.peer}", point)


def _is_ours_too(entry: Entry) -> bool:
    return (entry.bench, entry.section, entry.peer) in _OURS_TOO


def _point(entry: Entry) -> Point | None:
    return None if entry.value is None else Point(entry.value, entry.q1, entry.q3)


def _quotient(ours: Point, peer: Point) -> Point:
    """Of two times, with the widest spread that both quartiles allow."""
    quotient = ours.value / peer.value
    if ours.q1 is None or ours.q3 is None or peer.q1 is None or peer.q3 is None:
        return Point(quotient)
    return Point(quotient, ours.q1 / peer.q3, ours.q3 / peer.q1)


def _verdict_changes(
    old: Record, new: Record, other_shapes: Sequence[str]
) -> Iterator[tuple[Entry, Entry]]:
    before = {entry.key: entry for entry in old.entries}
    for entry in new.entries:
        was = before.get(entry.key)
        if was is None or entry.shape in other_shapes or was.verdict == entry.verdict:
            continue
        if was.verdict and entry.verdict:
            yield was, entry


# ---- output --------------------------------------------------------------------------------------


def describe(comparison: Comparison) -> str:
    """The table, what changed sides of its target, what has no counterpart, and the counts."""
    parts = [_table(comparison.changes)]
    if comparison.verdicts:
        lines = ["targets that changed sides:"]
        for old, new in comparison.verdicts:
            lines.append(f"  {new.key}: {_judged(old)} -> {_judged(new)}")
        parts.append("\n".join(lines))
    for name, keys in (("OLD", comparison.only_old), ("NEW", comparison.only_new)):
        if keys:
            parts.append("\n  ".join([f"only in {name}:", *keys]))
    regressions, improvements = comparison.named("regression"), comparison.named("improvement")
    rest = len(comparison.changes) - len(regressions) - len(improvements)
    parts.append(
        f"{len(regressions)} regressions, {len(improvements)} improvements, {rest} within a "
        f"factor of {comparison.threshold:g} or within the quartiles; "
        f"{len(comparison.only_old)} only in OLD, {len(comparison.only_new)} only in NEW"
    )
    return "\n\n".join(parts)


def _table(changes: Sequence[Change]) -> str:
    header = ["section", "shape", "what", "unit", "old", "new", "new/old", "quartiles", ""]
    lines = [header]
    for change in changes:
        entry = change.entry
        overlap = "" if change.overlap is None else "overlap" if change.overlap else "apart"
        lines.append(
            [
                f"{entry.bench}/{entry.section}",
                entry.shape,
                entry.what,
                change.unit,
                *("out of memory" if p is None else str(p) for p in (change.old, change.new)),
                "" if change.ratio is None else f"{change.ratio:.3f}",
                overlap,
                change.verdict,
            ]
        )
    return aligned(lines)


def _judged(entry: Entry) -> str:
    if entry.peer == OURS:
        return f"{entry.verdict} ({entry.value:.4g} {entry.unit}, target <= {entry.target:g})"
    return f"{entry.verdict} ({entry.ratio:.2f}x, target >= {entry.ratio_target:g}x)"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """All that `describe` prints."""

    def point(p: Point | None) -> dict[str, float | None] | None:
        return None if p is None else {"value": p.value, "q1": p.q1, "q3": p.q3}

    return {
        "by": comparison.by,
        "threshold": comparison.threshold,
        "machines_differ": {name: list(pair) for name, pair in comparison.machines.items()},
        "other_shapes": list(comparison.other_shapes),
        "regressions": len(comparison.named("regression")),
        "improvements": len(comparison.named("improvement")),
        "rows": [
            {
                "key": change.entry.key,
                "unit": change.unit,
                "old": point(change.old),
                "new": point(change.new),
                "ratio": change.ratio,
                "quartiles_overlap": change.overlap,
                "verdict": change.verdict or None,
            }
            for change in comparison.changes
        ],
        "targets": [
            {"key": new.key, "old": old.verdict, "new": new.verdict}
            for old, new in comparison.verdicts
        ],
        "only_old": list(comparison.only_old),
        "only_new": list(comparison.only_new),
    }


def warnings(comparison: Comparison, new: Record) -> Iterator[str]:
    """What a reader must know before believing the table."""
    if comparison.machines:
        differ = "; ".join(f"{n}: {a} and {b}" for n, (a, b) in comparison.machines.items())
        yield f"the machines differ ({differ})"
        if comparison.by == "peer":
            yield "ours / peer of the same run is compared; --by time compares the times after all"
        else:
            yield "their times say little of the code; --by peer compares ours / peer"
    for name in comparison.other_shapes:
        yield f"shape {name} has other sizes in the two: its rows are left out"
    for message in (*new.wrong, *(f"out of memory: {m}" for m in new.out_of_memory)):
        yield f"NEW says: {message}"


# ---- command line --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description="Compares two records that python -m bench, or bench.ops, bench.retrieval or "
        "bench.value_ffn with --json, wrote. A regression is a ratio new/old above the threshold "
        "with quartiles that do not overlap; or what no longer fits in memory.",
        epilog="exit codes: 0 no regression, 1 a regression, 2 wrong usage, or files that are no "
        "records or have nothing in common",
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--threshold", type=_threshold, default=THRESHOLD, help="default %(default)s"
    )
    parser.add_argument(
        "--by",
        choices=("time", "peer"),
        help="our times, or ours / peer of the same run (default: time on like machines)",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    return parser.parse_args(argv)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, got '{text}'")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where there is a regression, 2 where nothing can be compared, else 0."""
    arguments = parse(argv)
    try:
        old, new = load(arguments.old), load(arguments.new)
        comparison = compare(old, new, arguments.threshold, arguments.by)
    except RecordError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"bench.compare: cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    for warning in warnings(comparison, new):
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(to_json(comparison), indent=1) if arguments.json else describe(comparison))
    return EXIT_REGRESSION if comparison.named("regression") else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
