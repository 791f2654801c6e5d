"""`sfa submit`: what it prints, that it is what slurm/ holds, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfa_dist.tools.cli import main as sfa
from sfa_dist.tools.slurm_script import SUBMIT_FOLDER

ROOT = Path(__file__).resolve().parents[3]
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
STAGES = """\
_base_: {root}/recipes/l_128f_cached.yaml
data: {{train: [a.tar], val: [b.tar], test: [b.tar]}}
"""


@pytest.fixture(autouse=True)
def no_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this machine's slurm/cluster.env says does not matter here."""
    monkeypatch.setenv("SFA_CLUSTER_ENV", str(tmp_path / "none.env"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(STAGES.format(root=ROOT))
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, severity: str = "style") -> str:
    assert sfa(["submit", *map(str, arguments)]) == 0
    text = capsys.readouterr().out
    if SHELLCHECK is not None:
        subprocess.run([SHELLCHECK, f"--severity={severity}", "-"], input=text, text=True, check=True)
    return text


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    assert sfa(["submit", *map(str, arguments)]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def commands(text: str) -> list[str]:
    """The lines that are no comment; #SBATCH lines are none."""
    return [line for line in text.splitlines() if re.match(r"#SBATCH|[^#]", line)]


@pytest.mark.parametrize(("name", "nodes"), [("g_48f", 4), ("h_96f", 2)])
def test_the_scripts_of_the_repository_are_what_it_prints(
    capsys: pytest.CaptureFixture[str], name: str, nodes: int
) -> None:
    recipe = ROOT / "recipes" / f"{name}.yaml"
    text = printed(capsys, "--recipe", recipe, "--nodes", nodes, "--name", f"vivit_{name}")
    # Theirs is found from where they are submitted.
    text = text.replace(f"SFA_ROOT:-{ROOT}}}", f"SFA_ROOT:-{SUBMIT_FOLDER}}}")
    assert commands(text) == commands((ROOT / "slurm" / f"vivit_{name}.sh").read_text())


def test_options_go_where_slurm_and_train_py_read_them(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    text = printed(
        *(capsys, "--recipe", recipe, "--set", "seed=3", "--run-dir", recipe.parent / "a b", "--stage", "stage1"),
        *("--nodes", 3, "--gpus-per-node", 4, "--cpus-per-task", 6, "--time", "2-12:00:00", "--sbatch=--mem=0"),
        *("--account", "lab", "--partition", "gpu,long", "--qos", "high"),
    )
    directives = re.findall(r"#SBATCH --([\w-]+)(?:=(.*))?", text)
    expected = {"job-name": "mine", "nodes": "3", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "6"}
    expected |= {"time": "2-12:00:00", "account": "lab", "partition": "gpu,long", "qos": "high", "mem": "0"}
    assert expected.items() <= dict(directives).items()
    last = text.splitlines()[-1]
    assert last == (
        f"run_training --recipe {recipe} --set seed=3 --run-dir '{recipe.parent}/a b' --stage stage1 \"$@\""
    )


def test_a_printed_script_has_the_sites_account(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --submit has it; what the command line says wins, and other lines of the file are not run."""
    settings = tmp_path / "cluster env"
    settings.write_text("LAB=x\nexport SBATCH_ACCOUNT=lab_$USER\n SBATCH_PARTITION='gpu'\nexit 3\n")
    monkeypatch.setenv("SFA_CLUSTER_ENV", str(settings))
    monkeypatch.setenv("USER", "me")
    text = printed(capsys, "--recipe", recipe, "--partition", "long", "--sbatch=--comment=two words # and a mark")
    assert "#SBATCH --account=lab_me\n" in text
    assert "#SBATCH --partition=long\n" in text
    assert "--partition=gpu" not in text
    assert "--qos" not in text
    assert "#SBATCH '--comment=two words # and a mark'\n" in text


def test_a_chain_waits_stage_by_stage(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    text = printed(capsys, "--recipe", recipe, "--nodes", 4, "--chain", "--stage-nodes", "test=1", "--account", "lab")
    calls = re.findall(r"^job\d=\$\(submit (.*)\)$", text, re.MULTILINE)
    names = [re.search(r"--job-name=mine-(\S+)", call)[1] for call in calls]  # type: ignore[index]
    assert names == ["stage1", "cache", "stage2", "test"]
    assert [re.search(r"--nodes=(\d+)", call)[1] for call in calls] == ["4", "4", "4", "1"]  # type: ignore[index]
    waits = [re.search(r"--dependency=\w+:\$\w+", call) for call in calls]
    assert [wait and wait[0] for wait in waits] == [None, *(f"--dependency=afterok:$job{n}" for n in range(3))]
    assert [call.partition('"$script"')[2].strip() for call in calls] == [
        *("--stage stage1", "--stage cache", "--stage stage2", ""),
    ]
    assert all("--account=lab" in call for call in calls), "an SBATCH_ACCOUNT of the shell would win over #SBATCH"


def test_given_weights_and_live_trunks_need_no_jobs(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    given = ["--set", "stage1.weights=w.safetensors", "--set", "stage2.cache=null"]
    text = printed(capsys, "--recipe", recipe, "--chain", *given)
    assert re.findall(r"--job-name=mine-(\S+)", text) == ["stage2", "test"]


def test_seeds_and_values_are_tasks_of_an_array(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    text = printed(
        *(capsys, "--recipe", recipe, "--run-dir", "/runs/a", "--seeds", "0-1,7", "--at-once", 2),
        *("--vary", "stage2.optimizer.lr=0.1,0.2"),
    )
    assert "#SBATCH --array=0-5%2\n" in text
    assert "#SBATCH --output=%x-%A_%a.out\n" in text
    tasks = re.findall(r"^    (\d)\) variant=\((.*)\) ;;$", text, re.MULTILINE)
    pairs = [(lr, seed) for lr in ("0.1", "0.2") for seed in ("0", "1", "7")]
    assert tasks == [
        (
            str(number),
            f"--set stage2.optimizer.lr={lr} --set seed={seed} --run-dir /runs/a-stage2.optimizer.lr-{lr}_seed-{seed}",
        )
        for number, (lr, seed) in enumerate(pairs)
    ]
    assert text.splitlines()[-1] == f'run_training --recipe {recipe} "${{variant[@]}}" "$@"'
    chain = printed(capsys, "--recipe", recipe, "--seeds", "0-1", "--chain")
    assert "--dependency=aftercorr:$job0" in chain


def test_values_that_are_lists(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    text = printed(capsys, "--recipe", recipe, "--vary", "augment.scale_jitter=[0.9,1.1],[0.8, 1.2],null")
    found = re.findall(r"variant=\(--set '?(.*?)'? --run-dir", text)
    assert found == [f"augment.scale_jitter={value}" for value in ("[0.9,1.1]", "[0.8, 1.2]", "null")]


@pytest.mark.parametrize(
    ("code", "options", "says"),
    [
        (78, ["--set", "stage2.framse=8"], "framse"),
        (78, ["--vary", "stage2.frames=32,33"], "33 is not a multiple"),
        (64, ["--nodes", "0"], "--nodes"),
        (64, ["--time", "noon"], "--time 'noon'"),
        (64, ["--partition", "a b"], "--partition"),
        (64, ["--sbatch", "mem=0"], "--sbatch"),
        (64, ["--seeds", "4-1"], "--seeds"),
        (64, ["--seeds", "1,1"], "same run directory"),
        (64, ["--vary", "seed"], "--vary"),
        (64, ["--at-once", "2"], "--at-once"),
        (64, ["--stage-nodes", "stage1=2"], "--chain"),
        (64, ["--chain", "--stage-nodes", "image=2"], "stage1, cache, stage2, test"),
        (64, ["--chain", "--stage-nodes", "stage1=none"], "--stage-nodes"),
        (64, ["--chain", "--stage", "stage1"], "--stage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], recipe: Path, code: int, options: list[str], says: str
) -> None:
    assert says in refused(capsys, code, "--recipe", recipe, *options)


TRICKS = (
    *("a\nEND_OF_JOB\ntouch PWNED\n", "$(touch PWNED)", "`touch PWNED`", "'; touch PWNED; '", '"; touch PWNED; "'),
    *("a\n#SBATCH --wrap=x\nb", "%x%j", "two  words", "-rf", "\\\n", "${HOME}", "a'b\"c", "!!", "é", "*", "~", "#"),
    *("a\nEND_OF_JOB\nEND_OF_JOB_0000\n", "\n\n"),
)
COMMON = """\
run_training() { printf '%s\\0' "$@" >"$SFA_ROOT/words"; }
"""


@pytest.mark.parametrize("chain", [False, True], ids=["job", "chain"])
def test_every_argument_comes_to_train_py_as_it_was_given(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, chain: bool
) -> None:
    """And nothing of it is run, on the login node or in the job."""
    tricks = [f"deepspeed.k{number}={json.dumps(trick)}" for number, trick in enumerate(TRICKS)]
    tricks += [f"deepspeed.r=[x,\n{trick.strip()!r}]" for trick in ("END_OF_JOB", "touch PWNED")]
    odd = tmp_path / "-o'd\nEND_OF_JOB\n#SBATCH --wrap=x\n$(touch PWNED)"
    odd.mkdir()
    shutil.copy(recipe, odd / "-mine.yaml")
    words = [word for trick in ["name=job", *tricks] for word in ("--set", trick)]
    text = printed(
        *(capsys, "--recipe", odd / "-mine.yaml", "--name", "job", "--run-dir", odd / "runs", *words),
        *(["--chain"] if chain else []),
        severity="warning",  # What does not expand in quotes is meant so.
    )
    home = tmp_path / "home"
    (home / "slurm").mkdir(parents=True)
    (home / "slurm" / "_common.sh").write_text(COMMON)
    (home / "sbatch").write_text('#!/bin/bash\nfor last; do [[ -f $last ]] && exec bash "$last"; done\n')
    (home / "sbatch").chmod(0o755)
    environ = {"PATH": f"{home}:/usr/bin:/bin", "SFA_ROOT": str(home)}
    subprocess.run(["bash"], input=text, text=True, check=True, cwd=tmp_path, env=environ, capture_output=True)
    expected = ["--recipe", str(odd / "-mine.yaml"), *words, "--run-dir", str(odd / "runs")]
    assert (home / "words").read_text().split("\0")[:-1] == expected
    assert not list(tmp_path.rglob("PWNED"))
    read_by_slurm = text[: text.index("SFA_ROOT=$")]  # Up to the first command.
    assert chain or read_by_slurm.count("\n#SBATCH --") == 10
    assert "--wrap" not in re.sub("^# .*", "", read_by_slurm, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "options",
    [
        *(["--name", name] for name in ("a b", "a\nb", "../x", "%x", "-x", "$(x)", "", "a;b", "'")),
        *(["--account", value] for value in ("a b", "a\n#SBATCH --wrap=x", "$(x)", "`x`", "")),
        *(["--partition", "a\nb"], ["--qos", "a b"], ["--time", "1\n"], ["--time", "١"]),
        *(["--sbatch=--mem=0\n#SBATCH --wrap=x"], ["--sbatch=--mem=0\r"], ["--sbatch=-é"]),
        *(["--seeds", "9" * 5000], ["--seeds", "0-1\n"], ["--vary", "seed=" + ",".join(map(str, range(10_001)))]),
        *(["--vary", "name=" + "x" * 250], ["--run-dir", "a\rb"], ["--stage-nodes", "stage1=1\n", "--chain"]),
    ],
    ids=lambda options: repr(" ".join(options))[:40],
)
def test_values_that_a_script_cannot_hold(capsys: pytest.CaptureFixture[str], recipe: Path, options: list[str]) -> None:
    refused(capsys, 64, "--recipe", recipe, *options)


def test_tasks_stay_beside_their_run(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    text = printed(capsys, "--recipe", recipe, "--run-dir", "/runs/a", "--vary", "deepspeed.a/b=../../x,y")
    assert re.findall(r"--run-dir (\S+)\)", text) == ["/runs/a-deepspeed.a_b-.._.._x", "/runs/a-deepspeed.a_b-y"]


def test_a_path_is_no_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfa_dist.tools.submit.is_repository", lambda root: False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(recipe, "-mine.yaml")
    text = printed(capsys, "--recipe=-mine.yaml", "--run-dir=-runs", "--name", "x", "--set", "name=x")
    assert text.splitlines()[-1] == 'run_training --recipe ./-mine.yaml --set name=x --run-dir ./-runs "$@"'


def test_a_site_value_of_several_lines_is_refused(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cluster.env").write_text("SBATCH_ACCOUNT=$'lab\\ngpu'\n")
    monkeypatch.setenv("SFA_CLUSTER_ENV", str(tmp_path / "cluster.env"))
    assert "--account 'lab\\ngpu'" in refused(capsys, 64, "--recipe", recipe)


SBATCH = """\
#!/bin/bash
[ -z "$REFUSE" ] || { echo "sbatch: error: no such partition" >&2; exit 1; }
for last; do case $last in /*) script=$last ;; esac; done
echo "$SBATCH_ACCOUNT|$*" | sed "s|$script|SCRIPT|" >>"$SBATCH_LOG"
echo "1$(wc -l <"$SBATCH_LOG");cluster"
"""


def test_submit_submits_what_is_printed(
    capfd: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH)
    program.chmod(0o755)
    (tmp_path / "cluster.env").write_text("export SBATCH_ACCOUNT=lab\nexit 3\n")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("SFA_CLUSTER_ENV", str(tmp_path / "cluster.env"))
    assert sfa(["submit", "--recipe", str(recipe), "--chain", "--stage-nodes", "stage1=2", "--submit"]) == 0
    assert "mine-stage1: job 11\nmine-cache: job 12\n" in capfd.readouterr().out
    first, second, *_ = (tmp_path / "log").read_text().splitlines()
    assert first == "lab|--parsable --job-name=mine-stage1 --nodes=2 SCRIPT --stage stage1"
    assert second == (
        "lab|--parsable --job-name=mine-cache --nodes=1 --dependency=afterok:11 --kill-on-invalid-dep=yes SCRIPT "
        "--stage cache"
    )
    monkeypatch.setenv("REFUSE", "1")
    assert sfa(["submit", "--recipe", str(recipe), "--submit"]) == 64
    assert capfd.readouterr().err == "error: sbatch refused the job: sbatch: error: no such partition\n"
    monkeypatch.setenv("PATH", "/nowhere")
    assert sfa(["submit", "--recipe", str(recipe), "--submit"]) == 64
    assert "login node" in capfd.readouterr().err
