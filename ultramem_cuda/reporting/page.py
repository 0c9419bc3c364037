"""One HTML file that needs no network and no script: its style sheet, its tables, its frame."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2024; --quiet: #5c6670; --rule: #dde1e6; --panel: #f5f7f9;
  --accent: #0a72b8; --bad: #b3261e; --good: #1b7f3b; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e4e7ea; --quiet: #9aa4ae; --rule: #31373d; --panel: #1c2125;
  --accent: #58b0f0; --bad: #ff7b72; --good: #56c878; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
p { max-width: 46rem; } .quiet { color: var(--quiet); font-size: .92rem; }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--accent);
  padding: .2rem 0 .2rem .9rem; }
.scroll { overflow-x: auto; } svg { width: 100%; min-width: 34rem; height: auto; display: block; }
table { border-collapse: collapse; font-size: .92rem; margin: .8rem 0; }
th, td { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; }
th { color: var(--quiet); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 2px;
  margin-right: .5em; }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--quiet); } .bad { color: var(--bad); font-weight: 600; }
.good { color: var(--good); }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .tick { fill: var(--quiet); } svg .name { font-weight: 600; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--quiet); fill: none; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
svg .point { stroke-width: 1.4; } svg .error { fill: none; stroke-width: 1.4; }
svg .mark { stroke: var(--quiet); stroke-dasharray: 2 3; }
"""

_NUMBER_STARTS = frozenset("0123456789+-")


class Markup(str):
    """Text of a cell that is HTML already; any other text is escaped."""


def escape(text: str) -> str:
    return html.escape(text)


def swatch(style: str, text: str) -> Markup:
    """A square in the colour of a series, and its name."""
    return Markup(
        f'<span class="swatch" style="background:var(--{style})"></span>{html.escape(text)}'
    )


def status(ok: bool) -> Markup:
    word = '<span class="good">ok</span>' if ok else '<span class="bad">FAILED</span>'
    return Markup(word)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> str:
    """An HTML table; columns of numbers are aligned to the right, ``Markup`` cells kept."""
    lines = list(rows)
    columns = range(len(header))
    numeric = [i > 0 and _is_numeric([line[i] for line in lines]) for i in columns]

    def cell(i: int, text: str, tag: str) -> str:
        shown = text if isinstance(text, Markup) else html.escape(text)
        return f"<{tag}{' class=n' if numeric[i] else ''}>{shown}</{tag.split()[0]}>"

    def row(line: Sequence[str]) -> str:
        return "".join(cell(i, text, "td") for i, text in enumerate(line))

    body = "".join(f"<tr>{row(line)}</tr>" for line in lines)
    head = "".join(cell(i, text, 'th scope="col"') for i, text in enumerate(header))
    above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _is_numeric(cells: Sequence[str]) -> bool:
    """What is missing (in quiet words) does not make a column of numbers one of words."""
    texts = [text for text in cells if not isinstance(text, Markup)]
    return bool(texts) and all(text[:1] in _NUMBER_STARTS for text in texts)


def document(title: str, style: str, body: str, data: Mapping[str, object]) -> str:
    """The whole page; ``data`` is embedded as JSON in the element with the id ``data``."""
    # "</" would end the script element early, "<!--" would keep it open.
    payload = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{payload}</script>\n</body>\n</html>\n'
    )
