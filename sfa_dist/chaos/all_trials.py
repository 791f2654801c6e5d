"""All trials: importing their modules registers them."""

from __future__ import annotations

from collections.abc import Sequence

from sfa_dist.chaos import trials_checkpoints, trials_data, trials_elastic, trials_processes
from sfa_dist.chaos.trials import TRIALS, Trial

FILES = [file.__name__ for file in (trials_processes, trials_checkpoints, trials_data, trials_elastic)]


def select(only: Sequence[str] = ()) -> list[Trial]:
    """The trials whose name contains a word of `only`, or whose rows include it if it is a number; by default all."""
    ordered = sorted(TRIALS, key=lambda each: FILES.index(each.play.__module__))
    return [each for each in ordered if not only or any(_matches(each, word) for word in only)]


def _matches(each: Trial, word: str) -> bool:
    return int(word) in each.rows if word.isdigit() else word in each.name
