"""Rows of a table: what was timed, against which peers, and what was to be reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultramem_cuda.profiling.timing import Timing

__all__ = ["Quantity", "Row", "aligned", "quantities", "table", "verdict"]


@dataclass(frozen=True)
class Row:
    """One measurement of ours and of its peers."""

    shape: str
    what: str
    timings: Mapping[str, Timing]
    """By name; "ours" is missing where it did not fit in memory, and so are peers."""
    peers: tuple[str, ...] = ()
    """Those that were to be timed."""
    target_us: float | None = None
    ratio_targets: Mapping[str, float] = field(default_factory=dict)
    """By peer: how many times as fast ours is to be."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """What the row's point is along a sweep."""
    note: str = ""

    def ratio(self, peer: str) -> float | None:
        """The peer's time over ours."""
        if "ours" not in self.timings or peer not in self.timings:
            return None
        return self.timings[peer].median_ms / self.timings["ours"].median_ms

    def time_verdict(self) -> str:
        if self.target_us is None or "ours" not in self.timings:
            return ""
        return verdict(self.timings["ours"].median_ms * 1e3 <= self.target_us)

    def ratio_verdict(self, peer: str) -> str:
        ratio = self.ratio(peer)
        if ratio is None or peer not in self.ratio_targets:
            return ""
        return verdict(ratio >= self.ratio_targets[peer])

    def record(self) -> dict[str, Any]:
        names = ("ours", *self.peers)
        return {
            "shape": self.shape,
            "what": self.what,
            "sizes": dict(self.sizes),
            "timings": {
                name: dataclasses.asdict(self.timings[name]) if name in self.timings else None
                for name in names
            },
            "out_of_memory": [name for name in names if name not in self.timings],
            "target_us": self.target_us,
            "verdict": self.time_verdict() or None,
            "ratios": {
                peer: {
                    "ratio": self.ratio(peer),
                    "target": self.ratio_targets.get(peer),
                    "verdict": self.ratio_verdict(peer) or None,
                }
                for peer in self.peers
            },
            "note": self.note or None,
        }


@dataclass(frozen=True)
class Quantity:
    """An amount that is no time, such as bytes."""

    shape: str
    what: str
    amount: float
    unit: str
    target: float | None = None
    """What it is to be at most."""
    note: str = ""

    def verdict(self) -> str:
        return "" if self.target is None else verdict(self.amount <= self.target)

    def record(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "verdict": self.verdict() or None,
            "note": self.note or None,
        }


def verdict(reached: bool) -> str:
    return "met" if reached else "missed"


def quantities(rows: Sequence[Quantity]) -> str:
    """The amounts as aligned text."""
    lines = [["shape", "what", "amount", "unit", "target", "", ""]]
    for row in rows:
        target = "" if row.target is None else f"<= {row.target:g}"
        lines.append(
            [row.shape, row.what, f"{row.amount:.4g}", row.unit, target, row.verdict(), row.note]
        )
    return aligned(lines)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, microseconds."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
    header = ["shape", "what", "ours us", "target", ""]
    for peer in peers:
        header += [f"{peer} us", "ratio", "target", ""]
    lines = [header]
    for row in rows:
        line = [row.shape, row.what, _cell(row, "ours")]
        line += ["" if row.target_us is None else f"<= {row.target_us:g}", row.time_verdict()]
        for peer in peers:
            if peer not in row.peers:
                line += [""] * 4
                continue
            ratio, target = row.ratio(peer), row.ratio_targets.get(peer)
            line += [
                _cell(row, peer),
                "" if ratio is None else f"{ratio:.2f}x",
                "" if target is None else f">= {target:g}x",
                row.ratio_verdict(peer),
            ]
        lines.append([*line, row.note] if row.note else line)
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width under the first line, the header; empty columns are left out."""
    count = max(map(len, lines))
    full = [[*line, *[""] * (count - len(line))] for line in lines]
    kept = [column for column in zip(*full, strict=True) if any(column[1:]) or column[0]]
    widths = [max(map(len, column)) for column in kept]
    full = [list(line) for line in zip(*kept, strict=True)]
    full.insert(1, ["-" * width for width in widths])
    padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in full)
    return "\n".join(line.rstrip() for line in padded)


def _cell(row: Row, name: str) -> str:
    if name not in row.timings:
        return "out of memory"
    timing = row.timings[name]
    return f"{timing.median_ms * 1e3:.4g} [{timing.q1_ms * 1e3:.4g}, {timing.q3_ms * 1e3:.4g}]"
