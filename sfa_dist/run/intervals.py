"""How sure one can be of a score: intervals by clips and by seeds, and a paired test between two runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from sfa_dist.run.chance import tail

NORMAL = 1.959963984540054  # 97.5 % of the normal distribution lie below it.
# The same of Student's t, by degrees of freedom from 1 on; of more, the normal one.
STUDENT = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def wilson(right: int, clips: int) -> tuple[float, float]:
    """The 95 % interval of a share of `clips` independent clips of which `right` are right.

    Source: Wilson (1927), without continuity correction. Raises ZeroDivisionError without a clip.
    """
    share, square = right / clips, NORMAL**2
    middle = (share + square / (2 * clips)) / (1 + square / clips)
    half = NORMAL / (1 + square / clips) * math.sqrt(share * (1 - share) / clips + square / (4 * clips**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value that two runs are equally good, of the clips that only one of them has right (exact, two-sided)."""
    return min(1.0, 2 * tail(max(only_first, only_second), only_first + only_second, 0.5))


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, sample deviation, half of the 95 % interval of the mean) of at least two seeds, by Student's t."""
    deviation = statistics.stdev(values)
    freedom = len(values) - 1
    factor = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
    return statistics.fmean(values), deviation, factor * deviation / math.sqrt(len(values))
