"""One start of a run on one rank: what it holds from beginning to end, opened and closed in one order.

The runtime, then on rank 0 the lock of the run directory, the tracker and `attempts.json`, then the watch. At the end
the watch leaves first, how the start ended is noted, and tracker, lock and runtime close.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sfa_dist.boundary.secret import without_secrets_in
from sfa_dist.checkpoint.failpoints import VARIABLE, parse_failpoints
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.parallel.watch.guard import Watch, watched
from sfa_dist.recipe.schema import Recipe, record_recipe
from sfa_dist.run.attempts import Attempts
from sfa_dist.run.context import LOGS, Run
from sfa_dist.run.lock import held
from sfa_dist.run.record import code_sha256
from sfa_dist.run.tracking import Tracker


@contextmanager
def session(
    recipe: Recipe,
    run_dir: Path,
    stop: StopFlag,
    dry_run: bool,
    find_checkpoint: Callable[[], tuple[str, Path] | None],
) -> Iterator[Run]:
    """Joins the other ranks and holds the run directory inside of the block. A dry run writes nothing. Collective.

    `find_checkpoint` gives the stage and the checkpoint to go on from; rank 0 calls it before anything is written.
    Raises SfaError: the exit codes of errors.py.
    """
    with stop.nothing_to_save():
        runtime = parallel_runtime.start(environment())
    held_open = _Session(recipe, run_dir, runtime, stop, dry_run)
    try:
        resume_from = runtime.on_main(find_checkpoint)
        held_open.open()
        failpoints = parse_failpoints(environment().get(VARIABLE, "")).within(rank=runtime.rank)
        with held_open.watched() as watch:
            yield Run(recipe, run_dir, runtime, held_open.tracker, stop, dry_run, resume_from, watch, failpoints)
    finally:
        held_open.close()


class _Session:
    """Tracker, lock, attempts and watch of one rank. Rank 0 alone has a lock, and a tracker that speaks."""

    def __init__(self, recipe: Recipe, run_dir: Path, runtime: Runtime, stop: StopFlag, dry_run: bool) -> None:
        self._recipe, self._run_dir, self._runtime = recipe, run_dir, runtime
        self._stop, self._dry_run = stop, dry_run
        self.tracker = Tracker(None, recipe.log, {}, {})
        self._lock = ExitStack()
        self._watch = Watch()

    def open(self) -> None:
        """Takes the lock, opens the tracker, and notes that a start begins. Collective."""
        if not self._dry_run:
            self._runtime.on_main(lambda: self._lock.enter_context(held(self._run_dir, environment())))
        self._runtime.on_main(self._open_tracker)
        self._attempts = Attempts(self._run_dir, _identity(self._recipe), self._recipe.stop.same_failures)
        if not self._dry_run:
            self._runtime.on_main(self._attempts.begin)

    def _open_tracker(self) -> None:
        config = without_secrets_in(self._recipe.model_dump(mode="json"))
        silent = Tracker.console_only(self._recipe.log)
        told = (self._run_dir, self._recipe.log, config, environment())
        self.tracker = silent if self._dry_run else Tracker(*told, stopping=lambda: bool(self._stop))

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """The watch for lost ranks; how the block ends is noted in `attempts.json`. Collective."""
        main_address = environment().get("MASTER_ADDR", "127.0.0.1")
        logs = None if self._dry_run else self._run_dir / LOGS
        try:
            with watched(self._runtime, main_address, logs, self._stop, self._note_end) as self._watch:
                yield self._watch
        except Exception as error:
            self._note_end(getattr(error, "exit_code", 70), f"{type(error).__name__}: {error}")
            raise
        self._note_end(0, "")

    def _note_end(self, code: int, text: str) -> None:
        phase, step = self._watch.position
        self._attempts.end(code, text, phase.partition(" ")[0], step)

    def close(self) -> None:
        """Ends what `open` opened, and leaves the other ranks."""
        self.tracker.close()
        self._lock.close()
        parallel_runtime.stop()


def _identity(recipe: Recipe) -> str:
    """Of recipe and code: what a failure may be due to."""
    return hashlib.sha256(f"{record_recipe(recipe)}{code_sha256()}".encode()).hexdigest()[:16]
