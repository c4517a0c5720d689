"""One self-contained HTML page: no network, no script, readable on a phone and in the dark."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from beit.atomic import write_atomically

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #667085; --line: #d9dde5; --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --soft: #98a1b3; --line: #353b48; --paper: #14171d } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { margin-top: 2.6rem; font-size: 1.2rem }
p, figcaption { color: var(--soft); max-width: 44rem } h1 + p { font-size: 1.05rem }
h1, p { overflow-wrap: anywhere }
figure { margin: 1rem 0; overflow-x: auto } img { max-width: 100%; height: auto; border-radius: 4px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem }
svg { width: 100%; max-width: 34rem; height: auto } svg text { font-size: 11px; fill: var(--soft) }
svg .grid { stroke: var(--line) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line) }
td:not(:first-child), th:not(:first-child) { text-align: right }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.4rem, 1fr)); gap: .8rem;
  margin: .9rem 0 } .tiles figure { margin: 0; overflow: hidden }
.tiles img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--line) }
.tiles figcaption { font-size: .8rem; line-height: 1.3; color: var(--ink); overflow-wrap: anywhere }
.tiles small { display: block; color: var(--soft) }
summary { cursor: pointer; margin-top: 1rem }
code, pre { font: 13px/1.5 ui-monospace, monospace } pre { white-space: pre-wrap; overflow-wrap: anywhere }
"""


@dataclass
class Page:
    """A page, written from top to bottom."""

    title: str
    lead: str
    parts: list[str] = field(default_factory=list)

    def section(self, title: str, text: str = "") -> None:
        """A heading, and a sentence that says what is seen below it."""
        self.parts.append(f"<h2>{html.escape(title)}</h2>")
        if text:
            self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; all but its first column is right-aligned."""
        cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
        lines = [
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
            for row in rows
        ]
        table = f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        self.parts.append(f'<div class="scroll">{table}</div>')

    def figure(self, element: str, caption: str) -> None:
        """An image or chart element with its caption."""
        self.parts.append(f"<figure>{element}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def tiles(self, pictures: Sequence[tuple[str, str, str]]) -> None:
        """Small image elements side by side, each with a line and a softer one: (element, line, line)."""
        shown = [
            f"<figure>{element}<figcaption>{html.escape(line)}<small>{html.escape(soft)}</small>"
            "</figcaption></figure>"
            for element, line, soft in pictures
        ]
        if shown:
            self.parts.append(f'<div class="tiles">{"".join(shown)}</div>')

    def charts(self, elements: Sequence[str]) -> None:
        """Charts side by side where there is room."""
        self.parts.append('<div class="charts">' + "".join(elements) + "</div>")

    def code(self, text: str) -> None:
        """Commands or settings, as they are."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def note(self, text: str) -> None:
        """A sentence."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def details(self, title: str, text: str) -> None:
        """Lines that are shown when their title is clicked."""
        shown = f"<summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre>"
        self.parts.append(f"<details>{shown}</details>")

    def html(self) -> str:
        """The whole page."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body>"
            f"<h1>{html.escape(self.title)}</h1><p>{html.escape(self.lead)}</p>"
            f"{''.join(self.parts)}</body></html>\n"
        )

    def write(self, file: Path) -> None:
        """Write the page to a file."""
        write_atomically(file, self.html().encode(errors="backslashreplace"))
