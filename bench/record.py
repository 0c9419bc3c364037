"""What the benches measured, one entry a time or amount; read from every kind of record."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .report import aligned

__all__ = [
    "OURS",
    "Entry",
    "Record",
    "RecordError",
    "csv_table",
    "item_entries",
    "load",
    "markdown_table",
    "ops_entries",
    "summary",
    "table",
]

FORMAT = "ultramem bench 1"
OURS = "ours"
MICROSECONDS = "us"


class RecordError(ValueError):
    """A file that is no record of a bench."""


@dataclass(frozen=True)
class Entry:
    """One time or amount."""

    bench: str
    section: str
    shape: str
    what: str
    peer: str
    """Whose: "ours", or the name of a peer."""
    unit: str
    """Microseconds ("us") for times."""
    value: float | None
    """A time's median; None where it did not fit in memory."""
    q1: float | None = None
    q3: float | None = None
    """Quartiles of a time."""
    repeats: int | None = None
    target: float | None = None
    """What the value is to be at most."""
    ratio: float | None = None
    """Of a peer: its time over ours."""
    ratio_target: float | None = None
    """What the ratio is to be at least."""
    verdict: str | None = None
    """Of ours, whether it reached its target, of a peer, whether the ratio did: met or missed."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    note: str | None = None

    @property
    def key(self) -> str:
        """The same in every record."""
        return "/".join((self.bench, self.section, self.shape, self.what, self.peer))

    @property
    def row(self) -> tuple[str, str, str, str]:
        """What ours and its peers have in common."""
        return self.bench, self.section, self.shape, self.what


@dataclass
class Record:
    """All entries of a run, and what they depend on."""

    machine: Mapping[str, Any]
    dtype: str
    cold: bool
    """Caches were flushed before each timed run."""
    shapes: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those of the command line that change what is measured, or how often."""
    notes: Mapping[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    out_of_memory: list[str] = field(default_factory=list)
    """Sections and shapes that broke off for want of memory."""
    wrong: list[str] = field(default_factory=list)
    """Results that were not right, and sections that failed."""

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["entries"]
        rows = [{"key": entry.key, **dataclasses.asdict(entry)} for entry in self.entries]
        return {"format": FORMAT, **fields, "rows": rows}


# ---- reading -------------------------------------------------------------------------------------


def item_entries(bench: str, section: str, item: Mapping[str, Any]) -> list[Entry]:
    """Of what `report.Row.record()` or `report.Quantity.record()` returned: ours comes first."""
    common: dict[str, Any] = {
        "bench": bench,
        "section": section,
        "shape": item["shape"],
        "what": item["what"],
    }
    judged: dict[str, Any] = {name: item[name] for name in ("verdict", "note")}
    if "amount" in item:
        judged |= {"unit": item["unit"], "value": item["amount"], "target": item["target"]}
        return [Entry(**common, peer=OURS, **judged)]
    common |= {"unit": MICROSECONDS, "sizes": dict(item["sizes"])}
    found = []
    for name, timing in item["timings"].items():
        if name == OURS:
            goal = {"target": item["target_us"], **judged}
        else:
            ratio = item["ratios"][name]
            goal = {
                "ratio": ratio["ratio"],
                "ratio_target": ratio["target"],
                "verdict": ratio["verdict"],
            }
        found.append(Entry(**common, peer=name, **_times(timing), **goal))
    return found


def _times(timing: Mapping[str, Any] | None) -> dict[str, Any]:
    if timing is None:
        return {"value": None}
    return {
        "value": timing["median_ms"] * 1e3,
        "q1": timing["q1_ms"] * 1e3,
        "q3": timing["q3_ms"] * 1e3,
        "repeats": timing["repeats"],
    }


def ops_entries(row: Mapping[str, Any]) -> list[Entry]:
    """Of a row of bench.ops, whose sections are the operators; the target is eager's."""
    judged = {"target": row["target"], "verdict": row["verdict"]}
    nothing = {"target": None, "verdict": None}
    return item_entries(
        "ops",
        row["operator"],
        {
            "shape": row["shape"],
            "what": ", ".join(filter(None, (row["pass"], row["slots"]))),
            "sizes": {},
            # These rows leave out what did not fit.
            "timings": {OURS: None, **row["timings"]},
            "target_us": None,
            "verdict": None,
            "ratios": {
                peer: {"ratio": ratio, **(judged if peer == "eager" else nothing)}
                for peer, ratio in row["ratio"].items()
            },
            "note": None,
        },
    )


def load(path: Path) -> Record:
    """A record of `python -m bench`, or of bench.ops, bench.retrieval or bench.value_ffn.

    Raises:
        RecordError: the file is something else, or has an entry twice.
        OSError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} is no JSON: {error}") from None
    try:
        record = _from_json(data)
    except (KeyError, TypeError, AttributeError):
        record = None
    if record is None:
        raise RecordError(f"{path} is no record of a bench")
    seen: set[str] = set()
    for entry in record.entries:
        if entry.key in seen:
            raise RecordError(f"{path} has {entry.key} twice")
        seen.add(entry.key)
    return record


def _from_json(data: Mapping[str, Any]) -> Record | None:
    common = {name: data[name] for name in ("machine", "dtype", "shapes", "wrong")}
    if data.get("format") == FORMAT:
        entries = []
        for row in data["rows"]:
            fields = dict(row)
            del fields["key"]
            entries.append(Entry(**fields))
        rest = {name: data[name] for name in ("cold", "settings", "notes", "out_of_memory")}
        return Record(**common, **rest, entries=entries)
    if "rows" in data:
        entries = [entry for row in data["rows"] for entry in ops_entries(row)]
        return Record(**common, cold=data["cold"], entries=entries)
    if "sections" not in data:
        return None
    # Records from before they had a name: step_floor was value_ffn's alone.
    bench = data.get("bench") or ("value_ffn" if "step_floor" in data else "retrieval")
    entries = [
        entry
        for section, items in data["sections"].items()
        for item in items
        for entry in item_entries(bench, section, item)
    ]
    return Record(**common, cold=True, entries=entries, out_of_memory=data.get("out_of_memory", []))


# ---- tables --------------------------------------------------------------------------------------

_HEADER = ("bench", "section", "shape", "what", "ours", "unit", "target", "", "peers", "note")


def table(entries: Iterable[Entry]) -> str:
    """A line for ours with its peers, as aligned text."""
    return aligned([_HEADER, *map(_cells, _rows(entries))])


def markdown_table(entries: Iterable[Entry]) -> str:
    """The same as a table of Markdown."""
    lines = [_HEADER, ["---"] * len(_HEADER), *map(_cells, _rows(entries))]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def csv_table(entries: Iterable[Entry]) -> str:
    """A line an entry, every field a column; sizes as name=number, separated by blanks."""
    output = io.StringIO()
    names = ["key", *(f.name for f in dataclasses.fields(Entry))]
    writer = csv.DictWriter(output, names, lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        sizes = " ".join(f"{name}={size}" for name, size in entry.sizes.items())
        writer.writerow({"key": entry.key, **dataclasses.asdict(entry), "sizes": sizes})
    return output.getvalue()


def summary(row: Sequence[Entry]) -> str:
    """One row in one line: ours, and its peers."""
    return " ".join(filter(None, _cells(row)))


def _rows(entries: Iterable[Entry]) -> list[list[Entry]]:
    """By row, ours first."""
    rows: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        rows.setdefault(entry.row, []).append(entry)
    return [sorted(row, key=lambda entry: entry.peer != OURS) for row in rows.values()]


def _cells(row: Sequence[Entry]) -> list[str]:
    ours, *peers = row
    return [
        *ours.row,
        "out of memory" if ours.value is None else _amount(ours),
        ours.unit,
        "" if ours.target is None else f"<= {ours.target:g}",
        ours.verdict or "",
        ", ".join(map(_against, peers)),
        ours.note or "",
    ]


def _amount(entry: Entry) -> str:
    quartiles = "" if entry.q1 is None else f" [{entry.q1:.4g}, {entry.q3:.4g}]"
    return f"{entry.value:.4g}{quartiles}"


def _against(peer: Entry) -> str:
    if peer.value is None:
        return f"{peer.peer}: out of memory"
    if peer.ratio is None:
        return f"{peer.peer} {_amount(peer)}"
    text = f"{peer.peer} {peer.ratio:.2f}x"
    if peer.ratio_target is None:
        return text
    return f"{text} (>= {peer.ratio_target:g}x {peer.verdict})"
