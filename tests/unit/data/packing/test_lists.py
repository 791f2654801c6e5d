"""Lists and class lists as people have them: read rightly, with a word on what was guessed, or refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_dist.data.packing.annotations import read_rows, select_split
from sfa_dist.data.packing.annotations.class_files import read_class_list
from sfa_dist.data.packing.annotations.classes import class_lists, class_numbers
from sfa_dist.data.packing.annotations.rows import visible
from sfa_dist.errors import DataError, SfaError

HEADER = "path,label\n"
Read = tuple[list[tuple[str, int]], list[str], list[str]]


def read(tmp_path: Path, content: str | bytes, classes: str | None = None, name: str = "list.csv") -> Read:
    """((name, class number) of each row, class names, what was said)."""
    source = tmp_path / name
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    file = None
    if classes is not None:
        file = tmp_path / ("classes.json" if classes[:1] in ("{", "[") else "classes.txt")
        file.write_text(classes)
    said: list[str] = []
    format, rows = read_rows(source, say=said.append)
    heads = class_lists(rows, source, format, file, said.append)
    numbers = class_numbers(rows, heads, said.append)
    return [(row.name, own["label"]) for row, own in zip(rows, numbers, strict=True)], heads["label"], said


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (HEADER + "a b.mp4,x\nb.mp4,y z\n", None),
        ("\ufeff" + HEADER + "a b.mp4,x\nb.mp4,y z\n", None),
        (HEADER + '"a b.mp4", x \r\nb.mp4,"y z"\r\n', None),
        ("path,label\ra b.mp4,x\rb.mp4,y z\r", None),
        ("\n" + HEADER + "\na b.mp4,x\n\nb.mp4,y z\n\n", None),
        ("path\tlabel\na b.mp4\tx\nb.mp4\ty z\n", "separated by tabs"),
        ("path;label\na b.mp4;x\nb.mp4;y z\n", "separated by semicolons"),
        ("a b.mp4,x\nb.mp4,y z\n", "no header: its columns are read as path and label"),
        (",path,label\n0,a b.mp4,x\n1,b.mp4,y z\n", "first column of list.csv has no name and is left out"),
        ("path,frames,label\na b.mp4,30,x\nb.mp4,20,y z\n", "replaced by the values of the files and classes: frames"),
    ],
)
def test_tables_that_can_be_read(tmp_path, content, word):
    rows, names, said = read(tmp_path, content)
    assert (rows, names) == ([("a b.mp4", 0), ("b.mp4", 1)], ["x", "y z"])
    assert len(said) == (word is not None)
    assert (word or "") in "".join(said)


@pytest.mark.parametrize("header", ["", "path label\n"])
def test_lines_with_spaces(tmp_path, header):
    rows, _, said = read(tmp_path, header + "walk/a b.mp4 1\nrun/c.avi 0\n", name="train.txt")
    assert rows == [("walk/a b.mp4", 1), ("run/c.avi", 0)]
    assert said == ["train.txt has lines of a path and a label, separated by spaces"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + 'a.mp4,"x\nb.mp4,y\nc.mp4,x\n', "line 2: a quoted field does not end in its line"),
        (HEADER + 'a.mp4,x\nb.mp4,"y\nc.mp4,"x"\nd.mp4,y\n', "line 3: a quoted field does not end in its line"),
        (HEADER + 'a.mp4,x\n"b.mp4,y\n', "line 3: a quoted field does not end in its line"),
        ('path,label,note\na.mp4,x,"one\nb.mp4,y,two"\n', "line 2: a quoted field does not end in its line"),
        (HEADER + 'a.mp4,"x"y\n', "line 2: not a row of a csv"),
        (HEADER + "a.mp4,x\0\n", "line 2: a NUL byte"),
        ((HEADER + "a.mp4,x\n").encode("utf-16"), "is text in UTF-16: save it as a csv in UTF-8"),
        ((HEADER + "a.mp4,\xe9\n").encode("latin1"), "is not text in UTF-8"),
        (b"PK\x03\x04\x14\x00", "is an Excel workbook or another zip file"),
        (b"PAR1\x15\x04", "is a Parquet file"),
        ('{"path": "a.mp4", "label": "x"}\n', "is JSON, or lines of JSON"),
        ("a.mp4,30,1\nb.mp4,20,0\n", "its first line has 3 columns and is not a header"),
        ("a.mp4,x\nb.mp4,x,y\n", "line 2: not 2 columns"),
        ("a.mp4 x\nb.mp4 30 1\n", "line 2: 'b.mp4 30 1' is not a video and a label of one word"),
        ("Path,Label\na.mp4,x\n", "header needs the columns path and label .*: 'Path', 'Label'"),
        ("path\na.mp4\n", "header needs the columns path and label"),
        ("", "header needs the columns path and label"),
        (HEADER + "a\x1b[2J.mp4,x\n", r"the path 'a\\x1b\[2J.mp4' has invisible characters"),
    ],
)
def test_tables_that_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("-1", "0"), "line 2: the label '-1' is a number but not a class number"),
        (("0", "3.0"), "line 3: the label '3.0' is a number"),
        (("1e3", "x"), "the label '1e3' is a number"),
        (("\u0663", "0"), "is a number but not a class number"),
        (("3", "walk"), r"labels are numbers \('3', list.csv line 2\) and names \('walk', list.csv line 3\)"),
        (("nan", "walk"), "what programs write for an empty cell"),
        (("Walk", "walk"), r"written in several ways: 1, such as 'Walk' \(list.csv line 2\) and 'walk'"),
        (("pick_up", "pick  up"), "written in several ways"),
        (("cafe\u0301", "caf\xe9"), "written in several ways"),
        (("walk\u200b", "run"), "has invisible characters"),
        (("\x1b[31mred", "run"), "has invisible characters"),
        (("", "run"), "path and label must not be empty"),
    ],
)
def test_labels_that_can_be_read_in_two_ways_are_refused(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, HEADER + "".join(f"{n}.mp4,{label}\n" for n, label in enumerate(labels)))


@pytest.mark.parametrize(
    ("labels", "count", "word"),
    [
        (("1", "2"), 3, "the labels go from 1 to 2, and class numbers count from 0"),
        (("0", "4"), 5, "no clip has 3 of the class numbers 0 to 4: 1, 2, 3"),
        (("00", "01"), 2, "labels such as '00' are read as class numbers: 00 is 0"),
    ],
)
def test_how_numbers_are_read_is_said(tmp_path, labels, count, word):
    rows, names, said = read(tmp_path, HEADER + "".join(f"{n}.mp4,{label}\n" for n, label in enumerate(labels)))
    assert [number for _, number in rows] == [int(label) for label in labels]
    assert len(names) == count
    assert word in said[0]
    assert len(said) == 1


CLIPS = HEADER + "a.mp4,walk\nb.mp4,run\n"


@pytest.mark.parametrize(
    "classes",
    [
        "run\nwalk\n",
        "0,run\n1,walk\n",
        "id,name\n0,run\n1,walk\n",
        "class_id\tclass_name\n0\trun\n1\twalk\n",
        "name,id\nwalk,1\nrun,0\n",
        "walk,1\nrun,0\n",
        "0;run\n1;walk\n",
        "1 run\n2 walk\n",
        "label\nrun\nwalk\n\n",
        '["run", "walk"]',
        '{"walk": 1, "run": "0"}',
        '{"0": "run", "1": "walk"}',
        '[{"id": 1, "name": "walk"}, {"id": 0, "name": "run"}]',
    ],
)
def test_class_lists_of_every_form_give_the_same(tmp_path, classes):
    rows, names, _ = read(tmp_path, CLIPS, classes)
    assert (rows, names) == ([("a.mp4", 1), ("b.mp4", 0)], ["run", "walk"])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("run\n\nwalk\n", "line 2 is empty"),
        ("run\nwalk\nrun\n", "repeats 'run'"),
        ("0,run\n2,walk\n", "its numbers are not 0 to 1, nor 1 to 2, each once"),
        ("0,run\n1,walk\nsit\n3,lie\n", "line 3, 'sit', is not a number and a name like the others"),
        ("id,key,instances\n0,run,\"['a', 'b']\"\n1,walk,[]\n", "line 2 has 3 columns"),
        ('[{"id": 0, "name": "run", "label": "x"}]', "have the keys id, name, label, not one id and one name"),
        ("[0, 1]", "neither names alone nor objects"),
        ('{"run": true, "walk": 0}', "True is not a class number"),
        ('{"run": 1.0, "walk": 0}', "1.0 is not a class number"),
        ('{"run": 0, "run": 1}', "a JSON object has a key twice"),
        ('{"categories": [{"id": 0, "name": "run"}]}', "is not a class number"),
        ("[" * 5000, "cannot be read as JSON"),
        ('{"run": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("run\nwalk\u200b\n", "is not a printable name"),
        ("-1,none\n0,run\n1,walk\n", "line 1, '-1,none', is not a number and a name"),
        ("-1,none\n0,run\n", "line 1 '-1,none' has a number in an unsupported form"),
        ("0: run\n1: walk\n", "line 1 '0: run' has a number in an unsupported form"),
        ("0. run\n1. walk\n", "line 1 '0. run' has a number in an unsupported form"),
        ("1) run\n2) walk\n", r"line 1 '1\) run' has a number in an unsupported form"),
        ("1|run\n2|walk\n", r"line 1 '1\|run' has a number in an unsupported form"),
        ("0.0,run\n1.0,walk\n", "line 1 '0.0,run' has a number in an unsupported form"),
        ("run=0\nwalk=1\n", "line 1 'run=0' has a number in an unsupported form"),
        ("run 0\nwalk 1\n", "line 1 'run 0' has a number in an unsupported form"),
        ("- run\n- walk\n", "line 1 '- run' is of another kind of file"),
        ("names:\n  0: run\n  1: walk\n", "line 1 'names:' is of another kind of file"),
        ("# classes\nrun\nwalk\n", "line 1 '# classes' is of another kind of file"),
        ("['run', 'walk']\n", "cannot be read as JSON"),
        ("Run\nWalk\n", r"2 rows have a label outside the 2 classes: 'walk' \(list.csv line 2\)"),
    ],
)
def test_class_lists_that_are_refused(tmp_path, classes, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, CLIPS, classes)


def test_numbers_beside_a_class_list(tmp_path):
    numbers = HEADER + "a.mp4,0\nb.mp4,1\n"
    rows, _, said = read(tmp_path, numbers, "run\nwalk\n")
    assert rows == [("a.mp4", 0), ("b.mp4", 1)]
    assert said == ["the labels are numbers and are read as positions in the class list, from 0 = 'run' on"]
    with pytest.raises(DataError, match=r"outside the 2 classes: '1' \(list.csv line 3\)"):
        read(tmp_path, HEADER + "a.mp4,run\nb.mp4,1\n", "run\nwalk\n")
    with pytest.raises(DataError, match="count from 1, and the labels are numbers too"):
        read(tmp_path, numbers, "1 run\n2 walk\n")
    assert read(tmp_path, HEADER + "a.mp4,10\nb.mp4,2\n", "10\n2\n")[0] == [("a.mp4", 0), ("b.mp4", 1)]


def test_rows_of_other_splits_are_counted(tmp_path):
    (tmp_path / "list.csv").write_text("path,label,split\na.mp4,x,train\nb.mp4,y,Train\nc.mp4,y,\n")
    _, rows = read_rows(tmp_path / "list.csv")
    said: list[str] = []
    assert len(select_split(rows, None, "train", said.append)) == 1
    assert said == ["rows of other splits, left out: 2 of 3 (1 of 'Train', 1 of '')"]


def test_a_split_of_a_list_without_splits(tmp_path):
    for header, advice in (
        ("path,label,part", "give --split-column, one of part"),
        ("path,label", "leave --split out"),
    ):
        (tmp_path / "list.csv").write_text(f"{header}\na.mp4,x{',train' * header.count('part')}\n")
        _, rows = read_rows(tmp_path / "list.csv")
        with pytest.raises(DataError, match=f"^--split train: no row has a column split: {advice}$"):
            select_split(rows, None, "train")


def test_lists_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for source in ("pipe.csv", "gone.csv"):
        with pytest.raises(DataError, match=r"is not a file|cannot be read"):
            read_rows(tmp_path / source)


def test_visible():
    assert visible("a\x1b[2J\udcff\u00e9.mp4") == r"a\x1b[2J\udcff" + "\u00e9.mp4"


MESS = st.text(alphabet=st.sampled_from('a1 ,;\t"\n\r.mp4pathlabel{}[]:-\0\ufeff'), max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lists")


@given(st.one_of(st.binary(max_size=80), MESS.map(str.encode), MESS.map(lambda text: (HEADER + text).encode())))
def test_any_bytes_are_a_list_or_refused(folder, data):
    """And a table that is read has all of its lines."""
    for name in ("list.csv", "list.json"):
        try:
            rows, _, _ = read(folder, data, name=name)
        except SfaError:
            continue
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        assert len(rows) >= len([line for line in text.split("\n") if line.strip(' ,;\t"')]) - 1
    (folder / "any.json").write_bytes(data)
    (folder / "any.txt").write_bytes(data)
    for name in ("any.json", "any.txt"):
        try:
            assert read_class_list(folder / name)
        except SfaError:
            continue
