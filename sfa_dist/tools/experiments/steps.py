"""Cuts a row into runs: the image checkpoint, stage 1, and what is left of its recipe.

The first two go into run directories of their own, which are named after a hash of all that determines their result:
the stage's Fixed keys, the seed, and where its clips and weights come from. So all rows with an equal stage share it,
of any table and scale. The image checkpoint always has seed 0, as a public one is the same for all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sfa_dist.boundary.file_names import DONE, RESULT, WEIGHTS
from sfa_dist.recipe.schema import LoadedRecipe, Recipe, StageBlock, load_recipe
from sfa_dist.tools.experiments.scales import Resolved

IMAGE, STAGE1 = "image", "stage1"
OWN_IMAGE = "stage:image"


@dataclass(frozen=True)
class Step:
    """One run of a recipe with overrides; of a shared one only `stage`."""

    directory: Path
    recipe: str
    sets: tuple[str, ...]
    stage: str | None = None

    @property
    def weights(self) -> Path:
        """The weights that a shared stage ends with."""
        assert self.stage is not None
        return self.directory / self.stage / WEIGHTS

    @property
    def words(self) -> list[str]:
        """The options of `sfa train`."""
        sets = [word for text in self.sets for word in ("--set", text)]
        only = ["--stage", self.stage] if self.stage else []
        return ["--recipe", self.recipe, *sets, "--run-dir", str(self.directory), *only]

    def load(self, environ: Mapping[str, str]) -> LoadedRecipe:
        """Its recipe. Raises RecipeError."""
        return load_recipe(self.recipe, self.sets, environ)

    def is_done(self, environ: Mapping[str, str]) -> bool:
        """Whether the run has ended, with all that determines its result as it is now.

        Raises RecipeError, DataError where its clips are not there, CheckpointError for a record that is damaged.
        """
        if not (self.directory / (self.stage or "") / (DONE if self.stage else RESULT)).is_file():
            return False
        # Imported here: it loads torch, which a plan of runs that are not there yet does not need.
        from sfa_dist.stages.finished import is_finished

        return is_finished(self.load(environ).recipe, self.directory, self.stage)


def steps_of(
    resolved: Resolved, seed: int, directory: Path, shared: Path, environ: Mapping[str, str]
) -> tuple[Step, ...]:
    """The runs of a row in their order; the last one, in `directory`, has the result. Raises RecipeError."""
    steps = _shared_steps(resolved.stage1 or resolved, seed, shared, environ)
    sets = (*resolved.sets, f"seed={seed}", *_given(steps))
    return (*steps, Step(directory, resolved.recipe, sets))


def _shared_steps(resolved: Resolved, seed: int, shared: Path, environ: Mapping[str, str]) -> tuple[Step, ...]:
    """The runs before the last one: none, the image checkpoint, or that and stage 1."""
    sets = (*resolved.sets, f"seed={seed}")
    steps: tuple[Step, ...] = ()
    recipe = load_recipe(resolved.recipe, sets, environ).recipe
    if recipe.image is not None and recipe.stage1 is not None and recipe.stage1.image_checkpoint == OWN_IMAGE:
        step = Step(shared, resolved.recipe, (*resolved.sets, "seed=0"), IMAGE)
        steps = (_named(step, recipe.model_copy(update={"seed": 0}), recipe.image),)
    if recipe.stage2 is None or recipe.stage1 is None or recipe.stage1.weights:
        return steps
    step = Step(shared, resolved.recipe, (*sets, *_given(steps)), STAGE1)
    recipe = step.load(environ).recipe if steps else recipe
    assert recipe.stage1 is not None
    return (*steps, _named(step, recipe, recipe.stage1))


def _named(step: Step, recipe: Recipe, block: StageBlock) -> Step:
    """The step with a directory, in the one it has, that is named after what determines its result."""
    # Imported here: it loads torch, which --help does not need.
    from sfa_dist.run.record import stage_inputs

    # The places of clips and weights stand for their content, which need not be there yet: `is_done` compares that.
    weights = getattr(block, "image_checkpoint", None) or ""
    determines = [step.stage, stage_inputs(recipe, block, json.dumps(block.data.train), weights)]
    key = hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:12]
    return replace(step, directory=step.directory / f"{step.stage}-{key}")


def _given(steps: tuple[Step, ...]) -> tuple[str, ...]:
    """The overrides by which a run starts from what these have made."""
    keys = {IMAGE: ("image=null", "stage1.image_checkpoint="), STAGE1: ("stage1.weights=",)}
    sets: tuple[str, ...] = ()
    for step in steps:
        *others, key = keys[step.stage or ""]
        sets = (*sets, *others, key + json.dumps(str(step.weights)))
    return sets
