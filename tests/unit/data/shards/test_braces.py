"""Brace patterns are counted before they are expanded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_dist.data.shards.braces import count_names, expand_braces
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import RemoteBlock


@given(text=st.text(st.sampled_from("{},.\\a0 1-b"), max_size=14) | st.sampled_from(["{a..c}", "{-3..9..4}", "{9..0}"]))
@settings(max_examples=400, deadline=None)
def test_the_count_is_that_of_the_names(text: str) -> None:
    try:
        names = list(braceexpand(text))
    except ValueError:
        return
    assert count_names(text) == len(names)
    assert expand_braces(text) == names


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999}",
        "{0..9999}{0..9999}",
        "x{a{0..999999999},b}",
        "{x{0..999999999}}{",
        "{999999999..0}.tar",
        "{0..999999999..3}",
        "{" * 60_000,
        "{" * 30_000 + "}" * 30_000,
        "{a,b}" * 64,
        f"{{0..{'9' * 90}}}",
        "{" + "a" * 500_000 + ",b}{0..999}",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_patterns_that_stand_for_too_much_are_refused_at_once(pattern: str) -> None:
    start = time.process_time()
    for place in (pattern, f"https://h/{pattern}"):
        with pytest.raises(DataError, match="braces"):
            expand_shards([place], RemoteBlock(allow=["https"]))
    assert time.process_time() - start < 5


def test_a_glob_that_finds_no_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / f"{number}.tar").touch()
    monkeypatch.setattr("sfa_dist.data.shards.shard_names.MAX_NAMES", 4)
    with pytest.raises(DataError, match="more than 4 files"):
        expand_shards([str(tmp_path / "*.tar")])
