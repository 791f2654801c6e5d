"""The log lines of training: the loss of the last step, and the times of all steps since the line before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sfa_dist.data.video.clip_encoding import ClipEncoding
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.plan.cards import peak_tflops
from sfa_dist.plan.flops import clip_flops
from sfa_dist.recipe.schema import StageBlock
from sfa_dist.run.chance import WHAT_TO_DO, no_better_words, one_class_words
from sfa_dist.run.tracking import Tracker, epoch_line, train_line
from sfa_dist.training.loader_share import REPORTED_SHARE, loader_line
from sfa_dist.training.progress import Progress
from sfa_dist.training.schedule import planned_steps
from sfa_dist.training.step import StepResult

# Least seconds between two terminal lines: of epochs that end, and of steps within a long epoch.
EPOCHS_APART, LONG_EPOCH = 60.0, 600.0


@dataclass
class LogWindow:
    """Sums over the steps between two log lines: this rank's times, and the clips of all ranks."""

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    clips: float = 0.0

    def add(self, seconds: float, data_seconds: float, clips: float) -> None:
        """Adds a step."""
        self.steps += 1
        self.seconds += seconds
        self.data_seconds += data_seconds
        self.clips += clips


@dataclass
class TrainLog:
    """Writes the log lines of a stage: all into log.jsonl and console.log, few of them to the terminal."""

    name: str
    stage: StageBlock
    steps_per_epoch: int
    progress: Progress
    runtime: Runtime
    tracker: Tracker
    window: LogWindow = field(default_factory=LogWindow)
    encoding: Callable[[], ClipEncoding | None] = lambda: None
    loader_share: float = 0.0  # Share of the last logged window in which the slowest rank waited for its loader.
    _line: str = ""  # Of the last window, as are its `_values`.
    _values: dict[str, Any] = field(default_factory=dict)
    _shown_at: float = -math.inf  # Time of the stage's last line on the terminal.

    def write(self, result: StepResult) -> None:
        """Writes the line of the last step and begins the next window. Collective."""
        window, self.window = self.window, LogWindow()
        everywhere = self.runtime.gather((result.losses.tolist(), window.data_seconds / window.seconds))
        # fsum is exact, so the loss does not depend on the number of ranks.
        loss = math.fsum(loss for losses, _ in everywhere for loss in losses) / max(result.clips, 1.0)
        self.loader_share = max(share for _, share in everywhere)
        rate = window.clips / window.seconds
        step_time = window.seconds / window.steps
        values = {
            "stage": self.name,
            "step": self.progress.step,
            "epoch": result.epoch,
            "samples_seen": self.progress.samples_seen,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "step_time": step_time,
            "data_time": window.data_seconds / window.steps,
            "samples_per_second": rate,
            "memory_gib": self.runtime.peak_memory_gib(),
            "mfu": self._mfu(rate, result.epoch),
            "bad_samples": self.progress.bad_samples,
        }
        self.tracker.record("train", **values)
        total_steps = planned_steps(self.stage.schedule, self.steps_per_epoch)
        epochs = f"{result.epoch + 1}/{self.stage.schedule.epochs}"
        position = f"{self.name} [{epochs}][{self.progress.step}/{total_steps}]"
        remaining = (total_steps - self.progress.step) * step_time
        self._line, self._values = train_line(position, values, remaining), {**values, "remaining": remaining}
        self.tracker.say(self._line, on_terminal=False)
        if self._is_due(LONG_EPOCH):  # The first line is always due; it shows how long the stage will take.
            self.tracker.show(self._line)

    def _is_due(self, seconds: float) -> bool:
        """Whether the terminal has had no line for `seconds`; if so, the caller prints one now."""
        if time.monotonic() - self._shown_at < seconds:
            return False
        self._shown_at = time.monotonic()
        return True

    def end_epoch(self, evaluated: str | None) -> None:
        """Writes the lines of an epoch's end, `evaluated` being its evaluation's; the stage's last is always shown."""
        if evaluated:
            self.tracker.say(evaluated, on_terminal=False)
        is_last = self.progress.step >= planned_steps(self.stage.schedule, self.steps_per_epoch)
        line = epoch_line(evaluated, self._values) if evaluated else self._line
        if (self._is_due(EPOCHS_APART) or is_last) and line:
            self.tracker.show(line)

    def _mfu(self, rate: float, epoch: int) -> float | None:
        """Model FLOPs utilisation at `rate` clips/s over all ranks; None where the device's peak is not known."""
        if self.runtime.device.type != "cuda":
            return None
        peak = peak_tflops(torch.cuda.get_device_name(self.runtime.device))
        if peak is None:
            return None
        cache = self.stage.cache_block
        live = cache.live_share(epoch) if cache else 1.0
        return rate * clip_flops(self.stage, live=live) / (peak * 1e12 * self.runtime.world_size)

    def warn_if_guessing(self, result: Mapping[str, Any]) -> None:
        """Warns, once a stage, that an evaluation predicts a single class, or is no better than chance.

        `result` is the evaluation's. Warnings start after a quarter of the schedule, and not before a whole epoch at
        the full learning rate.
        """
        epoch = math.ceil(self.progress.step / self.steps_per_epoch)
        if epoch < self._first_warned_epoch() and self.progress.step < planned_steps(
            self.stage.schedule, self.steps_per_epoch
        ):
            return
        when = f" after {epoch} epoch{'s' * (epoch != 1)}"
        found = {"one class": one_class_words(result), "chance": no_better_words(result, when)}
        new = {what: words for what, words in found.items() if words and what not in self.progress.told}
        self.progress.told += new
        for line in [*(line for words in new.values() for line in words), *([WHAT_TO_DO] if new else [])]:
            self.tracker.say(f"{self.name}: {line}")

    def _first_warned_epoch(self) -> int:
        """The epoch, from 1, whose end may bring a warning: a quarter into the schedule, and one at the full rate."""
        schedule = self.stage.schedule
        return max(math.ceil(schedule.epochs / 4), math.floor(schedule.warmup_epochs) + 1)

    def report_looped_clips(self) -> None:
        """Reports, at the end of the first epoch, how many clips were longer than their videos."""
        if not self.progress.looped or self.progress.step > self.steps_per_epoch:
            return
        counted = f"{self.progress.looped:,} of the {self.progress.samples_seen:,} clips of the first epoch"
        span = (self.stage.frames - 1) * self.stage.data.stride + 1
        text = f"{counted} come from videos shorter than the {span} frames that a clip spans, and are looped"
        self.tracker.event("notice", stage=self.name, text=text)
        self.tracker.say(f"{self.name}: {text}; lower {self.name}.data.stride or {self.name}.frames")

    def report_loader_wait(self) -> None:
        """Reports a long wait for the loader, with advice that this run has not printed yet."""
        if self.loader_share <= REPORTED_SHARE or not self.runtime.is_main:
            return
        more_cores = self.runtime.launch.launcher == "srun"  # Other launchers share out all the cores of the node.
        line = loader_line(
            self.loader_share, self.stage, self.runtime.cores, self.encoding(), more_cores, self.tracker.is_new
        )
        if line is not None:
            self.tracker.say(f"{self.name}: {line}")
