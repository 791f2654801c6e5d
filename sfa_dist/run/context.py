"""What every stage knows of the run that it belongs to."""

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
LOGS = "logs"  # Folder of the run directory: what single ranks have to tell.


@dataclass(frozen=True)
class Run:
    """What every stage needs to know of the run it belongs to."""

    recipe: Recipe
    directory: Path
    runtime: Runtime
    tracker: Tracker
    stop: StopFlag
    dry_run: bool
    resume_from: tuple[str, Path] | None = None  # A stage, and the checkpoint that it has to go on from.
    watch: Watch = field(default_factory=Watch)
    failpoints: Failpoints = NO_FAILPOINTS
    told: set[str] = field(default_factory=set)  # Decoders of packs that the user knows are not this run's.

    def weights(self, stage: str) -> Path:
        """Where a stage leaves its final weights, or those that the recipe gives in place of training."""
        given = self.recipe.stage1.weights if stage == "stage1" and self.recipe.stage1 else None
        return Path(given) if given else self.directory / stage / WEIGHTS

    def cache_directory(self, stage: Stage2) -> Path:
        """Where the feature cache of stage 2 is."""
        given = stage.cache.dir if stage.cache else None
        return Path(given) if given else self.directory / "cache"

    def source(self, stage: StageBlock) -> str | None:
        """What a stage starts from: a weights file, a `timm:` or `sfa:` name, or None for random weights."""
        if isinstance(stage, Stage2):
            return str(self.weights("stage1"))
        if isinstance(stage, Stage1) and stage.image_checkpoint:
            return str(self.weights("image")) if stage.image_checkpoint == IMAGE_STAGE else stage.image_checkpoint
        return None

    def source_sha256(self, stage: StageBlock) -> str:
        """Identity of what a stage starts from: the file's hash, or the name where it is no file."""
        source = self.source(stage) or ""
        name, file = shown_source(source), weights_path(source)
        return self.runtime.on_main(lambda: checked_sha256(file) if file.is_file() else name)


def leave_if_asked(run: Run, when: str) -> None:
    """Raises PreemptedError on every rank when one was asked to stop, where there is nothing to save. Collective."""
    [asked] = run.runtime.sum(bool(run.stop))
    if asked:
        run.tracker.event("preempted", reason=run.stop.reason)
        text = f"stopped {when}: what was done before is saved, run the same command again to go on"
        raise run.runtime.for_all(PreemptedError(text))
