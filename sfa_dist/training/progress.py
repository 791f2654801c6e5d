"""A stage's counters, as its checkpoints hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """What a stage's training has counted so far; a checkpoint's state.json holds these fields under `progress`."""

    step: int = 0
    samples_seen: int = 0
    bad_samples: int = 0
    looped: int = 0  # Clips of the first epoch that are longer than their videos.
    evaluated_step: int = 0  # The step of the last evaluation.
    seconds: float = 0.0
    data_seconds: float = 0.0  # Of `seconds`: waiting for the loader.
    non_finite_steps: int = 0  # Skipped in a row, up to the present step.
    skipped_steps: int = 0  # All steps skipped because their gradients were not finite.
    last_eval: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)  # Warnings that are printed once a stage, and have been.
    ledger: dict[str, str] = field(default_factory=dict)  # Bad clips: `shard/key` -> reason, the same on all ranks.
