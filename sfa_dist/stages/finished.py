"""Whether a run directory holds all that a recipe asks for: what a start of the run would find, without one."""

from __future__ import annotations

from pathlib import Path

from sfa_dist.boundary.file_names import RESULT
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.models.weights_file import checked_sha256, recorded_sha256
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe, StageBlock
from sfa_dist.recipe.shipped import weights_path
from sfa_dist.run.context import identity_of, source_of, weights_of
from sfa_dist.run.record import different_inputs, read_done, stage_inputs
from sfa_dist.stages.open_data import load_split, steps_per_epoch
from sfa_dist.stages.scoring import inputs_of_test, tested_before
from sfa_dist.training.schedule import planned_steps


def is_finished(recipe: Recipe, directory: Path, only: str | None = None) -> bool:
    """Whether the recipe's stages are trained and tested in a run directory; of a recipe without a sweep.

    What a start of the run compares is compared here too: keys that are `Fixed`, clips, seed and starting weights.
    Weights are known by the hash that was recorded when they were made: a result stays one when they are removed
    later. With `only` that stage alone counts, and no test.

    Raises DataError for clips that are not there, CheckpointError for a record that cannot be read.
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
    index = _index(directory, stage, f"{name}.data.train", stage.data.train)
    source = source_of(recipe, directory, stage) or ""
    identity = (source and recorded_sha256(weights_path(source))) or identity_of(source)
    if different_inputs(done["inputs"], stage_inputs(recipe, stage, index.sha256, identity)):
        return False
    return bool(done["result"]["steps"] >= planned_steps(stage.schedule, steps_per_epoch(stage, index)))


def _is_tested(recipe: Recipe, directory: Path, name: str) -> bool:
    stage: StageBlock = getattr(recipe, name)
    index = _index(directory, stage, f"{name}.data.test", stage.data.test or stage.data.val)
    weights = [weights_of(recipe, directory, name)]
    inputs = inputs_of_test(recipe, directory, name, index, weights, _sha256_of)
    return tested_before(directory, inputs) is not None


def _sha256_of(weights: Path) -> str:
    return recorded_sha256(weights) or checked_sha256(weights)


def _index(directory: Path, stage: StageBlock, where: str, patterns: list[str]) -> SampleIndex:
    return load_split(patterns, f"{where} of {directory}", stage.data)
