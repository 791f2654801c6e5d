"""A session: what one start of a run holds on each rank, from beginning to end.

It opens the runtime, then on rank 0 the lock of the run directory, the tracker and `attempts.json`, and last the watch.
At the end the watch closes first; then the outcome is recorded in `attempts.json`, and tracker, lock and runtime close.
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
from sfa_dist.run.trackers.chosen import require_packages
from sfa_dist.run.tracking import Tracker


@contextmanager
def session(
    recipe: Recipe,
    run_dir: Path,
    stop: StopFlag,
    dry_run: bool,
    find_checkpoint: Callable[[], tuple[str, Path] | None],
) -> Iterator[Run]:
    """Joins the other ranks and holds the run directory inside the block. Collective.

    `find_checkpoint` returns the stage and the checkpoint to resume from, or None; rank 0 calls it before anything is
    written. A dry run writes nothing.

    Raises UsageError for a wrong launch, RecipeError if another job holds the run directory, LostRankError if a rank is
    missing or the last starts all failed alike, PreemptedError if a stop is requested while the ranks join,
    CheckpointError if the run directory cannot be read or written.
    """
    with stop.nothing_to_save():
        runtime = parallel_runtime.start(environment(), recipe.device)
    resources = _Session(recipe, run_dir, runtime, stop, dry_run)
    try:
        resume_from = runtime.on_main(find_checkpoint)
        resources.open()
        failpoints = parse_failpoints(environment().get(VARIABLE, "")).within(rank=runtime.rank)
        with resources.watching() as watch:
            yield Run(recipe, run_dir, runtime, resources.tracker, stop, dry_run, resume_from, watch, failpoints)
    finally:
        resources.close()


class _Session:
    """Lock, tracker, attempts and watch of one rank.

    Rank 0 alone takes the lock, records attempts and prints; on the other ranks the tracker does nothing.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, runtime: Runtime, stop: StopFlag, dry_run: bool) -> None:
        self._recipe, self._run_dir, self._runtime = recipe, run_dir, runtime
        self._stop, self._dry_run = stop, dry_run
        self.tracker = Tracker(None, recipe.log, {}, {})
        self._lock = ExitStack()
        self._watch = Watch()

    def open(self) -> None:
        """Takes the lock, opens the tracker, and records that a start begins. Collective."""
        if not self._dry_run:
            self._runtime.on_main(lambda: self._lock.enter_context(held(self._run_dir, environment())))
        self._runtime.on_main(self._open_tracker)
        self._attempts = Attempts(self._run_dir, _identity(self._recipe), self._recipe.stop.same_failures)
        if not self._dry_run:
            self._runtime.on_main(self._attempts.begin)

    def _open_tracker(self) -> None:
        if self._dry_run:
            require_packages(self._recipe.log)
            self.tracker = Tracker.console_only(self._recipe.log)
            return
        config = without_secrets_in(self._recipe.model_dump(mode="json"))
        self.tracker = Tracker(
            self._run_dir, self._recipe.log, config, environment(), stopping=lambda: bool(self._stop)
        )

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Watches for lost ranks inside the block, and records in `attempts.json` how the block ends. Collective."""
        main_address = environment().get("MASTER_ADDR", "127.0.0.1")
        logs = None if self._dry_run else self._run_dir / LOGS
        try:
            with watched(self._runtime, main_address, logs, self._stop, self._record_end) as self._watch:
                yield self._watch
        except Exception as error:
            self._record_end(getattr(error, "exit_code", 70), f"{type(error).__name__}: {error}")
            raise
        self._record_end(0, "")

    def _record_end(self, code: int, text: str) -> None:
        phase, step = self._watch.position
        stage = phase.partition(" ")[0]
        self._attempts.end(code, text, stage, step)

    def close(self) -> None:
        """Closes what `open` has opened, and leaves the process group."""
        self.tracker.close()
        self._lock.close()
        parallel_runtime.stop()


def _identity(recipe: Recipe) -> str:
    """A hash of recipe and code. Only failures with the same identity may have the same cause."""
    return hashlib.sha256(f"{record_recipe(recipe)}{code_sha256()}".encode()).hexdigest()[:16]
