"""The stages of a recipe, typed. No torch here."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from sfa_dist.boundary.counted import counted
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import (
    AdapterBlock,
    AugmentBlock,
    BatchBlock,
    CacheBlock,
    CheckpointBlock,
    DataBlock,
    EngineBlock,
    Fixed,
    FramesOrAuto,
    Free,
    ModelBlock,
    NonNegative,
    OptimizerBlock,
    PathText,
    Positive,
    RecipeBlock,
    ScheduleBlock,
    field_error,
    free_keys,
)
from sfa_dist.recipe.shipped import weights_path

STAGE_BLOCKS = (
    *("model", "data", "augment", "batch", "optimizer", "schedule", "engine", "checkpoint", "deepspeed"),
    *("activation", "activation_backend", "compile"),
)


class StageBlock(RecipeBlock):
    """One training stage with all its blocks."""

    frames: Fixed[Positive]
    """Length of a clip, frames; a multiple of `model.tubelet`."""

    model: ModelBlock
    """The network."""

    data: DataBlock
    """Shards, and how clips are cut."""

    augment: AugmentBlock = AugmentBlock()
    """Training augmentation."""

    batch: BatchBlock = BatchBlock()
    """Batch sizes."""

    optimizer: OptimizerBlock
    """Optimizer and learning rate."""

    schedule: ScheduleBlock
    """Length of the stage and learning-rate curve."""

    engine: EngineBlock = EngineBlock()
    """Sharding and precision."""

    checkpoint: CheckpointBlock = CheckpointBlock()
    """When checkpoints are written."""

    deepspeed: Free[dict[str, Any]] = {}
    """DeepSpeed's own keys, passed through; one that contradicts the recipe, or that it would ignore, is refused."""

    activation: Free[Literal["keep", "checkpoint", "offload", "checkpoint_offload"]] = "keep"
    """What happens to the activations of each trained block between forward and backward: `keep` them; `checkpoint`
    keeps the block's input and recomputes the rest; `offload` moves them to host memory; `checkpoint_offload` moves
    the block's input and recomputes the rest."""

    activation_backend: Free[Literal["torch", "fairscale", "deepspeed"]] = "torch"
    """Library that does so."""

    compile: Free[bool] = False
    """Compile each trained block, and each block of stage 2's trunk, with torch.compile."""

    @property
    def may_train_nothing(self) -> bool:
        """Whether the stage may have no epochs, and pass on what it starts from."""
        return False

    @property
    def freezes_trunk(self) -> bool:
        """Whether the trunk is frozen, and only what comes behind it is trained."""
        return False

    @property
    def runs_frozen_trunk(self) -> bool:
        """Whether a frozen trunk runs in training, on some clips at least."""
        return False

    @property
    def reads_features(self) -> bool:
        """Whether all that is trained on comes from the feature cache."""
        return self.freezes_trunk and not self.runs_frozen_trunk

    @property
    def adapter_block(self) -> AdapterBlock | None:
        """The adapter behind the trunk, None without one."""
        return None

    @property
    def cache_block(self) -> CacheBlock | None:
        """The feature cache, None where the trunk runs on every clip."""
        return None

    @property
    def given_weights(self) -> str | None:
        """Weights that stand for the stage: then nothing of it is trained."""
        return None

    def own_seed(self, run_seed: int) -> int:
        """The seed of initial weights and drop path."""
        return run_seed

    def on_ranks(self, world_size: int) -> Self:
        """The stage as it runs on so many ranks: the same global batch in micro-batches that fit them, and the engine.

        Raises RecipeError for a number of ranks that the engine refuses, and where they leave mixup over a device
        without pairs, a silent no-op otherwise.
        """
        batch, mixup = self.batch.on_ranks(world_size), self.augment.mixup
        if why := self.engine.refusal_of(world_size, batch.size // batch.micro):
            raise RecipeError(why)
        if mixup is not None and mixup.over == "device" and batch.micro == 1:
            raise RecipeError(
                f"augment.mixup.over: device mixes within a micro-batch, and {counted(world_size, 'rank')} with "
                f"batch.size {batch.size} and batch.micro {self.batch.micro} hold one clip at a time: use over: global"
            )
        return self.model_copy(update={"batch": batch, "engine": self._engine_on(world_size)})

    def _engine_on(self, world_size: int) -> EngineBlock:
        """The recipe's own engine where a block of DeepSpeed's keys or an activation backend was chosen for it."""
        engine = self.engine.on_ranks(world_size)
        return self.engine if self.deepspeed or self._recomputes_without_autocast(engine) else engine

    def _recomputes_without_autocast(self, engine: EngineBlock) -> bool:
        """Whether bf16 is lost: ZeRO 0 and tree compute in it by autocast, which reentrant checkpoints do not keep."""
        return engine.precision == "bf16" and engine.replicates and self.activation_backend != "torch"

    @field_validator("deepspeed")
    @classmethod
    def _json_only(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError("takes no .inf and no .nan") from None
        return value

    @model_validator(mode="after")
    def _trains(self) -> StageBlock:
        if not self.schedule.epochs and not self.may_train_nothing:
            raise field_error("schedule", "epochs is 0, which trains nothing: only stage1 may do that")
        return self

    @model_validator(mode="after")
    def _frames_fill_tubelets(self) -> StageBlock:
        if self.frames % self.model.tubelet:
            raise field_error("frames", f"{self.frames} is not a multiple of model.tubelet ({self.model.tubelet})")
        return self

    @model_validator(mode="after")
    def _something_moves(self) -> StageBlock:
        model, static = self.model, self.data.stride == 0
        if model.tubelet_init == "difference" and static:
            raise field_error("model", "tubelet_init: difference is of frames that differ: a static clip needs random")
        if model.subtract != "none" and (static or self.frames == 1):
            raise field_error("model", "subtract leaves nothing of a static clip: set model.subtract: none")
        if model.centre and (static or self.frames == model.tubelet):
            raise field_error(
                "model", "centre leaves nothing of a static clip, or of one tubelet step: set model.centre: false"
            )
        return self

    @model_validator(mode="after")
    def _engine_fits_the_stage(self) -> StageBlock:
        engine, batch = self.engine, self.batch
        if self.deepspeed and engine.zero_stage is None:
            key = f"name is {engine.name}" if engine.name != "deepspeed" else "reduction is tree"
            raise field_error("deepspeed", f"has no effect: engine.{key}; remove the block")
        if self.activation == "offload" and self.activation_backend != "torch":
            raise field_error("activation", f"{self.activation_backend} cannot offload without checkpoints: use torch")
        if self._recomputes_without_autocast(engine):
            other = "or engine.zero: 1, 2 or 3" if not engine.is_exact else "or engine.precision: fp32"
            raise field_error(
                "activation_backend",
                f"{self.activation_backend} recomputes without the autocast that bf16 needs here: use torch, {other}",
            )
        if self.compile and self.activation == "offload":
            # Queries, keys and values are views of one tensor; offloaded with its strides, each takes the room of all.
            raise field_error(
                "compile",
                "compiled blocks need their saved tensors back with the same strides, which activation: offload does "
                "not keep: use checkpoint_offload",
            )
        if self.compile and self.activation != "keep" and self.activation_backend == "fairscale":
            raise field_error("compile", "fairscale's checkpoints run blocks uncompiled: use activation_backend: torch")
        if engine.is_exact and batch.size % batch.micro:
            raise field_error(
                "batch", f"engine.reduction: tree needs whole micro-batches: {batch.micro} does not divide {batch.size}"
            )
        return self


class ImageStage(StageBlock):
    """Trains an image checkpoint on static clips, where no public one fits."""


class Stage1(StageBlock):
    """Few frames; everything is trained."""

    frames: Fixed[Positive] = 8
    """Length of a clip, frames; a multiple of `model.tubelet`."""

    image_checkpoint: Free[PathText | None] = None
    """Weights that the spatial encoder starts from: `timm:NAME`, `sfa:NAME` (weights of the package), a file, or
    `stage:image`; null starts from random weights (docs/weights.md)."""

    weights: Free[PathText | None] = None
    """Weights of a finished stage 1, which is then not trained; null trains it."""

    @property
    def may_train_nothing(self) -> bool:
        return True

    @property
    def given_weights(self) -> str | None:
        return self.weights or None

    @model_validator(mode="after")
    def _one_source_of_the_kernel(self) -> Stage1:
        if self.image_checkpoint is not None and self.model.tubelet_init != "random":
            raise field_error(
                "model",
                f"tubelet_init: {self.model.tubelet_init} has no effect, as stage1.image_checkpoint gives the kernel: "
                "leave one of them out",
            )
        return self

    @field_validator("image_checkpoint")
    @classmethod
    def _is_shipped(cls, value: str | None) -> str | None:
        try:
            weights_path(value or "")
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return value


class Stage2(StageBlock):
    """Many frames; the trunk is frozen; adapter, temporal encoder and head are trained."""

    freeze_trunk: Fixed[bool] = True
    """Freeze the trunk; false trains it with the rest, at the cost of training end to end, and then the keys of a
    frozen trunk (`chunk_frames`, `offload: auto`, `overlap: auto`) have no effect."""

    adapter: AdapterBlock | None = AdapterBlock()
    """MLP between the encoders; null trains without one."""

    head: Fixed[Literal["auto", "zero"]] = "auto"
    """`auto` starts from stage 1's head where the classes are the same; `zero` starts from a new one."""

    chunk_frames: Free[FramesOrAuto] = 8
    """Frames that the trunk takes at a time; `auto` measures what a chunk takes and chooses by the free memory
    (docs/memory.md)."""

    offload: Free[Literal["on", "off", "auto"]] = "auto"
    """Keep clips and the trunk's output in host memory and move them chunk by chunk. `auto` does so for an adapter on
    tokens where clips and tokens are large (docs/memory.md)."""

    overlap: Free[Literal["on", "off", "auto"]] = "auto"
    """Run the next micro-batch's trunk beside this one's tail; `auto` does so on a GPU."""

    trunk_precision: Fixed[Literal["auto", "bf16", "int8", "fp8"]] = "auto"
    """Precision of the trunk; `auto` is the engine's; `int8` and `fp8` round its linear layers' weights."""

    cache: CacheBlock | None = None
    """Feature cache to train from; null runs the trunk live."""

    seed: Fixed[NonNegative | None] = None
    """Seed of the tail's initial weights and drop-path; null is the run's. The order of clips is always the run's."""

    @property
    def freezes_trunk(self) -> bool:
        return self.freeze_trunk

    @property
    def runs_frozen_trunk(self) -> bool:
        return self.freeze_trunk and (self.cache is None or self.cache.runs_trunk)

    @property
    def adapter_block(self) -> AdapterBlock | None:
        return self.adapter

    @property
    def cache_block(self) -> CacheBlock | None:
        return self.cache

    def own_seed(self, run_seed: int) -> int:
        return run_seed if self.seed is None else self.seed

    @model_validator(mode="after")
    def _cache_holds_what_is_trained_on(self) -> Stage2:
        if self.cache is None:
            return self
        if self.adapter is not None and self.adapter.placement == "tokens":
            raise field_error(
                "cache",
                "holds pooled features, and adapter.placement is tokens: four views of all tokens of Kinetics-400 are "
                "about 20 TB, pooled 0.1 TB; set adapter.placement: pooled, or cache: null",
            )
        if self.model.subtract != "none":
            raise field_error(
                "cache",
                f"holds the steps of whole videos, and with model.subtract: {self.model.subtract} a step depends on "
                "the clip that it is in: set cache: null, or model.subtract: none (model.centre works with a cache)",
            )
        pitch = self.model.tubelet * self.data.stride
        if not pitch or self.data.frame_order != "time":
            raise field_error("cache", "needs frames in time: data.stride of at least 1 and data.frame_order: time")
        if self.augment.mixup is not None:
            raise field_error("cache", "holds features: set stage2.augment.mixup: null and stage2.cache.mixup: ALPHA")
        if self.data.damaged == "salvage":
            raise field_error("cache", "holds whole videos: set data.damaged: strict, or cache: null")
        if self.cache.phases > pitch:
            raise field_error(
                "cache", f"phases {self.cache.phases}: there are only {pitch} (model.tubelet x data.stride)"
            )
        return self

    @model_validator(mode="after")
    def _keys_of_a_frozen_trunk(self) -> Stage2:
        wrong = {
            "cache": self.cache is not None,
            "trunk_precision": self.trunk_precision != "auto",
            "offload": self.offload == "on",
            "overlap": self.overlap == "on",
        }
        for key in (key for key, is_set in wrong.items() if is_set and not self.freeze_trunk):
            raise field_error(key, "is for a frozen trunk, and stage2.freeze_trunk is false: leave it out")
        return self

    @model_validator(mode="after")
    def _adapter_takes_what_the_model_gives(self) -> Stage2:
        if self.adapter is None or self.adapter.placement != "tokens":
            return self
        if self.model.centre:
            raise field_error(
                "adapter",
                "placement is tokens, but model.centre works on pooled vectors: set placement: pooled, or "
                "model.centre: false",
            )
        if self.model.pooling == "attention":
            raise field_error(
                "adapter",
                "placement is tokens, but model.pooling: attention pools them in the frozen trunk: set placement: "
                "pooled, or model.pooling: cls or gap",
            )
        return self

    @model_validator(mode="after")
    def _chunk_fills_tubelets(self) -> Stage2:
        if self.chunk_frames != "auto" and self.chunk_frames % self.model.tubelet:
            raise field_error(
                "chunk_frames", f"{self.chunk_frames} is not a multiple of model.tubelet ({self.model.tubelet})"
            )
        return self


# Of any stage: what may differ between a run and its continuation, by dotted name.
FREE_KEYS = free_keys(ImageStage, Stage1, Stage2)
