"""Runs the checks of `sfa check-learning` in a process group of one, and in a run that writes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.recipe.blocks import DataBlock
from sfa_dist.recipe.schema import Recipe
from sfa_dist.run.context import Run
from sfa_dist.run.tracking import Tracker
from sfa_dist.stages.open_data import check_classes, open_split
from sfa_dist.tools.learning_checks import Checks
from sfa_dist.tools.learning_table import Check


def checks_of(recipe: Recipe, name: str, seconds: float) -> Iterator[Check]:
    """Yields the result of each check of a stage as soon as it is there. Raises SfaError."""
    runtime = parallel_runtime.start(environment(), recipe.device)
    try:
        with tempfile.TemporaryDirectory(prefix="sfa-check-") as folder:
            # As in a dry run, the weights of an image stage that is not trained yet are random.
            run = Run(recipe, Path(folder), runtime, Tracker(None, recipe.log, {}, {}), StopFlag(), dry_run=True)
            data: DataBlock = getattr(recipe, name).data
            train = open_split(run, data.train, f"{name}.data.train", data)
            key = "test" if data.test else "val"
            test = open_split(run, data.test or data.val, f"{name}.data.{key}", data)
            check_classes(train.classes, test)
            yield from Checks(run, name, train, test, seconds).each()
    finally:
        parallel_runtime.stop()
