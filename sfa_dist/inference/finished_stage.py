"""Finished weights, found by their run or by their file: the input of `sfa evaluate` and `sfa predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfa_dist.boundary.disk import read_object
from sfa_dist.boundary.file_names import RECIPE, RESULT, WEIGHTS
from sfa_dist.errors import CheckpointError, RecipeError, UsageError
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe


@dataclass(frozen=True)
class FinishedStage:
    """A stage's final weights, and the recipe file that belongs to them.

    `trunk_weights` are stage 1's weights, which hold the trunk of stage 2; None for other stages. `run_dir` is None
    for weights that are given by their file.
    """

    recipe_file: Path
    stage: str
    weights: Path
    trunk_weights: Path | None
    run_dir: Path | None = None


def recipe_of_run(run_dir: Path) -> Path:
    """The recipe file of a run. Raises UsageError if there is none."""
    file = run_dir / RECIPE
    if not file.is_file():
        raise UsageError(f"{run_dir} is not a run directory (it has no {RECIPE})")
    return file


def finished_of_run(recipe: Recipe, run_dir: Path, stage: str | None) -> FinishedStage:
    """A stage of a run, by default its last; stage 2 of a sweep is the member that the test chose.

    Never falls back to another stage or member. Raises UsageError for a stage that is not in the recipe,
    CheckpointError for a stage without final weights.
    """
    present = [name for name in STAGE_NAMES if getattr(recipe, name) is not None]
    name = stage or present[-1]
    if name not in present:
        raise UsageError(f"--stage {name}: the run {run_dir} has no such stage (it has {', '.join(present)})")
    given = recipe.stage1.weights if recipe.stage1 else None
    stage1 = Path(given) if given else run_dir / "stage1" / WEIGHTS
    file, folder = run_dir / RECIPE, run_dir / name
    if recipe.sweep and name == "stage2":
        folder = folder / "members" / _best_member(run_dir)
        file = folder / RECIPE
    weights = stage1 if name == "stage1" else folder / WEIGHTS
    if not weights.is_file():
        others = [f"--stage {other}" for other in present if other != name and (run_dir / other / WEIGHTS).is_file()]
        advice = " or ".join(["train it to the end first", *others])
        raise CheckpointError(f"{name} of {run_dir} has no weights yet ({weights}): {advice}")
    return FinishedStage(file, name, weights, _existing(stage1) if _lacks_trunk(recipe, name) else None, run_dir)


def _best_member(run_dir: Path) -> str:
    try:
        return str(read_object(run_dir / RESULT, best=str)["best"])
    except (OSError, ValueError):
        raise CheckpointError(
            f"{run_dir} is a sweep that has not been tested yet, so its best member is unknown: give a member with "
            "--recipe and --weights (stage2/members/m.../)"
        ) from None


def finished_of_weights(
    recipe: Recipe, recipe_file: Path, weights: Path, trunk_weights: Path | None, stage: str | None
) -> FinishedStage:
    """A stage by its weights file. `stage` defaults to the one in the file's metadata.

    The trunk of stage 2 comes from `trunk_weights`, or else from the recipe's `stage1.weights`. Raises CheckpointError
    for a missing file, UsageError if the stage or the trunk is unknown, RecipeError if the recipe has no such stage.
    """
    # Imported here: it loads torch, and commands check their arguments first.
    from sfa_dist.models.weights_file import read_metadata

    _existing(weights)
    name = stage or read_metadata(weights).get("stage")
    if name is None:
        raise UsageError(f"{weights} does not name its stage: give --stage image, stage1 or stage2")
    if getattr(recipe, name, None) is None:
        raise RecipeError(f"{weights} is of {name}, and the recipe has no such stage")
    if not _lacks_trunk(recipe, name):
        return FinishedStage(recipe_file, name, weights, None)
    given = trunk_weights or (Path(recipe.stage1.weights) if recipe.stage1 and recipe.stage1.weights else None)
    if given is None:
        raise UsageError(f"{weights} is of stage2 and holds no trunk: give stage 1's weights with --trunk-weights")
    return FinishedStage(recipe_file, name, weights, _existing(given))


def _lacks_trunk(recipe: Recipe, name: str) -> bool:
    """Whether a stage's weights hold no trunk, because it was frozen."""
    return bool(getattr(recipe, name).freezes_trunk)


def _existing(weights: Path) -> Path:
    if not weights.is_file():
        raise CheckpointError(f"no weights file {weights}")
    return weights
