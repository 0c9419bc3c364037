"""The page of a profile: whole, self-contained, and saying what the record says."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_profile as synthetic
from html_page import Page

from ultramem_cuda.profiling import analysis, charts, report
from ultramem_cuda.profiling.record import Preset, Profile, Subject, read_json
from ultramem_cuda.reporting.numbers import short, significant

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"y\"> & 'q' <!--"


def some() -> Profile:
    """One comparison, in decode alone."""
    profile = synthetic.full()
    kept = [p for p in profile.points if p.subject in ("block", "moe") and p.phase == "decode"]
    return dataclasses.replace(profile, points=tuple(kept), agreement=(), command="")


def lonely() -> Profile:
    """Points of one subject: nothing to compare."""
    return synthetic.profile_of([synthetic.point("memory", 4, 1e-3)])


def empty() -> Profile:
    return synthetic.profile_of([])


def hostile() -> Profile:
    profile = synthetic.full()
    preset = profile.presets[0]
    subjects = tuple(
        dataclasses.replace(s, title=s.title + HOSTILE, detail=HOSTILE) for s in preset.subjects
    )
    return dataclasses.replace(
        profile,
        machine={"gpu": HOSTILE, "nested": {HOSTILE: HOSTILE}},
        presets=(dataclasses.replace(preset, name=HOSTILE, subjects=subjects),),
        points=tuple(dataclasses.replace(p, preset=HOSTILE, note=HOSTILE) for p in profile.points),
        agreement=tuple(
            dataclasses.replace(row, what=row.what + HOSTILE, note=HOSTILE)
            for row in profile.agreement
        ),
        notes=(HOSTILE,),
        command=HOSTILE,
    )


EVERY = [synthetic.full, synthetic.model_only, some, lonely, empty, hostile]


@pytest.mark.parametrize("build", EVERY)
def test_page_is_well_formed_and_loads_nothing(build: Callable[[], Profile]) -> None:
    content = report.render(build())
    page = Page(content)
    assert content.startswith("<!DOCTYPE html>")
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not [name for name in attributes if name == "src" or name.startswith("on")]
    assert [a.get("type") for tag, a in page.tags if tag == "script"] == ["application/json"]
    assert not re.search(r"https?:|url\(|@import", content)
    assert "prefers-color-scheme: dark" in content


@pytest.mark.parametrize("build", EVERY)
def test_links_lead_somewhere(build: Callable[[], Profile], tmp_path: Path) -> None:
    files = report.write(build(), tmp_path / "out")
    page = Page(files.html.read_text(encoding="utf-8"))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    links = page.attributes("href")
    assert {"profile.json", "profile.csv"} <= set(links)
    for link in links:
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert (files.html.parent / link).is_file()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "profile.csv",
        "profile.json",
        "report.html",
    ]


@pytest.mark.parametrize("build", EVERY)
def test_embedded_data_is_the_record(build: Callable[[], Profile], tmp_path: Path) -> None:
    profile = build()
    files = report.write(profile, tmp_path)
    page = Page(files.html.read_text(encoding="utf-8"))
    assert Profile.from_json(json.loads(page.all_text("script"))) == profile
    assert read_json(files.json) == profile


@pytest.mark.parametrize("build", EVERY)
def test_charts_and_tables_can_be_read_aloud(build: Callable[[], Profile]) -> None:
    page = Page(report.render(build()))
    for tag, attributes in page.tags:
        if tag == "svg":
            assert (attributes.get("role") == "img" and attributes.get("aria-label")) or (
                attributes.get("aria-hidden") == "true"
            )
        if tag == "th":
            assert attributes["scope"] == "col"
    assert "" not in page.tables
    assert [tag for tag, _ in page.tags].count("table") == len(page.tables)


@pytest.mark.parametrize("build", EVERY)
def test_nothing_is_drawn_outside_its_chart(build: Callable[[], Profile]) -> None:
    found = re.findall(
        r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)" role="img".*?</svg>', report.render(build()), re.S
    )
    whole = re.findall(r'<svg viewBox="[^"]+" role="img".*?</svg>', report.render(build()), re.S)
    for (width, height), chart in zip(found, whole, strict=True):
        assert "nan" not in chart
        lines = re.findall(r'points="([^"]+)"', chart)
        corners = [pair.split(",") for line in lines for pair in line.split()]
        corners += re.findall(r'<path class="point"[^>]*d="M([-\d.]+) ([-\d.]+)', chart)
        corners += re.findall(r'<text class="[^"]*" (?:style="[^"]*" )?x="(.*?)" y="(.*?)"', chart)
        assert corners
        for x, y in corners:
            assert 0 <= float(x) <= float(width)
            assert 0 <= float(y) <= float(height)


def test_tables_say_what_the_record_says() -> None:
    profile = synthetic.full()
    page = Page(report.render(profile))
    caption = "tiny, decode: all numbers of one pass"
    points = [
        point
        for subject in profile.presets[0].subjects
        for point in profile.select("tiny", subject.name, "decode")
    ]
    titles = {s.name: s.title for s in profile.presets[0].subjects}
    assert page.column(caption, "subject") == [titles[p.subject] for p in points]
    assert page.column(caption, "tokens") == [f"{p.tokens:,}" for p in points]

    def column(header: str, amount: Callable[..., float | None], digits: int = 4) -> None:
        amounts = [amount(p) for p in points]
        assert None in amounts or header.endswith("cached, MB")
        assert page.column(caption, header) == [
            "not measured" if a is None else significant(a, digits) for a in amounts
        ]

    column("time, µs", lambda p: p.timing and p.timing.median_ms / 1e-3)
    column("quartile 3, µs", lambda p: p.timing and p.timing.q3_ms / 1e-3)
    column("NVML, MB", lambda p: p.sampled and p.sampled.bytes / 1e6)
    column("energy a token, mJ", lambda p: p.sampled and p.sampled.joules / p.tokens / 1e-3)
    column("model, repeats cached, MB", lambda p: p.model.lower / 1e6)
    column("never cached, MB", lambda p: p.model.upper / 1e6)
    achieved = [p.achieved(profile.ceilings) for p in points]
    assert page.column(caption, "of the roofline, %") == [
        "not measured" if a is None else f"{100 * a:.1f}" for a in achieved
    ]
    assert "Did not fit in memory." in page.column(caption, "note")
    # What no point has is named instead of shown.
    assert "tensor cores busy, %" not in page.tables[caption][0]
    assert "tensor cores busy, %" in page.all_text("p")


def test_ratio_tables_have_every_number_of_tokens() -> None:
    profile = synthetic.full()
    page = Page(report.render(profile))
    comparison = analysis.compare(profile, profile.presets[0], "decode")[1]
    caption = "tiny, decode: Memory layer over MoE"
    assert page.column(caption, "tokens") == [f"{tokens:,}" for tokens in synthetic.TOKENS]
    for header, quantity in (("time", "time"), ("bytes, NVML", "nvml"), ("energy", "energy")):
        ratios = [pair.ratio(quantity) for pair in comparison.pairs]  # type: ignore[arg-type]
        assert ratios[-1] is None
        assert page.column(caption, header) == [
            "not measured" if ratio is None else significant(ratio) for ratio in ratios
        ]
    summary = page.tables["decode: ratios, and up to how many tokens they are less or more"]
    assert summary[2][summary[0].index("time")] == significant(comparison.at(64).ratio("time") or 0)


def test_headline_has_the_verdicts() -> None:
    profile = synthetic.full()
    page = Page(report.render(profile))
    for phase in ("decode", "training"):
        comparison = analysis.compare(profile, profile.presets[0], phase)[0]
        assert comparison.ours.kind == "block"
        assert analysis.verdict(comparison) in page.text["p"]
        for sentence in analysis.findings(comparison):
            assert sentence in page.all_text("li") or sentence in page.text["p"]
    text = " ".join(page.text["dl"])
    crossing = analysis.crossings(
        analysis.compare(profile, profile.presets[0], "decode")[0].ratios("time")
    )
    assert short(crossing[0].tokens, 2) in text


def test_agreement_is_judged() -> None:
    page = Page(report.render(synthetic.full()))
    caption = "Bytes of one pass, counted in three ways"
    assert page.column(caption, "within 15%") == [
        "yes",
        "no: NVML +25% against the model",
        "not measured",
        "no: ncu +30% against the model, NVML -19% against ncu",
    ]
    assert page.column(caption, "ncu, MB") == ["1,010", "unavailable", "unavailable", "1,300"]
    assert page.column(caption, "NVML over model") == ["1.02", "1.25", "unavailable", "1.05"]
    assert page.column(caption, "why not")[1] == "Rows share sectors."
    assert "Not explained: MoE forward." in page.text["p"]
    without = Page(report.render(some()))
    assert caption not in without.tables
    assert "Not measured: bytes were not counted in more than one way." in without.text["p"]


def test_model_only_says_so_at_the_top_and_in_every_chart() -> None:
    content = report.render(synthetic.model_only())
    page = Page(content)
    top = content[: content.index("<nav")]
    assert "Model only: nothing was measured." in top
    titles = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert titles
    assert all(title and "(model only, nothing measured)" in title for title in titles)
    shown = re.findall(r"<figcaption><strong>(.*?)</strong>", content)
    assert len(shown) == len(titles)
    assert all("(model only, nothing measured)" in title for title in shown)
    assert "No GPU was found." in page.text["li"]
    assert "assumed, those of an H100" in page.all_text("li")
    header = page.tables["tiny, decode: all numbers of one pass"][0]
    assert "time, µs" not in header
    assert "least time, µs" in header
    # Nothing that was not measured is a zero.
    cells = [cell for rows in page.tables.values() for row in rows for cell in row]
    assert not [cell for cell in cells if re.fullmatch(r"0(\.0*)?", cell)]


def test_a_measured_page_does_not_call_itself_a_model() -> None:
    content = report.render(synthetic.full())
    assert "odel only" not in content
    assert "measured in this run" in content


def test_parts_that_are_not_there_are_named() -> None:
    page = Page(report.render(some()))
    assert "The optimizer's step: not part of this profile." in page.text["p"]
    assert "Training: a forward and its backward pass: not part of this profile." in page.text["p"]
    assert "To repeat it:" not in page.text["p"]
    for build in (lonely, empty):
        nothing = "No two subjects that are to be compared have points at equal tokens."
        assert nothing in Page(report.render(build())).text["p"]
    assert "ultramem profile --out here" in Page(report.render(lonely())).text["code"]


def test_a_lone_subject_is_still_drawn() -> None:
    page = Page(report.render(lonely()))
    titles = [a["aria-label"] or "" for tag, a in page.tags if "aria-label" in a and tag == "svg"]
    assert any(title.startswith("Time, decode, tiny") for title in titles)


def test_times_and_floors_are_told_apart() -> None:
    profile = some()
    preset = profile.presets[0]
    subjects = [s for s in preset.subjects if s.name != "memory"]
    scene = charts.Scene(profile, preset, "decode", subjects)
    lines = re.findall(r'<polyline class="line" style="([^"]+)"[^>]*?(dash[^/]*)?/>', (
        charts.time_figure(scene).split('role="img"')[1]
    ))  # fmt: skip
    assert [bool(dash) for _, dash in lines] == [False, False, True, True]
    assert [style for style, _ in lines] == ["stroke:var(--block)", "stroke:var(--moe)"] * 2


def test_ratio_chart_marks_the_crossing() -> None:
    profile = synthetic.with_ratio(lambda tokens: (tokens / 300) ** 0.5)
    (comparison,) = analysis.compare(profile, profile.presets[0], "decode")
    figure = charts.ratio_figure(comparison, profile.presets[0])
    for name in ("time", "bytes by NVML", "energy"):
        assert f">{name}: 300</text>" in figure
    assert 'class="rule"' in figure
    none = synthetic.with_ratio(lambda tokens: 0.5)
    (comparison,) = analysis.compare(none, none.presets[0], "decode")
    assert 'class="mark"' not in charts.ratio_figure(comparison, none.presets[0])


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.9), (0.9, 1.1), (1 / 500, 3), (1, 1), (2, 90)])
def test_ratio_ticks_hold_one(low: float, high: float) -> None:
    ticks = charts._ratio_ticks(min(low, 1), max(high, 1))
    assert 1.0 in ticks
    assert len(ticks) <= 10
    assert ticks[0] <= max(4 * low, 1)


def test_subjects_look_different() -> None:
    kinds = ("memory", "ffn", "block", "moe", "moe", "moe", "pkm")
    subjects = [Subject(str(i), "", kind, 1, 1, "") for i, kind in enumerate(kinds)]  # type: ignore[arg-type]
    looks = charts.looks(subjects)
    assert len({look.style for look in looks.values()}) == len(kinds)
    assert len({look.shape for look in looks.values()}) == len(kinds)
    for look in looks.values():
        # In the light and in the dark.
        assert charts.COLOURS.count(f"--{look.style}: #") == 2
    more = [*subjects, Subject("x", "", "moe", 1, 1, "")]
    assert charts.looks(more)["x"].style == "spare"


def test_held_back_clocks_are_noted() -> None:
    profile = some()
    first = profile.points[0]
    assert first.sampled is not None
    hot = dataclasses.replace(first.sampled, throttle_reasons=("SW power cap",))
    points = (dataclasses.replace(first, sampled=hot), *profile.points[1:])
    page = Page(report.render(dataclasses.replace(profile, points=points)))
    assert "Clocks were held back (SW power cap) at 1 of 14 points." in page.text["li"]


def test_the_old_files_stay_where_a_record_cannot_be_written(tmp_path: Path) -> None:
    files = report.write(some(), tmp_path)
    before = files.html.read_text(), files.json.read_text(), files.csv.read_text()
    broken = synthetic.profile_of([synthetic.point("moe", 1, float("nan"))])
    with pytest.raises(ValueError, match="JSON compliant"):
        report.write(broken, tmp_path)
    assert (files.html.read_text(), files.json.read_text(), files.csv.read_text()) == before


def test_two_presets_have_sections_of_their_own() -> None:
    profile = some()
    preset = profile.presets[0]
    other = Preset("small", 8, preset.subjects, preset.comparisons)
    more = [dataclasses.replace(p, preset="small") for p in profile.points]
    both = dataclasses.replace(profile, presets=(preset, other), points=(*profile.points, *more))
    page = Page(report.render(both))
    headings = page.text["h2"]
    assert "tiny, d 16" in headings
    assert "small, d 8" in headings
