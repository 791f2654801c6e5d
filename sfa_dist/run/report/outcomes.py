"""Each clip of a test: its class, what it is taken for, with what probability. From test/predictions.npz or .parquet
(training/prediction_file.py writes them)."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sfa_dist.recipe.stage_names import TEST

Array = npt.NDArray[Any]
SINGLE = "label"  # The column of the only head's labels in parquet.
FILES = ("predictions.npz", "predictions.parquet")


class NoOutcomesError(Exception):
    """Why the clips of a test are not known one by one, in words."""


@dataclass(frozen=True)
class Outcomes:
    """Of n clips and h heads (1, or noun and verb): labels and predicted int64 (n, h), probability float64 (n,) of the
    prediction, None where not all scores are recorded. names: of each head's classes, empty where not known."""

    shards: list[str]
    keys: list[str]
    labels: Array
    predicted: Array
    probability: Array | None
    names: list[list[str]]

    @property
    def right(self) -> Array:
        """bool (n,): of several heads all are right."""
        found: Array = (self.labels == self.predicted).all(axis=1)
        return found

    def words(self, numbers: Array) -> str:
        """The class names of one row, or the numbers where they have none."""
        pairs = zip(self.names, numbers.tolist(), strict=True)
        return ", ".join(names[number] if 0 <= number < len(names) else str(number) for names, number in pairs)


def read_outcomes(run_dir: Path) -> Outcomes:
    """Reads them, from the later test where there are files of two. Raises NoOutcomesError."""
    found = [path for name in FILES if (path := run_dir / TEST / name).is_file()]
    if not found:
        raise NoOutcomesError(f"the run has no {TEST}/{' or '.join(FILES)} (test.predictions: npz writes the former)")
    path = max(found, key=lambda file: file.stat().st_mtime_ns)
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise NoOutcomesError(f"{TEST}/{path.name} needs pyarrow, which is not installed: pip install pyarrow")
    try:
        return _outcomes(_parquet_columns(path) if path.suffix == ".parquet" else _npz_columns(path))
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile, TypeError, NotImplementedError) as error:
        raise NoOutcomesError(f"{TEST}/{path.name} cannot be read ({type(error).__name__}: {error})") from error


def _npz_columns(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as columns:
        return dict(columns)


def _parquet_columns(path: Path) -> dict[str, Array]:
    """The same columns as of npz: labels (n,) or (n, 2), and lists of scores as rows."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path).combine_chunks()
    about = {key.decode(): value for key, value in (table.schema.metadata or {}).items()}
    heads = json.loads(about["heads"])
    facts = {key: np.array(json.loads(about[key])) for key in ("head_sizes", *_name_keys(heads)) if key in about}
    columns = {"heads": np.array(heads, dtype=np.str_), **facts}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        is_list = hasattr(column.type, "list_size")
        flat = column.flatten() if is_list else column
        columns[name] = (
            flat.to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
            if is_list
            else np.array(flat)
        )
    columns["labels"] = np.stack([columns[head] for head in heads or [SINGLE]], axis=1)
    return columns


def _outcomes(columns: Mapping[str, Array]) -> Outcomes:
    keys, shards, labels = columns["keys"].tolist(), columns["shards"].tolist(), columns["labels"]
    labels = labels.reshape(len(keys), -1)
    heads = columns["heads"].tolist()
    names = [columns[key].tolist() if key in columns else [] for key in _name_keys(heads)]
    if len(names) != labels.shape[1]:
        raise ValueError(f"{labels.shape[1]} labels a clip and {len(names)} heads")
    if "logits" not in columns:
        best = [columns[f"{head}_top_classes" if heads else "top_classes"][:, 0] for head in heads or [""]]
        return Outcomes(shards, keys, labels, np.stack(best, axis=1), None, names)
    cuts = np.cumsum(columns["head_sizes"])[:-1]  # Of a single head there is none.
    parts = np.split(columns["logits"].astype(np.float64), cuts, axis=1)
    predicted = np.stack([_best(part) for part in parts], axis=1)
    probability = np.prod([_softmax(part).max(axis=1) for part in parts], axis=0)
    return Outcomes(shards, keys, labels, predicted, probability, names)


def _name_keys(heads: list[str]) -> list[str]:
    return [f"{head}_classes" for head in heads] or ["classes"]


def _best(logits: Array) -> Array:
    """As the test itself ranks them, which matters where scores are equal (training/metrics.py)."""
    best: Array = torch.from_numpy(logits).topk(min(5, logits.shape[1]), dim=1).indices[:, 0].numpy()
    return best


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares
