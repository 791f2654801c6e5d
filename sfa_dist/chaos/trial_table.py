"""The results of the trials: a table for people, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Column, Table

from sfa_dist.chaos.trials import Result, Trial
from sfa_dist.chaos.workplace import Workplace


def list_table(trials: Sequence[Trial]) -> Table:
    """The table of `--list`."""
    name = Column("trial", no_wrap=True)  # --only takes this name, so it stays whole in a narrow terminal.
    words = (Column(title, overflow="fold") for title in ("guarantee", "fault", "rows", "ranks"))
    table = Table(name, *words, title="trials")
    for each in trials:
        table.add_row(each.name, each.guarantee, each.fault, _rows(each.rows), each.on)
    return table


def result_table(results: Sequence[Result], seconds: float) -> Table:
    """One line for each trial and number of ranks, and the totals."""
    table = Table(title="guarantees, and what was seen", show_lines=True, show_footer=True)
    failed = sum(not result.passed for result in results)
    totals = f"{len(results) - failed} of {len(results)} hold" + (f", {failed} FAILED" if failed else "")
    table.add_column("guarantee", footer=totals, max_width=26)
    table.add_column("fault", max_width=28)
    table.add_column("rows")
    table.add_column("ranks", justify="right")
    table.add_column("seen", ratio=1)
    table.add_column("", justify="center", footer="FAIL" if failed else "pass")
    table.add_column("seconds", justify="right", footer=f"{seconds:.0f}")
    for result in results:
        verdict = "[green]pass[/green]" if result.passed else "[bold red]FAIL[/bold red]"
        seen = _literal(result.seen + (f" (evidence: {result.evidence})" if result.evidence else ""))
        rows, ranks = _rows(result.rows), str(result.ranks)
        table.add_row(result.guarantee, result.fault, rows, ranks, seen, verdict, f"{result.seconds:.1f}")
    return table


def as_json(results: Sequence[Result], workplace: Workplace, seed: int, seconds: float) -> dict[str, Any]:
    """The results and totals as plain values, for JSON."""
    failed = sum(not result.passed for result in results)
    return {
        "recipe": workplace.source,
        "changed": workplace.notes,
        "seed": seed,
        "passed": len(results) - failed,
        "failed": failed,
        "seconds": round(seconds, 1),
        "trials": [result.as_json() for result in results],
    }


def progress_line(result: Result) -> str:
    """The line that the console shows when a trial ends."""
    verdict = "[green]pass[/green]" if result.passed else "[bold red]FAIL[/bold red]"
    seen = "" if result.passed else f": {_literal(result.seen)}"
    return f"{verdict} {result.name} on {result.ranks} ({result.seconds:.1f} s){seen}"


def _literal(text: str) -> str:
    return text.replace("[", "\\[")


def _rows(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows))
