"""The scripts under a real Slurm: scheduled as they are, and a tiny recipe to its end on several nodes."""

from __future__ import annotations

import json

import pytest
from slurm_cluster import Cluster
from slurm_runs import ENGINES, G_SCRIPT, H_SCRIPT, STEPS, Runs

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("left alone")]

TOLERANCE = 5e-3  # of losses in fp32 after 60 steps of SGD at a rate of 0.3; gradients are summed in another order


@pytest.mark.parametrize(("script", "nodes"), [(G_SCRIPT, 4), (H_SCRIPT, 2)])
def test_the_gpu_scripts_are_scheduled_as_they_are(cluster: Cluster, script: str, nodes: int) -> None:
    _, said = cluster.call("sbatch", "--test-only", script)
    assert f"using {nodes * 96} processors on nodes node[1-{nodes}]" in said


@pytest.mark.parametrize("engine", ENGINES)
def test_a_recipe_runs_to_its_end_on_2_and_4_nodes(runs: Runs, engine: str) -> None:
    two, four = runs.left_alone(engine, 2), runs.left_alone(engine, 4)
    assert two.keys() == four.keys()
    assert [step for stage, step in two if stage == "stage1"] == list(range(1, STEPS + 1))
    for key, (loss, _) in two.items():
        assert four[key][0] == pytest.approx(loss, abs=TOLERANCE), key
    hosts = json.loads((runs.place / f"alone-{engine}-4" / "env.json").read_text())["ranks"]
    assert [rank["host"] for rank in hosts] == ["node1", "node2", "node3", "node4"]


def test_both_engines_agree(runs: Runs) -> None:
    zero, fsdp = runs.left_alone("zero2", 2), runs.left_alone("fsdp", 2)
    for key, (loss, _) in zero.items():
        assert fsdp[key][0] == pytest.approx(loss, abs=TOLERANCE), key
