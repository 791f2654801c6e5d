"""Real launchers that are stopped: their ranks notice, save the same step and end; none trains on without them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import ONE_THREAD, TRAIN, program, train_ranks
from ranks import free_port
from tiny_runs import RECIPE, events, log_lines, make_workplace, sets

LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [program("torchrun"), "--nproc-per-node", "2", "--master-port", "PORT"],
    "deepspeed": [program("deepspeed"), "--num_accelerators", "2", "--master_port", "PORT"],
}
LONG = (
    RECIPE[: RECIPE.index("image:\n")].replace("schedule: {epochs: 2,", "schedule: {epochs: 1000,")
    + 'stage1: {frames: 4, data: {val: []}}\nlog: {every: 1, wandb: "off"}\n'
)
LIMIT = 240.0  # Starts are slow where many processes share the cores.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("launchers"), LONG)


class Job:
    """A launcher with its ranks, in a session of its own; what it says goes to a file."""

    def __init__(self, place: Path, launcher: str, name: str) -> None:
        self.launcher = launcher
        self.place, self.run, self.mark = place, place / name, f"{name}-of-{os.getpid()}"
        own = [
            TRAIN,
            "--recipe",
            "t.yaml",
            "--stage",
            "stage1",
            "--run-dir",
            name,
            *sets(f"log.wandb_project={self.mark}"),
        ]
        words = [str(free_port()) if word == "PORT" else word for word in LAUNCHERS[launcher]]
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ONE_THREAD
        self._output = (place / f"{name}.out").open("wb")
        self.process = subprocess.Popen(
            [*words, *own], cwd=place, env=environ, stdout=self._output, stderr=self._output, start_new_session=True
        )

    def said(self) -> str:
        return (self.place / f"{self.run.name}.out").read_text(errors="replace")

    def ranks(self) -> list[int]:
        """The processes of train.py, without the launcher's."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            except OSError:
                continue
            if self.mark.encode() in command and (b"\0RANK=" in environ or self.launcher == "python"):
                found.append(int(folder.name))
        return found

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + LIMIT
        log = self.run / "log.jsonl"
        while not (log.exists() and f'"step": {step}, "epoch"' in log.read_text()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def wait_for_ranks(self, limit: float = 45.0) -> float:
        """Seconds until no rank is left."""
        started = time.monotonic()
        while self.ranks():
            assert time.monotonic() - started < limit, self.said()
            time.sleep(0.1)
        return time.monotonic() - started


@contextmanager
def running(place: Path, launcher: str, name: str) -> Iterator[Job]:
    """A job that has made three steps; nothing of it is left afterwards."""
    job = Job(place, launcher, name)
    try:
        job.wait_for_step(3)
        yield job
    finally:
        for pid in job.ranks():
            os.kill(pid, signal.SIGKILL)
        job.process.kill()
        job.process.wait()


def saved_step(run: Path) -> int:
    """The step that was saved on the way out, the last one that was made."""
    [preempted] = events(run, "preempted")
    made = max(line["step"] for line in log_lines(run) if line["kind"] == "train")
    assert preempted["step"] == made
    assert (run / "stage1" / "checkpoints" / f"step-{made:08d}" / "MANIFEST.json").is_file()
    return made


@pytest.mark.slow
@pytest.mark.fault(8, 9)
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("torchrun", signal.SIGUSR1), ("deepspeed", signal.SIGTERM)],
    ids=["torchrun USR1", "deepspeed TERM"],
)
def test_ranks_that_their_launcher_leaves_behind_save_and_end(
    place: Path, launcher: str, number: signal.Signals
) -> None:
    name = f"{launcher}-{number.name}"
    with running(place, launcher, name) as job:
        assert len(job.ranks()) == 2
        job.process.send_signal(number)
        assert job.process.wait(LIMIT) == -number  # It dies of it, and the ranks live on.
        job.wait_for_ranks()
    assert "stopped: stage stage1 stopped at step " in job.said()
    step = saved_step(place / name)
    reason = events(place / name, "preempted")[0]["reason"]  # Rank 0's: the other one may have seen it first.
    assert reason.startswith(("its launcher", "another rank"))
    goes_on(place, name, step)


@pytest.mark.slow
@pytest.mark.fault(7, 8)
def test_torchrun_hands_sigterm_on(place: Path) -> None:
    with running(place, "torchrun", "torchrun-SIGTERM") as job:
        job.process.send_signal(signal.SIGTERM)
        job.wait_for_ranks()
        job.process.wait(LIMIT)
    saved_step(place / "torchrun-SIGTERM")
    assert events(place / "torchrun-SIGTERM", "preempted")[0]["reason"] == "SIGTERM"


def goes_on(place: Path, name: str, step: int) -> None:
    """One more epoch, from the step that was saved."""
    own = sets(f"stage1.schedule.max_steps={step + 3}")
    start: Sequence[str] = ("--recipe", "t.yaml", "--stage", "stage1", "--run-dir", name)
    for rank in train_ranks(2, place, *start, *own):
        finished = rank.wait()
        assert finished.code == 0, finished.err
    made = [line["step"] for line in log_lines(place / name) if line["kind"] == "train"]
    assert made == list(range(1, step + 4))
