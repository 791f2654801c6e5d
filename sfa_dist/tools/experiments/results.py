"""What the runs of an experiment have found: mean, deviation and interval of each row over its seeds, and its cost.

The cost ratio is counted in two ways. As the paper counts, it is the training time of both stages over that of the
baseline; a feature cache is part of it, because it runs stage 2's trunk, as in `cost_ratio` of a run (run/cost.py).
With everything counted, both have the image stage and the test as well.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sfa_dist
from sfa_dist.boundary.disk import read_object
from sfa_dist.boundary.file_names import LOG, RESULT
from sfa_dist.recipe.stage_names import STAGE_NAMES
from sfa_dist.run.cost import COUNTED
from sfa_dist.run.intervals import over_seeds, wilson
from sfa_dist.run.record import read_done
from sfa_dist.run.report.run_files import latest_by_step, read_log
from sfa_dist.tools.experiments.rows import Experiment, Row
from sfa_dist.tools.experiments.steps import Step


@dataclass(frozen=True)
class Found:
    """What one seed of a row has found. Seconds: of each stage, and of the test."""

    seed: int
    acc1: float
    acc5: float
    chance: float
    clips: int
    seconds: Mapping[str, float]
    test_seconds: float
    best_step: int | None
    run_dir: Path
    shuffled: float | None = None  # Top-1 with the frames of each clip in random order.
    ranks: frozenset[int] = frozenset()  # The numbers of ranks on which its stages were trained.

    @property
    def as_paper(self) -> float:
        """Seconds of training as the paper counts them."""
        return sum(self.seconds.get(stage, 0.0) for stage in COUNTED)

    @property
    def everything(self) -> float:
        """Seconds of all that was computed for the result."""
        return sum(self.seconds.values()) + self.test_seconds


def read_found(steps: Sequence[Step], seed: int) -> Found:
    """What a row's finished runs have found. Raises CheckpointError, OSError, ValueError for a lost or odd file."""
    *before, last = steps
    result = read_object(last.directory / RESULT, acc1=float, acc5=float, stages=dict)
    stages = dict(result["stages"])
    for step in before:
        done = read_done(step.directory / (step.stage or ""))
        assert done is not None, step
        stages[step.stage or ""] = done["result"]
    seconds = {name: float(stage["seconds"]) for name, stage in stages.items()}
    ranks = {round(stage["gpu_seconds"] / stage["seconds"]) for stage in stages.values() if stage["seconds"]}
    line = result["by_views"][-1]
    chance = max(line["chance_acc1"], line["majority_acc1"]) if "chance_acc1" in line else float("nan")
    return Found(
        seed,
        result["acc1"],
        result["acc5"],
        chance,
        int(line["samples"]),
        seconds,
        float(result.get("test_seconds", 0.0)),
        _best_step(last.directory),
        last.directory,
        result.get("acc1_shuffled_frames"),
        frozenset(ranks),
    )


def _best_step(run_dir: Path) -> int | None:
    """The first step of the last stage with the best validation accuracy; None without validation."""
    lines = latest_by_step(read_log(run_dir / LOG), "eval")
    trained = [name for name in STAGE_NAMES if name in lines]
    if not trained:
        return None
    scores = {line["step"]: line["acc1"] for line in lines[trained[-1]]}
    return max(scores, key=lambda step: (scores[step], -step))


def row_record(row: Row, found: Sequence[Found], baseline: Sequence[Found], left_out: str = "") -> dict[str, Any]:
    """One row of the results. `baseline` is what its cost is compared with, of the same seeds where it has them."""
    record: dict[str, Any] = {"row": row.name, "words": row.words, "paper": asdict(row.paper)}
    if not found:
        return {**record, "left_out": left_out or row.left_out or None, "seeds": []}
    found = sorted(found, key=lambda each: each.seed)
    accuracies = [each.acc1 for each in found]
    mean, deviation, interval = _spread(found)
    steps = [each.best_step for each in found if each.best_step is not None]
    shuffled = [each.shuffled for each in found if each.shuffled is not None]
    return {
        **record,
        "acc1_mean": mean,
        "acc1_sd": deviation,
        "acc1_interval": interval,
        "interval_over": "seeds" if len(found) > 1 else "clips",
        "acc1": accuracies,
        "acc5_mean": statistics.fmean(each.acc5 for each in found),
        "chance_acc1": found[0].chance,
        "acc1_shuffled_mean": statistics.fmean(shuffled) if shuffled else None,
        "cost_ratio": _ratio(found, baseline, "as_paper"),
        "cost_ratio_everything": _ratio(found, baseline, "everything"),
        "seconds": statistics.fmean(each.as_paper for each in found),
        "seconds_everything": statistics.fmean(each.everything for each in found),
        "ranks": sorted(_ranks_of(found)),
        "best_step": statistics.fmean(steps) if steps else None,
        "seeds": [each.seed for each in found],
        "runs": [str(each.run_dir) for each in found],
    }


def _ranks_of(found: Sequence[Found]) -> frozenset[int]:
    return frozenset().union(*(each.ranks for each in found))


def _spread(found: Sequence[Found]) -> tuple[float, float | None, tuple[float, float]]:
    """(mean, sample deviation, 95 % interval): over seeds by Student's t, of a single one over its clips by Wilson."""
    if len(found) == 1:
        only = found[0]
        return only.acc1, None, wilson(round(only.acc1 * only.clips), only.clips)
    mean, deviation, half = over_seeds([each.acc1 for each in found])
    return mean, deviation, (max(0.0, mean - half), min(1.0, mean + half))


def _ratio(found: Sequence[Found], baseline: Sequence[Found], what: str) -> float | None:
    """The mean seconds over the baseline's, of the seeds that both have.

    None where there are none, or where the two were not trained on one number of ranks.
    """
    if len(_ranks_of((*found, *baseline))) > 1:
        return None
    ours = {each.seed: float(getattr(each, what)) for each in found}
    theirs = {each.seed: float(getattr(each, what)) for each in baseline}
    both = ours.keys() & theirs.keys()
    whole = sum(theirs[seed] for seed in both)
    return sum(ours[seed] for seed in both) / whole if whole else None


def record_of(
    experiment: Experiment,
    scale: str,
    command: str,
    ranks: int,
    found: Mapping[str, Sequence[Found]],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """The content of <name>.json: all rows of an experiment, and how they were made."""
    rows = [
        row_record(row, found.get(row.name, ()), found.get(row.against or "", ()), left_out.get(row.name, ""))
        for row in experiment.rows
    ]
    missing = [row["row"] for row in rows if not row["seeds"] and not row["left_out"]]
    return {
        "name": experiment.name,
        "title": experiment.title,
        "paper": experiment.paper,
        "scale": scale,
        "complete": not missing,
        "machine": machine(ranks),
        **made_now(command),
        "rows": rows,
    }


def made_now(command: str) -> dict[str, str]:
    """When and how results were made."""
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"command": command, "date": date, "sfa_dist": sfa_dist.__version__}


def machine(ranks: int) -> str:
    """What the runs ran on, in words."""
    import torch

    kind = "1 rank" if ranks == 1 else f"{ranks} ranks"
    if torch.cuda.is_available():
        return f"{kind}, {torch.cuda.get_device_name(0)}"
    return f"{kind} on {len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}, no GPU"
