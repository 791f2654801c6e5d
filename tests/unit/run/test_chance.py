"""What guessing scores, and when a score is said to be no better."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from sfa_dist.recipe.blocks import ScheduleBlock
from sfa_dist.run.chance import (
    WHAT_TO_DO,
    better_than,
    chance_words,
    no_better_words,
    one_class_words,
    shows_top5,
    tail,
    verdicts,
)
from sfa_dist.run.tracking import eval_line
from sfa_dist.training.metrics import ClassificationSums
from sfa_dist.training.progress import Progress
from sfa_dist.training.train_log import TrainLog


def line_of(labels: list[int], predicted: list[int], classes: int) -> dict[str, Any]:
    sums = ClassificationSums()
    scores = torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()
    sums.update(scores, torch.tensor(labels), torch.ones(len(labels)))
    return sums.result()


HALVES = [0] * 40 + [1] * 40
ALL_OF_ONE = line_of(HALVES, [0] * 80, 2)
NOUN_AND_VERB = {"noun": 3, "verb": 2}


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_the_tail_is_that_of_the_binomial_distribution(clips: int, data: st.DataObject) -> None:
    right, guessed = data.draw(st.integers(0, clips)), data.draw(st.floats(1e-4, 0.999))
    assert tail(right, clips, guessed) == pytest.approx(binom.sf(right - 1, clips, guessed), rel=1e-9, abs=1e-15)


def test_the_tail_of_a_large_test_set_takes_no_time_and_no_overflow() -> None:
    assert tail(12_500, 50_000, 0.25) == pytest.approx(binom.sf(12_499, 50_000, 0.25), rel=1e-9)
    assert tail(50_000, 50_000, 1 / 29_100) == 0.0


@pytest.mark.parametrize(
    ("right", "clips", "guessed", "verdict"),
    [
        (40, 80, 0.5, False),
        (47, 80, 0.5, False),  # 0.59: one in fourteen guessers has it.
        (48, 80, 0.5, True),
        (0, 80, 0.5, False),
        (4, 4, 0.5, None),  # One guesser in sixteen gets all of four.
        (0, 4, 0.5, None),
        (5, 5, 0.5, True),
        (60, 60, 1.0, None),  # All clips are of one class.
    ],
)
def test_a_score_is_compared_with_what_guessers_get(
    right: int, clips: int, guessed: float, verdict: bool | None
) -> None:
    assert better_than(right, clips, guessed) is verdict


def test_always_naming_the_largest_class_is_guessing_too() -> None:
    line = line_of([0] * 80 + [1] * 20, [0] * 80 + [0] * 20, 2)
    assert (line["chance_acc1"], line["majority_acc1"], line["acc1"]) == (0.5, 0.8, 0.8)
    assert (line["predicted_classes"], line["better_than_chance"]) == (1, False)
    assert verdicts(line) == [
        "one class predicted, the same for all 100 clips",
        "no better than chance: top-1 80.00% on 100 clips, guessing 80.00%",
        WHAT_TO_DO,
    ]


def test_a_score_above_chance_has_a_line_and_no_verdict() -> None:
    line = line_of(HALVES, HALVES[:70] + [0] * 10, 3)
    assert chance_words(line) == [
        "by chance 33.33%, by always naming the largest class 50.00%; 2 of 3 classes predicted"
    ]
    assert verdicts(line) == []


def test_two_classes_of_which_the_model_thinks_there_are_three_are_guessed_by_halves() -> None:
    assert line_of(HALVES, [0, 1] * 40, 3)["better_than_chance"] is False


def test_few_clips_and_clips_of_one_class_tell_nothing() -> None:
    assert no_better_words(line_of([0, 1, 0, 1], [0, 1, 0, 1], 2)) == [
        "cannot be told from chance: 4 clips are too few"
    ]
    one = line_of([1] * 30, [1] * 30, 2)
    assert no_better_words(one) == ["cannot be told from chance: all 30 clips are of one class"]
    assert one_class_words(one) == []  # It is right.


def test_scores_that_are_not_finite_are_not_right() -> None:
    sums = ClassificationSums()
    sums.update(torch.full((20, 2), torch.nan), torch.zeros(20, dtype=torch.long), torch.ones(20))
    assert sums.result()["better_than_chance"] is not True


def test_each_head_has_its_own_chance() -> None:
    sums = ClassificationSums(NOUN_AND_VERB)
    labels = torch.tensor([[n % 3, n % 2] for n in range(60)])
    noun = torch.nn.functional.one_hot(labels[:, 0], 3).float()  # All nouns are right, all verbs the first one.
    sums.update(torch.cat([noun, torch.tensor([[1.0, 0.0]]).expand(60, 2)], dim=1), labels, torch.ones(60))
    line = sums.result()
    assert (line["noun_chance_acc1"], line["verb_chance_acc1"], line["action_chance_acc1"]) == (1 / 3, 0.5, 1 / 6)
    assert (line["noun_better_than_chance"], line["verb_better_than_chance"]) == (True, False)
    assert line["better_than_chance"] is line["action_better_than_chance"] is True
    assert [words.split(":")[0] for words in chance_words(line)] == ["noun", "verb", "action"]
    assert verdicts(line) == [
        "verb: one class predicted, the same for all 60 clips",
        "verb: no better than chance: top-1 50.00% on 60 clips, guessing 50.00%",
        WHAT_TO_DO,
    ]
    assert not shows_top5(line, "noun_")
    assert shows_top5(line, "action_")


def test_ranks_that_had_no_clip_do_not_change_it() -> None:
    sums = [ClassificationSums(), ClassificationSums(), ClassificationSums()]
    scores = torch.nn.functional.one_hot(torch.tensor([0, 1] * 20), 4).float()
    sums[1].update(scores, torch.tensor([0, 1] * 20), torch.ones(40))
    assert ClassificationSums.added(sums).result() == sums[1].result()
    assert "chance_acc1" not in sums[0].result()


def test_the_console_says_what_guessing_scores_and_no_top_5_of_two_classes() -> None:
    line = {**ALL_OF_ONE, "loss": 0.25}
    assert eval_line("stage1 [1/2]", line) == "Eval stage1 [1/2] acc1: 0.5000 loss: 0.2500 chance: 0.5000 clips: 80"
    assert "acc5: 1.0000" in eval_line("stage1 [1/2]", line_of(HALVES, HALVES, 6))


def said_by(epochs: int, warmup: float, lines: list[dict[str, Any]], progress: Progress | None = None) -> list[str]:
    """What the evaluations of a stage make the console say, with `epoch: ` in front."""
    said: list[str] = []
    progress = progress or Progress()
    stage = SimpleNamespace(schedule=ScheduleBlock(epochs=epochs, warmup_epochs=warmup))
    tracker = SimpleNamespace(say=lambda text: said.append(f"{progress.step // 3}: {text}"))
    log = TrainLog("stage1", stage, 3, progress, None, tracker)  # type: ignore[arg-type]
    for line in lines:
        progress.step += 3
        log.warn_if_guessing(line)
    return said


BETTER = line_of(HALVES, HALVES, 2)
ONE_CLASS, NO_BETTER = (
    "stage1: one class predicted, the same for all 80 clips",
    "stage1: no better than chance after {} epoch{}: top-1 50.00% on 80 clips, guessing 50.00%",
)


@pytest.mark.parametrize(
    ("epochs", "warmup", "when"), [(8, 1.0, 2), (40, 4.0, 10), (8, 4.0, 5), (2, 4.0, 2), (1, 0.0, 1)]
)
def test_it_is_said_once_when_a_quarter_is_over_and_the_warm_up_or_at_the_end(
    epochs: int, warmup: float, when: int
) -> None:
    told = said_by(epochs, warmup, [ALL_OF_ONE] * epochs)
    assert told == [
        f"{when}: {ONE_CLASS}",
        f"{when}: {NO_BETTER.format(when, 's' * (when > 1))}",
        f"{when}: stage1: {WHAT_TO_DO}",
    ]


def test_a_model_that_learns_late_is_not_told_of_and_one_that_collapses_is() -> None:
    assert said_by(8, 1.0, [ALL_OF_ONE, *[BETTER] * 7]) == []
    assert said_by(8, 1.0, [*[BETTER] * 5, *[ALL_OF_ONE] * 3])[0] == f"6: {ONE_CLASS}"


def test_a_run_that_goes_on_does_not_say_it_again() -> None:
    progress = Progress(step=6, told=["one class", "chance"])
    assert said_by(8, 1.0, [ALL_OF_ONE] * 4, progress) == []


def test_lines_of_before_this_was_counted_say_nothing() -> None:
    old = {"acc1": 0.5, "acc5": 1.0, "loss": 0.7, "samples": 80}
    assert (chance_words(old), verdicts(old), shows_top5(old)) == ([], [], True)
