"""A page as Markdown, with links to its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from urllib.parse import quote

from sfa_dist.boundary.plain import for_markdown
from sfa_dist.run.report.document import Clips, Code, Items, Matrix, Page, Picture, Plots, Section, Table, Text

SHOWN_OF_LONG = 10  # Rows of a long table.


def markdown_page(page: Page) -> str:
    """The whole file."""
    lines = [f"# {for_markdown(page.title)}", "", for_markdown(page.headline), ""]
    for section in page.sections:
        lines += _section(section)
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(section: Section) -> list[str]:
    lines = [line for block in section.blocks for line in _block(block)]
    return [f"## {for_markdown(section.title)}", "", *lines] if lines else []


@singledispatch
def _block(block: object) -> list[str]:
    raise TypeError(f"{block!r} is no part of a page")


@_block.register
def _(block: Text) -> list[str]:
    return [for_markdown(block.words), ""]


@_block.register
def _(block: Items) -> list[str]:
    return [*(f"- {for_markdown(line)}" for line in block.lines), ""] if block.lines else []


@_block.register
def _(block: Table) -> list[str]:
    shown = block.rows[:SHOWN_OF_LONG] if block.long else block.rows
    rest = len(block.rows) - len(shown)
    more = [f"and {rest:,} more: the web page has all", ""] if rest else []
    return [f"**{for_markdown(block.title)}**", "", *table_lines(block.heads, shown), "", *more]


def table_lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(map(for_markdown, cells)) + " |" for cells in (heads, *rows)]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]


@_block.register
def _(block: Picture) -> list[str]:
    return [f"![{for_markdown(block.path.stem)}]({quote(block.path.as_posix())})", ""]


@_block.register
def _(block: Clips) -> list[str]:
    rows = [
        [
            clip.key,
            clip.label,
            clip.predicted,
            "not recorded" if clip.probability is None else f"{clip.probability:.0%}",
            "right" if clip.right else "wrong",
        ]
        for clip in block.clips
    ]
    return [*table_lines(["clip", "class", "taken for", "probability", ""], rows), ""] if rows else []


@_block.register(Plots)
@_block.register(Matrix)
@_block.register(Code)
def _(block: Plots | Matrix | Code) -> list[str]:
    return []  # Of the web page alone: pictures, tables and the recipe beside the page show the same.
