"""What the GPUs of a run took, by stage, where their driver counts it."""

from __future__ import annotations

from typing import Any

from sfa_dist.parallel.energy import JOULES, REASON
from sfa_dist.recipe.stage_names import CACHE
from sfa_dist.run.report.document import Block, Table, Text
from sfa_dist.run.report.run_files import RunFiles

HEADS = ("stage", "kJ", "kWh", "J per training clip")
JOULES_PER_KWH = 3.6e6
OLDER = "not recorded by the version that trained it"


def energy_blocks(run: RunFiles) -> list[Block]:
    """A row for each stage with its energy, and why others have none; nothing before a stage's numbers are there."""
    stages = {name: stage for name, stage in run.result.get("stages", {}).items() if name != CACHE}
    known = {name: stage for name, stage in stages.items() if stage.get(JOULES) is not None}
    reasons: dict[str, list[str]] = {}
    for name in stages.keys() - known.keys():
        reasons.setdefault(stages[name].get(REASON, OLDER), []).append(name)
    blocks: list[Block] = []
    if known:
        blocks.append(Table("Energy of the GPUs", HEADS, [_row(name, stage) for name, stage in known.items()]))
    blocks += [Text(f"Energy of {' and '.join(sorted(names))}: {why}.") for why, names in sorted(reasons.items())]
    return blocks


def _row(name: str, stage: dict[str, Any]) -> list[str]:
    joules, clips = stage[JOULES], stage.get("samples_seen")
    each = f"{joules / clips:,.2f}" if clips else "no clips"
    return [name, f"{joules / 1000:,.1f}", f"{joules / JOULES_PER_KWH:,.4f}", each]
