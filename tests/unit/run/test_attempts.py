"""How starts end is kept; the one after three alike is refused, and no other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from sfa_dist.errors import CheckpointError, LostRankError
from sfa_dist.run.attempts import KEPT, Attempts

FAILURE = (70, "LostRankError: rank 1: worker (process 4711) died", "stage1", 5)
End = tuple[int, str, str, int]


def starts(folder: Path, ends: Sequence[End | None], identity: str = "a", limit: int = 3) -> None:
    """One start for each end; None is one that was killed."""
    for end in ends:
        attempts = Attempts(folder, identity, limit)
        attempts.begin()
        if end is not None:
            attempts.end(*end)


@pytest.mark.fault(14)
def test_three_failures_alike_are_the_last(tmp_path: Path) -> None:
    starts(tmp_path, [FAILURE, (70, FAILURE[1].replace("4711", "4712"), "stage1", 5), FAILURE])
    with pytest.raises(LostRankError) as caught:
        Attempts(tmp_path, "a", 3).begin()
    for word in ("3 starts in a row ended in stage stage1 at step 5", "4711", "stop.same_failures=0", "attempts.json"):
        assert word in str(caught.value)
    Attempts(tmp_path, "b", 3).begin()  # Somebody has changed recipe or code.


@pytest.mark.parametrize(
    "ends",
    [
        [FAILURE, FAILURE],
        [FAILURE, FAILURE, (70, "another error", "stage1", 5)],
        [FAILURE, FAILURE, (70, FAILURE[1], "stage1", 6)],
        [FAILURE, FAILURE, (70, FAILURE[1], "stage2", 5)],
        [FAILURE, FAILURE, (75, "PreemptedError: stopped", "stage1", 5), FAILURE],
        [(75, "PreemptedError: stopped", "stage1", 5)] * 4,
        [(74, "CheckpointError: disk full", "stage1", 5)] * 4,
        [FAILURE, FAILURE, None, FAILURE],
        [None] * 5,
    ],
)
def test_anything_else_is_not(tmp_path: Path, ends: list[End | None]) -> None:
    starts(tmp_path, ends)
    Attempts(tmp_path, "a", 3).begin()


def test_without_a_limit_there_is_none(tmp_path: Path) -> None:
    starts(tmp_path, [FAILURE] * 5, limit=0)


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    starts(tmp_path, [None] * (KEPT + 5))
    assert len(json.loads((tmp_path / "attempts.json").read_text())) == KEPT


@pytest.mark.parametrize("text", ["", "{}x", "[1]", '[{"code": 70}]'])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "attempts.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"attempts\.json"):
        Attempts(tmp_path, "a", 3).begin()


def test_a_folder_in_its_place_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "attempts.json").mkdir()
    with pytest.raises(CheckpointError, match=r"EISDIR|a folder") as caught:
        Attempts(tmp_path, "id", 3).begin()
    assert "Errno" not in str(caught.value)
