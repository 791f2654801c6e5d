"""What a run directory holds, as a report reads it: each file that is there, nothing where it is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import parse_json, parse_object, read_object, read_plain
from sfa_dist.boundary.file_names import ATTEMPTS, CLASSES, ENVIRONMENT, LOG, RECIPE, RESULT
from sfa_dist.boundary.secret import without_secrets
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe, StageBlock, load_recipe
from sfa_dist.recipe.stage_names import TEST

MAX_LOG = 2**31  # Bytes.

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The files of a run. `recipe_text` is the resolved recipe without secrets, "" without one."""

    directory: Path
    records: list[Record]
    result: dict[str, Any]
    env: dict[str, Any]
    recipe_text: str
    classes: dict[str, Any]
    attempts: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The directory's."""
        return self.directory.name

    @cached_property
    def recipe(self) -> Recipe | None:
        """The resolved recipe; None where there is none that this version reads."""
        try:
            return load_recipe(self.directory / RECIPE).recipe if self.recipe_text else None
        except (OSError, RecipeError):
            return None  # The pages say so, each where it needs the recipe.

    @property
    def stages(self) -> dict[str, StageBlock]:
        """The stages of the recipe, empty where it is not known."""
        if self.recipe is None:
            return {}
        return {name: stage for name in STAGE_NAMES if (stage := getattr(self.recipe, name)) is not None}

    def events(self, name: str | None = None) -> list[Record]:
        """The events of the log, or those of one name."""
        found = (record for record in self.records if record.get("kind") == "event")
        return [record for record in found if name in (None, record.get("event"))]


def read_run(directory: Path) -> RunFiles:
    """Reads them. Raises CheckpointError for one that is not what this program writes, OSError."""
    recipe = directory / RECIPE  # One of before 0.4 holds secrets.
    text = without_secrets(recipe.read_text(errors="replace")) if recipe.is_file() else ""
    return RunFiles(
        directory,
        read_log(directory / LOG),
        _read(directory / RESULT),
        _read(directory / ENVIRONMENT),
        text,
        _read(directory / TEST / CLASSES, heads=dict).get("heads", {}),
        _read_attempts(directory / ATTEMPTS),
    )


def read_log(path: Path) -> list[Record]:
    """The records of a log.jsonl; the last line of a killed run may be cut and is left out, as is what is no record."""
    records = []
    try:
        for line in read_plain(path, MAX_LOG).splitlines():
            try:
                records.append(parse_object(line, kind=str))
            except ValueError:
                continue
    except FileNotFoundError:
        pass
    return records


def latest_by_step(records: Iterable[Record], kind: str) -> dict[str, list[Record]]:
    """Records of a kind by stage, in order of steps; a step that was run again after a resume counts once, the last
    time."""
    stages: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.get("kind") == kind and not record.keys() & {"frame_order", "member"}:
            stages.setdefault(record["stage"], {})[record["step"]] = record
    return {stage: [by_step[step] for step in sorted(by_step)] for stage, by_step in stages.items()}


def _read(path: Path, **keys: type) -> dict[str, Any]:
    try:
        return read_object(path, **keys)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); run its stage again") from error


def _read_attempts(path: Path) -> list[dict[str, Any]]:
    try:
        entries = parse_json(read_plain(path))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it") from error
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
