"""Names and messages from outside, shown so that nothing in them is a command to who shows them.

A class, a file or a server may be called anything: `\\x1b[2J` clears a terminal, `<script>` runs in a page, `|` ends a
cell of a Markdown table, `$` starts a formula in a picture.
"""

from __future__ import annotations

import html
import re

# Controls (of terminals too), surrogates, and what reorders or ends lines.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
# What Markdown reads inside of a line; the rest (# - + 1.) it reads only where one begins.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&])")


def for_terminal(text: str, lines: bool = True) -> str:
    """Text for a console or its file: controls as `\\x1b`. Without `lines` it stays one line."""
    return _UNSEEN.sub(lambda match: match[0] if lines and match[0] in "\n\t" else _escaped(match[0]), text)


def for_markdown(text: str) -> str:
    """Text inside of a line or a cell of Markdown (GitHub's too), read as it is written."""
    return _MARKDOWN.sub(r"\\\1", for_terminal(text, lines=False))


def for_html(text: str) -> str:
    """Text inside of an element or a quoted attribute of a page."""
    return html.escape(for_terminal(text))


def for_figure(text: str) -> str:
    """Text in a picture of matplotlib, which reads formulas between two `$`."""
    return for_terminal(text, lines=False).replace("$", r"\$")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", errors="surrogatepass").decode()
