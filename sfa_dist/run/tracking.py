"""The output of a run: console and log.jsonl, all from rank 0; the trackers (`trackers/`) get lines of log.jsonl.

None of them may end a run: a tracker is switched off if it fails, output to a terminal that is gone is dropped, and
lines that a full disk does not take wait until there is room.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sfa_dist.boundary.counted import counted
from sfa_dist.boundary.disk import print_line
from sfa_dist.boundary.file_names import CONSOLE, LOG
from sfa_dist.boundary.plain import for_terminal
from sfa_dist.boundary.secret import without_secrets, without_secrets_in
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.chance import console_line, guessing
from sfa_dist.run.trackers.background import Background
from sfa_dist.run.trackers.chosen import sinks_of

_MAX_WAITING = 16 << 20  # Bytes of lines that wait for room on the disk.


class LineFile:
    """A file to which lines are appended without buffering.

    If a kill or a full disk has cut the last line, that line is ended first, so that it does not spoil the next one.
    What cannot be written waits and is tried again with the next line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._waiting, self._warned = path, bytearray(), False
        self._file = path.open("a+b", buffering=0)
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            self._waiting += b"" if self._file.read(1) == b"\n" else b"\n"

    def write(self, text: str) -> None:
        """Appends text. A disk that refuses raises nothing; the first failure is reported on stderr."""
        if len(self._waiting) < _MAX_WAITING:
            self._waiting += text.encode()
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._warned:
                self._warned = True
                print_line(
                    f"{self.path} cannot be written ({error.strerror}): make room; its lines wait, the run goes on"
                )

    def flush(self) -> None:
        """Does nothing: `write` holds nothing back that the disk takes."""

    def close(self) -> None:
        """Closes the file, and reports how many lines are lost if some still wait."""
        if self._waiting:
            lines = self._waiting.count(b"\n")
            print_line(f"{self.path} lacks its last {lines} lines: no room for them was made")
        self._file.close()


class Terminal(Console):
    """A console whose reader may go away."""

    def on_broken_pipe(self) -> None:
        """Prints nothing more, where rich itself would end the program."""
        self.quiet = True
        # Stdout's buffer must go somewhere, or the interpreter's last flush changes the exit code to 120.
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


class Tracker:
    """The log of one run. With `run_dir` None, as on all ranks but 0, every method does nothing."""

    def __init__(
        self,
        run_dir: Path | None,
        log: LogBlock,
        config: Mapping[str, Any],
        environ: Mapping[str, str],
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Opens the files, and begins the trackers that `log` names; `config` is the recipe that they show.

        `stopping` returns whether the run was asked to stop. Raises RecipeError for a tracker that is not installed.
        """
        self._jsonl: LineFile | None = None
        self._trackers: Background | None = None
        self._consoles: list[Console] = []  # The terminal, then console.log.
        self._seen: set[str] = set()
        if run_dir is not None:
            sinks = sinks_of(log, run_dir, config, environ, stopping)
            run_dir.mkdir(parents=True, exist_ok=True)
            self._jsonl = LineFile(run_dir / LOG)
            self._text = LineFile(run_dir / CONSOLE)
            # Fixed for the file; the terminal's console has the terminal's width.
            file = Console(file=cast("IO[str]", self._text), width=160, soft_wrap=True)
            self._consoles = [Terminal(soft_wrap=True), file]
            self._trackers = Background(sinks, stopping) if sinks else None

    @classmethod
    def console_only(cls, log: LogBlock, on_stderr: bool = False) -> Tracker:
        """A tracker that prints to the terminal and writes no files, for a dry run."""
        tracker = cls(None, log, {}, {})
        tracker._consoles = [Terminal(soft_wrap=True, stderr=on_stderr)]
        return tracker

    @contextmanager
    def progress(self, title: str, done: int, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar on a terminal, nothing elsewhere. Each call of the yielded function advances it by one."""
        if not self._consoles or not self._consoles[0].is_terminal:
            yield lambda: None
            return
        with Progress(console=self._consoles[0], transient=True) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda: bar.advance(task)

    def say(self, text: str | Table, on_terminal: bool = True) -> None:
        """Prints to the terminal and console.log, or to console.log alone."""
        self._print(text, self._consoles if on_terminal else self._consoles[1:])

    def show(self, text: str) -> None:
        """Prints to the terminal alone, for what console.log has already."""
        self._print(text, self._consoles[:1])

    def is_new(self, what: str) -> bool:
        """Whether this is the first call with `what` in this run, for messages that are printed once."""
        is_new = what not in self._seen
        self._seen.add(what)
        return is_new

    def _print(self, text: str | Table, consoles: list[Console]) -> None:
        if isinstance(text, str):
            text = for_terminal(without_secrets(text))
        for console in consoles:
            try:
                console.print(text, highlight=False, markup=False)
            except OSError:  # The console is redirected to a full disk.
                console.on_broken_pipe()

    def record(self, kind: str, **values: Any) -> None:
        """Writes one line of log.jsonl, and sends it to the trackers if its kind is `train` or `eval`."""
        if self._jsonl is None:
            return
        self._report_failures()
        line = {"kind": kind, **{key: _plain(without_secrets_in(value)) for key, value in values.items()}}
        self._jsonl.write(json.dumps(line) + "\n")
        if self._trackers is not None and kind in ("train", "eval"):
            self._send(line, self._trackers)

    def event(self, event: str, **values: Any) -> None:
        """Writes a line of kind `event`."""
        self.record("event", event=event, **values)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._trackers is not None:
            self._close_trackers(self._trackers)
            self._trackers = None
        if self._jsonl is not None:
            for file in (self._jsonl, self._text):
                try:
                    file.close()
                except OSError as error:  # A network disk may report only now that it is full.
                    print_line(f"{file.path} may lack its last lines: {error.strerror}")
            self._jsonl, self._consoles = None, []

    def _send(self, line: Mapping[str, Any], trackers: Background) -> None:
        if not trackers.send(line) and trackers.dropped == 1:
            print_line(f"{trackers.names}: too far behind, lines are left out from here on; log.jsonl has all")

    def _close_trackers(self, trackers: Background) -> None:
        closed = trackers.close()
        self._report_failures()
        if not closed:
            self.event("trackers_unfinished", trackers=trackers.names, seconds=trackers.flush_seconds)
            seconds = f"{trackers.flush_seconds:g} s"
            print_line(f"{trackers.names}: not done after {seconds}, the last lines are left out; log.jsonl has all")
        if trackers.dropped:
            self.event("trackers_dropped", trackers=trackers.names, lines=trackers.dropped)
            print_line(f"{trackers.names}: {counted(trackers.dropped, 'line')} left out; log.jsonl has all")

    def _report_failures(self) -> None:
        """Reports the trackers that were switched off since the last line."""
        for failure in self._trackers.failures() if self._trackers is not None else ():
            self.event(f"{failure.name}_off", reason=failure.reason)
            if not failure.quiet:
                print_line(f"{failure.name} is off for this run: {failure.reason}")


def train_line(position: str, values: Mapping[str, Any], remaining: float) -> str:
    """The console line of some training steps, in the order of mmengine's.

    `position` names stage, epoch and step; `remaining` is in seconds.
    """
    parts = {
        "loss": f"{values['loss']:.4f}",
        "lr": f"{values['lr']:.3e}",
        "grad_norm": f"{values['grad_norm']:.3f}",
        "time": f"{values['step_time']:.3f}",
        "data_time": f"{values['data_time']:.3f}",
        "clips/s": f"{values['samples_per_second']:.1f}",
        "memory": f"{values['memory_gib']:.2f} GiB",
        "eta": clock(remaining),
    }
    return f"Train {position} " + " ".join(f"{key}: {value}" for key, value in parts.items())


def eval_line(position: str, result: Mapping[str, Any]) -> str:
    """The console line of an evaluation; `chance` in it is the score of guessing."""
    guessed = guessing(result)
    shown = console_line(result) | ({} if guessed is None else {"chance": guessed})
    scores = " ".join(f"{key}: {value:.4f}" for key, value in shown.items() if key != "samples")
    return f"Eval {position} {scores} clips: {result['samples']}"


def epoch_line(evaluated: str, values: Mapping[str, Any]) -> str:
    """The terminal's line of an epoch: its evaluation, and the loss, speed and remaining time of the training."""
    if not values:
        return evaluated  # No step of this start was logged.
    rate, left = f"{values['samples_per_second']:.1f} clips/s", clock(values["remaining"])
    return f"{evaluated}; training loss: {values['loss']:.4f}, {rate}, eta: {left}"


def clock(seconds: float) -> str:
    """Seconds as `2 d 03:04:05` or `3:04:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def _plain(value: Any) -> Any:
    """A value for JSON, which has no NaN or infinity: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
