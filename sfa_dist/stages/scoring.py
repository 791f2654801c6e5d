"""The stage `test`: scores the last stage's weights over the recipe's views.

It writes result.json, and into `test/` the counts of each class and the scores of each clip.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfa_dist import checkpoint as ckpt
from sfa_dist.boundary.counted import counted
from sfa_dist.boundary.file_names import CLASSES, DONE, RESULT
from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.feed import feed
from sfa_dist.data.batches.loader import Loader
from sfa_dist.data.batches.stream import check_labels, eval_loader
from sfa_dist.data.shards.shard_index import ClassNames, SampleIndex
from sfa_dist.recipe.schema import Recipe, StageBlock
from sfa_dist.recipe.stage_names import TEST
from sfa_dist.run.chance import chance_words, heads_of, shows_top5, verdicts
from sfa_dist.run.context import Run, weights_of
from sfa_dist.run.cost import RATIO, REASON, cost_of, cost_words, with_present_cost
from sfa_dist.run.record import collect_results, read_done, stage_inputs
from sfa_dist.stages.assemble import Parts, load_for_test, trained_classes
from sfa_dist.stages.open_data import check_classes, feed_settings, loader_settings, open_split
from sfa_dist.stages.sweep import STAGE as SWEPT
from sfa_dist.stages.sweep import member_directory, trained_members
from sfa_dist.stages.sweep_scores import SweepResult, score_sweep
from sfa_dist.stages.trunk_setup import place_trunk
from sfa_dist.training.bad_clips import note_bad_test_clips
from sfa_dist.training.evaluation import Scoring, evaluate
from sfa_dist.training.metrics import ACTION, ClassificationSums, action_heads, action_words
from sfa_dist.training.model_inputs import model_inputs
from sfa_dist.training.non_finite import broken_scores
from sfa_dist.training.prediction_file import PredictionFile

Grid = tuple[int, int]  # Temporal and spatial views.
PREDICTIONS = "predictions"


def test(run: Run, name: str, stage: StageBlock, again: bool) -> None:
    """Scores the last stage's weights over the recipe's views and writes result.json. Collective.

    A test that was done before, with the same weights, clips and settings, is only printed, unless `again` is set.
    Raises DataError for clips that do not fit the model or exceed the budget of bad ones, CheckpointError for weights
    that cannot be read, PreemptedError on a stop request.
    """
    patterns = stage.data.test or stage.data.val
    if not patterns:
        run.tracker.say("test: the recipe names neither data.test nor data.val, so there is no result")
        return
    run.watch.phase("test")
    index = open_split(run, patterns, f"{name}.data.test", stage.data)
    run.runtime.on_main(lambda: check_labels(index, stage.model))
    if run.dry_run:
        return
    swept = run.recipe.sweep and name == SWEPT
    members = trained_members(run) if swept else []
    tested = [member_directory(run, member) / run.weights(name).name for member in members] or [run.weights(name)]
    weights = tested[0]
    inputs = run.runtime.on_main(lambda: inputs_of_test(run.recipe, run.directory, name, index, tested, _sha256_of))
    before = run.runtime.on_main(lambda: None if again else _done_before(run, inputs))
    if before is not None:
        _print_result(run, before)
        run.tracker.say(f"finished: the test was done before; --stage {TEST} makes it again")
        return
    run.runtime.on_main(lambda: check_classes(trained_classes(weights), index))
    started, folder = time.monotonic(), run.directory / TEST
    extra: dict[str, Any] = {}
    main_sums: ClassificationSums | None = None
    if swept:
        found = _score_members(run, stage, index, folder)
        stage, parts, main_sums = found.best.stage, found.best_parts, found.best_sums
        extra = {"sweep": found.lines, "sweep_means": found.means, "best": found.best.name}
        if found.diverged:
            extra["sweep_diverged"] = found.diverged
    else:
        parts = load_parts(run, stage, weights, run.weights("stage1") if name == "stage2" else None)
    result = score_all_views(run, stage, parts, index, folder, main_sums)
    if run.recipe.test.shuffled_frames:
        grid = run.recipe.test.view_grids[-1]
        control = _line(_score(run, stage, parts, index, grid, "shuffled", None), grid)
        run.tracker.record("eval", stage=TEST, step=0, frame_order="shuffled", **control)
        result["acc1_shuffled_frames"] = control["acc1"]
    extra["test_seconds"] = time.monotonic() - started
    summary = {**result, "frames": stage.frames, **extra, **run.runtime.on_main(lambda: _costs(run))}
    run.runtime.on_main(lambda: _write_result(run.directory, summary, inputs))
    _print_summary(run, summary)


def _score_members(run: Run, stage: StageBlock, index: SampleIndex, folder: Path) -> SweepResult:
    """Scores the members of a sweep over the last of the recipe's views, and records each. Collective."""
    grid = run.recipe.test.view_grids[-1]
    batches = feed(_batches(run, stage, index, grid, "time"), feed_settings(run), lambda: bool(run.stop))
    keep = predictions_of(run, stage, index, folder)
    found = score_sweep(run, batches, _scoring(run, stage), stage.data.max_bad_fraction, keep)
    finish_predictions(run, keep, grid)
    for line in found.lines:
        run.tracker.record("eval", stage=TEST, step=0, **line)
    if guessing := [line["member"] for line in found.lines if line.get("better_than_chance") is False]:
        run.tracker.say(f"{TEST}: no better than chance: {', '.join(guessing)}")
    return found


def inputs_of_test(
    recipe: Recipe,
    directory: Path,
    name: str,
    index: SampleIndex,
    weights: Sequence[Path],
    sha256_of: Callable[[Path], str],
) -> dict[str, Any]:
    """What the result depends on: recipe, clips, and the weights of stage `name`, by their hashes."""
    files = [weights_of(recipe, directory, "stage1"), *weights] if name == SWEPT else weights
    inputs = stage_inputs(recipe, getattr(recipe, name), index.sha256, " ".join(map(sha256_of, files)))
    return {**inputs, "test": recipe.test.model_dump(mode="json")}


def _sha256_of(weights: Path) -> str:
    """Of the file as it is on disk now."""
    return ckpt.file_sha256(weights) if weights.is_file() else "none"


def tested_before(directory: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The content of result.json, if it is of a test of these inputs and unchanged since; else None."""
    done, path = read_done(directory / TEST, numbers=()), directory / RESULT
    if done is None or done.get("inputs") != inputs or not path.is_file():
        return None
    if done["result"] != {RESULT: ckpt.file_sha256(path)}:
        return None
    return dict(json.loads(path.read_text()))


def _done_before(run: Run, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a test that was done before (`tested_before`).

    Its cost ratio is that which the recipe asks for now: the baseline may have come later.
    """
    before = tested_before(run.directory, inputs)
    if before is None:
        return None
    present = with_present_cost(before, run.directory, run.recipe)
    if present != before:
        _write_result(run.directory, present, inputs)
    return present


def _costs(run: Run) -> dict[str, Any]:
    return {**collect_results(run.directory), **cost_of(run.directory, run.recipe)}


def _write_result(directory: Path, summary: dict[str, Any], inputs: dict[str, Any]) -> None:
    ckpt.write_json(directory / RESULT, summary)
    result = {RESULT: ckpt.file_sha256(directory / RESULT)}
    _write_in(directory / TEST, DONE, {"inputs": inputs, "result": result})


def _print_result(run: Run, summary: dict[str, Any]) -> None:
    """Prints the lines of a test that was done before."""
    for line in summary["by_views"]:
        _print_scores(run, line)
    for words in verdicts(summary["by_views"][-1]):
        run.tracker.say(f"{TEST}: {words}")
    _print_summary(run, summary)


def _print_summary(run: Run, summary: dict[str, Any]) -> None:
    if "acc1_shuffled_frames" in summary:
        scores = f"acc1 {summary['acc1_shuffled_frames']:.4f}"
        run.tracker.say(f"{TEST}: {scores} with the frames of each clip in random order")
    if summary.get(RATIO) is not None:
        but = f"; {summary[REASON]}" if summary.get(REASON) else ""
        run.tracker.say(f"{TEST}: cost ratio {summary[RATIO]:.2f} ({cost_words(summary)}{but})")
    elif run.recipe.log.baseline or run.recipe.log.calibrate_steps:
        run.tracker.say(f"{TEST}: cost ratio not known: {summary[REASON]}")
    run.tracker.say(f"result: {run.directory / RESULT} ({summary['total_seconds']:.0f} s of training)")


def load_parts(
    run: Run, stage: StageBlock, weights: Path, trunk_weights: Path | None, any_frames: bool = False
) -> Parts:
    """A finished stage on the device, ready to be scored; see `load_for_test`. Collective."""
    parts = run.runtime.each(lambda: load_for_test(stage, weights, trunk_weights, any_frames))
    parts.trainable.to(run.runtime.device)
    if parts.frozen is not None:
        place_trunk(parts.frozen, stage, run.runtime)
    return parts


def score_all_views(
    run: Run,
    stage: StageBlock,
    parts: Parts,
    index: SampleIndex,
    folder: Path | None,
    main_sums: ClassificationSums | None = None,
) -> dict[str, Any]:
    """The scores over the last of the recipe's view grids, with those over all of them under `by_views`. Collective.

    The predictions and `classes.json` of the last grid are written into `folder` (None: nowhere). `main_sums` are the
    sums of the last grid, where they are known already.
    """
    *others, last = run.recipe.test.view_grids
    lines = [_record_scores(run, _score(run, stage, parts, index, grid, "time", None), grid) for grid in others]
    if main_sums is None:
        keep = predictions_of(run, stage, index, folder)
        main_sums = _score(run, stage, parts, index, last, "time", keep)
        finish_predictions(run, keep, last)
    lines.append(_record_scores(run, main_sums, last))
    for words in verdicts(lines[-1]):
        run.tracker.say(f"{TEST}: {words}")
    if folder is not None:
        table = {"views": last, "heads": class_tables(main_sums, index.classes)}
        run.runtime.on_main(lambda: _write_in(folder, CLASSES, table))
    return {**lines[-1], "by_views": lines}


def predictions_of(run: Run, stage: StageBlock, index: SampleIndex, folder: Path | None) -> PredictionFile | None:
    """The prediction file that the recipe asks for, in `folder`; None where it asks for none. Collective."""
    kind = run.recipe.test.predictions
    if kind is None or folder is None:
        return None
    return PredictionFile(folder, PREDICTIONS, kind, index, stage.model.class_heads or {}, run.runtime)


def finish_predictions(run: Run, keep: PredictionFile | None, grid: Grid) -> None:
    """Writes the prediction file, if there is one, and prints its path. Collective."""
    if keep is not None:
        path = keep.finish({"views": np.array(grid), "average": np.array(run.recipe.test.average)})
        run.tracker.say(f"{TEST}: the scores of each clip are in {path}")


def class_tables(sums: ClassificationSums, names: ClassNames | None) -> dict[str, dict[str, Any]]:
    """The tables of each head, for classes.json.

    `classes` has rows [number, clips that are right, clips], `confusion` has rows [number, predicted number, clips],
    the most frequent first, and `names` maps the numbers that occur to names, or is None where these are not known.
    """
    tables = {}
    for head, counts in sums.by_head.items():
        recalls = [[number, *counted] for number, counted in counts.recalls().items()]
        pairs = [[*pair, clips] for pair, clips in sorted(counts.pairs.items(), key=lambda item: (-item[1], item[0]))]
        seen = sorted({number for pair in counts.pairs for number in pair})
        tables[head] = {"classes": recalls, "confusion": pairs, "names": _names_of(head, seen, names, sums)}
    return tables


def _write_in(folder: Path, name: str, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ckpt.write_json(folder / name, content)


def _names_of(
    head: str, numbers: list[int], names: ClassNames | None, sums: ClassificationSums
) -> dict[str, str] | None:
    if names is None or isinstance(names, dict) != bool(sums.heads):
        return None
    if isinstance(names, list):
        return {str(number): names[number] for number in numbers if number < len(names)}
    if head != ACTION:
        return {str(number): names[head][number] for number in numbers if number < len(names[head])}
    found = {}
    for number in numbers:
        labels = zip(sums.heads, action_heads(number, tuple(sums.heads.values())), strict=True)
        words = [names[own][label] if label < len(names[own]) else str(label) for own, label in labels]
        found[str(number)] = action_words(words)
    return found


def _scoring(run: Run, stage: StageBlock) -> Scoring:
    return Scoring(stage.model.class_heads or {}, run.recipe.test.average)


def _batches(run: Run, stage: StageBlock, index: SampleIndex, grid: Grid, order: str) -> Loader:
    data = stage.data.model_copy(update={"frame_order": order})
    settings = replace(loader_settings(run, stage), data=data)
    return eval_loader(index, settings, temporal_views=grid[0], spatial_views=grid[1])


def _score(
    run: Run, stage: StageBlock, parts: Parts, index: SampleIndex, grid: Grid, order: str, keep: PredictionFile | None
) -> ClassificationSums:
    @torch.no_grad()
    def predict(batch: Batch) -> Tensor:
        return parts.trainable(model_inputs(batch, parts.frozen, run.runtime.device))

    budget = stage.data.max_bad_fraction
    sums = evaluate(
        predict,
        _scoring(run, stage),
        feed(_batches(run, stage, index, grid, order), feed_settings(run), lambda: bool(run.stop)),
        run.runtime,
        run.stop,
        lambda bad, clips: note_bad_test_clips(bad, clips, TEST, 0, budget, run.tracker),
        keep,
    )
    if sums.main.clips and not math.isfinite(sums.loss):  # On all ranks alike: each has the sums of all.
        raise run.runtime.for_all(broken_scores(TEST))
    return sums


def _line(sums: ClassificationSums, grid: Grid) -> dict[str, Any]:
    views = {"views": grid[0] * grid[1], "temporal_views": grid[0], "spatial_views": grid[1]}
    return {**sums.result(), **sums.class_means(), **views}


def _record_scores(run: Run, sums: ClassificationSums, grid: Grid) -> dict[str, Any]:
    """Records and prints the scores over some views, and returns them."""
    line = _line(sums, grid)
    run.tracker.record("eval", stage=TEST, step=0, **line)
    _print_scores(run, line)
    return line


def _print_scores(run: Run, line: dict[str, Any]) -> None:
    scores = f"acc1 {line['acc1']:.4f}{_acc5(line)}, mean class acc1 {line['mean_class_acc1']:.4f}"
    several = [head for head in heads_of(line) if head not in ("", f"{ACTION}_")]
    heads = "".join(f"; {head[:-1]} {line[f'{head}acc1']:.4f}{_acc5(line, head, '')}" for head in several)
    views = f"{counted(line['views'], 'view')}, {line['temporal_views']} x {line['spatial_views']}"
    run.tracker.say(f"{TEST}: {scores}{heads} on {line['samples']} clips, {views}")
    for words in chance_words(line):
        run.tracker.say(f"{TEST}: {words}")


def _acc5(line: dict[str, Any], head: str = "", title: str = "acc5 ") -> str:
    return f", {title}{line[f'{head}acc5']:.4f}" if shows_top5(line, head) else ""
