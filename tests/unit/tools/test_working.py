"""What a command is at is shown on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from sfa_dist.plan.cards import card_of_size
from sfa_dist.plan.recipe_plan import plan_recipe
from sfa_dist.recipe.schema import Recipe
from sfa_dist.tools.working import working


class Stderr(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "silent", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_only_a_terminal_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, silent: bool, shown: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Stderr(terminal))
    monkeypatch.setenv("TERM", "xterm")
    with working("the first part", silent) as tell:
        tell("the second part")
    assert ("part" in stream.getvalue()) is shown
    assert capsys.readouterr().out == ""


def test_a_plan_tells_what_it_works_out() -> None:
    stage = {
        "frames": 4,
        "model": {"size": "tiny", "classes": 2, "image_size": 16},
        "data": {},
        "optimizer": {"lr": 0.1},
        "schedule": {"epochs": 1},
    }
    told: list[str] = []
    recipe = Recipe.model_validate({"name": "t", "stage1": stage})
    plan_recipe(recipe, card_of_size(8.0), 1, clips=9, search=False, report=told.append)
    assert told == ["stage1: memory of 4 frames", "stage1: clips of the data set"]
