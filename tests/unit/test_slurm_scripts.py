"""The Slurm scripts, run with stand-ins for Slurm's commands: environment, exit codes, requeue."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from sfa_dist.recipe.schema import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("vivit_*.sh"))
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)

# srun notes how it was called and ends with $FAKE_EXIT. Otherwise it stays until a USR1: with FAKE_EXIT=wait it saves
# for a moment then, with FAKE_EXIT=unready it is not ready for the signal and dies of it,
# with FAKE_EXIT=late it has ended a task that was late.
SRUN = """\
printf '%s\\n' "$@" > "$LOG/srun.args"
env > "$LOG/srun.env"
[ "$FAKE_EXIT" = wait ] && trap 'sleep 0.2; exit 75' USR1
[ "$FAKE_EXIT" = late ] && trap 'exit 143' USR1
case $FAKE_EXIT in [0-9]*) exit "$FAKE_EXIT" ;; esac
echo $$ > "$LOG/srun.pid.tmp" && mv "$LOG/srun.pid.tmp" "$LOG/srun.pid"
while :; do sleep 0.02; done
"""
SCONTROL = """\
echo "$@" >> "$LOG/scontrol"
case "$*" in
    "show hostnames node[7-8]") printf 'node7\\nnode8\\n' ;;
    "-o show job 12345"*) echo "JobId=123456 JobState=${FAKE_STATE:-RUNNING} Reason=None" ;;
    requeue*) exit "${FAKE_REQUEUE:-0}" ;;
    *) exit 1 ;;
esac
"""
SCANCEL = """\
echo "$@" >> "$LOG/scancel"
kill -USR1 "$(cat "$LOG/srun.pid")"
"""


@dataclass(frozen=True)
class Cluster:
    """A folder of stand-ins and what they noted."""

    root: Path
    log: Path
    env: Mapping[str, str]

    def noted(self, name: str) -> list[str]:
        path = self.log / name
        return path.read_text().splitlines() if path.exists() else []

    def handed_over(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.noted("srun.env") if "=" in line)

    def start(self, script: Path, *args: str, **env: str) -> subprocess.Popen[str]:
        copy = self.root / "spool" / "slurm_script"  # as sbatch does it
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(script, copy)
        full = {**self.env, **env}
        return subprocess.Popen(["bash", str(copy), *args], env=full, cwd=self.root, stderr=subprocess.PIPE, text=True)

    def run(self, script: Path, *args: str, **env: str) -> tuple[int, str]:
        process = self.start(script, *args, **env)
        _, stderr = process.communicate(timeout=15)
        return process.returncode, stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    binaries, log = tmp_path / "bin", tmp_path / "log"
    binaries.mkdir()
    log.mkdir()
    for name, body in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (binaries / name).write_text(f"#!/bin/bash\n{body}")
        (binaries / name).chmod(0o755)
    env = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "LOG": str(log),
        "FAKE_EXIT": "0",
        "SFA_CLUSTER_ENV": str(tmp_path / "cluster.env"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NAME": "test",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_CPUS_PER_TASK": "12",
    }
    (tmp_path / "cluster.env").write_text("")
    return Cluster(tmp_path, log, env)


# ------------------------------------------------------------------------------------------------ as text


@pytest.mark.parametrize(
    "script",
    [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / "tests" / "slurm" / "cluster.sh"],
    ids=lambda script: script.stem,
)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if SHELLCHECK is None:
        pytest.skip("no shellcheck")
    subprocess.run([SHELLCHECK, str(script)], check=True, cwd=ROOT)


@each
def test_scripts_ask_for_what_a_preempted_job_needs(script: Path) -> None:
    lines = script.read_text().splitlines()
    options = dict(
        re.fullmatch(r"#SBATCH --([\w-]+)(?:=(.*))?", line).groups() for line in lines if "#SBATCH --" in line
    )  # type: ignore[union-attr]
    assert options["job-name"] == script.stem
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["output"] == "%x-%j.out"
    assert options["open-mode"] == "append"
    assert options["signal"] == "B:USR1@120"
    assert {"nodes", "cpus-per-task", "time", "requeue"} <= set(options)
    assert not {"account", "partition", "qos"} & set(options), "sites differ"


@each
def test_scripts_name_a_recipe_of_their_name_and_there_is_one_srun(script: Path) -> None:
    recipe = f"recipes/{script.stem.removeprefix('vivit_')}.yaml"
    assert script.read_text().splitlines()[-1] == f'run_training --recipe {recipe} "$@"'
    assert (ROOT / recipe).is_file()
    common = (ROOT / "slurm" / "_common.sh").read_text()
    assert len(re.findall(r"^[^#]*\bsrun --", common, re.MULTILINE)) == 1


# ------------------------------------------------------------------------------------------------ in a job


@each
def test_the_environment_of_the_step(script: Path, cluster: Cluster) -> None:
    code, _ = cluster.run(script, "--set", "seed=1 2", RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", MASTER_PORT="1")
    assert code == 0
    recipe = f"recipes/{script.stem.removeprefix('vivit_')}.yaml"
    srun = ["--kill-on-bad-exit=1", "--cpu-bind=cores", "python", "sfa_dist/train.py"]
    assert cluster.noted("srun.args") == [*srun, "--recipe", recipe, "--set", "seed=1 2"]
    env = cluster.handed_over()
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node7", "23456")
    assert (env["OMP_NUM_THREADS"], env["SRUN_CPUS_PER_TASK"]) == ("12", "12")
    assert env["SFA_NODES"] == "node7 node8"
    assert env["PWD"] == str(ROOT)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(env), "a login shell's rank would be every task's"


def test_site_settings_and_venv(cluster: Cluster) -> None:
    venv = cluster.root / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").write_text("export VIRTUAL_ENV=$UNSET_IS_ALLOWED/here\n")
    site = f"export SFA_VENV={venv} SFA_PORT_BASE=30000 NCCL_SOCKET_IFNAME=ib0\n"
    (cluster.root / "cluster.env").write_text(site)
    assert cluster.run(SCRIPTS[0])[0] == 0
    env = cluster.handed_over()
    assert (env["VIRTUAL_ENV"], env["MASTER_PORT"], env["NCCL_SOCKET_IFNAME"]) == ("/here", "33456", "ib0")
    code, error = cluster.run(SCRIPTS[0], SFA_VENV="/nowhere", SFA_CLUSTER_ENV="/dev/null/none")
    assert (code, "SFA_CLUSTER_ENV" in error) == (64, True)


@pytest.mark.parametrize("code", [1, 65, 70, 74, 78, 137, 138, 143])
def test_exit_codes_are_passed_on_without_requeue(cluster: Cluster, code: int) -> None:
    assert cluster.run(SCRIPTS[0], FAKE_EXIT=str(code))[0] == code
    assert "requeue 123456" not in cluster.noted("scontrol")


def test_75_is_requeued_while_there_is_progress(cluster: Cluster) -> None:
    """At most SFA_MAX_REQUEUES in a row find the same checkpoints; another job's do not count."""
    run = cluster.root / "run"

    def stopped(job: str = "123456") -> tuple[bool, str]:
        before = len(cluster.noted("scontrol"))
        code, error = cluster.run(
            SCRIPTS[0], "--run-dir", str(run), FAKE_EXIT="75", SFA_MAX_REQUEUES="2", SLURM_JOB_ID=job
        )
        assert code == 75
        return f"requeue {job}" in cluster.noted("scontrol")[before:], error

    def save(path: str) -> None:
        (run / path).mkdir(parents=True)

    assert stopped()[0]
    assert stopped()[0]
    save("stage1/checkpoints/step-00000010")
    assert stopped()[0]
    assert stopped()[0]
    save("stage1/checkpoints/step-00000020.tmp")
    requeued, error = stopped()
    assert not requeued
    assert f"requeued 2 times without a new checkpoint in {run} (SFA_MAX_REQUEUES=2)" in error
    assert stopped(job="123457")[0]
    save("stage2")
    (run / "stage2" / "done.json").touch()
    assert stopped()[0]


def test_a_run_directory_below_a_cache_folder(cluster: Cluster) -> None:
    """What else is new in it, such as a log of each start, is no progress there either."""
    run = cluster.root / "cache" / "run"
    run.mkdir(parents=True)
    counts = []
    for start in range(3):
        (run / f"log-{start}").touch()
        cluster.run(SCRIPTS[0], "--run-dir", str(run), FAKE_EXIT="75")
        counts.append((run / "requeues").read_text().split()[1])
    assert counts == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--recipe", "{here}/mine.yaml"], "runs/mine"),
        (["--recipe={here}/named.yaml"], "runs/own"),
        (["--recipe={here}/based.yaml"], "runs/based"),
        (["--recipe={here}/words.yaml"], "runs/my run"),
        (["--recipe={here}/quoted.yaml"], "runs/run # 1"),
        (["--recipe", "{here}/named.yaml", "--set", "name=other"], "runs/other"),
        (["--recipe", "{here}/named.yaml", "--run-dir", "a", "--run-dir={here}/b c"], "{here}/b c"),
    ],
)
def test_progress_is_looked_for_where_train_py_has_the_run(cluster: Cluster, arguments: list[str], folder: str) -> None:
    (cluster.root / "slurm").symlink_to(ROOT / "slurm")
    (cluster.root / "mine.yaml").touch()
    (cluster.root / "named.yaml").write_text("seed: 1\nname: 'own' # not named\n")
    (cluster.root / "based.yaml").write_text(f"_base_: [named.yaml, {ROOT}/recipes/demo.yaml]\n")
    (cluster.root / "words.yaml").write_bytes(b"seed: 1\r\nname: my run # it is\r\n")
    (cluster.root / "quoted.yaml").write_text('name: "run # 1" # it is\n')
    given = [word.format(here=cluster.root) for word in arguments]
    assert cluster.run(SCRIPTS[0], *given, FAKE_EXIT="75", SFA_ROOT=str(cluster.root))[0] == 75
    assert (cluster.root / folder.format(here=cluster.root) / "requeues").read_text().startswith("123456 1 ")
    if arguments == ["--recipe={here}/based.yaml"]:
        assert load_recipe(cluster.root / "based.yaml").recipe.name == "based"


def test_a_task_of_an_array_signals_and_requeues_itself_alone(cluster: Cluster) -> None:
    """Slurm gives the array's own number to its last task too."""
    array = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3"}
    process = cluster.start(SCRIPTS[0], *in_root(cluster), FAKE_EXIT="wait", **array)
    wait_for(cluster.log / "srun.pid")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=10)
    assert cluster.noted("scancel") == ["--signal=USR1 123456_3"]
    assert cluster.noted("scontrol")[-1] == "requeue 123456_3"


def test_what_a_site_adds_to_the_step(cluster: Cluster) -> None:
    (cluster.root / "cluster.env").write_text(
        "SFA_CONTAINER='apptainer exec --nv sfa.sif' SFA_SRUN_OPTIONS=--mpi=none SFA_CPU_BIND=none\n"
        "SFA_STAGE_DIR=/local/$SLURM_JOB_ID SFA_STAGE_GIB=80\n"
    )
    assert cluster.run(SCRIPTS[0], "--set", "seed=1")[0] == 0
    assert " ".join(cluster.noted("srun.args")) == (
        "--kill-on-bad-exit=1 --cpu-bind=none --mpi=none apptainer exec --nv sfa.sif python sfa_dist/train.py "
        "--set data.remote.cache_dir=/local/123456 --set data.remote.stage=true --set data.remote.cache_gib=80 "
        "--recipe recipes/g_48f.yaml --set seed=1"
    )


def test_a_cancelled_job_stays_cancelled(cluster: Cluster) -> None:
    code, error = cluster.run(SCRIPTS[0], *in_root(cluster), FAKE_EXIT="75", FAKE_STATE="COMPLETING")
    assert (code, "no requeue from here" in error) == (75, True)
    assert "requeue 123456" not in cluster.noted("scontrol")


def test_a_refused_requeue_says_what_to_do(cluster: Cluster) -> None:
    code, error = cluster.run(SCRIPTS[0], *in_root(cluster), FAKE_EXIT="75", FAKE_REQUEUE="1")
    assert (code, "submit the same script again" in error) == (75, True)


@pytest.mark.parametrize("stop", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(("step", "code"), [("wait", 75), ("unready", 138), ("late", 143)])
def test_a_stop_is_forwarded_and_the_job_requeued_after_the_save(
    cluster: Cluster, stop: signal.Signals, step: str, code: int
) -> None:
    process = cluster.start(SCRIPTS[0], *in_root(cluster), FAKE_EXIT=step)
    wait_for(cluster.log / "srun.pid")
    process.send_signal(stop)
    process.communicate(timeout=10)
    assert process.returncode == code
    assert cluster.noted("scancel") == ["--signal=USR1 123456"]
    assert cluster.noted("scontrol")[-1] == "requeue 123456"


def test_a_stop_before_the_step_starts_none(cluster: Cluster) -> None:
    started = cluster.root / "started"
    (cluster.root / "cluster.env").write_text(f"touch {started}; while [[ ! -e {started}.go ]]; do sleep 0.02; done\n")
    process = cluster.start(SCRIPTS[0], *in_root(cluster))
    wait_for(started)
    process.send_signal(signal.SIGUSR1)
    Path(f"{started}.go").touch()
    process.communicate(timeout=10)
    assert (process.returncode, cluster.noted("srun.args")) == (75, [])
    assert cluster.noted("scontrol")[-1] == "requeue 123456"


def in_root(cluster: Cluster) -> list[str]:
    """The run directory among the test's own files."""
    return ["--run-dir", str(cluster.root / "run")]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def test_wrong_places_are_named(cluster: Cluster) -> None:
    code, error = cluster.run(SCRIPTS[0], SLURM_SUBMIT_DIR=str(cluster.root))
    assert (code, f"{cluster.root} is not the repository" in error) == (64, True)
    assert cluster.run(SCRIPTS[0], SLURM_SUBMIT_DIR=str(cluster.root), SFA_ROOT=str(ROOT))[0] == 0
    for form in (["--recipe", "recipes/none.yaml"], ["--recipe=recipes/none.yaml"]):
        code, error = cluster.run(SCRIPTS[0], *form)
        assert (code, "no recipe recipes/none.yaml" in error) == (78, True)
    code, error = cluster.run(SCRIPTS[0], SLURM_JOB_ID="")
    assert (code, "sbatch" in error) == (64, True)
