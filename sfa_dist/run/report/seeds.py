"""Runs that differ in nothing but the seed: their mean and its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfa_dist.run.intervals import over_seeds
from sfa_dist.run.report.document import Block, Table, Text
from sfa_dist.run.report.run_files import RunFiles

HEADS = ["runs", "seeds", "mean top-1", "deviation", "95 % interval of the mean"]


def seed_blocks(runs: Mapping[str, tuple[RunFiles, dict[str, Any] | None]]) -> list[Block]:
    """A row for each group of runs with the same settings and different seeds, its interval cut to what a share can be;
    in words that there is none."""
    groups: list[tuple[dict[str, Any], dict[str, RunFiles]]] = []
    for name, (run, settings) in runs.items():
        if settings is None or run.recipe is None or not run.result:
            continue
        group = next((members for known, members in groups if known == settings), None)
        if group is None:
            group = {}
            groups.append((settings, group))
        group[name] = run
    rows = [row for _, members in groups if (row := _row(members)) is not None]
    if not rows:
        return [Text("No two finished runs differ only in their seed, so there is no interval over seeds.")]
    return [Table("Means over seeds (Student's t)", HEADS, rows)]


def _row(members: dict[str, RunFiles]) -> list[str] | None:
    by_seed = {run.recipe.seed: run.result["acc1"] for run in members.values() if run.recipe is not None}
    if len(by_seed) < 2 or len(by_seed) < len(members):  # The same seed twice is no second draw.
        return None
    mean, deviation, half = over_seeds(list(by_seed.values()))
    seeds = ", ".join(map(str, by_seed))
    interval = f"{max(0.0, mean - half):.2%} to {min(1.0, mean + half):.2%}"
    return [", ".join(members), seeds, f"{mean:.2%}", f"{deviation * 100:.2f} points", interval]
