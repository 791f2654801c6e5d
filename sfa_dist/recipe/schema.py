"""The typed schema of a recipe: one YAML file that describes one run completely.

A recipe is read strictly: an unknown key, a wrong type, a duplicate key or a YAML tag is an error with file, line and
a suggestion. `strict_yaml.py` reads the text, `source.py` puts files and overrides together, this file types them, and
`messages.py` words the errors. `stages.py` has the stages, `blocks/` their blocks. Nothing here imports torch, so it
runs on a login node.

The blocks in `STAGE_BLOCKS` may stand at the top level, where they are the defaults of every stage, and inside a stage,
where they hold for that stage alone. After loading, each stage has all of its blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from sfa_dist.boundary.secret import remember_source, without_secrets, without_secrets_in
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import (
    Fixed,
    FolderName,
    Free,
    LogBlock,
    NonNegative,
    OptimizerBlock,
    RecipeBlock,
    StopBlock,
    TestBlock,
    field_error,
)
from sfa_dist.recipe.messages import describe_errors
from sfa_dist.recipe.shipped import find_recipe
from sfa_dist.recipe.source import drop_marks, escape_variables, find, leaves, merge, read_source, texts
from sfa_dist.recipe.stage_names import STAGE_NAMES
from sfa_dist.recipe.stages import STAGE_BLOCKS, ImageStage, Stage1, Stage2, StageBlock
from sfa_dist.recipe.strict_yaml import Node, format_tree, plain

__all__ = [
    "STAGE_BLOCKS",
    "STAGE_NAMES",
    "ImageStage",
    "LoadedRecipe",
    "Member",
    "Recipe",
    "Stage1",
    "Stage2",
    "StageBlock",
    "dump_recipe",
    "load_recipe",
    "print_recipe",
    "record_recipe",
    "sweep_members",
]

# What the members of a sweep may differ in: nothing that the stored features, the batches or the steps depend on.
SWEPT_KEYS = (
    *("adapter.hidden", "adapter.residual", "head", "model.temporal_depth", "model.drop_path", "seed"),
    *(f"optimizer.{key}" for key in OptimizerBlock.model_fields),
)
MAX_MEMBERS = 1024


class Recipe(RecipeBlock):
    """A whole run. It has at least one stage; stages run in the order image, stage1, cache, stage2, test."""

    name: Free[FolderName]
    """Name of the run, and of its folder below `runs/`; the file's name where it is left out."""

    seed: Fixed[NonNegative] = 0
    """Seed of everything random: initial weights, drop-path, order of clips, augmentation."""

    device: Free[Literal["auto", "cuda", "cpu"]] = "auto"
    """What computes. `auto`: GPUs where there are any, else the CPU; a machine or job that has GPUs which torch cannot
    use is refused. `cpu` uses none."""

    image: ImageStage | None = None
    """Trains an image checkpoint, where no public one fits; null skips it."""

    stage1: Stage1 | None = None
    """Trains the whole model on few frames."""

    stage2: Stage2 | None = None
    """Trains adapter, temporal encoder and head on many frames; it needs `stage1`."""

    sweep: Fixed[dict[str, list[Any]]] = {}
    """Trains a stage 2 for every combination of these values together, on one feature cache. Keys are those of stage 2
    with dots, such as `optimizer.lr: [0.1, 0.2]`."""

    test: TestBlock = TestBlock()
    """The final test."""

    log: LogBlock = LogBlock()
    """Logging."""

    stop: StopBlock = StopBlock()
    """What stops a run."""

    @model_validator(mode="after")
    def _stages_follow(self) -> Recipe:
        if not any((self.image, self.stage1, self.stage2)):
            raise ValueError("a recipe needs at least one of image, stage1, stage2")
        if self.stage2 and not self.stage1:
            raise field_error(
                "stage2", "starts from stage1: give a stage1 block (its `weights` may name finished weights)"
            )
        if self.stage1 and self.stage1.image_checkpoint == "stage:image" and not self.image:
            raise field_error("stage1", "image_checkpoint is stage:image, but there is no image block")
        if self.stage1 and not self.stage1.schedule.epochs and not self.stage2:
            raise field_error("stage1", "schedule.epochs is 0, which trains nothing, and no stage2 starts from it")
        if self.stage1 and self.stage2:
            first, second = self.stage1.model, self.stage2.model
            given = self.stage1.given_weights is not None  # They say their own pooling.
            for key in ("positions", "subtract", "centre", *(() if given else ("pooling",))):
                if getattr(first, key) != getattr(second, key):
                    raise field_error("stage2", f"starts from stage1: model.{key} has to be the same in both")
        return self

    @model_validator(mode="after")
    def _freezes_trained_weights(self) -> Recipe:
        first, second = self.stage1, self.stage2
        if first is None or second is None or not second.freeze_trunk or first.schedule.epochs:
            return self
        if not first.image_checkpoint and not first.given_weights:
            raise field_error(
                "stage1",
                "schedule.epochs is 0 and image_checkpoint is null, so stage 2 would freeze a random trunk: name a "
                "checkpoint, or train stage 1",
            )
        return self

    @model_validator(mode="after")
    def _sweeps_members_on_a_cache(self) -> Recipe:
        if not self.sweep:
            return self
        if self.stage2 is None or not self.stage2.reads_features or self.stage2.runs_frozen_trunk:
            raise field_error("sweep", "needs a stage2.cache without live clips: all members share its features")
        for key, values in self.sweep.items():
            if key not in SWEPT_KEYS:
                known = ", ".join(SWEPT_KEYS)
                raise field_error("sweep", f"cannot vary {key!r}; as one key with dots it can vary {known}")
            if not values or len({json.dumps(value) for value in values}) < len(values):
                raise field_error("sweep", f"{key} needs a list of different values")
        members = prod(map(len, self.sweep.values()))
        if members > MAX_MEMBERS:  # Before they are made: a mistyped list may stand for millions.
            raise field_error("sweep", f"has {members} members, at most {MAX_MEMBERS} train together")
        try:
            sweep_members(self)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise field_error(
                "sweep", f"{key} {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
            ) from None
        return self


@dataclass(frozen=True)
class Member:
    """One member of a sweep: its name (m000, ...), the values that set it apart, and its whole stage."""

    name: str
    settings: dict[str, Any]
    stage: Stage2


def sweep_members(recipe: Recipe) -> list[Member]:
    """Every combination of the sweep's values; the last key varies fastest. Empty without a sweep.

    Raises ValidationError for a combination that is not a valid stage 2.
    """
    stage = recipe.stage2
    if stage is None or not recipe.sweep:
        return []
    members = []
    for number, values in enumerate(product(*recipe.sweep.values())):
        settings = dict(zip(recipe.sweep, values, strict=True))
        tree = stage.model_dump()
        for key, value in settings.items():
            *blocks, last = key.split(".")
            block = tree
            for name in blocks:
                block[name] = block[name] or {}
                block = block[name]
            block[last] = value
        members.append(Member(f"m{number:03d}", settings, Stage2.model_validate(tree)))
    return members


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and, for each leaf's dotted key, where it came from: `file:line`, `--set key=value` or `default`."""

    recipe: Recipe
    origins: dict[str, str]


def load_recipe(path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] = {}) -> LoadedRecipe:
    """Reads a recipe with its bases, `key.path=value` overrides (last wins) and `${VAR}`s taken from `environ`.

    Raises RecipeError, with one line per mistake and the source of the value in each.
    """
    path = find_recipe(Path(path))
    root = _spread_defaults(read_source(path, overrides, environ))
    for leaf in texts(root):
        remember_source(leaf)
    try:
        recipe = Recipe.model_validate({"name": path.stem, **plain(root)})
    except ValidationError as error:
        raise RecipeError(describe_errors(error, root, Recipe, STAGE_BLOCKS)) from None
    return LoadedRecipe(recipe, _origins(recipe.model_dump(), root, ()))


def _spread_defaults(root: Node) -> Node:
    """Moves the top level's stage blocks under each stage that is there; the stage's own values win.

    Raises RecipeError for an override that no stage takes, because each has its own value: it would change nothing.
    """
    top: dict[str, Node] = dict(root.value) if isinstance(root.value, dict) else {}
    defaults = {name: top.pop(name) for name in STAGE_BLOCKS if name in top}
    stages = {name: top[name].value for name in STAGE_NAMES if name in top}
    for name, own in stages.items():
        if isinstance(own, dict):
            spread = {key: merge(value, own[key]) if key in own else value for key, value in defaults.items()}
            top[name] = replace(top[name], value={**own, **spread})
    whole = drop_marks(replace(root, value=top))
    taken = {leaf.source for leaf in leaves(whole)}
    for leaf in (leaf for block in defaults.values() for leaf in leaves(block)):
        if leaf.source.startswith("--set ") and leaf.source not in taken and any(stages.values()):
            raise RecipeError(f"{leaf.source}: has no effect, each stage sets its own: write <stage>.{leaf.key}=...")
    return whole


def _origins(tree: dict[str, Any], root: Node, path: tuple[str, ...]) -> dict[str, str]:
    origins: dict[str, str] = {}
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            origins |= _origins(value, root, here)
        else:
            node, depth = find(root, here)
            origins[".".join(here)] = node.source if depth == len(here) else "default"
    return origins


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to an equal Recipe, secrets included."""
    return format_tree(escape_variables(recipe.model_dump()))


def record_recipe(recipe: Recipe) -> str:
    """`dump_recipe` for a run directory: passwords and signatures are `***`, so no command can read shards by it."""
    return format_tree(escape_variables(without_secrets_in(recipe.model_dump())))


def print_recipe(loaded: LoadedRecipe) -> str:
    """`record_recipe` with `# origin` after each leaf."""
    tree = escape_variables(without_secrets_in(loaded.recipe.model_dump()))
    return format_tree(tree, comment=lambda key: without_secrets(loaded.origins.get(key, "default")))
