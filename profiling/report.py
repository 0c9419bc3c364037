"""The files of ``ultramem profile``: the record as JSON and CSV, and a page to look at it.

The page needs no network and no script, and embeds the record. Without measurements it shows the
model alone and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ultramem_cuda.reporting.page import STYLE, document, escape

from . import charts, tables
from .analysis import (
    HEADLINE_TOKENS,
    PHASES,
    TOLERANCE,
    Comparison,
    Quantity,
    compare,
    crossings,
    disagreements,
    findings,
    listing,
    matching,
    share,
    throttled,
    tokens_text,
    verdict,
)
from .charts import Scene
from .presets import ACTIVE_TOLERANCE, TOTAL_TOLERANCE
from .record import Phase, Preset, Profile, Subject
from .timing import write_text

JSON_NAME, CSV_NAME, HTML_NAME = "profile.json", "profile.csv", "report.html"

_PHASE_TITLES: dict[Phase, str] = {
    "decode": "Decode: a forward pass without gradients",
    "training": "Training: a forward and its backward pass",
    "optimizer": "The optimizer's step",
}
_STYLE = """
body { max-width: 84rem; } h3 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
h4 { font-size: 1rem; margin: 1.8rem 0 .5rem; } li { max-width: 46rem; margin: .2rem 0; }
a { color: var(--accent); } nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem;
  list-style: none; padding: 0; } nav { border-bottom: 1px solid var(--rule); }
.notice { border-left: 4px solid var(--bad); background: var(--panel); padding: .6rem .9rem;
  max-width: 46rem; } .verdict { max-width: 54rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
  margin: 1rem 0; padding: 0; max-width: 60rem; }
.tiles div { background: var(--panel); border-radius: 6px; padding: .7rem .9rem; }
.tiles dt { color: var(--quiet); font-size: .86rem; } .tiles dd { margin: 0; }
.tiles .big { font-size: 1.75rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles .of { color: var(--quiet); font-size: .86rem; }
.charts { display: grid; gap: 1.6rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.charts > * { min-width: 0; } .pair { align-items: start; }
figure { margin: 0; break-inside: avoid; display: flex;
  flex-direction: column; } figure .scroll { margin-top: auto; }
.columns { display: grid; gap: .5rem 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.columns h4 { margin: .8rem 0 .3rem; } .columns ul { padding-left: 1.2rem; }
figcaption { font-size: .92rem; color: var(--quiet); } figcaption strong { color: var(--ink); }
figure svg { min-width: 0; } figure.wide { max-width: 62rem; grid-column: 1 / -1; }
figure.wide svg:not(.key) { min-width: 38rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; margin: .3rem 0;
  padding: 0; font-size: .86rem; } .legend li { margin: 0; white-space: nowrap; }
svg.key { display: inline-block; width: 30px; min-width: 30px; height: 12px; margin-right: .4em;
  vertical-align: -1px; }
caption { text-align: left; color: var(--quiet); padding-bottom: .3rem; }
thead th { vertical-align: bottom; line-height: 1.3; max-width: 8rem; } td { white-space: nowrap; }
.note, .words { display: inline-block; white-space: normal; }
.words { min-width: 7rem; } .note { min-width: 16rem; overflow-wrap: anywhere; }
.missing { color: var(--quiet); font-style: italic; font-size: .92em; white-space: normal; }
.big .missing { font-size: 1.1rem; } table { font-size: .86rem; }
.pair div > ul { margin: 0 0 1rem; padding-left: 1.2rem; }
svg .band { opacity: .13; } svg .rule { stroke: var(--ink); stroke-width: 1.2; }
svg .small { font-size: 11px; }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
@media (max-width: 36rem) { body { padding: 1rem .8rem 3rem; } figure svg text { font-size: 15px; }
  figure svg .small { font-size: 14px; } .tiles { grid-template-columns: 1fr 1fr; }
  .tiles .big { font-size: 1.4rem; } }
@page { size: landscape; }
@media print { nav { display: none; } .scroll { overflow: visible; } table { font-size: .6rem; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .charts { grid-template-columns: 1fr 1fr; } h2, h3, h4 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Files:
    """Where they were written."""

    json: Path
    csv: Path
    html: Path


def write(profile: Profile, folder: Path) -> Files:
    """Writes profile.json, profile.csv and report.html into ``folder``, each whole or not at all.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the record holds NaN or infinity.
    """
    files = Files(folder / JSON_NAME, folder / CSV_NAME, folder / HTML_NAME)
    profile.write_json(files.json)
    profile.write_csv(files.csv)
    write_text(files.html, render(profile))
    return files


def render(profile: Profile) -> str:
    """The whole page; it links to the JSON and the CSV beside it."""
    anchors = _anchors(profile)
    sections = [
        _head(profile),
        _navigation(profile, anchors),
        _summary(profile),
        *(_preset(profile, preset, anchors[preset.name]) for preset in profile.presets),
        _agreement(profile),
        _machine(profile),
        _method(profile),
    ]
    body = "\n".join(section for section in sections if section)
    return document("ultramem profile", STYLE + charts.COLOURS + _STYLE, body, profile.to_json())


def _anchors(profile: Profile) -> dict[str, str]:
    """An id for each preset's section: their names may hold anything."""
    return {preset.name: f"preset-{i}" for i, preset in enumerate(profile.presets, 1)}


def _head(profile: Profile) -> str:
    where = profile.machine.get("gpu") or profile.machine.get("cpu") or "unknown machine"
    when = profile.machine.get("time", "at an unknown time")
    parts = [
        "<h1>Memory access against MoE dispatch</h1>",
        f'<p class="quiet"><code>ultramem profile</code> · {escape(str(where))} · '
        f'{escape(str(when))} · <a href="{JSON_NAME}">JSON</a> · <a href="{CSV_NAME}">CSV</a></p>',
    ]
    if not profile.measured:
        parts.append(
            '<p class="notice"><strong>Model only: nothing was measured.</strong> Times are the '
            "least that the roofline allows, bytes are those of the model; the reasons are in the "
            '<a href="#machine">notes</a>.</p>'
        )
    return "\n".join(parts)


def _navigation(profile: Profile, anchors: dict[str, str]) -> str:
    links = [("summary", "Summary"), *((anchors[p.name], p.name) for p in profile.presets)]
    links += [("agreement", "Agreement of the counts"), ("machine", "Machine and notes")]
    links += [("method", "How to read this")]
    items = "".join(f'<li><a href="#{anchor}">{escape(text)}</a></li>' for anchor, text in links)
    return f'<nav aria-label="Sections"><ul>{items}</ul></nav>'


def _summary(profile: Profile) -> str:
    parts = ['<section id="summary"><h2>Summary</h2>']
    for preset in profile.presets:
        found = {phase: compare(profile, preset, phase) for phase in PHASES}
        compared = [phase for phase in PHASES if found[phase]]
        if not compared:
            continue
        first = _first(found[compared[0]])
        heading = f"{preset.name}: {first.ours.title} against {first.other.title}"
        parts.append(f"<h3>{escape(heading)}</h3>{_tiles(first)}")
        parts.append('<div class="columns">')
        for phase in compared:
            first = _first(found[phase])
            reach = "".join(f"<li>{escape(text)}</li>" for text in findings(first)[1:])
            parts.append(
                f"<div><h4>{_PHASE_TITLES[phase]}</h4>"
                f'<p class="verdict">{escape(verdict(first))}</p><ul>{reach}</ul></div>'
            )
        parts.append("</div>")
    phases = [p for p in PHASES if any(compare(profile, preset, p) for preset in profile.presets)]
    if phases:
        parts.append(
            "<h3>All comparisons</h3><p>Ratios of ours over the other: below 1, ours is less.</p>"
        )
        parts += [tables.summary_table(profile, phase) for phase in phases]
    else:
        parts.append("<p>No two subjects that are to be compared have points at equal tokens.</p>")
    return "\n".join([*parts, "</section>"])


def _first(found: list[Comparison]) -> Comparison:
    """The one the headline is about: whole blocks where there are any."""
    return next((one for one in found if one.ours.kind == "block"), found[0])


def _tiles(comparison: Comparison) -> str:
    """The headline's ratios, and how far the advantage in time and in bytes reaches."""
    pair = comparison.at(HEADLINE_TOKENS[comparison.phase])
    timed, counted = pair.ratio("time") is not None, pair.ratio("nvml") is not None
    time: tuple[str, Quantity] = ("Time", "time") if timed else ("Least time by the model", "floor")
    moved: tuple[str, Quantity] = (
        ("Bytes by NVML", "nvml")
        if counted
        else (
            "Bytes by the model, never cached",
            "upper",
        )
    )
    versus = f"of {comparison.other.title} at {tokens_text(pair.tokens)}"
    tiles = [
        (name, None if ratio is None else share(ratio).removesuffix(" of"), versus)
        for name, ratio in (
            (name, pair.ratio(quantity)) for name, quantity in (time, moved, ("Energy", "energy"))
        )
    ]
    tiles += [_reach_tile(comparison, *one) for one in (time, moved)]
    items = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="big">'
        f"{tables.MISSING if big is None else escape(big)}</dd>"
        f'<dd class="of">{escape(of)}</dd></div>'
        for name, big, of in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _reach_tile(comparison: Comparison, name: str, quantity: Quantity) -> tuple[str, str, str]:
    ratios = comparison.ratios(quantity)
    found = crossings(ratios)
    if found and found[-1].rising:
        before = f"; more below {found[-2].about}" if len(found) > 1 else ""
        return f"{name}: less up to", found[-1].about, f"tokens, then more{before}"
    if found:
        return f"{name}: less from", found[-1].about, "tokens on, to the last"
    last = f"{ratios[-1][0]:,}"
    if all(ratio <= 1 for _, ratio in ratios):
        return f"{name}: less up to", last, "tokens, the last: no crossover"
    return f"{name}: more up to", last, "tokens: no advantage"


def _preset(profile: Profile, preset: Preset, anchor: str) -> str:
    parts = [f'<section id="{anchor}"><h2>{escape(preset.name)}, d {preset.d_model}</h2>']
    parts.append(tables.subjects_table(preset))
    found = {phase: compare(profile, preset, phase) for phase in PHASES}
    matches = dict.fromkeys(matching(one) for phase in PHASES for one in found[phase])
    if matches:
        parts.append(f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in matches)}</ul>")
    for phase in PHASES:
        if any((p.preset, p.phase) == (preset.name, phase) for p in profile.points):
            parts.append(_phase(profile, preset, phase, found[phase]))
        else:
            parts.append(f'<p class="quiet">{_PHASE_TITLES[phase]}: not part of this profile.</p>')
    return "\n".join([*parts, "</section>"])


def _phase(profile: Profile, preset: Preset, phase: Phase, found: list[Comparison]) -> str:
    parts = [f"<h3>{_PHASE_TITLES[phase]}</h3>"]
    for subjects in _groups(found) or [list(preset.subjects)]:
        scene = Scene(profile, preset, phase, subjects)
        figures = [draw(scene) for draw in charts.FIGURES]
        titles = listing([subject.title for subject, _, _ in scene.drawn()])
        parts.append(f"<h4>{escape(titles)}</h4>")
        parts.append(f'<div class="charts">{"".join(figures)}</div>')
    for comparison in found:
        sentences = "".join(f"<li>{escape(text)}</li>" for text in findings(comparison))
        parts.append(
            f"<h4>{escape(comparison.ours.title)} against {escape(comparison.other.title)}</h4>"
            f'<div class="charts pair">{charts.ratio_figure(comparison, preset)}'
            f"<div><ul>{sentences}</ul>{tables.ratio_table(comparison, preset)}</div></div>"
        )
    parts.append(
        "<details><summary>All numbers</summary>"
        f"{tables.points_table(profile, preset, phase)}</details>"
    )
    return "\n".join(parts)


def _groups(found: list[Comparison]) -> list[list[Subject]]:
    """Each of ours with everything it is compared with: one group of charts."""
    groups: dict[str, list[Subject]] = {}
    for comparison in found:
        groups.setdefault(comparison.ours.name, [comparison.ours]).append(comparison.other)
    return list(groups.values())


def _agreement(profile: Profile) -> str:
    parts = ['<section id="agreement"><h2>Do the model, NVML and ncu agree?</h2>']
    if not profile.agreement:
        parts.append("<p>Not measured: bytes were not counted in more than one way.</p>")
        return "\n".join([*parts, "</section>"])
    apart = [row for row in profile.agreement if disagreements(row)]
    names = listing([row.what for row in apart])
    parts.append(
        f"<p>{len(profile.agreement) - len(apart)} of {len(profile.agreement)} have no two counts "
        f"further apart than {TOLERANCE:.0%}.{f' Not so: {escape(names)}.' if apart else ''}</p>"
    )
    parts.append(tables.agreement_table(profile.agreement))
    unexplained = listing([row.what for row in apart if not row.note])
    if unexplained:
        parts.append(f'<p class="bad">Not explained: {escape(unexplained)}.</p>')
    return "\n".join([*parts, "</section>"])


def _machine(profile: Profile) -> str:
    ceilings = profile.ceilings
    origin = "measured in this run" if ceilings.measured else "assumed, those of an H100"
    bandwidth, rate = ceilings.copy_bytes_per_second / 1e12, ceilings.matmul_flops_per_second / 1e12
    notes = [
        f"Ceilings, {origin}: {bandwidth:.2f} TB/s (a large copy, reads and writes), "
        f"{rate:,.0f} TFLOP/s (matrix product).",
        *profile.notes,
        *(
            f"Clocks were held back ({reason}) at {count} of {len(profile.points)} points."
            for reason, count in throttled(profile).items()
        ),
    ]
    again = (
        f"<p>To repeat it:</p><p><code>{escape(profile.command)}</code></p>"
        if profile.command
        else ""
    )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        '<section id="machine"><h2>Machine, and what was not measured</h2>'
        f"<ul>{items}</ul>{tables.machine_table(profile.machine)}{again}</section>"
    )


def _method(profile: Profile) -> str:
    items = [
        "<strong>Tokens</strong> are those of one pass through one layer.",
        "<strong>Bytes by the model</strong> are parameters and activations that a pass has to "
        "move. Rows or experts that several tokens use are counted once (repeats cached, the "
        "lower bound) or for every use (never cached, the upper); a real pass is expected between, "
        "or below where activations stay in the cache. Where "
        "the run counted the distinct ones that its inputs used, that count is taken instead of "
        "the expectation for uniform choices.",
        "<strong>The least time</strong> (floor) is the longer of the lower bound over the copy "
        "bandwidth and the FLOPs over the rate of a matrix product. The achieved fraction is the "
        "floor over the time. In the roofline, FLOPs a byte are of the same lower bound, so the "
        "distance to the line above is the achieved fraction.",
        "<strong>Crossovers</strong> are interpolated between neighbouring numbers of tokens, on "
        "logarithmic axes; both neighbours are named.",
        f"<strong>Matched</strong> means that active parameters differ by at most "
        f"{ACTIVE_TOLERANCE:.0%}, and all together by at most {TOTAL_TOLERANCE:.0%}.",
    ]
    if profile.measured:
        items[1:1] = [
            "<strong>Time</strong> is the median on the device, with quartiles. Decode runs as a "
            "CUDA graph of many passes over inputs and parameters that rotate, so that caches are "
            "as cold as between the layers of a model. Training adds to gradients that are there: "
            "autograd writes those of dense parameters and experts anew, reads them and adds them, "
            "which is more than the model counts; of a table it leaves factors, and what makes "
            "gradients of them is part of the optimizer's step, counted by the model alone.",
            "<strong>Bytes by NVML</strong> come from the DRAM utilisation over a long window in "
            "which passes follow each other, less that of the idle GPU, calibrated by a copy of "
            "known size in the same run. <strong>Energy</strong> is the GPU's over that window, "
            "what it draws idle included, unless said otherwise.",
        ]
    return (
        '<section id="method"><h2>How to read this</h2><ul>'
        f"{''.join(f'<li>{item}</li>' for item in items)}</ul></section>"
    )
