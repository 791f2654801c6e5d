"""What is wrong ends with one line on stderr, the contract's exit code, and what was there untouched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from commands import TRAIN, Finished, run_command, train, train_ranks
from safetensors.torch import load_file
from tiny_runs import RECIPE, events, log_lines, make_workplace, sets, write_clips

SHORT = RECIPE[: RECIPE.index("image:\n")].replace("epochs: 2", "epochs: 1") + (
    'stage1: {frames: 4}\nstage2: {frames: 8, chunk_frames: 4}\nlog: {every: 1, wandb: "off"}\n'
)
START = ("--recipe", "t.yaml", "--run-dir")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("bad"), SHORT)


@pytest.fixture(scope="module")
def used(place: Path) -> Path:
    """A run directory of a finished run."""
    finished = train(place, *START, "used")
    assert finished.code == 0, finished.err
    return place / "used"


def assert_refused(finished: Finished, code: int, *words: str) -> None:
    """The exit code, and one line on stderr that has these words."""
    assert finished.code == code, (finished.code, finished.err)
    assert finished.err.startswith("error: ")
    assert finished.err.count("\n") == 1, finished.err
    assert finished.err.endswith("\n")
    for word in words:
        assert word in finished.err


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


# ------------------------------------------------------------------------------------------------ data


def test_shards_that_are_not_there_are_65(place: Path) -> None:
    finished = train(place, *START, "no shards", *sets("data.train=[nowhere/*.tar]"))
    assert_refused(finished, 65, "stage1.data.train", "nowhere/*.tar")


@pytest.mark.fault(39)
def test_more_labels_than_classes_are_65(place: Path) -> None:
    finished = train(place, *START, "few classes", *sets("model.classes=2"))
    assert_refused(finished, 65, "label 2", "model.classes = 2", "part-000000.tar/clip002")


def test_more_labels_than_classes_in_the_validation_set_are_65_before_any_step(place: Path) -> None:
    write_clips(place / "val4", 8, seed=2, classes=4)
    finished = train(place, *START, "few val classes", *sets("data.val=[val4/*.tar]"))
    assert_refused(finished, 65, "label 3", "model.classes = 3")
    assert not (place / "few val classes" / "stage1").exists()


def write_manifest(folder: Path, classes: list[str]) -> None:
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "classes": classes}))


def test_another_order_of_classes_in_the_validation_set_is_65(place: Path) -> None:
    """Packed apart, the same number can mean another class: the accuracy would be wrong, and nothing would tell."""
    for name in ("train", "val"):
        shutil.copytree(place / name, place / f"named {name}")
    write_manifest(place / "named train", ["cat", "dog", "eel"])
    write_manifest(place / "named val", ["cat", "eel", "dog"])
    own = sets('data.train=["named train/*.tar"]', 'data.val=["named val/*.tar"]')
    assert_refused(train(place, *START, "named", *own), 65, "named val", "'dog'", "'eel'")
    write_manifest(place / "named val", ["cat", "dog", "eel"])
    assert train(place, *START, "named", *own, "--stage", "stage1").code == 0


def damage_clip(shard: Path, index: int) -> str:
    """Flips bytes in the middle of a clip, after the shard was indexed. Returns the clip's name."""
    entry = json.loads((shard.parent / "index.json").read_text())["shards"][shard.name]
    offset, size, _ = (column[index] for column in entry["members"]["mp4"])
    data = bytearray(shard.read_bytes())
    for place in range(offset + size // 2, offset + size // 2 + 20):
        data[place] ^= 0xFF
    shard.write_bytes(data)
    return f"{shard.name}/{entry['keys'][index]}"


@pytest.fixture
def damaged(place: Path, used: Path, tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    """A workplace in which one clip of `train` or `val` is damaged, and the clip's name."""
    assert used

    def damaged(split: str) -> tuple[Path, str]:
        for name in ("train", "val"):
            shutil.copytree(place / name, tmp_path / name)
        shutil.copy(place / "t.yaml", tmp_path)
        return tmp_path, damage_clip(tmp_path / split / "part-000001.tar", 2)

    return damaged


@pytest.mark.fault(34)
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_damaged_clip_has_weight_0_and_is_named(damaged: Callable[[str], tuple[Path, str]], overlap: str) -> None:
    folder, key = damaged("train")
    finished = train(folder, *START, "run", *sets(f"stage2.overlap={overlap}"))
    assert finished.code == 0, finished.err
    bad = events(folder / "run", "bad_sample")
    assert [(event["stage"], event["key"]) for event in bad] == [("stage1", key), ("stage2", key)]
    assert all("crc32" in event["reason"] for event in bad)
    last = [line for line in log_lines(folder / "run") if line["kind"] == "train"][-1]
    assert (last["samples_seen"], last["bad_samples"]) == (23, 1)
    assert json.loads((folder / "run" / "result.json").read_text())["stages"]["stage1"]["bad_samples"] == 1


def test_damaged_clips_over_the_budget_are_65(damaged: Callable[[str], tuple[Path, str]]) -> None:
    folder, key = damaged("train")
    finished = train(folder, *START, "run", *sets("data.max_bad_fraction=0.0"))
    assert_refused(finished, 65, "stage stage1, step ", "data.max_bad_fraction 0.0")
    assert [event["key"] for event in events(folder / "run", "bad_sample")] == [key]


@pytest.mark.fault(48)
def test_damaged_clips_over_the_budget_are_65_on_every_rank(damaged: Callable[[str], tuple[Path, str]]) -> None:
    folder, key = damaged("train")
    ranks = train_ranks(2, folder, *START, "run", *sets("data.max_bad_fraction=0.0"))
    ended = [rank.wait() for rank in ranks]
    assert_refused(ended[0], 65, "stage stage1, step ")
    assert (ended[1].code, ended[1].err) == (65, "")
    assert [event["key"] for event in events(folder / "run", "bad_sample")] == [key]


def test_a_damaged_test_clip_is_named_and_not_counted(damaged: Callable[[str], tuple[Path, str]]) -> None:
    """A score over fewer clips than there are must say so."""
    folder, key = damaged("val")
    finished = train(folder, *START, "run")
    assert finished.code == 0, finished.err
    assert {(event["stage"], event["key"]) for event in events(folder / "run", "bad_sample")} == {
        (stage, key) for stage in ("stage1", "stage2", "test")
    }
    assert json.loads((folder / "run" / "result.json").read_text())["samples"] == 8


def test_damaged_test_clips_over_the_budget_are_65(damaged: Callable[[str], tuple[Path, str]]) -> None:
    folder, _ = damaged("val")
    finished = train(folder, *START, "run", *sets("data.max_bad_fraction=0.0"))
    assert_refused(finished, 65, "stage1", "1 of 9 clips are bad", "data.max_bad_fraction 0.0")


@pytest.mark.fault(33)
def test_a_cut_shard_is_65(place: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copy(place / "t.yaml", tmp_path)
    shard = tmp_path / "train" / "part-000001.tar"
    (shard.parent / "index.json").unlink(missing_ok=True)
    shard.write_bytes(shard.read_bytes()[:20_000])
    assert_refused(train(tmp_path, *START, "run"), 65, "part-000001.tar", "offset")


# ------------------------------------------------------------------------------------------------ the unforeseen


def test_an_internal_error_is_70_with_the_traceback_in_a_file(place: Path, used: Path) -> None:
    run = place / "broken"
    shutil.copytree(used, run)
    (run / "stage2" / "done.json").write_text("[]")
    finished = train(place, *START, "broken")
    assert finished.code == 70
    assert finished.err.count("\n") == 1
    file = finished.err.split("traceback in ")[1].split(",")[0]
    assert "Traceback" in Path(file).read_text()
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
