"""The cheapest change that makes a stage fit, by tracing what each change would take.

Changes, alone and up to three together, are tried from the cheapest in time to the dearest, by a rough model
(`duration.step_seconds`). More ranks come last: they cost no time, but not everyone has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from sfa_dist.errors import RecipeError
from sfa_dist.models.footprint import offloads, overlaps, trunk_dtype, trunk_eight_bits
from sfa_dist.parallel.engines.optimizers import moments_of
from sfa_dist.plan.cards import GIB, Card, largest_peak, reserve_bytes
from sfa_dist.plan.duration import step_seconds
from sfa_dist.plan.engine_setting import Setting
from sfa_dist.plan.memory import MemoryPlan, predict
from sfa_dist.recipe.schema import Stage2, StageBlock

MOST_TRACES = 10


@dataclass(frozen=True)
class Advice:
    """The `--set` values that make a stage fit on `ranks` ranks, and the `gib` that it then needs of a card.

    `slower` is the time of a step as a multiple of what it would be if the stage fitted unchanged.
    """

    sets: tuple[str, ...]
    ranks: int
    slower: float
    gib: float


@dataclass(frozen=True)
class _Change:
    """One key of a stage and its value; `block` is the block that holds the key, "" for the stage itself."""

    block: str
    key: str
    value: Any

    def apply(self, stage: StageBlock) -> StageBlock:
        if not self.block:
            return stage.model_copy(update={self.key: self.value})
        block = getattr(stage, self.block).model_copy(update={self.key: self.value})
        return stage.model_copy(update={self.block: block})

    def as_set(self, name: str) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return ".".join(filter(None, (name, self.block, self.key))) + f"={value}"


def cheapest_fit(name: str, stage: StageBlock, card: Card, world_size: int, plan: MemoryPlan) -> Advice | None:
    """What to set so that stage `name` fits; None where nothing that is tried does.

    `stage` is the recipe's, and `plan` is of what runs of it on `world_size` ranks.
    """
    limit = largest_peak(card)
    as_it_is = stage.on_ranks(world_size)
    before = _seconds(as_it_is, card, world_size, plan)
    candidates: list[tuple[float, tuple[_Change, ...], int, StageBlock]] = []

    def consider(chosen: tuple[_Change, ...], ranks: int) -> None:
        running = _running(_apply(stage, chosen), ranks)
        if running is not None and _persistent_bytes(running, ranks, plan) <= limit:
            candidates.append((_seconds(running, card, ranks, plan), chosen, ranks, running))

    changes = list(_changes(stage, as_it_is.batch.micro, world_size))
    for count in (1, 2, 3):
        for chosen in combinations(changes, count):
            if len({(change.block, change.key) for change in chosen}) == count:
                consider(chosen, world_size)
    candidates.sort(key=lambda candidate: (candidate[0], len(candidate[1])))
    for ranks in (world_size * 2, world_size * 4, world_size * 8):
        consider((), ranks)
    for _, chosen, ranks, running in candidates[: MOST_TRACES - 2] + candidates[-2:]:
        found = predict(running, ranks)
        if found.peak_bytes <= limit:
            slower = _seconds(running, card, ranks, found) / before
            needed = (found.peak_bytes + reserve_bytes(found.peak_bytes)) / GIB
            return Advice(tuple(change.as_set(name) for change in chosen), ranks, slower, needed)
    return None


def _changes(stage: StageBlock, running_micro: int, world_size: int) -> Iterator[_Change]:
    engine = stage.engine
    for micro in sorted({running_micro // 2, running_micro // 4, 1} - {0, running_micro}, reverse=True):
        yield _Change("batch", "micro", micro)
    live = stage.runs_frozen_trunk
    if isinstance(stage, Stage2) and live and stage.chunk_frames != stage.model.tubelet:
        yield _Change("", "chunk_frames", stage.model.tubelet)
    zero_stage = engine.zero_stage
    if zero_stage is not None and world_size > 1:
        for zero in (2, 3):
            # ZeRO-3 refuses compiled blocks, except those of a frozen trunk.
            if zero_stage < zero and not (zero == 3 and stage.compile and not stage.freezes_trunk):
                yield _Change("engine", "zero", zero)
    if stage.activation == "keep":
        yield _Change("", "activation", "checkpoint")
        yield _Change("", "activation", "checkpoint_offload")
    if live and not offloads(stage):
        yield _Change("", "offload", "on")
    if zero_stage is not None and zero_stage > 0 and not engine.cpu_offload:
        yield _Change("engine", "cpu_offload", True)


def _running(stage: StageBlock, world_size: int) -> StageBlock | None:
    """What runs of the changed stage on so many ranks; None where the recipe's rules, or its engine, refuse it."""
    try:
        running = type(stage).model_validate(stage.model_dump()).on_ranks(world_size)
        overlaps(running, on_card=True)
    except (ValidationError, RecipeError):
        return None
    return running


def _apply(stage: StageBlock, changes: tuple[_Change, ...]) -> StageBlock:
    for change in changes:
        stage = change.apply(stage)
    return stage


def _seconds(stage: StageBlock, card: Card, world_size: int, plan: MemoryPlan) -> float:
    return step_seconds(stage, card, _setting(stage, world_size), plan)


def _setting(stage: StageBlock, world_size: int) -> Setting:
    return Setting(stage, world_size, stage.batch.accumulation(world_size))


def _persistent_bytes(stage: StageBlock, world_size: int, plan: MemoryPlan) -> int:
    """A lower bound of what is on the device all the time, which needs no trace."""
    setting, trained = _setting(stage, world_size), plan.trainable_parameters
    width = 2 if setting.bf16 else 4
    engine = stage.engine
    frozen = plan.frozen_parameters * _frozen_width(stage)
    state = 0 if setting.offload else 4 * trained * (1 + len(moments_of(stage.optimizer)))
    if engine.replicates:
        return frozen + 4 * trained + state
    if engine.gathers_parameters:
        return frozen + state // setting.shards
    return frozen + width * trained + state // setting.shards


def _frozen_width(stage: StageBlock) -> int:
    """Bytes of a frozen weight, as most of them are; 0 where none are held."""
    if not stage.runs_frozen_trunk:
        return 0
    return 1 if trunk_eight_bits(stage) else trunk_dtype(stage).itemsize
