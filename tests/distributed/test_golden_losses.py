"""Short runs give the losses of tests/golden/losses.tsv, so that a change that moves numbers is seen; and what
sfa_dist 0.3.0 wrote, tests/data/v0_3, is still resumed and read. The bounds and how they were chosen:
golden_runs.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_runs import (
    CACHED,
    DEMO,
    STOPPED,
    TOYS,
    V0_3,
    assert_golden,
    golden_run,
    refused_here,
    stopped_run_goes_on,
)
from tiny_runs import events


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.slow
def test_the_demo_trains_as_recorded(folder: Path) -> None:
    assert_golden(golden_run(DEMO, folder))


@pytest.mark.parametrize("name", TOYS)
def test_each_engine_trains_as_recorded(folder: Path, name: str) -> None:
    assert_golden(golden_run(name, folder))


def test_a_run_that_0_3_stopped_goes_on(tmp_path: Path) -> None:
    """From its checkpoint of step 3, without stage 1 again."""
    values = golden_run(STOPPED, tmp_path)
    run = tmp_path / "v0_3" / STOPPED
    assert [(event["stage"], event["step"]) for event in events(run, "resume")] == [("stage2", 3)]
    assert [event["stage"] for event in events(run, "start")] == ["stage1", "stage2"]  # As 0.3 wrote them.
    assert_golden(values)


def test_it_goes_on_as_zero_0_and_says_so(tmp_path: Path) -> None:
    """0.3 sharded over one rank. Without that, norm and clipping round otherwise: in fp32 within 1e-5."""
    assert_golden(stopped_run_goes_on(tmp_path), to_the_bit=False)
    run = tmp_path / "v0_3" / STOPPED
    assert [(event["stage"], event["step"]) for event in events(run, "resume")] == [("stage2", 3)]
    said = " ".join((run / "console.log").read_text().split())
    assert "stage2: goes on within rounding and not bit for bit: engine.zero was 2 and is 0" in said
    assert "ZeRO-2, on one rank as ZeRO-0" in said


def test_a_cache_that_0_3_built_is_read(tmp_path: Path) -> None:
    """As it is: no file of it changes."""
    if reason := refused_here(CACHED):
        pytest.skip(reason)
    values = golden_run(CACHED, tmp_path)
    cache = Path(CACHED) / "cache"
    built = {path.relative_to(V0_3): path.read_bytes() for path in (V0_3 / cache).rglob("*") if path.is_file()}
    found = tmp_path / "v0_3"
    assert {path.relative_to(found) for path in (found / cache).rglob("*") if path.is_file()} == set(built)
    assert all((found / path).read_bytes() == data for path, data in built.items())
    assert_golden(values)
