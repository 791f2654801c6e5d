"""Text from outside, as it is shown to a terminal, a page, Markdown and a picture."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_dist import train
from sfa_dist.boundary.plain import for_figure, for_html, for_markdown, for_terminal
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.tracking import Tracker

ANY = st.text() | st.text(st.sampled_from("\x1b[]()<>|`*_$\\&!#\n\r\t\x9b\u202e\x00a "))


@given(text=ANY)
def test_a_terminal_gets_no_command(text: str) -> None:
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", for_terminal(text))
    one = for_terminal(text, lines=False)
    assert len(one.splitlines()) <= 1
    assert for_terminal(one) == one


@given(text=ANY)
def test_a_page_shows_the_text(text: str) -> None:
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

        def handle_starttag(self, tag: str, attributes: object) -> None:
            assert tag == "p"

    Reader().feed(f"<p>{for_html(text)}</p>")
    assert html.unescape(for_html(text)) == for_terminal(text)


@given(text=ANY)
def test_a_cell_of_markdown_stays_one(text: str) -> None:
    cell = for_markdown(text)
    assert not re.search(r"[|<>`*_\[\]\n]", re.sub(r"\\.", "", cell))
    assert re.sub(r"\\([\\`*_\[\]<>|~$&])", r"\1", cell) == for_terminal(text, lines=False)


def test_a_picture_reads_no_formula() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    for text in ("$\\frac{$", "a$b", "$x$", "\\$", "$$", "\x1b[31m", "€"):
        figure.text(0, 0, for_figure(text))
    figure.canvas.draw()


@pytest.mark.parametrize("name", ["\x1b]0;title\x07", "a\nb", "[red]x[/blue]"])
def test_messages_and_logs_hold_no_command(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--recipe", f"{tmp_path}/{name}.yaml", "--print-recipe"]) == 78
    tracker = Tracker(tmp_path, LogBlock(wandb="off"), {}, {})
    tracker.say(f"shard {name}")
    tracker.close()
    said = capsys.readouterr()
    for text in (said.err, said.out, (tmp_path / "console.log").read_text()):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert "[red]x[/blue]" in said.out or "red" not in name
