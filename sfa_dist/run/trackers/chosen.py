"""The trackers that a recipe names, and the packages that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.record import flatten
from sfa_dist.run.trackers.sink import Sink
from sfa_dist.run.trackers.to_csv import CsvSink
from sfa_dist.run.trackers.to_mlflow import MlflowSink, mlflow_uri
from sfa_dist.run.trackers.to_tensorboard import TensorBoardSink
from sfa_dist.run.trackers.to_wandb import WandbSink, wandb_mode

EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}  # Tracker -> module; the extra has the tracker's name.


def require_packages(log: LogBlock) -> None:
    """Raises RecipeError where a tracker that the recipe names is not installed."""
    for tracker in log.trackers:
        if tracker in EXTRAS and find_spec(EXTRAS[tracker]) is None:
            raise RecipeError(
                f"log.trackers: {tracker} is not installed: pip install 'sfa_dist[{tracker}]', or leave it out"
            )


def sinks_of(
    log: LogBlock,
    run_dir: Path,
    config: Mapping[str, Any],
    environ: Mapping[str, str],
    stopping: Callable[[], bool] = lambda: False,
) -> list[Sink]:
    """The trackers of a run, not yet begun; `config` is the recipe, without secrets. Raises RecipeError."""
    require_packages(log)
    sinks: list[Sink] = []
    if (mode := wandb_mode(log, environ)) is not None:
        sinks.append(WandbSink(run_dir, log.wandb_project, mode, config))
    if "csv" in log.trackers:
        sinks.append(CsvSink(run_dir))
    if "tensorboard" in log.trackers:
        sinks.append(TensorBoardSink(run_dir))
    if "mlflow" in log.trackers:
        uri = mlflow_uri(log, run_dir, environ)
        sinks.append(MlflowSink(run_dir, uri, log.mlflow_experiment, flatten(dict(config)), stopping))
    return sinks
