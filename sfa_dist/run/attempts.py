"""`attempts.json`: how each start of a run ended, so that a scheduler does not repeat the same failure for ever.

After `stop.same_failures` (by default three) equal failures in a row the next start is refused. Only internal errors
and lost ranks (code 70) count, in the same stage, at the same step and with the same text apart from numbers, of the
same recipe and code. A start that was killed leaves `code: null`: its cause is unknown.

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
FIELDS = {"identity": str, "code": int, "stage": str, "step": int, "error": str}  # Each may also be null.


class Attempts:
    """The starts of one run directory.

    `identity` is a hash of recipe and code. After `limit` equal failures in a row no further start is allowed (0: no
    limit).
    """

    def __init__(self, run_dir: Path, identity: str, limit: int) -> None:
        self._path, self._identity, self._limit = run_dir / ATTEMPTS, identity, limit
        self._entries: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Records that a start begins.

        Raises LostRankError if the last `limit` starts all failed alike, CheckpointError if the file cannot be read.
        """
        self._entries = _read(self._path)
        last = self._entries[-self._limit :] if self._limit else []
        if len(last) == self._limit and self._limit and len({self._cause(entry) for entry in last}) == 1:
            entry = last[0]
            if self._cause(entry) is not None:
                raise LostRankError(
                    f"{self._limit} starts in a row ended in stage {entry['stage']} at step {entry['step']} with the "
                    f"same error ({entry['error']}), and another one would too. Fix the cause; if it lies outside "
                    f"recipe and code, start once more with --set stop.same_failures=0, or remove {self._path}"
                )
        began = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._entries.append(
            {"began": began, "identity": self._identity, "code": None, "stage": None, "step": None, "error": None}
        )
        self._write()

    def end(self, code: int, error: str, stage: str, step: int) -> None:
        """Records how this start ended. Never raises."""
        if self._entries:
            self._entries[-1] |= {
                "code": code,
                "error": " ".join(without_secrets(error).split())[:300],
                "stage": stage,
                "step": step,
            }
            self._write()

    def _cause(self, entry: dict[str, Any]) -> tuple[Any, ...] | None:
        """What equal failures have in common; None for an end that is not a failure of this recipe and code."""
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
