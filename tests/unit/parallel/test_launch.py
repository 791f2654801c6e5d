"""Which rank a process is: read from torchrun, deepspeed, srun, or nothing; never guessed from a part."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sfa_dist.errors import LostRankError, UsageError
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.launch import Launch, nodes_of_ranks, read_launch

ROOT = Path(__file__).resolve().parents[3]

RENDEZVOUS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "TORCHELASTIC_RUN_ID": "none",
    **RENDEZVOUS,
}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_SIZE": "4", **RENDEZVOUS}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    **RENDEZVOUS,
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
ALONE = Launch("python", 0, 1, 0, 1)


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key not in names}


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(UsageError) as caught:
        read_launch(environ)
    assert caught.value.exit_code == 64
    return str(caught.value)


def test_torchrun() -> None:
    assert read_launch(TORCHRUN) == Launch("torchrun", 9, 16, 1, 8)


def test_deepspeed() -> None:
    assert read_launch(DEEPSPEED) == Launch("deepspeed", 3, 4, 3, 4)


def test_srun() -> None:
    assert read_launch(SRUN) == Launch("srun", 5, 8, 1, 4)


def test_srun_counts_the_steps_tasks_and_not_the_jobs() -> None:
    """`srun --ntasks 2` in an allocation of 8: SLURM_NTASKS may still say 8, and six ranks would never come."""
    assert read_launch({**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}).world_size == 2
    assert read_launch(without(SRUN, "SLURM_NTASKS")).world_size == 8
    assert read_launch(without(SRUN, "SLURM_STEP_NUM_TASKS")).world_size == 8


@pytest.mark.parametrize(("per_node", "expected"), [("4(x2)", 4), ("8", 8), ("4,2", 4), ("3(x2),1", 3)])
def test_srun_tasks_per_node(per_node: str, expected: int) -> None:
    assert read_launch({**SRUN, "SLURM_STEP_TASKS_PER_NODE": per_node}).local_world_size == expected


def test_torchrun_inside_srun_is_torchruns() -> None:
    assert read_launch({**SRUN, **TORCHRUN}) == Launch("torchrun", 9, 16, 1, 8)


def test_python_is_one_process() -> None:
    assert read_launch({}) == ALONE
    assert read_launch(RENDEZVOUS) == ALONE


def test_python_in_a_batch_script_is_one_process() -> None:
    """sbatch sets SLURM_NTASKS for the script too, where no other rank will come."""
    assert read_launch(BATCH_SCRIPT) == ALONE
    assert read_launch({**BATCH_SCRIPT, **RENDEZVOUS}) == ALONE


def test_srun_of_one_task_is_one_process() -> None:
    one = {**SRUN, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert read_launch(without(one, *RENDEZVOUS)) == ALONE


@pytest.mark.fault(61)
@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_a_launcher_that_says_half_is_refused(environ: dict[str, str], missing: str) -> None:
    assert missing in refusal(without(environ, missing))


@pytest.mark.fault(61)
@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT"])
def test_srun_that_says_half_is_refused(missing: str) -> None:
    assert missing in refusal(without(SRUN, missing))


def test_srun_without_a_rendezvous_says_where_to_get_one() -> None:
    assert "slurm/_common.sh" in refusal(without(SRUN, *RENDEZVOUS))


@pytest.mark.parametrize("key", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_rank_that_is_no_number_is_refused(key: str) -> None:
    assert key in refusal({**TORCHRUN, key: "one"})
    assert key in refusal({**TORCHRUN, key: ""})


@pytest.mark.parametrize("rank", ["0", "1"])
def test_others_that_do_not_come_are_a_lost_rank(rank: str) -> None:
    """Never a run of its own: two of those would write into one directory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.raises(LostRankError, match=rf"rank {rank} of 2 on .* 127.0.0.1:{port} .*1 s"):
        parallel_runtime.start({**place, "SFA_RENDEZVOUS_SECONDS": "1"})


@pytest.mark.fault(61)
def test_a_rank_outside_the_world_is_refused() -> None:
    assert "RANK" in refusal({**TORCHRUN, "RANK": "16"})


@pytest.mark.parametrize(
    ("launcher", "tells"), [("torchrun", [0, 2]), ("deepspeed", [0, 2]), ("srun", [0]), ("python", [0, 2])]
)
def test_an_error_of_all_ranks_is_told_once_a_console(launcher: str, tells: list[int]) -> None:
    """srun's output is one for all nodes."""
    ranks = [Launch(launcher, rank, 4, rank % 2, 2) for rank in range(4)]
    assert [launch.rank for launch in ranks if launch.prints_errors] == tells


def test_nodes_are_named_as_the_launcher_tells() -> None:
    launch = Launch("srun", 0, 4, 0, 2)
    assert nodes_of_ranks({"SFA_NODES": "a b"}, launch) == ("a", "a", "b", "b")
    assert nodes_of_ranks({"SFA_NODES": "a b c"}, launch) == ()
    assert nodes_of_ranks({}, launch) == ()


def test_nodes_are_read_from_the_command_line_that_deepspeed_starts() -> None:
    """Here of a child's parent; nodes may have different numbers of GPUs."""
    nodes = base64.urlsafe_b64encode(json.dumps({"a": [0], "b": [0, 1]}).encode()).decode()
    ask = (
        "from sfa_dist.parallel.launch import Launch, nodes_of_ranks\n"
        "print(*nodes_of_ranks({}, Launch('deepspeed', 0, 3, 0, 1)))"
    )
    start = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    words = [sys.executable, "-c", start, ask, f"--world_info={nodes}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "a b b\n", done.stderr
