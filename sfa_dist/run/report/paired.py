"""Two runs on the same clips: how many only one of them has right, and whether chance explains it."""

from __future__ import annotations

from dataclasses import dataclass

from sfa_dist.run.chance import SURE
from sfa_dist.run.intervals import mcnemar
from sfa_dist.run.report.outcomes import NoOutcomesError, Outcomes, read_outcomes
from sfa_dist.run.report.run_files import RunFiles


@dataclass(frozen=True)
class Paired:
    """The paired test of two runs over the `clips` that both have; p is None where there is none, and `words` say
    why."""

    names: tuple[str, str]
    clips: int
    only_first: int
    only_second: int
    p: float | None
    words: str


def pair_runs(first: str, one: RunFiles, second: str, other: RunFiles) -> Paired:
    """The exact McNemar test of what both predicted."""
    try:
        rights = _rights(read_outcomes(one.directory)), _rights(read_outcomes(other.directory))
        return _pair((first, second), *rights)
    except NoOutcomesError as error:
        return Paired((first, second), 0, 0, 0, None, f"{first} and {second} cannot be tested in pairs: {error}.")


def _rights(outcomes: Outcomes) -> dict[tuple[str, str], tuple[tuple[int, ...], bool]]:
    """(label, is right) of each clip, by shard and key."""
    names = zip(outcomes.shards, outcomes.keys, strict=True)
    labels = map(tuple, outcomes.labels.tolist())
    return dict(zip(names, zip(labels, outcomes.right.tolist(), strict=True), strict=True))


def _pair(
    names: tuple[str, str],
    one: dict[tuple[str, str], tuple[tuple[int, ...], bool]],
    other: dict[tuple[str, str], tuple[tuple[int, ...], bool]],
) -> Paired:
    both = one.keys() & other.keys()
    if not both:
        raise NoOutcomesError("their tests have no clip in common")
    if changed := sum(one[clip][0] != other[clip][0] for clip in both):
        raise NoOutcomesError(f"{changed:,} of their {len(both):,} common clips have different classes in the two")
    only_first = sum(one[clip][1] and not other[clip][1] for clip in both)
    only_second = sum(other[clip][1] and not one[clip][1] for clip in both)
    p = mcnemar(only_first, only_second)
    counts = (
        f"On the {len(both):,} clips that both were tested on, {only_first:,} are right in {names[0]} alone and "
        f"{only_second:,} in {names[1]} alone"
    )
    rest = max(len(one), len(other)) - len(both)
    counts += f" ({rest:,} further clips are in one test only)" if rest else ""
    if p >= SURE:
        words = f"{counts}: no difference is shown (McNemar, exact, p = {p:.2g})."
    else:
        better = names[0] if only_first > only_second else names[1]
        words = f"{counts}: {better} is better on them (McNemar, exact, p = {p:.2g})."
    return Paired(names, len(both), only_first, only_second, p, words)
