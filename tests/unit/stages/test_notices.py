"""What is said of training clips before a stage starts: classes that do not fit, and videos that loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import video_bytes
from webdataset import TarWriter

from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import DataBlock, ModelBlock
from sfa_dist.stages.notices import class_notices, loop_notices, recorded_lengths

CLIP = video_bytes(frames=2)


def index_of(
    folder: Path, labels: list[Any], facts: list[dict[str, Any]] | None = None, classes: Any = None
) -> SampleIndex:
    """Two shards of clips with these labels (nouns and verbs as pairs) and further facts in their json."""
    folder.mkdir()
    half = len(labels) // 2
    for number, rows in enumerate((range(half), range(half, len(labels)))):
        with TarWriter(str(folder / f"train-{number:06d}.tar")) as writer:
            for row in rows:
                label = labels[row]
                named = {"label": label} if isinstance(label, int) else dict(zip(("noun", "verb"), label, strict=True))
                sample = {"__key__": f"{row:04d}", "mp4": CLIP, "json": json.dumps(named | (facts or [{}] * 99)[row])}
                writer.write({key: value.encode() if key == "json" else value for key, value in sample.items()})
    if classes is not None:
        (folder / "manifest.json").write_text(json.dumps(classes))
    return load_index(sorted(folder.glob("*.tar")))


def model(classes: int, **more: Any) -> ModelBlock:
    return ModelBlock.model_validate({"size": "tiny", "classes": classes, **more})


def test_more_classes_than_the_manifest_has_are_told_with_what_to_set(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a", [0, 1, 0, 1], classes={"classes": ["left", "right"]})
    [told] = class_notices(index, model(3))
    assert told == "model.classes is 3, and the shards have 2 classes ('left', 'right'): set model.classes=2"
    assert class_notices(index, model(2)) == []


def test_shards_without_a_manifest_are_judged_by_their_labels(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a", [0, 1, 0, 1])
    [told] = class_notices(index, model(3))
    assert told == "model.classes is 3, and the labels of the training clips end at 1: set model.classes=2"
    assert class_notices(index, model(2)) == []


def test_a_class_without_a_clip_is_named_and_a_strange_name_is_escaped(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a", [0, 2, 0, 2], classes={"classes": ["a", "b\x1b[31m", "c"]})
    [told] = class_notices(index, model(3))
    assert told == "1 of 3 classes have no training clip ('b\\x1b[31m'): they cannot be learned"


def test_each_head_is_told_of(tmp_path: Path) -> None:
    names = {"classes": None, "heads": {"noun": ["n0", "n1"], "verb": ["v0", "v1"]}}
    index = index_of(tmp_path / "a", [(0, 0), (1, 0), (0, 0), (1, 0)], classes=names)
    told = class_notices(index, model(5, class_heads={"noun": 3, "verb": 2}))
    assert told == [
        "model.class_heads.noun is 3, and the shards have 2 classes ('n0', 'n1'): set model.class_heads.noun=2",
        "1 of 2 classes have no training clip ('v1'): they cannot be learned",
    ]


LENGTHS = [{"frames": frames, "fps": 15.0} for frames in (16, 16, 30, 22)]


def test_videos_that_are_shorter_than_the_span_are_counted_with_what_fits(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a", [0, 1, 0, 1], LENGTHS)
    assert loop_notices(index, DataBlock(stride=3), 8, "stage1") == [
        "a clip spans 22 frames of a video (8 frames, stride 3), and 2 of 4 videos are shorter (16 frames) and looped, "
        "from their first frame on; stage1.data.stride=2 fits all of them"
    ]
    [told] = loop_notices(index, DataBlock(stride=2), 14, "stage2")
    assert "spans 27 frames" in told
    assert "3 of 4 videos are shorter (16 to 22 frames)" in told
    assert told.endswith("stage2.data.stride=1 fits all of them")
    [told] = loop_notices(index, DataBlock(stride=1), 20, "stage2")
    assert told.endswith("stage2.frames has to be 16 or fewer")


@pytest.mark.parametrize(("stride", "frames"), [(2, 8), (0, 64), (15, 2), (1, 16)])
def test_videos_that_are_long_enough_are_not_told_of(tmp_path: Path, stride: int, frames: int) -> None:
    assert loop_notices(index_of(tmp_path / "a", [0, 1, 0, 1], LENGTHS), DataBlock(stride=stride), frames, "s") == []


@pytest.mark.parametrize(
    ("rate", "lengths"), [(None, [16, 16, 30, 22]), ("stored", [16, 16, 30, 22]), (30.0, [32, 32, 60, 44])]
)
def test_lengths_are_those_at_the_rate_of_the_recipe(tmp_path: Path, rate: Any, lengths: list[int]) -> None:
    assert recorded_lengths(index_of(tmp_path / "a", [0, 1, 0, 1], LENGTHS), rate).tolist() == lengths


def test_of_many_videos_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(tmp_path / "a", [0, 1, 0, 1], LENGTHS)
    monkeypatch.setattr("sfa_dist.stages.notices.MOST_LOOKED_AT", 2)
    [told] = loop_notices(index, DataBlock(stride=3), 8, "stage1")
    assert "1 of the 2 videos looked at" in told


@pytest.mark.parametrize(
    "facts", [{}, {"frames": "16"}, {"frames": -3}, {"frames": True}, {"frames": 16.5}, {"pad": "x" * 70_000}]
)
def test_a_json_that_tells_no_length_is_left_out(tmp_path: Path, facts: dict[str, Any]) -> None:
    index = index_of(tmp_path / "a", [0, 1, 0, 1], [facts, *LENGTHS[:3]])
    assert recorded_lengths(index, None).tolist() == [16, 16, 30]


def test_a_pattern_that_matches_nothing_tells_what_lies_there(tmp_path: Path) -> None:
    index_of(tmp_path / "own", [0, 1])
    (tmp_path / "own" / "val-000000.tar").touch()
    (tmp_path / "empty").mkdir()
    for pattern, words in {
        "own/test-*.tar": "has 'train-*.tar', 'val-*.tar'",
        "empty/*.tar": "there is no .tar file in",
        "none/*.tar": "there is no folder",
        "*/none-*.tar": "stands for folders without such files",
    }.items():
        with pytest.raises(DataError, match=r"no shard matches") as caught:
            expand_shards([str(tmp_path / pattern)])
        assert words in str(caught.value)
