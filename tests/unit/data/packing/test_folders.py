"""Sources with files of every kind: nothing is passed over without a word, whatever it is called."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import av
import pytest
from data_samples import encode, video_bytes

from sfa_dist.data.packing.annotations import read_rows
from sfa_dist.data.packing.pack import pack
from sfa_dist.data.packing.pack_settings import PackSettings
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.data.video.file_kinds import foreign_kind, stored_suffix, to_mp4, unreadable
from sfa_dist.errors import DataError


def put(path: Path, frames: int = 5, container: str = "mp4") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video_bytes(frames, container=container))
    return path


def packed(out: Path) -> tuple[list[str], list[str]]:
    """Suffixes and class names in the shards."""
    index = load_index(expand_shards([str(out / "*.tar")]))
    assert isinstance(index.classes, list)
    return sorted(index.suffix), index.classes


def test_files_are_packed_by_their_kind_and_not_by_their_name(tmp_path):
    source = tmp_path / "videos"
    put(source / "jump" / "a.m4v", 5)
    put(source / "jump" / "b.3GP", 6)
    put(source / "jump" / "without suffix", 7)
    put(source / "jump" / "d.mpg", 8)  # an mp4 all the same
    put(source / "run" / "e.MOV", 9)
    put(source / "run" / "f.mp4", 10, "matroska")
    put(source / "run" / "g.divx", 11, "avi")
    report = pack(source, tmp_path / "out")
    assert report["packed"] == 7
    assert packed(tmp_path / "out") == (["avi", "mkv", "mov", "mp4", "mp4", "mp4", "mp4"], ["jump", "run"])
    rows = "".join(f"{path.relative_to(source)},{path.parent.name}\n" for path in sorted(source.rglob("*.*")))
    (source / "list.csv").write_text("path,label\n" + rows)
    assert pack(source / "list.csv", tmp_path / "table")["packed"] == 6
    assert packed(tmp_path / "table")[0] == ["avi", "mkv", "mov", "mp4", "mp4", "mp4"]


FOREIGN = {"mpegts": "ts", "flv": "flv", "mpeg": "mpg", "asf": "wmv"}


def foreign(container: str) -> bytes:
    return encode_as(container, "mpeg1video" if container == "mpeg" else "libx264")


def encode_as(container: str, codec: str) -> bytes:
    import io

    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(6):
            out.mux(stream.encode(av.VideoFrame(48, 32, "yuv420p")))
        out.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(("container", "suffix"), FOREIGN.items())
def test_other_kinds_are_named_with_a_command_that_mends_them(tmp_path, container, suffix):
    """`pack` and every decoder (so `predict` too) say the same."""
    name = tmp_path / f"it's a clip.{suffix}"
    name.write_bytes(foreign(container))
    assert not stored_suffix(name.read_bytes(), suffix)
    (tmp_path / "list.csv").write_text(f'path,label\n"{name.name}",x\n')
    with pytest.raises(
        DataError, match=r"1 corrupt of 1 clips.*but an? .*; this makes an mp4 to put in its place: ffmpeg -i "
    ) as caught:
        pack(tmp_path / "list.csv", tmp_path / "out")
    assert caught.value.report is not None
    [entry] = caught.value.report["corrupt"]
    command = entry["reason"][entry["reason"].index("ffmpeg") :]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert choose_decoder().open(name.with_suffix(".mp4").read_bytes()).num_frames == 6


def test_what_other_files_are():
    assert "ffmpeg" in unreadable(b"GIF89a...", "x.gif")
    assert foreign_kind(b"RIFF\0\0\0\0WEBPVP8 ") == "a WebP picture"
    assert unreadable(b"BM\0\0\0\0\0\0\0\0", "x.bmp").endswith("a BMP picture: save it as png or jpg")
    assert unreadable(b"hello") == "not a mp4, mov, avi, mkv, webm, png or jpg file"
    assert unreadable(b"") == "empty file"
    assert to_mp4("a b.mp4").startswith("ffmpeg -i 'a b.mp4' ")
    assert to_mp4("a b.mp4").endswith(" OUT.mp4")  # not onto itself


def test_all_that_is_left_out_of_a_folder_is_reported(tmp_path):
    source = tmp_path / "videos"
    put(source / "walk" / "a.mp4", 5)
    put(source / "walk" / "scene" / "b.mp4", 6)
    put(source / "run" / "c.mp4", 7)
    put(source / "loose.mp4", 8)
    for name in ("walk/.DS_Store", "walk/._a.mp4", "walk/notes.txt", "run/notes.txt", "README", ".git/x", "run/.t/x"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    (source / "empty").mkdir()
    put(tmp_path / "more" / "d.mp4", 9)
    (source / "walk" / "more").symlink_to(tmp_path / "more")
    (source / "walk" / "up").symlink_to(source)
    (source / "run" / "gone.mp4").symlink_to(tmp_path / "nowhere")
    (source / "run" / "gone").symlink_to(tmp_path / "nowhere")
    said: list[str] = []
    _, rows = read_rows(source, say=said.append)
    assert [row.name for row in rows] == [
        *("run/c.mp4", "run/gone.mp4", "walk/a.mp4", "walk/more/d.mp4", "walk/scene/b.mp4")
    ]
    assert said == [
        "files beside the class folders, left out because they have no label: 1 (loose.mp4)",
        "folders without a clip, which are not classes: 1 (empty)",
        "clips in deeper folders, labelled by their class folder: 2 (walk/more/d.mp4, walk/scene/b.mp4)",
        "links to folders that are followed: 1 (walk/more)",
        "other files, left out: 9 (3 hidden, 2 .txt, 1 links to folders already seen, 1 links to nowhere, "
        "1 in hidden folders, 1 without suffix)",
    ]


def test_a_folder_without_classes_is_refused_in_words(tmp_path):
    put(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="no sub-folder with clips, and 1 videos or pictures beside them") as caught:
        read_rows(tmp_path)
    assert "('" not in str(caught.value)  # no list of Python's


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path):
    for split in ("train", "val"):
        for label in ("run", "walk"):
            put(tmp_path / "set" / split / label / "a.mp4")
    with pytest.raises(DataError, match=r"holds the splits train, val, not classes: .*sfa pack \S+/train OUT"):
        read_rows(tmp_path / "set")


def test_clips_that_contradict_each_other_are_not_packed(tmp_path):
    """The same file under two names, or twice in the list, with other labels; with the same label it is packed once."""
    put(tmp_path / "a.mp4", 5)
    put(tmp_path / "c.mp4", 6)
    (tmp_path / "b.mp4").hardlink_to(tmp_path / "a.mp4")
    (tmp_path / "d.mp4").write_bytes((tmp_path / "c.mp4").read_bytes())
    (tmp_path / "list.csv").write_text("path,label\na.mp4,x\nb.mp4,y\nc.mp4,x\nd.mp4,x\nc.mp4,x\n")
    with pytest.raises(DataError, match=r"2 contradictory of 5 clips.*first: a.mp4 \(list.csv line 2\): b.mp4 .*'y'"):
        pack(tmp_path / "list.csv", tmp_path / "out")
    for options in ({}, {"check": True}):
        report = pack(tmp_path / "list.csv", tmp_path / "out", PackSettings(max_bad_fraction=0.5, **options))
        assert (report["packed"], [entry["path"] for entry in report["duplicate"]]) == (1, ["d.mp4", "c.mp4"])
        assert [entry["path"] for entry in report["contradictory"]] == ["a.mp4", "b.mp4"]


def test_clips_of_another_split_are_reported(tmp_path):
    for name, frames in (("a", 5), ("b", 6), ("c", 7)):
        put(tmp_path / f"{name}.mp4", frames)
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    rows = "a.mp4,x,train\nb.mp4,y,train\ncopy.mp4,x,test\nb.mp4,y,test\nc.mp4,x,test\n"
    (tmp_path / "list.csv").write_text("path,label,split\n" + rows)
    said: list[str] = []
    pack(tmp_path / "list.csv", tmp_path / "out", PackSettings(split="train"), say=said.append)
    assert said == [
        "rows of other splits, left out: 3 of 5 (3 of 'test')",
        "clips in several splits, which are trained on and tested: 1 (b.mp4)",
    ]
    report = pack(tmp_path / "list.csv", tmp_path / "out", PackSettings(split="test"))
    assert report["shared"] == {"train": ["b.mp4", "copy.mp4"]}
    assert report["notes"][-1] == "clips of test that are in train too, by content: 2 (b.mp4, copy.mp4)"
    assert json.loads((tmp_path / "out" / "report-test.json").read_text()) == report


def test_what_a_recipe_is_to_fit(tmp_path):
    for number, frames in enumerate((4, 6, 8, 10, 20)):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(encode([pixels(number)] * frames))
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{n}.mp4,{n % 2}\n" for n in range(5)))
    report = pack(tmp_path / "list.csv", tmp_path / "out")
    assert report["clips"]["frames"] == {"min": 4, "quartile": 6, "median": 8, "max": 20}
    assert report["clips"]["fps"] == pytest.approx(10, rel=0.01)
    assert report["clips"]["mean"] == pytest.approx([0.5, 0.25, 0.0], abs=0.03)
    assert report["clips"]["std"] == pytest.approx([0.25, 0.0, 0.0], abs=0.04)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["packs"]["shard"]["clips"] == report["clips"]


def pixels(number: int):
    """Red of half of the frame is 0.25, of the other half 0.75; green 0.25."""
    import numpy as np

    frame = np.zeros((32, 32, 3), np.uint8)
    frame[..., 0], frame[..., 1] = 64, 64
    frame[16:, :, 0] = 191
    return np.roll(frame, number, axis=0)


def test_devices_and_pipes_are_no_clips(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "list.csv").write_text("path,label\npipe.mp4,x\n/dev/zero,y\n")
    with pytest.raises(DataError, match=r"2 corrupt of 2 clips.*not a file"):
        pack(tmp_path / "list.csv", tmp_path / "out")
