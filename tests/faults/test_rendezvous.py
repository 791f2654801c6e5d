"""Ranks that cannot meet say where, which rank they are and what to do, and end; none waits for ever."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from ranks import free_port
from watched_ranks import Ranks

from sfa_dist.errors import UsageError
from sfa_dist.parallel.launch import Launch
from sfa_dist.parallel.rendezvous import meet, read_rendezvous

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.fault(62)
def test_a_port_that_another_program_holds(tmp_path: Path) -> None:
    """It takes connections and says nothing: torch's own client would wait for it without end."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        ranks = Ranks(tmp_path, 2, "forever", port=port, SFA_RENDEZVOUS_SECONDS="3")
        codes, seconds = ranks.ends()
    assert codes == [70, 70]
    assert seconds < 15
    host, guest = ranks.errors()
    assert host.startswith("error: rank 0 of 2 on ")
    assert f"cannot listen at 127.0.0.1:{port} (the port is in use)" in host
    assert guest.startswith("error: rank 1 of 2 on ")
    assert f"what listens at 127.0.0.1:{port} is not rank 0 of this run" in guest
    for said in (host, guest):
        assert said.count("\n") == 1
        assert all(word in said for word in ("--master_port", "MASTER_PORT", "SFA_PORT_BASE"))


@pytest.mark.fault(62)
def test_a_rank_that_does_not_come_is_named_once(tmp_path: Path) -> None:
    port = free_port()
    ranks = Ranks(tmp_path, 4, "forever", ranks=(0, 2), port=port, SFA_RENDEZVOUS_SECONDS="5", SFA_NODES="a b")
    codes, seconds = ranks.ends()
    assert codes == [70, 70]
    assert seconds < 15
    host, guest = ranks.errors()
    waits, error = host.splitlines()
    assert waits.endswith(f"waiting for ranks 1, 3 (a, b) at 127.0.0.1:{port}, at most 5 s in all"), "long before"
    assert f"ranks 1, 3 (a, b) of 4 did not come to 127.0.0.1:{port} within 5 s" in error
    assert guest == ""


@pytest.mark.fault(62)
def test_no_rank_0(tmp_path: Path) -> None:
    port = free_port()
    ranks = Ranks(tmp_path, 2, "forever", ranks=(1,), port=port, SFA_RENDEZVOUS_SECONDS="2")
    assert ranks.ends()[0] == [70]
    waits, said = ranks.errors()[0].splitlines()
    assert f"waiting for rank 0 at 127.0.0.1:{port} ([Errno 111] Connection refused)" in waits
    assert said.startswith("error: rank 1 of 2 on ")
    assert f"nobody answers at 127.0.0.1:{port} after 2 s" in said


@pytest.mark.fault(62)
def test_a_host_that_is_none(tmp_path: Path) -> None:
    environ = {**PLACE, "MASTER_ADDR": "no-such-host.invalid", "SFA_RENDEZVOUS_SECONDS": "0.1"}
    with pytest.raises(Exception, match=r"nobody answers at no-such-host\.invalid:29500"):
        meet(read_rendezvous(environ, Launch("deepspeed", 1, 2, 1, 2)))


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"SFA_RENDEZVOUS_SECONDS": "soon"}, "SFA_RENDEZVOUS_SECONDS"),
        ({"SFA_RENDEZVOUS_SECONDS": "0"}, "SFA_RENDEZVOUS_SECONDS"),
        ({"SFA_RENDEZVOUS_SECONDS": "inf"}, "SFA_RENDEZVOUS_SECONDS"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
    ],
)
def test_wrong_variables_are_refused(wrong: dict[str, str], names: str) -> None:
    with pytest.raises(UsageError, match=names):
        read_rendezvous({**PLACE, **wrong}, Launch("deepspeed", 0, 2, 0, 2))
