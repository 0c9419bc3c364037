"""Reads a page that a report wrote."""

from __future__ import annotations

import html.parser

VOID = frozenset({"meta"})


class Page(html.parser.HTMLParser):
    """Collects elements, text and tables; fails on tags that do not nest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        """By caption: rows of cells' text, the header first."""
        self._caption = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text.setdefault(tag, []).append(data)
        if "caption" in self.open:
            self._caption += data
        elif "td" in self.open or "th" in self.open:
            self.tables[self._caption][-1][-1] += data

    def all_text(self, tag: str) -> str:
        return " ".join(self.text.get(tag, []))

    def attributes(self, name: str) -> list[str]:
        """Its values, over all elements that have it."""
        return [
            value or "" for _, found in self.tags for key, value in found.items() if key == name
        ]

    def column(self, caption: str, header: str) -> list[str]:
        """Cells of a column."""
        head, *rows = self.tables[caption]
        return [row[head.index(header)] for row in rows]
