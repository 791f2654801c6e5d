"""A plot as inline SVG: small, with text as text, in the colours of the page, legible from 320 pixels of width on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sfa_dist.boundary.plain import for_html
from sfa_dist.run.report.document import Plot, Point, Series

WIDTH, HEIGHT = 340, 220  # Units; a page shows it from 300 to 400 pixels wide.
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40
MOST_POINTS = 240  # Of a curve; a longer one is thinned out evenly.
MARKED_POINTS = 24  # Up to so many each has a mark.
COLOURS = 6  # Of the style; further curves repeat them with other dashes.
DASHES = ("", "6 3", "2 3", "8 3 2 3")
TICKS = 4
_TINY = 1e-300  # A range that, divided, is no number any more.


def draw(plot: Plot) -> str:
    """The SVG element. Raises nothing for curves without a number: they are left out."""
    thinned = [Series(each.name, thin(each.points)) for each in plot.series]
    numbers = [(x, y) for each in thinned for x, y in each.points if y is not None]
    xs, ys = [x for x, _ in numbers], [y for _, y in numbers]
    across = ticks(min(xs, default=0.0), max(xs, default=1.0), 1.0 if plot.whole else 0.0)
    up = ticks(0.0, plot.top) if plot.top is not None else ticks(min(ys, default=0.0), max(ys, default=1.0))
    axes = _Axes(across, up)
    lines = "".join(axes.curve(number, each.points) for number, each in enumerate(thinned))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{for_html(in_words(plot))}">'
        f"{axes.frame(plot.across)}{lines}</svg>"
    )


def legend(names: Sequence[str]) -> str:
    """The names of several curves with their strokes; nothing for a single one."""
    if len(names) < 2:
        return ""
    keys = (
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><path d="M1 5H25" {_stroke(number)}/></svg>{for_html(name)}'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(keys)}</ul>'


def in_words(plot: Plot) -> str:
    """What a plot shows, for who does not see it."""
    curves = []
    for each in plot.series:
        numbers = [y for _, y in each.points if y is not None]
        if numbers:
            ends = f"from {numbers[0]:.4g} to {numbers[-1]:.4g}, lowest {min(numbers):.4g}, highest {max(numbers):.4g}"
            curves.append(f"{each.name} {ends}")
    return f"{plot.title} by {plot.across}: {'; '.join(curves) or 'no numbers'}"


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """At most MOST_POINTS of the points, evenly taken, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return points
    step = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(number * step)] for number in range(MOST_POINTS)]


def ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers at least `least` apart that span [low, high], about TICKS + 1 of them, at least two."""
    if not high - low > _TINY:
        margin = least or (abs(low) * 0.1 if abs(low) > 10 * _TINY else 1.0)
        low, high = low - margin, high + margin
    rough = max((high - low) / TICKS, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_words(values: Sequence[float]) -> list[str]:
    """The numbers of ticks, with the digits that they need to differ; with an exponent if they are tiny or huge."""
    largest, apart = max(map(abs, values)), values[1] - values[0]
    if not 1e-3 <= largest < 1e6:
        return [_with_exponent(value) if abs(value) > apart / 2 else "0" for value in values]
    digits = max(0, -math.floor(math.log10(apart) + 1e-9))
    return [f"{value if abs(value) > apart / 2 else 0.0:,.{digits}f}" for value in values]


def _with_exponent(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


class _Axes:
    """Where numbers lie on the drawing."""

    def __init__(self, across: list[float], up: list[float]) -> None:
        self._across, self._up = across, up

    def _x(self, value: float) -> float:
        return LEFT + (value - self._across[0]) / (self._across[-1] - self._across[0]) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        share = (value - self._up[0]) / (self._up[-1] - self._up[0])
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)

    def frame(self, across: str) -> str:
        """Grid, numbers and the name of the horizontal axis."""
        parts = []
        for value, words in zip(self._up, tick_words(self._up), strict=True):
            y = self._y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
        for value, words in zip(self._across, tick_words(self._across), strict=True):
            x = self._x(value)
            anchor = "end" if x > WIDTH - 30 else "middle"
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            bottom = HEIGHT - BOTTOM + 16
            shown_x = min(x, WIDTH - 2.0) if anchor == "end" else x
            parts.append(f'<text x="{shown_x:.1f}" y="{bottom}" text-anchor="{anchor}">{words}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{for_html(across)}</text>')
        return "".join(parts)

    def curve(self, number: int, points: Sequence[Point]) -> str:
        """The line, broken where there is no number, with marks where there are few."""
        path, marks, is_down = [], [], False
        for x, y in points:
            if y is None:
                is_down = False
                continue
            spot = f"{self._x(x):.1f} {self._y(y):.1f}"
            path.append(f"{'L' if is_down else 'M'}{spot}")
            marks.append(f"M{spot}h0")
            is_down = True
        dots = f'<path class="dots s{number % COLOURS}" d="{"".join(marks)}"/>' if len(marks) <= MARKED_POINTS else ""
        return f'<path d="{"".join(path)}" {_stroke(number)}/>{dots}' if path else ""


def _stroke(number: int) -> str:
    """A colour and dashes of its own for each of COLOURS * len(DASHES) curves; no two neighbours differ by colour
    alone."""
    dashes = DASHES[(number + number // COLOURS) % len(DASHES)]
    return f'class="line s{number % COLOURS}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
