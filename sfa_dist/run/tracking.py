"""The output of a run: console, log.jsonl and wandb, all from rank 0.

None of them may end a run: wandb is switched off if it fails, output to a terminal that is gone is dropped, and lines
that a full disk does not take wait until there is room.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sfa_dist.boundary.disk import print_line, write_if_new
from sfa_dist.boundary.file_names import CONSOLE, LOG
from sfa_dist.boundary.plain import for_terminal
from sfa_dist.boundary.secret import without_secrets, without_secrets_in
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.chance import console_line, guessing

WANDB_URL = "https://api.wandb.ai"

# wandb's groups for the kinds and keys of log.jsonl.
PERFORMANCE_KEYS = ("step_time", "data_time", "samples_per_second", "memory_gib", "mfu")


SIGNALS_APART = 1.0  # Seconds within which all processes of a run get a launcher's signal.
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
        self._jsonl: LineFile | None = None
        self._wandb: Any = None
        self._wandb_failed = False
        self._consoles: list[Console] = []  # The terminal, then console.log.
        self._seen: set[str] = set()
        self._stopping = stopping  # Returns whether the run was asked to stop.
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._jsonl = LineFile(run_dir / LOG)
            self._text = LineFile(run_dir / CONSOLE)
            # Fixed for the file; the terminal's console has the terminal's width.
            file = Console(file=cast("IO[str]", self._text), width=160, soft_wrap=True)
            self._consoles = [Terminal(soft_wrap=True), file]
            self._start_wandb(run_dir, log, config, environ)

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
        """Writes one line of log.jsonl, and sends it to wandb if its kind is `train` or `eval`."""
        if self._jsonl is None:
            return
        line = {"kind": kind, **{key: _plain(without_secrets_in(value)) for key, value in values.items()}}
        self._jsonl.write(json.dumps(line) + "\n")
        if self._wandb is not None and kind in ("train", "eval"):
            self._send(kind, line)

    def event(self, event: str, **values: Any) -> None:
        """Writes a line of kind `event`."""
        self.record("event", event=event, **values)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._wandb is not None or self._wandb_failed:
            self._guard(self._end_wandb)
        if self._jsonl is not None:
            for file in (self._jsonl, self._text):
                try:
                    file.close()
                except OSError as error:  # A network disk may report only now that it is full.
                    print_line(f"{file.path} may lack its last lines: {error.strerror}")
            self._jsonl, self._consoles = None, []

    def _start_wandb(self, run_dir: Path, log: LogBlock, config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        if log.wandb == "off" or environ.get("WANDB_MODE") == "disabled":
            return
        mode: Any = log.wandb
        if mode == "auto":
            mode = environ.get("WANDB_MODE") or ("online" if _has_key(environ) else "offline")
        if mode == "online" and not _has_key(environ):  # wandb would ask for one and wait.
            print_line("wandb is offline: there is no key (WANDB_API_KEY or .netrc); `wandb sync` sends the run later")
            mode = "offline"

        def begin() -> None:
            import wandb

            id_file = run_dir / "wandb" / "run_id"
            run_id = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
            id_file.parent.mkdir(exist_ok=True)
            write_if_new(id_file, run_id)
            self._wandb = wandb.init(
                project=log.wandb_project,
                name=run_dir.name,
                id=run_id,
                resume="allow" if mode == "online" else None,
                mode=mode,
                dir=str(run_dir),
                config=dict(config),
                # wandb's metadata holds the command line as it was typed, with its secrets.
                settings=wandb.Settings(
                    silent=True, console="off", x_disable_meta=any(without_secrets(word) != word for word in sys.argv)
                ),
            )

        self._guard(begin)

    def _end_wandb(self) -> None:
        """Ends wandb's run and its service.

        wandb's own exit handler prints a traceback if the service has gone before, as after a Ctrl-C.
        """
        import wandb

        try:
            if self._wandb is not None:
                self._wandb.finish()
        finally:
            wandb.teardown()

    def _send(self, kind: str, line: Mapping[str, Any]) -> None:
        stage = line.get("stage")
        group = {"train": "train", "eval": "test" if stage == "test" else "val"}[kind]
        if "member" in line:  # Each member of a sweep has its own curves.
            group = f"{group}/{line['member']}"
        out: dict[str, Any] = {"stage": stage}
        for key, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                out[f"{'perf' if key in PERFORMANCE_KEYS else group}/{key}"] = value
        # The step is sent as a value: it starts anew in each stage, and wandb's own step may not.
        self._guard(lambda: self._wandb.log(out))

    def _guard(self, action: Any) -> None:
        """Runs a call of wandb. The first failure is reported, and wandb is off from then on; the run goes on."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (whatever wandb raises)
            self._wandb = None
            if self._wandb_failed:
                return
            self._wandb_failed = True
            self.event("wandb_off", reason=f"{type(error).__name__}: {error}")
            if not self._stops_soon():
                print_line(f"wandb is off for this run: {type(error).__name__}: {error}")

    def _stops_soon(self) -> bool:
        """Whether the run is about to stop: a launcher's signal ends wandb's service too, and may reach it first."""
        until = time.monotonic() + SIGNALS_APART
        while not self._stopping() and time.monotonic() < until:
            time.sleep(0.01)
        return self._stopping()


def _has_key(environ: Mapping[str, str]) -> bool:
    """Whether wandb finds a key without asking for one."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or WANDB_URL).hostname or ""
    try:
        return netrc(environ.get("NETRC") or Path(environ.get("HOME", "/")) / ".netrc").authenticators(host) is not None
    except (OSError, NetrcParseError, UnicodeDecodeError):
        return False


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
