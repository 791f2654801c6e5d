"""What all stages of a run share: recipe, run directory, runtime, tracker, stop flag and watch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sfa_dist.boundary.file_names import WEIGHTS
from sfa_dist.boundary.secret import shown_source
from sfa_dist.checkpoint.failpoints import NO_FAILPOINTS, Failpoints
from sfa_dist.errors import PreemptedError
from sfa_dist.models.weights_file import checked_sha256
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.parallel.watch.guard import Watch
from sfa_dist.recipe.schema import Recipe, Stage1, Stage2, StageBlock
from sfa_dist.recipe.shipped import weights_path
from sfa_dist.run.tracking import Tracker

IMAGE_STAGE = "stage:image"
LOGS = "logs"  # Folder in the run directory for the files of single ranks: stacks, loader output.


@dataclass(frozen=True)
class Run:
    """One run, as all of its stages see it."""

    recipe: Recipe
    directory: Path
    runtime: Runtime
    tracker: Tracker
    stop: StopFlag
    dry_run: bool
    resume_from: tuple[str, Path] | None = None  # A stage and the checkpoint that it must resume from.
    watch: Watch = field(default_factory=Watch)
    failpoints: Failpoints = NO_FAILPOINTS
    reported: set[str] = field(default_factory=set)  # Packs' decoders, other than this run's, that have been reported.

    def weights(self, stage: str) -> Path:
        """The path of a stage's final weights, or of those that the recipe gives instead of training the stage."""
        given = self.recipe.stage1.weights if stage == "stage1" and self.recipe.stage1 else None
        return Path(given) if given else self.directory / stage / WEIGHTS

    def cache_directory(self, stage: Stage2) -> Path:
        """The folder of stage 2's feature cache."""
        given = stage.cache.dir if stage.cache else None
        return Path(given) if given else self.directory / "cache"

    def source(self, stage: StageBlock) -> str | None:
        """The weights that a stage starts from: a file, a `timm:` or `sfa:` name, or None for random weights."""
        if isinstance(stage, Stage2):
            return str(self.weights("stage1"))
        if isinstance(stage, Stage1) and stage.image_checkpoint:
            return str(self.weights("image")) if stage.image_checkpoint == IMAGE_STAGE else stage.image_checkpoint
        return None

    def source_sha256(self, stage: StageBlock) -> str:
        """Identity of the weights that a stage starts from: the file's sha256, or the name if it is not a file.

        Collective.
        """
        source = self.source(stage) or ""
        name, file = shown_source(source), weights_path(source)
        return self.runtime.on_main(lambda: checked_sha256(file) if file.is_file() else name)


def leave_if_asked(run: Run, when: str) -> None:
    """Raises PreemptedError on every rank if one was asked to stop, at a point with nothing to save. Collective.

    `when` says where the run stops, such as `before stage2`.
    """
    [asked] = run.runtime.sum(bool(run.stop))
    if asked:
        run.tracker.event("preempted", reason=run.stop.reason)
        text = f"stopped {when}: what was done before is saved, run the same command again to go on"
        raise run.runtime.for_all(PreemptedError(text))
