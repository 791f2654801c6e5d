"""Loads a checkpoint into an engine. The saved pieces need not match those that this rank owns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from sfa_dist.boundary.disk import explain
from sfa_dist.checkpoint.failpoints import NO_FAILPOINTS, Failpoints
from sfa_dist.checkpoint.files import patiently
from sfa_dist.checkpoint.folder import read_manifest
from sfa_dist.checkpoint.layout import TensorReader
from sfa_dist.checkpoint.writing import MODEL
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.parallel.engines.engine import Engine, Fragment

T = TypeVar("T")
# By (parameter, moment): each saved piece as (start, numel, file, key in the file), in order.
Pieces = dict[tuple[str, str], list[tuple[int, int, TensorReader, str]]]


def read_parameters(path: Path, failpoints: Failpoints = NO_FAILPOINTS) -> dict[str, Tensor]:
    """The whole fp32 parameters of a checkpoint, by name.

    Raises CheckpointError if they cannot be read, RecipeError for another dtype.
    """

    def read() -> dict[str, Tensor]:
        failpoints.reach("load.read")
        with TensorReader(path / MODEL) as file:
            return {name: file.read_whole(name) for name in file.layout.shapes}

    return _reading(path, read)


def load_engine(path: Path, engine: Engine, step: int, failpoints: Failpoints = NO_FAILPOINTS) -> None:
    """Fills the masters and moments of the fragments that this rank owns.

    The module's parameters themselves are loaded with `read_parameters` before the engine is made.
    Raises CheckpointError if something is missing or cannot be read, RecipeError for another dtype.
    """
    engine.make_optimizer_state(step)

    def load() -> None:
        failpoints.reach("load.read")
        with ExitStack() as files:
            model = files.enter_context(TensorReader(path / MODEL))
            others = [path / name for name in sorted(read_manifest(path)) if name.startswith("optimizer-")]
            pieces = _pieces([files.enter_context(TensorReader(file)) for file in others], path)
            for fragment in engine.fragments():
                _check_span(fragment, model, path)
                fragment.tensors["master"].copy_(model.read(fragment.name, fragment.start, fragment.numel))
                for key in fragment.tensors.keys() - {"master"}:
                    _fill(fragment, key, pieces, path)

    _reading(path, load)


def _reading(path: Path, read: Callable[[], T]) -> T:
    """`read()` with retries. Raises CheckpointError for a failing disk or damaged file, RecipeError for its dtype."""
    try:
        return patiently(read)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {explain(error, path)}") from error
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except TypeError as error:
        raise RecipeError(f"{path} is of another dtype: {error}; convert it, or use another --run-dir") from error


def _pieces(readers: list[TensorReader], path: Path) -> Pieces:
    table: Pieces = {}
    for reader in readers:
        for key in reader.layout.shapes:
            name, start, moment = key.rsplit("/", 2)
            table.setdefault((name, moment), []).append((int(start), reader.layout.numel(key), reader, key))
    for (name, moment), found in table.items():
        found.sort(key=lambda piece: piece[:2])
        for before, after in pairwise(found):
            if before[0] + before[1] > after[0]:
                raise CheckpointError(f"{path} has {moment} of {name} twice at element {after[0]}")
    return table


def _check_span(fragment: Fragment, model: TensorReader, path: Path) -> None:
    held = model.layout.numel(fragment.name) if fragment.name in model.layout.shapes else 0
    if fragment.start + fragment.numel > held:
        raise CheckpointError(
            f"{path} lacks {fragment.name}: it has {held} elements, {fragment.start + fragment.numel} are wanted"
        )


def _fill(fragment: Fragment, moment: str, pieces: Pieces, path: Path) -> None:
    """Copies the overlap of each saved piece with this fragment. Raises CheckpointError if they do not cover it."""
    covered, end = 0, fragment.start + fragment.numel
    for start, length, reader, key in pieces.get((fragment.name, moment), []):
        low, high = max(start, fragment.start), min(start + length, end)
        if low < high:
            target = fragment.tensors[moment][low - fragment.start : high - fragment.start]
            target.copy_(reader.read(key, low - start, high - low))
            covered += high - low
    if covered != fragment.numel:
        raise CheckpointError(f"{path} lacks {moment} of {fragment.name}: {covered} of {fragment.numel} elements")
