"""Packing: a round trip through stock webdataset, and reports about bad files."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import webdataset as wds
from data_samples import audio_bytes, video_bytes
from shard_tools import run_tool

from sfa_dist.data.packing.annotations.rows import ClipRow
from sfa_dist.data.packing.pack import pack
from sfa_dist.data.packing.pack_probe import VideoProbe, VideoProber
from sfa_dist.data.packing.pack_settings import DEFAULTS, Encoding, PackSettings, Reading
from sfa_dist.data.shards.shard_index import load_index, verify_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.errors import CheckpointError, DataError, PreemptedError, UsageError
from sfa_dist.tools.cli import build_parser
from sfa_dist.tools.pack import settings_of

GOOD = 9


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Nine good clips of three classes in a csv, with two splits."""
    folder = tmp_path / "videos"
    folder.mkdir()
    lines = ["path,label,split,note"]
    for number in range(GOOD):
        (folder / f"v{number}.MP4").write_bytes(video_bytes(6 + number))
        lines.append(f'v{number}.MP4,{"abc"[number // 3]},{"val" if number % 3 == 2 else "train"},"a, note"')
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def add_rows(videos: Path, *rows: str) -> None:
    with (videos / "list.csv").open("a") as file:
        file.write("".join(row + "\n" for row in rows))


def test_round_trip(videos, tmp_path):
    out = tmp_path / "out"
    report = pack(videos / "list.csv", out, PackSettings(prefix="all", shard_size=4, workers=1))
    assert (report["packed"], report["bad_fraction"]) == (GOOD, 0.0)
    shards = expand_shards([str(out / "all-{000000..000002}.tar")])
    assert verify_index(shards) == []

    stock = {}
    for shard in shards:
        for sample in wds.WebDataset(str(shard), shardshuffle=False):
            facts = json.loads(sample["json"])
            stock[facts["path"]] = (sample["__key__"], sample["mp4"], int(sample["cls"]), facts)
    assert len(stock) == GOOD
    for number in range(GOOD):
        _, data, label, facts = stock[f"v{number}.MP4"]
        assert data == (videos / f"v{number}.MP4").read_bytes()
        assert label == facts["label"] == number // 3
        assert (facts["label_name"], facts["frames"], facts["note"]) == ("abc"[number // 3], 6 + number, "a, note")
        assert facts["duration"] == pytest.approx((6 + number) / 10, rel=0.05)

    index = load_index(shards)
    assert index.keys == [key for key, *_ in stock.values()]
    assert index.classes == ["a", "b", "c"]
    assert index.label.tolist() != sorted(index.label.tolist())  # not in the order of the classes
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["samples"] == GOOD
    assert manifest["packs"]["all"]["per_class"] == [3, 3, 3]
    assert manifest["packs"]["all"]["splits"] == {"train": 6, "val": 3}


def test_same_source_gives_the_same_bytes(videos, tmp_path):
    for name in ("one", "two"):
        pack(videos / "list.csv", tmp_path / name, PackSettings(shard_bytes=5_000))
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in first] == [path.name for path in second]
    assert sum(path.suffix == ".tar" for path in first) > 1
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_splits_share_folder_and_classes(videos, tmp_path):
    out = tmp_path / "out"
    (videos / "classes.txt").write_text("c\nb\na\n")
    for split, count in (("train", 6), ("val", 3)):
        assert (
            pack(videos / "list.csv", out, PackSettings(split=split, classes=videos / "classes.txt"))["packed"] == count
        )
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["classes"], manifest["samples"], sorted(manifest["packs"])) == (
        ["c", "b", "a"],
        9,
        ["train", "val"],
    )
    assert sorted(load_index(expand_shards([str(out / "val-*.tar")])).label.tolist()) == [0, 1, 2]
    with pytest.raises(DataError, match="same --classes"):
        pack(videos / "list.csv", out, PackSettings(prefix="other"))
    with pytest.raises(DataError, match="already holds train-000000"):
        pack(videos / "list.csv", out, PackSettings(split="train", classes=videos / "classes.txt"))
    with pytest.raises(DataError, match=r"no row has split = 'test'.*values are: train, val"):
        pack(videos / "list.csv", out, PackSettings(split="test"))
    with pytest.raises(DataError, match=r"--split-column who: no row has such a column.*note, split"):
        pack(videos / "list.csv", out, PackSettings(split_column="who"))


def test_shards_of_a_longer_name_are_not_touched(videos, tmp_path):
    out = tmp_path / "out"
    pack(videos / "list.csv", out, PackSettings(prefix="train-extra"))
    pack(videos / "list.csv", out, PackSettings(prefix="train", shard_size=4))
    pack(videos / "list.csv", out, PackSettings(prefix="train", overwrite=True))
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000000.tar", "train-extra-000000.tar"]
    assert sorted(json.loads((out / "manifest.json").read_text())["packs"]) == ["train", "train-extra"]
    for prefix in ("a/b", "../b", "", ".", "*"):
        if prefix:
            with pytest.raises(UsageError, match="--prefix"):
                pack(videos / "list.csv", out, PackSettings(prefix=prefix))
    with pytest.raises(UsageError, match="is a file"):
        pack(videos / "list.csv", videos / "list.csv")


def test_each_pack_of_a_folder_keeps_its_report(videos, tmp_path, capsys):
    add_rows(videos, "gone.mp4,a,train,x")
    for split in ("train", "val"):
        arguments = ["--split", split, "--max-bad-fraction", "0.5"]
        assert run_tool("pack", str(videos / "list.csv"), str(tmp_path / "out"), *arguments) == 0
    assert f"all of them: {tmp_path / 'out' / 'report-train.json'}" in capsys.readouterr().out
    reports = [json.loads((tmp_path / "out" / f"report-{split}.json").read_text()) for split in ("train", "val")]
    assert [[entry["path"] for entry in report["missing"]] for report in reports] == [["gone.mp4"], []]


def test_packs_that_run_at_the_same_time_share_the_manifest(videos, tmp_path):
    out = tmp_path / "out"

    def beside(done: int, total: int) -> None:
        if done == total:
            pack(videos / "list.csv", out, PackSettings(split="val"))

    pack(videos / "list.csv", out, PackSettings(split="train"), progress=beside)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["samples"], sorted(manifest["packs"])) == (GOOD, ["train", "val"])


def test_the_command_line_has_each_setting():
    def settings(*options: str) -> PackSettings:
        return settings_of(build_parser().parse_args(["pack", "source", "out", *options]), None)

    assert settings() == PackSettings()
    words = "--format table --videos v --classes c --split-column s --split a --prefix p --shard-size 7 --shard-bytes 8"
    words += " --min-frames 2 --max-bad-fraction 0.5 --seed 3 --workers 4 --decoder pyav --gop 5 --short-side 6 --crf 1"
    given = settings(*words.split(), "--decode-all", "--overwrite", "--check")
    names = [field.name for field in fields(PackSettings)]
    assert [name for name in names if getattr(given, name) == getattr(DEFAULTS, name)] == []
    assert (given.shard_size, given.encoding) == (7, Encoding(short_side=6, gop=5, crf=1))


def test_ctrl_c_keeps_what_was_looked_at(videos, tmp_path, monkeypatch):
    looked = []

    def interrupted(prober: VideoProber, row: ClipRow) -> VideoProbe:
        if len(looked) == 4:
            raise KeyboardInterrupt
        looked.append(row.name)
        return whole(prober, row)

    whole = VideoProber.__call__
    monkeypatch.setattr(VideoProber, "__call__", interrupted)
    arguments = ("pack", str(videos / "list.csv"), str(tmp_path / "out"))
    with pytest.raises(PreemptedError, match="run the same command again"):
        run_tool(*arguments)
    looked.clear()
    with pytest.raises(PreemptedError):
        run_tool(*arguments)
    assert looked == ["v4.MP4", "v5.MP4", "v6.MP4", "v7.MP4"]
    monkeypatch.undo()
    assert run_tool(*arguments) == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["samples"] == GOOD


def test_trouble_with_the_disk_is_not_the_clips_fault(videos, tmp_path):
    """What cannot be read is looked at again by the next pack, and what cannot be written ends this one."""
    (videos / "folder.mp4").mkdir()
    add_rows(videos, "folder.mp4,a,train,x", f"{'x' * 300}.mp4,a,train,x")
    with pytest.raises(DataError, match="1 missing, 1 corrupt"):
        pack(videos / "list.csv", tmp_path / "out", PackSettings(max_bad_fraction=0.0))
    journal = (tmp_path / "out" / ".shard-work" / "journal.jsonl").read_text()
    assert journal.count('"key"') == GOOD
    (tmp_path / "file").touch()
    prober = VideoProber(
        PackSettings(readings=(Reading("pyav"),), encoding=Encoding(short_side=16)), tmp_path / "file" / "work"
    )
    with pytest.raises(CheckpointError, match="make room there") as caught:
        prober(ClipRow(videos / "v0.MP4", "v0", {"label": "a"}, "line 2"))
    assert caught.value.exit_code == 74


def test_bad_files_are_reported_and_left_out(videos, tmp_path, capsys):
    (videos / "copy.mp4").write_bytes((videos / "v0.MP4").read_bytes())
    (videos / "cut.mp4").write_bytes((videos / "v1.MP4").read_bytes()[:500])
    (videos / "sound.mp4").write_bytes(audio_bytes())
    (videos / "short.mp4").write_bytes(video_bytes(2))
    (videos / "odd.wmv").write_bytes(b"x")
    names = ("copy.mp4", "cut.mp4", "sound.mp4", "short.mp4", "odd.wmv", "gone.mp4")
    add_rows(videos, *(f"{name},a,train,x" for name in names))
    arguments = ["pack", str(videos / "list.csv"), str(tmp_path / "out"), "--min-frames", "4", "--max-bad-fraction"]
    with pytest.raises(DataError, match=r"1 missing, 3 corrupt, 1 short of 15 clips.*report\.json") as caught:
        run_tool(*arguments, "0.1")
    assert caught.value.exit_code == 65
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".shard-work", "report.json"]
    assert run_tool(*arguments, "0.5") == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    found = {kind: [entry["path"] for entry in report[kind]] for kind in ("missing", "corrupt", "short", "duplicate")}
    assert found == {
        "missing": ["gone.mp4"],
        "corrupt": ["cut.mp4", "sound.mp4", "odd.wmv"],
        "short": ["short.mp4"],
        "duplicate": ["copy.mp4"],
    }
    assert report["duplicate"][0]["same_as"] == "v0.MP4"
    assert "9 of 15 clips packed" in printed
    assert "gone.mp4" in printed
    assert len(load_index(expand_shards([str(tmp_path / "out/*.tar")]))) == GOOD


def test_a_folder_of_class_folders(tmp_path):
    for label in ("walk", "run"):
        (tmp_path / "src" / label).mkdir(parents=True)
        (tmp_path / "src" / label / f"{label}.x.mp4").write_bytes(video_bytes(5 + len(label)))
        (tmp_path / "src" / label / "notes.txt").write_text("x")
    pack(tmp_path / "src", tmp_path / "out", PackSettings(overwrite=True))
    index = load_index(expand_shards([str(tmp_path / "out/shard-*.tar")]))
    assert (index.classes, sorted(index.label.tolist())) == (["run", "walk"], [0, 1])


def test_whole_numbers_are_class_numbers(videos, tmp_path):
    text = (videos / "list.csv").read_text()
    for name, number in (("a", 0), ("b", 2), ("c", 3)):
        text = text.replace(f",{name},", f",{number},")
    (videos / "list.csv").write_text(text)
    pack(videos / "list.csv", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["classes"] == ["0", "1", "2", "3"]
    assert manifest["packs"]["shard"]["per_class"] == [3, 0, 3, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,label\na.mp4,x\n", "needs the columns path and label"),
        ("path,label\n", "no rows"),
        ("path,label,label\na.mp4,x,y\n", "line 1: the column 'label' appears twice"),
        ("path,label\na.mp4\n", r"line 2: 1 fields, and the header has 2"),
        ("path,label\na.mp4,x,y\n", r"line 2: 3 fields, and the header has 2"),
        ("path,label\na.mp4,\n", r"line 2: path and label must not be empty"),
        ("path,label\na.mp4,stranger\n", r"'stranger' \(list.csv line 2\)"),
        ("path,label\na.mp4,7\n", r"'7' \(list.csv line 2\)"),
    ],
)
def test_sources_that_cannot_be_understood(tmp_path, content, message):
    (tmp_path / "list.csv").write_text(content)
    (tmp_path / "classes.txt").write_text("x\ny\n")
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "list.csv", tmp_path / "out", PackSettings(classes=tmp_path / "classes.txt"))


def test_index_tool(videos, tmp_path, capsys):
    pack(videos / "list.csv", tmp_path / "out")
    pattern = str(tmp_path / "out/*.tar")
    (tmp_path / "out/index.json").unlink()
    assert run_tool("index", pattern) == 0
    assert "indexed 9 samples in 1 shards, 0 of them" in capsys.readouterr().out
    assert run_tool("index", pattern, "--verify") == 0
    shard = tmp_path / "out/shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[load_index([shard]).offset[0]] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"1 problems in 1 shards.*offset"):
        run_tool("index", pattern, "--verify")
