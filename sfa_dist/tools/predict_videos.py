"""The work of `sfa predict`: scores one video after the other, as a whole or as a timeline."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from sfa_dist.boundary.plain import for_terminal
from sfa_dist.boundary.secret import is_url, shown_source, without_secrets
from sfa_dist.data.batches.augment import SpatialViews
from sfa_dist.data.video.bad_sample import BadSample
from sfa_dist.data.video.frame_source import PIPE, SCHEMES, FrameSource, is_live, open_source
from sfa_dist.errors import DataError, RecipeError, UsageError
from sfa_dist.inference.class_scores import title_of
from sfa_dist.inference.finished_stage import FinishedStage, finished_of_run, finished_of_weights, recipe_of_run
from sfa_dist.inference.predictor import FilePredictor, Model
from sfa_dist.inference.timeline import Scored, Windows, slide, snapped_hop
from sfa_dist.inference.timeline_output import Curve, TimelineFile, clock, draw_timeline
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.schema import Recipe, StageBlock, load_recipe

MOST_FRAMES_AHEAD = 64  # Of a video file that the trunk takes at a time.


def predict_videos(arguments: argparse.Namespace) -> int:
    """Predicts and prints; returns the exit code. Raises SfaError, with the exit codes of the contract."""
    _check(arguments)
    recipe, finished = _finished(arguments)
    model = Model(recipe, finished, _device(arguments.device))
    if arguments.timeline:
        arguments.out.mkdir(parents=True, exist_ok=True)
        return _each(arguments, lambda video: _timeline(video, arguments, model))
    predictor = FilePredictor(model, recipe)
    return _each(arguments, lambda video: _top(video, arguments, predictor, model))


def _check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for wrong arguments, before anything is loaded."""
    for video in arguments.videos:
        if is_live(video):
            if not arguments.timeline:
                raise UsageError(f"{shown_source(video)} has no end: only --timeline takes it")
            if "://" in video and video.partition("://")[0].lower() not in SCHEMES:
                raise UsageError(
                    f"{shown_source(video)} cannot be read, only {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
                )
        elif Path(video).is_dir():
            raise UsageError(f"{shown_source(video)} is a folder: name the videos in it, {Path(video) / '*.mp4'}")
        elif not Path(video).is_file():
            raise UsageError(f"{video}: no such file")
    if arguments.timeline and len({_stem(video) for video in arguments.videos}) < len(arguments.videos):
        raise UsageError("two videos of one name would write the same files: run them separately, each with its --out")
    if arguments.timeline and arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is a file: give a folder")
    if arguments.hop is not None and not (arguments.timeline and 0 < arguments.hop < float("inf")):
        raise UsageError("--hop is a number of seconds greater than 0, and goes with --timeline")
    if arguments.top < 1:
        raise UsageError(f"--top must be at least 1, not {arguments.top}")


def _finished(arguments: argparse.Namespace) -> tuple[Recipe, FinishedStage]:
    files = (arguments.recipe, arguments.weights, arguments.trunk_weights)
    if arguments.run_dir is not None and any(files):
        raise UsageError("give either --run, or --recipe and --weights")
    if arguments.run_dir is None and (arguments.recipe is None or arguments.weights is None):
        raise UsageError("predict needs --run, or --recipe and --weights")
    file = arguments.recipe if arguments.run_dir is None else recipe_of_run(arguments.run_dir)
    recipe = load_recipe(file, arguments.set, environment()).recipe
    if arguments.run_dir is None:
        finished = finished_of_weights(recipe, *files, arguments.stage)
    else:
        finished = finished_of_run(recipe, arguments.run_dir, arguments.stage)
    if finished.stage == "image":
        raise UsageError(f"{finished.weights} are of the stage image, which has no classes of videos")
    return load_recipe(finished.recipe_file, arguments.set, environment()).recipe, finished


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no GPU here")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _each(arguments: argparse.Namespace, work: Any) -> int:
    """Does `work` for all videos; one that cannot be decoded is reported. Returns the exit code."""
    bad = 0
    for video in arguments.videos:
        try:
            work(video)
        except BadSample as error:
            bad += 1
            _say(f"error: {video}: {error.reason}")
            if arguments.json:
                failure = {"file": shown_source(video), "error": without_secrets(error.reason)}
                print(json.dumps(failure), flush=True)
    return DataError.exit_code if bad else 0


def _top(video: str, arguments: argparse.Namespace, predictor: FilePredictor, model: Model) -> None:
    lists = model.classes.top(predictor(Path(video)), arguments.top)
    if arguments.json:
        print(json.dumps({"file": shown_source(video), **lists}), flush=True)
        return
    print(for_terminal(shown_source(video), lines=False))
    for key, entries in lists.items():
        if len(lists) > 1:
            print(f"  {title_of(key)}")
        for entry in entries:
            print(f"  {entry['score']:.3f}  {for_terminal(entry['name'], lines=False)}", flush=True)


def _timeline(video: str, arguments: argparse.Namespace, model: Model) -> None:
    stage = model.stage
    if stage.data.frame_order != "time":
        raise RecipeError("a timeline needs data.frame_order: time")
    live = is_live(video)
    stem, curve = arguments.out / _stem(video), Curve(model.classes.total)
    with ExitStack() as stack:
        source = stack.enter_context(open_source(video, stage.data.fps, stage.data.limits))
        windows = _windows(source, arguments, stage)
        head = _head(video, source.fps, windows, model.shares_steps)
        _say(f"{shown_source(video)}: {_words(head)}")
        file = stack.enter_context(TimelineFile(Path(f"{stem}.timeline.json"), head))
        stack.callback(_finish, stem, curve, model, source, video)
        try:
            for scored in _scored(source, windows, model, live):
                _record(scored, source.fps, windows, arguments, model, file, curve)
        except KeyboardInterrupt:
            if not live:  # Ctrl-C is the ordinary end of a live source.
                raise


def _windows(source: FrameSource, arguments: argparse.Namespace, stage: StageBlock) -> Windows:
    stride, tubelet = stage.data.stride, stage.model.tubelet
    seconds = arguments.hop or stage.frames * stride / source.fps / 4
    return Windows(stage.frames, stride, tubelet, snapped_hop(seconds, source.fps, tubelet, stride))


def _head(video: str, fps: float, windows: Windows, shared: bool) -> dict[str, Any]:
    return {
        "video": shown_source(video),
        "fps": fps,
        "window_frames": windows.frames,
        "window_seconds": windows.span / fps,
        "hop_frames": windows.hop,
        "hop_seconds": windows.hop / fps,
        "trunk_runs_per_pitch": windows.every if shared else windows.frames * windows.stride / windows.hop,
    }


def _words(head: dict[str, Any]) -> str:
    window = f"windows of {head['window_frames']} frames ({head['window_seconds']:.2f} s)"
    hop = f"every {head['hop_seconds']:.3g} s ({head['hop_frames']} frames at {head['fps']:.4g} a second)"
    return f"{window}, {hop}"


def _scored(source: FrameSource, windows: Windows, model: Model, live: bool) -> Any:
    stage = model.stage
    centre = SpatialViews(stage.data.resize, stage.model.image_size, stage.augment.resize)
    crops = (centre.cut(centre.shrink(torch.from_numpy(frame).unsqueeze(0)))[:, 0] for frame in source.frames)
    # A tubelet step of a camera is computed as soon as it is complete. Windows are told after each chunk.
    chunk = 1 if live else max(1, min(model.trunk.chunk_frames, MOST_FRAMES_AHEAD) // windows.tubelet)
    return slide(crops, windows, model.steps, model.windows, chunk)


def _record(
    scored: Scored,
    fps: float,
    windows: Windows,
    arguments: argparse.Namespace,
    model: Model,
    file: TimelineFile,
    curve: Curve,
) -> None:
    """Adds a window to the timeline's file and curve, and prints it."""
    start, end = scored.start / fps, (scored.start + windows.span) / fps
    lists = model.classes.top(scored.logits, arguments.top)
    window = {"start": start, "end": end, **lists}
    file.add(window)
    curve.add((start + end) / 2, model.classes.probabilities(scored.logits))
    if arguments.json:
        print(json.dumps(window), flush=True)
    else:
        likeliest = "  ".join(f"{entry['score']:.2f} {entry['name']}" for entry in lists["top5"][:3])
        print(f"{clock(start, 2):>11} - {clock(end, 2):<11} {for_terminal(likeliest, lines=False)}", flush=True)


def _finish(stem: Path, curve: Curve, model: Model, source: FrameSource, video: str) -> None:
    """Draws the figure of all windows so far, and prints the paths of the files."""
    if source.skipped[0]:
        _say(f"{shown_source(video)}: {source.skipped[0]} packets were lost")
    if curve.empty:
        _say(f"{shown_source(video)}: no window")
        return
    figure = Path(f"{stem}.timeline.png")
    draw_timeline(curve, model.classes, Path(shown_source(video)).name, figure)
    _say(f"{shown_source(video)}: {stem}.timeline.json, {figure}")


def _stem(video: str) -> str:
    """The name of a timeline's files: that of the video, or the last part of a URL's path."""
    if video == PIPE:
        return "pipe"
    path = urlsplit(video).path if is_url(video) else video
    return Path(path.rstrip("/")).stem or "stream"


def _say(text: str) -> None:
    """Prints to stderr: stdout has the results only."""
    print(for_terminal(without_secrets(text)), file=sys.stderr, flush=True)
