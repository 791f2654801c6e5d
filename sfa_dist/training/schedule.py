"""The learning rate as a pure function of the step, so that a resumed run cannot be off by one.

base * min(1, s / w) * 0.5 * (1 + cos(pi * max(0, s - w) / (total - w))), the official schedule (scenic,
train_lib/lr_schedules.py).
"""

from __future__ import annotations

import math

from sfa_dist.recipe.blocks import ScheduleBlock


def learning_rate(step: int, *, base: float, total_steps: int, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear from 0 to `base`, then a half cosine to 0 at
    `total_steps`."""
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    decay_steps = max(1, total_steps - warmup_steps)
    progress = min(1.0, max(0, step - warmup_steps) / decay_steps)
    return base * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduled_rate(step: int, base: float, schedule: ScheduleBlock, steps_per_epoch: int) -> float:
    """`learning_rate` of a stage's step. `max_steps` does not change it."""
    total, warmup = schedule.epochs * steps_per_epoch, int(schedule.warmup_epochs * steps_per_epoch)
    return learning_rate(step, base=base, total_steps=total, warmup_steps=warmup)


def planned_steps(schedule: ScheduleBlock, steps_per_epoch: int) -> int:
    """Optimizer steps of a stage: its whole schedule, or fewer where the recipe's `max_steps` says so."""
    full = schedule.epochs * steps_per_epoch
    return min(full, schedule.max_steps or full)
