"""The scripts under a real Slurm: scheduled as they are, and a tiny recipe to its end on several nodes.

Jobs that are preempted, requeued, cancelled, or lose a node end with the losses of the run that was left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from slurm_cluster import NODES, Cluster, Job, slowness, wait_for
from slurm_runs import ENGINES, G_SCRIPT, H_SCRIPT, STEPS, Losses, Runs, TinyRun
from tiny_runs import events

pytestmark = pytest.mark.slurm

STOP_AT = 12
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


def test_a_job_with_gpus_that_torch_cannot_use_is_refused(runs: Runs) -> None:
    """By the first rank that finds out, for all; training on the CPU would only be slow."""
    job = runs.submit("no-gpu", "--set", "device=auto").job
    fields = job.end()
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "64:0"), job.said()
    assert job.said().count("torch can use no GPU on node1") == 1
    assert "set device: cpu" in job.said()


def test_both_engines_agree(runs: Runs) -> None:
    zero, fsdp = runs.left_alone("zero2", 2), runs.left_alone("fsdp", 2)
    for key, (loss, _) in zero.items():
        assert fsdp[key][0] == pytest.approx(loss, abs=TOLERANCE), key


@pytest.fixture
def nodes_up(cluster: Cluster) -> Iterator[None]:
    """All nodes are idle again after a test that takes some down. One that Slurm has set down comes back by itself."""
    yield
    for number in range(1, NODES + 1):
        if not (cluster.state / "node" / f"node{number}").exists():
            cluster.control("boot", f"node{number}")
    wait_for_idle_nodes(cluster)


def wait_for_idle_nodes(cluster: Cluster) -> None:
    idle = ("sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N")
    wait_for("idle nodes", lambda: len(cluster.run(*idle).split()) == NODES, lambda: cluster.run("sinfo", "-N"))


def expect_same(run: TinyRun, alone: Losses) -> None:
    assert run.losses() == alone
    assert (run.directory / "result.json").exists()


def is_back(job: Job) -> None:
    """Until the job is over or waits after a requeue."""
    job.wait_until(lambda fields: fields["Restarts"] != "0" and fields["JobState"] != "COMPLETING", "its requeue")


@pytest.mark.fault(9)
def test_usr1_to_the_batch_shell_saves_and_requeues(runs: Runs, cluster: Cluster) -> None:
    """What the time limit's warning and a preemption send."""
    alone = runs.left_alone("fsdp", 2)
    run = runs.submit("usr1", *ENGINES["fsdp"])
    run.wait_for_step(STOP_AT)
    cluster.run("scancel", "--signal=USR1", "--batch", run.job.number)
    run.job.completes(restarts=1)
    assert len(events(run.directory, "preempted")) == 1
    [resumed] = [event for event in events(run.directory, "resume") if event["stage"] == "stage1"]
    assert resumed["step"] >= STOP_AT, "not from an older checkpoint: it was saved when asked"
    assert run.job.said().count("run directory") == 2, "the log is appended to"
    expect_same(run, alone)


def test_scontrol_requeue(runs: Runs, cluster: Cluster) -> None:
    """Slurm ends the step itself: TERM, and a few seconds to save."""
    alone = runs.left_alone("zero2", 2)
    run = runs.submit("requeued")
    run.wait_for_step(STOP_AT)
    cluster.run("scontrol", "requeue", run.job.number)
    run.job.completes(restarts=1)
    expect_same(run, alone)


def test_a_more_urgent_job_preempts(runs: Runs, cluster: Cluster) -> None:
    alone = runs.left_alone("zero2", 2)
    run = runs.submit("preempted")
    run.wait_for_step(STOP_AT)
    whole = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"]
    urgent = cluster.job(cluster.run("sbatch", "--parsable", *whole).strip(), run.job.output)
    assert urgent.end()["JobState"] == "COMPLETED"
    run.job.completes(restarts=1)
    expect_same(run, alone)


def test_a_cancelled_job_stays_cancelled_and_goes_on_when_submitted_again(runs: Runs, cluster: Cluster) -> None:
    alone = runs.left_alone("fsdp", 2)
    run = runs.submit("cancelled", *ENGINES["fsdp"])
    run.wait_for_step(STOP_AT)
    cluster.run("scancel", run.job.number)
    fields = run.job.end()
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    # The batch shell has a moment longer than the job in which it could requeue.
    wait_for_idle_nodes(cluster)
    assert run.job.fields()["JobState"] == "CANCELLED"
    again = runs.submit("cancelled", *ENGINES["fsdp"])
    again.job.completes()
    expect_same(again, alone)


def test_a_node_that_is_set_down(runs: Runs, cluster: Cluster, nodes_up: None) -> None:
    alone = runs.left_alone("zero2", 2)
    run = runs.submit("downed", options=["--nodelist=node1,node2"])
    run.wait_for_step(STOP_AT)
    cluster.run("scontrol", "update", "NodeName=node2", "State=down", "Reason=test")
    is_back(run.job)
    run.job.completes(restarts=1)
    expect_same(run, alone)


def test_a_node_without_power(runs: Runs, cluster: Cluster, nodes_up: None) -> None:
    """The job goes on, on whichever nodes are left."""
    alone = runs.left_alone("fsdp", 2)
    run = runs.submit("no-power", *ENGINES["fsdp"])
    run.wait_for_step(STOP_AT)
    cluster.control("kill", "node2")
    is_back(run.job)
    run.job.completes(restarts=1)
    expect_same(run, alone)


def test_kill_9_of_one_task_ends_the_job(runs: Runs, cluster: Cluster) -> None:
    """With the code of a lost rank; it is not requeued, and goes on when submitted again."""
    run = runs.submit("killed", *ENGINES["fsdp"], options=["--nodelist=node3,node4"])
    run.wait_for_step(STOP_AT)
    cluster.control("on", "node4", "sh", "-c", "kill -KILL $(pgrep -f 'python sfa_dist/train.py' | head -1)")
    fields = run.job.end(limit=40 * slowness())
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0"), run.job.said()
    assert fields["ExitCode"] == "137:0", "srun passes the highest code on: 128 + 9 of the one that was killed"
    assert "rank 1 on node4 was lost" in run.job.said()
    assert "Exited with exit code 70" in run.job.said()
    again = runs.submit("killed", *ENGINES["fsdp"])
    again.job.completes()
    expect_same(again, runs.left_alone("fsdp", 2))
