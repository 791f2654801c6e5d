"""README.md and docs/: no line is too long to read as source, and every link leads to a file and a heading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 120
PAGES = [
    "docs/chaos.md",
    "docs/checkpoints.md",
    "docs/evaluation.md",
    "docs/faults.md",
    "docs/guarantees.md",
    "docs/live.md",
    "docs/motion_prior.md",
    "docs/multi_node.md",
    "docs/predict.md",
    "docs/scaling.md",
    "docs/slurm.md",
    "docs/stopping.md",
]

_LINK = re.compile(r"\]\(([^)\s]+)\)")


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page: lower case, hyphens for spaces, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_too_long(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    too_long = {number: len(line) for number, line in enumerate(lines, 1) if len(line) > WIDTH}
    assert not too_long, f"line: its length, of at most {WIDTH}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    file = ROOT / page
    for link in _LINK.findall(file.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = file.parent / name if name else file
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in _anchors(target.read_text(encoding="utf-8")), f"{link}: no such heading"
