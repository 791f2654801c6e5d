"""What a page consists of, apart from how it is drawn: texts are plain here, and each drawing escapes them its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Point = tuple[float, float | None]  # None: no number there, a gap.


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A titled table of texts. Of a `long` one a page shows the beginning, and all of it on demand."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    long: bool = False


@dataclass(frozen=True)
class Series:
    """One curve: its points by rising x."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Plot:
    """Curves over one axis. `top` fixes the vertical axis to 0 ... top; `whole`: the horizontal one counts."""

    title: str
    across: str
    series: Sequence[Series]
    top: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class Plots:
    """Plots beside each other, as far as there is room."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Picture:
    """A PNG for what shows no SVG: Markdown links it, the web page has its own drawing. The path is as seen from the
    page's folder."""

    path: Path


@dataclass(frozen=True)
class Matrix:
    """counts[i][j]: clips of class i that are taken for class j."""

    title: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Clip:
    """One tested clip, with some of its frames side by side as JPEG."""

    key: str
    label: str
    predicted: str
    probability: float | None
    right: bool
    jpeg: bytes


@dataclass(frozen=True)
class Clips:
    """Pictures of clips; Markdown has their words alone."""

    clips: Sequence[Clip]


@dataclass(frozen=True)
class Code:
    """A text as it is. `folded`: shown on demand; else in whole, and chosen by a click."""

    title: str
    text: str
    folded: bool = True


Block = Text | Items | Table | Plots | Picture | Matrix | Clips | Code


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report. `headline` is its result in one sentence."""

    title: str
    headline: str
    sections: Sequence[Section]
