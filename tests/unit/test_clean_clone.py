"""Tests see the repository as a clean clone has it, and the recipe for one's own videos finds what `sfa pack` wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sfa_dist.plan.dataset import count_clips
from sfa_dist.recipe.schema import load_recipe


def test_what_a_demo_left_is_not_seen() -> None:
    """`make demo` leaves data/demo and runs/demo in the repository, and CI runs the tests beside both."""
    assert Path("recipes/demo.yaml").samefile(Path(__file__).parents[2] / "recipes" / "demo.yaml")
    assert not Path("data").exists()
    assert not Path("runs").exists()
    stage = load_recipe("recipes/demo.yaml", environ=os.environ).recipe.stage1
    assert stage is not None
    assert count_clips(stage, 1000).source == "--clips"


@pytest.mark.parametrize(
    ("environ", "shards"),
    [
        ({}, "data/own/test-*.tar"),
        ({"SFA_OWN_TEST": "val"}, "data/own/val-*.tar"),
        ({"SFA_OWN_DATA": "/mine", "SFA_OWN_TEST": "validation"}, "/mine/validation-*.tar"),
    ],
)
def test_the_second_split_may_have_any_name(environ: dict[str, str], shards: str) -> None:
    recipe = load_recipe("recipes/own_videos.yaml", environ=environ).recipe
    for stage in (recipe.stage1, recipe.stage2):
        assert stage is not None
        assert stage.data.val == stage.data.test == [shards]
