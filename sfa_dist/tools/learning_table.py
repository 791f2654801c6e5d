"""The lines of `sfa check-learning`, their conclusion, and the printed table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

# `note` deserves a look but does not fail; `undecided` had no time to end; `skipped` had nothing to check.
Verdict = Literal["ok", "note", "fail", "undecided", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line: the finding in words, and the numbers behind it."""

    name: str
    verdict: Verdict
    found: str
    values: dict[str, Any] = field(default_factory=dict)


def as_json(checks: Sequence[Check], seconds: float) -> dict[str, Any]:
    """All lines and their conclusion; `passed` if no check failed or is undecided."""
    failed, undecided = ([check.name for check in checks if check.verdict == kind] for kind in ("fail", "undecided"))
    return {
        "passed": not failed and not undecided,
        "failed": failed,
        "undecided": undecided,
        "conclusion": conclusion(checks),
        "seconds": seconds,
        "checks": [asdict(check) for check in checks],
    }


def conclusion(checks: Sequence[Check]) -> str:
    """The conclusion from all lines, in a sentence."""
    verdicts = {check.name: check.verdict for check in checks}
    if failed := [name for name, verdict in verdicts.items() if verdict == "fail"]:
        return f"Do not train yet: {', '.join(failed)} failed; docs/learning.md says what to do."
    if "undecided" in verdicts.values():
        return "The time was too short to decide: give more --seconds."
    if verdicts.get("learn") == "ok":
        return "It learns: train."
    if verdicts.get("baselines") == "ok":
        return "The clips show their labels, but the model did not learn them in this time: read docs/learning.md."
    return "Nothing separated the classes in this time: look at clips and labels (sfa show), read docs/learning.md."


def print_checks(recipe: str, stage: str, results: dict[str, Any]) -> None:
    """Prints the lines of `as_json` as a table, with the conclusion below."""
    table = Table(title=f"{recipe}, {stage}", box=None, header_style="", pad_edge=False, title_justify="left")
    for column in ("check", "verdict", "found"):
        table.add_column(column, no_wrap=column != "found", overflow="fold")
    for check in results["checks"]:
        table.add_row(check["name"], check["verdict"], check["found"])
    console = Console(markup=False)
    console.print(table, highlight=False)
    console.print(f"{results['conclusion']} ({results['seconds']:.0f} s)", highlight=False, soft_wrap=True)
