"""How long a stage takes: floating-point operations over the card's sustained speed, or a measured micro-batch.

Loading, decoding and communication are not counted, and evaluation is reported apart. `step_seconds` adds rough costs
of transfers; it serves only to rank one change against another (`advice.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfa_dist.models.footprint import offloads
from sfa_dist.plan.cards import Card
from sfa_dist.plan.dataset import ClipCounts
from sfa_dist.plan.engine_setting import Setting
from sfa_dist.plan.feature_cache_plan import extraction_flops, mean_live_share
from sfa_dist.plan.flops import clip_flops, forward_macs
from sfa_dist.plan.memory import MemoryPlan
from sfa_dist.recipe.schema import StageBlock

LINK_BYTES_PER_SECOND = 25e9  # Between ranks and between host and device: PCIe 4, 16 lanes. Assumed.
HOST_BYTES_PER_SECOND = 20e9  # A rank's share of the host's memory while it steps an optimizer there. Assumed.


@dataclass(frozen=True)
class Duration:
    """Steps and hours of a stage on `world_size` ranks; None where clips or speed are not known."""

    steps: int | None
    hours: float | None
    gpu_hours: float | None
    evaluation_hours: float | None


def stage_duration(
    stage: StageBlock, clips: ClipCounts, card: Card, world_size: int, micro_seconds: float | None = None
) -> Duration:
    """Training hours of a stage. `micro_seconds`, a measured micro-batch, takes the place of the card's speed."""
    if clips.train is None:
        return Duration(None, None, None, None)
    full = stage.schedule.epochs * -(-clips.train // stage.batch.size)
    steps = min(full, stage.schedule.max_steps or full)
    per_micro = micro_seconds or compute_seconds(stage, card)
    if per_micro is None:
        return Duration(steps, None, None, None)
    accumulation = stage.batch.accumulation(world_size)
    hours = steps * accumulation * per_micro / 3600
    epochs = steps / max(1, full) * stage.schedule.epochs
    share = forward_share(stage)
    evaluations = epochs * (clips.val or 0) / (world_size * stage.batch.micro)
    return Duration(steps, hours, hours * world_size, evaluations * per_micro * share / 3600)


def members_duration(
    members: Sequence[StageBlock], clips: ClipCounts, card: Card, world_size: int, micro_seconds: float | None = None
) -> Duration:
    """The duration of a sweep's members, which take turns in each step: times add up, steps do not."""
    each = [stage_duration(stage, clips, card, world_size, micro_seconds) for stage in members]

    def total(name: str) -> float | None:
        values = [getattr(duration, name) for duration in each]
        return None if None in values else sum(values)

    return Duration(each[0].steps, total("hours"), total("gpu_hours"), total("evaluation_hours"))


def compute_seconds(stage: StageBlock, card: Card) -> float | None:
    """Seconds of one micro-batch at the card's sustained speed; None where that is unknown."""
    speed = card.sustained_tflops(stage.engine.precision)
    return None if speed is None else stage.batch.micro * trained_flops(stage) / (speed * 1e12)


def trained_flops(stage: StageBlock) -> float:
    """Operations to train one clip, averaged over a schedule that reads some clips from a cache."""
    return clip_flops(stage, recomputed=True, live=mean_live_share(stage))


def extraction_hours(stage: StageBlock, clips: ClipCounts, card: Card, world_size: int) -> float | None:
    """Hours that `world_size` ranks take to fill the feature cache; None where clips or speed are not known."""
    speed = card.sustained_tflops(stage.engine.precision)
    if speed is None or clips.train is None:
        return None
    return extraction_flops(stage, clips) / (speed * 1e12) / world_size / 3600


def forward_share(stage: StageBlock) -> float:
    """The operations of a clip in an evaluation, as a share of those in training."""
    macs = forward_macs(stage.model, stage.frames, stage.adapter_block)
    return 2.0 * ((0 if stage.cache_block else macs.trunk) + macs.tail) / trained_flops(stage)


def step_seconds(stage: StageBlock, card: Card, setting: Setting, plan: MemoryPlan) -> float:
    """Seconds of one optimizer step, with rough costs of transfers that nothing hides: only to compare settings."""
    speed = card.sustained_tflops(stage.engine.precision) or 100.0
    trained, width = plan.trainable_parameters, 2 if setting.bf16 else 4
    micro_batch = stage.batch.micro * trained_flops(stage) / (speed * 1e12)
    # A smaller micro-batch keeps a card less busy: assumed 2 % at one clip, halved with each doubling.
    micro_batch *= 1 + 0.02 / stage.batch.micro
    if setting.world > 1:
        micro_batch += (3 if stage.engine.gathers_parameters else 1) * trained * width / LINK_BYTES_PER_SECOND
    if stage.activation.endswith("offload") or offloads(stage):
        micro_batch += 2 * plan.host_bytes / LINK_BYTES_PER_SECOND
    step = setting.accumulation * micro_batch
    if setting.offload:
        step += 2 * trained * width / setting.world / LINK_BYTES_PER_SECOND
        step += 2 * plan.optimizer_bytes_per_rank / HOST_BYTES_PER_SECOND
    return step
