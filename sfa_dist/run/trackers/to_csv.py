"""CSV: the files `csv/<stage>-train.csv` and `csv/<stage>-eval.csv` in the run directory, a row for each line.

The columns are the keys of the stage's first line; `member` and `frame_order` are there where only some lines have
them. The first row that a start writes for a stage and kind removes the rows of its step and later ones, which a
resume from an earlier checkpoint computes again: no step stands there twice. In a sweep this holds for each member.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import write_whole
from sfa_dist.run.trackers.sink import Line

FOLDER = "csv"
SOME = ("member", "frame_order")  # Keys that only some lines of an evaluation have.
ELSEWHERE = ("kind", "stage")  # Keys that the name of the file says.


class CsvSink:
    """The files of one run."""

    name = "csv"

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER
        self._columns: dict[Path, list[str]] = {}
        self._begun: set[tuple[Path, Any]] = set()  # (file, member) that have a row of this start.

    def load(self) -> None:
        """Does nothing: csv is part of Python."""

    def open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, line: Line) -> None:
        path = self._folder / f"{line['stage']}-{line['kind']}.csv"
        row = {key: value for key, value in line.items() if key not in ELSEWHERE and not isinstance(value, dict | list)}
        if (path, row.get("member")) not in self._begun:
            self._begun.add((path, row.get("member")))
            self._begin(path, row)
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(_text([row], self._columns[path]))

    def close(self) -> None:
        """Does nothing: each row is in its file already."""

    def abandon(self) -> None:
        """Does nothing: nothing is held."""

    def _begin(self, path: Path, row: dict[str, Any]) -> None:
        """Writes the file anew: the header, and the rows of an earlier start that stay."""
        header, rows = _read(path)
        columns = self._columns.get(path, header)
        columns += [key for key in (*row, *(SOME if path.stem.endswith("eval") else ())) if key not in columns]
        mine = row.get("member") or ""
        rows = [old for old in rows if old.get("member", "") != mine or int(old["step"]) < row["step"]]
        self._columns[path] = columns
        heading = _text([dict(zip(columns, columns, strict=True))], columns)
        write_whole(path, (heading + _text(rows, columns)).encode())


def _text(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """The rows as lines; raises ValueError for a key without a column."""
    out = io.StringIO()
    csv.DictWriter(out, columns, restval="", lineterminator="\n").writerows(rows)
    return out.getvalue()


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of a file, without a last line that a kill has cut; nothing where there is no file."""
    if not path.is_file():
        return [], []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    reader = csv.DictReader(io.StringIO(whole))
    rows = list(reader)
    return list(reader.fieldnames or []), rows
