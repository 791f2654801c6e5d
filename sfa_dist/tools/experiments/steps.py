"""Cuts a row into runs: the image checkpoint, stage 1, and what is left of its recipe.

The first two go into run directories of their own, which are named after a hash of all that determines their result:
the stage's whole block, the seed, and where its weights come from. So rows with an equal stage share it. The image
checkpoint always has seed 0, as a public one is the same for all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sfa_dist.boundary.file_names import DONE, RECIPE, RESULT, WEIGHTS
from sfa_dist.recipe.schema import LoadedRecipe, StageBlock, load_recipe, record_recipe
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
        """Whether the run has ended, with the recipe as it is now. Raises RecipeError."""
        if self.stage:  # Its directory is that of its recipe.
            return (self.directory / self.stage / DONE).is_file()
        kept = self.directory / RECIPE
        if not (self.directory / RESULT).is_file() or not kept.is_file():
            return False
        return kept.read_text() == record_recipe(self.load(environ).recipe)


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
        steps = (_shared(IMAGE, recipe.image, 0, resolved, (*resolved.sets, "seed=0"), shared),)
    if recipe.stage2 is None or recipe.stage1 is None or recipe.stage1.weights:
        return steps
    sets = (*sets, *_given(steps))
    block = load_recipe(resolved.recipe, sets, environ).recipe.stage1
    assert block is not None
    return (*steps, _shared(STAGE1, block, seed, resolved, sets, shared))


def _shared(stage: str, block: StageBlock, seed: int, resolved: Resolved, sets: tuple[str, ...], shared: Path) -> Step:
    determines = json.dumps([stage, seed, block.model_dump(mode="json")], sort_keys=True)
    key = hashlib.sha256(determines.encode()).hexdigest()[:12]
    return Step(shared / f"{stage}-{key}", resolved.recipe, sets, stage)


def _given(steps: tuple[Step, ...]) -> tuple[str, ...]:
    """The overrides by which a run starts from what these have made."""
    keys = {IMAGE: ("image=null", "stage1.image_checkpoint="), STAGE1: ("stage1.weights=",)}
    sets: tuple[str, ...] = ()
    for step in steps:
        *others, key = keys[step.stage or ""]
        sets = (*sets, *others, key + json.dumps(str(step.weights)))
    return sets
