"""The lines of `sfa check-learning`, what they say together, and its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

# `note` is worth a look and fails nothing; `undecided` had no time to end; `skipped` had nothing to look at.
Verdict = Literal["ok", "note", "fail", "undecided", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line: what was found, in words, and the numbers behind it."""

    name: str
    verdict: Verdict
    found: str
    values: dict[str, Any] = field(default_factory=dict)


def as_json(checks: Sequence[Check], seconds: float) -> dict[str, Any]:
    """All lines and their conclusion; `passed` where none has failed and all had the time to end."""
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
    """What the lines say together, in a sentence."""
    verdicts = {check.name: check.verdict for check in checks}
    if failed := [name for name, verdict in verdicts.items() if verdict == "fail"]:
        return f"Do not train yet: {', '.join(failed)} failed; docs/learning.md says what to do."
    if "undecided" in verdicts.values():
        return "The time was too short to tell: give more --seconds."
    if verdicts.get("learn") == "ok":
        return "It learns: train."
    if verdicts.get("baselines") == "ok":
        return "The clips hold their labels, and the model did not find them in this time: read docs/learning.md first."
    return "Nothing told the classes apart in this time: look at clips and labels (sfa show), then docs/learning.md."


def print_checks(recipe: str, stage: str, told: dict[str, Any]) -> None:
    """The page."""
    table = Table(title=f"{recipe}, {stage}", box=None, header_style="", pad_edge=False, title_justify="left")
    for column in ("check", "verdict", "found"):
        table.add_column(column, no_wrap=column != "found", overflow="fold")
    for check in told["checks"]:
        table.add_row(check["name"], check["verdict"], check["found"])
    console = Console(markup=False)
    console.print(table, highlight=False)
    console.print(f"{told['conclusion']} ({told['seconds']:.0f} s)", highlight=False, soft_wrap=True)
