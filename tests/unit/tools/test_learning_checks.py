"""The parts of `sfa check-learning` that need no training: which clips it draws, what simple classifiers find, and what
the lines say together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.subset import balanced, relabelled, same_clips, subset
from sfa_dist.tools.cli import main
from sfa_dist.tools.learning_table import Check, as_json, conclusion
from sfa_dist.tools.simple_classifiers import FEATURES, GRID, in_random_order, linear, nearest, thumbnails

RNG = np.random.default_rng(0)


@given(st.lists(st.integers(-1, 4), max_size=60), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_clips_are_drawn_in_turns_from_each_class(labels: list[int], most: int) -> None:
    drawn = balanced(np.array(labels, dtype=np.int64), most, np.random.default_rng(1))
    known = [label for label in labels if label >= 0]
    assert len(set(drawn.tolist())) == len(drawn) == min(most, len(known))
    counts = {label: [labels[sample] for sample in drawn].count(label) for label in set(known)}
    for label, count in counts.items():
        assert label >= 0
        # A class has fewer than another only where all of its clips are drawn, or one more was not to be had.
        assert count == known.count(label) or count >= max(counts.values()) - 1


def test_a_subset_reads_the_same_bytes_under_the_same_names(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 4, 2])
    whole = load_index(sorted(tmp_path.glob("*.tar")))
    part = subset(whole, np.array([8, 1, 4]))
    assert [part.name(sample) for sample in range(3)] == [whole.name(sample) for sample in (1, 4, 8)]
    assert [part.labels(sample) for sample in range(3)] == [whole.labels(sample) for sample in (1, 4, 8)]
    assert part.shard_sizes.tolist() == [1, 1, 1]
    assert [read_clip_bytes(part, sample) for sample in range(3)] == [read_clip_bytes(whole, s) for s in (1, 4, 8)]
    assert same_clips(part, whole) == 3
    assert sorted(relabelled(whole, RNG).label.tolist()) == sorted(whole.label.tolist())


def test_thumbnails_are_the_means_of_the_pixels() -> None:
    clips = torch.zeros(2, 3, 4, 16, 16, dtype=torch.uint8)
    clips[1, 0, 2, :2, :2] = 255
    small = thumbnails(clips)
    assert small.shape == (2, 4, 3, GRID, GRID)
    assert small[1, 2, 0, 0, 0] == 1.0
    assert small.sum() == 1.0
    assert in_random_order(small, RNG).sum() == 1.0


def moving(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """A dot that runs to the right (1) or to the left (0), over a still ground of its own."""
    labels = np.arange(count) % 2
    clips = torch.from_numpy(rng.integers(0, 60, (count, 3, 1, 16, 16), dtype=np.uint8)).repeat(1, 1, 8, 1, 1)
    for clip, label in zip(clips, labels, strict=True):
        row = int(rng.integers(7)) * 2
        for step in range(8):
            column = 2 * (step if label else 7 - step)
            clip[:, step, row : row + 2, column : column + 2] = 255
    return clips, labels


def test_what_moves_which_way_is_found_in_the_order_of_frames_alone() -> None:
    train, labels = moving(80, RNG)
    test, wanted = moving(40, RNG)
    small, other = thumbnails(train), thumbnails(test)
    differences, still = FEATURES["differences of frames"], FEATURES["mean frame"]
    assert (linear(differences(small), labels, differences(other)) == wanted).mean() > 0.9
    assert (linear(still(small), labels, still(other)) == wanted).mean() < 0.75
    small, other = in_random_order(small, RNG), in_random_order(other, RNG)
    assert (linear(differences(small), labels, differences(other)) == wanted).mean() < 0.75


def test_the_nearest_neighbour_is_scikit_learns() -> None:
    train, test = (RNG.normal(size=(rows, 5)).astype(np.float32) for rows in (50, 20))
    labels = RNG.integers(0, 3, 50)
    scale = train.std(axis=0)
    wanted = KNeighborsClassifier(1).fit(train / scale, labels).predict(test / scale)
    assert (nearest(train, labels, test) == wanted).all()


def test_columns_that_never_change_and_labels_with_gaps_are_no_trouble() -> None:
    train = np.concatenate([np.eye(2, dtype=np.float32).repeat(10, axis=0), np.ones((20, 3), np.float32)], axis=1)
    labels = np.array([2] * 10 + [7] * 10)
    assert (linear(train, labels, train) == labels).all()
    assert (nearest(train, labels, train) == labels).all()


def checks(**verdicts: str) -> list[Check]:
    return [Check(name, verdict, "") for name, verdict in verdicts.items()]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdicts", "passed", "says"),
    [
        ({"baselines": "ok", "overfit": "ok", "learn": "ok"}, True, "It learns"),
        ({"baselines": "ok", "overfit": "ok", "learn": "note"}, True, "The clips show their labels"),
        ({"baselines": "note", "overfit": "ok", "learn": "note"}, True, "Nothing separated the classes"),
        ({"baselines": "ok", "overfit": "undecided", "learn": "ok"}, False, "give more --seconds"),
        ({"baselines": "ok", "overfit": "fail", "learn": "ok"}, False, "Do not train yet: overfit failed"),
        ({"classes": "fail"}, False, "Do not train yet: classes failed"),
        ({"overfit": "ok", "learn": "ok", "shuffled frames": "skipped"}, True, "It learns"),
    ],
)
def test_the_lines_have_a_conclusion(verdicts: dict[str, str], passed: bool, says: str) -> None:
    assert conclusion(checks(**verdicts)).startswith(says) or says in conclusion(checks(**verdicts))
    assert as_json(checks(**verdicts), 1.0)["passed"] is passed


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--seconds", "5"], 64, "--seconds must be 10 or more"),
        (["--seconds", "nan"], 64, "--seconds must be 10 or more"),
        (["--stage", "image"], 78, "has no stage image"),
        (["--set", "data.train=[]"], 78, "stage1.data.train names no shards"),
        (["--set", "data.test=[]", "--set", "data.val=[]"], 78, "neither data.test nor data.val"),
    ],
)
def test_what_cannot_be_checked_is_said(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-learning", "--recipe", "recipes/own_videos.yaml", *words]) == code
    told = capsys.readouterr()
    assert says in told.err
    assert told.out == ""
