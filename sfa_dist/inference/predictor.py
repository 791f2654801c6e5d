"""A finished stage as a model that scores classes: of whole video files, and of the windows of a timeline."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sfa_dist.data.batches.stream import ClipSettings, EvalViews, cut_clips
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.container import is_known
from sfa_dist.data.video.decode import decoder_of
from sfa_dist.data.video.decode_limits import check_bytes
from sfa_dist.data.video.file_kinds import HEAD_BYTES, unreadable
from sfa_dist.inference.class_scores import classes_of
from sfa_dist.inference.finished_stage import FinishedStage
from sfa_dist.models.assembly import largest_chunk
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import Tail, ViViT
from sfa_dist.recipe.schema import Recipe, Stage2, StageBlock
from sfa_dist.stages.assemble import load_for_test
from sfa_dist.stages.trunk_setup import chunk_need, chunk_that_fits, free_bytes
from sfa_dist.training.metrics import average_views
from sfa_dist.training.non_finite import broken_scores


class Model:
    """Trunk and tail of a finished stage on a device, in the precision of its engine.

    Clips are scored in one call (`logits`), or in two: `steps` turns each tubelet step into a vector, and `windows`
    scores the vectors of a window. The second way computes a step once, however many windows contain it. `windows`
    also does what depends on the window: with `model.centre` it runs the adapter, with `model.subtract` the trunk too.

    Scores that are not finite raise SfaError.
    """

    def __init__(self, recipe: Recipe, finished: FinishedStage, device: torch.device) -> None:
        stage: StageBlock = getattr(recipe, finished.stage)
        parts = load_for_test(stage, finished.weights, finished.trunk_weights)
        self.stage, self.classes = stage, classes_of(finished.weights, stage.model)
        self._weights = finished.weights
        if isinstance(parts.trainable, ViViT):
            trunk, self.tail = parts.trainable.trunk, parts.trainable.tail
            dtype = trunk.embed.bias.dtype
            pooled, data = not self.tail.takes_tokens, stage.data
            # fold=False: the same operations as in training.
            self.trunk = FrozenTrunk(trunk, stage.frames, pooled, data.mean, data.std, dtype, fold=False)
        else:
            assert isinstance(parts.trainable, Tail)
            assert parts.frozen is not None
            self.trunk, self.tail = parts.frozen, parts.trainable
        self.trunk.to(device)
        self.tail.to(device)
        if isinstance(stage, Stage2) and stage.chunk_frames == "auto":
            self.trunk.chunk_frames = chunk_that_fits(
                lambda rows: chunk_need(self.trunk, stage, rows),
                free_bytes(device),
                stage.model.tubelet,
                largest_chunk(self.trunk.trunk, device.type),
            )

    @torch.inference_mode()
    def logits(self, clips: Tensor) -> Tensor:
        """uint8 (B, 3, T, S, S) -> fp32 (B, classes) on the CPU."""
        return self._checked(self.tail(self.trunk(clips)))

    @property
    def shares_steps(self) -> bool:
        """Whether a step through the trunk is the same in all windows that it is in."""
        return self.stage.model.subtract == "none"

    @torch.inference_mode()
    def steps(self, tubelets: Tensor) -> Tensor:
        """uint8 tubelet steps (R, 3, t, S, S) -> vectors (R, D) on the device, for `windows`.

        The adapter is included, except with `model.centre`; with `model.subtract` the steps come back as they are.
        """
        if not self.shares_steps:
            return tubelets
        features = self.trunk.run_tubelets(tubelets.to(self.trunk.device, non_blocking=True))
        return features if self.tail.centre else self.tail.adapted(features.unsqueeze(0)).squeeze(0)

    @torch.inference_mode()
    def windows(self, steps: Tensor) -> Tensor:
        """Outputs of `steps` (B, F, ...) -> fp32 logits (B, classes) on the CPU."""
        if not self.shares_steps:
            clips = steps.transpose(1, 2).flatten(2, 3)  # (B, 3, T, S, S)
            return torch.cat([self.logits(clip) for clip in clips.split(1)])
        return self._checked(self.tail(steps) if self.tail.centre else self.tail.over_time(steps))

    def _checked(self, logits: Tensor) -> Tensor:
        if not logits.isfinite().all():
            raise broken_scores(str(self._weights))
        return logits.cpu()


class FilePredictor:
    """Scores video files over the recipe's test views, as the stage `test` does."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        stage, self._test = model.stage, recipe.test
        clip = ClipSettings(stage.data, stage.frames, stage.model.image_size, recipe.seed)
        self._model, self._limits = model, stage.data.limits
        self._views = EvalViews(clip, self._test.temporal_views, self._test.spatial_views, stage.augment.resize)
        self._decoder = decoder_of(stage.data)

    def __call__(self, path: Path) -> Tensor:
        """The scores of a file, fp64 (classes,): averaged over its views as `test.average` says. Raises BadSample."""
        check_bytes(path.stat().st_size, self._limits)
        data = path.read_bytes()
        if not is_known(data[:HEAD_BYTES]):
            raise BadSample(unreadable(data[:HEAD_BYTES], str(path)))
        clips = cut_clips(data, self._decoder, self._views)
        # One view at a time: twelve views of a long clip may not fit in memory.
        logits = torch.cat([self._model.logits(clip) for clip in clips.split(1)])
        return average_views(logits, len(logits), self._test.average, self._model.classes.sizes)[0]
