"""The test cluster itself: what it leaves behind, and what its nodes are."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from slurm_cluster import SCRIPT, Cluster, wait_for
from slurm_runs import Runs, write_workplace

pytestmark = pytest.mark.slurm

# Starts a cluster as pytest does, and a job on it, and waits for its own end.
STARTER = """\
import subprocess, sys, time
words = [sys.argv[1], "--state", sys.argv[2]]
hold = subprocess.Popen([*words, "hold", "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
assert hold.stdout.readline() == b"ready\\n"
subprocess.run([*words, "run", "sbatch", "--nodes=2", "--output=/dev/null", "--wrap=srun /bin/sleep 987"], check=True)
time.sleep(600)
"""
# In place of Python's start: what is asked of Slurm is asked, and nothing is trained.
SHOW_CORES = """\
#!/bin/sh
echo "task $SLURM_PROCID has cores $(sed -n 's/Cpus_allowed_list:\\t//p' /proc/self/status)."
"""


def processes_below(top: int) -> dict[int, str]:
    """Command lines of all processes that come from this one, by number."""
    rows = subprocess.check_output(["ps", "-ww", "-eo", "pid=,ppid=,args="], text=True).splitlines()
    table = {int(pid): (int(parent), args) for pid, parent, args in (row.split(maxsplit=2) for row in rows)}
    found = {top: ""}
    while more := {pid: args for pid, (parent, args) in table.items() if parent in found and pid not in found}:
        found |= more
    return found


def test_nothing_is_left_of_it_when_its_starter_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    """In the middle of a job. The fixture only says whether a cluster can run here."""
    state = Path(tempfile.mkdtemp(prefix="sfa-cluster-"))
    said = tmp_path / "said"
    with said.open("wb") as file:
        words = [sys.executable, "-c", STARTER, str(SCRIPT), str(state)]
        starter = subprocess.Popen(words, stdout=file, stderr=file)
    before: dict[int, str] = {}

    def works() -> bool:
        assert starter.poll() is None, said.read_text()
        before.update(processes_below(starter.pid))
        return list(before.values()).count("/bin/sleep 987") == 2

    try:
        wait_for("the job's tasks", works, lambda: f"{before}\n{said.read_text()}")
    finally:
        starter.kill()
        starter.wait()

    def left() -> list[int]:
        return [pid for pid in before if Path(f"/proc/{pid}").exists()]

    wait_for("the end of all", lambda: not left() and not state.exists(), lambda: f"{[before[pid] for pid in left()]}")
    assert str(state) not in Path("/proc/mounts").read_text()


def test_a_command_on_a_node_renames_from_its_folder(cluster: Cluster, tmp_path: Path) -> None:
    """A run directory may be given relative to it."""
    renames = f"import os; open('a', 'w').close(); os.rename('a', '{tmp_path}/b')"
    words = [SCRIPT, "--state", cluster.state, "on", "node1", sys.executable, "-c", renames]
    subprocess.run(words, cwd=tmp_path, check=True)
    assert (tmp_path / "b").exists()


def machine_cores() -> int:
    """Of which each may be several CPUs."""
    shown = subprocess.check_output(["lscpu", "--parse=CORE,SOCKET"], text=True)
    return len({line for line in shown.splitlines() if not line.startswith("#")})


@pytest.mark.skipif(machine_cores() < 2, reason="binding to cores takes two of them")
@pytest.mark.parametrize(("setting", "alone"), [("", True), ("export SFA_CPU_BIND=none", False)])
def test_tasks_are_bound_to_cores_of_their_own(
    bound_cluster: Cluster, tmp_path: Path, setting: str, alone: bool
) -> None:
    """Unless cluster.env says otherwise."""
    show, settings = tmp_path / "show_cores", tmp_path / "cluster.env"
    show.write_text(SHOW_CORES)
    show.chmod(0o755)
    settings.write_text(f"{setting}\nexport SFA_CONTAINER={show}\n")
    runs = Runs(bound_cluster, write_workplace(tmp_path / "place"))
    run = runs.submit("bound", nodes=1, options=["--ntasks-per-node=2"], SFA_CLUSTER_ENV=str(settings))
    run.job.completes()
    cores = [line.partition(" has cores ")[2] for line in run.job.said().splitlines() if " has cores " in line]
    assert len(cores) == 2, run.job.said()
    assert (cores[0] != cores[1]) == alone, run.job.said()
