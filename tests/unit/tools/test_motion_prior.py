"""`sfa motion-prior`: a short form, made anew, and what the shipped one knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfa_dist.data.motion.stream import made_clips
from sfa_dist.models.image_vit import load_image_vit
from sfa_dist.models.vivit import Trunk, normalise
from sfa_dist.models.weights_file import checked_sha256, read_metadata
from sfa_dist.recipe.blocks import ModelBlock
from sfa_dist.recipe.shipped import weights_path
from sfa_dist.tools.cli import main
from sfa_dist.tools.motion_training import FRAMES, PIXELS, learning_rate, target_groups

DOCS = Path(__file__).parents[3] / "docs" / "motion_prior.md"
FITTED, NEW = range(2**41, 2**41 + 1024), range(2**41 + 1024, 2**41 + 1536)
# Of the head that was trained with the trunk, and of one that is fitted to far fewer clips.
STATED = {"position": 0.7, "displacement": 0.65, "ground": 0.6, "cover": 0.6}
PROBED = {"position": 0.5, "displacement": 0.5, "ground": 0.5, "cover": 0.5}


def trunk_from(source: str) -> Trunk:
    model = ModelBlock.model_validate({"size": "tiny", "classes": 2, "image_size": 32, "pooling": "gap"})
    trunk = Trunk(model)
    load_image_vit(trunk, source, PIXELS)
    return trunk.eval()


@torch.no_grad()
def linear_r2(trunk: Trunk, fitted: range, new: range) -> dict[str, float]:
    """What a linear probe on the frozen pooled vector tells of new generated clips."""
    groups: dict[str, float] = {}
    (x, wanted), (x_new, wanted_new) = (pooled(trunk, indices) for indices in (fitted, new))
    for name, y in wanted.items():
        weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype), x.T @ y.double())
        rest = (x_new @ weights - wanted_new[name]).square().sum()
        total = (wanted_new[name] - wanted_new[name].mean(dim=0)).square().sum()
        groups[name] = 1 - float(rest / total)
    return groups


def pooled(trunk: Trunk, indices: range) -> tuple[Tensor, dict[str, Tensor]]:
    clips, labels = made_clips(0, indices, FRAMES, 32)
    x = trunk.forward_tubelets(normalise(trunk.cut_tubelets(clips), *PIXELS, dtype=torch.float32)).double()
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1), target_groups(labels)


def test_the_shipped_one_is_the_stated_one_and_knows_motion() -> None:
    file = weights_path("sfa:motion-tiny")
    assert checked_sha256(file) in DOCS.read_text()
    facts = read_metadata(file)
    assert facts["command"].startswith("sfa motion-prior --out FILE --size motion-tiny --seed 0 --steps ")
    assert facts["licence"] == "Apache-2.0"
    stated = json.loads(facts["held_out_r2"])
    found = linear_r2(trunk_from("sfa:motion-tiny"), FITTED, NEW)
    for name in STATED:
        assert stated[name] > STATED[name]
        assert found[name] > PROBED[name], name


def test_the_same_seed_makes_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for name in ("a", "b"):
        assert main(["motion-prior", "--out", str(tmp_path / f"{name}.safetensors"), "--steps", "3", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["sha256"] == told[1]["sha256"] == checked_sha256(tmp_path / "a.safetensors")
    assert set(told[0]["held_out_r2"]) == {"position", "displacement", "ground", "cover", "flow"}
    trunk_from(str(tmp_path / "a.safetensors"))
    assert json.loads(read_metadata(tmp_path / "a.safetensors")["pixels"]) == [list(value) for value in PIXELS]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "a.pth"], "has to end with .safetensors"),
        (["--out", "there.safetensors"], "exists already"),
        (["--out", "a.safetensors", "--steps", "0"], "--steps has to be 1 or more"),
        (["--out", "a.safetensors", "--size", "motion-huge"], "motion-tiny"),
    ],
)
def test_a_wrong_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    assert main(["motion-prior", *words]) == 64
    assert says in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 200) for step in range(200)]
    assert rates.index(max(rates)) in (49, 50)
    assert rates[0] < rates[10] < rates[49]
    assert rates[199] < 0.03 * max(rates)
