"""The typed schema of a recipe: one YAML file that describes one run completely.

A recipe is read strictly: an unknown key, a wrong type, a duplicate key or a YAML tag is an error with file, line
and a suggestion (`recipe_yaml.py` reads the text, `recipe_source.py` puts the files and overrides together, this file
types them, `recipe_errors.py` words what is wrong). No torch here: it runs on a login node.

The blocks in `STAGE_BLOCKS` may stand at the top level, where they are the defaults of every stage, and inside
a stage, where they hold for that stage alone. After loading, each stage carries its blocks complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sfa_dist.errors import RecipeError
from sfa_dist.recipe_errors import describe_errors
from sfa_dist.recipe_source import drop_marks, escape_variables, find, leaves, merge, read_source
from sfa_dist.recipe_yaml import Node, format_tree, plain

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Finite = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

STAGE_BLOCKS = (
    *("model", "data", "augment", "batch", "optimizer", "schedule", "engine", "checkpoint", "deepspeed"),
    *("activation", "activation_backend"),
)
STAGE_NAMES = ("image", "stage1", "stage2")
# What the heads of a sweep may differ in: nothing that the stored features, the batches or the steps depend on.
SWEPT_KEYS = ("adapter.hidden", "adapter.residual", "head", "model.temporal_depth", "model.drop_path", "seed")
SWEPT_BLOCKS = ("optimizer.",)
MAX_MEMBERS = 1024


def _frames_or_auto(value: object) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"expected a number of frames greater than 0, or auto, got {value!r}")


FramesOrAuto = Annotated[int | Literal["auto"], PlainValidator(_frames_or_auto)]


class Block(BaseModel):
    """Base of all blocks: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def shard_kind(shard: str) -> str:
    """`s3`, `https`, `pipe`, ... of a URL or pipe; "" for a local path."""
    if shard.startswith("pipe:"):
        return "pipe"
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", shard)
    return scheme.group(1).lower() if scheme else ""


def complain(field: str, message: str) -> PydanticCustomError:
    """An error of a whole block that is reported at the line of one of its fields."""
    return PydanticCustomError("recipe", "{message}", {"field": field, "message": message})


class ModelBlock(Block):
    """The factorised encoder. `size` gives the five dimensions below it; each may be overridden."""

    size: Literal["tiny", "B", "L", "H", "g"]
    classes: Annotated[int, Field(ge=2)]
    temporal_depth: NonNegative = 4
    image_size: Positive = 224
    tubelet: Positive = 2
    pooling: Literal["cls", "gap"] = "cls"
    drop_path: Fraction = 0.0
    width: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    mlp: Positive | None = None
    patch: Positive | None = None


class LimitsBlock(Block):
    """What one video may take at most; one that takes more is a bad sample. Sizes are judged from the file's header.

    `mib` is the size of the file and `frames` its length. `megapixels` is the size of one frame, and `decoded_mib`
    that of a whole clip (all its views) before it is resized. `seconds` is for opening a video or decoding one clip.
    """

    mib: Positive = 1024
    frames: Positive = 200_000
    megapixels: Annotated[float, Field(gt=0.0)] = 17.0
    decoded_mib: Positive = 4096
    seconds: Annotated[float, Field(gt=0.0)] = 120.0


class AdapterBlock(Block):
    """The two-layer MLP between spatial and temporal encoder. `hidden` is its width as a multiple of the model's."""

    hidden: Annotated[float, Field(gt=0.0, le=8.0)] = 0.5
    residual: bool = True
    placement: Literal["pooled", "tokens"] = "pooled"


class RemoteBlock(Block):
    """Shards that are not local files (docs/data.md).

    `s3://` is always read; `allow` opens `http://`, `https://` and `pipe:COMMAND`, which runs COMMAND in a shell.
    `anonymous` reads public S3 buckets without credentials. `cache_dir` keeps whole shards in a local folder, which
    pipes need, at most `cache_gib` GiB of them. `retries` is how often a read that failed for a passing reason is
    tried again, local files included: after 0.1, 0.4, 1.6, ... seconds, at most 30.
    """

    allow: list[Literal["http", "https", "pipe"]] = []
    anonymous: bool = False
    cache_dir: Annotated[str, Field(min_length=1)] | None = None
    cache_gib: Annotated[float, Field(gt=0.0)] | None = None
    retries: Annotated[int, Field(ge=0, le=20)] = 4

    @model_validator(mode="after")
    def _caches_somewhere(self) -> RemoteBlock:
        if self.cache_dir is None and "pipe" in self.allow:
            raise complain("allow", "what a pipe gives is kept on disk: set data.remote.cache_dir to a local folder")
        if self.cache_dir is None and self.cache_gib is not None:
            raise complain("cache_gib", "limits a cache that is off: set data.remote.cache_dir to a local folder")
        return self

    def refusal(self, shard: str) -> str | None:
        """Why a shard, or a pattern of some, is not read, and what to set; None where it is."""
        kind = shard_kind(shard)
        if kind in ("", "s3", *self.allow):
            return None
        if kind not in ("http", "https", "pipe"):
            return f"{kind}:// is not read, only local paths, s3://, https://, http:// and pipe:"
        cache = " and data.remote.cache_dir: FOLDER" if kind == "pipe" and not self.cache_dir else ""
        return f"{kind} is off: set data.remote.allow: [{kind}]{cache} if you trust it"


class DataBlock(Block):
    """Where the shards are and how a clip is cut from a video.

    `train`, `val` and `test` are paths, globs or brace patterns (`train-{000000..000099}.tar`), URLs or pipes.
    `stride` is the distance in video frames between two frames of a clip; 0 repeats one frame (a static clip).
    `resize` is the short side in pixels before cropping to `model.image_size`.
    `damaged: strict` takes a video that is cut or does not decode for a bad sample; `salvage` takes the clip from the
    frames before the damage, where there are enough.
    """

    train: list[str] = []
    val: list[str] = []
    test: list[str] = []
    stride: NonNegative = 2
    resize: Positive = 256
    frame_order: Literal["time", "shuffled"] = "time"
    mean: Annotated[list[float], Field(min_length=3, max_length=3)] = [0.5, 0.5, 0.5]
    std: Annotated[list[float], Field(min_length=3, max_length=3)] = [0.5, 0.5, 0.5]
    decoder: Literal["auto", "torchcodec", "pyav"] = "auto"
    damaged: Literal["strict", "salvage"] = "strict"
    limits: LimitsBlock = LimitsBlock()
    workers: NonNegative = 4
    shuffle_shards: Positive = 64
    max_bad_fraction: Fraction = 0.01
    remote: RemoteBlock = RemoteBlock()

    @model_validator(mode="after")
    def _shards_are_allowed(self) -> DataBlock:
        for split in ("train", "val", "test"):
            for pattern in getattr(self, split):
                if why := self.remote.refusal(pattern):
                    raise complain(split, f"{pattern.partition('?')[0]!r}: {why}")
        return self


class RandAugmentBlock(Block):
    """`layers` operations of RandAugment for each clip; the official magnitudes are 15 and 20."""

    layers: Positive = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 15


class AugmentBlock(Block):
    """Training augmentation of the official ViViT recipes. Each parameter is drawn once for all frames of a clip.

    `rand_augment` takes the place of `color` and `gray`, which are probabilities.
    """

    scale_jitter: Annotated[list[float], Field(min_length=2, max_length=2)] | None = [0.9, 1.33]
    flip: Fraction = 0.5
    color: Fraction = 0.8
    gray: Fraction = 0.1
    rand_augment: RandAugmentBlock | None = None

    @model_validator(mode="after")
    def _one_kind_of_color(self) -> AugmentBlock:
        if self.rand_augment is not None and (self.color or self.gray):
            raise complain("rand_augment", "takes the place of color and gray: set both to 0")
        return self


class BatchBlock(Block):
    """`size` is the global batch in clips; `micro` is what one rank holds at a time. Ranks give the accumulation."""

    size: Positive = 64
    micro: Positive = 1
    eval_micro: Positive | None = None


class OptimizerBlock(Block):
    """SGD with momentum (the paper's) or AdamW. `clip_norm` 0 clips nothing."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Finite
    momentum: Fraction = 0.9
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Finite = 1e-8
    weight_decay: Finite = 0.0
    clip_norm: Finite = 1.0
    label_smoothing: Fraction = 0.0


class ScheduleBlock(Block):
    """Linear warm-up, then cosine to zero. `max_steps` ends the stage early without changing the curve."""

    epochs: Positive
    warmup_epochs: Finite = 2.5
    max_steps: Positive | None = None


class EngineBlock(Block):
    """What shards and steps the trainable module.

    `zero` is the ZeRO stage of `deepspeed`; `fsdp` (torch's FSDP2) shards everything and does not look at it.
    `cpu_offload` keeps master weights and moments in the host's memory and steps there.
    `reduction: tree` adds gradients in an order that does not depend on the number of ranks, so that 1, 2, 4, ...
    ranks give the same bits. It replicates everything, so neither `name` nor `zero` matters: it is for audits.
    """

    name: Literal["deepspeed", "fsdp"] = "deepspeed"
    zero: Annotated[int, Field(ge=0, le=3)] = 2
    precision: Literal["bf16", "fp32"] = "bf16"
    cpu_offload: bool = False
    reduction: Literal["native", "tree"] = "native"

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> EngineBlock:
        if self.cpu_offload and self.reduction == "tree":
            raise complain("cpu_offload", "goes with engine.reduction: native, not with tree")
        if self.cpu_offload and self.name == "deepspeed" and self.zero == 0:
            raise complain("cpu_offload", "DeepSpeed offloads from ZeRO 1 on: set engine.zero to 1, 2 or 3")
        return self


class CheckpointBlock(Block):
    """A checkpoint is written every `every_steps` steps and at the end of each epoch (null: only there).

    The newest `keep` stay. `asynchronous` copies the state to host memory (4 bytes for each master value and moment
    that the rank owns) and writes from there while the training goes on; false waits until it is on disk.
    """

    every_steps: Positive | None = None
    asynchronous: bool = True
    keep: Annotated[int, Field(ge=1)] = 2


class CacheBlock(Block):
    """The feature cache: what the frozen trunk puts out for `views` augmented views of each video (docs/cache.md).

    `phases` of the tubelet x stride temporal phases are stored, all of which make every temporal crop exact.
    `dir` null is the run directory's own `cache/`. `live_fraction` of the clips of each epoch run through the trunk as
    without a cache; `refresh` more of them do from the epoch on in which stored views are seen again. `mixup` is the
    alpha of mixup on features, 0 for none.
    """

    views: Positive = 4
    phases: Positive = 1
    dir: str | None = None
    live_fraction: Fraction = 0.0
    refresh: Fraction = 0.0
    mixup: Fraction = 0.0

    @property
    def runs_trunk(self) -> bool:
        """Whether some clips run through the trunk all the same."""
        return self.live_fraction + self.refresh > 0

    def live_share(self, epoch: int) -> float:
        """Share of an epoch's clips that do."""
        return self.live_fraction + (self.refresh if epoch >= self.views else 0.0)

    @model_validator(mode="after")
    def _live_shares(self) -> CacheBlock:
        if self.live_fraction + self.refresh > 1:
            raise complain("refresh", "live_fraction and refresh are shares of the same clips: at most 1 together")
        if self.mixup and self.runs_trunk:
            raise complain("mixup", "mixes stored features: set live_fraction and refresh to 0, or mixup")
        return self


class StageBlock(Block):
    """One training stage with all its blocks. `frames` is the clip's length in frames.

    `activation` says what becomes of the activations of each trained transformer block between forward and backward:
    `keep` them, `checkpoint` (keep the block's input and compute the rest again), `offload` (move them to the host's
    memory), or `checkpoint_offload` (move the block's input and compute the rest again). `activation_backend` is
    whose code does it.
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
    `compile` compiles the trunk's blocks. `cache: null` runs the trunk live. `seed` is of the tail's initial weights
    and drop-path alone (null: the run's); the order of clips stays the run's.
    """

    adapter: AdapterBlock | None = AdapterBlock()
    head: Literal["auto", "zero"] = "auto"
    chunk_frames: FramesOrAuto = 8
    offload: Literal["on", "off", "auto"] = "auto"
    compile: bool = False
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


class TestBlock(Block):
    """The final test. Scores are averaged over temporal x spatial views.

    `shuffled_frames` adds a control run in which the frames of each clip are in random order: how much of the score
    does not need time.
    """

    temporal_views: Positive = 1
    spatial_views: Literal[1, 3] = 1
    shuffled_frames: bool = False


class LogBlock(Block):
    """`every` is in optimizer steps. `wandb: auto` is online with a key and offline without."""

    every: Positive = 10
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    wandb_project: str = "sfa_dist"


class StopBlock(Block):
    """What a stop request is, beside Ctrl-C: the run saves its state and leaves with 75.

    SIGUSR1 and SIGUSR2 are for schedulers; take one out that a library uses. `same_failures` attempts in a row that end
    at the same step with the same error, without a step made, are the last: the next one is refused (0: never).
    """

    signals: list[Literal["SIGTERM", "SIGUSR1", "SIGUSR2"]] = ["SIGTERM", "SIGUSR1"]
    same_failures: NonNegative = 3


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


def recipe_hash(part: Block | Mapping[str, Any]) -> str:
    """sha256 of a recipe, a block, or a mapping of blocks and plain values, in canonical JSON."""
    text = json.dumps(part, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_plain)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _as_plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    raise TypeError(f"{type(value).__name__} has no canonical JSON")
