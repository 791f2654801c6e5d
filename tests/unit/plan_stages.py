"""Stages of the shipped recipes, for the planner."""

from __future__ import annotations

from pathlib import Path

from sfa_dist.recipe.schema import Recipe, Stage2, load_recipe

ROOT = Path(__file__).resolve().parents[2]
GIB, MIB = 2**30, 2**20


def recipe(name: str, *sets: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", sets).recipe


def stage2(name: str, *sets: str) -> Stage2:
    stage = recipe(name, *sets).stage2
    assert stage is not None
    return stage
