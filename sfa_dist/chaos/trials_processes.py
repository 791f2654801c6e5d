"""Faults of processes: killed, stopped, asked to stop, on one rank or on all of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from sfa_dist.boundary.file_names import CHECKPOINTS
from sfa_dist.chaos.bench import LOST_WITHIN_S, PATIENCE_S, Bench, BrokenError, codes, one_line, output_of
from sfa_dist.chaos.oracle import events, log_lines
from sfa_dist.chaos.processes import End, Job
from sfa_dist.chaos.trials import ALONE, LOSS_IS_LOUD, SAME_BITS, STOPS_SAVED, trial
from sfa_dist.checkpoint import newest_valid
from sfa_dist.checkpoint.failpoints import POINTS, VARIABLE

KILLS_A_RUN = 6  # How often one run is killed before it may complete, at most.
WITH_WORKERS = ("data.workers=1",)
ATTEMPTS = 4  # To kill a loader worker before its epoch ends.


@trial(SAME_BITS, "kill -9 of one rank or of all at random moments", rows=(1, 2))
def kill_anywhere(bench: Bench) -> str:
    """Runs are killed repeatedly at random steps of all stages, until there are enough kills."""
    struck: list[str] = []
    runs = 0
    while len(struck) < bench.rounds:
        run = f"run-{runs}"
        runs += 1
        for stage, step in _points(bench, min(KILLS_A_RUN, bench.rounds - len(struck))):
            where = _kill_at(bench, run, stage, step)
            if where is None:
                break
            struck.append(where)
        bench.complete(run)
        steps = bench.same_bits(run)
        if runs > 4 * bench.rounds:
            raise BrokenError(f"{runs} runs were over before they could be killed")
    few = ", ".join(struck[:6]) + (", ..." if len(struck) > 6 else "")
    return f"{len(struck)} kills in {runs} run(s) ({few}); {steps} losses and norms, weights and scores the same bits"


def _points(bench: Bench, count: int) -> list[tuple[str, int]]:
    everywhere = [(stage, step) for stage in bench.workplace.stages for step in range(bench.workplace.steps)]
    return [everywhere[i] for i in sorted(bench.chance.sample(range(len(everywhere)), min(count, len(everywhere))))]


def _kill_at(bench: Bench, run: str, stage: str, step: int) -> str | None:
    """Kills one rank, or all of them, soon after a step; returns where, or None if the run completed first."""
    job = bench.start(run)
    before = len(log_lines(bench.folder / run))
    victims = bench.chance.choice([None, *([rank] for rank in range(bench.ranks))]) if bench.ranks > 1 else None
    reached = bench.saw_step(step, run, stage) if step else lambda: bool(_begun(bench, run, stage))

    def due() -> bool:
        # A single rank is killed only after the rendezvous, when the others watch it.
        return reached() and (victims is None or len(log_lines(bench.folder / run)) > before)

    if not job.wait_until(due, PATIENCE_S):
        return None
    bench.pause(0.1)
    if victims is None:
        job.send_to_groups(signal.SIGKILL)
        ends = job.ends(PATIENCE_S)
        return None if all(end.code == 0 for end in ends) else f"all@{stage}/{_last_step(bench, run)}"
    job.send(signal.SIGKILL, victims)
    ends = job.ends(LOST_WITHIN_S)
    if all(end.code == 0 for end in ends):
        return None
    if any(end.code == 0 for rank, end in enumerate(ends) if rank not in victims):
        return None  # The rank had left the run in order before the kill.
    _others_left(ends, victims[0])
    return f"rank {victims[0]}@{stage}/{_last_step(bench, run)}"


def _begun(bench: Bench, run: str, stage: str) -> list[dict[str, object]]:
    return [e for name in ("start", "resume") for e in events(bench.folder / run, name) if e["stage"] == stage]


def _last_step(bench: Bench, run: str) -> int:
    steps = [line["step"] for line in log_lines(bench.folder / run) if line["kind"] == "train"]
    return steps[-1] if steps else 0


def _others_left(ends: Sequence[End], lost: int) -> str:
    """Checks that all but the lost rank ended with 70 and named it in one line; returns the line."""
    others = [end for rank, end in enumerate(ends) if rank != lost]
    if any(end.code != 70 for end in others):
        raise BrokenError(f"after the loss of rank {lost}: {codes(ends)} in place of 70", output_of(ends))
    line = one_line(others)
    if f"rank {lost} " not in line:
        raise BrokenError(f"the error does not name rank {lost}: {line}")
    return line


@trial(SAME_BITS, "kill -9 in each phase of a save", rows=(3, 4))
def kill_in_each_phase_of_a_save(bench: Bench) -> str:
    """There is always a checkpoint that verifies, and the remains of the save are cleared."""
    stage, seen = bench.first_stage, []
    for point in (point for point in POINTS if point.startswith("save.")):
        run = point
        job = _save_and_die(bench, point)
        ends = job.ends(PATIENCE_S)
        if signal.SIGKILL not in {-end.code for end in ends}:
            raise BrokenError(f"{point}: no rank was killed there ({codes(ends)})", output_of(ends))
        found, faults = newest_valid(bench.folder / run / stage / CHECKPOINTS)
        if found is None or faults:
            raise BrokenError(f"{point}: {'; '.join(faults) or 'there is no checkpoint'}")
        bench.complete(run, "--stage", stage)
        bench.same_bits(run, stages=(stage,))
        step = found.name.removeprefix("step-").lstrip("0")  # `6.old` if the new one was not in place yet.
        seen.append(f"{point.removeprefix('save.')} -> {step}")
        if left := list((bench.folder / run / stage / CHECKPOINTS).glob("*.tmp")):
            raise BrokenError(f"{point}: {left[0].name} still exists at the end")
    return f"resumed from the newest intact step each time ({', '.join(seen)}); the same bits"


def _save_and_die(bench: Bench, point: str) -> Job:
    """Starts a run that dies at the point.

    A save takes two renames only if its step was saved before: the run then resumes from an older checkpoint.
    """
    stage, step = bench.first_stage, 4
    more: tuple[str, ...] = ()
    if point == "save.between_renames":
        bench.killed_run(point)
        *_, older, newest = bench.checkpoints(point)
        more, step = ("--resume", str(older)), int(newest.name[5:])
    rule = f"{point}:kill@step={step},stage={stage}"
    return bench.start(point, "--stage", stage, *more, environ={VARIABLE: rule})


@trial(LOSS_IS_LOUD, "kill -9 of a loader worker", rows=(5,))
def kill_loader_worker(bench: Bench) -> str:
    """The rank that lost the worker reports it, and all ranks end with 70."""
    ends: list[End] = []
    for run in (f"run-{attempt}" for attempt in range(ATTEMPTS)):
        job = bench.start(run, sets=WITH_WORKERS)
        rank = bench.chance.randrange(bench.ranks)
        bench.until_step(job, 1, run)
        bench.until(job, lambda job=job, rank=rank: job.kill_worker(rank))  # type: ignore[misc]
        ends = job.ends(LOST_WITHIN_S)
        if any(end.code for end in ends):
            break  # Else the epoch had ended, and nothing needed the worker any more.
    if {end.code for end in ends} != {70}:
        raise BrokenError(f"{codes(ends)} in place of 70", output_of(ends))
    line = next((line for end in ends for line in end.err.splitlines() if "worker" in line), None)
    if line is None:
        raise BrokenError("no rank names the worker", output_of(ends))
    bench.complete(run, sets=WITH_WORKERS)
    bench.same_bits(run)
    return f"{codes(ends)}: {bench.quote(line)}; resumed to the same bits"


@trial(STOPS_SAVED, "SIGTERM, SIGINT, SIGUSR1 to one random rank", rows=(7,))
def stop_request_to_one_rank(bench: Bench) -> str:
    """All ranks stop after the same step."""
    return _stop_three_times(bench, lambda job, number: job.send(number, [bench.chance.randrange(bench.ranks)]), ())


@trial(STOPS_SAVED, "SIGTERM, SIGINT, SIGUSR1 to all ranks and their loader workers", rows=(8, 9))
def stop_request_to_the_group(bench: Bench) -> str:
    """A batch system does this; the workers must live on until the state is saved."""
    return _stop_three_times(bench, lambda job, number: job.send_to_groups(number), WITH_WORKERS)


def _stop_three_times(bench: Bench, send: Callable[[Job, signal.Signals], None], sets: tuple[str, ...]) -> str:
    steps = []
    last = bench.workplace.steps
    for number, step in zip((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), (2, last // 2, last - 4), strict=True):
        job = bench.start(sets=sets)
        bench.until_step(job, step)
        bench.pause(0.02)
        send(job, number)
        bench.refused(job.ends(PATIENCE_S), 75, "state is saved")
        stopped_at = events(bench.folder / "run", "preempted")[-1]["step"]
        if not bench.checkpoints() or int(bench.checkpoints()[-1].name[5:]) < stopped_at:
            raise BrokenError(f"{number.name}: step {stopped_at} is reported as saved, but has no checkpoint")
        steps.append(f"{number.name}@{stopped_at}")
    bench.complete(sets=sets)
    ran = [line["step"] for line in log_lines(bench.folder / "run") if line.get("kind") == "train"]
    if len(ran) != bench.same_bits():
        raise BrokenError(f"{len(ran)} steps ran in place of {bench.same_bits()}: a stop request must lose none")
    return f"75 each time ({', '.join(steps)}), no step lost or run twice; the same bits"


@trial(STOPS_SAVED, "Ctrl-C twice; SIGKILL right after SIGTERM", rows=(13, 17))
def impatient_end(bench: Bench) -> str:
    """The earlier state is intact, however far the save had come."""
    seen = []
    for number, (step, then) in enumerate(((3, signal.SIGINT), (7, signal.SIGKILL))):
        job = bench.start()
        bench.until_step(job, step)
        job.send(signal.SIGINT if then == signal.SIGINT else signal.SIGTERM)
        bench.pause(0.01)
        job.send_to_groups(then) if then == signal.SIGKILL else job.send(then)
        ends = job.ends(PATIENCE_S)
        allowed = {70, 75} if number == 0 else {-9, 75}
        if {end.code for end in ends} - allowed:
            raise BrokenError(f"{codes(ends)} in place of one of {sorted(allowed)}", output_of(ends))
        seen.append(codes(ends))
    bench.complete()
    bench.same_bits()
    return f"{'; '.join(seen)}; resumed to the same bits"


@trial(LOSS_IS_LOUD, "SIGSTOP of a rank: it hangs", rows=(16,), on="several")
def stopped_rank(bench: Bench) -> str:
    """The others do not wait for it forever."""
    job = bench.start()
    bench.until_step(job, 3)
    lost = bench.chance.randrange(bench.ranks)
    job.send(signal.SIGSTOP, [lost])
    ends = job.ends(LOST_WITHIN_S, [rank for rank in range(bench.ranks) if rank != lost])
    job.kill()
    stopped = End(-signal.SIGSTOP, "", "")
    line = _others_left([*ends[:lost], stopped, *ends[lost:]], lost)
    bench.complete()
    bench.same_bits()
    return f"{bench.quote(line)}; resumed to the same bits"


@trial(SAME_BITS, "SIGSTOP of all ranks, then SIGCONT", rows=(16,))
def suspended_and_continued(bench: Bench) -> str:
    """A suspended run, as by Ctrl-Z, continues as if nothing had happened."""
    job = bench.start()
    bench.until_step(job, 3)
    job.send_to_groups(signal.SIGSTOP)
    bench.pause(1.0)
    job.send_to_groups(signal.SIGCONT)
    ends = job.ends(PATIENCE_S)
    if any(end.code for end in ends):
        raise BrokenError(codes(ends), output_of(ends))
    return f"continued; {bench.same_bits()} steps the same bits"


@trial(ALONE, "a second job on the same run directory", rows=(29,))
def two_jobs(bench: Bench) -> str:
    """The second is refused, and the error names the first; the first is not affected."""
    first = bench.start()
    bench.until_step(first, 1)
    line = bench.refused(bench.start().ends(PATIENCE_S), 78, "in use by process", str(first.pids[0]))
    ends = first.ends(PATIENCE_S)
    if any(end.code for end in ends):
        raise BrokenError(f"the first job ended with {codes(ends)}", output_of(ends))
    bench.same_bits()
    return f"{bench.quote(line)}; the first job: the same bits"
