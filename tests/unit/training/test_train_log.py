"""What of the training the terminal shows: every line stands in console.log, few are shown."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from sfa_dist.parallel.launch import Launch
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.recipe.schema import Stage1
from sfa_dist.run.tracking import Tracker, eval_line
from sfa_dist.training import train_log
from sfa_dist.training.progress import Progress
from sfa_dist.training.step import StepResult
from sfa_dist.training.train_log import TrainLog

RESULT = {"acc1": 0.5, "loss": 0.7, "samples": 12}
STEPS = 4  # Of an epoch.


class OneRank(Runtime):
    """Without a process group."""

    def gather(self, value: object) -> list[object]:
        return [value]


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, seconds: float, evaluates: bool) -> list[str]:
    """The terminal's lines of a stage whose steps take `seconds`."""
    clock = [0.0]
    monkeypatch.setattr(train_log.time, "monotonic", lambda: clock[0])
    stage = Stage1.model_validate(
        {
            "model": {"size": "tiny", "classes": 2, "image_size": 16},
            "data": {"train": ["a.tar"]},
            "optimizer": {"lr": 0.1},
            "schedule": {"epochs": epochs},
        }
    )
    runtime, progress = OneRank(Launch("python", 0, 1, 0, 1), torch.device("cpu"), "here"), Progress()
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        tracker = Tracker(folder, LogBlock(wandb="off"), {}, {})
        log = TrainLog("stage1", stage, STEPS, progress, runtime, tracker)
        for step in range(epochs * STEPS):
            progress.step += 1
            clock[0] += seconds
            log.window.add(seconds, 0.1 * seconds, 8)
            log.write(StepResult(step // STEPS, lr=0.1, grad_norm=1.0, losses=torch.ones(1), clips=8.0))
            if progress.step % STEPS == 0:
                log.end_epoch(eval_line(f"stage1 [{progress.step // STEPS}/{epochs}]", RESULT) if evaluates else None)
        tracker.close()
    return shown.getvalue().splitlines()


@pytest.mark.parametrize(
    ("epochs", "seconds", "shown"),
    [
        (40, 1.0, 1 + 2 + 1),  # 160 s: the first step, a line a minute, the last epoch.
        (3, 30.0, 1 + 3),  # Epochs of two minutes: each.
        (2, 900.0, 8),  # Epochs of an hour: a sign of life in between.
        (1, 0.1, 2),
    ],
)
@pytest.mark.parametrize("evaluates", [True, False])
def test_the_terminal_has_a_line_an_epoch_or_a_minute_whichever_is_rarer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, seconds: float, shown: int, evaluates: bool
) -> None:
    said = trained(tmp_path, monkeypatch, epochs, seconds, evaluates)
    assert abs(len(said) - shown) <= (2 if seconds > 600 else 0), said
    assert f"[{epochs}/{epochs}]" in said[-1]
    if evaluates:
        assert "acc1: 0.5000" in said[-1]
        assert "training loss: 0.1250" in said[-1]
    kept = (tmp_path / "console.log").read_text().splitlines()
    assert sum(line.startswith("Train") for line in kept) == epochs * STEPS
    assert sum(line.startswith("Eval") for line in kept) == epochs * evaluates
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["kind"] == "train"] == list(range(1, epochs * STEPS + 1))


def test_what_is_said_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, LogBlock(wandb="off"), {}, {})
    assert [tracker.is_new(what) for what in ("a", "b", "a")] == [True, True, False]
    tracker.close()
