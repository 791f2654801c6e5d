"""Which interfaces a rank refuses before it connects; the rest of joining is tested on real nodes, in tests/slurm."""

from __future__ import annotations

import pytest

from sfa_dist.errors import LostRankError
from sfa_dist.parallel.joining import GLOO_VARIABLE, NCCL_VARIABLE, require_interface
from sfa_dist.parallel.launch import Launch
from sfa_dist.parallel.rendezvous import read_rendezvous

CONFIG = read_rendezvous({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, Launch("torchrun", 1, 2, 0, 1))


@pytest.mark.parametrize(
    ("variable", "wanted"),
    [(GLOO_VARIABLE, ""), (GLOO_VARIABLE, "lo"), (NCCL_VARIABLE, "l"), (NCCL_VARIABLE, "^docker0,lo")],
)
def test_what_is_there_is_taken(variable: str, wanted: str) -> None:
    require_interface(CONFIG, variable, wanted)


@pytest.mark.parametrize(
    ("variable", "wanted"),
    [
        (GLOO_VARIABLE, "ib7"),
        (GLOO_VARIABLE, "lo,ib7"),
        (GLOO_VARIABLE, "l"),
        (NCCL_VARIABLE, "ib7"),
        (NCCL_VARIABLE, "=l"),
    ],
)
def test_what_is_not_there_is_named(variable: str, wanted: str) -> None:
    """gloo takes whole names, NCCL starts of names, but for `=`."""
    with pytest.raises(LostRankError, match=f"rank 1 of 2 on .*: {variable}={wanted}, but this node has no interface"):
        require_interface(CONFIG, variable, wanted)
