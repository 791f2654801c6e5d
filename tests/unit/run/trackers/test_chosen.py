"""Which trackers a recipe has, and what is said of one that is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.trackers import chosen
from sfa_dist.run.trackers.chosen import require_packages, sinks_of


def names(log: LogBlock, folder: Path) -> list[str]:
    return [sink.name for sink in sinks_of(log, folder, {}, {"HOME": "/nowhere"})]


def test_the_trackers_of_a_recipe(tmp_path: Path) -> None:
    assert names(LogBlock(), tmp_path) == ["wandb"]
    assert names(LogBlock(wandb="off"), tmp_path) == []
    every = LogBlock(wandb="off", trackers=["mlflow", "csv", "tensorboard"])
    assert names(every, tmp_path) == ["csv", "tensorboard", "mlflow"]
    assert list(tmp_path.iterdir()) == []  # Until they are begun.


@pytest.mark.parametrize("trackers", [["csv", "csv"], ["excel"], "csv"])
def test_what_is_no_list_of_trackers_is_refused(trackers: Any) -> None:
    with pytest.raises(ValidationError):
        LogBlock(trackers=trackers)


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, tracker: Any
) -> None:
    monkeypatch.setattr(chosen, "find_spec", lambda name: None)
    require_packages(LogBlock(trackers=["csv"]))
    with pytest.raises(RecipeError, match=rf"pip install 'sfa_dist\[{tracker}\]'"):
        require_packages(LogBlock(trackers=["csv", tracker]))
