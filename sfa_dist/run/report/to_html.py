"""A page as one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import singledispatch

from sfa_dist.boundary.plain import for_html
from sfa_dist.run.report import svg
from sfa_dist.run.report.document import (
    Clip,
    Clips,
    Code,
    Items,
    Matrix,
    Page,
    Picture,
    Plot,
    Plots,
    Section,
    Table,
    Text,
)
from sfa_dist.run.report.style import STYLE

SHOWN_OF_LONG = 10  # Rows of a long table.
WIDE_CELL = 40  # Characters; such a cell may be broken anywhere, in a column of some width.
DEEPEST_SHADE = 0.55  # Of a cell of the matrix: its number stays legible.


def html_page(page: Page) -> str:
    """The whole file."""
    shown = [section for section in page.sections if not all(isinstance(block, Picture) for block in section.blocks)]
    links = "".join(f'<li><a href="#s{n}">{for_html(each.title)}</a>' for n, each in enumerate(shown))
    sections = "".join(_section(number, section) for number, section in enumerate(shown))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{for_html(page.title)}</title><style>{STYLE}</style>"
        '<a class="skip" href="#main">Skip to the report</a>'
        f'<header><h1>{for_html(page.title)}</h1><p class="headline">{for_html(page.headline)}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="main" tabindex="-1">{sections}</main></html>\n'
    )


def _section(number: int, section: Section) -> str:
    blocks = "".join(map(_block, section.blocks))
    title = for_html(section.title)
    return f'<section aria-labelledby="s{number}"><h2 id="s{number}">{title}</h2>{blocks}</section>\n'


@singledispatch
def _block(block: object) -> str:
    raise TypeError(f"{block!r} is no part of a page")


@_block.register
def _(block: Text) -> str:
    return f"<p>{for_html(block.words)}</p>"


@_block.register
def _(block: Items) -> str:
    return "<ul>" + "".join(f"<li>{for_html(line)}" for line in block.lines) + "</ul>" if block.lines else ""


@_block.register
def _(block: Table) -> str:
    rows = list(block.rows)
    if not block.long or len(rows) <= SHOWN_OF_LONG:
        return _table(block.title, block.heads, rows)
    rest = _table(f"{block.title}: the rest", block.heads, rows[SHOWN_OF_LONG:])
    more = f"<details><summary>and {len(rows) - SHOWN_OF_LONG:,} more</summary>{rest}</details>"
    return _table(block.title, block.heads, rows[:SHOWN_OF_LONG]) + more


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col"{_kept_whole(name)}>{for_html(name)}</th>' for name in heads)
    body = "".join(f"<tr>{_cell(row[0], 'th')}{''.join(map(_cell, row[1:]))}</tr>" for row in rows)
    table = f"<table><caption>{for_html(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return _scrolling(title, table)


def _kept_whole(head: str) -> str:
    """A single word is not broken at its hyphen."""
    return "" if " " in head else ' class="whole"'


def _cell(text: str, tag: str = "td") -> str:
    scope = ' scope="row"' if tag == "th" else ""
    wide = ' class="wide"' if len(text) > WIDE_CELL else ""
    return f"<{tag}{scope}{wide}>{for_html(text)}</{tag}>"


def _scrolling(title: str, content: str) -> str:
    """A box that scrolls by itself where its content is wider, by keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{for_html(title)}" tabindex="0">{content}</div>'


@_block.register
def _(block: Plots) -> str:
    return f'<div class="plots">{"".join(map(_figure, block.plots))}</div>' if block.plots else ""


def _figure(plot: Plot) -> str:
    names = svg.legend([each.name for each in plot.series])
    return f"<figure><figcaption>{for_html(plot.title)}</figcaption>{svg.draw(plot)}{names}</figure>"


@_block.register
def _(block: Picture) -> str:
    return ""  # Its drawing stands in the page itself.


@_block.register
def _(block: Matrix) -> str:
    heads = "".join(f'<th scope="col">{for_html(name)}</th>' for name in block.names)
    rows = []
    for name, counts in zip(block.names, block.counts, strict=True):
        clips = max(1, sum(counts))
        cells = "".join(_shaded(count, count / clips) for count in counts)
        rows.append(f'<tr><th scope="row">{for_html(name)}</th>{cells}</tr>')
    table = (
        f'<table class="matrix"><caption>{for_html(block.title)}</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
    return _scrolling(block.title, table)


def _shaded(count: int, share: float) -> str:
    if not count:
        return "<td>0</td>"
    return f'<td style="background: rgba(var(--cell), {share * DEEPEST_SHADE:.2f})">{count:,}</td>'


@_block.register
def _(block: Clips) -> str:
    return f'<div class="clips">{"".join(map(_clip, block.clips))}</div>' if block.clips else ""


def _clip(clip: Clip) -> str:
    data = base64.b64encode(clip.jpeg).decode()
    words = "right" if clip.right else "wrong"
    sure = "" if clip.probability is None else f" ({clip.probability:.0%})"
    return (
        f'<figure class="{words}"><img alt="{for_html(f"Frames of the clip {clip.key}")}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption><b>{words}</b>: {for_html(clip.label)}, taken for '
        f'{for_html(clip.predicted)}{sure}<br><span class="key">{for_html(clip.key)}</span></figcaption></figure>'
    )


@_block.register
def _(block: Code) -> str:
    title, text = for_html(block.title), for_html(block.text)
    if block.folded:
        return f'<details><summary>{title}</summary><pre tabindex="0">{text}</pre></details>'
    return f'<figure><figcaption>{title}</figcaption><pre class="copied" tabindex="0">{text}</pre></figure>'
