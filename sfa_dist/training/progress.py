"""Where a stage stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """What a stage's training has counted so far: all of it goes into the checkpoint's state.json."""

    step: int = 0
    samples_seen: int = 0
    bad_samples: int = 0
    looped: int = 0  # Clips of the first epoch that are longer than their videos.
    evaluated_step: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    non_finite_steps: int = 0  # In a row, up to here.
    skipped_steps: int = 0  # Steps in all whose gradients were not finite: no rank took them.
    last_eval: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)  # What is said once in a stage and has been.
    # Bad clips so far: `shard/key` -> reason, the same on all ranks.
    ledger: dict[str, str] = field(default_factory=dict)
