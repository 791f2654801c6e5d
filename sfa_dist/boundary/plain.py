"""Names and messages from outside, escaped so that nothing in them acts as a command or as markup.

A class, a file or a server may have any name: `\\x1b[2J` clears a terminal, `<script>` runs in a web page, `|` ends a
cell of a Markdown table, `$` starts a formula in a figure.
"""

from __future__ import annotations

import html
import re

# Control characters, surrogates, and characters that reorder or end lines.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
# Markup inside a Markdown line; the rest (# - + 1.) counts only at the start of one.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&])")


def for_terminal(text: str, lines: bool = True) -> str:
    """Text for a terminal or a log file, with control characters escaped, such as `\\x1b`.

    Line ends and tabs stay as they are; without `lines` they are escaped too.
    """
    return _UNSEEN.sub(lambda match: match[0] if lines and match[0] in "\n\t" else _escaped(match[0]), text)


def for_markdown(text: str) -> str:
    """Text for a line or table cell of Markdown (GitHub's too), shown literally."""
    return _MARKDOWN.sub(r"\\\1", for_terminal(text, lines=False))


def for_html(text: str) -> str:
    """Text for an element or a quoted attribute of a web page."""
    return html.escape(for_terminal(text))


def for_figure(text: str) -> str:
    """Text for a figure of matplotlib, which reads text between two `$` as a formula."""
    return for_terminal(text, lines=False).replace("$", r"\$")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", errors="surrogatepass").decode()
