"""The lists that the owners of data sets hand out, in their true forms, packed with clips that the test makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from data_samples import frame_level, video_bytes
from PIL import Image

from sfa_dist.data.packing.annotations import read_rows
from sfa_dist.data.packing.annotations.classes import class_lists, read_class_list
from sfa_dist.data.packing.annotations.epic import seconds_of
from sfa_dist.data.packing.pack import pack
from sfa_dist.data.packing.pack_settings import PackSettings, Reading
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.errors import DataError, UsageError
from sfa_dist.recipe.blocks import LimitsBlock
from sfa_dist.tools.pack import summary


def write_video(path: Path, frames: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video_bytes(frames, container={".webm": "matroska"}.get(path.suffix, "mp4")))


def packed(out: Path) -> dict[str, dict]:
    """The json of every sample by the name that its list gave it."""
    samples = (
        sample for shard in sorted(out.glob("*.tar")) for sample in wds.WebDataset(str(shard), shardshuffle=False)
    )
    facts = [json.loads(sample["json"]) for sample in samples]
    return {each["path"]: each for each in facts}


# ------------------------------------------------------------------------------------------------------------ Kinetics

KINETICS = """\
label,youtube_id,time_start,time_end,split
playing guitar,-0I-xyz12_4,5,15,train
air drumming,abcdefghijk,12,22,train
"playing guitar",gone1234567,0,10,train
air drumming,AAAAAAAAAAA,121,131,val
"""


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    (tmp_path / "k400.csv").write_text(KINETICS)
    videos = tmp_path / "videos"
    write_video(videos / "playing_guitar" / "-0I-xyz12_4_000005_000015.mp4", 6)
    write_video(videos / "zz_other" / "-0I-xyz12_4_000005_000015.mp4", 9)  # not the folder of its class
    write_video(videos / "air_drumming" / "abcdefghijk.mkv", 7)
    write_video(videos / "AAAAAAAAAAA_000121_000131.mp4", 8)
    return tmp_path


def test_kinetics(kinetics, tmp_path):
    out = tmp_path / "out"
    report = pack(
        kinetics / "k400.csv", out, PackSettings(videos=kinetics / "videos", split="train", max_bad_fraction=0.5)
    )
    assert (report["format"], report["listed"], report["packed"]) == ("kinetics", 3, 2)
    assert [entry["path"] for entry in report["missing"]] == ["gone1234567_000000_000010"]
    assert report["classes"]["label"] == {"playing guitar": {"listed": 2, "missing": 1, "packed": 1}}
    facts = packed(out)
    assert facts["-0I-xyz12_4_000005_000015"]["frames"] == 6
    assert facts["abcdefghijk_000012_000022"]["frames"] == 7
    assert facts["abcdefghijk_000012_000022"]["label_name"] == "air drumming"
    assert load_index(expand_shards([str(out / "*.tar")])).classes == ["air drumming", "playing guitar"]
    pack(kinetics / "k400.csv", out, PackSettings(videos=kinetics / "videos", split="val"))
    assert json.loads((out / "manifest.json").read_text())["samples"] == 3


def test_links_to_folders_are_followed(kinetics, tmp_path):
    """Classes on another disk, and a link that leads back up."""
    (kinetics / "videos" / "playing_guitar").rename(tmp_path / "elsewhere")
    (kinetics / "videos" / "playing_guitar").symlink_to(tmp_path / "elsewhere")
    (kinetics / "videos" / "air_drumming" / "up").symlink_to(kinetics / "videos")
    (kinetics / "videos" / "nowhere").symlink_to(tmp_path / "gone")
    _, rows = read_rows(kinetics / "k400.csv", videos=kinetics / "videos")
    assert rows[0].path == kinetics / "videos" / "playing_guitar" / "-0I-xyz12_4_000005_000015.mp4"
    assert [row.path.is_file() for row in rows] == [True, True, False, True]


def test_kinetics_lists_that_cannot_be_packed(kinetics):
    (kinetics / "test.csv").write_text("youtube_id,time_start,time_end,split\nabcdefghijk,1,2,test\n")
    with pytest.raises(DataError, match="no column label"):
        read_rows(kinetics / "test.csv", videos=kinetics)
    (kinetics / "odd.csv").write_text(KINETICS.replace("air drumming,A", ",A"))
    with pytest.raises(DataError, match=r"odd\.csv line 5: a clip without a label \(1 in all\)"):
        read_rows(kinetics / "odd.csv", videos=kinetics)
    for seconds in ("1e999", "nan", "9" * 500):
        (kinetics / "odd.csv").write_text(KINETICS.replace(",121,", f",{seconds},"))
        with pytest.raises(DataError, match=r"odd\.csv line 5: .* is not a number of seconds"):
            read_rows(kinetics / "odd.csv", videos=kinetics)
    (kinetics / "odd.csv").write_text(KINETICS.replace(",121,", ",soon,"))
    with pytest.raises(DataError, match=r"odd.csv line 5: 'soon' is not a number"):
        read_rows(kinetics / "odd.csv", videos=kinetics)
    with pytest.raises(UsageError, match="--videos DIR"):
        read_rows(kinetics / "k400.csv")
    (kinetics / "other.csv").write_text(KINETICS.replace("time_end", "until"))
    with pytest.raises(DataError, match=r"other.csv, line 1: a list of Kinetics needs the columns time_end too"):
        read_rows(kinetics / "other.csv", "kinetics", kinetics)
    with pytest.raises(DataError, match="not a folder of class folders"):
        read_rows(kinetics / "k400.csv", "folder")
    with pytest.raises(DataError, match="no such folder"):
        read_rows(kinetics / "k400.csv", videos=kinetics / "nowhere")


# ----------------------------------------------------------------------------------------------------- Moments in Time


def test_moments(tmp_path):
    (tmp_path / "trainingSet.csv").write_text('clapping/yt-1_13.mp4,clapping,4,0\n"praying/a,b_2.mp4",praying,3,1\n')
    (tmp_path / "moments_categories.txt").write_text("praying,1\nclapping,0\nadult+female+singing,2\n")
    write_video(tmp_path / "videos" / "training" / "clapping" / "yt-1_13.mp4", 5)
    write_video(tmp_path / "videos" / "training" / "praying" / "a,b_2.mp4", 6)
    out = tmp_path / "out"
    classes = tmp_path / "moments_categories.txt"
    report = pack(tmp_path / "trainingSet.csv", out, PackSettings(videos=tmp_path / "videos", classes=classes))
    assert (report["format"], report["packed"]) == ("moments", 2)
    assert report["classes"]["label"] == {"adult+female+singing": {"listed": 0}}
    assert {path: each["label"] for path, each in packed(out).items()} == {
        "clapping/yt-1_13.mp4": 0,
        "praying/a,b_2.mp4": 1,
    }
    (tmp_path / "multi.csv").write_text("a/b.mp4,clapping,praying\n")
    with pytest.raises(DataError, match="several labels for one clip"):
        read_rows(tmp_path / "multi.csv", "moments", tmp_path)
    (tmp_path / "bare.csv").write_text("a/b.mp4,clapping,3,1\na/c.mp4\n")
    with pytest.raises(DataError, match=r"bare.csv line 2: not a path and a class"):
        read_rows(tmp_path / "bare.csv", "moments", tmp_path)


# ------------------------------------------------------------------------------- Something-Something v2, Something-Else

SOMETHING = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "42326", "label": "tipping basket over", "template": "Tipping [something] over", "placeholders": ["basket"]},
]
# A Something-Else split has the same form and one field more.
ELSE = [{**entry, "new_placeholdes": entry["placeholders"]} for entry in SOMETHING]


@pytest.mark.parametrize("entries", [SOMETHING, ELSE], ids=["SSv2", "Something-Else"])
@pytest.mark.parametrize("labels_name", ["labels.json", "something-something-v2-labels.json", None])
def test_something(tmp_path, entries, labels_name):
    (tmp_path / "train.json").write_text(json.dumps(entries), encoding="utf-8-sig")  # as some editors save it
    labels = {"Tipping something over": "1", "Holding something next to something": "0", "Closing something": "2"}
    if labels_name:
        (tmp_path / labels_name).write_text(json.dumps(labels))
    write_video(tmp_path / "videos" / "78687.webm", 5)
    write_video(tmp_path / "videos" / "42326.mp4", 6)
    out = tmp_path / "out"
    report = pack(tmp_path / "train.json", out, PackSettings(videos=tmp_path / "videos"))
    assert (report["format"], report["packed"]) == ("something", 2)
    facts = packed(out)
    assert facts["78687"]["label_name"] == "Holding something next to something"
    assert facts["78687"]["caption"] == "holding potato next to vicks vaporub bottle"
    assert (facts["78687"]["label"], facts["42326"]["label"]) == (0, 1)
    classes = load_index(expand_shards([str(out / "*.tar")])).classes
    assert classes is not None
    assert len(classes) == (3 if labels_name else 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": "1"}]', "entry 0: no template"),
        ('[{"id": "1", "template": 7}]', "entry 0: no template"),
        ('[{"template": "x"}]', "entry 0: not an object with an id"),
        ('{"id": 1}', "not a list of clips"),
        ("[", "cannot be read as JSON"),
    ],
)
def test_something_lists_that_cannot_be_packed(tmp_path, text, message):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "list.json", videos=tmp_path)


# --------------------------------------------------------------------------------------------------- EPIC-Kitchens-100

EPIC_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)
EPIC = EPIC_HEADER + (
    "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.40,00:00:00.95,4,9,open door,open,3,door,3,['door'],[3]\n"
    'P01_01_1,P01,P01_01,00:00:02.6,00:00:00.80,00:00:01.50,8,14,"take, put",take,0,cup,13,"[\'cup\', 1]","[13, 5]"\n'
    "P02_07_5,P02,P02_07,00:00:02.629,00:00:00.10,00:00:00.50,2,5,wash pan,wash,2,pan,5,['pan'],[5]\n"
)


@pytest.fixture
def epic(tmp_path: Path) -> Path:
    (tmp_path / "EPIC_100_train.csv").write_text(EPIC)
    verbs = "id,key,instances,category\n0,take,\"['a', 'b']\",x\n3,open,[],y\n"
    (tmp_path / "EPIC_100_verb_classes.csv").write_text(verbs)
    nouns = '"id","key","instances","category"\n3,"door","[\'door\', \'a, b\']","furniture"\n'  # as it is handed out
    (tmp_path / "EPIC_100_noun_classes_v2.csv").write_text(nouns)
    (tmp_path / "EPIC_100_video_info.csv").write_text("video_id,duration,fps,resolution\nP02_07,10.0,50.0,1920x1080\n")
    write_video(tmp_path / "videos" / "P01" / "videos" / "P01_01.MP4", 19)
    frames = tmp_path / "videos" / "P02" / "rgb_frames" / "P02_07"
    frames.mkdir(parents=True)
    for number in range(1, 8):
        Image.fromarray(np.full((32, 48, 3), frame_level(number), np.uint8)).save(frames / f"frame_{number:010d}.jpg")
    return tmp_path


def test_epic_is_cut_from_videos_and_from_frames(epic, tmp_path):
    out = tmp_path / "out"
    report = pack(
        epic / "EPIC_100_train.csv", out, PackSettings(videos=epic / "videos", workers=2, readings=(Reading("pyav"),))
    )
    assert (report["format"], report["packed"]) == ("epic", 3)
    facts = packed(out)
    assert {name: each["frames"] for name, each in facts.items()} == {"P01_01_0": 6, "P01_01_1": 7, "P02_07_5": 4}
    assert facts["P02_07_5"]["fps"] == pytest.approx(50)
    first = facts["P01_01_0"]
    assert (first["verb"], first["noun"], first["verb_name"], first["noun_name"]) == (3, 3, "open", "door")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["classes"] is None
    assert {head: len(names) for head, names in manifest["heads"].items()} == {"verb": 97, "noun": 300}
    index = load_index(expand_shards([str(out / "*.tar")]))
    assert not index.errors  # a verb and a noun are a label too


def test_epic_frames_are_the_ones_asked_for(epic, tmp_path):
    from sfa_dist.data.packing.pack_settings import Encoding
    from sfa_dist.data.packing.reencode import encode_frames
    from sfa_dist.data.video.decode_pyav import PyAVVideo

    folder = epic / "videos" / "P02" / "rgb_frames" / "P02_07"
    data = encode_frames(folder, 2, 5, 50.0, Encoding(crf=5))
    levels = PyAVVideo(data, LimitsBlock()).frames_at(range(4)).float().mean(dim=(1, 2, 3))
    assert levels.numpy() == pytest.approx([frame_level(number) for number in range(2, 6)], abs=3)
    (folder / "frame_0000000004.jpg").unlink()
    report = pack(
        epic / "EPIC_100_train.csv", tmp_path / "out", PackSettings(videos=epic / "videos", max_bad_fraction=0.5)
    )
    [corrupt] = report["corrupt"]
    assert (corrupt["path"], "frame 4 is not in" in corrupt["reason"]) == ("P02_07_5", True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("00:00:00.95", "00:00:00.10", "line 2: the action ends at 00:00:00.10, before it starts"),
        ("00:00:00.95", "soon", "line 2: 'soon' is not a time stamp"),
        ("00:00:00.95", "00:00:nan", "line 2: '00:00:nan' is not a time stamp"),
        ("verb_class", "verb_klass", "a test list"),
        (",2,5,wash", ",two,5,wash", "line 4: start_frame 'two' is not the number of a frame"),
    ],
)
def test_epic_lists_that_cannot_be_packed(epic, old, new, message):
    (epic / "odd.csv").write_text(EPIC.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        read_rows(epic / "odd.csv", videos=epic / "videos")
    (epic / "odd.csv").write_text(EPIC.replace("stop_frame", "last", 1))
    with pytest.raises(DataError, match="line 1: a list of EPIC-Kitchens-100 needs the columns stop_frame too"):
        read_rows(epic / "odd.csv", "epic", epic / "videos")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("EPIC_100_video_info.csv", "video,fps\nP02_07,50\n", "a table of the videos needs the columns video_id too"),
        ("EPIC_100_video_info.csv", "video_id,fps\nP02_07,fast\n", "line 2: 'fast' is not a number of frames a second"),
        ("EPIC_100_verb_classes.csv", "number;name\n0;take\n", "a list of classes needs the columns id, key too"),
    ],
)
def test_tables_beside_an_epic_list_that_cannot_be_read(epic, tmp_path, name, text, message):
    (epic / name).write_text(text)
    with pytest.raises(DataError, match=message):
        pack(epic / "EPIC_100_train.csv", tmp_path / "out", PackSettings(videos=epic / "videos"))


def test_check_inspects_long_videos_and_folders_of_frames(epic, tmp_path):
    """It reports on parts what packing them would, without encoding any."""
    late = "P01_01_9,P01,P01_01,00:00:09,00:00:09.00,00:00:09.50,90,95,x,open,3,door,3,['door'],[3]\n"
    half = "P01_01_8,P01,P01_01,00:00:09,00:00:01.50,00:00:04.50,15,45,x,open,3,door,3,['door'],[3]\n"
    (epic / "EPIC_100_train.csv").write_text(EPIC + late + half)
    (epic / "videos" / "P02" / "rgb_frames" / "P02_07" / "frame_0000000004.jpg").unlink()
    arguments = {"videos": epic / "videos", "max_bad_fraction": 1.0, "min_frames": 7}
    checked = pack(epic / "EPIC_100_train.csv", tmp_path / "out", PackSettings(check=True, **arguments))
    assert [entry["path"] for entry in checked["short"]] == ["P01_01_0"]
    assert {entry["path"]: entry["reason"][:9] for entry in checked["corrupt"]} == {
        "P02_07_5": "frame 4 i",
        "P01_01_9": "the video",
        "P01_01_8": "the video",
    }
    assert "the video ends at 1.90 s, the part goes from 1.50 to 4.50 s" in str(checked["corrupt"])
    packed_report = pack(epic / "EPIC_100_train.csv", tmp_path / "out", PackSettings(**arguments))
    for report in (checked, packed_report):
        del report["clips"]  # of parts that are not cut out no pixels are looked at
    assert checked == packed_report
    with pytest.raises(UsageError, match="--decode-all checks whole files"):
        pack(epic / "EPIC_100_train.csv", tmp_path / "other", PackSettings(decode_all=True, **arguments))


def test_a_name_that_no_file_can_have_is_a_missing_clip(epic, tmp_path):
    (epic / "EPIC_100_train.csv").write_text(EPIC.replace("P02_07,00", f"{'x' * 3000},00"))
    _, rows = read_rows(epic / "EPIC_100_train.csv", videos=epic / "videos")
    assert [row.cut is not None for row in rows] == [True, True, True]
    (tmp_path / "list.csv").write_text(f"{'y' * 3000}/{'x' * 3000}.mp4,{'y' * 3000},3,1\n")
    assert read_rows(tmp_path / "list.csv", videos=tmp_path)[0] == "moments"


def test_seconds_of():
    assert seconds_of("01:02:03.50", "x") == 3723.5


# ---------------------------------------------------------------------------------------------------------- the rest


def test_a_table_of_verbs_and_nouns(tmp_path):
    write_video(tmp_path / "a.mp4", 5)
    write_video(tmp_path / "b.mp4", 6)
    (tmp_path / "own.csv").write_text("path,verb,noun,who\na.mp4,cut,bread,x\nb.mp4,cut,apple,y\n")
    pack(tmp_path / "own.csv", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["heads"] == {"verb": ["cut"], "noun": ["apple", "bread"]}
    assert manifest["packs"]["shard"]["per_class"] == {"verb": [2], "noun": [1, 1]}
    (tmp_path / "names.txt").write_text("x\n")
    with pytest.raises(DataError, match="verb and noun have no single class list"):
        class_lists(read_rows(tmp_path / "own.csv")[1], tmp_path / "own.csv", "table", tmp_path / "names.txt")


def test_check_says_the_same_and_writes_nothing(kinetics, tmp_path):
    arguments = {"videos": kinetics / "videos", "split": "train", "max_bad_fraction": 0.5}
    checked = pack(kinetics / "k400.csv", tmp_path / "out", PackSettings(check=True, **arguments))
    assert not (tmp_path / "out").exists()
    assert checked == pack(kinetics / "k400.csv", tmp_path / "out", PackSettings(**arguments))
    text = summary(checked, tmp_path / "out", None)
    assert "2 of 3 clips can be packed" in text
    assert "playing guitar (1 of 2)" in text


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "b\na\n", ["b", "a"]),
        ("a.txt", "b,1\na,0\n", ["a", "b"]),
        ("a.json", '{"b": "1", "a": "0"}', ["a", "b"]),
        ("a.json", '["b", "a"]', ["b", "a"]),
        ("a.txt", "b,2\na,0\n", None),
        ("a.json", '{"b": "x"}', None),
        ("a.json", "3", None),
        ("manifest.json", '{"version": 1, "classes": ["b", "a"], "packs": {}}', ["b", "a"]),
        ("manifest.json", '{"version": 1, "classes": null, "heads": {"verb": ["a"]}, "packs": {}}', None),
        ("a.json", '{"b": [1]}', None),
        ("a.txt", "a\na\n", None),
        ("a.txt", "", None),
    ],
)
def test_class_lists_of_any_form(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    if expected is None:
        with pytest.raises(DataError, match="class list"):
            read_class_list(tmp_path / name)
    else:
        assert read_class_list(tmp_path / name) == expected


# ------------------------------------------------------------------------------------- UCF101, HMDB51 and ActivityNet

UCF_CLASSES = "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n"  # as it is handed out, with the line ends of Windows


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    (tmp_path / "classInd.txt").write_bytes(UCF_CLASSES.encode())
    train = ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1", "HandstandPushups/v_HandStandPushups_g08_c02.avi 2")
    (tmp_path / "trainlist01.txt").write_bytes("".join(f"{line}\r\n" for line in train).encode())
    (tmp_path / "testlist01.txt").write_text("HandstandPushups/v_HandStandPushups_g01_c01.avi\n")
    for number, name in enumerate(("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01", "v_HandstandPushups_g08_c02")):
        write_video(tmp_path / "UCF-101" / f"{name}.mp4", 5 + number)
    write_video(tmp_path / "UCF-101" / "HandstandPushups" / "v_HandStandPushups_g01_c01.mp4", 8)
    return tmp_path


def test_ucf101(ucf, tmp_path):
    for split, count in (("train", 2), ("test", 1)):
        report = pack(ucf / f"{split}list01.txt", tmp_path / "out", PackSettings(videos=ucf / "UCF-101", prefix=split))
        assert (report["format"], report["packed"]) == ("ucf101", count)
    assert {name: each["label"] for name, each in packed(tmp_path / "out").items()} == {
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01": 0,
        "HandstandPushups/v_HandStandPushups_g08_c02": 1,
        "HandstandPushups/v_HandStandPushups_g01_c01": 1,
    }
    text = (ucf / "trainlist01.txt").read_text()
    for old, new, message in (
        (".avi 2", ".avi 3", "line 2: the class HandstandPushups has the number 3 here, another or none"),
        ("_g08_c02.avi 2", ".avi", "line 2: .* as in UCF101"),
    ):
        (ucf / "trainlist02.txt").write_text(text.replace(old, new))
        with pytest.raises(DataError, match=message):
            read_rows(ucf / "trainlist02.txt", videos=ucf)
    (ucf / "classInd.txt").unlink()
    with pytest.raises(DataError, match=r"classInd.txt, which numbers the classes, has to lie beside it"):
        read_rows(ucf / "trainlist01.txt", videos=ucf)


def test_hmdb51(tmp_path):
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    uses = {
        "brush_hair": {"#a_brush_hair_u_nm.avi": "102", "b(1)_brush_hair.avi": "210"},
        "wave": {"c.d_wave.avi": "111"},
    }
    for label, videos in uses.items():
        for split in range(3):
            text = "".join(f"{name} {own[split]} \n" for name, own in videos.items())
            (lists / f"{label}_test_split{split + 1}.txt").write_text(text)
        for number, name in enumerate(videos):
            write_video((tmp_path / "hmdb51" / label / name).with_suffix(".mp4"), 5 + number + len(label))
    arguments = {"videos": tmp_path / "hmdb51", "split_column": "split1"}
    report = pack(lists, tmp_path / "out", PackSettings(split="train", **arguments))
    assert (report["format"], report["packed"]) == ("hmdb51", 2)
    assert report["notes"] == ["rows of other splits, left out: 1 of 3 (1 of 'test')"]
    pack(lists, tmp_path / "out", PackSettings(split="test", **arguments))
    facts = packed(tmp_path / "out")
    assert {name: (each["label_name"], each["split3"]) for name, each in facts.items()} == {
        "brush_hair/#a_brush_hair_u_nm.avi": ("brush_hair", "test"),
        "brush_hair/b(1)_brush_hair.avi": ("brush_hair", "unused"),
        "wave/c.d_wave.avi": ("wave", "train"),
    }
    with pytest.raises(DataError, match="--split-column, one of split1, split2, split3"):
        pack(lists, tmp_path / "out", PackSettings(split="train", videos=tmp_path / "hmdb51"))
    with pytest.raises(DataError, match="lists one class of HMDB51: give its folder"):
        read_rows(lists / "wave_test_split1.txt", videos=tmp_path)
    (lists / "wave_test_split2.txt").write_text("c.d_wave.avi 3\n")
    with pytest.raises(DataError, match=r"wave_test_split2.txt line 1: .* as in HMDB51"):
        read_rows(lists, videos=tmp_path)
    (lists / "wave_test_split2.txt").write_text("")
    with pytest.raises(DataError, match="not in split2"):
        read_rows(lists, videos=tmp_path)


def test_activitynet(tmp_path):
    database = {
        "AbC-1_x": {
            "duration": 1.9,
            "subset": "training",
            "url": "x",
            "annotations": [{"segment": [0.0, 0.5], "label": "Surfing"}, {"segment": [0.8, 1.5], "label": "Surfing"}],
        },
        "other": {"subset": "validation", "annotations": [{"segment": [0.2, 0.7], "label": "Archery"}]},
        "odd": {"subset": "training", "annotations": [{"segment": [3, 3], "label": "Archery"}]},
        "secret": {"subset": "testing", "annotations": []},
    }
    source = tmp_path / "activity_net.v1-3.min.json"
    source.write_text(json.dumps({"version": "VERSION 1.3", "taxonomy": [], "database": database}))
    write_video(tmp_path / "videos" / "v_AbC-1_x.mp4", 19)
    write_video(tmp_path / "videos" / "v_other.mkv", 18)
    out = tmp_path / "out"
    report = pack(source, out, PackSettings(videos=tmp_path / "videos", split="training", readings=(Reading("pyav"),)))
    assert (report["format"], report["packed"]) == ("activitynet", 2)
    assert report["notes"] == [
        "1 videos have no label (the test set) and are left out: secret",
        "1 parts do not end after their start and are left out: odd_0",
        "rows of other splits, left out: 1 of 3 (1 of 'validation')",
    ]
    facts = packed(out)
    assert {name: (each["frames"], each["label"]) for name, each in facts.items()} == {
        "AbC-1_x_0": (5, 1),
        "AbC-1_x_1": (7, 1),
    }
    source.write_text(json.dumps({"database": {"a": {"subset": "training", "annotations": [{"label": "x"}]}}}))
    with pytest.raises(DataError, match="video a: needs subset and annotations"):
        read_rows(source, videos=tmp_path)
