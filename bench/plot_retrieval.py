"""``python -m bench.plot_retrieval``: the sweeps of a record, one SVG each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ultramem_cuda import _extras

from .record import Entry, Record, RecordError, load
from .shapes import SHAPES

# Size of a sweep -> its symbol, and what the figure is called.
AXES = {
    "num_keys": ("n", "keys a side"),
    "axis_topk": ("m", "kept per axis and in the end, m = M"),
    "num_tokens": ("T", "tokens"),
    "key_dim": ("Kd", "dimension of a key"),
}
PASSES = ("fwd", "bwd")

Point = tuple[int, float]


def sweep(record: Record) -> list[Entry]:
    return [e for e in record.entries if (e.bench, e.section) == ("retrieval", "sweep")]


def points(entries: Iterable[Entry], size: str, what: str) -> list[Point]:
    """(size, microseconds) of one curve, in order; what did not fit in memory has no point."""
    found = []
    for entry in entries:
        if size in entry.sizes and entry.what.endswith(f", {what}") and entry.value is not None:
            found.append((int(entry.sizes[size]), entry.value))
    return sorted(found)


def plot(record: Record, size: str, path: Path) -> None:
    """Draws both passes against one size, on logarithmic axes."""
    _extras.require("matplotlib", extra="figures")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    symbol, meaning = AXES[size]
    # Text stays text, and two runs on one record give one file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "retrieval"}):
        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axes = figure.subplots()
        for what, label, marker in zip(PASSES, ("forward", "backward"), "os", strict=True):
            curve = points(sweep(record), size, what)
            if curve:
                axes.plot(*zip(*curve, strict=True), marker=marker, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_formatter(LogFormatter())  # 200, not 2 x 10^2
        axes.set_xlabel(f"{symbol}, {meaning}")
        axes.set_ylabel("microseconds")
        axes.set_title(f"product_key_topk, {record.machine.get('gpu', '?')}\n{_rest(size)}", size=9)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _rest(size: str) -> str:
    """The sizes that stay."""
    shape = SHAPES["S"]
    sizes = {name: getattr(shape, name) for name in AXES if name != size}
    stays = [f"{AXES[name][0]} {value}" for name, value in sizes.items()]
    return ", ".join([*stays, f"R = C = {shape.tucker_rank}", "bfloat16"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plot_retrieval",
        description="Draws the section sweep of a record of python -m bench or bench.retrieval.",
    )
    parser.add_argument("record", type=Path, help="the JSON record")
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), metavar="DIR", help="default: docs"
    )
    arguments = parser.parse_args(argv)
    try:
        record = load(arguments.record)
    except RecordError as error:
        print(f"bench.plot_retrieval: {error}", file=sys.stderr)
        return 1
    if not sweep(record):
        print(f"bench.plot_retrieval: {arguments.record} has no section sweep", file=sys.stderr)
        return 1
    try:
        for size, (symbol, _) in AXES.items():
            path = arguments.out / f"retrieval-{symbol.lower()}.svg"
            plot(record, size, path)
            print(path)
    except ModuleNotFoundError as error:
        print(f"bench.plot_retrieval: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
