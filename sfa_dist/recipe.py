"""The typed schema of a recipe: one YAML file that describes one run completely.

A recipe is read strictly: an unknown key, a wrong type, a duplicate key or a YAML tag is an error with file, line
and a suggestion (`recipe_yaml.py` reads the text, `recipe_source.py` puts the files and overrides together, this file
types them, `recipe_errors.py` words what is wrong). No torch here: it runs on a login node.

The blocks in `STAGE_BLOCKS` may stand at the top level, where they are the defaults of every stage, and inside
a stage, where they hold for that stage alone. After loading, each stage carries its blocks complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, field_validator, model_validator

from sfa_dist.errors import RecipeError
from sfa_dist.recipe_blocks import (
    AdapterBlock,
    AugmentBlock,
    BatchBlock,
    Block,
    CacheBlock,
    CheckpointBlock,
    DataBlock,
    EngineBlock,
    FramesOrAuto,
    LogBlock,
    ModelBlock,
    NonNegative,
    OptimizerBlock,
    Positive,
    ScheduleBlock,
    StopBlock,
    TestBlock,
    complain,
)
from sfa_dist.recipe_errors import describe_errors
from sfa_dist.recipe_source import drop_marks, escape_variables, find, leaves, merge, read_source
from sfa_dist.recipe_yaml import Node, format_tree, plain

STAGE_BLOCKS = (
    *("model", "data", "augment", "batch", "optimizer", "schedule", "engine", "checkpoint", "deepspeed"),
    *("activation", "activation_backend", "compile"),
)
STAGE_NAMES = ("image", "stage1", "stage2")
# What the heads of a sweep may differ in: nothing that the stored features, the batches or the steps depend on.
SWEPT_KEYS = ("adapter.hidden", "adapter.residual", "head", "model.temporal_depth", "model.drop_path", "seed")
SWEPT_BLOCKS = ("optimizer.",)
MAX_MEMBERS = 1024


class StageBlock(Block):
    """One training stage with all its blocks. `frames` is the clip's length in frames.

    `activation` says what becomes of the activations of each trained transformer block between forward and backward:
    `keep` them, `checkpoint` (keep the block's input and compute the rest again), `offload` (move them to the host's
    memory), or `checkpoint_offload` (move the block's input and compute the rest again). `activation_backend` is
    whose code does it. `compile` compiles each trained block (and each block of stage 2's trunk) with torch.compile.
    """

    frames: Positive
    model: ModelBlock
    data: DataBlock
    augment: AugmentBlock = AugmentBlock()
    batch: BatchBlock = BatchBlock()
    optimizer: OptimizerBlock
    schedule: ScheduleBlock
    engine: EngineBlock = EngineBlock()
    checkpoint: CheckpointBlock = CheckpointBlock()
    deepspeed: dict[str, Any] = {}
    activation: Literal["keep", "checkpoint", "offload", "checkpoint_offload"] = "keep"
    activation_backend: Literal["torch", "fairscale", "deepspeed"] = "torch"
    compile: bool = False

    def on_ranks(self, world_size: int) -> Self:
        """The stage as it runs on so many ranks: the same global batch in micro-batches that fit them.

        Raises RecipeError where that leaves mixup over a device without pairs, a silent no-op otherwise.
        """
        batch, mixup = self.batch.on_ranks(world_size), self.augment.mixup
        if mixup is not None and mixup.over == "device" and batch.micro == 1:
            raise RecipeError(
                f"augment.mixup.over: device mixes within a micro-batch, and {world_size} rank(s) with batch.size "
                f"{batch.size} and batch.micro {self.batch.micro} hold one clip at a time: use over: global"
            )
        return self.model_copy(update={"batch": batch})

    @field_validator("deepspeed")
    @classmethod
    def _json_only(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError("takes no .inf and no .nan") from None
        return value

    @model_validator(mode="after")
    def _frames_fill_tubelets(self) -> StageBlock:
        if self.frames % self.model.tubelet:
            raise complain("frames", f"{self.frames} is not a multiple of model.tubelet ({self.model.tubelet})")
        return self

    @model_validator(mode="after")
    def _engine_fits_the_stage(self) -> StageBlock:
        engine, batch = self.engine, self.batch
        if self.deepspeed and (engine.name != "deepspeed" or engine.reduction == "tree"):
            key = f"name is {engine.name}" if engine.name != "deepspeed" else "reduction is tree"
            raise complain("deepspeed", f"has no effect: engine.{key}; remove the block")
        if self.activation == "offload" and self.activation_backend != "torch":
            raise complain("activation", f"{self.activation_backend} cannot offload without checkpoints: use torch")
        replicated_bf16 = engine.reduction == "tree" or (engine.name == "deepspeed" and engine.zero == 0)
        if engine.precision == "bf16" and replicated_bf16 and self.activation_backend != "torch":
            # ZeRO 0 and tree compute in bf16 by autocast; the reentrant checkpoints compute the second time without it.
            other = "or engine.zero: 1, 2 or 3" if engine.reduction != "tree" else "or engine.precision: fp32"
            raise complain(
                "activation_backend",
                f"{self.activation_backend} forgets the autocast that bf16 is here: use torch, {other}",
            )
        if self.compile and self.activation == "offload":
            # Queries, keys and values are saved as parts of one tensor; on the host each would take the room of all.
            raise complain(
                "compile",
                "compiled blocks want what they have saved back with its strides, which activation: offload does not "
                "keep: use checkpoint_offload",
            )
        if self.compile and self.activation != "keep" and self.activation_backend == "fairscale":
            raise complain("compile", "fairscale's checkpoints run blocks uncompiled: use activation_backend: torch")
        if engine.reduction == "tree" and batch.size % batch.micro:
            raise complain(
                "batch", f"engine.reduction: tree needs whole micro-batches: {batch.micro} does not divide {batch.size}"
            )
        return self


class ImageStage(StageBlock):
    """Trains an image checkpoint on static clips, where no public one fits."""


class Stage1(StageBlock):
    """Few frames, everything trained.

    `image_checkpoint` initialises the spatial encoder: `timm:<name>`, a file, or `stage:image`; null starts at random.
    `weights` takes the weights of a finished stage 1 instead of training one.
    """

    frames: Positive = 8
    image_checkpoint: str | None = None
    weights: str | None = None


class Stage2(StageBlock):
    """Many frames; the trunk is frozen; adapter, temporal encoder and head are trained.

    `adapter: null` trains without one. `head: auto` keeps stage 1's head when the classes are the same, `zero` starts
    anew. `chunk_frames` is how many frames the trunk takes at a time; `auto` measures what a chunk takes and looks at
    the free memory. `offload` keeps clip and trunk output in the host's memory and moves them chunk by chunk; `auto`
    does so for an adapter on tokens whose clips and tokens would take more than OFFLOAD_FROM_BYTES of the device.
    `overlap` runs the next micro-batch's trunk beside this one's tail; `auto` does so on a GPU.
    `trunk_precision: auto` is the engine's; `int8` and `fp8` round the weights of the trunk's linear layers.
    `cache: null` runs the trunk live. `seed` is of the tail's initial weights
    and drop-path alone (null: the run's); the order of clips stays the run's.
    """

    adapter: AdapterBlock | None = AdapterBlock()
    head: Literal["auto", "zero"] = "auto"
    chunk_frames: FramesOrAuto = 8
    offload: Literal["on", "off", "auto"] = "auto"
    overlap: Literal["on", "off", "auto"] = "auto"
    trunk_precision: Literal["auto", "bf16", "int8", "fp8"] = "auto"
    cache: CacheBlock | None = None
    seed: NonNegative | None = None

    @model_validator(mode="after")
    def _cache_holds_what_is_trained_on(self) -> Stage2:
        if self.cache is None:
            return self
        if self.adapter is not None and self.adapter.placement == "tokens":
            raise complain(
                "cache",
                "holds pooled features, and adapter.placement is tokens: four views of all tokens of Kinetics-400 are "
                "about 20 TB, pooled 0.1 TB; set adapter.placement: pooled, or cache: null",
            )
        pitch = self.model.tubelet * self.data.stride
        if not pitch or self.data.frame_order != "time":
            raise complain("cache", "needs frames in time: data.stride of at least 1 and data.frame_order: time")
        if self.augment.mixup is not None:
            raise complain("cache", "holds features: set stage2.augment.mixup: null and stage2.cache.mixup: ALPHA")
        if self.data.damaged == "salvage":
            raise complain("cache", "holds whole videos: set data.damaged: strict, or cache: null")
        if self.cache.phases > pitch:
            raise complain("cache", f"phases {self.cache.phases}: there are {pitch} (model.tubelet x data.stride)")
        return self

    @model_validator(mode="after")
    def _chunk_fills_tubelets(self) -> Stage2:
        if self.chunk_frames != "auto" and self.chunk_frames % self.model.tubelet:
            raise complain(
                "chunk_frames", f"{self.chunk_frames} is not a multiple of model.tubelet ({self.model.tubelet})"
            )
        return self


class Recipe(Block):
    """A whole run. At least one of the stages is there; they run in the order image, stage1, cache, stage2, test.

    `sweep` trains a stage 2 for every combination of its values together on one feature cache: keys of stage 2 with
    dots, such as `optimizer.lr: [0.1, 0.2]`.
    """

    name: str
    seed: NonNegative = 0
    image: ImageStage | None = None
    stage1: Stage1 | None = None
    stage2: Stage2 | None = None
    sweep: dict[str, list[Any]] = {}
    test: TestBlock = TestBlock()
    log: LogBlock = LogBlock()
    stop: StopBlock = StopBlock()

    @model_validator(mode="after")
    def _stages_follow(self) -> Recipe:
        if not any((self.image, self.stage1, self.stage2)):
            raise ValueError("a recipe needs at least one of image, stage1, stage2")
        if self.stage2 and not self.stage1:
            raise complain(
                "stage2", "starts from stage1: give a stage1 block (its `weights` may name finished weights)"
            )
        if self.stage1 and self.stage1.image_checkpoint == "stage:image" and not self.image:
            raise complain("stage1", "image_checkpoint is stage:image, but there is no image block")
        return self

    @model_validator(mode="after")
    def _sweeps_heads_on_a_cache(self) -> Recipe:
        if not self.sweep:
            return self
        if self.stage2 is None or self.stage2.cache is None or self.stage2.cache.runs_trunk:
            raise complain("sweep", "needs a stage2.cache without live clips: all members share its features")
        for key, values in self.sweep.items():
            if key not in SWEPT_KEYS and not key.startswith(SWEPT_BLOCKS):
                known = ", ".join((*SWEPT_KEYS, *(f"{block}*" for block in SWEPT_BLOCKS)))
                raise complain("sweep", f"cannot vary {key!r} (with dots, as one key); it can vary {known}")
            if not values or len({json.dumps(value) for value in values}) < len(values):
                raise complain("sweep", f"{key} needs a list of different values")
        try:
            members = sweep_members(self)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise complain("sweep", f"{key} {first['input']!r}: {first['msg'].removeprefix('Value error, ')}") from None
        if len(members) > MAX_MEMBERS:
            raise complain("sweep", f"has {len(members)} members, at most {MAX_MEMBERS} train together")
        return self


@dataclass(frozen=True)
class Member:
    """One head of a sweep: its name (m000, ...), what sets it apart, and its whole stage."""

    name: str
    settings: dict[str, Any]
    stage: Stage2


def sweep_members(recipe: Recipe) -> list[Member]:
    """Every combination of the sweep's values, the last key running fastest. Raises ValidationError for one that is no
    stage 2."""
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

    Raises RecipeError, one line per mistake, each with the place where the value stands.
    """
    path = Path(path)
    root = _spread_defaults(read_source(path, overrides, environ))
    try:
        recipe = Recipe.model_validate({"name": path.stem, **plain(root)})
    except ValidationError as error:
        raise RecipeError(describe_errors(error, root, Recipe, STAGE_BLOCKS)) from None
    return LoadedRecipe(recipe, _origins(recipe.model_dump(), root, ()))


def _spread_defaults(root: Node) -> Node:
    """Moves the top level's stage blocks under each stage that is there; the stage's own values win.

    Raises RecipeError for an override that no stage takes, because each has its own value: a silent no-op otherwise.
    """
    top: dict[str, Node] = dict(root.value) if isinstance(root.value, dict) else {}
    defaults = {name: top.pop(name) for name in STAGE_BLOCKS if name in top}
    stages = {name: top[name].value for name in STAGE_NAMES if name in top}
    for name, own in stages.items():
        if isinstance(own, dict):
            spread = {key: merge(value, own[key]) if key in own else value for key, value in defaults.items()}
            top[name] = replace(top[name], value={**own, **spread})
    whole = drop_marks(replace(root, value=top))
    taken = {leaf.place for leaf in leaves(whole)}
    for leaf in (leaf for block in defaults.values() for leaf in leaves(block)):
        if leaf.place.startswith("--set ") and leaf.place not in taken and any(stages.values()):
            raise RecipeError(f"{leaf.place}: has no effect, each stage sets its own: write <stage>.{leaf.key}=...")
    return whole


def _origins(tree: dict[str, Any], root: Node, path: tuple[str, ...]) -> dict[str, str]:
    origins: dict[str, str] = {}
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            origins |= _origins(value, root, here)
        else:
            node, depth = find(root, here)
            origins[".".join(here)] = node.place if depth == len(here) else "default"
    return origins


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to an equal Recipe."""
    return format_tree(escape_variables(recipe.model_dump()))


def print_recipe(loaded: LoadedRecipe) -> str:
    """`dump_recipe` with `# origin` behind each leaf."""
    return format_tree(escape_variables(loaded.recipe.model_dump()), comment=lambda key: loaded.origins[key])
