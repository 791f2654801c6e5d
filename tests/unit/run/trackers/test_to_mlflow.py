"""A real MLflow store of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from tracked_lines import evaluation, train

from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.trackers.to_mlflow import SETTINGS, MlflowSink, mlflow_uri


@pytest.fixture(autouse=True)
def settings_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in SETTINGS.items():
        monkeypatch.setenv(variable, value)
    return


def write(folder: Path, *lines: dict[str, Any], stopping: bool = False) -> str:
    """One start of a run that writes these lines; returns the id of the MLflow run."""
    parameters = {"stage1.frames": 8, "data.train": ["x" * 999]}
    uri = mlflow_uri(LogBlock(), folder, {})
    sink = MlflowSink(folder, uri, "experiment", parameters, lambda: stopping)
    sink.load()
    sink.open()
    for line in lines:
        sink.write(line)
    sink.close()
    return (folder / "mlflow" / "run_id").read_text()


def test_starts_of_a_run_go_on_in_one_mlflow_run(tmp_path: Path) -> None:
    first = write(tmp_path, train(1, 0.5), evaluation(1, 0.75), stopping=True)
    client = MlflowClient(tracking_uri=mlflow_uri(LogBlock(), tmp_path, {}))
    assert client.get_run(first).info.status == "KILLED"
    assert write(tmp_path, train(2, 0.25), train(1, 3.0, "stage2")) == first
    run = client.get_run(first)
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)
    assert client.get_experiment(run.info.experiment_id).name == "experiment"
    assert run.data.params["stage1.frames"] == "8"
    assert len(run.data.params["data.train"]) == 500
    losses = client.get_metric_history(first, "stage1/train/loss")
    assert sorted((point.step, point.value) for point in losses) == [(1, 0.5), (2, 0.25)]
    assert run.data.metrics["stage2/train/loss"] == 3.0
    assert run.data.metrics["stage1/val/acc1"] == 0.75


def test_where_the_runs_are(tmp_path: Path) -> None:
    environ = {"MLFLOW_TRACKING_URI": "http://host:5000"}
    assert mlflow_uri(LogBlock(mlflow_uri="http://mine"), tmp_path, environ) == "http://mine"
    assert mlflow_uri(LogBlock(), tmp_path, environ) == "http://host:5000"
    assert mlflow_uri(LogBlock(), tmp_path, {}) == (tmp_path / "mlflow" / "store").as_uri()
