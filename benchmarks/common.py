"""What every benchmark shares: what machine this is, fair rounds, one table and its JSON.

    from common import add_options, interleave, medians, report

    seconds = interleave({"a": do_a, "b": do_b}, arguments.rounds)
    report(arguments, "a against b", ["way", "ms"], [[name, 1000 * m] for name, m in medians(seconds).items()])

A benchmark is a script: its folder is on sys.path, and importing this file puts the repository's root before it, so
that the sfa_dist beside it is measured, installed or not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 (the path comes first)

from sfa_dist.errors import LostRankError, SfaError  # noqa: E402
from sfa_dist.stages import assemble  # noqa: E402

K = TypeVar("K", bound=Hashable)
Clock = Callable[[], float]
Cell = str | int | float | None


def machine() -> dict[str, Any]:
    """What this runs on: cpu, cores that this process may use, load, gpu (None without one), torch, date."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(what: Mapping[str, Any]) -> str:
    """`machine()` in one line."""
    gpu = what["gpu"] or "no GPU"
    cpu = f"{what['cpu']}, {what['cores']} cores, {what['threads']} torch thread(s), load {what['load']}"
    return f"{gpu}; {cpu}; torch {what['torch']}; {what['date']}"


def cpu_clock() -> float:
    """Seconds of computing of this process, all of its threads: other programs hardly count."""
    return time.process_time()


def tree_clock() -> float:
    """Seconds of computing of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def wall_clock() -> float:
    """Seconds of the clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def default_clock() -> Clock:
    """Wall time where a GPU does the work, time of computing where a CPU does."""
    return wall_clock if torch.cuda.is_available() else cpu_clock


def interleave(
    cases: Mapping[K, Callable[[], object]], rounds: int, *, clock: Clock | None = None, warmup: int = 1
) -> dict[K, list[float]]:
    """Seconds of each case in each of `rounds` rounds, in which the cases take turns; the first `warmup` rounds, which
    allocate and load, are not counted. Every other round goes backwards: a case finds caches and memory as the one
    before left them."""
    read = clock or default_clock()
    seconds: dict[K, list[float]] = {name: [] for name in cases}
    for number in range(warmup + rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            started = read()
            cases[name]()
            taken = read() - started
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def medians(seconds: Mapping[K, Sequence[float]]) -> dict[K, float]:
    """The median of each case."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def spread(values: Sequence[float]) -> float:
    """How far the rounds lie apart, as a share of their median."""
    return (max(values) - min(values)) / statistics.median(values)


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of one case over another in the same round: what slows both cancels."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def script(main: Callable[[], None]) -> None:
    """Runs a benchmark; what its user can mend, a wrong key or option, is one line and an exit code."""
    try:
        main()
    except SfaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:  # Its own ranks, which have told why.
        print(f"error: a group of ranks ended with {error.returncode}", file=sys.stderr)
        sys.exit(LostRankError.exit_code)


def positive(text: str) -> int:
    """A whole number greater than 0, for argparse."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def add_options(parser: argparse.ArgumentParser, rounds: int | None = 5) -> None:
    """`--json`, and `--rounds` where there are any."""
    if rounds:
        parser.add_argument("--rounds", type=positive, default=rounds, help=f"interleaved rounds (default {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table, with the machine, to this file too")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """A Markdown table under the machine and a title."""
    print(f"{title}\n{describe(machine())}\n")
    print(markdown(columns, rows), flush=True)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """The table in Markdown, columns padded to their widest cell; numbers are on the right."""
    rows = list(rows)
    cells = [list(columns), *([show(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [any(isinstance(row[place], int | float) for row in rows) for place in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def show(cell: Cell) -> str:
    """A cell in words: four digits of a number, a dash for None."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return str(cell)


def report(
    arguments: argparse.Namespace,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    whole: bool = True,
    **details: Any,
) -> None:
    """Prints the table, and writes it to `--json` where that was given, with `details` (raw seconds and the like).

    A table that is not `whole` is only written: it is what remains of a benchmark that is stopped before its end.
    """
    rows = [list(row) for row in rows]
    if whole:
        print_table(title, columns, rows)
    if arguments.json:
        told = {"title": title, "machine": machine(), "columns": list(columns), "rows": rows, "whole": whole}
        write_json(arguments.json, {**told, **details})


@contextmanager
def weights_drawn_on(device: torch.device) -> Iterator[None]:
    """Inside the block a stage's random weights are drawn on `device`: 20 s for ViT-g on a CPU, nothing on a GPU.

    Training draws them on the CPU, so that they are the same on any machine.
    """
    own = assemble.build
    assemble.build = partial(own, device=device)
    try:
        yield
    finally:
        assemble.build = own


def write_json(path: Path, told: Mapping[str, Any]) -> None:
    """Writes the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(told, indent=1) + "\n")
    partial.replace(path)
