"""Whole runs from the command line: settings that must not matter, and options."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import TRAIN, Finished, Train, run_command, train
from tiny_runs import CLASSES, STAGES, START, events, log_lines, losses, make_workplace, read_json, scores, sets

from sfa_dist.checkpoint import file_sha256
from sfa_dist.recipe.schema import load_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("runs"))


# ------------------------------------------------------------------------------------------------ what must not matter

VARIANTS = {
    "plain": (),
    "two workers": ("data.workers=2",),
    "log every 4": ("log.every=4",),
    "micro 1": ("batch.micro=1",),
    "micro 8": ("batch.micro=8", "batch.eval_micro=2"),
    "zero 0": ("engine.zero=0",),
    "fsdp": ("engine.name=fsdp",),
    "small steps": ("optimizer.lr=0.05",),
    "bf16": ("optimizer.lr=0.05", "engine.precision=bf16"),
    "chunks": ("stage2.chunk_frames=2",),
    "checkpoints": ("checkpoint.every_steps=1", "checkpoint.keep=1"),
    "trunk ahead": ("stage2.overlap=on",),
}


@pytest.fixture(scope="module")
def variant(place: Path) -> Callable[[str], Path]:
    done: dict[str, Path] = {}

    def variant(name: str) -> Path:
        if name not in done:
            run = place / "variants" / name
            finished = train(place, *START, str(run), *sets(*VARIANTS[name]))
            assert finished.code == 0, finished.err
            done[name] = run
        return done[name]

    return variant


@pytest.mark.parametrize("name", ["two workers", "checkpoints", "trunk ahead"])
def test_these_change_no_bit(variant: Callable[[str], Path], name: str) -> None:
    """Invariant 6."""
    assert losses(variant(name)) == losses(variant("plain"))
    assert scores(variant(name)) == scores(variant("plain"))
    for stage in STAGES:
        file = Path(stage) / "weights.safetensors"
        assert file_sha256(variant(name) / file) == file_sha256(variant("plain") / file)


def test_the_console_tells_once_what_helps_against_waiting_for_clips(variant: Callable[[str], Path]) -> None:
    """Without loader processes this tiny model waits for each clip. The share is that of the last logged window; stage
    1 has nothing to add to what the image stage was told."""
    told = [line for line in (variant("plain") / "console.log").read_text().splitlines() if "loader: " in line]
    cores = len(os.sched_getaffinity(0))
    assert [line.split(":")[0] for line in told] == [*["image"] * (cores > 1), "stage2"]
    steps = [line for line in log_lines(variant("plain")) if line["kind"] == "train" and line["stage"] == "stage2"]
    last = next(line for line in steps if line["step"] == 3)  # Of the first epoch.
    share = f"loader: {last['data_time'] / last['step_time']:.0%} of the step is waiting for clips"
    assert told[-1] == f"stage2: {share}; decode and run the trunk once for all epochs (stage2.cache)"


def test_logging_less_changes_no_bit(variant: Callable[[str], Path]) -> None:
    few, all_steps = losses(variant("log every 4")), losses(variant("plain"))
    assert list(few) == [("image", 3), ("stage1", 4), ("stage1", 6), ("stage2", 4), ("stage2", 6)]
    assert few == {key: all_steps[key] for key in few}
    assert scores(variant("log every 4")) == scores(variant("plain"))


@pytest.mark.parametrize("name", ["micro 1", "micro 8", "zero 0", "fsdp", "chunks"])
def test_these_change_no_number(variant: Callable[[str], Path], name: str) -> None:
    """Sums of another order differ by 1e-8 in the first stage; AdamW makes 1e-4 of it over the steps of three."""
    plain, other = losses(variant("plain")), losses(variant(name))
    assert plain.keys() == other.keys()
    for key, (loss, norm) in plain.items():
        assert other[key] == (pytest.approx(loss, rel=3e-4), pytest.approx(norm, rel=1e-3)), key
    for mine, theirs in zip(scores(variant("plain")), scores(variant(name)), strict=True):
        assert theirs[:4] == mine[:4]
        assert theirs[4] == pytest.approx(mine[4], rel=3e-4)


def test_bf16_stays_near_fp32(variant: Callable[[str], Path]) -> None:
    """The default precision, through every stage and the test; with smaller steps, as those of 0.3 amplify rounding."""
    plain, other = losses(variant("small steps")), losses(variant("bf16"))
    assert plain.keys() == other.keys()
    for key, (loss, _) in plain.items():
        assert other[key][0] == pytest.approx(loss, rel=0.1 if key[0] == "stage2" else 0.01), key
    assert other != plain
    assert len(scores(variant("bf16"))) == len(scores(variant("small steps")))


def test_stage_2_starts_at_the_function_of_stage_1(variant: Callable[[str], Path], place: Path) -> None:
    """Invariant 2, through a whole run: on stage 1's frames and with a learning rate of 0 the scores are stage 1's."""
    own = sets(
        f"stage1.weights={variant('plain') / 'stage1' / 'weights.safetensors'}",
        "stage2.frames=4",
        "stage2.optimizer.lr=0.0",
        "stage2.schedule.epochs=1",
    )
    finished = train(place, *START, "start", "--stage", "stage2", *own)
    assert finished.code == 0, finished.err
    [(*_, acc1, acc5, loss, _)] = scores(place / "start")
    *_, expected1, expected5, expected_loss, _ = next(
        score for score in reversed(scores(variant("plain"))) if score[0] == "stage1"
    )
    assert (acc1, acc5) == (expected1, expected5)
    assert loss == pytest.approx(expected_loss, rel=1e-5)


# ------------------------------------------------------------------------------------------------ options


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if "outputs" not in path.parts}


def test_print_recipe_prints_it_with_origins_and_writes_nothing(place: Path) -> None:
    before = tree(place)
    finished = run_command([sys.executable, TRAIN, "--recipe", "t.yaml", "--print-recipe", *sets("seed=7")], place)
    assert (finished.code, finished.err) == (0, "")
    assert "seed: 7 # --set seed=7" in finished.out.replace("  ", " ")
    assert "t.yaml:" in finished.out
    assert "# default" in finished.out
    assert tree(place) == before


def test_what_print_recipe_prints_is_a_recipe(place: Path, tmp_path: Path) -> None:
    finished = train(place, "--recipe", "t.yaml", "--print-recipe")
    (tmp_path / "t.yaml").write_text(finished.out)
    assert load_recipe(tmp_path / "t.yaml").recipe == load_recipe(place / "t.yaml").recipe


def test_a_dry_run_builds_everything_and_writes_nothing(variant: Callable[[str], Path], place: Path) -> None:
    variant("plain")  # The shards have their index from here on.
    before = tree(place)
    finished = train(place, *START, "dry", "--dry-run")
    assert finished.code == 0, finished.err
    assert all(f"{stage}: data found, model and engine built; dry run, no step" in finished.out for stage in STAGES)
    assert all(f"{stage}: memory plan: " in finished.out for stage in STAGES)
    assert tree(place) == before


def test_stages_one_by_one_give_the_same_as_all_at_once(variant: Callable[[str], Path], place: Path) -> None:
    run = place / "one by one"
    for stage in (*STAGES, "test", "report"):
        finished = train(place, *START, str(run), "--stage", stage)
        assert finished.code == 0, finished.err
        assert (run / "result.json").exists() == (stage in ("test", "report"))
        assert (run / "report.html").exists() == (stage == "report")
    assert losses(run) == losses(variant("plain"))
    assert scores(run) == scores(variant("plain"))


def test_the_run_directory_is_called_after_the_recipe(place: Path) -> None:
    finished = train(place, "--recipe", "t.yaml", "--stage", "image")
    assert finished.code == 0, finished.err
    assert (place / "runs" / "t" / "image" / "done.json").is_file()


def test_a_run_directory_may_move(variant: Callable[[str], Path], place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(variant("plain"), moved)
    finished = train(place, *START, str(moved))
    assert finished.code == 0, finished.err
    assert finished.out.count("done before, skipped") == 3


def test_max_steps_ends_a_stage_early_and_a_later_run_without_it_goes_on(
    variant: Callable[[str], Path], place: Path
) -> None:
    """The curve of the learning rate stays, so the two parts are the run that was never cut."""
    own = [*START, "cut", "--stage"]
    for stage in ("image", "stage1"):
        first = train(place, *own, stage, *sets("stage1.schedule.max_steps=2"))
        assert first.code == 0, first.err
    assert read_json(place / "cut" / "stage1" / "done.json")["result"]["steps"] == 2
    second = train(place, *own, "stage1")
    assert second.code == 0, second.err
    whole = {key: value for key, value in losses(variant("plain")).items() if key[0] != "stage2"}
    assert losses(place / "cut") == whole
    file = Path("stage1") / "weights.safetensors"
    assert file_sha256(place / "cut" / file) == file_sha256(variant("plain") / file)
    assert [score for score in scores(place / "cut") if score[1] != 2] == [
        score for score in scores(variant("plain")) if score[0] in ("image", "stage1")
    ]
    assert events(place / "cut", "resume")[0]["step"] == 2


def test_help_ends_with_0_and_gives_the_exit_codes(place: Path) -> None:
    finished: Finished = Train(place, "--help").wait()
    assert finished.code == 0
    assert "78 bad recipe" in finished.out
    assert CLASSES == 3


def test_another_decoder_than_before_is_said_once(tmp_path: Path) -> None:
    """That of the pack, for all splits and stages in one line, and that of the run until now."""
    place = make_workplace(tmp_path)
    names = ["part-000000.tar", "part-000001.tar"]
    for split in ("train", "val"):
        manifest = {"classes": None, "packs": {"part": {"shards": names, "decoder": "PyAV 0.1"}}}
        (place / split / "manifest.json").write_text(json.dumps(manifest))
    run = place / "run"
    run.mkdir()
    (run / "env.json").write_text(json.dumps({"decoder": "PyAV 0.2"}))
    finished = train(place, *START, str(run), "--dry-run")
    assert finished.code == 0, finished.err
    said = " ".join(finished.out.split())
    assert said.count("clips were packed with PyAV 0.1 and are decoded with PyAV") == 1
    assert said.count("clips were decoded with PyAV 0.2 until now, and are with PyAV") == 1
