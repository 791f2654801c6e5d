"""The feature cache in whole runs: what it gives is what a live run gives, however it was stopped and on any ranks."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT, Train, run_command, train, train_ranks
from tiny_runs import RECIPE, START, events, log_lines, losses, make_workplace, scores, sets

from sfa_dist.checkpoint import file_sha256
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.stages.assemble import assemble_stage2

EPOCHS, VIEWS = 3, 2
OWN = (
    RECIPE[: RECIPE.index("image:\n")].replace("epochs: 2", f"epochs: {EPOCHS}")
    + f"""\
stage1: {{frames: 4, weights: given.safetensors}}
stage2: {{frames: 8, chunk_frames: 4, cache: {{views: {VIEWS}, phases: 2}}}}
log: {{every: 1, wandb: "off"}}
"""
)
BUILD = (*START[:2], "--stage", "cache", "--run-dir")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a recipe with a cache, and finished weights of stage 1."""
    place = make_workplace(tmp_path_factory.mktemp("cache"), OWN)
    own = sets("stage1.weights=null", "stage1.schedule.epochs=1")
    assert train(place, *START, "first", *own, "--stage", "stage1").code == 0
    shutil.copy(place / "first" / "stage1" / "weights.safetensors", place / "given.safetensors")
    return place


@pytest.fixture(scope="module")
def built(place: Path) -> Path:
    """A whole cached run that nobody disturbed."""
    finished = train(place, *START, "built")
    assert finished.code == 0, finished.err
    return place / "built"


def contents(cache: Path) -> dict[str, str]:
    """sha256 of every file of a cache; a manifest counts without the seconds that it took, and
    without its sum, which has them too."""
    found = {}
    for path in sorted(cache.rglob("*")):
        if path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            assert manifest.pop("rank_seconds") > 0
            assert len(manifest.pop("manifest sha256")) == 64
            found[str(path.relative_to(cache))] = json.dumps(manifest)
        elif path.is_file() and path.name != "done.json":
            found[str(path.relative_to(cache))] = file_sha256(path)
    return found


# ------------------------------------------------------------------------------------------------ cached = live


def test_a_cached_run_is_the_live_run(place: Path, built: Path) -> None:
    """Invariant 3: all phases, and as many views as epochs. Tolerance 1e-4 of the loss (fp32)."""
    for name, own in (("views", ["stage2.cache.views=3"]), ("live", ["stage2.cache=null"])):
        finished = train(place, *START, name, *sets(*own))
        assert finished.code == 0, finished.err
    cached, live = losses(place / "views"), losses(place / "live")
    assert [step for _, step in cached] == list(range(1, EPOCHS * 3 + 1))
    for key, (loss, norm) in live.items():
        assert cached[key] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3)), key
    for one, two in zip(scores(place / "views"), scores(place / "live"), strict=True):
        assert one == (*two[:4], pytest.approx(two[4], rel=1e-4), two[5])
    two_views = losses(built)
    assert all(two_views[("stage2", step)] == cached[("stage2", step)] for step in range(1, 7))
    assert two_views[("stage2", 7)] != cached[("stage2", 7)]  # The third epoch sees the first view again.


def test_stage_2_neither_decodes_a_video_nor_builds_the_trunk(place: Path, built: Path) -> None:
    run = place / "blind"
    shutil.copytree(built / "cache", run / "cache")
    blind = place / "blind clips"
    for split in ("train", "val"):
        shutil.copytree(place / split, blind / split)
        for shard in (blind / split).glob("*.tar"):
            shard.write_bytes(bytes(shard.stat().st_size))  # The index still knows them.
    own = sets(f"data.train=['{blind}/train/*.tar']", f"data.val=['{blind}/val/*.tar']")
    finished = train(place, *START, "blind", *own, "--stage", "stage2")
    assert finished.code == 0, finished.err
    assert losses(run) == losses(built)
    assert file_sha256(run / "stage2" / "weights.safetensors") == file_sha256(built / "stage2" / "weights.safetensors")
    stage = load_recipe(place / "t.yaml", ["stage1.weights=null"]).recipe.stage2
    assert stage is not None
    torch.manual_seed(0)
    parts = assemble_stage2(stage, place / "given.safetensors", "3", cached_trunk="abc")
    assert parts.frozen is None
    assert parts.trunk_sha256() == "abc"
    torch.manual_seed(0)
    whole = assemble_stage2(stage, place / "given.safetensors", "3")
    assert parts.parameters() == whole.parameters()
    for name, tensor in whole.trainable.state_dict().items():  # And the adapter begins the same.
        assert tensor.equal(parts.trainable.state_dict()[name])


def test_the_stage_leaves_its_cost_in_the_result(built: Path) -> None:
    result = json.loads((built / "result.json").read_text())
    assert list(result["stages"]) == ["cache", "stage2"]
    cache = result["stages"]["cache"]
    assert (cache["views"], cache["bad_samples"], cache["steps"]) == (VIEWS, 0, 0)
    assert cache["gpu_seconds"] > 0
    assert cache["bytes"] == sum(path.stat().st_size for path in (built / "cache").rglob("*.tar"))
    assert "| cache |" in (built / "report.md").read_text()
    again = [event["stage"] for event in events(built, "done")]
    assert again == ["cache", "stage2"]


def test_all_live_is_the_live_run_and_mixup_is_not(place: Path, built: Path) -> None:
    for name, own in (
        ("all live", ["stage2.cache.live_fraction=1.0"]),
        ("none cached", ["stage2.cache=null"]),
        ("fresh", ["stage2.cache.refresh=1.0"]),
        ("mixed", ["stage2.cache.mixup=0.5"]),
    ):
        if name != "none cached":
            shutil.copytree(built / "cache", place / name / "cache")
        finished = train(place, *START, name, *sets(*own))
        assert finished.code == 0, finished.err
    assert losses(place / "all live") == losses(place / "none cached")
    fresh, expected = losses(place / "fresh"), losses(place / "none cached")
    for key, (loss, _) in expected.items():
        assert fresh[key][0] == pytest.approx(loss, rel=1e-4), key
    assert losses(place / "mixed") != losses(built)


# ------------------------------------------------------------------------------------------------ anywhere, any ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_bytes_on_any_ranks(place: Path, built: Path, ranks: int) -> None:
    """There are two parts a view: with three ranks one has nothing to do."""
    for rank in train_ranks(ranks, place, *BUILD, f"on {ranks}"):
        finished = rank.wait()
        assert finished.code == 0, finished.err
    assert contents(place / f"on {ranks}" / "cache") == contents(built / "cache")


def exists(path: Path) -> Callable[[], bool]:
    return path.exists


KILLS = {
    "inside the first part": "train/view-00/.part-000000-000.tar.tmp",
    "after the first part": "train/view-00/part-000000-000.json",
    "after the first view": "train/view-00/manifest.json",
    "in the last view": "val-8f/view-00/building.json",
}


@pytest.mark.fault(2)
@pytest.mark.parametrize("when", KILLS)
def test_kill_9_anywhere(place: Path, built: Path, when: str) -> None:
    run = place / f"killed {when}"
    started = Train(place, *BUILD, run.name)
    started.signal_when(exists(run / "cache" / KILLS[when]), signal.SIGKILL)
    assert started.wait().code == -signal.SIGKILL
    assert not (run / "cache" / "done.json").exists()
    for rank in train_ranks(2, place, *BUILD, run.name):  # Another number of ranks goes on.
        finished = rank.wait()
        assert finished.code == 0, finished.err
    assert contents(run / "cache") == contents(built / "cache")


def test_chunks_that_auto_chose_stay_for_what_is_left(place: Path) -> None:
    """Where there is less memory than when it was begun, say: other chunks would give other bytes."""
    run = place / "auto"
    own = sets("stage2.chunk_frames=auto")
    view = run / "cache" / "train" / "view-00"
    started = Train(place, *BUILD, run.name, *own)
    started.signal_when(exists(view / "part-000000-000.json"), signal.SIGKILL)
    started.wait()
    building = json.loads((view / "building.json").read_text())
    assert building["chunk_frames"] == 512
    (view / "building.json").write_text(json.dumps(building | {"chunk_frames": 2}))
    finished = train(place, *BUILD, run.name, *own)
    assert finished.code == 0, finished.err
    assert "cache: trunk: chunks of 2 frames (auto)" in finished.out
    for folder in ("train/view-00", "train/view-01", "val-8f/view-00"):
        assert json.loads((run / "cache" / folder / "manifest.json").read_text())["chunk_frames"] == 2


@pytest.mark.fault(7)
def test_a_stop_request_to_one_rank_ends_all_with_75(place: Path, built: Path) -> None:
    run = place / "stopped"
    ranks = train_ranks(2, place, *BUILD, "stopped")
    ranks[1].signal_when(exists(run / "cache" / "train" / "view-00" / "building.json"), signal.SIGTERM)
    ended = [rank.wait() for rank in ranks]
    assert [end.code for end in ended] == [75, 75], ended
    assert ended[0].err.startswith("stopped: cache: ")
    assert ended[1].err == ""
    finished = train(place, *START, "stopped")
    assert finished.code == 0, finished.err
    assert contents(run / "cache") == contents(built / "cache")
    assert losses(run) == losses(built)


def test_a_part_that_cannot_be_written_ends_all_ranks_with_74(place: Path, built: Path) -> None:
    run = place / "no room"
    blocked = run / "cache" / "train" / "view-00" / "part-000001-000.tar"
    blocked.mkdir(parents=True)
    ended = [rank.wait() for rank in train_ranks(2, place, *BUILD, run.name)]
    assert [end.code for end in ended] == [74, 74], ended
    assert "view 1 of 2: rank 1 on " in ended[0].err
    assert "finished parts are kept" in ended[0].err
    assert ended[1].err == ""
    blocked.rmdir()
    finished = train(place, *BUILD, run.name)
    assert finished.code == 0, finished.err
    assert contents(run / "cache") == contents(built / "cache")


@pytest.mark.fault(2)
def test_kill_9_of_the_training_on_a_cache(place: Path, built: Path) -> None:
    """Invariant 4."""
    run = place / "killed in stage2"
    shutil.copytree(built / "cache", run / "cache")
    own = sets("checkpoint.every_steps=2")
    started = Train(place, *START, run.name, *own)
    started.signal_when(exists(run / "stage2" / "checkpoints" / "step-00000004"), signal.SIGKILL)
    assert started.wait().code == -signal.SIGKILL
    finished = train(place, *START, run.name, *own)
    assert finished.code == 0, finished.err
    assert events(run, "resume")
    assert losses(run) == losses(built)
    assert scores(run) == scores(built)


def test_two_ranks_train_on_it_as_one(place: Path, built: Path) -> None:
    shutil.copytree(built / "cache", place / "two" / "cache")
    for rank in train_ranks(2, place, *START, "two"):
        finished = rank.wait()
        assert finished.code == 0, finished.err
    for key, (loss, norm) in losses(built).items():
        assert losses(place / "two")[key] == (pytest.approx(loss, rel=1e-3), pytest.approx(norm, rel=1e-2)), key


# ------------------------------------------------------------------------------------------------ shared, refused


def test_a_shared_cache_is_read_and_not_written(place: Path, built: Path) -> None:
    """By another run, with another seed and fewer views; a lab builds it once."""
    shared = place / "shared"
    shutil.copytree(built / "cache", shared, ignore=shutil.ignore_patterns("done.json"))
    before = {path: path.stat().st_mtime_ns for path in (shared, *shared.rglob("*"))}
    own = sets(f"stage2.cache.dir={shared}", "seed=7", "stage2.cache.views=1")
    finished = train(place, *START, "guest", *own)
    assert finished.code == 0, finished.err
    assert "is complete and fits" in finished.out
    assert {path: path.stat().st_mtime_ns for path in (shared, *shared.rglob("*"))} == before
    assert json.loads((place / "guest" / "result.json").read_text())["stages"]["cache"]["gpu_seconds"] == 0


def test_views_that_cannot_be_added_are_told_with_the_keys(place: Path, built: Path) -> None:
    """As in a shared folder that is only read; a file stands for it, which nobody can write into, root neither."""
    finished = train(place, *BUILD, "no place", *sets("stage2.cache.dir=t.yaml"))
    assert finished.code == 74
    assert "the feature cache t.yaml is not complete (train has 0 of 2 views; val-8f has 0 of 1 views)" in finished.err
    assert "cannot be written to" in finished.err
    todo = "set stage2.cache.dir to a folder that can, or stage2.cache.views to the number of views that are there"
    assert todo in finished.err
    assert finished.err.count("\n") == 1


def test_more_views_are_added_to_a_cache(place: Path, built: Path) -> None:
    shutil.copytree(built / "cache", place / "more" / "cache")
    finished = train(place, *BUILD, "more", *sets("stage2.cache.views=3"))
    assert finished.code == 0, finished.err
    old, new = contents(built / "cache"), contents(place / "more" / "cache")
    assert old.items() <= new.items()
    assert "train/view-02/manifest.json" in new


REFUSED = {
    "phases": (["stage2.cache.phases=1"], "phases: cached 2, wanted 1"),
    "flip": (["augment.flip=0.25"], "augment.flip: cached 0.5, wanted 0.25"),
    "crop": (["data.resize=18"], "data.resize: cached 20, wanted 18"),
    "dtype": (["engine.precision=bf16"], "dtype: cached 'float32', wanted 'bfloat16'"),
    "decoder": (["data.decoder=torchcodec"], "decoder: cached 'PyAV"),
    "clips": (["data.train=['val/*.tar']"], "clips (sha256): cached"),
    "trunk": (["stage1.weights=other.safetensors"], "trunk weights (sha256): cached"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_cache_of_something_else_is_refused_with_what_differs(place: Path, built: Path, what: str) -> None:
    overrides, said = REFUSED[what]
    if what == "trunk":
        own = sets("stage1.weights=null", "stage1.schedule.epochs=1", "seed=5")
        assert train(place, *START, "second", *own, "--stage", "stage1").code == 0
        shutil.copy(place / "second" / "stage1" / "weights.safetensors", place / "other.safetensors")
    if what == "decoder":
        pytest.importorskip("torchcodec")
    own = sets(*overrides, f"stage2.cache.dir={built / 'cache'}")
    every_way: tuple[tuple[str, ...], ...] = ((), ("--stage", "cache"), ("--stage", "stage2"))
    for only in every_way if what == "phases" else every_way[2:]:
        finished = train(place, *START, f"refused {what}", *own, *only)
        assert finished.code == 78, finished.err
        assert said in finished.err
        assert finished.err.count("\n") == 1


def test_a_trunk_in_int8_tells_how_near_it_is_and_has_a_cache_of_its_own(place: Path, built: Path) -> None:
    own = sets("stage2.trunk_precision=int8")
    refused = train(place, *START, "other precision", *own, *sets(f"stage2.cache.dir={built / 'cache'}"))
    assert refused.code == 78
    assert "dtype: cached 'float32', wanted 'bfloat16, linear layers in int8'" in refused.err
    for name, stage, more in (("int8 cached", "cache", []), ("int8 live", "stage2", sets("stage2.cache=null"))):
        finished = train(place, *START, name, *own, *more)
        assert finished.code == 0, finished.err
        [event] = events(place / name, "trunk_precision")
        assert (event["stage"], event["precision"]) == (stage, "int8")
        assert 0.999 < event["least_cosine"] <= event["cosine"] <= 1.0
        assert f"{stage}: trunk in int8: cosine of its features with bf16's is 0.99" in finished.out
    again = train(place, *START, "int8 live", *sets("stage2.trunk_precision=bf16", "stage2.cache=null"))
    assert again.code == 78
    assert "trunk_precision: was 'int8', now 'bf16'" in again.err
    fp8 = train(place, *START, "fp8", *sets("stage2.trunk_precision=fp8", "stage2.cache=null"))
    assert fp8.code == 78
    assert fp8.err.count("\n") == 1
    assert "stage2.trunk_precision: fp8 needs a card" in fp8.err


def test_parts_of_another_recipe_are_not_gone_on_with(place: Path) -> None:
    run = place / "changed"
    started = Train(place, *BUILD, "changed")
    started.signal_when(exists(run / "cache" / "train" / "view-00" / "part-000000-000.json"), signal.SIGKILL)
    started.wait()
    finished = train(place, *BUILD, "changed", *sets("seed=3"))
    assert finished.code == 78
    assert "augmentation seed: cached 0, wanted 3" in finished.err


def test_without_a_cache_stage_2_does_not_start(place: Path) -> None:
    finished = train(place, *START, "none", "--stage", "stage2")
    assert finished.code == 74
    assert "has 0 of 2 views; run `sfa cache`" in finished.err
    refused = train(place, *BUILD, "none", *sets("stage2.cache=null"))
    assert refused.code == 78
    assert "set stage2.cache.views" in refused.err


def test_tokens_are_refused_with_their_size(place: Path) -> None:
    finished = train(place, *START, "tokens", *sets("stage2.adapter.placement=tokens"))
    assert finished.code == 78
    assert "about 20 TB" in finished.err


def test_too_many_bad_clips_end_the_extraction_with_65(place: Path) -> None:
    shutil.copytree(place / "train", place / "bad" / "train")
    shard = next((place / "bad" / "train").glob("*.tar"))
    index = json.loads((shard.parent / "index.json").read_text())
    data = bytearray(shard.read_bytes())
    for offset in index["shards"][shard.name]["members"]["mp4"][0][:3]:
        data[offset + 50] ^= 1
    shard.write_bytes(data)
    own = sets(f"data.train=['{shard.parent}/*.tar']", "data.max_bad_fraction=0.02")
    finished = train(place, *BUILD, "bad run", *own)
    assert finished.code == 65, finished.err
    assert "3 of 24 clips are bad, over data.max_bad_fraction 0.02" in finished.err
    own = sets(f"data.train=['{shard.parent}/*.tar']", "data.max_bad_fraction=0.1", "stage2.cache.dir=null")
    finished = train(place, *START, "bad run", *own)
    assert finished.code == 0, finished.err
    stage2 = {
        event["key"]: event["reason"] for event in events(place / "bad run", "bad_sample") if event["stage"] == "stage2"
    }
    cache = {
        event["key"]: event["reason"] for event in events(place / "bad run", "bad_sample") if event["stage"] == "cache"
    }
    assert stage2 == cache
    assert len(cache) == 3
    assert all("crc32 mismatch" in reason for reason in cache.values())


# ------------------------------------------------------------------------------------------------ commands


def test_sfa_cache_builds_it(place: Path, built: Path) -> None:
    cli = f"import sys; sys.path[0] = {str(ROOT)!r}; from sfa_dist.tools.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", cli, "cache", "--recipe", "t.yaml", "--run-dir"]
    dry = run_command([*command, "by command", "--dry-run"], place)
    assert dry.code == 0, dry.err
    assert "3 views to build" in dry.out
    assert not (place / "by command").exists()
    finished = run_command([*command, "by command"], place)
    assert finished.code == 0, finished.err
    assert contents(place / "by command" / "cache") == contents(built / "cache")
    assert not [line for line in log_lines(place / "by command") if line["kind"] == "train"]
    wrong = run_command([*command, "by command", "--stage", "stage2"], place)
    assert wrong.code == 64
