"""Line charts as inline SVG, drawn with nothing but string formatting.

Colours come from the page's style sheet: a series with ``style="dense"`` is drawn in
``var(--dense)``, so that one chart serves the light and the dark page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 150, 16, 46
LABEL_GAP = 15.0


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


@dataclass(frozen=True)
class Axis:
    """Title and scale of one axis, and how its values are written."""

    title: str
    log: bool = False
    format: Callable[[float], str] = "{:g}".format


@dataclass(frozen=True)
class Marker:
    """A vertical line at ``x`` with a word beside it."""

    x: float
    text: str


class _Scale:
    """Maps data to pixels and picks round ticks."""

    def __init__(self, values: Sequence[float], log: bool, low: float, high: float) -> None:
        self._log = log
        self._pixels = low, high
        smallest, largest = min(values), max(values)
        if log:
            self._ends = math.log10(smallest), math.log10(largest)
            padding = 0.03 * (self._ends[1] - self._ends[0]) or 0.5
            self._ends = self._ends[0] - padding, self._ends[1] + padding
        else:
            padding = 0.05 * (largest - smallest) or 0.5
            self._ends = smallest - padding, largest + padding

    def __call__(self, value: float) -> float:
        start, end = self._ends
        share = ((math.log10(value) if self._log else value) - start) / (end - start)
        return self._pixels[0] + share * (self._pixels[1] - self._pixels[0])

    def ticks(self, wanted: int = 6) -> list[float]:
        start, end = self._ends
        if self._log:
            step = max(1, round((end - start) / wanted))
            return [10.0**power for power in range(math.ceil(start), math.floor(end) + 1, step)]
        raw = (end - start) / wanted
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step_size = next(f * magnitude for f in (1, 2, 2.5, 5, 10) if f * magnitude >= raw)
        first = math.ceil(start / step_size)
        return [i * step_size for i in range(first, math.floor(end / step_size) + 1)]


def line_chart(
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    *,
    title: str,
    markers: Sequence[Marker] = (),
) -> str:
    """An ``<svg>`` as wide as its container. ``title`` is for screen readers."""
    x_scale = _Scale([x for s in series for x in s.x], x_axis.log, LEFT, WIDTH - RIGHT)
    y_scale = _Scale([y for s in series for y in s.y], y_axis.log, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        *_grid(x_scale, y_scale, x_axis, y_axis),
        *(line for marker in markers for line in _marker(marker, x_scale)),
        *(line for one in series for line in _series(one, x_scale, y_scale, x_axis, y_axis)),
        *_end_labels(series, x_scale, y_scale),
        "</svg>",
    ]
    return "\n".join(parts)


def _grid(x_scale: _Scale, y_scale: _Scale, x_axis: Axis, y_axis: Axis) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_scale.ticks():
        y = y_scale(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{html.escape(y_axis.format(tick))}</text>"
        )
    for tick in x_scale.ticks():
        x = x_scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{html.escape(x_axis.format(tick))}</text>"
        )
    middle = (TOP + bottom) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    parts.append(
        f'<text class="title" x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(x_axis.title)}</text>"
    )
    parts.append(
        f'<text class="title" transform="translate(14 {middle}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_axis.title)}</text>'
    )
    return parts


def _marker(marker: Marker, x_scale: _Scale) -> list[str]:
    x = x_scale(marker.x)
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
        f'<text class="tick" x="{x - 6:.1f}" y="{TOP + 12}" text-anchor="end">'
        f"{html.escape(marker.text)}</text>",
    ]


def _series(
    series: Series, x_scale: _Scale, y_scale: _Scale, x_axis: Axis, y_axis: Axis
) -> list[str]:
    points = [(x_scale(x), y_scale(y)) for x, y in zip(series.x, series.y, strict=True)]
    parts = []
    if not series.markers_only:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if series.dashed else ""
        parts.append(f'<polyline class="line" style="{_stroke(series)}" points="{path}"{dash}/>')
    if series.markers or series.markers_only:
        for (x, y), x_value, y_value in zip(points, series.x, series.y, strict=True):
            note = (
                f"{series.name or series.style}: {x_axis.format(x_value)}, {y_axis.format(y_value)}"
            )
            parts.append(
                f'<circle style="fill:var(--{series.style})" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
                f"<title>{html.escape(note)}</title></circle>"
            )
    return parts


def _end_labels(series: Sequence[Series], x_scale: _Scale, y_scale: _Scale) -> list[str]:
    """Names at the right ends of the lines, pushed apart where they would touch."""
    ends = sorted((y_scale(one.y[-1]), index) for index, one in enumerate(series) if one.name)
    placed: list[tuple[float, int]] = []
    for y, index in ends:
        lowest = placed[-1][0] + LABEL_GAP if placed else TOP + 4.0
        placed.append((max(y, lowest), index))
    overflow = placed[-1][0] - (HEIGHT - BOTTOM) if placed else 0.0
    parts = []
    for y, index in placed:
        one = series[index]
        x = x_scale(one.x[-1])
        top = y - max(0.0, overflow)
        parts.append(
            f'<text class="name" style="fill:var(--{one.style})" x="{x + 9:.1f}" '
            f'y="{top + 4:.1f}">{html.escape(one.name)}</text>'
        )
    return parts


def _stroke(series: Series) -> str:
    return f"stroke:var(--{series.style})"
