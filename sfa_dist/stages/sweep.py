"""A sweep: many stage-2 members trained together on one feature cache, reading its features only once.

Each member is a stage 2 of its own, with its own parameters, engine, optimizer state, checkpoints and log lines, under
`stage2/members/<name>/`. Members take turns step by step and get the same batches, so each gives the result that a run
of its own recipe (`recipe.yaml` beside its weights) would give. A member that diverges ends alone: its `done.json`
records it, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

from rich.table import Table

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.feed import BatchFeed
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.errors import CheckpointError, PreemptedError
from sfa_dist.parallel.energy import unknown_energy
from sfa_dist.plan.recipe_plan import memory_line
from sfa_dist.recipe.schema import Member, Stage2, sweep_members
from sfa_dist.run.context import Run
from sfa_dist.run.record import DIVERGED, keep_recipe, read_done, refuse_other_inputs, stage_inputs, write_done
from sfa_dist.run.tracking import Tracker
from sfa_dist.stages.open_data import open_data
from sfa_dist.stages.prepare import Setup, find_checkpoint, set_up
from sfa_dist.training.non_finite import DivergedError
from sfa_dist.training.schedule import planned_steps
from sfa_dist.training.trainer import Trainer

STAGE = "stage2"
Finish = Callable[[Run, str, Setup, dict[str, Any]], None]


class MemberTracker(Tracker):
    """The run's tracker for one member: each line and record carries the member's name."""

    def __init__(self, tracker: Tracker, member: str) -> None:
        self._inner, self._member = tracker, member

    @contextmanager
    def progress(self, title: str, done: int, total: int) -> Iterator[Callable[[], None]]:
        """Shows no bar: there would be one for each member."""
        yield lambda: None

    def say(self, text: str | Table, on_terminal: bool = True) -> None:
        """Prints lines, but no tables, which are nearly the same for all members."""
        if isinstance(text, str):
            self._inner.say(f"{self._member}: {text}", on_terminal)

    def show(self, text: str) -> None:
        """Shows a line with the member's name."""
        self._inner.show(f"{self._member}: {text}")

    def is_new(self, what: str) -> bool:
        """Whether it is new to the whole run, since members read the same clips."""
        return self._inner.is_new(what)

    def record(self, kind: str, **values: Any) -> None:
        """Records the values with `member`."""
        self._inner.record(kind, member=self._member, **values)

    def close(self) -> None:
        """Does nothing: the run closes its tracker itself."""


class SharedEpochs:
    """One stream of batches for all members that begin an epoch, or the rest of one, at the same step.

    The first member that asks opens the stream, and the others get the same batches; a batch is kept until the last
    member has taken it. The stream closes with the last member's copy.
    """

    def __init__(self, open_epoch: Callable[[int, int], BatchFeed], steps_per_epoch: int) -> None:
        self._open_epoch, self._steps_per_epoch = open_epoch, steps_per_epoch
        self._waiting: dict[int, list[BatchFeed]] = {}
        self._streams_to: dict[str, int] = {}  # Member -> the step up to which it has a stream.
        self.trainers: dict[str, Trainer] = {}

    def leave(self, name: str) -> None:
        """Removes a member that ends before the others, and closes the copy of a stream that was kept for it."""
        step = self.trainers.pop(name).progress.step
        waiting = self._waiting.get(step, [])
        if waiting and self._streams_to.get(name, 0) <= step:
            unclaimed = waiting.pop()
            next(unclaimed, None)  # Closing a generator that has not started would skip its `finally`.
            unclaimed.close()
        if not waiting:
            self._waiting.pop(step, None)

    def __call__(self, name: str, epoch: int, first: int) -> BatchFeed:
        """The micro-batches for member `name`, from step `first` of the epoch on."""
        step = epoch * self._steps_per_epoch + first
        if step not in self._waiting:
            takers = sum(
                trainer.progress.step == step and self._streams_to.get(other, 0) <= step
                for other, trainer in self.trainers.items()
            )
            self._waiting[step] = _shared(self._open_epoch(epoch, first), takers)
        self._streams_to[name] = (epoch + 1) * self._steps_per_epoch
        mine = self._waiting[step].pop()
        if not self._waiting[step]:
            del self._waiting[step]
        return mine


def _shared(stream: BatchFeed, takers: int) -> list[BatchFeed]:
    """`takers` feeds of the same batches; `stream` is closed when all of them are."""
    open_still = set(range(takers))

    def one(taker: int, batches: Iterator[Batch]) -> BatchFeed:
        try:
            yield from batches
        finally:
            open_still.discard(taker)
            if not open_still:
                stream.close()

    return [one(taker, batches) for taker, batches in enumerate(tee(stream, takers))]


def member_directory(run: Run, member: Member) -> Path:
    """The folder of a member's checkpoints, weights, recipe and `done.json`."""
    return run.directory / STAGE / "members" / member.name


def train_sweep(run: Run, stage: Stage2, index: SampleIndex, inputs: dict[str, Any], finish: Finish) -> None:
    """Trains all members that are not done; `finish` writes a member's weights. Collective.

    Raises PreemptedError on a stop request, after all members have saved; DivergedError where none is left.
    """
    world = run.runtime.world_size
    members = sweep_members(run.recipe)
    running = {member.name: member.stage.on_ranks(world) for member in members}
    data = open_data(run, STAGE, stage, index)
    shared = SharedEpochs(data.streams.train, data.streams.steps_per_epoch)
    source = run.source_sha256(stage)
    trained: dict[str, tuple[Run, Setup, dict[str, Any]]] = {}
    for member in members:
        directory, own_run = member_directory(run, member), _run_of(run, member)
        own = {**stage_inputs(run.recipe, member.stage, index.sha256, source), "settings": member.settings}
        done = run.runtime.on_main(partial(_is_done, directory, member, own, data.streams.steps_per_epoch))
        if done:
            continue
        checkpoint = None if run.dry_run else find_checkpoint(own_run, STAGE, directory, member.name)
        streams = replace(data.streams, train=partial(shared, member.name))
        setup = set_up(own_run, STAGE, running[member.name], replace(data, streams=streams), own, directory, checkpoint)
        trained[member.name] = own_run, setup, own
    run.tracker.say(f"sweep: {len(members)} members, {len(members) - len(trained)} done before")
    if run.dry_run:
        device = run.runtime.device
        run.tracker.say(f"{STAGE}: {run.runtime.on_main(lambda: memory_line([*running.values()], world, device))}")
        return
    shared.trainers = {name: setup.trainer for name, (_, setup, _) in trained.items()}
    for own_run, setup, _ in trained.values():
        step = setup.trainer.progress.step
        own_run.tracker.event("resume" if step else "start", stage=STAGE, step=step)
    for name, diverged in _take_turns(dict(shared.trainers)):
        own_run, setup, own = trained.pop(name)
        shared.leave(name)
        if diverged is None:
            finish(own_run, STAGE, setup, own)
        else:
            _note_diverged(own_run, setup, own, diverged)
    run.runtime.on_main(lambda: _write_done(run, members, inputs))


def _run_of(run: Run, member: Member) -> Run:
    """The run with the member's tracker; writes the recipe that trains the member alone into its folder."""
    directory = member_directory(run, member)
    alone = run.recipe.model_copy(update={"stage2": member.stage, "sweep": {}})

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        keep_recipe(directory, alone)

    if not run.dry_run:
        run.runtime.on_main(write)
    return replace(run, tracker=MemberTracker(run.tracker, member.name))


def _note_diverged(run: Run, setup: Setup, inputs: dict[str, Any], why: DivergedError) -> None:
    """Writes a `done.json` without a score, so that the member is not trained again."""
    result = {"steps": setup.trainer.progress.step, DIVERGED: str(why)}
    run.runtime.on_main(lambda: write_done(setup.directory, inputs, result))
    run.tracker.event(DIVERGED, stage=STAGE, step=result["steps"], reason=str(why))
    run.tracker.say(f"{STAGE}: diverged, the other members go on ({why})")


def _is_done(directory: Path, member: Member, inputs: dict[str, Any], steps_per_epoch: int) -> bool:
    done = read_done(directory)
    if done is None:
        return False
    refuse_other_inputs(f"member {member.name}", done["inputs"], inputs)
    return DIVERGED in done["result"] or done["result"]["steps"] >= planned_steps(
        member.stage.schedule, steps_per_epoch
    )


def _take_turns(trainers: dict[str, Trainer]) -> Iterator[tuple[str, DivergedError | None]]:
    """Steps the trainer that is furthest behind, until all have ended; yields (name, why it diverged or None) of each.

    A run killed between two members' saves resumes with members at different steps: those behind catch up first.
    """
    running = {name: trainer.steps() for name, trainer in trainers.items()}
    while running:
        name = min(running, key=lambda name: trainers[name].progress.step)
        try:
            next(running[name])
        except StopIteration:
            del running[name]
            yield name, None
        except DivergedError as error:
            del running[name]
            yield name, error
        except PreemptedError:  # This member has saved its state, and all ranks have the request.
            for other in sorted(running.keys() - {name}):
                trainers[other].save_now()
            raise


def _write_done(run: Run, members: list[Member], inputs: dict[str, Any]) -> None:
    """Writes the `done.json` of the whole stage: its members' results, added up."""
    results = [result for member in members if DIVERGED not in (result := member_result(run, member))]
    if not results:
        text = f"all {len(members)} members of the sweep have diverged (log.jsonl says why: {DIVERGED})"
        raise DivergedError(f"{text}; lower optimizer.lr, in another --run-dir")
    total = {
        "steps": min(result["steps"] for result in results),
        "members": len(members),
        **{key: results[0][key] for key in ("frozen_parameters", "samples_seen", "bad_samples", "data_share")},
        "peak_memory_gib": max(result["peak_memory_gib"] for result in results),
        **unknown_energy("the members of a sweep are trained together"),
    }
    for key in ("seconds", "gpu_seconds", "trainable_parameters", "optimizer_bytes_per_rank"):
        total[key] = sum(result[key] for result in results)
    write_done(run.directory / STAGE, inputs, total)


def member_result(run: Run, member: Member) -> dict[str, Any]:
    """The `result` of a member's `done.json`: of its training, or with the reason under DIVERGED.

    Raises CheckpointError where the member is not done.
    """
    directory = member_directory(run, member)
    done = read_done(directory)
    if done is None:
        raise CheckpointError(f"member {member.name} is not done: {directory} has no done.json; run the stage again")
    return done["result"]


def trained_members(run: Run) -> list[Member]:
    """The members that have weights: all but the diverged ones. Collective."""
    members = sweep_members(run.recipe)
    diverged = run.runtime.on_main(lambda: [DIVERGED in member_result(run, member) for member in members])
    return [member for member, is_lost in zip(members, diverged, strict=True) if not is_lost]
