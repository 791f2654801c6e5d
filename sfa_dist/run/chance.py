"""Whether a score is better than guessing: what guessing scores, how certain the verdict is, and the messages about it.

There are two ways to guess: a random class, which scores 1 / classes, and always the largest class of the test, which
scores its share of the clips. A score is better than guessing if the better of the two would get as many right answers,
or more, with a probability below SURE (an exact one-sided binomial test). With few clips even a perfect score may not
pass; the messages say that too.

A "line" holds the scores of an evaluation, as in log.jsonl and result.json. With several heads each key has the head as
a prefix (`verb_acc1`, `verb_chance_acc1`). Lines of older runs lack the keys of chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

SURE = 0.05
TOP5_FROM = 6  # With five classes or fewer the right one is always among the best five.
KEYS = ("classes", "chance_acc1", "majority_acc1", "predicted_classes", "better_than_chance")
WHAT_TO_DO = "what to do: docs/learning.md; `sfa check-learning --recipe R` looks for the cause in two minutes"
_NEGLIGIBLE = 1e-18

Line = Mapping[str, Any]


def chance_facts(pairs: Mapping[tuple[int, int], int], right: int, classes: int) -> dict[str, Any]:
    """The values of KEYS; empty without clips.

    `pairs` counts the clips by (class, predicted class), `right` of them are right, and there are `classes` classes.
    """
    clips = sum(pairs.values())
    if not clips:
        return {}
    by_class: Counter[int] = Counter()
    for (label, _), count in pairs.items():
        by_class[label] += count
    chance, majority = 1 / classes, max(by_class.values()) / clips
    verdict = better_than(right, clips, max(chance, majority))
    return dict(zip(KEYS, (classes, chance, majority, len({found for _, found in pairs}), verdict), strict=True))


def better_than(right: int, clips: int, guessed: float) -> bool | None:
    """Whether `right` of `clips` is better than guesses that are right with probability `guessed`.

    None if there are too few clips for any score to be better.
    """
    if tail(right, clips, guessed) < SURE:
        return True
    return False if tail(clips, clips, guessed) < SURE else None


def tail(right: int, clips: int, guessed: float) -> float:
    """The probability that at least `right` of `clips` independent guesses, each right with `guessed`, are right."""
    if right <= 0 or guessed >= 1:
        return 1.0
    return min(1.0, math.fsum(_terms(right, clips, guessed)))


def _terms(right: int, clips: int, guessed: float) -> Iterator[float]:
    """The probabilities of exactly `right`, `right` + 1, ... right guesses, as long as they are not negligible."""
    for number in range(right, clips + 1):
        ways = math.lgamma(clips + 1) - math.lgamma(number + 1) - math.lgamma(clips - number + 1)
        term = math.exp(ways + number * math.log(guessed) + (clips - number) * math.log1p(-guessed))
        yield term
        if number > clips * guessed and term < _NEGLIGIBLE:
            return


def heads_of(line: Line) -> list[str]:
    """The key prefix of each head of a line: `noun_`, `verb_`, `action_`; an empty one for a single head."""
    heads = [key.removesuffix("acc5") for key in line if key.endswith("_acc5")]
    return heads or [""]


def shows_top5(line: Line, head: str = "") -> bool:
    """Whether the top-5 of a line is informative: with five classes or fewer it is always 1."""
    return int(line.get(f"{head}classes", TOP5_FROM)) >= TOP5_FROM


def guessing(line: Line, head: str = "") -> float | None:
    """The score of guessing; None if the line lacks it."""
    if f"{head}chance_acc1" not in line:
        return None
    return max(line[f"{head}chance_acc1"], line[f"{head}majority_acc1"])


def chance_words(line: Line) -> list[str]:
    """A message for each head: the scores of guessing, and how many classes are predicted."""
    return [
        f"{_titled(head)}by chance {line[f'{head}chance_acc1']:.2%}, by always naming the largest class "
        f"{line[f'{head}majority_acc1']:.2%}; {line[f'{head}predicted_classes']:,} of {line[f'{head}classes']:,} "
        "classes predicted"
        for head in heads_of(line)
        if guessing(line, head) is not None
    ]


def one_class_words(line: Line) -> list[str]:
    """A message for each head that predicts one and the same class for clips of several classes."""
    return [
        f"{_titled(head)}one class predicted, the same for all {line['samples']:,} clips"
        for head in heads_of(line)
        if line.get(f"{head}predicted_classes") == 1 and line[f"{head}majority_acc1"] < 1
    ]


def no_better_words(line: Line, when: str = "") -> list[str]:
    """A message for each head whose score is no better than chance, or has too few clips to tell.

    `when` is inserted behind "no better than chance".
    """
    words = []
    for head in heads_of(line):
        guessed = guessing(line, head)
        if guessed is None or line[f"{head}better_than_chance"]:
            continue
        clips = f"{line['samples']:,} clips"
        if line[f"{head}better_than_chance"] is False:
            scores = f"top-1 {line[f'{head}acc1']:.2%} on {clips}, guessing {guessed:.2%}"
            words.append(f"{_titled(head)}no better than chance{when}: {scores}")
        else:
            why = f"all {clips} are of one class" if guessed >= 1 else f"{clips} are too few"
            words.append(f"{_titled(head)}cannot be told from chance: {why}")
    return words


def verdicts(line: Line) -> list[str]:
    """All that is wrong with a line, and what to do about it; empty if it is better than chance."""
    found = [*one_class_words(line), *no_better_words(line)]
    return [*found, WHAT_TO_DO] if found else []


def console_line(line: Line) -> dict[str, Any]:
    """A line for the console: without KEYS, and without a top-5 that is not informative."""
    hidden = {f"{head}acc5" for head in ("", *heads_of(line)) if not shows_top5(line, head)}
    return {
        key: value
        for key, value in line.items()
        if key not in hidden and not any(key == fact or key.endswith(f"_{fact}") for fact in KEYS)
    }


def _titled(head: str) -> str:
    return f"{head.removesuffix('_')}: " if head else ""
