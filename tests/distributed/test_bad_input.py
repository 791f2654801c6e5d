"""What is wrong ends with one line on stderr, the contract's exit code, and what was there untouched."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import TRAIN, assert_refused, run_command, train, train_ranks
from safetensors.torch import load_file
from tiny_runs import SHORT, START, events, make_workplace, sets


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("bad"), SHORT)


@pytest.fixture(scope="module")
def used(place: Path) -> Path:
    """A run directory of a finished run."""
    finished = train(place, *START, "used")
    assert finished.code == 0, finished.err
    return place / "used"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------ the command line

COMMAND_LINES = {
    "no recipe option": ((), "--recipe"),
    "unknown option": (("--recipe", "t.yaml", "--epochs", "3"), "--epochs"),
    "unknown stage": (("--recipe", "t.yaml", "--stage", "stage3"), "stage3"),
    "option without value": (("--recipe",), "--recipe"),
}


@pytest.mark.parametrize(("arguments", "word"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_a_wrong_command_line_is_64(place: Path, arguments: Sequence[str], word: str) -> None:
    assert_refused(train(place, *arguments), 64, word, "--help")


def test_a_wrong_command_line_is_64_for_a_real_process(place: Path) -> None:
    assert_refused(run_command([sys.executable, TRAIN, "--recipe", "t.yaml", "--wrong"], place), 64, "--wrong")


def test_half_a_launcher_is_64(place: Path) -> None:
    assert_refused(train(place, *START, "x", RANK="0", WORLD_SIZE="2"), 64, "LOCAL_RANK", "MASTER_ADDR")


# ------------------------------------------------------------------------------------------------ the recipe

RECIPES = {
    "unknown key": (["optimizer.lrr=0.1"], ["lrr", "did you mean 'lr'?"]),
    "wrong type": (["batch.size=many"], ["batch.size", "a whole number", "'many'"]),
    "out of range": (["engine.zero=7"], ["engine.zero", "at most 3"]),
    "frames of half a tubelet": (["stage1.frames=5"], ["stage1.frames", "tubelet"]),
    "unknown deepspeed key": (["deepspeed.wall_clock_breakdwon=true"], ["did you mean 'wall_clock_breakdown'?"]),
    "deepspeed contradicts": (["deepspeed.gradient_clipping=5"], ["deepspeed.gradient_clipping is 5", "1.0"]),
    "deepspeed block that is ours": (["deepspeed={optimizer: {type: Adam}}"], ["deepspeed.optimizer", "use optimizer"]),
    "patch that does not fit": (["model.patch=7"], ["model.image_size 16", "patch 7"]),
    "heads that do not fit": (["model.heads=5"], ["width 24", "heads 5"]),
    "no shards named": (["data.train=[]"], ["stage1.data.train"]),
}


@pytest.mark.fault(58)
@pytest.mark.parametrize(("overrides", "words"), RECIPES.values(), ids=RECIPES)
def test_a_bad_recipe_is_78(place: Path, overrides: list[str], words: list[str]) -> None:
    assert_refused(train(place, *START, "bad recipe", *sets(*overrides)), 78, *words)
    assert not (place / "bad recipe" / "stage1").exists()


@pytest.mark.fault(58)
def test_a_typo_in_a_recipe_names_file_and_line(place: Path) -> None:
    (place / "typo.yaml").write_text(SHORT.replace("resize: 20", "rezise: 20"))
    finished = run_command([sys.executable, TRAIN, "--recipe", "typo.yaml"], place)
    assert_refused(finished, 78, "typo.yaml:6", "rezise", "did you mean 'resize'?")


@pytest.mark.parametrize(("override", "code"), [("optimizer.lrr=1", 78), ("model.classes=2", 65)])
def test_ranks_of_one_machine_tell_once(place: Path, override: str, code: int) -> None:
    ended = [rank.wait() for rank in train_ranks(2, place, *START, "two", *sets(override))]
    assert_refused(ended[0], code)
    assert (ended[1].code, ended[1].err) == (code, "")


def test_a_recipe_that_is_not_there_is_78(place: Path) -> None:
    assert_refused(train(place, "--recipe", "tt.yaml"), 78, "tt.yaml", "did you mean t.yaml")


# ------------------------------------------------------------------------------------------------ the run directory


def test_resume_never_refuses_a_used_directory(place: Path, used: Path) -> None:
    before = snapshot(used)
    assert_refused(train(place, *START, "used", "--resume", "never"), 78, "--resume never", "used")
    assert snapshot(used) == before
    assert train(place, *START, "new", "--resume", "never", "--stage", "stage1").code == 0


@pytest.mark.fault(26)
def test_another_recipe_is_refused_by_the_key(place: Path, used: Path) -> None:
    recipe = (used / "recipe.yaml").read_bytes()
    finished = train(place, *START, "used", *sets("stage1.optimizer.lr=0.5"))
    assert_refused(finished, 78, "stage1 of another recipe", "optimizer.lr: was 0.3, now 0.5")
    finished = train(place, *START, "used", *sets("stage2.adapter.hidden=1.0", "seed=3"))
    assert_refused(finished, 78, "seed: was 0, now 3")
    assert (used / "recipe.yaml").read_bytes() == recipe


def test_another_recipe_is_refused_half_way_too(place: Path) -> None:
    """Where there is a checkpoint and no done.json."""
    assert train(place, *START, "half", "--stage", "stage1").code == 0
    (place / "half" / "stage1" / "done.json").unlink()
    recipe = (place / "half" / "recipe.yaml").read_bytes()
    finished = train(place, *START, "half", *sets("batch.size=6", "batch.micro=2"))
    assert_refused(finished, 78, "batch.size: was 8, now 6")
    assert (place / "half" / "recipe.yaml").read_bytes() == recipe


@pytest.mark.fault(45)
def test_other_clips_are_refused(place: Path, used: Path) -> None:
    finished = train(place, *START, "used", *sets("data.train=[val/*.tar]"))
    assert_refused(finished, 78, "train clips")


def test_how_it_is_computed_may_change(place: Path, used: Path) -> None:
    own = sets("engine.zero=0", "batch.micro=4", "data.workers=1", "checkpoint.every_steps=7", "log.every=3")
    finished = train(place, *START, "used", *own)
    assert finished.code == 0, finished.err
    assert finished.out.count("done before, skipped") == 2


def test_a_run_directory_that_cannot_be_written_is_74(place: Path) -> None:
    (place / "file").write_text("in the way")
    assert_refused(train(place, *START, "file/run"), 74, "file/run")
    ranks = [rank.wait(60) for rank in train_ranks(2, place, *START, "file/run")]
    assert [rank.code for rank in ranks] == [74, 74]
    assert_refused(ranks[0], 74, "file/run")
    assert ranks[1].err == ""


FULL_DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


@pytest.mark.fault(18)
@pytest.mark.skipif(
    subprocess.run([*FULL_DISK, "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False).returncode != 0,
    reason="no private mounts here",
)
def test_a_full_disk_is_74_and_older_checkpoints_stay(place: Path) -> None:
    """On a tmpfs of 800 kB of its own; a checkpoint has 150 kB."""
    small = place / "small"
    small.mkdir()
    own = " ".join(["--recipe", "t.yaml", "--run-dir", "small/run", "--stage", "stage1"])
    own += " --set checkpoint.every_steps=1 --set checkpoint.keep=9 --set schedule.epochs=9"
    script = f"mount -t tmpfs -o size=800k tmpfs small && {sys.executable} {TRAIN} {own}; code=$?; "
    finished = run_command([*FULL_DISK, script + "cp -r small/run kept; exit $code"], place)
    assert finished.code == 74, finished.err
    assert finished.err.count("\n") == 1
    assert "no space left, needed 0.1 MiB, have 0." in finished.err
    checkpoints = sorted((place / "kept" / "stage1" / "checkpoints").iterdir())
    whole = [path for path in checkpoints if path.suffix != ".tmp"]
    assert len(whole) >= 2
    again = train(place, *START, "kept", "--stage", "stage1", *sets("schedule.epochs=9"))
    assert again.code == 0, again.err
    assert events(place / "kept", "resume")[0]["step"] == int(whole[-1].name.removeprefix("step-"))
    assert not events(place / "kept", "fallback")


# ------------------------------------------------------------------------------------------------ weights

WEIGHTS = {
    "--resume": (["--resume", "nowhere/step-00000002"], "nowhere/step-00000002"),
    "stage1.weights": (sets("stage1.weights=nowhere.safetensors"), "nowhere.safetensors"),
    "image_checkpoint": (sets("stage1.image_checkpoint=nowhere.safetensors"), "nowhere.safetensors"),
    "a stage that is not trained yet": (["--stage", "stage2"], "stage1/weights.safetensors"),
    "test before training": (["--stage", "test"], "weights.safetensors"),
}


@pytest.mark.fault(24)
@pytest.mark.parametrize(("arguments", "word"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_not_there_are_74(place: Path, arguments: list[str], word: str) -> None:
    assert_refused(train(place, *START, "no weights", *arguments), 74, word)


def test_weights_that_are_damaged_are_74(place: Path, used: Path) -> None:
    data = (used / "stage1" / "weights.safetensors").read_bytes()
    (place / "cut.safetensors").write_bytes(data[: len(data) // 2])
    assert_refused(train(place, *START, "cut", *sets("stage1.weights=cut.safetensors")), 74, "cut.safetensors")


def test_weights_of_another_architecture_are_78(place: Path, used: Path) -> None:
    own = sets(f"stage1.weights={used / 'stage1' / 'weights.safetensors'}", "model.width=32")
    assert_refused(train(place, *START, "other width", *own), 78, "embed.weight", "(32, 3, 2, 8, 8)")


def test_resume_of_a_damaged_checkpoint_is_74(place: Path, used: Path) -> None:
    shutil.copytree(used / "stage1" / "checkpoints", place / "saved")
    newest = max((place / "saved").iterdir())
    (newest / "model.safetensors").write_bytes(b"x")
    assert_refused(train(place, *START, "from saved", "--resume", str(newest)), 74, newest.name, "model.safetensors")


def test_done_json_that_cannot_be_read_is_74(place: Path, used: Path) -> None:
    run = place / "garbled"
    shutil.copytree(used, run)
    (run / "stage2" / "done.json").write_text("{")
    assert_refused(train(place, *START, "garbled"), 74, "stage2/done.json")


TOLD_ONCE = {
    "weights that are not there": ("told once", sets("stage1.weights=nowhere.safetensors"), 74),
    "a file that is no checkpoint": ("told once", sets("stage1.image_checkpoint=text.safetensors"), 74),
    "another recipe": ("used", sets("seed=3"), 78),
    "a setting that the engine refuses": ("told once", sets("deepspeed.wall_clock_breakdwon=true"), 78),
    "ranks that the engine cannot divide": ("told once", sets("engine.reduction=tree", "batch.size=6"), 78),
    "no shards": ("told once", sets("data.train=[]"), 78),
    "a stage that the recipe lacks": ("told once", ["--stage", "stage2", *sets("stage2=null")], 78),
    "no cache to build": ("told once", ["--stage", "cache"], 78),
    "nothing to build the cache from": ("told once", ["--stage", "cache", *sets("stage2.cache={views: 1}")], 74),
}
if not torch.cuda.is_available():
    no_card = sets("data.decode_device=cuda", "data.decoder=auto")
    TOLD_ONCE["no card to decode on"] = ("told once", no_card, 78)


@pytest.mark.parametrize(("run", "arguments", "code"), TOLD_ONCE.values(), ids=TOLD_ONCE)
def test_what_all_ranks_find_one_of_them_tells(
    place: Path, used: Path, run: str, arguments: list[str], code: int
) -> None:
    assert used
    (place / "text.safetensors").write_text("no tensors")
    ranks = [rank.wait() for rank in train_ranks(2, place, *START, run, *arguments)]
    assert [rank.code for rank in ranks] == [code, code]
    assert_refused(ranks[0], code)
    assert ranks[1].err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_rank_without_the_gpu_that_its_job_has_ends_all_ranks(place: Path) -> None:
    ranks = train_ranks(2, place, *START, "no gpu", SLURM_GPUS="2")
    first, second = (rank.wait() for rank in ranks)
    assert_refused(first, 64, "rank 0: torch can use no GPU", "SLURM_GPUS=2", "device: cpu")
    assert (second.code, second.err) == (64, "")
    assert not (place / "no gpu").exists()


# ------------------------------------------------------------------------------------------------ the unforeseen


def test_an_internal_error_is_70_with_the_traceback_in_a_file(place: Path, used: Path) -> None:
    shutil.copytree(used, place / "broken", dirs_exist_ok=True)
    finished = train(place, *START, "broken", TEST_FAULTS="bug stages.pipeline.stage_inputs")
    assert finished.code == 70
    assert finished.err.count("\n") == 1
    file = finished.err.split("traceback in ")[1].split(",")[0]
    assert "a bug of the program" in Path(file).read_text()
    Path(file).unlink()


def test_debug_shows_the_traceback(place: Path) -> None:
    finished = train(place, "--recipe", "tt.yaml", "--debug")
    assert finished.code == 78
    assert "Traceback" in finished.err


@pytest.mark.fault(63, 64)
def test_a_run_that_diverges_is_70_and_keeps_a_checkpoint_from_before(place: Path) -> None:
    own = sets("optimizer.lr=1e30", "schedule.epochs=5", "schedule.warmup_epochs=0.34", "optimizer.clip_norm=0.0")
    own += sets("checkpoint.every_steps=1", "checkpoint.keep=2")
    finished = train(place, *START, "diverged", *own)
    assert_refused(finished, 70, "stage stage1", "not finite 5 steps in a row", "lower optimizer.lr")
    assert len(events(place / "diverged", "non_finite")) >= 5
    checkpoints = list((place / "diverged" / "stage1" / "checkpoints").iterdir())
    assert checkpoints
    for checkpoint in checkpoints:
        tensors = load_file(checkpoint / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())
