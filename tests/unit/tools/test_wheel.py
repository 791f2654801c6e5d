"""A wheel has all that a user needs: recipes by name, Slurm scripts, a decoder; a clone is not asked for."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sfa_dist.recipe.shipped import find_recipe, shipped_recipes
from sfa_dist.tools.cli import main as sfa

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("recipes", "slurm", "sfa_dist")
SECRET = "S3cr3tMark"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel of this clone puts into site-packages."""
    clone = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        shutil.copy(ROOT / name, clone)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "slurm" / "cluster.env").write_text(f"export TOKEN={SECRET}\n")
    command = [*(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")]
    subprocess.run([*command, "--wheel-dir", clone / "out", clone], check=True, cwd=clone)
    [wheel] = (clone / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(clone / "site")
    return clone / "site"


def run(site: Path, folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", **environ}
    command = [sys.executable, "-m", "sfa_dist.tools.cli", *words]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def test_it_holds_what_the_clone_holds(site: Path) -> None:
    for folder in FOLDERS:
        own = {file.relative_to(ROOT / folder) for file in (ROOT / folder).rglob("*") if file.is_file()}
        own -= {file for file in own if "__pycache__" in file.parts or file.name == "cluster.env"}
        there = site / "sfa_dist" if folder == "sfa_dist" else site / "sfa_dist" / folder
        assert not [file for file in own if not (there / file).is_file()]
    assert not list(site.rglob("cluster.env"))
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"sfa_dist"}


def test_commands_of_a_wheel_find_the_recipes_by_name(site: Path, tmp_path: Path) -> None:
    listed = run(site, tmp_path, "recipes", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert list(rows) == shipped_recipes()
    assert rows["recipes/h_96f.yaml"]["file"] == str(site / "sfa_dist" / "recipes" / "h_96f.yaml")
    (tmp_path / "mine.yaml").write_text("_base_: recipes/demo.yaml\nseed: 5\n")
    printed = run(site, tmp_path, "train", "--recipe", "mine.yaml", "--print-recipe")
    assert printed.returncode == 0, printed.stderr
    assert "seed: 5  # mine.yaml:2" in printed.stdout
    assert f"# {site}/sfa_dist/recipes/demo.yaml:" in printed.stdout


def test_a_job_of_a_wheel_runs_the_package_in_the_present_folder(site: Path, tmp_path: Path) -> None:
    submitted = run(site, tmp_path, "submit", "--recipe", "recipes/h_96f.yaml", "--nodes", "2", SFA_CLUSTER_ENV="")
    assert submitted.returncode == 0, submitted.stderr
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", 'printf "%s\\n" "$PWD" "$@" >words'), ("scontrol", "echo node1")):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    environ = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node1"}
    done = subprocess.run(["bash"], input=submitted.stdout, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, *words = (tmp_path / "words").read_text().splitlines()
    assert folder == str(tmp_path)
    recipe = str(site / "sfa_dist" / "recipes" / "h_96f.yaml")
    assert words == ["--kill-on-bad-exit=1", "--cpu-bind=cores", "python", "-m", "sfa_dist.train", "--recipe", recipe]


def test_recipes_of_ones_own_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("recipes/demo.yaml")) == ROOT / "recipes" / "demo.yaml"
    for name in ("demo.yaml", "recipes/none.yaml", "recipes/../setup.cfg", "/recipes/demo.yaml", "recipes"):
        assert find_recipe(Path(name)) == Path(name)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text("seed: 1\n")
    assert find_recipe(Path("recipes/demo.yaml")) == Path("recipes/demo.yaml")


def test_the_list_names_each_with_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert sfa(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_recipes()
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_a_plain_install_has_both_decoders() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    needs = settings["options"]["install_requires"].split("\n")
    assert [line.partition(">")[0] for line in needs if line.startswith(("av", "torchcodec"))] == ["av", "torchcodec"]
