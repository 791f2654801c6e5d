"""A save that is waited for, where training lets it go on in the background."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfa_dist.checkpoint import Saver
from sfa_dist.errors import CheckpointError
from sfa_dist.parallel.engines.engine import Engine
from sfa_dist.parallel.runtime import Runtime


def save_checkpoint(
    root: Path, step: int, engine: Engine, state: Mapping[str, Any], runtime: Runtime, keep: int
) -> Path:
    """Writes step-<step> under `root` and drops all but the newest `keep`; it stands when this returns. Collective.

    Raises CheckpointError on every rank when any rank could not write, or when a value is not finite; what was there
    before stays.
    """
    saver = Saver(root, runtime, keep)
    saver.begin(step, engine, state)
    outcome = saver.finish()
    assert outcome is not None
    if outcome.refused:
        raise runtime.for_all(CheckpointError(f"{outcome.path}: {outcome.refused}"))
    return outcome.path
