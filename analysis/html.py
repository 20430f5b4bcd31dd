"""Pieces of a self-contained HTML page: text, tables, and figures drawn into it."""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.figure import INK, MUTED, PAPER, PREDICTED, Drawing

_HERE = Path(__file__).parent
# Colours of a figure that follow the page into the dark; the others have contrast enough on either ground.
_PAGE_COLORS = {INK: "currentColor", PAPER: "var(--paper)", MUTED: "var(--muted)", PREDICTED: "var(--predicted)"}
_MAX_FIGURE = 350_000  # bytes of one figure in the page: all of them and the tables stay below 2 MB


def escape(text: object) -> str:
    """`text` as content or attribute of an element."""
    return html.escape(str(text), quote=True)


def page(title: str, body: str, data: Mapping[str, Any]) -> str:
    """The whole document; `data` is what its script reads."""
    # `</script>` and `<!--` inside a string would end or hide the element; in JSON `<` may be written as an escape.
    payload = json.dumps(data, sort_keys=True).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{(_HERE / 'report.css').read_text('utf-8')}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">Skip to the results</a>\n{body}\n'
        f'<script type="application/json" id="data">{payload}</script>\n'
        f"<script>\n{(_HERE / 'report.js').read_text('utf-8')}</script>\n</body>\n</html>\n"
    )


def section(identifier: str, heading: str, *parts: str) -> str:
    """A section with a heading that can be linked to."""
    return (
        f'<section id="{identifier}">\n<h2>{escape(heading)}</h2>\n' + "\n".join(filter(None, parts)) + "\n</section>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table that scrolls by itself, also by keyboard, when it is wider than the screen.

    Args:
      caption: says what it holds.
      head: names of the columns, plain text.
      rows: cells that are already HTML; the first one heads its row.
      text_columns: so many columns are text, aligned left; the rest are numbers.

    Returns:
      HTML.
    """
    names = "".join(
        f'<th scope="col"{_class("" if i < text_columns else "n")}>{escape(name)}</th>' for i, name in enumerate(head)
    )
    lines = []
    for row in rows:
        cells = [f"<td{_class('' if i < text_columns else 'n')}>{cell}</td>" for i, cell in enumerate(row) if i > 0]
        lines.append(f'<tr><th scope="row">{row[0]}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{names}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table>\n</div>"
    )


def definitions(pairs: Mapping[str, Any]) -> str:
    """Names and values, one below the other; objects as JSON."""
    lines = []
    for name, value in pairs.items():
        if isinstance(value, Mapping) and not any(isinstance(item, Mapping | list | tuple) for item in value.values()):
            shown = "<br>".join(f"{escape(key)}: {escape(item)}" for key, item in sorted(value.items()))
        elif isinstance(value, Mapping | list | tuple):
            shown = f"<pre>{escape(json.dumps(value, indent=1, sort_keys=True))}</pre>"
        else:
            shown = escape("unknown" if value is None else value)
        lines.append(f"<dt>{escape(name)}</dt><dd>{shown}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


def figure(drawing: Drawing, name: str, label: str, caption: str) -> str:
    """A figure in the page: vectors that follow the page's colours; a bitmap where those would be too many.

    Args:
      drawing: the figure.
      name: unique in the page; files beside the report have it, too.
      label: what a reader hears who does not see it.
      caption: text below.

    Returns:
      HTML.
    """
    content = _inline(drawing.svg.decode(), name, label)
    if len(content) > _MAX_FIGURE:
        content = _bitmap(drawing.png, name, label)
    return (
        f'<figure>\n<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def _inline(svg: str, name: str, label: str) -> str:
    """An SVG file as an element: without prolog, metadata and namespaces, ids made unique, ink and paper the page's."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, flags=re.S).replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, stand_in in _PAGE_COLORS.items():
        svg = svg.replace(color, stand_in)
    svg = re.sub(r">\s+<", "><", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" class="drawing" ', 1).strip()


def _bitmap(png: bytes, name: str, label: str) -> str:
    if len(png) * 4 // 3 > _MAX_FIGURE:
        return paragraph(f"This figure is large: see {name}.png beside this page.")
    return f'<img class="drawing" alt="{escape(label)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
