"""Errors that end a run with one line on stderr, each with its exit code from the contract.

A message says what is wrong, where (recipe line, shard, key, rank, step) and what to do next, in one line.
"""

from collections.abc import Mapping
from typing import Any

CHECKS_FAILED = 3  # Exit code of `sfa check-learning` when its checks ran and at least one did not pass.


class SfaError(Exception):
    """Base of all errors that end a run with one line on stderr; the process exits with `exit_code`.

    `print_suppressed` is set on all ranks but one when every rank raises the same error. `report` holds the results
    that a command found before the error; --json prints them with it.
    """

    exit_code = 70
    print_suppressed = False
    report: Mapping[str, Any] | None = None


class UsageError(SfaError):
    """A wrong command line."""

    exit_code = 64


class DataError(SfaError):
    """Data that is missing, corrupt beyond the budget, or inconsistent with the recipe's classes."""

    exit_code = 65


class LostRankError(SfaError):
    """An internal error, or a lost rank."""

    exit_code = 70


class CheckpointError(SfaError):
    """A checkpoint or weights file that cannot be read or written, or another disk error."""

    exit_code = 74


class PreemptedError(SfaError):
    """The run was asked to stop and has saved its state; the same command continues it."""

    exit_code = 75


class RecipeError(SfaError):
    """A wrong recipe, or one that disagrees with the saved state of the run."""

    exit_code = 78
