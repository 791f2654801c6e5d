"""The test cluster from Python: commands on its login host, and jobs that are polled."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("cluster.sh")
ROOT = Path(__file__).resolve().parents[2]
NODES = 4
LIMIT = 300.0  # Seconds for what takes 30 on a machine with nothing else to do.
ANSWER = 120.0
POLL_S = 0.1
ASK_S = 0.4  # Between two questions to Slurm: each is a few processes.
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
SETTLED_S = 3.0
# A node refuses a job that starts in the second in which it was ended there.
RESTART_AT = "now+3"


def wait_for(
    what: str, condition: Callable[[], bool], said: Callable[[], str] = str, limit: float = LIMIT, every: float = POLL_S
) -> None:
    """Polls. Fails with what `said` gives when the condition does not come true."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"{what} did not come in {limit:.0f} s:\n{said()}"
        time.sleep(every)


def slowness() -> float:
    """1 on a machine with nothing else to do; where Python's start takes longer than its work, in proportion."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return max(1.0, wall / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs, by its folder."""

    state: Path

    def control(self, *words: str) -> None:
        """A command of cluster.sh."""
        subprocess.run([str(SCRIPT), "--state", str(self.state), *words], check=True, timeout=ANSWER)

    def run(self, *command: str, cwd: Path = ROOT, **environ: str) -> str:
        """What a command on the login host prints. Raises CalledProcessError."""
        return self.call(*command, cwd=cwd, **environ)[0]

    def call(self, *command: str, cwd: Path = ROOT, **environ: str) -> tuple[str, str]:
        """Its stdout and stderr. Raises CalledProcessError."""
        full = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
        full = self.environ() | full
        words = [str(SCRIPT), "--state", str(self.state), "run", *command]
        done = subprocess.run(words, cwd=cwd, env=full | environ, capture_output=True, text=True, timeout=ANSWER)
        if done.returncode:
            print(done.stdout, done.stderr)  # for the reader of a test that fails
        done.check_returncode()
        return done.stdout, done.stderr

    def environ(self) -> dict[str, str]:
        """For a command on a node: this one, without what concerns this Python; temporary files go with the cluster."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SLURM", "SFA"))}
        return kept | {"TMPDIR": str(self.state / "tmp")}

    def job(self, number: str, output: Path) -> Job:
        """A job that was submitted, which writes to `output`."""
        return Job(self, number, output)


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array."""

    cluster: Cluster
    number: str
    output: Path

    def fields(self) -> Mapping[str, str]:
        """What Slurm knows of it: JobState, Reason, Restarts, ExitCode, ..."""
        shown = self.cluster.run("scontrol", "-o", "show", "job", self.number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def said(self) -> str:
        """Its output so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else "(no output)"

    def wait_until(self, condition: Callable[[Mapping[str, str]], bool], what: str, limit: float = LIMIT) -> None:
        """Polls Slurm until its fields are so."""
        wait_for(f"job {self.number}: {what}", lambda: condition(self.fields()), self.said, limit, ASK_S)

    def end(self, limit: float = LIMIT) -> Mapping[str, str]:
        """Waits until it is over, and returns its last fields. One that failed has to stay so, as one that is being
        requeued looks over for a moment. A requeued job does not wait for its two minutes."""
        over_since: list[float] = []
        hastened: set[str] = set()

        def is_over(fields: Mapping[str, str]) -> bool:
            if fields["JobState"] not in OVER:
                over_since.clear()
                waits = (fields["JobState"], fields["Reason"]) == ("PENDING", "BeginTime")
                if waits and fields["Restarts"] not in hastened:
                    hastened.add(fields["Restarts"])
                    self.cluster.run("scontrol", "update", f"JobId={self.number}", f"StartTime={RESTART_AT}")
                return False
            over_since.append(time.monotonic())
            return fields["JobState"] == "COMPLETED" or over_since[-1] - over_since[0] > SETTLED_S

        self.wait_until(is_over, "its end", limit)
        return self.fields()

    def completes(self, restarts: int = 0, limit: float = LIMIT) -> None:
        """Waits for its end, which must be good, after so many requeues."""
        fields = self.end(limit)
        assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), f"{fields}\n{self.said()}"
        assert fields["Restarts"] == str(restarts), self.said()
