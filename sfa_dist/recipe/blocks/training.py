"""How a stage trains: batches, optimizer, schedule, engine and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sfa_dist.recipe.blocks.base import Finite, Fixed, Fraction, Free, Positive, RecipeBlock, field_error


class BatchBlock(RecipeBlock):
    """The global batch and its parts. The number of ranks sets the size and number of each rank's micro-batches."""

    size: Fixed[Positive] = 64
    """Global batch, clips."""

    micro: Free[Positive] = 1
    """Most clips that one rank holds at a time."""

    eval_micro: Free[Positive | None] = None
    """Clips that a rank holds at a time in validation and test; null is `micro`."""

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each rank takes for one global batch."""
        return -(-self.size // (world_size * self.micro))

    def on_ranks(self, world_size: int) -> BatchBlock:
        """With the smallest `micro` that takes no more accumulation, so that no rank idles while others work."""
        micro = -(-self.size // (world_size * self.accumulation(world_size)))
        return self.model_copy(update={"micro": micro, "eval_micro": self.eval_micro or self.micro})


class OptimizerBlock(RecipeBlock):
    """SGD with momentum (the paper's) or AdamW."""

    name: Fixed[Literal["sgd", "adamw"]] = "sgd"
    """Optimizer."""

    lr: Fixed[Finite]
    """Peak learning rate, reached at the end of the warm-up."""

    momentum: Fixed[Fraction] = 0.9
    """Momentum of `sgd`."""

    betas: Fixed[Annotated[list[float], Field(min_length=2, max_length=2)]] = [0.9, 0.999]
    """Decay rates of the two moments of `adamw`."""

    eps: Fixed[Finite] = 1e-8
    """Term that `adamw` adds to its denominator."""

    weight_decay: Fixed[Finite] = 0.0
    """Weight decay of weight matrices; biases, norms, cls tokens and positions have none."""

    clip_norm: Fixed[Finite] = 1.0
    """Norm to which the gradient of a step is clipped; 0 does not clip."""

    label_smoothing: Fixed[Fraction] = 0.0
    """Part of a label's probability that is spread over all classes."""


class ScheduleBlock(RecipeBlock):
    """Linear warm-up, then a half cosine down to zero."""

    epochs: Fixed[Annotated[int, Field(ge=0, lt=2**31)]]
    """Epochs of the stage. 0 is for stage 1 alone: it trains nothing, and stage 2 starts from the image checkpoint and
    a random temporal encoder."""

    warmup_epochs: Fixed[Finite] = 2.5
    """Epochs of the warm-up; may be a fraction."""

    max_steps: Free[Positive | None] = None
    """Optimizer steps after which the stage ends early, on the same curve; null: its whole schedule."""


class EngineBlock(RecipeBlock):
    """What shards and steps the trainable module."""

    name: Free[Literal["deepspeed", "fsdp"]] = "deepspeed"
    """`deepspeed` (ZeRO), or `fsdp` (torch's FSDP2), which shards parameters, gradients and optimizer state."""

    zero: Free[Annotated[int, Field(ge=0, le=3)]] = 2
    """ZeRO stage of `deepspeed`; `fsdp` ignores it. One rank has nothing to shard and runs 1, 2 and 3 as 0 (the same
    checkpoints in less time), unless `cpu_offload`, a `deepspeed` block or an `activation_backend` needs the stage."""

    precision: Free[Literal["bf16", "fp32"]] = "bf16"
    """Precision of the computation; master weights are always fp32."""

    cpu_offload: Free[bool] = False
    """Keep master weights and moments in host memory, and take the optimizer step there."""

    reduction: Free[Literal["native", "tree"]] = "native"
    """`tree` adds gradients in an order that does not depend on the number of ranks, so that 1, 2, 4, ... ranks give
    the same bits. It is for audits: it replicates everything, whatever `name` and `zero` say. `native` leaves the
    order to the engine."""

    shard_ranks: Free[Positive | None] = None
    """Ranks, neighbours in order, that share one copy of the state under `fsdp` (hybrid sharding); gradients are
    averaged over the copies. With a node's number of GPUs, gathers stay inside the node. null, or more than there
    are: all ranks share one copy."""

    @property
    def is_exact(self) -> bool:
        """Whether gradients are added in an order that does not depend on the ranks."""
        return self.reduction == "tree"

    @property
    def uses_fsdp(self) -> bool:
        """Whether torch's FSDP2 runs the stage."""
        return self.name == "fsdp" and not self.is_exact

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage that DeepSpeed runs; None where another engine does."""
        return self.zero if self.name == "deepspeed" and not self.is_exact else None

    @property
    def replicates(self) -> bool:
        """Whether each rank holds all of the parameters, gradients and optimizer state."""
        return self.is_exact or self.zero_stage == 0

    @property
    def shards_optimizer(self) -> bool:
        """Whether a rank holds only a shard of the optimizer state."""
        return not self.replicates

    @property
    def gathers_parameters(self) -> bool:
        """Whether a rank holds only shards of the parameters, and whole ones where a block runs: ZeRO 3 and FSDP2."""
        return self.uses_fsdp or self.zero_stage == 3

    @property
    def title(self) -> str:
        """The engine's name in what is printed."""
        if self.is_exact:
            return "replicated, exact"
        sharding = "FSDP2" if self.uses_fsdp else f"ZeRO-{self.zero_stage}"
        sharding += f" in groups of {self.shard_ranks}" if self.shard_ranks else ""
        return sharding + (", offloaded to the CPU" if self.cpu_offload else "")

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> EngineBlock:
        if self.cpu_offload and self.is_exact:
            raise field_error("cpu_offload", "goes with engine.reduction: native, not with tree")
        if self.cpu_offload and self.replicates:
            raise field_error("cpu_offload", "DeepSpeed offloads from ZeRO 1 on: set engine.zero to 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _shares_copies_under_fsdp(self) -> EngineBlock:
        if self.shard_ranks is None or self.uses_fsdp:
            return self
        if self.is_exact:
            raise field_error("shard_ranks", "has no effect: engine.reduction is tree, which shards nothing; remove it")
        raise field_error(
            "shard_ranks",
            "needs engine.name: fsdp; for ZeRO 3 set deepspeed.zero_optimization.zero_hpz_partition_size",
        )

    def refusal_of(self, world_size: int, micro_batches: int) -> str | None:
        """Why the engine does not run on so many ranks, with `micro_batches` in a global batch; None where it does."""
        if self.is_exact:
            if world_size & (world_size - 1) or micro_batches % world_size:
                return (
                    "engine.reduction: tree needs a number of ranks that is a power of two and divides "
                    f"batch.size / batch.micro = {micro_batches}, not {world_size} ranks"
                )
        elif world_size % self.shards(world_size):
            return f"engine.shard_ranks is {self.shard_ranks}, which does not divide the {world_size} ranks of this run"
        return None

    def on_ranks(self, world_size: int) -> EngineBlock:
        """The engine that runs on so many ranks: on one, ZeRO 1 to 3 have nothing to shard and run as ZeRO 0.

        Offloading needs its ZeRO stage on one rank too. What else does, the stage knows (`StageBlock.on_ranks`).
        """
        pointless = world_size == 1 and self.zero_stage is not None and not self.cpu_offload
        return self.model_copy(update={"zero": 0}) if pointless else self

    def title_of(self, running: EngineBlock) -> str:
        """The title of this engine of a recipe where `running` stands for it."""
        return self.title if running == self else f"{self.title}, on one rank as {running.title}"

    def shards(self, world_size: int) -> int:
        """How many of `world_size` ranks share one copy of the state."""
        if self.replicates:
            return 1
        return min(self.shard_ranks or world_size, world_size)


class CheckpointBlock(RecipeBlock):
    """A checkpoint is written at the end of each epoch, and in between as `every_steps` says."""

    every_steps: Free[Positive | None] = None
    """Optimizer steps between two checkpoints; null: only at the end of each epoch."""

    asynchronous: Free[bool] = True
    """Copy the state to host memory (4 bytes for each master value and moment that the rank owns) and write from there
    while training goes on; false waits until it is on disk."""

    keep: Free[Positive] = 2
    """Newest checkpoints that are kept."""
