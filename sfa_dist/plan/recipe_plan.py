"""The plan of a whole recipe on a card: memory, frames and clips that fit, hours, disk and advice, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfa_dist.models.footprint import takes_tokens, trunk_eight_bits
from sfa_dist.parallel.engines.optimizers import moments_of
from sfa_dist.plan.advice import Advice, cheapest_fit
from sfa_dist.plan.cards import GIB, Card, largest_peak, reserve_bytes
from sfa_dist.plan.cost import cost_ratio, why_above_one
from sfa_dist.plan.dataset import ClipCounts, count_clips
from sfa_dist.plan.duration import Duration, extraction_hours, members_duration
from sfa_dist.plan.extraction_memory import predict_extraction
from sfa_dist.plan.feature_cache_plan import cache_bytes
from sfa_dist.plan.memory import MemoryPlan, predict_together, stages_of
from sfa_dist.plan.search import largest_frames, largest_micro
from sfa_dist.plan.wire import wire_bytes
from sfa_dist.recipe.schema import Recipe, StageBlock, sweep_members

CACHE = "cache"  # The name, among the stages, of filling the feature cache.


@dataclass(frozen=True)
class Need:
    """What a part of a run needs of a card."""

    name: str
    memory: MemoryPlan
    fits: bool

    @property
    def needed_bytes(self) -> int:
        """Allocated peak and reserve: what is compared with the card."""
        return self.memory.peak_bytes + reserve_bytes(self.memory.peak_bytes)


@dataclass(frozen=True)
class StagePlan(Need):
    """What one training stage takes.

    `max_frames` and `max_micro` are None where they were not searched for. `members` are the stages that a sweep trains
    together, or this stage alone.
    """

    stage: StageBlock
    members: Sequence[StageBlock]
    max_frames: int | None
    max_micro: int | None
    clips: ClipCounts
    duration: Duration
    checkpoint_bytes: int
    wire_bytes: int  # Sent by a rank for one optimizer step.
    advice: Advice | None

    @property
    def host_bytes(self) -> int:
        """Bytes in the host's memory for a rank: what is offloaded, and the copy that checkpoints are written from."""
        return self.memory.host_bytes + self.memory.optimizer_bytes_per_rank


@dataclass(frozen=True)
class RecipePlan:
    """The plans of a recipe's stages on `world_size` cards of one kind.

    `extraction` is the plan of filling the feature cache, where the recipe has one.
    """

    recipe: Recipe
    card: Card
    world_size: int
    stages: list[StagePlan]
    extraction: Need | None = None

    @property
    def needs(self) -> list[Need]:
        """Everything that has to fit."""
        return [*self.stages, *([self.extraction] if self.extraction else [])]

    @property
    def fits(self) -> bool:
        """Whether everything fits."""
        return all(need.fits for need in self.needs)

    @property
    def hardest(self) -> Need:
        """What needs the most memory."""
        return max(self.needs, key=lambda need: need.needed_bytes)

    @property
    def last(self) -> StagePlan:
        """The stage whose model is the result: its frames and parameters are the recipe's."""
        return self.stages[-1]

    def hours(self) -> dict[str, float | None]:
        """Hours by stage, in their order; the feature cache is a stage of its own where the recipe has one."""
        found: dict[str, float | None] = {}
        for plan in self.stages:
            if plan.stage.cache_block is not None:
                found[CACHE] = extraction_hours(plan.stage, plan.clips, self.card, self.world_size)
            found[plan.name] = plan.duration.hours
        return found

    def advice(self) -> list[str]:
        """What to change, one sentence each; empty where everything fits and nothing is odd."""
        lines = [_advise(plan, self.card, self.world_size) for plan in self.stages if not plan.fits]
        if self.extraction and not self.extraction.fits:
            lines.append(
                f"{_too_much(self.extraction, self.card)}: the frozen trunk alone does not fit; take a larger card, or "
                "smaller chunks (stage2.chunk_frames)"
            )
        if not self.card.has_bf16 and any(plan.stage.engine.precision == "bf16" for plan in self.stages):
            lines.append(f"{self.card.name} has no bf16 units: set engine.precision=fp32 (the hours assume it already)")
        fp8 = any(trunk_eight_bits(plan.stage) == "fp8" for plan in self.stages)
        if fp8 and not self.card.has_fp8:
            lines.append(f"{self.card.name} has no fp8 units, so the run is refused: set stage2.trunk_precision=int8")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The keys of the contract, and more. GiB are 2**30 bytes."""
        hours = self.hours()
        known = None not in hours.values()
        memory = self.last.memory
        return {
            "fits": self.fits,
            "peak_gib": self.hardest.needed_bytes / GIB,
            "peak_by_category": categories_gib(self.hardest),
            "peak_stage": self.hardest.name,
            "max_frames": self.last.max_frames,
            "max_micro_batch": self.last.max_micro,
            "total_parameters": memory.trainable_parameters + memory.frozen_parameters,
            "trainable_parameters": memory.trainable_parameters,
            "frozen_parameters": memory.frozen_parameters,
            "optimizer_bytes_per_rank": memory.optimizer_bytes_per_rank,
            "stage_hours": hours,
            "gpu_hours": self.world_size * sum(filter(None, hours.values())) if known else None,
            "cache_gib": cache_gib(self),
            "checkpoint_gib": sum(plan.checkpoint_bytes for plan in self.stages) / GIB,
            "advice": self.advice(),
            "cost_ratio": cost_ratio(self.recipe, self.last.clips.train),
            "cost_ratio_why": why_above_one(self.recipe, self.last.clips.train),
            "card": {"name": self.card.name, "gib": self.card.gib, "ranks": self.world_size},
            "stages": {
                **{plan.name: _stage_json(plan) for plan in self.stages},
                **({CACHE: _need_json(self.extraction)} if self.extraction else {}),
            },
        }


def plan_recipe(
    recipe: Recipe,
    card: Card,
    world_size: int,
    *,
    clips: int | None = None,
    only: str | None = None,
    search: bool = True,
    micro_seconds: dict[str, float] | None = None,
    report: Callable[[str], None] = lambda what: None,
) -> RecipePlan:
    """Plans the stages that train, or `only` one of them.

    `micro_seconds` has measured times of a micro-batch, by stage. `report` is called with what is being worked out.
    Without `search`, the largest frames and clips and the advice are left out. Raises RecipeError.
    """
    plans: list[StagePlan] = []
    extraction = None
    limit = largest_peak(card)
    for name, whole in stages_of(recipe).items():
        stage = whole.on_ranks(world_size)
        if only not in (None, name) or stage.given_weights:
            continue
        members = _members(recipe, name, world_size) or [stage]
        report(f"{name}: memory of {stage.frames} frames")
        memory = predict_together(members, world_size)
        fits = memory.peak_bytes <= limit
        report(f"{name}: clips of the data set")
        known = count_clips(stage, clips)
        if only is None and stage.cache_block is not None:
            report(f"{CACHE}: memory")
            filling = predict_extraction(stage, known.video_frames)
            extraction = Need(CACHE, filling, filling.peak_bytes <= limit)
        if search:
            report(f"{name}: largest frames and micro-batch that fit" + ("" if fits else ", and what makes it fit"))
        plans.append(
            StagePlan(
                name=name,
                memory=memory,
                fits=fits,
                stage=stage,
                members=members,
                max_frames=largest_frames(members, world_size, limit, memory.peak_bytes) if search else None,
                max_micro=largest_micro(members, world_size, limit, memory.peak_bytes) if search else None,
                clips=known,
                duration=members_duration(members, known, card, world_size, (micro_seconds or {}).get(name)),
                checkpoint_bytes=checkpoint_bytes(stage, memory),
                wire_bytes=sum(wire_bytes(member, world_size) for member in members),
                advice=cheapest_fit(name, whole, card, world_size, memory)
                if search and not fits and len(members) == 1
                else None,
            )
        )
    return RecipePlan(recipe, card, world_size, plans, extraction)


def _members(recipe: Recipe, name: str, world_size: int) -> list[StageBlock]:
    """The members that a sweep trains together in this stage; none without a sweep."""
    return [member.stage.on_ranks(world_size) for member in sweep_members(recipe)] if name == "stage2" else []


def checkpoint_bytes(stage: StageBlock, memory: MemoryPlan) -> int:
    """Disk bytes of a stage's checkpoints at most: those kept, the one being written, and the final weights."""
    one = 4 * memory.trainable_parameters * (1 + len(moments_of(stage.optimizer)))
    return (stage.checkpoint.keep + 1) * one + 4 * memory.trainable_parameters


def cache_gib(plan: RecipePlan) -> float | None:
    """GiB of the recipe's feature cache, or of one with a single view where it has none.

    None without a stage 2, and for an adapter on tokens, which no cache serves.
    """
    stage = plan.last.stage
    size = cache_bytes(stage, plan.last.clips) if stage.freezes_trunk and not takes_tokens(stage) else None
    return None if size is None else size / GIB


def categories_gib(plan: Need) -> dict[str, float]:
    """GiB by category at the peak, including the reserve; their sum is what is needed."""
    sizes = {**plan.memory.by_category, "reserve": reserve_bytes(plan.memory.peak_bytes)}
    return {name: size / GIB for name, size in sizes.items()}


def memory_line(members: Sequence[StageBlock], world_size: int, device: torch.device) -> str:
    """For `--dry-run`: whether a stage, or the members of a sweep together, fit this process's card, in words."""
    peak = predict_together(members, world_size).peak_bytes
    needed = f"memory plan: {(peak + reserve_bytes(peak)) / GIB:.1f} GiB a GPU, {peak / GIB:.1f} GiB of it tensors"
    if device.type != "cuda":
        return f"{needed}; there is no GPU here to compare it with"
    properties = torch.cuda.get_device_properties(device)
    card = Card(properties.name, properties.total_memory / GIB, None, None)
    verdict = "fits" if peak <= largest_peak(card) else "does NOT fit (see sfa plan)"
    return f"{needed}; {verdict} {card.name} ({card.gib:.1f} GiB)"


def _need_json(need: Need) -> dict[str, Any]:
    decode = need.memory.decode
    return {
        "fits": need.fits,
        "peak_gib": need.needed_bytes / GIB,
        "allocated_gib": need.memory.peak_bytes / GIB,
        "host_gib": need.memory.host_bytes / GIB,
        "peak_by_category": categories_gib(need),
        **({"decoder": str(decode)} if decode else {}),
    }


def _stage_json(plan: StagePlan) -> dict[str, Any]:
    return {
        **_need_json(plan),
        "host_gib": plan.host_bytes / GIB,
        "heads": len(plan.members),
        "frames": plan.stage.frames,
        "max_frames": plan.max_frames,
        "micro_batch": plan.stage.batch.micro,
        "max_micro_batch": plan.max_micro,
        "trainable_parameters": plan.memory.trainable_parameters,
        "frozen_parameters": plan.memory.frozen_parameters,
        "optimizer_bytes_per_rank": plan.memory.optimizer_bytes_per_rank,
        "clips": plan.clips.train,
        "clips_source": plan.clips.source,
        "steps": plan.duration.steps,
        "hours": plan.duration.hours,
        "gpu_hours": plan.duration.gpu_hours,
        "evaluation_hours": plan.duration.evaluation_hours,
        "checkpoint_gib": plan.checkpoint_bytes / GIB,
        "wire_bytes_per_step": plan.wire_bytes,
    }


def _too_much(need: Need, card: Card) -> str:
    return f"{need.name} needs {need.needed_bytes / GIB:.1f} GiB, {card.name} has {card.gib:g}"


def _advise(plan: StagePlan, card: Card, world_size: int) -> str:
    needed, found = _too_much(plan, card), plan.advice
    if len(plan.members) > 1:
        few = members_that_fit(plan.members, card, world_size)
        share = f"the first {few} fit together" if few else "not one of them fits alone"
        return (
            f"{needed}: {len(plan.members)} members train together, {share}; take fewer of them (sweep), or more ranks"
        )
    if found is None:
        return f"{needed}: nothing that was tried makes it fit; take a larger card, a smaller model or fewer frames"
    what = " ".join(f"--set {value}" for value in found.sets)
    if found.ranks != world_size:
        what = f"{what} --ranks {found.ranks}".strip()
    if found.slower < 0.995:
        cost = f"a step takes {found.slower:.2f} of the time"
    else:
        cost = f"about {found.slower - 1:.0%} slower"
    return f"{needed}: {what} makes it {found.gib:.1f} GiB, {cost}"


def members_that_fit(members: Sequence[StageBlock], card: Card, world_size: int) -> int:
    """How many of a sweep's members fit together, counted from the first."""
    low, high = 0, len(members)
    while low < high:
        middle = (low + high + 1) // 2
        if predict_together(members[:middle], world_size).peak_bytes <= largest_peak(card):
            low = middle
        else:
            high = middle - 1
    return low
