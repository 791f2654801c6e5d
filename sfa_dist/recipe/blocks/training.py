"""How a stage trains: batches, optimizer, schedule, engine and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sfa_dist.recipe.blocks.base import Finite, Fixed, Fraction, Free, Positive, RecipeBlock, field_error


class BatchBlock(RecipeBlock):
    """`size` is the global batch in clips; `micro` is what one rank holds at a time, at most. Ranks give the rest:
    how many micro-batches one accumulates, and how large they are."""

    size: Fixed[Positive] = 64
    micro: Free[Positive] = 1
    eval_micro: Free[Positive | None] = None

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each rank takes for one global batch."""
        return -(-self.size // (world_size * self.micro))

    def on_ranks(self, world_size: int) -> BatchBlock:
        """With the smallest `micro` that takes no more accumulation, so that no rank idles while others work."""
        micro = -(-self.size // (world_size * self.accumulation(world_size)))
        return self.model_copy(update={"micro": micro, "eval_micro": self.eval_micro or self.micro})


class OptimizerBlock(RecipeBlock):
    """SGD with momentum (the paper's) or AdamW. `clip_norm` 0 clips nothing."""

    name: Fixed[Literal["sgd", "adamw"]] = "sgd"
    lr: Fixed[Finite]
    momentum: Fixed[Fraction] = 0.9
    betas: Fixed[Annotated[list[float], Field(min_length=2, max_length=2)]] = [0.9, 0.999]
    eps: Fixed[Finite] = 1e-8
    weight_decay: Fixed[Finite] = 0.0
    clip_norm: Fixed[Finite] = 1.0
    label_smoothing: Fixed[Fraction] = 0.0


class ScheduleBlock(RecipeBlock):
    """Linear warm-up, then cosine to zero. `max_steps` ends the stage early without changing the curve."""

    epochs: Fixed[Positive]
    warmup_epochs: Fixed[Finite] = 2.5
    max_steps: Free[Positive | None] = None


class EngineBlock(RecipeBlock):
    """What shards and steps the trainable module.

    `zero` is the ZeRO stage of `deepspeed`; `fsdp` (torch's FSDP2) shards everything and does not look at it.
    `cpu_offload` keeps master weights and moments in the host's memory and steps there.
    `shard_ranks` ranks, neighbours in order, share one copy of the state, and gradients are averaged over the copies
    (FSDP2's hybrid sharding): with the number of GPUs of a node, gathers stay inside of it. null, or more than there
    are: all ranks share one copy.
    `reduction: tree` adds gradients in an order that does not depend on the number of ranks, so that 1, 2, 4, ...
    ranks give the same bits. It replicates everything, so neither `name` nor `zero` matters: it is for audits.
    """

    name: Free[Literal["deepspeed", "fsdp"]] = "deepspeed"
    zero: Free[Annotated[int, Field(ge=0, le=3)]] = 2
    precision: Free[Literal["bf16", "fp32"]] = "bf16"
    cpu_offload: Free[bool] = False
    reduction: Free[Literal["native", "tree"]] = "native"
    shard_ranks: Free[Positive | None] = None

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

    def shards(self, world_size: int) -> int:
        """How many of `world_size` ranks share one copy of the state."""
        if self.replicates:
            return 1
        return min(self.shard_ranks or world_size, world_size)


class CheckpointBlock(RecipeBlock):
    """A checkpoint is written every `every_steps` steps and at the end of each epoch (null: only there).

    The newest `keep` stay. `asynchronous` copies the state to host memory (4 bytes for each master value and moment
    that the rank owns) and writes from there while the training goes on; false waits until it is on disk.
    """

    every_steps: Free[Positive | None] = None
    asynchronous: Free[bool] = True
    keep: Free[Positive] = 2
