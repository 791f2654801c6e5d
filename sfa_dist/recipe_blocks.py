"""The blocks of a recipe, typed: each is one subject, and stands at the top level or inside a stage. No torch here."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Finite = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Classes = Annotated[int, Field(ge=2)]

# The labels of an action, in the order of the official code: logits, label columns and action numbers follow it.
LABEL_HEADS = ("noun", "verb")


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
    """The factorised encoder. `size` gives the five dimensions at the end; each may be overridden.

    `classes` is the number of logits. For clips that have a noun and a verb in place of one label,
    `class_heads: {noun: 300, verb: 97}` divides them, and `classes` is their sum and may be left out.
    """

    size: Literal["tiny", "B", "L", "H", "g"]
    classes: Classes
    class_heads: dict[str, Classes] | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _classes_are_those_of_the_heads(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if isinstance(values.get("heads"), dict):
            raise complain("heads", "is the number of attention heads; for nouns and verbs write model.class_heads")
        heads = values.get("class_heads")
        if isinstance(heads, dict) and values.get("classes") is None and all(type(n) is int for n in heads.values()):
            return {**values, "classes": sum(heads.values())}
        return values

    @model_validator(mode="after")
    def _heads_are_noun_and_verb(self) -> ModelBlock:
        if self.class_heads is None:
            return self
        if tuple(self.class_heads) != LABEL_HEADS:
            raise complain("class_heads", f"has to be {' and '.join(LABEL_HEADS)}, in this order")
        if self.classes != sum(self.class_heads.values()):
            total = " + ".join(map(str, self.class_heads.values()))
            raise complain("classes", f"{self.classes} is not {total}, the sum of model.class_heads: leave it out")
        return self

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """How the logits are divided: (300, 97); () where each clip has one label."""
        return tuple((self.class_heads or {}).values())


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
    """Shards that are not on this machine's disks (docs/data.md).

    `s3://` is always read; `allow` opens `http://`, `https://` and `pipe:COMMAND`, which runs COMMAND in a shell.
    `anonymous` reads public S3 buckets without credentials. `cache_dir` keeps whole shards in a local folder, which
    pipes need, at most `cache_gib` GiB of them; with `stage` those of paths too, which are on a file system that many
    nodes share. `retries` is how often a read that failed for a passing reason is tried again, local files included:
    after 0.1, 0.4, 1.6, ... seconds, at most 30.
    """

    allow: list[Literal["http", "https", "pipe"]] = []
    anonymous: bool = False
    cache_dir: Annotated[str, Field(min_length=1)] | None = None
    cache_gib: Annotated[float, Field(gt=0.0)] | None = None
    stage: bool = False
    retries: Annotated[int, Field(ge=0, le=20)] = 4

    @model_validator(mode="after")
    def _caches_somewhere(self) -> RemoteBlock:
        if self.cache_dir is None and "pipe" in self.allow:
            raise complain("allow", "what a pipe gives is kept on disk: set data.remote.cache_dir to a local folder")
        if self.cache_dir is None and self.cache_gib is not None:
            raise complain("cache_gib", "limits a cache that is off: set data.remote.cache_dir to a local folder")
        if self.cache_dir is None and self.stage:
            raise complain("stage", "has no place for the shards: set data.remote.cache_dir to a local folder")
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


class MixupBlock(Block):
    """Each clip is blended with its mirror image in the global batch, or in its micro-batch (`over: device`), and so is
    its loss; the share is drawn from Beta(alpha, alpha), once a batch.

    `global` is the same for any number of ranks; where batch.micro is odd, it decodes clips twice.
    """

    alpha: Annotated[float, Field(gt=0.0, le=1.0)]
    over: Literal["global", "device"] = "global"


class AugmentBlock(Block):
    """Training augmentation of the official ViViT recipes. Each parameter is drawn once for all frames of a clip.

    `rand_augment` takes the place of `color` and `gray`, which are probabilities. `mixup` blends what comes out.
    """

    scale_jitter: Annotated[list[float], Field(min_length=2, max_length=2)] | None = [0.9, 1.33]
    flip: Fraction = 0.5
    color: Fraction = 0.8
    gray: Fraction = 0.1
    rand_augment: RandAugmentBlock | None = None
    mixup: MixupBlock | None = None

    @model_validator(mode="after")
    def _one_kind_of_color(self) -> AugmentBlock:
        if self.rand_augment is not None and (self.color or self.gray):
            raise complain("rand_augment", "takes the place of color and gray: set both to 0")
        return self


class BatchBlock(Block):
    """`size` is the global batch in clips; `micro` is what one rank holds at a time, at most. Ranks give the rest:
    how many micro-batches one accumulates, and how large they are."""

    size: Positive = 64
    micro: Positive = 1
    eval_micro: Positive | None = None

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each rank takes for one global batch."""
        return -(-self.size // (world_size * self.micro))

    def on_ranks(self, world_size: int) -> BatchBlock:
        """With the smallest `micro` that takes no more accumulation, so that no rank idles while others work."""
        micro = -(-self.size // (world_size * self.accumulation(world_size)))
        return self.model_copy(update={"micro": micro, "eval_micro": self.eval_micro or self.micro})


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
    `shard_ranks` ranks, neighbours in order, share one copy of the state, and gradients are averaged over the copies
    (FSDP2's hybrid sharding): with the number of GPUs of a node, gathers stay inside of it. null, or more than there
    are: all ranks share one copy.
    `reduction: tree` adds gradients in an order that does not depend on the number of ranks, so that 1, 2, 4, ...
    ranks give the same bits. It replicates everything, so neither `name` nor `zero` matters: it is for audits.
    """

    name: Literal["deepspeed", "fsdp"] = "deepspeed"
    zero: Annotated[int, Field(ge=0, le=3)] = 2
    precision: Literal["bf16", "fp32"] = "bf16"
    cpu_offload: bool = False
    reduction: Literal["native", "tree"] = "native"
    shard_ranks: Positive | None = None

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> EngineBlock:
        if self.cpu_offload and self.reduction == "tree":
            raise complain("cpu_offload", "goes with engine.reduction: native, not with tree")
        if self.cpu_offload and self.name == "deepspeed" and self.zero == 0:
            raise complain("cpu_offload", "DeepSpeed offloads from ZeRO 1 on: set engine.zero to 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _shares_copies_under_fsdp(self) -> EngineBlock:
        if self.shard_ranks is None or (self.name == "fsdp" and self.reduction == "native"):
            return self
        if self.reduction == "tree":
            raise complain("shard_ranks", "has no effect: engine.reduction is tree, which shards nothing; remove it")
        raise complain(
            "shard_ranks",
            "is of engine.name: fsdp; DeepSpeed has deepspeed.zero_optimization.zero_hpz_partition_size for ZeRO 3",
        )

    def shards(self, world_size: int) -> int:
        """How many of `world_size` ranks share one copy of the state."""
        if self.reduction == "tree" or (self.name == "deepspeed" and self.zero == 0):
            return 1
        return min(self.shard_ranks or world_size, world_size)


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


class TestBlock(Block):
    """The final test. Scores are averaged over temporal x spatial views.

    `also_views` is a list of further [temporal, spatial] that are tested before, such as [[1, 1]] for a single view.
    `average` is what is averaged over the views: logits (the official code) or their softmax. `predictions` is the kind
    of file in which the scores of each clip are kept. `shuffled_frames` adds a control run in which the frames of each
    clip are in random order: how much of the score does not need time.
    """

    temporal_views: Positive = 1
    spatial_views: Literal[1, 3] = 1
    also_views: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = []
    average: Literal["logits", "softmax"] = "logits"
    predictions: Literal["npz", "parquet"] | None = "npz"
    shuffled_frames: bool = False

    @model_validator(mode="after")
    def _views_are_views(self) -> TestBlock:
        for temporal, spatial in self.also_views:
            if temporal < 1 or spatial not in (1, 3):
                raise complain("also_views", f"[{temporal}, {spatial}] is not [temporal, spatial] with 1 or 3 spatial")
        return self

    @property
    def view_grids(self) -> list[tuple[int, int]]:
        """All (temporal, spatial) views that are tested, each once; the last is the result."""
        result = (self.temporal_views, self.spatial_views)
        also = dict.fromkeys((temporal, spatial) for temporal, spatial in self.also_views)
        return [grid for grid in also if grid != result] + [result]


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
