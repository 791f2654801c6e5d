"""How the training of each stage went, as curves over its steps and over the seconds of its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from sfa_dist.recipe.stage_names import TEST
from sfa_dist.run.chance import guessing
from sfa_dist.run.report.document import Block, Plot, Plots, Point, Section, Series, Text
from sfa_dist.run.report.run_files import Record, RunFiles, latest_by_step

STEP, SECONDS = "optimizer step", "seconds of training"
# (title, what it is of a train record, the top of its axis)
HEALTH: tuple[tuple[str, Callable[[Record], Any], float | None], ...] = (
    ("Learning rate", lambda row: row.get("lr"), None),
    ("Gradient norm", lambda row: row.get("grad_norm"), None),
    ("Clips a second", lambda row: row.get("samples_per_second"), None),
    ("Share of the time that waits for clips", lambda row: _share(row.get("data_time"), row.get("step_time")), 1.0),
    ("Peak memory (GiB)", lambda row: row.get("memory_gib"), None),
)


def number(value: Any) -> float | None:
    """A finite number of the log, None for what is none ("nan" stands there as text)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _share(part: Any, whole: Any) -> float | None:
    first, second = number(part), number(whole)
    return first / second if first is not None and second else None


class StageLog:
    """The lines of one stage. Its clock counts the steps' own seconds, without evaluation, saving and pauses."""

    def __init__(self, train: Sequence[Record], evaluations: Sequence[Record]) -> None:
        self.train, self.evaluations = train, evaluations
        self._clock = _clock(train)

    def points(self, rows: Sequence[Record], value: Callable[[Record], Any], over: str = STEP) -> list[Point]:
        """(step or second, value) of each row; a row that is not on the clock is left out."""
        if over == STEP:
            return [(row["step"], number(value(row))) for row in rows]
        timed = ((self._second(row["step"]), number(value(row))) for row in rows)
        return [(second, found) for second, found in timed if second is not None]

    def _second(self, step: int) -> float | None:
        """When a step ended, between two lines of the log by its share."""
        if not self._clock or step > self._clock[-1][0]:
            return None
        for (before, start), (after, end) in pairwise(self._clock):
            if before <= step <= after:
                return start + (end - start) * (step - before) / max(1, after - before)
        return None

    def losses(self, over: str) -> list[Series]:
        """Of training and of validation."""
        return _shown(
            Series("training", self.points(self.train, lambda row: row.get("loss"), over)),
            Series("validation", self.points(self.evaluations, lambda row: row.get("loss"), over)),
        )

    def accuracies(self, over: str) -> list[Series]:
        """Top-1 of validation, and what guessing scores."""
        return _shown(
            Series("validation", self.points(self.evaluations, lambda row: row.get("acc1"), over)),
            Series("guessing", self.points(self.evaluations, guessing, over)),
        )


def _clock(train: Sequence[Record]) -> list[tuple[int, float]]:
    """(step, seconds until its end), from (0, 0) on; empty where the log has no times."""
    if not train or any(number(row.get("step_time")) is None for row in train):
        return []
    clock, last, seconds = [(0, 0.0)], 0, 0.0
    for row in train:
        seconds += row["step_time"] * (row["step"] - last)
        last = row["step"]
        clock.append((last, seconds))
    return clock


def _shown(*series: Series) -> list[Series]:
    return [each for each in series if any(y is not None for _, y in each.points)]


def stage_logs(run: RunFiles) -> dict[str, StageLog]:
    """By stage, in the order of the log; the test has none."""
    train, evaluations = latest_by_step(run.records, "train"), latest_by_step(run.records, "eval")
    names = [name for name in dict.fromkeys((*train, *evaluations)) if name != TEST]
    return {name: StageLog(train.get(name, []), evaluations.get(name, [])) for name in names}


def curve_sections(run: RunFiles) -> list[Section]:
    """A section for each stage."""
    return [Section(f"Curves of {name}", _curves(log)) for name, log in stage_logs(run).items()]


def _curves(log: StageLog) -> list[Block]:
    plots = []
    for over in (STEP, SECONDS):
        plots.append(Plot(f"Loss over {_word(over)}", over, log.losses(over), whole=over == STEP))
        plots.append(Plot(f"Validation top-1 over {_word(over)}", over, log.accuracies(over), 1.0, over == STEP))
    for title, value, top in HEALTH:
        plots.append(Plot(title, STEP, _shown(Series(title.lower(), log.points(log.train, value))), top, whole=True))
    missing = [plot.title.lower() for plot in plots if not plot.series]
    blocks: list[Block] = [Plots([plot for plot in plots if plot.series])]
    return [*blocks, Text(f"Not in the log of this stage: {', '.join(missing)}.")] if missing else blocks


def _word(over: str) -> str:
    return "steps" if over == STEP else "seconds"


def pictures_of(run: RunFiles) -> dict[str, list[Plot]]:
    """What Markdown shows instead of the curves, by file name: plots of all stages beside each other."""
    logs = stage_logs(run)
    wanted = {
        "train_loss": [Plot(name, STEP, log.losses(STEP)) for name, log in logs.items() if log.train],
        "eval_acc1": [Plot(name, STEP, log.accuracies(STEP), 1.0) for name, log in logs.items() if log.evaluations],
    }
    return {name: plots for name, plots in wanted.items() if plots}
