"""The fault catalogue: the numbered faults of docs/faults.md, and their tests by `@pytest.mark.fault(N)`.

python tests/unit/fault_catalogue.py     writes the names of the tests into docs/faults.md
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
FAULTS = range(1, 71)

# Faults without a test here, and why. The page shows the reason.
EXCEPTIONS = {69: "no test: needs a GPU that fails"}

# An item of the numbered lists: "33. **What is injected.** What is promised,", continued on indented lines.
_ITEM = re.compile(r"^(\d+)\. \*\*(.+?)\*\*(.+?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_HEADING = "## Tests of each fault"
_INTRODUCTION = """
Generated: `python tests/unit/fault_catalogue.py` writes this list from the marks `@pytest.mark.fault(N)` of the tests,
and `tests/unit/test_fault_catalogue.py` fails when it is out of date. File names are relative to `tests/`. Tests marked
`chaos` run in `make chaos`, the others in `make test`.

"""


def page_faults(text: str) -> dict[int, tuple[str, str]]:
    """(what is injected, what is promised) of each fault on the page. Raises ValueError for a repeated number."""
    found: dict[int, tuple[str, str]] = {}
    for number, fault, promise in _ITEM.findall(text):
        if int(number) in found:
            raise ValueError(f"fault {number} is on the page twice")
        found[int(number)] = (fault, " ".join(promise.split()))
    return found


def marked_tests() -> dict[int, list[str]]:
    """The tests of each fault as `file::name`, in order."""
    found: dict[int, list[str]] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        where = file.relative_to(ROOT / "tests").as_posix()
        for name, faults in _marks(tree.body):
            for fault in faults:
                found.setdefault(fault, []).append(f"{where}::{name}" if name else where)
    return found


def list_of_tests(tests: dict[int, list[str]]) -> str:
    """The generated section: its heading, its introduction, and a line for each test of each fault."""
    lines = []
    for fault in FAULTS:
        names = [EXCEPTIONS[fault]] if fault in EXCEPTIONS else tests.get(fault, [])
        numbers = [f"{fault:2}"] + ["  "] * (len(names) - 1)
        lines += [f"    {number}  {name}" for number, name in zip(numbers, names, strict=True)]
    return f"{_HEADING}\n{_INTRODUCTION}" + "\n".join(lines) + "\n"


def with_tests(text: str, tests: dict[int, list[str]]) -> str:
    """The page with its last section, the tests, generated anew."""
    return text.partition(_HEADING)[0] + list_of_tests(tests)


def _marks(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, list[int]]]:
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            yield inside.removesuffix("::"), _faults_in(node.value)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            for decorator in node.decorator_list:
                yield inside + node.name, _faults_in(decorator)
            if isinstance(node, ast.ClassDef):
                yield from _marks(node.body, f"{node.name}::")


def _faults_in(tree: ast.expr) -> list[int]:
    """The numbers in all calls of `pytest.mark.fault` in an expression, such as a decorator or a list of marks."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    marks = [call for call in calls if ast.unparse(call.func) == "pytest.mark.fault"]
    return [int(ast.literal_eval(argument)) for call in marks for argument in call.args]


if __name__ == "__main__":
    PAGE.write_text(with_tests(PAGE.read_text(encoding="utf-8"), marked_tests()), encoding="utf-8")
