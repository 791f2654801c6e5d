"""What the tests of checkpoints have in common: one rank, its engine, and a save from begin to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import OneRankEngine, Save

from sfa_dist import checkpoint as ckpt
from sfa_dist.checkpoint import files
from sfa_dist.checkpoint.failpoints import parse_failpoints
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engines.engine import Engine
from sfa_dist.parallel.runtime import Runtime


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield parallel_runtime.start({})
    parallel_runtime.stop()


@pytest.fixture
def engine() -> OneRankEngine:
    engine = OneRankEngine()
    engine.step(0.1)
    return engine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def save(runtime: Runtime, engine: Engine, root: Path) -> Save:
    def save(step: int, keep: int = 3, failpoints: str = "", **state: Any) -> Path:
        saver = ckpt.Saver(root, runtime, keep, parse_failpoints(failpoints))
        saver.begin(step, engine, {"stage": "t", **state})
        outcome = saver.finish()
        assert outcome is not None
        assert outcome.refused is None
        return outcome.path

    return save


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RETRY_DELAYS_S", (0.0, 0.0))
