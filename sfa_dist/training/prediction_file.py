"""The scores of each clip of a test, in one file for other programs: npz (without pickle) or parquet.

Each clip that was scored is a row, in the order of the shards: `keys` and `shards` name it, and `labels` is its class,
(n,), or its noun and verb, (n, 2). `logits`, float32 (n, classes), is the average over its views. A model with more
than MAX_LOGITS classes has `top_classes` and `top_logits` instead, the best TOP_CLASSES of each head. The file also has
`heads` and `head_sizes`, `classes` or `noun_classes` and `verb_classes` (the names), `views` (temporal, spatial) and
`average`.

Rank 0 writes. The other ranks send it their rows every few batches, and it keeps them on disk until the file is
written, so no rank holds more than a few batches in memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.shards.shard_names import shard_name
from sfa_dist.errors import UsageError
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.training.metrics import SINGLE

Kind = Literal["npz", "parquet"]
Array = npt.NDArray[Any]
FLUSH_BATCHES = 16  # Ranks send their rows to rank 0 after this many batches.
MAX_LOGITS, TOP_CLASSES = 4096, 100
ROWS_AT_A_TIME = 1024


def require_writer(kind: Kind | None) -> None:
    """Raises UsageError where this kind of file cannot be written; called before a run, not after its test."""
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError("test.predictions: parquet needs pyarrow, which is not installed: pip install pyarrow, or npz")


class PredictionFile:
    """Collects the rows of all ranks. All methods are collective."""

    def __init__(
        self, folder: Path, name: str, kind: Kind, index: SampleIndex, heads: Mapping[str, int], runtime: Runtime
    ) -> None:
        self.path = folder / f"{name}.{kind}"
        self._spool = folder / f".{name}.rows"
        self._index, self._heads, self._runtime = index, heads, runtime
        self._waiting: list[tuple[Array, dict[str, Array]]] = []
        self._batches = 0
        self._columns: dict[str, Array] = {}  # On rank 0: a row for each clip of the index, in files.
        self._scored = np.zeros(len(index), dtype=bool)

        def begin() -> None:
            shutil.rmtree(self._spool, ignore_errors=True)
            self._spool.mkdir(parents=True)

        runtime.on_main(begin)

    def add(self, batch: Batch, scores: Tensor) -> None:
        """Adds the scores (B, classes) of a batch's clips except those of weight 0. Raises CheckpointError."""
        real = batch.weights.cpu() > 0
        self._waiting.append((batch.ids[real].numpy(), self._cells(scores.cpu()[real])))
        self._batches += 1
        if self._batches % FLUSH_BATCHES == 0:
            self._flush()

    def finish(self, facts: Mapping[str, Array]) -> Path:
        """Writes the file, all that was added and `facts`, and returns its path. Raises CheckpointError."""
        self._flush()
        self._runtime.on_main(lambda: self._write(facts))
        return self.path

    def _cells(self, scores: Tensor) -> dict[str, Array]:
        if scores.shape[1] <= MAX_LOGITS:
            return {"logits": scores.float().numpy()}
        heads = self._heads or {SINGLE: scores.shape[1]}
        cells: dict[str, Array] = {}
        for head, part in zip(heads, scores.split(list(heads.values()), dim=1), strict=True):
            best = part.topk(min(TOP_CLASSES, part.shape[1]), dim=1)
            prefix = f"{head}_" if self._heads else ""
            cells[f"{prefix}top_classes"] = best.indices.numpy()
            cells[f"{prefix}top_logits"] = best.values.float().numpy()
        return cells

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        everywhere = self._runtime.gather_to_main(rows)
        self._runtime.on_main(lambda: self._store([row for own in everywhere for row in own]))

    def _store(self, rows: list[tuple[Array, dict[str, Array]]]) -> None:
        for ids, cells in rows:
            for name, values in cells.items():
                if name not in self._columns:
                    path = self._spool / f"{name}.npy"
                    shape = (len(self._index), values.shape[1])
                    self._columns[name] = np.lib.format.open_memmap(path, "w+", values.dtype, shape)
                self._columns[name][ids] = values
            self._scored[ids] = True

    def _write(self, facts: Mapping[str, Array]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        write = _write_npz if self.path.suffix == ".npz" else _write_parquet
        rows = np.flatnonzero(self._scored)
        try:
            write(temporary, self._index, rows, self._columns, {**self._about(), **facts})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._columns = {}
            shutil.rmtree(self._spool, ignore_errors=True)

    def _about(self) -> dict[str, Array]:
        names = self._index.classes
        named = {f"{head}_classes": each for head, each in names.items()} if isinstance(names, dict) else {}
        if isinstance(names, list):
            named = {"classes": names}
        about = {key: np.array(value, dtype=np.str_) for key, value in named.items()}
        heads = self._heads or {}
        sizes = np.array(list(heads.values()), dtype=np.int64)
        return {**about, "heads": np.array(list(heads), dtype=np.str_), "head_sizes": sizes}


def _names(index: SampleIndex, rows: Array) -> dict[str, Array]:
    keys = [index.keys[row] for row in rows.tolist()]
    shards = [shard_name(index.shards[shard]) for shard in index.shard[rows].tolist()]
    return {"keys": np.array(keys, dtype=np.str_), "shards": np.array(shards, dtype=np.str_)}


def _blocks(rows: Array) -> Iterator[Array]:
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        yield rows[first : first + ROWS_AT_A_TIME]


def _write_npz(path: Path, index: SampleIndex, rows: Array, columns: dict[str, Array], facts: dict[str, Array]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        whole = {**_names(index, rows), "labels": index.label[rows], **facts}
        for name, array in whole.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        for name, column in columns.items():
            shape = (len(rows), column.shape[1])
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": np.lib.format.dtype_to_descr(column.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for block in _blocks(rows):
                    member.write(np.ascontiguousarray(column[block]).tobytes())


def _write_parquet(
    path: Path, index: SampleIndex, rows: Array, columns: dict[str, Array], facts: dict[str, Array]
) -> None:
    """Writes columns for key, shard, label (or noun, verb) and lists of scores; `facts` go into the schema as JSON."""
    import pyarrow
    import pyarrow.parquet

    heads = facts["heads"].tolist() or [SINGLE]
    about = {name: json.dumps(array.tolist()) for name, array in facts.items()}

    def table(block: Array) -> Any:
        cells: dict[str, Any] = _names(index, block)
        labels = index.label[block].reshape(len(block), len(heads))
        cells |= {head: labels[:, column] for column, head in enumerate(heads)}
        for name, column in columns.items():
            flat = pyarrow.array(np.ascontiguousarray(column[block]).reshape(-1))
            cells[name] = pyarrow.FixedSizeListArray.from_arrays(flat, column.shape[1])
        return pyarrow.table(cells).replace_schema_metadata(about)

    with pyarrow.parquet.ParquetWriter(path, table(rows[:0]).schema) as writer:
        for block in _blocks(rows):
            writer.write_table(table(block))
