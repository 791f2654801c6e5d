"""`sfa show` writes a sheet of each augmentation that is on, and its columns are what training sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import write_shards
from PIL import Image

from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import train_loader
from sfa_dist.data.sampling.clip_sampling import spread_frames
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.recipe.blocks import BatchBlock
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.tools.cli import main
from sfa_dist.tools.contact_sheet import Column, draw_sheet
from sfa_dist.tools.show_sheets import Show, drawn_clip

ALWAYS = {"sampling", "looping", "scale_jitter", "chain", "test_views"}
COLOUR = "augment: {flip: 0.5, color: 0.8, gray: 0.1}"
STRONG = (
    "augment: {flip: 0.0, color: 0.0, gray: 0.0, rand_augment: {layers: 2, magnitude: 20}, mixup: {alpha: 0.3}}\n"
    "seed: 5"
)
RECIPE = """\
model: {size: tiny, classes: 3, image_size: 24, temporal_depth: 1}
data: {train: ["shards/*.tar"], stride: 1, resize: 28, workers: 2, decoder: pyav}
batch: {size: 4, micro: 2}
optimizer: {lr: 0.1}
schedule: {epochs: 1}
stage1: {frames: 4}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [4])
    for name, augment in (("colour", COLOUR), ("strong", STRONG)):
        (tmp_path / f"{name}.yaml").write_text(f"{augment}\n{RECIPE}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "own"),
    [("colour", {"flip", "color", "gray"}), ("strong", {"rand_augment", "operations", "mixup"})],
)
def test_a_sheet_of_each_augmentation_that_is_on(
    place: Path, recipe: str, own: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "--recipe", f"{recipe}.yaml", "--out", "figures", "--draws", "3", "--rows", "2"]) == 0
    written = {path.stem: path for path in (place / "figures").glob("*.png")}
    assert set(written) == ALWAYS | own
    assert len(capsys.readouterr().out.splitlines()) == len(written)
    for path in written.values():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, path  # Not an empty page.
    assert Image.open(written["chain"]).width == 450  # Three columns.


def test_drawn_clips_need_no_shards(place: Path) -> None:
    (place / "none.yaml").write_text(f"{COLOUR}\n{RECIPE}".replace("shards/*.tar", "nowhere/*.tar"))
    command = ["show", "--recipe", "none.yaml", "--out", "figures", "--draws", "1", "--rows", "1"]
    assert main(command) == 65
    assert main([*command, "--generated"]) == 0
    assert (place / "figures" / "chain.png").is_file()


def test_videos_far_shorter_than_a_clip(place: Path) -> None:
    """As those of Something-Something are: 8 frames at 10 a second are 3 at 4, and a clip has 16."""
    settings = ["--set", "stage1.frames=16", "--set", "data.fps=4"]
    assert main(["show", "--recipe", "colour.yaml", "--out", "figures", "--draws", "2", "--rows", "2", *settings]) == 0
    assert (place / "figures" / "looping.png").is_file()


def test_what_cannot_be_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["show", "--recipe", "colour.yaml", "--out", "figures"]
    for own, code, words in (
        (["--stage", "stage2"], 78, "no such stage (it has stage1)"),
        (["--rows", "0"], 64, "must be greater than 0"),
        (["--set", "data.train=[]"], 78, "names no shards"),
    ):
        assert main([*command, *own]) == code
        assert words in capsys.readouterr().err


def sheets(place: Path, recipe: str) -> dict[str, list[Column]]:
    loaded = load_recipe(place / f"{recipe}.yaml").recipe
    assert loaded.stage1 is not None
    index = load_index(sorted((place / "shards").glob("*.tar")))
    return {name: columns for name, _, columns in Show(loaded.stage1, loaded.seed, index, 3, 4).sheets()}


def test_the_chain_is_what_training_sees(place: Path) -> None:
    stage = load_recipe(place / "colour.yaml").recipe.stage1
    assert stage is not None
    index = load_index(sorted((place / "shards").glob("*.tar")))
    data = stage.data.model_copy(update={"workers": 0})
    for epoch, column in enumerate(sheets(place, "colour")["chain"]):
        settings = LoaderSettings(data, BatchBlock(size=4, micro=4), stage.augment, frames=4, crop=24)
        batches = list(train_loader(index, settings, epoch=epoch))
        row = batches[0].ids.tolist().index(0)
        assert torch.equal(column.frames, batches[0].clips[row].permute(1, 2, 3, 0))


def test_each_sheet_shows_its_augmentation_alone(place: Path) -> None:
    colour, strong = sheets(place, "colour"), sheets(place, "strong")
    plain, flipped = (column.frames for column in colour["flip"])
    assert torch.equal(flipped, plain.flip(-2))
    for column in colour["gray"]:
        assert (column.frames == column.frames[..., :1]).all()
    for column in colour["sampling"]:
        first = int(column.notes[0].split()[0])
        assert column.notes == [f"{first + n} of 8" for n in range(4)]
    assert {note.split()[-1] for column in colour["looping"] for note in column.notes} == {"2"}
    titles = [column.title for column in strong["operations"]]
    assert (len(titles), titles[-1]) == (12, "identity")
    clip, partner, one, two = (column.frames.double() for column in strong["mixup"][:4])
    share = float(strong["mixup"][2].title.split()[0])
    assert (one - (share * clip + (1 - share) * partner)).abs().max() < 3  # The title has two digits.
    assert (one + two - clip - partner).abs().max() <= 1


def test_a_drawn_clip_is_no_mirror_image_and_moves() -> None:
    clip = drawn_clip(0, frames=10)
    assert (clip.shape, clip.dtype) == ((10, 256, 340, 3), np.uint8)
    assert (clip != clip[:, :, ::-1]).any()
    assert all((clip[n] != clip[n + 1]).any() for n in range(9))
    assert (drawn_clip(1, frames=1) != clip[:1]).any()


def test_frames_are_spread_from_first_to_last(tmp_path: Path) -> None:
    assert spread_frames(128, 4) == [0, 42, 85, 127]
    assert spread_frames(2, 5) == [0, 1]
    frames = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    assert draw_sheet(tmp_path / "a" / "b.png", "t", [Column("c", frames)], 2) == tmp_path / "a" / "b.png"
