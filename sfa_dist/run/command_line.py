"""The command line of every program here: the parser, how errors are reported, and their exit codes."""

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
    """An argparse parser that raises UsageError for a wrong command line, including invalid paths."""

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


def exit_code_of(argv: Sequence[str] | None, parser: argparse.ArgumentParser) -> int:
    """Parses `argv` (None: sys.argv) and runs the command. Returns the contract's exit code.

    Every failure prints one line to stderr.
    """
    words = sys.argv if argv is None else argv
    debug = "--debug" in words
    try:
        parsed = parser.parse_args(argv)
        return int(parsed.run(parsed) or 0)
    except SfaError as error:
        if debug:
            print(without_secrets(traceback.format_exc()), file=sys.stderr, end="")
        if not error.print_suppressed:
            prefix = "stopped" if isinstance(error, PreemptedError) else "error"
            if isinstance(error, PreemptedError):
                _wait_for_launcher()
            text = without_secrets(" ".join(str(error).split()))
            print_line(f"{prefix}: {text}")
            _print_as_json(words, text, error.exit_code, error.report or {})
        return error.exit_code
    except Exception as error:  # noqa: BLE001 (the last resort: one line for the user, the traceback in a file)
        disk = isinstance(error, OSError) and not isinstance(error, ConnectionError)
        reason = explain(error) if disk else error
        text = without_secrets(" ".join(f"{_rank_prefix()}{type(error).__name__}: {reason}".split()))
        print_line(f"error: {'disk' if disk else 'internal'}: {text}{_keep_traceback(debug)}")
        code = 74 if disk else 70
        _print_as_json(words, text, code, {})
        return code
    except KeyboardInterrupt:
        print_line(INTERRUPTED)
        return INTERRUPTED_CODE


def _print_as_json(words: Sequence[str], text: str, code: int, report: Mapping[str, Any]) -> None:
    """With --json, prints a failure to stdout too: `error`, `exit_code` and the command's partial report."""
    if "--json" in words:
        with suppress(BrokenPipeError):  # The reader of stdout has left; the error is on stderr.
            print(json.dumps({"error": text, "exit_code": code, **report}), flush=True)


def _wait_for_launcher() -> None:
    """Waits so that the run's outcome is the last line on the terminal.

    Ctrl-C ends deepspeed's launcher with a traceback a quarter of a second later.
    """
    if read_launch(environment()).launcher == "deepspeed":
        time.sleep(LAUNCHER_S)


def _rank_prefix() -> str:
    """`rank 1 on node2: ` if this is one of several ranks, else empty."""
    try:
        launch = read_launch(environment())
    except (UsageError, ValueError):
        return ""  # The launch is wrong, which has been reported.
    return f"rank {launch.rank} on {socket.gethostname()}: " if launch.world_size > 1 else ""


def _keep_traceback(debug: bool) -> str:
    """Prints the traceback if `debug`, else writes it to a file. Returns a note that says where it is."""
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
    """Seconds for which this rank waits before it exits with `code`.

    srun and torchrun end all ranks when the first one exits with an error. The ranks that print nothing wait, so that
    the rank that prints the error is not ended as if it had been asked to stop.
    """
    try:
        launch = read_launch(environment())
    except (UsageError, ValueError):
        return 0.0
    return 0.0 if launch.prints_errors or code in (0, PreemptedError.exit_code) else SILENT_EXIT_S
