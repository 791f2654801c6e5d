"""One Slurm for all tests of this folder, and one folder with clips and a recipe."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed"), str(HERE.parent / "unit")]

from node_runs import Nodes, start_ssh, write_place  # noqa: E402 (found by the line above)
from slurm_cluster import NODES, SCRIPT, Cluster  # noqa: E402
from slurm_runs import Runs, write_workplace  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several jobs a test, each with a limit of its own: the sum is above what other tests have."""
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.timeout(1200))


@contextmanager
def running(nodes: int, *kind: str) -> Iterator[Cluster]:
    """A cluster. It ends with this process, however that ends."""
    possible = subprocess.run([str(SCRIPT), "check"], capture_output=True, text=True)
    if possible.returncode:
        pytest.skip(f"{possible.stderr.strip()}; make test-slurm installs what is missing")
    state = tempfile.mkdtemp(prefix="sfa-cluster-")  # a short path: it holds a socket
    words = [str(SCRIPT), "--state", state, "hold", str(nodes), *kind]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", "the cluster does not start; it has said why"
    yield Cluster(Path(state))
    process.stdin.close()
    assert process.wait(30) == 0
    assert not Path(state).exists()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Nodes node1 .. node4."""
    with running(NODES) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def bound_cluster() -> Iterator[Cluster]:
    """One node, which binds its tasks to the cores of this machine."""
    with running(1, "bound") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Submits tiny runs."""
    return Runs(cluster, write_workplace(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="session")
def nodes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    """Starts tiny runs without Slurm."""
    ssh = start_ssh(cluster, tmp_path_factory.mktemp("ssh"), [f"node{k}" for k in range(1, NODES + 1)])
    return Nodes(cluster, write_place(tmp_path_factory.mktemp("nodes")), ssh)
