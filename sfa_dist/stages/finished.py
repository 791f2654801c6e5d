"""Whether a run directory holds all that a recipe asks for: what a start of the run would find, without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfa_dist.boundary.file_names import RESULT
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe, StageBlock
from sfa_dist.run.context import identity_of, source_of, weights_of
from sfa_dist.run.record import different_inputs, read_done, stage_inputs
from sfa_dist.stages.open_data import steps_per_epoch
from sfa_dist.stages.scoring import inputs_of_test, tested_before
from sfa_dist.training.schedule import planned_steps


def is_finished(recipe: Recipe, directory: Path, only: str | None = None) -> bool:
    """Whether the recipe's stages are trained and tested in a run directory; of a recipe without a sweep.

    What a start of the run compares is compared here too: keys that are `Fixed`, clips, seed and starting weights.
    With `only` that stage alone counts, and no test.

    Raises DataError for clips that are not there, CheckpointError for a record or weights that cannot be read.
    """
    if only is not None:
        return _is_trained(recipe, directory, only)
    if not (directory / RESULT).is_file():
        return False  # Nothing has to be read.
    names = [name for name in STAGE_NAMES if getattr(recipe, name) is not None]
    return all(_is_trained(recipe, directory, name) for name in names) and _is_tested(recipe, directory, names[-1])


def _is_trained(recipe: Recipe, directory: Path, name: str) -> bool:
    stage: StageBlock = getattr(recipe, name)
    if stage.given_weights:
        return True
    done = read_done(directory / name)
    if done is None:
        return False
    index = _index(stage, stage.data.train)
    source = identity_of(source_of(recipe, directory, stage))
    if different_inputs(done["inputs"], stage_inputs(recipe, stage, index.sha256, source)):
        return False
    return bool(done["result"]["steps"] >= planned_steps(stage.schedule, steps_per_epoch(stage, index)))


def _is_tested(recipe: Recipe, directory: Path, name: str) -> bool:
    stage: StageBlock = getattr(recipe, name)
    index = _index(stage, stage.data.test or stage.data.val)
    inputs = inputs_of_test(recipe, directory, name, index, [weights_of(recipe, directory, name)])
    return tested_before(directory, inputs) is not None


def _index(stage: StageBlock, patterns: Sequence[str]) -> SampleIndex:
    return load_index(expand_shards(patterns, stage.data.remote), stage.data.remote)
