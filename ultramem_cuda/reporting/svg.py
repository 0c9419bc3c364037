"""Charts as inline SVG, drawn with nothing but string formatting.

Colours come from the page's style sheet: a series with ``style="dense"`` is drawn in
``var(--dense)``, so that one chart serves the light and the dark page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

LABEL_GAP = 15.0
TICK_GAP = 46.0
# Generous for the digits and capitals of a sans-serif at 12 px: labels must not touch.
CHARACTER_WIDTH, LINE_HEIGHT = 7.2, 14.0

Shape = Literal["circle", "square", "diamond", "up", "down", "left", "right"]
"""Markers; the last four are triangles that point there."""


@dataclass(frozen=True)
class Frame:
    """Size of a chart and the margins around its plot, in user units."""

    width: float = 760
    height: float = 400
    left: float = 62
    right: float = 150
    top: float = 16
    bottom: float = 46

    @property
    def plot_right(self) -> float:
        return self.width - self.right

    @property
    def plot_bottom(self) -> float:
        return self.height - self.bottom


@dataclass(frozen=True)
class Series:
    """One line (or, with ``markers_only``, a set of points)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    dashed: bool = False
    markers: bool = True
    markers_only: bool = False
    shape: Shape = "circle"
    hollow: bool = False
    """Markers with the page's colour inside."""
    ranges: Sequence[tuple[float, float]] = ()
    """(low, high) of each point, drawn as error bars."""
    labels: Sequence[str] = ()
    """A word for each point, shown when it is pointed at."""
    labelled: bool = False
    """The words stand beside the points, too, where they cover nothing."""


@dataclass(frozen=True)
class Band:
    """The area between two lines."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    style: str


@dataclass(frozen=True)
class Bars:
    """One bar in each group; None draws none."""

    name: str
    values: Sequence[float | None]
    style: str


@dataclass(frozen=True)
class Axis:
    """Title and scale of one axis, and how its values are written."""

    title: str
    log: bool = False
    format: Callable[[float], str] = "{:g}".format
    ticks: Sequence[float] = ()
    """Where they stand; left empty, at round numbers."""


@dataclass(frozen=True)
class Marker:
    """A vertical line at ``x`` with a word beside it."""

    x: float
    text: str


class _Scale:
    """Maps data to pixels and picks round ticks."""

    def __init__(self, values: Sequence[float], axis: Axis, low: float, high: float) -> None:
        self._log = axis.log
        self._given = axis.ticks
        self._pixels = low, high
        smallest, largest = min(values), max(values)
        if axis.log:
            self._ends = math.log10(smallest), math.log10(largest)
            padding = 0.03 * (self._ends[1] - self._ends[0]) or 0.5
        else:
            self._ends = smallest, largest
            padding = 0.05 * (largest - smallest) or 0.5
        # Bars stand on the axis.
        below = 0.0 if self._ends[0] == 0 and not axis.log else padding
        self._ends = self._ends[0] - below, self._ends[1] + padding

    def __call__(self, value: float) -> float:
        start, end = self._ends
        share = ((math.log10(value) if self._log else value) - start) / (end - start)
        return self._pixels[0] + share * (self._pixels[1] - self._pixels[0])

    def ticks(self, wanted: int = 6) -> list[float]:
        start, end = self._ends
        if self._given:
            low, high = sorted(self._pixels)
            return [tick for tick in self._given if low - 0.5 <= self(tick) <= high + 0.5]
        if not self._log:
            return _round_ticks(start, end, wanted)
        if end - start >= wanted / 2:
            step = max(1, round((end - start) / wanted))
            return [10.0**power for power in range(math.ceil(start), math.floor(end) + 1, step)]
        finer = [
            factor * 10.0**power
            for power in range(math.floor(start), math.ceil(end) + 1)
            for factor in (1, 2, 5)
            if start <= math.log10(factor) + power <= end
        ]
        return finer if len(finer) > 2 else _round_ticks(10.0**start, 10.0**end, wanted)


def _round_ticks(start: float, end: float, wanted: int) -> list[float]:
    raw = (end - start) / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(f * magnitude for f in (1, 2, 2.5, 5, 10) if f * magnitude >= raw)
    return [i * step for i in range(math.ceil(start / step), math.floor(end / step) + 1)]


@dataclass
class _Plot:
    """Axes on a frame, and the boxes (x, y, width) that words take up."""

    frame: Frame
    x_axis: Axis
    y_axis: Axis
    x: _Scale
    y: _Scale
    taken: list[tuple[float, float, float]] = field(default_factory=list)

    def free(self, x: float, y: float, width: float) -> bool:
        """Whether a line of words at (x, y) covers none, and lies inside; takes the place if so."""
        inside = (
            self.frame.left <= x and x + width <= self.frame.width and y < self.frame.plot_bottom
        )
        clear = all(
            x + width < left or left + other < x or abs(y - baseline) >= LINE_HEIGHT
            for left, baseline, other in self.taken
        )
        if inside and clear:
            self.taken.append((x, y, width))
        return inside and clear


def line_chart(
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    *,
    title: str,
    markers: Sequence[Marker] = (),
    rules: Sequence[float] = (),
    bands: Sequence[Band] = (),
    frame: Frame | None = None,
    end_labels: bool = True,
) -> str:
    """An ``<svg>`` as wide as its container. ``title`` is for screen readers.

    ``rules`` are horizontal lines. ``end_labels`` names the lines at their right ends; without, the
    page has a legend.
    """
    frame = frame or Frame()
    xs = [*(x for one in series for x in one.x), *(x for band in bands for x in band.x)]
    ys = [
        *(y for one in series for y in (*one.y, *(end for pair in one.ranges for end in pair))),
        *(y for band in bands for y in (*band.low, *band.high)),
        *rules,
    ]
    plot = _Plot(
        frame,
        x_axis,
        y_axis,
        _Scale(xs, x_axis, frame.left, frame.plot_right),
        _Scale(ys, y_axis, frame.plot_bottom, frame.top),
    )
    parts = [
        _open(frame, title),
        *_grid(plot),
        *(_band(band, plot) for band in bands),
        *(_rule(level, plot) for level in rules),
        *_markers(markers, plot),
        *(line for one in series for line in _series(one, plot)),
        *(line for one in series for line in _point_labels(one, plot)),
        *(_end_labels(series, plot) if end_labels else ()),
        "</svg>",
    ]
    return "\n".join(parts)


def bar_chart(
    groups: Sequence[str],
    bars: Sequence[Bars],
    x_title: str,
    y_axis: Axis,
    *,
    title: str,
    frame: Frame | None = None,
) -> str:
    """Groups of bars from zero, as an ``<svg>`` as wide as its container."""
    frame = frame or Frame()
    values = [0.0, *(value for one in bars for value in one.values if value is not None)]
    # Groups stand at 0, 1, ...; half a group more on either side.
    x_axis = Axis(x_title, format=lambda i: groups[round(i)], ticks=range(len(groups)))
    ends = -0.45, len(groups) - 0.55
    plot = _Plot(
        frame,
        x_axis,
        y_axis,
        _Scale(ends, x_axis, frame.left, frame.plot_right),
        _Scale(values, y_axis, frame.plot_bottom, frame.top),
    )
    width = 0.8 * (plot.x(1) - plot.x(0)) / max(1, len(bars))
    parts = [_open(frame, title), *_grid(plot, vertical=False)]
    base = plot.y(0.0)
    for which, one in enumerate(bars):
        for group, value in enumerate(one.values):
            if value is None:
                continue
            left = plot.x(group) + (which - len(bars) / 2) * width
            top = plot.y(value)
            note = f"{one.name}: {groups[group]}, {y_axis.format(value)}"
            parts.append(
                f'<rect style="fill:var(--{one.style})" x="{left:.1f}" y="{top:.1f}" '
                f'width="{max(1.0, width - 1):.1f}" height="{base - top:.1f}">'
                f"<title>{html.escape(note)}</title></rect>"
            )
    return "\n".join([*parts, "</svg>"])


def key(style: str, shape: Shape = "circle", *, dashed: bool = False, marked: bool = True) -> str:
    """The piece of line that stands for a series in a legend."""
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    marker = _outline(shape, 15, 6)
    point = f'<path style="fill:var(--{style})" d="{marker}"/>' if marked else ""
    return (
        '<svg class="key" viewBox="0 0 30 12" aria-hidden="true">'
        f'<path class="line" style="stroke:var(--{style})" d="M0 6H30"{dash}/>{point}</svg>'
    )


def _open(frame: Frame, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" '
        f'aria-label="{html.escape(title)}">'
    )


def _grid(plot: _Plot, *, vertical: bool = True) -> list[str]:
    frame = plot.frame
    left, right, top, bottom = frame.left, frame.plot_right, frame.top, frame.plot_bottom
    parts = []
    for tick in plot.y.ticks():
        y = plot.y(tick)
        parts.append(f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 8:g}" y="{y + 4:.1f}" text-anchor="end">'
            f"{html.escape(plot.y_axis.format(tick))}</text>"
        )
    written = -math.inf
    for tick in plot.x.ticks():
        x = plot.x(tick)
        if vertical:
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:g}"/>'
            )
        if x - written >= TICK_GAP:
            written = x
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{bottom + 17:g}" text-anchor="middle">'
                f"{html.escape(plot.x_axis.format(tick))}</text>"
            )
    parts.append(f'<path class="axis" d="M{left:g} {top:g}V{bottom:g}H{right:g}"/>')
    parts.append(
        f'<text class="title" x="{(left + right) / 2:g}" y="{frame.height - 8:g}" '
        f'text-anchor="middle">{html.escape(plot.x_axis.title)}</text>'
    )
    parts.append(
        f'<text class="title" transform="translate(14 {(top + bottom) / 2:g}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(plot.y_axis.title)}</text>'
    )
    return parts


def _markers(markers: Sequence[Marker], plot: _Plot) -> list[str]:
    """Words stand on the roomier side, those of each further marker a line lower."""
    frame = plot.frame
    lines, words = [], []
    for row, marker in enumerate(sorted(markers, key=lambda marker: marker.x)):
        x, top = plot.x(marker.x), frame.top + 12 + row * LINE_HEIGHT
        width = CHARACTER_WIDTH * len(marker.text)
        to_left = x > (frame.left + frame.plot_right) / 2
        plot.taken.append((x - 6 - width if to_left else x + 6, top, width))
        lines.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top:g}" '
            f'y2="{frame.plot_bottom:g}"/>'
        )
        words.append(
            f'<text class="tick halo" x="{x - 6 if to_left else x + 6:.1f}" y="{top:g}" '
            f'text-anchor="{"end" if to_left else "start"}">{html.escape(marker.text)}</text>'
        )
    return [*lines, *words]


def _rule(level: float, plot: _Plot) -> str:
    return (
        f'<line class="rule" x1="{plot.frame.left:g}" x2="{plot.frame.plot_right:g}" '
        f'y1="{plot.y(level):.1f}" y2="{plot.y(level):.1f}"/>'
    )


def _band(band: Band, plot: _Plot) -> str:
    upper = [(plot.x(x), plot.y(y)) for x, y in zip(band.x, band.high, strict=True)]
    lower = [(plot.x(x), plot.y(y)) for x, y in zip(band.x, band.low, strict=True)]
    around = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
    return f'<polygon class="band" style="fill:var(--{band.style})" points="{around}"/>'


def _series(series: Series, plot: _Plot) -> list[str]:
    points = [(plot.x(x), plot.y(y)) for x, y in zip(series.x, series.y, strict=True)]
    parts = []
    if not series.markers_only:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if series.dashed else ""
        parts.append(
            f'<polyline class="line" style="stroke:var(--{series.style})" points="{path}"{dash}/>'
        )
    for (x, _), (low, high) in zip(points, series.ranges, strict=False):
        parts.append(
            f'<path class="error" style="stroke:var(--{series.style})" '
            f'd="M{x:.1f} {plot.y(low):.1f}V{plot.y(high):.1f}"/>'
        )
    if series.markers or series.markers_only:
        inside = "var(--paper)" if series.hollow else f"var(--{series.style})"
        for i, (x, y) in enumerate(points):
            plot.taken.append((x - 4, y + 4, 8))
            values = [plot.x_axis.format(series.x[i]), plot.y_axis.format(series.y[i])]
            note = (
                f"{series.name or series.style}: {', '.join([*series.labels[i : i + 1], *values])}"
            )
            parts.append(
                f'<path class="point" style="fill:{inside};stroke:var(--{series.style})" '
                f'd="{_outline(series.shape, x, y)}"><title>{html.escape(note)}</title></path>'
            )
    return parts


def _outline(shape: Shape, x: float, y: float) -> str:
    """A closed path around (x, y); the areas are about the same."""
    if shape == "circle":
        return f"M{x - 3.4:.1f} {y:.1f}a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z"
    if shape == "square":
        return f"M{x - 3.1:.1f} {y - 3.1:.1f}h6.2v6.2h-6.2z"
    if shape == "diamond":
        return f"M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z"
    sign = 1 if shape in ("up", "left") else -1
    if shape in ("up", "down"):
        return f"M{x:.1f} {y - sign * 4.6:.1f}l4.6 {sign * 7.8:g}h-9.2z"
    return f"M{x - sign * 4.6:.1f} {y:.1f}l{sign * 7.8:g} 4.6v-9.2z"


def _point_labels(series: Series, plot: _Plot) -> list[str]:
    parts = []
    labels = series.labels if series.labelled else ()
    for x_value, y_value, text in zip(series.x, series.y, labels, strict=False):
        x, y = plot.x(x_value), plot.y(y_value)
        width = CHARACTER_WIDTH * len(text)
        places = [(x + 8, y + 15), (x - 8 - width, y - 8), (x + 8, y - 8), (x - 8 - width, y + 15)]
        place = next((place for place in places if text and plot.free(*place, width)), None)
        if place is not None:
            parts.append(
                f'<text class="small halo" style="fill:var(--{series.style})" '
                f'x="{place[0]:.1f}" y="{place[1]:.1f}">{html.escape(text)}</text>'
            )
    return parts


def _end_labels(series: Sequence[Series], plot: _Plot) -> list[str]:
    """Names at the right ends of the lines, pushed apart where they would touch."""
    frame = plot.frame
    ends = sorted((plot.y(one.y[-1]), index) for index, one in enumerate(series) if one.name)
    placed: list[tuple[float, int]] = []
    for y, index in ends:
        lowest = placed[-1][0] + LABEL_GAP if placed else frame.top + 4.0
        placed.append((max(y, lowest), index))
    overflow = placed[-1][0] - frame.plot_bottom if placed else 0.0
    parts = []
    for y, index in placed:
        one = series[index]
        top = y - max(0.0, overflow)
        parts.append(
            f'<text class="name" style="fill:var(--{one.style})" x="{plot.x(one.x[-1]) + 9:.1f}" '
            f'y="{top + 4:.1f}">{html.escape(one.name)}</text>'
        )
    return parts
