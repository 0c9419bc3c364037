"""Charts: what stands where."""

from __future__ import annotations

import itertools
import re

import pytest
from html_page import Page

from ultramem_cuda.reporting import svg


def points(chart: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in found.split()]  # type: ignore[misc]
        for found in re.findall(r'points="([^"]+)"', chart)
    ]


def test_chart_places_points_by_value() -> None:
    chart = svg.line_chart(
        [
            svg.Series("a", [1, 10, 100], [3.0, 2.0, 1.0], "dense"),
            svg.Series("b", [1, 10, 100], [1.0, 1.0, 1.0], "moe", dashed=True),
        ],
        svg.Axis("x <axis>", log=True),
        svg.Axis("y"),
        title="two & more",
        markers=[svg.Marker(10, "here")],
    )
    Page(chart)
    assert "x &lt;axis&gt;" in chart
    assert 'aria-label="two &amp; more"' in chart
    falling, flat = points(chart)
    assert falling[0][1] < falling[1][1] < falling[2][1]
    assert falling[1][1] - falling[0][1] == pytest.approx(falling[2][1] - falling[1][1], abs=0.2)
    # Equal ratios are equal distances on a logarithmic axis.
    assert falling[1][0] - falling[0][0] == pytest.approx(falling[2][0] - falling[1][0], abs=0.2)
    assert len({y for _, y in flat}) == 1
    assert flat[-1] == falling[-1]
    labels = [float(y) for y in re.findall(r'class="name"[^>]* y="([\d.]+)"', chart)]
    assert abs(labels[0] - labels[1]) >= svg.LABEL_GAP


def test_ticks_of_less_than_a_decade_are_still_several() -> None:
    for low, high in ((1.0, 1.1), (3.0, 8.0), (0.9, 30.0), (1.0, 1e7)):
        scale = svg._Scale([low, high], svg.Axis("y", log=True), 0, 100)
        ticks = scale.ticks()
        assert 3 <= len(ticks) <= 10, (low, high)
        assert all(-0.1 <= scale(tick) <= 100.1 for tick in ticks)


def test_given_ticks_are_written_only_where_they_have_room() -> None:
    tokens = [2.0**power for power in range(13)]
    chart = svg.line_chart(
        [svg.Series("a", tokens, tokens, "moe")],
        svg.Axis("tokens", log=True, ticks=tokens),
        svg.Axis("y", log=True),
        title="many ticks",
        frame=svg.Frame(width=400, left=60, right=20),
    )
    places = [
        float(x)
        for x in re.findall(r'class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="mid', chart)
    ]
    assert 3 <= len(places) < len(tokens)
    assert all(b - a >= svg.TICK_GAP for a, b in itertools.pairwise(places))


def test_point_labels_do_not_cover_each_other() -> None:
    close = [100.0, 101.0, 102.0, 103.0]
    series = [
        svg.Series(
            f"s{i}", close, [y + i for y in close], "moe", labels=["label"] * 4, labelled=True
        )
        for i in range(3)
    ]
    chart = svg.line_chart(
        series, svg.Axis("x"), svg.Axis("y"), title="crowd", frame=svg.Frame(width=200, right=20)
    )
    boxes = [
        (float(x), float(y))
        for x, y in re.findall(r'class="small halo"[^>]* x="([\d.]+)" y="([\d.]+)"', chart)
    ]
    assert 0 < len(boxes) < 12
    width = 5 * svg.CHARACTER_WIDTH
    for (x, y), (other_x, other_y) in itertools.combinations(boxes, 2):
        assert abs(x - other_x) > width or abs(y - other_y) >= svg.LINE_HEIGHT


def test_words_of_markers_stand_on_lines_of_their_own() -> None:
    chart = svg.line_chart(
        [svg.Series("a", [1, 100], [1, 2], "moe")],
        svg.Axis("x"),
        svg.Axis("y"),
        title="markers",
        markers=[svg.Marker(98, "late"), svg.Marker(2, "early"), svg.Marker(97, "later")],
    )
    found = re.findall(r'y="(\d+)" text-anchor="(\w+)">(\w+)</text>', chart)
    words = {text: (int(y), anchor) for y, anchor, text in found if text in "early late later"}
    assert len({y for y, _ in words.values()}) == 3
    # On the side where there is room.
    assert words["early"][1] == "start"
    assert words["late"][1] == "end"


def test_bars_stand_on_the_axis_and_missing_ones_are_left_out() -> None:
    chart = svg.bar_chart(
        ["1", "4"],
        [svg.Bars("a <b>", [0.2, 0.4], "moe"), svg.Bars("c", [None, 0.1], "pkm")],
        "tokens",
        svg.Axis("share"),
        title="bars",
    )
    Page(chart)
    rects = [
        (float(y), float(height))
        for y, height in re.findall(
            r'<rect [^>]*y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', chart
        )
    ]
    assert len(rects) == 3
    assert rects[1][1] == pytest.approx(2 * rects[0][1], abs=0.2)
    assert rects[2][1] == pytest.approx(rects[0][1] / 2, abs=0.2)
    for y, height in rects:
        assert y + height == pytest.approx(svg.Frame().plot_bottom, abs=0.2)
    assert "a &lt;b&gt;: 4, 0.4" in chart


@pytest.mark.parametrize("shape", ["circle", "square", "diamond", "up", "down", "left", "right"])
def test_markers_are_closed_and_stand_on_their_point(shape: svg.Shape) -> None:
    path = svg._outline(shape, 50.0, 20.0)
    assert path.startswith("M")
    assert path.endswith("z")
    x, y = map(float, re.match(r"M([\d.]+) ([\d.]+)", path).groups())  # type: ignore[union-attr]
    assert abs(x - 50) < 5
    assert abs(y - 20) < 5
