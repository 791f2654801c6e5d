"""`attempts.json`: how each start of a run ended. A run that is started again and again and always fails at the same
place does not get better by another start; the one after the third is refused, so that no scheduler goes on for ever.

Only internal errors and lost ranks (code 70) count, with the same text but for its numbers, of the same recipe and the
same code. A start that was killed leaves `code: null`: nobody knows why.

A failed write of the file is reported and changes nothing: bookkeeping must not decide how a run ends.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import explain, parse_json, read_plain, warn_unwritten, write_json
from sfa_dist.boundary.file_names import ATTEMPTS
from sfa_dist.boundary.secret import without_secrets
from sfa_dist.errors import CheckpointError, LostRankError

KEPT = 20
COUNTED_CODE = 70
FIELDS = {"identity": str, "code": int, "stage": str, "step": int, "error": str}  # Or null.


class Attempts:
    """The starts of one run directory. `identity` is of recipe and code; `limit` failures alike are the last (0: no
    limit)."""

    def __init__(self, run_dir: Path, identity: str, limit: int) -> None:
        self._path, self._identity, self._limit = run_dir / ATTEMPTS, identity, limit
        self._entries: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Notes that a start begins. Raises LostRankError when the last ones all failed alike, CheckpointError when the
        file cannot be read."""
        self._entries = _read(self._path)
        last = self._entries[-self._limit :] if self._limit else []
        if len(last) == self._limit and self._limit and len({self._cause(entry) for entry in last}) == 1:
            entry = last[0]
            if self._cause(entry) is not None:
                raise LostRankError(
                    f"{self._limit} starts in a row ended in stage {entry['stage']} at step {entry['step']} with the "
                    f"same error ({entry['error']}); another one would too. Mend the cause; if it was none of recipe "
                    f"and code, start once more with --set stop.same_failures=0, or remove {self._path}"
                )
        began = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._entries.append(
            {"began": began, "identity": self._identity, "code": None, "stage": None, "step": None, "error": None}
        )
        self._write()

    def end(self, code: int, error: str, stage: str, step: int) -> None:
        """Notes how this start ended. Never raises."""
        if self._entries:
            self._entries[-1] |= {
                "code": code,
                "error": " ".join(without_secrets(error).split())[:300],
                "stage": stage,
                "step": step,
            }
            self._write()

    def _cause(self, entry: dict[str, Any]) -> tuple[Any, ...] | None:
        """What two failures alike have in common; None for an end that is no failure of this recipe and code."""
        if entry["code"] != COUNTED_CODE or entry["identity"] != self._identity:
            return None
        return entry["stage"], entry["step"], re.sub(r"\d+", "#", str(entry["error"]))

    def _write(self) -> None:
        try:
            write_json(self._path, self._entries[-KEPT:])
        except OSError as error:
            warn_unwritten(self._path, error)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries = parse_json(read_plain(path))
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise ValueError("not what this program writes")
        return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({explain(error, path)}); remove it") from error


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        key in entry and (entry[key] is None or isinstance(entry[key], kind)) for key, kind in FIELDS.items()
    )
