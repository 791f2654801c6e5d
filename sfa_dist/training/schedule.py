"""The learning rate as a pure function of the step, so that a resumed run cannot be off by one.

The official schedule (scenic, train_lib/lr_schedules.py), with step s, w warm-up steps and `total` steps:
base * min(1, s / w) * 0.5 * (1 + cos(pi * max(0, s - w) / (total - w))).
"""

from __future__ import annotations

import math

from sfa_dist.recipe.blocks import ScheduleBlock


def learning_rate(step: int, *, base: float, total_steps: int, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step`, 0-based: linear from 0 to `base`, then half a cosine down to 0."""
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    decay_steps = max(1, total_steps - warmup_steps)
    progress = min(1.0, max(0, step - warmup_steps) / decay_steps)
    return base * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduled_rate(step: int, base: float, schedule: ScheduleBlock, steps_per_epoch: int) -> float:
    """The learning rate of a stage's step; it does not depend on `schedule.max_steps`."""
    total, warmup = schedule.epochs * steps_per_epoch, int(schedule.warmup_epochs * steps_per_epoch)
    return learning_rate(step, base=base, total_steps=total, warmup_steps=warmup)


def planned_steps(schedule: ScheduleBlock, steps_per_epoch: int) -> int:
    """Number of optimizer steps of a stage: its whole schedule, or at most `schedule.max_steps`."""
    full = schedule.epochs * steps_per_epoch
    return min(full, schedule.max_steps or full)
