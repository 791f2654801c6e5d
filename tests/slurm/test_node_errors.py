"""What a user without Slurm sees when something is wrong with a node: on each console, one line that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import program
from node_runs import Console, Nodes, train_words
from slurm_cluster import ROOT, Cluster, slowness
from tiny_runs import sets

pytestmark = pytest.mark.slurm

SECONDS = 60.0  # For a user to wait.
SHORT = ("--stage", "stage1", *sets("schedule.max_steps=2", "engine.name=fsdp"))
On = Callable[..., None]


@pytest.fixture
def on(cluster: Cluster) -> Iterator[On]:
    """Runs a command on a node, and after the test the one that undoes it."""
    undoing: list[list[str]] = []

    def do(node: str, command: str, undo: str) -> None:
        cluster.control("on", node, *command.split())
        undoing.append([node, *undo.split()])

    yield do
    for words in reversed(undoing):
        cluster.control("on", *words)


def the_error(console: Console, code: int) -> str:
    """The one error of a console whose command ended with this code."""
    assert console.code() == code, console.said()
    [error] = console.error_lines()
    return error


@pytest.mark.fault(62)
def test_an_interface_that_one_node_does_not_have(nodes: Nodes) -> None:
    consoles = nodes.by_hand(2, *SHORT, only={"node2": {"GLOO_SOCKET_IFNAME": "ib7"}})
    for console in consoles:
        assert console.seconds_until("error: ") < SECONDS * slowness()
        error = the_error(console, 70)
        assert "rank 1 of 2 on node2: GLOO_SOCKET_IFNAME=ib7, but this node has no interface ib7 (it has " in error
        assert "eth0" in error


@pytest.mark.fault(62)
def test_an_interface_that_does_not_lead_to_the_others(nodes: Nodes, on: On) -> None:
    """An address below the others': of two, gloo connects from the higher one to the lower one."""
    on("node1", "ip link add side0 type bridge", "ip link delete side0")
    on("node1", "ip address add 10.1.9.1/24 dev side0", "ip address delete 10.1.9.1/24 dev side0")
    on("node1", "ip link set side0 up", "ip link set side0 down")
    consoles = nodes.by_hand(2, *SHORT, only={"node1": {"GLOO_SOCKET_IFNAME": "side0"}}, SFA_RENDEZVOUS_SECONDS="20")
    for console in consoles:
        assert console.seconds_until("error: ") < SECONDS * slowness()
        error = the_error(console, 70)
        assert "node2 does not reach rank 0 on node1 at 10.1.9.1" in error
        assert "GLOO_SOCKET_IFNAME" in error


def test_nodes_whose_names_lead_to_their_loopback(nodes: Nodes, cluster: Cluster, on: On, tmp_path: Path) -> None:
    """As in /etc/hosts of a Debian that was installed by hand: other nodes get nowhere with such an address."""
    for node, address in (("node1", "10.77.0.1"), ("node2", "10.77.0.2")):
        hosts = tmp_path / node
        hosts.write_text((cluster.state / "etc" / "hosts").read_text().replace(address, "127.0.1.1"))
        on(node, f"mount --bind {hosts} /etc/hosts", "umount /etc/hosts")
    consoles = nodes.by_hand(2, *SHORT, "--run-dir", str(tmp_path / "run"), SFA_RENDEZVOUS_SECONDS="60")
    for console in consoles:
        assert console.code() == 0, console.said()


@pytest.mark.fault(61)
def test_other_code_on_one_node(nodes: Nodes, on: On, tmp_path: Path) -> None:
    file = ROOT / "sfa_dist" / "training" / "schedule.py"
    changed = tmp_path / "schedule.py"
    changed.write_text(f"{file.read_text()}\n# changed\n")
    on("node2", f"mount --bind {changed} {file}", f"umount {file}")
    for console in nodes.by_hand(3, *SHORT, "--run-dir", str(tmp_path / "run")):
        error = the_error(console, 78)
        assert "the ranks disagree on the code of sfa_dist" in error
        assert "rank 1 on node2: " in error


@pytest.mark.fault(62)
def test_a_node_that_cannot_reach_the_meeting_place(nodes: Nodes, on: On) -> None:
    """deepspeed, started on a third node, tells rank 0 which nodes there are."""
    on("node2", "ip route add blackhole 10.77.0.1", "ip route delete blackhole 10.77.0.1")
    console = nodes.deepspeed((2, 1), *SHORT, at="node3", SFA_RENDEZVOUS_SECONDS="20")
    waits = "waiting for rank 1 (node2) at 10.77.0.1:29500, at most 20 s in all"
    assert console.seconds_until(waits) < SECONDS * slowness()
    assert console.code() == 70, console.said()
    host, guest = sorted(console.error_lines(), key=lambda line: "rank 1 of" in line)
    assert "rank 0 of 2 on node1: rank 1 (node2) of 2 did not come to 10.77.0.1:29500 within 20 s" in host
    assert "rank 1 of 2 on node2: nobody answers at 10.77.0.1:29500 after 20 s" in guest


@pytest.mark.fault(18)
def test_no_room_for_loader_workers_on_one_node(nodes: Nodes, on: On, tmp_path: Path) -> None:
    """Their queue would print a traceback and lose the batch, and all ranks would wait for it."""
    # A batch larger than that: small ones need none of it.
    large = sets("data.workers=2", "batch.micro=4", "stage1.frames=8", "model.image_size=32", "data.resize=36")
    on("node2", "mount -t tmpfs -o size=64k tmpfs /dev/shm", "umount /dev/shm")
    consoles = nodes.by_hand(3, *SHORT, *large, "--run-dir", str(tmp_path / "run"))
    for console in consoles:
        assert console.seconds_until("error: ") < SECONDS * slowness()
        error = the_error(console, 74)
        assert "node2 has no room for " in error
        assert "free /dev/shm there" in error
        assert ("rank 1 on node2 ended with code 74" in error) == (console.node != "node2")


@pytest.mark.fault(62)
def test_a_node_that_never_joins_under_deepspeed_without_ssh(nodes: Nodes) -> None:
    """Each node's own deepspeed knows the names of all, so the one that is missing is named on both others."""
    layout, patience = (3, 1), {"SFA_RENDEZVOUS_SECONDS": "30"}
    consoles = [nodes.deepspeed_by_hand(layout, node, *SHORT, **patience) for node in (0, 2)]
    consoles[0].seconds_until("rank 0 on node1: waiting for rank 1 (node2) at node1:29500, at most 30 s in all")
    for console in consoles:
        assert "rank 1 (node2) of 3 did not come to node1:29500 within 30 s" in the_error(console, 70)


@pytest.mark.fault(62)
def test_a_node_that_never_joins_under_torchrun(nodes: Nodes) -> None:
    """It meets before it starts train.py, and only counts; by the options of docs/multi_node.md."""
    place = ["--nnodes=2", "--node-rank=0", "--nproc-per-node=1", "--master-addr=node1", "--master-port=29500"]
    console = nodes.on("node1", program("torchrun"), *place, "--rdzv-conf=timeout=5", *train_words(*SHORT))
    assert console.code() == 1
    assert "DistStoreError: Timed out after 6 seconds waiting for clients. 1/2 clients joined." in console.errors()


def test_torchrun_on_each_node_tells_it_on_each_console(nodes: Nodes, on: On, tmp_path: Path) -> None:
    """torchrun adds a page of its own, and its own exit code."""
    consoles = nodes.torchrun((2, 1), *SHORT, *sets("stage1.frames=0"), "--run-dir", str(tmp_path / "run"))
    for console in consoles:
        assert "stage1.frames" in the_error(console, 1)
