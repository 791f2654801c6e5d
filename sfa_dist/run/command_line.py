"""The command line of every program here: the parser, and how an error is told and which exit code follows."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import explain, path_argument, print_line
from sfa_dist.boundary.secret import without_secrets
from sfa_dist.errors import PreemptedError, SfaError, UsageError
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.launch import read_launch
from sfa_dist.parallel.stop_flag import INTERRUPTED, INTERRUPTED_CODE

SILENT_EXIT_S = 2.0
LAUNCHER_S = 0.5
EXIT_CODES = """\
exit codes:
  0 done
  64 wrong command line
  65 bad data
  70 internal error or lost rank
  74 checkpoint or disk
  75 stopped with state saved, run me again
  78 bad recipe, or recipe and state disagree"""


class Parser(argparse.ArgumentParser):
    """argparse with the contract's exit code for a wrong command line, paths that cannot be one included."""

    def __init__(self, *arguments: Any, **words: Any) -> None:
        super().__init__(*arguments, **words)
        self.register("type", Path, _path)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message} (see --help)")


def _path(text: str) -> Path:
    try:
        return path_argument(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def exit_code_of(arguments_of: Sequence[str] | None, parser: argparse.ArgumentParser) -> int:
    """Parses and runs; every failure is one line on stderr and the contract's exit code."""
    words = sys.argv if arguments_of is None else arguments_of
    debug = "--debug" in words
    try:
        parsed = parser.parse_args(arguments_of)
        return int(parsed.run(parsed) or 0)
    except SfaError as error:
        if debug:
            print(without_secrets(traceback.format_exc()), file=sys.stderr, end="")
        if not error.print_suppressed:
            prefix = "stopped" if isinstance(error, PreemptedError) else "error"
            if isinstance(error, PreemptedError):
                _let_launcher_speak()
            said = without_secrets(" ".join(str(error).split()))
            print_line(f"{prefix}: {said}")
            _print_as_json(words, said, error.exit_code, error.report or {})
        return error.exit_code
    except Exception as error:  # noqa: BLE001 (the last line of defence: one line for the user, the rest in the log)
        disk = isinstance(error, OSError) and not isinstance(error, ConnectionError)
        reason = explain(error) if disk else error
        said = without_secrets(" ".join(f"{_who()}{type(error).__name__}: {reason}".split()))
        print_line(f"error: {'disk' if disk else 'internal'}: {said}{_keep_traceback(debug)}")
        code = 74 if disk else 70
        _print_as_json(words, said, code, {})
        return code
    except KeyboardInterrupt:
        print_line(INTERRUPTED)
        return INTERRUPTED_CODE


def _print_as_json(words: Sequence[str], said: str, code: int, report: Mapping[str, Any]) -> None:
    """Under --json a failure is an object on stdout too: `error`, `exit_code`, and what the command had found."""
    if "--json" in words:
        with suppress(BrokenPipeError):  # The reader of stdout has left; the error is on stderr.
            print(json.dumps({"error": said, "exit_code": code, **report}), flush=True)


def _let_launcher_speak() -> None:
    """Ctrl-C ends deepspeed's launcher with a traceback a quarter of a second later: what became of the run comes after
    it."""
    if read_launch(environment()).launcher == "deepspeed":
        time.sleep(LAUNCHER_S)


def _who() -> str:
    """`rank 1 on node2: ` where this is one of several ranks."""
    try:
        launch = read_launch(environment())
    except (UsageError, ValueError):
        return ""  # What started this process did not get it right, and that has been told.
    return f"rank {launch.rank} on {socket.gethostname()}: " if launch.world_size > 1 else ""


def _keep_traceback(debug: bool) -> str:
    """Prints the traceback (--debug), or puts it into a file of this process and says where."""
    text = without_secrets(traceback.format_exc())
    if debug:
        print(text, file=sys.stderr, end="")
        return ""
    file = Path(tempfile.gettempdir()) / f"sfa_dist-{os.getpid()}.log"
    try:
        file.write_text(text)
    except OSError:
        return " (run with --debug for the traceback)"
    return f" (traceback in {file}, or run with --debug)"


def patience(code: int) -> float:
    """Seconds for which this rank stays, with its code: srun and torchrun end all others when the first one has left
    with an error, and the one that tells the error of all must not be ended by that, as if it had been asked to stop.
    """
    try:
        launch = read_launch(environment())
    except (UsageError, ValueError):
        return 0.0
    return 0.0 if launch.prints_errors or code in (0, PreemptedError.exit_code) else SILENT_EXIT_S
