"""The errors that a user can act on, each with the exit code of the contract.

A message says what is wrong, where (recipe line, shard, key, rank, step), and what to do next, in one line.
"""

from collections.abc import Mapping
from typing import Any

CHECKS_FAILED = 3  # What `sfa check-learning` returns where its checks ran and one did not pass.


class SfaError(Exception):
    """Base of all errors that end a run with one line on stderr; `exit_code` is what the process returns.

    `print_suppressed` is set where all ranks raise the same error: one of them prints it. `report` is what a
    command has found until then, printed beside the error under --json.
    """

    exit_code = 70
    print_suppressed = False
    report: Mapping[str, Any] | None = None


class UsageError(SfaError):
    """Wrong command line."""

    exit_code = 64


class DataError(SfaError):
    """Data that is missing, corrupt over the budget, or does not fit the recipe's classes."""

    exit_code = 65


class LostRankError(SfaError):
    """Internal error or a rank that went away."""

    exit_code = 70


class CheckpointError(SfaError):
    """A checkpoint or weights file that cannot be read or written; disk I/O."""

    exit_code = 74


class PreemptedError(SfaError):
    """The run was asked to stop and has saved its state: run the same command again to go on."""

    exit_code = 75


class RecipeError(SfaError):
    """A recipe that is wrong, or that disagrees with the state it is to continue."""

    exit_code = 78
