"""The tables of a profile, as HTML. What was not measured is said in words; a column of which
nothing was measured is left out and named below the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ultramem_cuda.reporting.numbers import significant, whole
from ultramem_cuda.reporting.page import Markup, escape, swatch, table

from .analysis import (
    HEADLINE_TOKENS,
    NOT_MEASURED,
    Comparison,
    Quantity,
    compare,
    disagreements,
    outcome,
    value,
)
from .charts import looks
from .record import Agreement, Phase, Point, Preset, Profile

MISSING = Markup(f'<span class="missing">{NOT_MEASURED}</span>')
UNAVAILABLE = Markup('<span class="missing">unavailable</span>')

Column = tuple[str, Callable[[Any], str | None]]
"""Header, and the cell of an item; None where there is nothing to show."""


def number(amount: float | None, unit: float = 1.0, digits: int = 4) -> str | None:
    """An amount in a unit."""
    return None if amount is None else significant(amount / unit, digits)


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"


def columns_table(columns: Sequence[Column], items: Sequence[Any], caption: str) -> str:
    """A scrollable table of the columns that have something to show."""
    cells = {header: [cell(item) for item in items] for header, cell in columns}
    shown = [header for header, column in cells.items() if any(text is not None for text in column)]
    left_out = [header for header in cells if header not in shown]
    rows = [
        [MISSING if cells[header][i] is None else cells[header][i] or "" for header in shown]
        for i in range(len(items))
    ]
    html = scrolled(table(shown, rows, caption=caption))
    if left_out:
        html += f'<p class="quiet">Not measured here: {escape("; ".join(left_out))}.</p>'
    return html


def wrapped(text: str, style: str = "note") -> Markup:
    """What may take several lines of a cell."""
    return Markup(f'<span class="{style}">{escape(text)}</span>' if text else "")


def scrolled(html: str) -> str:
    # Focusable: a keyboard must be able to scroll what does not fit.
    return f'<div class="scroll" tabindex="0">{html}</div>'


def summary_table(profile: Profile, phase: Phase) -> str:
    """All comparisons at the headline's number of tokens, and how far each advantage reaches."""
    found = [
        (preset, comparison)
        for preset in profile.presets
        for comparison in compare(profile, preset, phase)
    ]
    tokens = HEADLINE_TOKENS[phase]

    def ratio(quantity: Quantity) -> Callable[[tuple[Preset, Comparison]], str | None]:
        return lambda row: number(row[1].at(tokens).ratio(quantity), digits=3)

    def reach(quantity: Quantity) -> Callable[[tuple[Preset, Comparison]], str | None]:
        def cell(row: tuple[Preset, Comparison]) -> str | None:
            words = outcome(row[1], quantity)
            return None if words is None else wrapped(words, "words")

        return cell

    # Without times, the least ones.
    time: Quantity = "time" if any(row[1].ratios("time") for row in found) else "floor"
    columns: Sequence[Column] = [
        ("preset", lambda row: row[0].name),
        ("ours", lambda row: row[1].ours.title),
        ("over", lambda row: row[1].other.title),
        ("tokens", lambda row: whole(row[1].at(tokens).tokens)),
        ("time" if time == "time" else "least time", ratio(time)),
        ("bytes, NVML", ratio("nvml")),
        ("bytes, model, repeats cached", ratio("lower")),
        ("never cached", ratio("upper")),
        ("energy", ratio("energy")),
        ("time is" if time == "time" else "least time is", reach(time)),
        ("bytes by NVML are", reach("nvml")),
        ("by the model, never cached", reach("upper")),
    ]
    caption = f"{phase}: ratios, and up to how many tokens they are less or more"
    return columns_table(columns, found, caption)


def subjects_table(preset: Preset) -> str:
    styles = looks(preset.subjects)
    rows = [
        [
            swatch(styles[subject.name].style, subject.title),
            subject.detail,
            f"{subject.active_parameters:,}",
            f"{subject.total_parameters:,}",
        ]
        for subject in preset.subjects
    ]
    header = ["subject", "sizes", "active parameters", "total parameters"]
    return scrolled(table(header, rows, caption=f"Subjects of {preset.name}"))


def ratio_table(comparison: Comparison, preset: Preset) -> str:
    """The ratios at every number of tokens."""

    def ratio(quantity: Quantity) -> Callable[[Any], str | None]:
        return lambda pair: number(pair.ratio(quantity), digits=3)

    def range_text(pair: Any) -> str | None:
        span = pair.time_range
        return None if span is None else f"{significant(span[0])} to {significant(span[1])}"

    columns: Sequence[Column] = [
        ("tokens", lambda pair: whole(pair.tokens)),
        ("time", ratio("time")),
        ("between quartiles", range_text),
        ("least time", ratio("floor")),
        ("bytes, NVML", ratio("nvml")),
        ("bytes, model, repeats cached", ratio("lower")),
        ("never cached", ratio("upper")),
        ("energy", ratio("energy")),
    ]
    subjects = f"{comparison.ours.title} over {comparison.other.title}"
    caption = f"{preset.name}, {comparison.phase}: {subjects}"
    return columns_table(columns, comparison.pairs, caption)


def points_table(profile: Profile, preset: Preset, phase: Phase) -> str:
    """Every number of every subject."""
    styles = looks(preset.subjects)
    titles = {subject.name: subject.title for subject in preset.subjects}
    points = [
        point
        for subject in preset.subjects
        for point in profile.select(preset.name, subject.name, phase)
    ]

    def sampled(name: str, unit: float) -> Callable[[Point], str | None]:
        return lambda point: number(getattr(point.sampled, name, None), unit)

    def timing(name: str) -> Callable[[Point], str | None]:
        return lambda point: number(getattr(point.timing, name, None), 1e-3)

    def nvml_over_model(point: Point) -> str | None:
        nvml = value(profile, point, "nvml")
        return None if nvml is None else number(nvml / point.needed.lower, digits=3)

    def throttle(point: Point) -> str | None:
        return None if point.sampled is None else ", ".join(point.sampled.throttle_reasons)

    def per_token(point: Point) -> str | None:
        return number(point.joules_per_token(), 1e-3)

    def share(name: str) -> Callable[[Point], str | None]:
        return lambda point: percent(getattr(point.sampled, name, None))

    columns: Sequence[Column] = [
        ("subject", lambda p: swatch(styles[p.subject].style, titles[p.subject])),
        ("tokens", lambda p: whole(p.tokens)),
        ("time, µs", timing("median_ms")),
        ("quartile 1, µs", timing("q1_ms")),
        ("quartile 3, µs", timing("q3_ms")),
        ("least time, µs", lambda p: number(p.floor_seconds(profile.ceilings), 1e-6)),
        ("of the roofline, %", lambda p: percent(p.achieved(profile.ceilings))),
        ("GFLOP", lambda p: number(p.flops, 1e9)),
        ("model, repeats cached, MB", lambda p: number(p.needed.lower, 1e6)),
        ("never cached, MB", lambda p: number(p.needed.upper, 1e6)),
        ("distinct counted", lambda p: "in the run" if p.counted else "expected"),
        ("NVML, MB", sampled("bytes", 1e6)),
        ("NVML over model, repeats cached", nvml_over_model),
        ("energy a token, mJ", per_token),
        ("energy of a pass, mJ", sampled("joules", 1e-3)),
        ("above idle, mJ", sampled("joules_above_idle", 1e-3)),
        ("SMs busy, %", share("sm_utilization")),
        ("occupancy, %", share("sm_occupancy")),
        ("tensor cores busy, %", share("tensor_utilization")),
        ("SM clock, MHz", sampled("sm_clock_mhz", 1.0)),
        ("clocks held back by", throttle),
        ("note", lambda p: wrapped(p.note)),
    ]
    return columns_table(columns, points, f"{preset.name}, {phase}: all numbers of one pass")


def agreement_table(rows: Sequence[Agreement]) -> str:
    """The three counts side by side, ratios, and the verdict; missing counts are unavailable."""

    def amount(count: float | None) -> str:
        return number(count, 1e6) or UNAVAILABLE

    def over(count: float | None, other: float | None) -> str:
        return UNAVAILABLE if count is None or not other else significant(count / other)

    header = ["pass", "model, MB", "NVML, MB", "ncu, MB", "ncu read, MB", "ncu written, MB"]
    header += ["NVML over model", "ncu over model", "NVML over ncu", "within 15%", "why not"]
    cells = [
        [
            row.what,
            amount(row.model),
            amount(row.nvml),
            amount(row.ncu),
            amount(row.ncu_read),
            amount(row.ncu_write),
            over(row.nvml, row.model),
            over(row.ncu, row.model),
            over(row.nvml, row.ncu),
            _agrees(row),
            wrapped(row.note),
        ]
        for row in rows
    ]
    return scrolled(table(header, cells, caption="Bytes of one pass, counted in three ways"))


def _agrees(row: Agreement) -> Markup:
    apart = disagreements(row)
    if apart:
        return Markup(f'<span class="bad">no: {escape(", ".join(apart))}</span>')
    if row.nvml is None and row.ncu is None:
        return MISSING
    partly = row.nvml is None or row.ncu is None
    return Markup(f'<span class="good">yes{", of those available" if partly else ""}</span>')


def machine_table(facts: Mapping[str, Any]) -> str:
    rows = [
        [name, text if isinstance(text, Markup) else wrapped(text)]
        for name, text in _flattened(facts, "")
    ]
    return scrolled(table(["machine", ""], rows, caption="Where it ran"))


def _flattened(facts: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    """Nested facts as dotted names."""
    rows: list[tuple[str, str]] = []
    for name, fact in facts.items():
        if isinstance(fact, Mapping):
            rows += _flattened(fact, f"{prefix}{name}.")
        else:
            text = significant(fact, 4) if isinstance(fact, float) else str(fact)
            rows.append((f"{prefix}{name}", UNAVAILABLE if fact is None else text))
    return rows
