"""The stage `test`: the last stage's weights over the recipe's views, and result.json."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from sfa_dist import checkpoint as ckpt
from sfa_dist.assemble import Parts, load_for_test, read_metadata
from sfa_dist.data.feed import feed
from sfa_dist.data.loader import Loader
from sfa_dist.data.shard_index import SampleIndex
from sfa_dist.data.stream import check_labels, eval_loader
from sfa_dist.evaluation import evaluate, note_bad_test_clips
from sfa_dist.recipe import Stage2, StageBlock, sweep_members
from sfa_dist.run import Run
from sfa_dist.run_record import (
    collect_results,
)
from sfa_dist.stage_data import check_classes, feed_place, open_split
from sfa_dist.sweep import STAGE as SWEPT
from sfa_dist.sweep import member_directory, test_sweep
from sfa_dist.trunk_setup import place_trunk


def test(run: Run, name: str, stage: StageBlock) -> None:
    """Evaluates the last stage's weights over the recipe's views and writes result.json."""
    patterns = stage.data.test or stage.data.val
    if not patterns:
        run.tracker.say("test: the recipe names neither data.test nor data.val, so there is no result")
        return
    run.watch.phase("test")
    index = open_split(run, patterns, f"{name}.data.test", stage.data.remote)
    run.runtime.on_main(lambda: check_labels(index, stage.model.classes))
    if run.dry_run:
        return
    swept = run.recipe.sweep and name == SWEPT
    weights = (
        member_directory(run, sweep_members(run.recipe)[0]) / run.weights(name).name if swept else run.weights(name)
    )
    trained = json.loads(read_metadata(weights).get("classes", "null"))
    run.runtime.on_main(lambda: check_classes(trained if isinstance(trained, list) else None, index))
    extra: dict[str, Any] = {}
    if swept:
        batches = feed(_test_batches(run, stage, index, "time"), feed_place(run), lambda: bool(run.stop))
        found = test_sweep(run, batches, stage.data.max_bad_fraction)
        stage, parts, result = found.best.stage, found.best_parts, found.best_result
        extra = {"sweep": found.lines, "sweep_means": found.means, "best": found.best.name}
        for line in found.lines:
            run.tracker.record("eval", stage="test", step=0, **line)
    else:
        trunk_weights = run.weights("stage1") if name == "stage2" else None
        parts = run.runtime.each(lambda: load_for_test(stage, weights, trunk_weights))
        parts.trainable.to(run.runtime.device)
        if parts.frozen is not None and isinstance(stage, Stage2):
            place_trunk(parts.frozen, stage, run.runtime)
        result = _score(run, stage, parts, index, stage.data.frame_order)
    views = run.recipe.test.temporal_views * run.recipe.test.spatial_views
    run.tracker.record("eval", stage="test", step=0, views=views, **result)
    if run.recipe.test.shuffled_frames:
        control = _score(run, stage, parts, index, "shuffled")
        run.tracker.record("eval", stage="test", step=0, views=views, frame_order="shuffled", **control)
        result["acc1_shuffled_frames"] = control["acc1"]
    summary = {**result, "views": views, "frames": stage.frames, **extra, **collect_results(run.directory)}
    run.runtime.on_main(lambda: ckpt.write_json(run.directory / "result.json", summary))
    _say_result(run, summary)


def _test_batches(run: Run, stage: StageBlock, index: SampleIndex, order: str) -> Loader:
    return eval_loader(
        index,
        data=stage.data.model_copy(update={"frame_order": order}),
        batch=stage.batch,
        frames=stage.frames,
        crop=stage.model.image_size,
        seed=run.recipe.seed,
        rank=run.runtime.rank,
        world_size=run.runtime.world_size,
        temporal_views=run.recipe.test.temporal_views,
        spatial_views=run.recipe.test.spatial_views,
        pin_memory=run.runtime.device.type == "cuda",
    )


def _score(run: Run, stage: StageBlock, parts: Parts, index: SampleIndex, order: str) -> dict[str, Any]:
    @torch.no_grad()
    def predict(batch: dict[str, Any]) -> Tensor:
        if parts.frozen is not None:
            return parts.trainable(parts.frozen(batch["clips"]))
        return parts.trainable(batch["clips"].to(run.runtime.device, non_blocking=True))

    budget = stage.data.max_bad_fraction
    return evaluate(
        predict,
        feed(_test_batches(run, stage, index, order), feed_place(run), lambda: bool(run.stop)),
        run.runtime,
        run.stop,
        lambda bad, clips: note_bad_test_clips(bad, clips, "test", 0, budget, run.tracker),
    )


def _say_result(run: Run, summary: dict[str, Any]) -> None:
    scores = f"acc1 {summary['acc1']:.4f}, acc5 {summary['acc5']:.4f}"
    text = f"test: {scores} on {summary['samples']} clips, {summary['views']} view(s)"
    if "acc1_shuffled_frames" in summary:
        text += f"; acc1 {summary['acc1_shuffled_frames']:.4f} with the frames of each clip in random order"
    run.tracker.say(text)
    run.tracker.say(f"result: {run.directory / 'result.json'} ({summary['total_seconds']:.0f} s of training)")
