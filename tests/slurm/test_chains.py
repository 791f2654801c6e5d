"""`sfa submit` under a real Slurm: stages as a chain of jobs, one of them preempted, and an array over seeds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from slurm_cluster import Cluster, Job
from slurm_runs import EPOCHS, STEPS, Runs
from tiny_runs import events, log_lines

pytestmark = pytest.mark.slurm


def submit(runs: Runs, name: str, *options: str) -> dict[str, str]:
    """Numbers of the jobs by name."""
    small = (
        "--gpus-per-node=1",
        "--cpus-per-task=1",
        "--set=engine.name=fsdp",
        f"--sbatch=--output={runs.place}/%x-%A_%a.out",
    )
    words = ("--recipe", str(runs.place / "t.yaml"), "--run-dir", str(runs.place / name), "--name", name)
    said = runs.cluster.run("python", "-m", "sfa_dist.tools.cli", "submit", *words, *small, *options, "--submit")
    return dict(re.findall(r"(\S+): job (\d+)", said))


def job(runs: Runs, name: str, number: str, task: str = "") -> Job:
    # %a of a job that is no array is 4294967294
    return runs.cluster.job(number + (task and f"_{task}"), runs.place / f"{name}-{number}_{task or 2**32 - 2}.out")


def is_in_epoch(number: int, run: Path) -> bool:
    """By console.log: the job's own output has a line an epoch or a minute, whichever is rarer."""
    console = run / "console.log"
    return console.is_file() and f"[{number}/{EPOCHS}]" in console.read_text()


def test_a_chain_goes_on_through_a_preemption(runs: Runs, cluster: Cluster) -> None:
    numbers = submit(runs, "chain", "--chain", "--nodes=2", "--stage-nodes=stage2=1", "--stage-nodes=test=1")
    assert list(numbers) == ["chain-stage1", "chain-stage2", "chain-test"]
    first, second, third = (job(runs, name, number) for name, number in numbers.items())
    assert second.fields()["Reason"] == "Dependency"
    first.wait_until(lambda fields: is_in_epoch(4, runs.place / "chain"), "its steps")
    cluster.run("scancel", "--signal=USR1", "--batch", first.number)
    first.completes(restarts=1)
    second.completes()
    third.completes()
    directory = runs.place / "chain"
    assert [event["stage"] for event in events(directory, "done") if "stage" in event] == ["stage1", "stage2"]
    assert (directory / "result.json").exists()
    assert (directory / "report.html").exists()
    assert "stage2: done before, skipped" in third.said()


def test_what_waits_for_a_job_that_fails_is_removed(runs: Runs) -> None:
    numbers = submit(runs, "broken", "--chain", "--nodes=1", f"--set=data.train=['{runs.place}/none/*.tar']")
    first, second, _ = (job(runs, name, number) for name, number in numbers.items())
    fields = first.end()
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "65:0"), first.said()
    assert second.end()["JobState"] == "CANCELLED"


def test_an_array_over_seeds_of_which_one_is_preempted(runs: Runs, cluster: Cluster) -> None:
    [(name, number)] = submit(runs, "seeds", "--seeds=4-5", "--stage=stage1").items()
    zero, one = (job(runs, name, number, task) for task in "01")
    one.wait_until(lambda fields: is_in_epoch(4, runs.place / "seeds-seed-5"), "its steps")
    cluster.run("scancel", "--signal=USR1", "--batch", one.number)
    one.completes(restarts=1)
    zero.completes(restarts=0)
    finals = {}
    for seed in "45":
        [*_, last] = [line for line in log_lines(runs.place / f"seeds-seed-{seed}") if line["kind"] == "train"]
        assert last["step"] == STEPS
        finals[seed] = last["loss"]
    assert finals["4"] != finals["5"]
