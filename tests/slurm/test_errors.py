"""What a user sees when something is wrong with a node: one line that names node and cause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import ROOT, Cluster
from slurm_runs import Runs, TinyRun
from tiny_runs import sets

pytestmark = pytest.mark.slurm

SHORT = ("--stage", "stage1", *sets("schedule.max_steps=2", "engine.name=fsdp"))
ON_NODES = ("--nodelist=node1,node2",)


def error_lines(run: TinyRun) -> list[str]:
    return [line for line in run.job.said().splitlines() if line.startswith("error: ")]


@pytest.mark.fault(62)
def test_a_node_that_never_joins(runs: Runs, tmp_path: Path) -> None:
    """Its python hangs, as one does on a file system that does not answer."""
    hangs = runs.place / "hangs-on-node2"
    hangs.write_text('#!/bin/bash\n[[ $(hostname) == node2 ]] && exec sleep infinity\nexec "$@"\n')
    hangs.chmod(0o755)
    run = runs.submit("absent", *SHORT, options=ON_NODES, SFA_CONTAINER=str(hangs), SFA_RENDEZVOUS_SECONDS="12")
    assert run.job.end()["JobState"] == "FAILED"
    [error] = error_lines(run)
    assert "rank 0 of 2 on node1: rank 1 (node2) of 2 did not come to node1:" in error
    assert "waiting for rank 1 (node2)" in run.job.said()


@pytest.fixture
def other_code_on_node2(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    file = ROOT / "sfa_dist" / "training" / "schedule.py"
    changed = tmp_path / "schedule.py"
    changed.write_text(f"{file.read_text()}\n# changed\n")
    cluster.control("on", "node2", "mount", "--bind", str(changed), str(file))
    yield
    cluster.control("on", "node2", "umount", str(file))


@pytest.mark.fault(61)
def test_two_nodes_with_different_code(runs: Runs, other_code_on_node2: None) -> None:
    run = runs.submit("other-code", *SHORT, options=ON_NODES)
    fields = run.job.end()
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "78:0"), run.job.said()
    [error] = error_lines(run)
    assert "the ranks disagree on the code of sfa_dist" in error
    assert "node2" in error


def test_an_interface_that_is_not_there(runs: Runs) -> None:
    run = runs.submit("interface", *SHORT, options=ON_NODES, GLOO_SOCKET_IFNAME="ib7")
    fields = run.job.end()
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "70:0"), run.job.said()
    error = error_lines(run)[0]
    assert "ib7" in error
    assert "node1" in error or "node2" in error


@pytest.fixture
def full_disk_on_node2(cluster: Cluster) -> Iterator[Path]:
    disk = cluster.state / "local"
    cluster.control("on", "node2", "sh", "-c", f"cat /dev/zero >{disk}/full 2>/dev/null || true")
    yield disk
    cluster.control("on", "node2", "rm", f"{disk}/full")


def test_shards_are_staged_and_a_full_disk_is_no_end(runs: Runs, cluster: Cluster, full_disk_on_node2: Path) -> None:
    stage = full_disk_on_node2 / "shards"
    run = runs.submit("full-disk", *SHORT, options=ON_NODES, SFA_STAGE_DIR=str(stage))
    run.job.completes()
    warnings = [line for line in run.job.said().splitlines() if "the shard cache on" in line]
    assert len(warnings) == 1
    assert "the shard cache on node2 cannot be used" in warnings[0]
    cluster.control("on", "node1", "sh", "-c", f"ls {stage}/shards/*.tar")
