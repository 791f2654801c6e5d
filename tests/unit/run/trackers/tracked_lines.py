"""Lines as a run sends them to its trackers."""

from __future__ import annotations

from typing import Any


def train(step: int, loss: Any = 0.5, stage: str = "stage1", **more: Any) -> dict[str, Any]:
    """A line of kind `train`, with few keys."""
    return {"kind": "train", "stage": stage, "step": step, "loss": loss, "step_time": 0.25, "mfu": None, **more}


def evaluation(step: int, acc1: float, stage: str = "stage1", **more: Any) -> dict[str, Any]:
    """A line of kind `eval`, with few keys."""
    return {"kind": "eval", "stage": stage, "step": step, "acc1": acc1, "better_than_chance": None, **more}
