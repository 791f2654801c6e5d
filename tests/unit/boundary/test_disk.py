"""Small files that may be anything, and what a disk says: in words, with an orderly error, without waiting."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_dist.boundary import disk
from sfa_dist.checkpoint import newest_valid, read_state, verify
from sfa_dist.data.features.feature_shards import read_building, read_manifest
from sfa_dist.data.shards.index_file import parse_index
from sfa_dist.data.shards.quarantine import read_quarantine
from sfa_dist.errors import SfaError
from sfa_dist.inference.finished_stage import _best_member
from sfa_dist.models.weights_file import checked_sha256
from sfa_dist.run.attempts import Attempts
from sfa_dist.run.lock import held
from sfa_dist.run.record import collect_results
from sfa_dist.run.report.page import write_report

DEEP = 100_000
WEIGHTS = "stage1/weights.safetensors"
CONTENTS = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "huge number": b'{"result": {"steps": 1e999}, "inputs": {}, "version": ' + b"9" * 5000 + b"}",
    "NaN": b'{"inputs": {}, "result": {"steps": NaN, "seconds": NaN}, "best": NaN, "heads": NaN, "files": NaN}',
    "nulls": b'{"inputs": null, "result": null, "best": null, "heads": null, "files": null, "format": null}',
    "deep list": b"[" * DEEP,
    "deep object": b'{"a":' * DEEP,
    "deep and whole": b"[" * 500 + b"]" * 500,
    "list of lists": b'[[[{"identity": []}]]]',
    "entries of other types": b'[{"identity": 1, "code": "70", "stage": [], "step": {}, "error": 3}]',
    "not UTF-8": b'{"inputs": "\xff\xfe"}',
    "NUL": b"\0" * 100,
    "objects in lists": b'{"stages": [1], "result": {"steps": []}, "heads": {"a": 3}, "files": {"model": 3}}',
}
# Each reads one file of a run directory, at this place.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "done.json": ("stage1/done.json", collect_results),
    "done.json beside weights": (
        "stage1/done.json",
        lambda run: checked_sha256(run / WEIGHTS),
    ),
    "attempts.json": ("attempts.json", lambda run: Attempts(run, "", 3).begin()),
    "lock": ("lock", lambda run: held(run, {}).__enter__()),
    "result.json of a sweep": ("result.json", _best_member),
    "MANIFEST.json": ("checkpoints/step-00000004/MANIFEST.json", lambda run: newest_valid(run / "checkpoints")),
    "MANIFEST.json given": ("step/MANIFEST.json", lambda run: verify(run / "step")),
    "state.json": ("state.json", read_state),
    "manifest.json": ("manifest.json", read_manifest),
    "building.json": ("building.json", read_building),
    "index.json": ("index.json", lambda run: parse_index((run / "index.json").read_bytes(), "index.json")),
    "quarantine.jsonl": ("quarantine.jsonl", lambda run: read_quarantine(run / "quarantine.jsonl")),
    "result.json": ("result.json", write_report),
    "env.json": ("env.json", write_report),
    "log.jsonl": ("log.jsonl", write_report),
    "classes.json": ("test/classes.json", write_report),
}


def run_directory(folder: Path, place: str) -> Path:
    """A folder in which only the file at `place` is missing for its reader to be content."""
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / "stage1").mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes(b"weights")
    return folder


def is_orderly(read: Callable[[], object]) -> None:
    """It works, or raises what the user is told."""
    with contextlib.suppress(SfaError, OSError):
        read()


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_any_content_is_an_orderly_error(tmp_path: Path, reader: str, content: bytes) -> None:
    place, read = READERS[reader]
    run = run_directory(tmp_path, place)
    (run / place).write_bytes(content)
    is_orderly(lambda: read(run))


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link", "circle"])
@pytest.mark.parametrize("reader", [reader for reader in READERS if reader not in ("index.json", "lock")])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, reader: str, kind: str) -> None:
    place, read = READERS[reader]
    path = run_directory(tmp_path, place) / place
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "dangling link" else path.name)
    is_orderly(lambda: read(tmp_path))


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["inputs", "result", "steps", "seconds", "files", "x"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_a_done_file_of_any_shape_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    run = run_directory(tmp_path_factory.mktemp("run"), "stage1/done.json")
    (run / "stage1/done.json").write_text(json.dumps(value))
    is_orderly(lambda: collect_results(run))
    is_orderly(lambda: checked_sha256(run / WEIGHTS))


def test_the_limits_of_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="larger than"):
        disk.read_plain(tmp_path / "large", limit=10)
    assert disk.read_plain(tmp_path / "large", limit=11) == bytes(11)
    (tmp_path / "link").symlink_to("large")
    with pytest.raises(OSError, match=str(errno.ELOOP)):
        disk.read_plain(tmp_path / "link", follow=False)
    nested = lambda levels: b"[" * levels + b"]" * levels  # noqa: E731
    assert disk.parse_json(nested(disk.MAX_NESTING)) is not None
    with pytest.raises(ValueError, match="nested too deeply"):
        disk.parse_json(nested(disk.MAX_NESTING + 1))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    disk.write_if_new(path, "old")

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", refuse)
    disk.write_if_new(path, "old")  # Nothing to do.
    with pytest.raises(OSError, match="No space"):
        disk.write_if_new(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EDQUOT, "disk quota is used up"),
        (errno.EROFS, "mounted read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EMFILE, "too many open files in this process (ulimit -n)"),
        (errno.EFBIG, "larger than the file system or the limit of this process allows"),
        (errno.ENAMETOOLONG, "the name is too long"),
    ],
)
def test_a_refusal_is_told_in_words(number: int, words: str, tmp_path: Path) -> None:
    told = disk.explain(OSError(number, os.strerror(number), str(tmp_path / "file")), tmp_path)
    assert words in told
    assert errno.errorcode[number] in told
    assert str(tmp_path / "file") in told


def test_inodes_that_have_run_out_are_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    room = {"f_bavail": 18 * 2**20, "f_frsize": 1, "f_files": 1000, "f_favail": 0}
    monkeypatch.setattr(disk.os, "statvfs", lambda _: SimpleNamespace(**room))
    assert "all 1000 inodes of the file system are used" in disk.explain(full, tmp_path, 2**20)
    room |= {"f_favail": 7}
    assert "no space left, needed 1.0 MiB, have 18.0 MiB" in disk.explain(full, tmp_path, 2**20)
    room |= {"f_favail": 0, "f_files": 0}  # btrfs and its like count none.
    assert "no space left, needed 1.0 MiB" in disk.explain(full, tmp_path, 2**20)


def test_a_refused_record_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("attempts.json", "env.json"):
        disk.warn_unwritten(tmp_path / name, OSError(errno.EROFS, "read-only"))
    disk.warn_unwritten(tmp_path / "env.json", OSError(errno.ENOSPC, "full"))
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2
    assert "attempts.json is not written: the file system is mounted read-only" in told[0]
    assert "env.json is not written: no space left" in told[1]
