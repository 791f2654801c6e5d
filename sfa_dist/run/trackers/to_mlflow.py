"""MLflow: one MLflow run for all starts of a run, on a tracking server or in files of the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import write_if_new
from sfa_dist.parallel.environment import set_default
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.trackers.sink import Line, curves

FOLDER = "mlflow"
MAX_VALUE, MAX_PARAMETERS = 500, 100  # MLflow's limits: characters of a value, parameters of a request.
# It reports its use to its makers, and refuses to keep runs in files, unless told otherwise.
SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}


def mlflow_uri(log: LogBlock, run_dir: Path, environ: Mapping[str, str]) -> str:
    """Where MLflow's runs are: the recipe's server, the environment's, or files in the run directory."""
    return log.mlflow_uri or environ.get("MLFLOW_TRACKING_URI") or (run_dir / FOLDER / "store").resolve().as_uri()


class MlflowSink:
    """The recipe's values are parameters; curves are named by stage, because steps start anew in each.

    MLflow cannot take a point back: a step that is run again after a resume has two, of the same value.
    """

    name = "mlflow"

    def __init__(
        self,
        run_dir: Path,
        uri: str,
        experiment: str,
        parameters: Mapping[str, Any],
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._run_dir, self._uri, self._experiment = run_dir, uri, experiment
        self._parameters, self._stopping = parameters, stopping
        self._entities: Any = None
        self._make_client: Any = None
        self._client: Any = None
        self._run_id = ""

    def load(self) -> None:
        for variable, value in SETTINGS.items():
            set_default(variable, value)
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities, self._make_client = entities, MlflowClient

    def open(self) -> None:
        self._client = self._make_client(tracking_uri=self._uri)
        id_file = self._run_dir / FOLDER / "run_id"
        if id_file.is_file():
            self._run_id = id_file.read_text().strip()
            self._client.update_run(self._run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(self._experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
        self._run_id = self._client.create_run(number, run_name=self._run_dir.name).info.run_id
        id_file.parent.mkdir(parents=True, exist_ok=True)
        write_if_new(id_file, self._run_id)
        values = [self._entities.Param(key, _shortened(value)) for key, value in self._parameters.items()]
        for first in range(0, len(values), MAX_PARAMETERS):
            self._client.log_batch(self._run_id, params=values[first : first + MAX_PARAMETERS])

    def write(self, line: Line) -> None:
        now, stage = int(time.time() * 1000), line.get("stage")
        points = [
            self._entities.Metric(f"{stage}/{curve}", value, now, line.get("step", 0)) for curve, value in curves(line)
        ]
        self._client.log_batch(self._run_id, metrics=points)

    def close(self) -> None:
        if self._run_id:
            self._client.set_terminated(self._run_id, "KILLED" if self._stopping() else "FINISHED")

    def abandon(self) -> None:
        """Does nothing: a request that waits ends with the process."""


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."
