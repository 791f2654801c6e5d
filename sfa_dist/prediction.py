"""A finished stage's weights as a model that gives probabilities with names: for single videos and for timelines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfa_dist.assemble import load_for_test, read_metadata
from sfa_dist.data.decode import decoder_of
from sfa_dist.data.decode_limits import check_bytes
from sfa_dist.data.stream import ClipSettings, TestViews, cut_clips
from sfa_dist.errors import CheckpointError, RecipeError, UsageError
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import Tail, ViViT
from sfa_dist.recipe import Recipe, Stage2, StageBlock, load_recipe
from sfa_dist.trunk_setup import chunk_need, chunk_that_fits, free_bytes

WEIGHTS = "weights.safetensors"
STAGES = ("stage2", "stage1")


@dataclass(frozen=True)
class Finished:
    """A stage whose final weights are there; `trunk_weights` are stage 1's, where the stage is stage 2."""

    recipe: Recipe
    stage: StageBlock
    weights: Path
    trunk_weights: Path | None


def finished_run(run_dir: Path, environ: Mapping[str, str], overrides: Sequence[str] = ()) -> Finished:
    """The last stage that a run directory has final weights of; of a sweep, the member that its test chose.

    Raises UsageError where it is no run directory, CheckpointError where no stage is done yet.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise UsageError(f"--run {run_dir}: no run directory (it has no recipe.yaml)")
    recipe = load_recipe(run_dir / "recipe.yaml", overrides, environ).recipe
    given = recipe.stage1.weights if recipe.stage1 else None
    stage1 = Path(given) if given else run_dir / "stage1" / WEIGHTS
    if recipe.sweep:
        result = run_dir / "result.json"
        if not result.is_file():
            raise CheckpointError(f"{run_dir}: the sweep is not tested yet, so none of its heads is chosen")
        member = run_dir / "stage2" / "members" / json.loads(result.read_text())["best"]
        recipe = load_recipe(member / "recipe.yaml", overrides, environ).recipe
        return _finished(recipe, "stage2", member / WEIGHTS, stage1)
    for name, weights in (("stage2", run_dir / "stage2" / WEIGHTS), ("stage1", stage1)):
        if getattr(recipe, name) is not None and weights.is_file():
            return _finished(recipe, name, weights, stage1)
    raise CheckpointError(f"{run_dir}: no stage has its final weights yet; train it to the end first")


def finished_weights(recipe: Recipe, weights: Path, trunk_weights: Path | None) -> Finished:
    """Weights by their file. The stage is what they say of themselves; else stage 2 where a trunk is given.

    Raises UsageError for a file that is missing.
    """
    for option, path in (("--weights", weights), ("--trunk-weights", trunk_weights)):
        if path is not None and not path.is_file():
            raise UsageError(f"{option} {path}: no such file")
    name = read_metadata(weights).get("stage", "stage2" if trunk_weights else "stage1")
    if name not in STAGES:
        raise UsageError(f"--weights {weights} are of the stage {name}, which tells no classes of videos")
    if name == "stage2" and trunk_weights is None:
        raise UsageError(f"--weights {weights} are a tail: give the stage 1 that they were trained on, --trunk-weights")
    return _finished(recipe, name, weights, trunk_weights)


def _finished(recipe: Recipe, name: str, weights: Path, stage1: Path | None) -> Finished:
    stage = getattr(recipe, name)
    if stage is None:
        raise RecipeError(f"{weights} is of {name}, and the recipe has none")
    return Finished(recipe, stage, weights, stage1 if name == "stage2" else None)


def class_names(weights: Path, classes: int) -> list[str]:
    """The names that the weights were trained with, or the numbers where there were none. Raises RecipeError where they
    are not as many as the model's classes."""
    recorded = json.loads(read_metadata(weights).get("classes", "null"))
    if not isinstance(recorded, list):
        return [str(number) for number in range(classes)]
    if len(recorded) != classes:
        raise RecipeError(f"{weights} names {len(recorded)} classes, and model.classes is {classes}")
    return [str(name) for name in recorded]


def top_k(probabilities: Tensor, names: Sequence[str], k: int = 5) -> list[dict[str, Any]]:
    """The k likeliest of (classes,): label, name and score, the likeliest first."""
    scores, labels = probabilities.float().topk(min(k, len(names)))
    return [
        {"label": label, "name": names[label], "score": score}
        for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
    ]


class Model:
    """Trunk and tail of a finished stage on a device, in the precision of its engine.

    Clips go through at once (`logits`), or in two parts: tubelet steps, each by itself, to vectors (`steps`), and those
    of a window to scores (`windows`). The second way computes a step once, however many windows it is in.
    """

    def __init__(self, finished: Finished, device: torch.device) -> None:
        stage = finished.stage
        parts = load_for_test(stage, finished.weights, finished.trunk_weights)
        self.stage, self.names = stage, class_names(finished.weights, stage.model.classes)
        if isinstance(parts.trainable, ViViT):
            trunk, self.tail = parts.trainable.trunk, parts.trainable.tail
            dtype = trunk.embed.bias.dtype
            pooled, data = not self.tail.takes_tokens, stage.data
            # Not folded: the same operations as in training.
            self.trunk = FrozenTrunk(trunk, stage.frames, pooled, data.mean, data.std, dtype, fold=False)
        else:
            assert isinstance(parts.trainable, Tail)
            assert parts.frozen is not None
            self.trunk, self.tail = parts.frozen, parts.trainable
        self.trunk.to(device)
        self.tail.to(device)
        if isinstance(stage, Stage2) and stage.chunk_frames == "auto":
            self.trunk.chunk_frames = chunk_that_fits(
                lambda rows: chunk_need(self.trunk, stage, rows), free_bytes(device), stage.model.tubelet
            )

    @torch.inference_mode()
    def logits(self, clips: Tensor) -> Tensor:
        """uint8 (B, 3, T, S, S) -> fp32 (B, classes) on the CPU."""
        logits: Tensor = self.tail(self.trunk(clips))
        return logits.cpu()

    @torch.inference_mode()
    def steps(self, rows: Tensor) -> Tensor:
        """uint8 tubelet steps (R, 3, t, S, S) -> (R, D) on the device, adapter included."""
        features = self.trunk.run_rows(rows.to(self.trunk.device, non_blocking=True))
        return self.tail.adapted(features.unsqueeze(0)).squeeze(0)

    @torch.inference_mode()
    def windows(self, steps: Tensor) -> Tensor:
        """Adapted steps (B, F, D) -> fp32 logits (B, classes) on the CPU."""
        return self.tail.over_time(steps).cpu()


class FilePredictor:
    """Probabilities of video files over the recipe's test views, as the stage `test` scores them."""

    def __init__(self, model: Model, finished: Finished) -> None:
        stage, test = finished.stage, finished.recipe.test
        clip = ClipSettings(stage.data, stage.frames, stage.model.image_size, finished.recipe.seed)
        self._model, self._limits = model, stage.data.limits
        self._views = TestViews(clip, test.temporal_views, test.spatial_views)
        self._decoder = decoder_of(stage.data)

    def __call__(self, path: Path) -> Tensor:
        """fp32 (classes,): the softmax of the logits' mean over the views. Raises BadSample."""
        check_bytes(path.stat().st_size, self._limits)
        clips = cut_clips(path.read_bytes(), self._decoder, self._views)
        # One view at a time: a long clip in twelve views would not fit.
        logits = torch.cat([self._model.logits(clip) for clip in clips.split(1)])
        return logits.mean(dim=0).softmax(dim=0)
