"""Clips and shards that are wrong: one line on stderr, the contract's exit code, and the clip by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import assert_refused, train, train_ranks
from tiny_runs import SHORT, START, events, log_lines, make_workplace, sets, write_clips

from sfa_dist.data.shards.shard_index import build_index


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace whose shards are indexed."""
    folder = make_workplace(tmp_path_factory.mktemp("bad clips"), SHORT)
    for split in ("train", "val"):
        build_index(sorted((folder / split).glob("*.tar")))
    return folder


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
def damaged(place: Path, tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    """A workplace in which one clip of `train` or `val` is damaged, and the clip's name."""

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
