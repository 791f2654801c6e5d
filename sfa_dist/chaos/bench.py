"""A trial's bench: runs of the shrunken recipe in a folder of its own, and the checks that all trials share.

A failed check raises BrokenError: a guarantee does not hold. So does a fault that did not strike: nothing would have
been tested.
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

LOST_WITHIN_S = 30.0  # The guarantee: this long after a rank is lost, all others have ended.
PATIENCE_S = 180.0  # The limit of all other waits.
QUOTED = 110  # Characters of an error line that the table shows.
TREE = ("engine.reduction=tree",)
# Relative tolerances of the loss where the order of sums differs: (first step after the resume, later steps).
CLOSE = {"fp32": (1e-4, 5e-2), "bf16": (5e-2, 2e-1)}


class BrokenError(Exception):
    """A guarantee that does not hold; `details` are the lines of evidence."""

    def __init__(self, what: str, details: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.details = list(details)


@dataclass
class References:
    """Undisturbed runs and runs killed half-way, by ranks and overrides: each is made once, then only read."""

    workplace: Workplace
    made: dict[Any, Path] = field(default_factory=dict)

    def undisturbed(self, ranks: int, sets: tuple[str, ...] = ()) -> Path:
        """The directory of an undisturbed run."""
        return self._once(("undisturbed", ranks, sets), lambda bench, run: bench.complete(run, sets=sets))

    def killed(self, ranks: int, sets: tuple[str, ...] = ()) -> Path:
        """The directory of a run whose ranks were all killed in its first stage, after several checkpoints."""

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
    """One trial's folder, number of ranks and random numbers (`chance`)."""

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
        """Processes of the trial run inside this context; none is left after it."""
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
        """Starts the recipe on all ranks, in the run directory `run` of this bench. `sets` apply to every stage."""
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
        """The overrides for each stage of the recipe: `data.workers=1` becomes `stage1.data.workers=1` and so on."""
        names = [name for name in STAGE_NAMES if getattr(self.workplace.recipe, name) is not None]
        return [f"{name}.{override}" for name in names for override in sets]

    def until(self, job: Job, condition: Callable[[], bool]) -> None:
        """Waits for a condition. Raises BrokenError if the job ends first, StuckError after PATIENCE_S."""
        if not job.wait_until(condition, PATIENCE_S):
            ends = job.ends(PATIENCE_S)
            raise BrokenError(f"the run ended with {codes(ends)} before the fault could strike", output_of(ends))

    def until_step(self, job: Job, step: int, run: str = "run", stage: str | None = None) -> None:
        """Waits until log.jsonl has the step."""
        self.until(job, self.saw_step(step, run, stage))

    def saw_step(self, step: int, run: str = "run", stage: str | None = None) -> Callable[[], bool]:
        """A condition for `until`: log.jsonl has the step."""
        log, mark = self.folder / run / LOG, f'"stage": "{stage or self.first_stage}", "step": {step}, "epoch"'
        return lambda: log.is_file() and mark in log.read_text(errors="replace")

    def pause(self, longest: float) -> None:
        """Waits for a random time of at most `longest` seconds, so that a fault strikes anywhere within a step."""
        time.sleep(self.chance.uniform(0.0, longest))

    def complete(self, run: str = "run", *more: str, sets: Sequence[str] = (), ranks: int | None = None) -> list[End]:
        """Runs the same command to its end. Raises BrokenError unless every rank exits with 0."""
        ends = self.start(run, *more, sets=sets, ranks=ranks).ends(PATIENCE_S)
        if any(end.code for end in ends):
            raise BrokenError(f"the run did not complete: {codes(ends)}", output_of(ends))
        return ends

    def killed_run(self, run: str = "run", sets: tuple[str, ...] = (), ranks: int | None = None) -> Path:
        """A copy of the run that was killed half-way, whose checkpoints a trial may damage."""
        shutil.copytree(self.references.killed(ranks or self.ranks, sets), self.folder / run)
        return self.folder / run

    def checkpoints(self, run: str = "run") -> list[Path]:
        """The first stage's committed checkpoints, oldest first."""
        return sorted((self.folder / run / self.first_stage / CHECKPOINTS).glob("step-????????"))

    def own_clips(self) -> tuple[list[Path], list[str]]:
        """Copies of the first stage's training shards, to damage, and the arguments with which a run reads them."""
        split = f"{self.first_stage}.train"
        source = self.workplace.clips[split][0].parent
        folder = self.folder / "clips"
        shutil.copytree(source, folder)
        return sorted(folder.glob("*.tar")), ["--set", f"{self.first_stage}.data.train=['{folder}/*.tar']"]

    # ------------------------------------------------------------------------------------------------ checks

    def same_bits(self, run: str = "run", sets: tuple[str, ...] = (), stages: tuple[str, ...] = STAGE_NAMES) -> int:
        """Checks that the run equals an undisturbed one to the last bit; returns the number of steps compared."""
        reference = self.references.undisturbed(self.ranks, sets)
        differences = compare(self.folder / run, reference, stages)
        if differences:
            raise BrokenError(
                f"not the same bits, in {len(differences)} places; the first: {differences[0]}", differences
            )
        return sum(1 for line in log_lines(reference) if line["kind"] == "train" and line["stage"] in stages)

    def close_to(self, run: str, ranks: int) -> float:
        """Checks the losses against an undisturbed run on `ranks` ranks; returns the largest relative gap."""
        precision = self.workplace.stages[self.first_stage].engine.precision
        differences, largest = compare_closely(self.folder / run, self.references.undisturbed(ranks), *CLOSE[precision])
        if differences:
            raise BrokenError(f"losses differ, in {len(differences)} places; the first: {differences[0]}", differences)
        return largest

    def refused(self, ends: Sequence[End], code: int | Sequence[int], *words: str) -> str:
        """Checks that all ranks end with one code of `code`, and write one line in all, with these words, to stderr.

        Returns the line.
        """
        allowed = [code] if isinstance(code, int) else list(code)
        if {end.code for end in ends} - set(allowed) or len({end.code for end in ends}) != 1:
            expected = " or ".join(map(str, allowed))
            raise BrokenError(f"ended with {codes(ends)} in place of {expected}", output_of(ends))
        line = one_line(ends)
        missing = [word for word in words if word not in line]
        if missing:
            raise BrokenError(f"the error does not name {', '.join(map(repr, missing))}: {line}")
        return line

    def quote(self, line: str) -> str:
        """The start of an error line for the table, without the path of this bench."""
        text = line.removeprefix("error: ").replace(f"{self.folder}/", "")
        return text if len(text) <= QUOTED else text[:QUOTED].rstrip() + "..."

    def fell_back(self, run: str = "run") -> str:
        """Checks that the run reported its fallback to an older checkpoint; returns the reason."""
        fallbacks = events(self.folder / run, "fallback")
        if not fallbacks:
            raise BrokenError("log.jsonl has no event fallback, though an older checkpoint was used")
        return str(fallbacks[0]["reason"])


def one_line(ends: Sequence[End]) -> str:
    """The only line on stderr of all ranks together. Raises BrokenError if there is none, or several."""
    lines = [line for end in ends for line in end.err.splitlines() if line.strip()]
    if len(lines) != 1 or not lines[0].startswith(("error: ", "stopped: ")):
        raise BrokenError(f"{len(lines)} lines on stderr in place of one 'error: ' or 'stopped: '", output_of(ends))
    return lines[0]


def codes(ends: Sequence[End]) -> str:
    """`exit codes 70, -9`."""
    return f"exit code{'s' * (len(ends) > 1)} " + ", ".join(str(end.code) for end in ends)


def output_of(ends: Sequence[End]) -> list[str]:
    """The ranks' lines on stderr; for a rank without any, the end of its stdout."""
    lines = []
    for rank, end in enumerate(ends):
        text = end.err.strip() or "nothing on stderr; the end of its stdout: " + " / ".join(end.out.split("\n")[-4:])
        lines += [f"rank {rank}: {line}" for line in text.splitlines()]
    return lines


def temporary_folder() -> Path:
    """Makes a new folder under the system's temporary folder."""
    return Path(tempfile.mkdtemp(prefix="sfa-chaos-"))
