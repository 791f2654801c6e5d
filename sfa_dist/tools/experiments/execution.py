"""Starts the runs of an experiment as processes, one run after another, each on one rank or several.

A process for each run, because DeepSpeed can be set up only once in a process. This one plays the launcher: it sets
torchrun's variables, passes a stop request on, and waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sfa_dist.errors import PreemptedError, SfaError
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.tools.experiments.steps import Step

KNOWN_CODES = (64, 65, 70, 74, 78)
RUN_ID = "sfa-reproduce"  # As torchrun gives one: it says who started a rank.


class RunFailedError(SfaError):
    """A run that ended with an error, whose exit code this has."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.exit_code = code if code in KNOWN_CODES else 70


@dataclass(frozen=True)
class Runner:
    """Runs steps on `ranks` ranks of this machine, with these environment variables, until `stop` is set."""

    ranks: int
    stop: StopFlag
    variables: Mapping[str, str]

    def run(self, step: Step, title: str, say: Callable[[str], None]) -> None:
        """Runs a step unless it is done.

        Raises PreemptedError on a stop request, RunFailedError where the run ends with an error.
        """
        if step.is_done(self.variables) and (step.stage is None or step.weights.is_file()):
            return  # A shared stage without its weights is started: it says what to do.
        self._leave_if_asked()
        say(f"{title}: sfa train --run-dir {step.directory}" + (f" --stage {step.stage}" if step.stage else ""))
        codes = self._codes(step.words)
        if any(codes):
            self._leave_if_asked()
            code = next((code for code in codes if code in KNOWN_CODES), 70)
            text = f"{title}: the run in {step.directory} failed with exit code {code}, and says why above"
            raise RunFailedError(f"{text}; when that is mended, run the same command again to go on", code)

    def _leave_if_asked(self) -> None:
        if self.stop:
            raise PreemptedError(f"stopped by {self.stop.reason}: run the same command again to go on")

    def _codes(self, words: Sequence[str]) -> list[int]:
        """The exit codes of a training on all ranks."""
        processes = [start_rank(words, {**self.variables, **own}) for own in rank_variables(self.ranks)]

        def pass_on() -> None:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)

        self.stop.on_request(pass_on)
        return [process.wait() for process in processes]


def start_rank(words: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """One rank of a training with these options; what it prints to stdout goes to stderr."""
    command = [sys.executable, "-m", "sfa_dist.train", *words]
    return subprocess.Popen(command, env=dict(environ), stdout=sys.stderr.fileno())


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """Each rank's environment variables as torchrun sets them; none for a single process, as under plain `python`."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": RUN_ID}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def usual_ranks() -> int:
    """One for each GPU; without a GPU two where there are two cores, as for the demo."""
    import torch  # Imported here: --help does not need it.

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
