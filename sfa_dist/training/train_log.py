"""The log lines of training: what the steps since the line before took, and the loss of the last one."""

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

# Seconds between two lines of the terminal: one an epoch, or a sign of life from a long one.
EPOCHS_APART, LONG_EPOCH = 60.0, 600.0


@dataclass
class LogWindow:
    """Sums between two log lines, on this rank; `clips` of all ranks."""

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    clips: float = 0.0

    def add(self, seconds: float, data_seconds: float, clips: float) -> None:
        """One step more."""
        self.steps += 1
        self.seconds += seconds
        self.data_seconds += data_seconds
        self.clips += clips


@dataclass
class TrainLog:
    """Log lines of one stage: each in log.jsonl and console.log, few of them on the terminal."""

    name: str
    stage: StageBlock
    steps_per_epoch: int
    progress: Progress
    runtime: Runtime
    tracker: Tracker
    window: LogWindow = field(default_factory=LogWindow)
    encoding: Callable[[], ClipEncoding | None] = lambda: None
    loader_share: float = 0.0  # Of the step, over the last logged window, on the rank that waited most.
    _line: str = ""  # Of the last window.
    _values: dict[str, Any] = field(default_factory=dict)
    _shown_at: float = -math.inf  # When the terminal had a line of this stage.

    def write(self, result: StepResult) -> None:
        """The line of the last step; the next window begins. Collective."""
        window, self.window = self.window, LogWindow()
        everywhere = self.runtime.gather((result.losses.tolist(), window.data_seconds / window.seconds))
        # fsum is exact, so the sum does not depend on how many ranks hold the parts.
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
        if self._is_due(LONG_EPOCH):  # The first line too: it says how long the stage takes.
            self.tracker.show(self._line)

    def _is_due(self, seconds: float) -> bool:
        """Whether the terminal has had no line for so long. It gets one now, then."""
        if time.monotonic() - self._shown_at < seconds:
            return False
        self._shown_at = time.monotonic()
        return True

    def end_epoch(self, evaluated: str | None) -> None:
        """The lines of an epoch's end, with that of its evaluation where there was one. The stage's last one is always
        on the terminal."""
        if evaluated:
            self.tracker.say(evaluated, on_terminal=False)
        is_last = self.progress.step >= planned_steps(self.stage.schedule, self.steps_per_epoch)
        line = epoch_line(evaluated, self._values) if evaluated else self._line
        if (self._is_due(EPOCHS_APART) or is_last) and line:
            self.tracker.show(line)

    def _mfu(self, rate: float, epoch: int) -> float | None:
        if self.runtime.device.type != "cuda":
            return None
        peak = peak_tflops(torch.cuda.get_device_name(self.runtime.device))
        if peak is None:
            return None
        cache = self.stage.cache_block
        live = cache.live_share(epoch) if cache else 1.0
        return rate * clip_flops(self.stage, live=live) / (peak * 1e12 * self.runtime.world_size)

    def say_if_it_guesses(self, result: Mapping[str, Any]) -> None:
        """Says once in a stage that its evaluation, `result`, finds one class predicted, and once that it is no better
        than chance, where so much of the schedule is over that it should be."""
        epoch = math.ceil(self.progress.step / self.steps_per_epoch)
        if epoch < self._epochs_of_grace() and self.progress.step < planned_steps(
            self.stage.schedule, self.steps_per_epoch
        ):
            return
        when = f" after {epoch} epoch{'s' * (epoch != 1)}"
        found = {"one class": one_class_words(result), "chance": no_better_words(result, when)}
        new = {what: words for what, words in found.items() if words and what not in self.progress.told}
        self.progress.told += new
        for line in [*(line for words in new.values() for line in words), *([WHAT_TO_DO] if new else [])]:
            self.tracker.say(f"{self.name}: {line}")

    def _epochs_of_grace(self) -> int:
        """The first epoch whose end has to show something: a quarter of the schedule, and not before one at the full
        learning rate."""
        schedule = self.stage.schedule
        return max(math.ceil(schedule.epochs / 4), math.floor(schedule.warmup_epochs) + 1)

    def say_if_it_loops(self) -> None:
        """Says, at the end of the first epoch, how many clips were longer than their videos."""
        if not self.progress.looped or self.progress.step > self.steps_per_epoch:
            return
        counted = f"{self.progress.looped:,} of the {self.progress.samples_seen:,} clips of the first epoch"
        span = f"{(self.stage.frames - 1) * self.stage.data.stride + 1} frames of it"
        text = f"{counted} come from a video shorter than the {span} that a clip spans, and are looped"
        self.tracker.event("notice", stage=self.name, text=text)
        self.tracker.say(f"{self.name}: {text}; lower {self.name}.data.stride or {self.name}.frames")

    def say_if_it_waits(self) -> None:
        """Says where the stage waited for its loader, and what would help that this run has not said yet."""
        if self.loader_share <= REPORTED_SHARE or not self.runtime.is_main:
            return
        more_cores = self.runtime.launch.launcher == "srun"  # Elsewhere a rank has its share of all there are.
        line = loader_line(
            self.loader_share, self.stage, self.runtime.cores, self.encoding(), more_cores, self.tracker.is_new
        )
        if line is not None:
            self.tracker.say(f"{self.name}: {line}")
