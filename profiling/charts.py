"""The charts of a profile, as figures of an HTML page.

A figure that shows no measurement says so in its title. What there is nothing to draw of is "".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ultramem_cuda.reporting import svg
from ultramem_cuda.reporting.numbers import (
    bytes_text,
    joules_text,
    seconds_text,
    short,
    whole,
)
from ultramem_cuda.reporting.page import escape
from ultramem_cuda.reporting.svg import Axis, Band, Bars, Frame, Marker, Series

from .analysis import Comparison, Quantity, crossings, value
from .record import Kind, Phase, Point, Preset, Profile, Subject

COLOURS = """
:root { --block: #0a66b7; --memory: #0b8577; --ffn: #68737d; --pkm: #7a4fc4; --moe: #c2570c;
  --moe-2: #b02a5b; --moe-3: #8a6d00; --spare: #44505c;
  --time: #0a66b7; --bytes: #c2570c; --energy: #0b8577; }
@media (prefers-color-scheme: dark) { :root { --block: #58b0f0; --memory: #3cc9b4; --ffn: #9aa6b1;
  --pkm: #b392f0; --moe: #f0883e; --moe-2: #f778a1; --moe-3: #d9b62f; --spare: #c5ced6;
  --time: #58b0f0; --bytes: #f0883e; --energy: #3cc9b4; } }
"""


@dataclass(frozen=True)
class Look:
    """Colour and marker of a subject, the same in every chart of its preset."""

    style: str
    shape: svg.Shape


_PALETTE: Mapping[Kind, Sequence[Look]] = {
    "block": (Look("block", "diamond"),),
    "memory": (Look("memory", "circle"),),
    "ffn": (Look("ffn", "square"),),
    "pkm": (Look("pkm", "down"),),
    "moe": (Look("moe", "up"), Look("moe-2", "left"), Look("moe-3", "right")),
}
_FRAME = Frame(width=560, height=350, left=92, right=18, top=14, bottom=46)
_ROOFLINE_FRAME = replace(_FRAME, width=900, height=430)
_TOKENS = "tokens of a pass"


def looks(subjects: Sequence[Subject]) -> dict[str, Look]:
    """By name. One of each kind, and three MoEs, have looks of their own; more share one."""
    left = {kind: iter(kept) for kind, kept in _PALETTE.items()}
    return {s.name: next(left[s.kind], Look("spare", "circle")) for s in subjects}


@dataclass(frozen=True)
class Scene:
    """Subjects of one preset and phase that charts are drawn of."""

    profile: Profile
    preset: Preset
    phase: Phase
    subjects: Sequence[Subject]

    @property
    def looks(self) -> dict[str, Look]:
        return looks(self.preset.subjects)

    def points(self, subject: Subject) -> list[Point]:
        return self.profile.select(self.preset.name, subject.name, self.phase)

    def drawn(self) -> list[tuple[Subject, Look, list[Point]]]:
        """Those that have points."""
        every = ((s, self.looks[s.name], self.points(s)) for s in self.subjects)
        return [(subject, look, points) for subject, look, points in every if points]

    def tokens(self) -> list[int]:
        return sorted({point.tokens for _, _, points in self.drawn() for point in points})


def time_figure(scene: Scene) -> str:
    """Medians, solid, with quartiles; floors, dashed."""
    solid, dashed = [], []
    for subject, look, points in scene.drawn():
        timed = [(p.tokens, p.timing) for p in points if p.timing is not None]
        if timed:
            solid.append(
                Series(
                    subject.title,
                    [tokens for tokens, _ in timed],
                    [timing.median_ms / 1e3 for _, timing in timed],
                    look.style,
                    shape=look.shape,
                    ranges=[(timing.q1_ms / 1e3, timing.q3_ms / 1e3) for _, timing in timed],
                )
            )
        dashed.append(_line(f"{subject.title}, floor", scene, points, "floor", look))
    said = "time of one pass, medians and quartiles; dashed: the least by the roofline"
    return _figure(
        "Time" if solid else "Least possible time",
        said if solid else "by the roofline: the longer of bytes and FLOPs at the ceilings",
        [*solid, *(dashed if solid else map(_alone, dashed))],
        Axis("time", log=True, format=seconds_text),
        scene,
        measured=bool(solid),
    )


def bytes_figure(scene: Scene) -> str:
    """The model's bounds as a band, NVML's bytes as a line."""
    bands, model, measured = [], [], []
    for subject, look, points in scene.drawn():
        tokens = [point.tokens for point in points]
        lower = [point.needed.lower for point in points]
        bands.append(Band(tokens, lower, [point.needed.upper for point in points], look.style))
        model.append(_line(f"{subject.title}, model", scene, points, "lower", look))
        sampled = _line(subject.title, scene, points, "nvml", look)
        if sampled.x:
            measured.append(replace(sampled, dashed=False, markers=True))
    band = "from repeated rows cached (dashed) to never (upper edge)"
    said = f"solid: by NVML; shaded: the model, {band}" if measured else f"the model, {band}"
    return _figure(
        "Bytes to and from memory",
        said,
        [*(model if measured else map(_alone, model)), *measured],
        Axis("bytes of one pass", log=True, format=bytes_text),
        scene,
        measured=bool(measured),
        bands=bands,
    )


def energy_figure(scene: Scene) -> str:
    series = []
    for subject, look, points in scene.drawn():
        found = [(p.tokens, p.joules_per_token()) for p in points]
        known = [(tokens, joules) for tokens, joules in found if joules]
        if known:
            xs, ys = [tokens for tokens, _ in known], [joules for _, joules in known]
            series.append(Series(subject.title, xs, ys, look.style, shape=look.shape))
    return _figure(
        "Energy of a token",
        "by NVML, the idle GPU's power included",
        series,
        Axis("energy a token", log=True, format=joules_text),
        scene,
    )


def achieved_figure(scene: Scene) -> str:
    """Bars: the share of the roofline that each subject reaches."""
    tokens = scene.tokens()
    bars = []
    for subject, look, points in scene.drawn():
        by_tokens = {point.tokens: point.achieved(scene.profile.ceilings) for point in points}
        values = [by_tokens.get(count) for count in tokens]
        if any(share is not None for share in values):
            bars.append(Bars(subject.title, values, look.style))
    if not bars:
        return ""
    title = "Achieved fraction of the roofline"
    chart = svg.bar_chart(
        [whole(count) for count in tokens],
        bars,
        _TOKENS,
        Axis("floor over time", format="{:.0%}".format),
        title=_spoken(title, scene),
        frame=_FRAME,
    )
    legend = [
        (f'<span class="swatch" style="background:var(--{one.style})"></span>', one.name)
        for one in bars
    ]
    return figure(title, "no bar: not measured", legend, chart)


def ratio_figure(comparison: Comparison, preset: Preset) -> str:
    """Ours over the other by tokens, a line for each quantity; below 1 ours is less."""
    shown: Sequence[tuple[Quantity, str, str, svg.Shape]] = (
        ("time", "time", "time", "circle"),
        ("nvml", "bytes by NVML", "bytes", "square"),
        ("energy", "energy", "energy", "diamond"),
    )
    series, markers = [], []
    for quantity, name, style, shape in shown:
        ratios = comparison.ratios(quantity)
        if ratios:
            series.append(_ratio_series(name, ratios, style, shape, comparison))
            markers += _crossing_markers(name, ratios)
    measured = bool(series)
    if not measured:
        ratios = comparison.ratios("floor")
        series.append(
            replace(_ratio_series("least time", ratios, "time", "circle", comparison), dashed=True)
        )
        markers += _crossing_markers("least time", ratios)
        markers += _crossing_markers("bytes, none cached", comparison.ratios("upper"))
    lower, upper = dict(comparison.ratios("lower")), dict(comparison.ratios("upper"))
    tokens = [count for count in lower if count in upper]
    low = [min(lower[count], upper[count]) for count in tokens]
    high = [max(lower[count], upper[count]) for count in tokens]
    bands = [Band(tokens, low, high, "bytes")]
    model = Series("bytes, model", tokens, list(lower.values()), "bytes", True, markers=False)
    ours, other = comparison.ours.title, comparison.other.title
    title = f"{ours} over {other}"
    ends = [*low, *high, *(y for one in series for y in one.y), 1.0]
    y_axis = Axis(
        "ratio: below 1, ours is less",
        log=True,
        format=_ratio_text,
        ticks=_ratio_ticks(min(ends), max(ends)),
    )
    chart = svg.line_chart(
        [model, *series],
        _token_axis([pair.tokens for pair in comparison.pairs]),
        y_axis,
        title=_with_origin(f"{title}, {comparison.phase}, {preset.name}", measured),
        markers=markers,
        rules=[1.0],
        bands=bands,
        frame=_FRAME,
        end_labels=False,
    )
    said = "ratios by tokens; shaded: bytes by the model, repeated rows cached (dashed) or never"
    return figure(_with_origin(title, measured), said, _legend([*series, model]), chart)


def roofline_figure(scene: Scene) -> str:
    """FLOP/s against FLOPs per byte under both ceilings; without times, points on the ceiling.

    Nothing of the optimizer's step, which has next to no FLOPs.
    """
    if scene.phase == "optimizer":
        return ""
    ceilings = scene.profile.ceilings
    series: list[Series] = []
    drawn = [
        (subject, look, [p for p in points if p.flops > 0 and p.needed.lower > 0])
        for subject, look, points in scene.drawn()
    ]
    measured = any(p.seconds for _, _, points in drawn for p in points)
    for which, (subject, look, points) in enumerate(drawn):
        timed = [(p, p.seconds if measured else p.floor_seconds(ceilings)) for p in points]
        placed = [(p, seconds) for p, seconds in timed if seconds]
        if placed:
            series.append(
                Series(
                    subject.title,
                    [p.flops / p.needed.lower for p, _ in placed],
                    [p.flops / seconds for p, seconds in placed],
                    look.style,
                    shape=look.shape,
                    markers_only=not measured,
                    hollow=not measured,
                    labels=[whole(p.tokens) for p, _ in placed],
                    # Ours and the first it is compared with: further ones lie close to that.
                    labelled=which < 2,
                )
            )
    if not series:
        return ""
    peak, bandwidth = ceilings.matmul_flops_per_second, ceilings.copy_bytes_per_second
    ridge = peak / bandwidth
    left = min(0.8 * min(x for one in series for x in one.x), ridge / 2)
    right = max(1.25 * max(x for one in series for x in one.x), ridge * 2)
    roof = Series(
        f"{bandwidth / 1e12:.2f} TB/s and {peak / 1e12:,.0f} TFLOP/s",
        [left, ridge, right],
        [left * bandwidth, peak, peak],
        "quiet",
        markers=False,
    )
    title = "Roofline"
    chart = svg.line_chart(
        [roof, *series],
        Axis("FLOPs a byte, of the least bytes", log=True, format=short),
        Axis("TFLOP/s", log=True, format=lambda rate: short(rate / 1e12)),
        title=_with_origin(_spoken(title, scene), measured),
        frame=_ROOFLINE_FRAME,
        end_labels=False,
    )
    said = (
        "numbers beside points: tokens; the line above: "
        f"{'measured' if ceilings.measured else 'assumed'} ceilings, {roof.name}"
    )
    return figure(_with_origin(title, measured), said, _legend([*series, roof]), chart, "wide")


def figure(
    title: str, said: str, legend: Sequence[tuple[str, str]], chart: str, style: str = ""
) -> str:
    """A chart under its title and legend; ``legend``: (markup of the key, name)."""
    kind = f' class="{style}"' if style else ""
    items = "".join(f"<li>{mark}{escape(name)}</li>" for mark, name in legend)
    return (
        f"<figure{kind}><figcaption><strong>{escape(title)}</strong> {escape(said)}</figcaption>"
        f'<ul class="legend">{items}</ul><div class="scroll">{chart}</div></figure>'
    )


def _figure(
    title: str,
    said: str,
    series: Sequence[Series],
    y_axis: Axis,
    scene: Scene,
    *,
    measured: bool = True,
    bands: Sequence[Band] = (),
) -> str:
    """A chart of quantities by tokens."""
    if not series:
        return ""
    chart = svg.line_chart(
        series,
        _token_axis(scene.tokens()),
        y_axis,
        title=_with_origin(_spoken(title, scene), measured),
        bands=bands,
        frame=_FRAME,
        end_labels=False,
    )
    legend = [
        (svg.key(look.style, look.shape, dashed=not measured), subject.title)
        for subject, look, _ in scene.drawn()
    ]
    return figure(_with_origin(title, measured), said, legend, chart)


def _alone(series: Series) -> Series:
    """A line of the model that no measured one stands beside."""
    return replace(series, markers=True, hollow=True)


def _line(
    name: str, scene: Scene, points: Sequence[Point], quantity: Quantity, look: Look
) -> Series:
    """One quantity by tokens where it is known, dashed."""
    found = ((point.tokens, value(scene.profile, point, quantity)) for point in points)
    known = [(tokens, number) for tokens, number in found if number]
    xs, ys = [tokens for tokens, _ in known], [number for _, number in known]
    return Series(name, xs, ys, look.style, dashed=True, markers=False, shape=look.shape)


def _ratio_series(
    name: str,
    ratios: Sequence[tuple[int, float]],
    style: str,
    shape: svg.Shape,
    comparison: Comparison,
) -> Series:
    ranges = [pair.time_range for pair in comparison.pairs if pair.ratio("time") is not None]
    return Series(
        name,
        [tokens for tokens, _ in ratios],
        [ratio for _, ratio in ratios],
        style,
        shape=shape,
        ranges=[span for span in ranges if span is not None] if name == "time" else (),
    )


def _crossing_markers(name: str, ratios: Sequence[tuple[int, float]]) -> list[Marker]:
    return [Marker(crossing.tokens, f"{name}: {crossing.about}") for crossing in crossings(ratios)]


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    return [
        (svg.key(one.style, one.shape, dashed=one.dashed, marked=one.markers), one.name)
        for one in series
    ]


def _token_axis(tokens: Sequence[int]) -> Axis:
    return Axis(_TOKENS, log=True, format=whole, ticks=tokens)


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Powers of two around the range, few enough to be read."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    step = max(1, math.ceil((last - first) / 8))
    # 1 is always among them.
    return [2.0**power for power in range(-(-first // step) * step, last + 1, step)]


def _ratio_text(ratio: float) -> str:
    return f"1/{short(1 / ratio)}" if ratio < 1 else short(ratio)


def _with_origin(title: str, measured: bool) -> str:
    return title if measured else f"{title} (model only, nothing measured)"


def _spoken(title: str, scene: Scene) -> str:
    """For screen readers, who do not see under which heading a chart stands."""
    names = ", ".join(subject.title for subject, _, _ in scene.drawn())
    return f"{title}, {scene.phase}, {scene.preset.name}: {names}"


FIGURES: Sequence[Callable[[Scene], str]] = (
    time_figure,
    bytes_figure,
    energy_figure,
    achieved_figure,
    roofline_figure,
)
"""Those drawn for each group of compared subjects."""
