"""`sfa evaluate`: tests finished weights, of a run or given by their file, without changing the run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from sfa_dist import checkpoint as ckpt
from sfa_dist.data.batches.stream import check_labels
from sfa_dist.inference.finished_stage import FinishedStage
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.parallel.watch.guard import watched
from sfa_dist.recipe.schema import Recipe, StageBlock, record_recipe
from sfa_dist.run import out_of_memory
from sfa_dist.run.chance import heads_of, shows_top5
from sfa_dist.run.context import Run
from sfa_dist.run.cost import cost_of, unknown_cost
from sfa_dist.run.record import code_sha256, collect_results
from sfa_dist.run.tracking import Tracker
from sfa_dist.stages.assemble import Parts, metadata_value, trained_classes
from sfa_dist.stages.open_data import check_classes, open_split
from sfa_dist.stages.prepare import require_precisions
from sfa_dist.stages.scoring import load_parts, score_all_views
from sfa_dist.training.prediction_file import require_writer


def evaluate_finished(
    recipe: Recipe,
    finished: FinishedStage,
    any_frames: bool,
    out: Path | None,
    asked: Mapping[str, Any],
    as_json: bool,
    stop: StopFlag,
) -> None:
    """Joins the other ranks, tests, prints the scores and writes them to `out`, with the options in `asked`.

    Predictions and the scores of each class go into a folder beside `out` that has its name without the suffix.
    With `any_frames` the recipe's number of frames may differ from that of the training. Raises SfaError.
    """
    with stop.nothing_to_save():
        runtime = parallel_runtime.start(environment(), recipe.device)
    try:
        on_stderr = Tracker.console_only(recipe.log, on_stderr=as_json)
        tracker = on_stderr if runtime.is_main else Tracker(None, recipe.log, {}, {})
        folder = finished.run_dir or (out or finished.weights).parent
        address = environment().get("MASTER_ADDR", "127.0.0.1")
        with watched(runtime, address, None, stop) as watch:
            run = Run(recipe, folder, runtime, tracker, stop, dry_run=False, watch=watch)
            runtime.require_equal("the resolved recipe (sha256)", _sha256(record_recipe(recipe)))
            runtime.require_equal("the code of sfa_dist (sha256)", code_sha256()[:16])
            with out_of_memory.reported(runtime, watch):
                summary = {**_scores(run, finished, any_frames, out), "evaluated": dict(asked)}
            if runtime.is_main:  # Before the file: if the disk refuses it, the scores are not lost.
                _print(tracker, summary, as_json)
            if out is not None:
                runtime.on_main(lambda: _write(out, summary))
                if not as_json:
                    tracker.say(f"result: {out}")
    finally:
        parallel_runtime.stop()


def _scores(run: Run, finished: FinishedStage, any_frames: bool, out: Path | None) -> dict[str, Any]:
    """The keys of result.json for this test."""
    stage: StageBlock = getattr(run.recipe, finished.stage)
    run.watch.phase("evaluate")
    run.runtime.everywhere(lambda: require_writer(run.recipe.test.predictions))
    run.runtime.everywhere(lambda: require_precisions({finished.stage: stage}, run.runtime.device))
    key = "test" if stage.data.test else "val"
    index = open_split(run, stage.data.test or stage.data.val, f"{finished.stage}.data.{key}", stage.data)
    run.runtime.on_main(lambda: check_labels(index, stage.model))
    run.runtime.on_main(lambda: check_classes(trained_classes(finished.weights), index))
    trained = metadata_value(finished.weights, "frames")
    if any_frames and type(trained) is int and trained != stage.frames:
        run.tracker.say(f"trained on {trained} frames, tested on {stage.frames}: positions in time are interpolated")
    started = time.monotonic()
    parts = load_parts(run, stage, finished.weights, finished.trunk_weights, any_frames)
    result = score_all_views(run, stage, parts, index, out.with_suffix("") if out else None)
    seconds = time.monotonic() - started
    return {**result, "frames": stage.frames, "test_seconds": seconds, **_record(run.recipe, finished, parts)}


def _record(recipe: Recipe, finished: FinishedStage, parts: Parts) -> dict[str, Any]:
    trainable, frozen = parts.parameters()
    if finished.run_dir:
        trained = {**collect_results(finished.run_dir), **cost_of(finished.run_dir, recipe)}
    else:
        unknown = unknown_cost("the weights were given without their run")
        trained = {"stages": {}, **dict.fromkeys(("total_seconds", "optimizer_bytes_per_rank")), **unknown}
    return {**trained, "trainable_parameters": trainable, "frozen_parameters": frozen}


def _write(out: Path, summary: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    ckpt.write_json(out, summary)


def _print(tracker: Tracker, summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary), flush=True)
        return
    table = Table(title=f"{summary['samples']} clips, {summary['frames']} frames")
    heads = heads_of(summary)
    top5 = any(shows_top5(summary, head) for head in heads)
    for title in ("views", *([""] if any(heads) else []), "top-1", *(["top-5"] if top5 else []), "mean over classes"):
        table.add_column(title, justify="right")
    for line in summary["by_views"]:
        grid = f"{line['temporal_views']} x {line['spatial_views']}"
        for head in heads:
            name = [head.removesuffix("_")] if head else []
            keys = ("acc1", *(["acc5"] if top5 else []), "mean_class_acc1")
            table.add_row(grid, *name, *(f"{line[f'{head}{key}']:.2%}" for key in keys))
    tracker.say(table)


def default_out(run_dir: Path, stage: str, recipe: Recipe, asked: Mapping[str, Any]) -> Path:
    """`<run>/evaluate/<stage>-<views>-<frames>f.json`; --set and --shards add a hash to the name."""
    block = getattr(recipe, stage)
    grids = "_".join(f"{temporal}x{spatial}" for temporal, spatial in recipe.test.view_grids)
    own = {key: asked[key] for key in ("set", "shards") if asked.get(key)}
    mark = f"-{_sha256(json.dumps(own, sort_keys=True))[:8]}" if own else ""
    return run_dir / "evaluate" / f"{stage}-{grids}-{block.frames}f{mark}.json"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
