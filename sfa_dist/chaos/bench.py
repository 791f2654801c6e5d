"""A trial's bench: runs of the shrunken recipe in a folder of their own, and the checks that every trial shares.

A check that fails raises BrokenError: a guarantee does not hold. So does a fault that did not strike: nothing would
have been tried.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfa_dist.boundary.file_names import CHECKPOINTS, LOG
from sfa_dist.chaos.oracle import compare, compare_closely, events, log_lines
from sfa_dist.chaos.processes import End, Job
from sfa_dist.chaos.workplace import SAVE_EVERY, Workplace
from sfa_dist.recipe.schema import STAGE_NAMES

LOST_WITHIN_S = 30.0  # The promise: so long after a rank is lost, all others are out.
PATIENCE_S = 180.0
QUOTED = 110  # Characters of an error line that the table shows.
TREE = ("engine.reduction=tree",)
# Relative differences of the loss allowed where the order of sums differs: (first step after the resume, later ones).
CLOSE = {"fp32": (1e-4, 5e-2), "bf16": (5e-2, 2e-1)}


class BrokenError(Exception):
    """A guarantee that did not hold; `details` are the lines of evidence."""

    def __init__(self, what: str, details: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.details = list(details)


@dataclass
class References:
    """Undisturbed runs, and one that was killed half-way, by ranks and overrides: made once, then only read."""

    workplace: Workplace
    made: dict[Any, Path] = field(default_factory=dict)

    def undisturbed(self, ranks: int, sets: tuple[str, ...] = ()) -> Path:
        """The run that nobody disturbed."""
        return self._once(("undisturbed", ranks, sets), lambda bench, run: bench.complete(run, sets=sets))

    def killed(self, ranks: int, sets: tuple[str, ...] = ()) -> Path:
        """A run whose ranks were all killed in its first stage, with several checkpoints behind it."""

        def begin(bench: Bench, run: str) -> None:
            stage = next(iter(self.workplace.stages))
            job = bench.start(run, sets=sets)
            half = self.workplace.steps // 2 // SAVE_EVERY * SAVE_EVERY
            bench.until(job, (bench.folder / run / stage / CHECKPOINTS / f"step-{half:08d}").exists)
            job.send_to_groups(signal.SIGKILL)
            job.ends(PATIENCE_S)

        return self._once(("killed", ranks, sets), begin)

    def _once(self, key: Any, make: Callable[[Bench, str], object]) -> Path:
        if key not in self.made:
            folder = self.workplace.folder / "references" / str(len(self.made))
            with Bench(self, folder, key[1], random.Random(0)).closing() as bench:
                make(bench, "run")
            self.made[key] = folder / "run"
        return self.made[key]


class Bench:
    """One trial's own folder, number of ranks and chance."""

    def __init__(
        self,
        references: References,
        folder: Path,
        ranks: int,
        chance: random.Random,
        rounds: int = 1,
        thorough: bool = False,
    ) -> None:
        self.workplace, self.references, self.folder, self.ranks = references.workplace, references, folder, ranks
        self.chance, self.rounds, self.thorough = chance, rounds, thorough
        self._jobs: list[Job] = []
        folder.mkdir(parents=True)

    @contextlib.contextmanager
    def closing(self) -> Iterator[Bench]:
        """Inside of it processes run; none is left after it."""
        try:
            yield self
        finally:
            for job in self._jobs:
                job.kill()

    @property
    def first_stage(self) -> str:
        """The stage in which most faults strike."""
        return next(iter(self.workplace.stages))

    # ------------------------------------------------------------------------------------------------ runs

    def start(
        self,
        run: str = "run",
        *more: str,
        sets: Sequence[str] = (),
        ranks: int | None = None,
        environ: Mapping[str, str] | None = None,
        prepare: Callable[[], Callable[[], object] | None] | None = None,
    ) -> Job:
        """The recipe on all ranks, in the run directory `run` of this bench. `sets` hold for every stage."""
        words = [word for override in self.for_each_stage(sets) for word in ("--set", override)]
        outputs = self.folder / "outputs" / f"{len(self._jobs):02d}"
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        job = Job(
            self.folder,
            outputs,
            ["--recipe", str(self.workplace.recipe_file), "--run-dir", str(self.folder / run), *words, *more],
            world_size=ranks or self.ranks,
            environ={"TMPDIR": str(scratch), **(environ or {})},
            prepare=prepare,
        )
        self._jobs.append(job)
        return job

    def for_each_stage(self, sets: Sequence[str]) -> list[str]:
        """`data.workers=1` for every stage that the recipe has."""
        names = [name for name in STAGE_NAMES if getattr(self.workplace.recipe, name) is not None]
        return [f"{name}.{override}" for name in names for override in sets]

    def until(self, job: Job, condition: Callable[[], bool]) -> None:
        """Waits for a condition. Raises BrokenError when the job ends before it holds."""
        if not job.wait_until(condition, PATIENCE_S):
            ends = job.ends(PATIENCE_S)
            raise BrokenError(f"the run ended with {codes(ends)} before the fault could strike", said(ends))

    def until_step(self, job: Job, step: int, run: str = "run", stage: str | None = None) -> None:
        """Waits until log.jsonl has a step."""
        self.until(job, self.saw_step(step, run, stage))

    def saw_step(self, step: int, run: str = "run", stage: str | None = None) -> Callable[[], bool]:
        """Whether log.jsonl has a step."""
        log, mark = self.folder / run / LOG, f'"stage": "{stage or self.first_stage}", "step": {step}, "epoch"'
        return lambda: log.is_file() and mark in log.read_text(errors="replace")

    def pause(self, longest: float) -> None:
        """Waits for a random time, so that a fault strikes anywhere within a step."""
        time.sleep(self.chance.uniform(0.0, longest))

    def complete(self, run: str = "run", *more: str, sets: Sequence[str] = (), ranks: int | None = None) -> list[End]:
        """The same command to its end. Raises BrokenError unless every rank ends with 0."""
        ends = self.start(run, *more, sets=sets, ranks=ranks).ends(PATIENCE_S)
        if any(end.code for end in ends):
            raise BrokenError(f"the run did not go on: {codes(ends)}", said(ends))
        return ends

    def killed_run(self, run: str = "run", sets: tuple[str, ...] = (), ranks: int | None = None) -> Path:
        """A copy of the run that was killed half-way; gives its checkpoints, oldest first, to be damaged."""
        shutil.copytree(self.references.killed(ranks or self.ranks, sets), self.folder / run)
        return self.folder / run

    def checkpoints(self, run: str = "run") -> list[Path]:
        """The first stage's committed checkpoints, oldest first."""
        return sorted((self.folder / run / self.first_stage / CHECKPOINTS).glob("step-????????"))

    def own_clips(self) -> tuple[list[Path], list[str]]:
        """Copies of the first stage's training shards, to be damaged, and the arguments that make a run read them."""
        split = f"{self.first_stage}.train"
        source = self.workplace.clips[split][0].parent
        folder = self.folder / "clips"
        shutil.copytree(source, folder)
        return sorted(folder.glob("*.tar")), ["--set", f"{self.first_stage}.data.train=['{folder}/*.tar']"]

    # ------------------------------------------------------------------------------------------------ checks

    def same_bits(self, run: str = "run", sets: tuple[str, ...] = (), stages: tuple[str, ...] = STAGE_NAMES) -> int:
        """The run is to the last bit what an undisturbed one is; gives the number of steps that were compared."""
        reference = self.references.undisturbed(self.ranks, sets)
        differences = compare(self.folder / run, reference, stages)
        if differences:
            raise BrokenError(
                f"not the same bits, in {len(differences)} places; the first: {differences[0]}", differences
            )
        return sum(1 for line in log_lines(reference) if line["kind"] == "train" and line["stage"] in stages)

    def close_to(self, run: str, ranks: int) -> float:
        """The run computes what an undisturbed one on so many ranks does; gives the largest relative gap of a loss."""
        precision = self.workplace.stages[self.first_stage].engine.precision
        differences, largest = compare_closely(self.folder / run, self.references.undisturbed(ranks), *CLOSE[precision])
        if differences:
            raise BrokenError(f"losses differ, in {len(differences)} places; the first: {differences[0]}", differences)
        return largest

    def refused(self, ends: Sequence[End], code: int | Sequence[int], *words: str) -> str:
        """All ranks end with the code, and one line on stderr, in all, has these words; gives the line."""
        allowed = [code] if isinstance(code, int) else list(code)
        if {end.code for end in ends} - set(allowed) or len({end.code for end in ends}) != 1:
            raise BrokenError(f"ended with {codes(ends)}, promised is {' or '.join(map(str, allowed))}", said(ends))
        line = one_line(ends)
        missing = [word for word in words if word not in line]
        if missing:
            raise BrokenError(f"the error does not name {', '.join(map(repr, missing))}: {line}")
        return line

    def quote(self, line: str) -> str:
        """The beginning of an error line, without the folder's own path: for the table."""
        text = line.removeprefix("error: ").replace(f"{self.folder}/", "")
        return text if len(text) <= QUOTED else text[:QUOTED].rstrip() + "..."

    def fell_back(self, run: str = "run") -> str:
        """The run says that it took an older checkpoint; gives what it says."""
        told = events(self.folder / run, "fallback")
        if not told:
            raise BrokenError("no event says that an older checkpoint was taken")
        return str(told[0]["reason"])


def one_line(ends: Sequence[End]) -> str:
    """The one line that all ranks together have on stderr. Raises BrokenError when they have none or several."""
    lines = [line for end in ends for line in end.err.splitlines() if line.strip()]
    if len(lines) != 1 or not lines[0].startswith(("error: ", "stopped: ")):
        raise BrokenError(f"{len(lines)} lines on stderr, promised is one 'error: ' or 'stopped: '", said(ends))
    return lines[0]


def codes(ends: Sequence[End]) -> str:
    """`exit codes 70, -9`."""
    return f"exit code{'s' * (len(ends) > 1)} " + ", ".join(str(end.code) for end in ends)


def said(ends: Sequence[End]) -> list[str]:
    """What the ranks wrote on stderr, and the end of their output."""
    lines = []
    for rank, end in enumerate(ends):
        text = end.err.strip() or "nothing on stderr; the end of its output: " + " / ".join(end.out.split("\n")[-4:])
        lines += [f"rank {rank}: {line}" for line in text.splitlines()]
    return lines


def temporary_folder() -> Path:
    """A folder of its own under the system's temporary one."""
    return Path(tempfile.mkdtemp(prefix="sfa-chaos-"))
