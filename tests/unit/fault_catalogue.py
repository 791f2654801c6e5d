"""The fault catalogue: the rows of docs/faults.md, and the tests that hold them by `@pytest.mark.fault(N)`.

python tests/unit/fault_catalogue.py     writes the names of the tests into docs/faults.md
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
ROWS = range(1, 71)

# Rows without a test here, and why. The page shows the reason.
EXCEPTIONS = {69: "no test: needs a GPU that fails"}
# Rows whose tests are being written. TO BE REMOVED once they are in.
PENDING: set[int] = set()

_ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.*?) ?\|$")


def page_rows(text: str) -> dict[int, tuple[str, str, str]]:
    """(fault, behaviour promised, tests) of each row. Raises ValueError for a row that stands twice."""
    found: dict[int, tuple[str, str, str]] = {}
    for line in text.splitlines():
        if match := _ROW.match(line):
            number = int(match[1])
            if number in found:
                raise ValueError(f"row {number} stands twice")
            found[number] = (match[2], match[3], match[4])
    return found


def marked_tests() -> dict[int, list[str]]:
    """The tests of each row as `file::name`, in order."""
    found: dict[int, list[str]] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        where = file.relative_to(ROOT / "tests").as_posix()
        for name, rows in _marks(tree.body):
            for row in rows:
                found.setdefault(row, []).append(f"{where}::{name}" if name else where)
    return found


def cell_of(row: int, tests: dict[int, list[str]]) -> str:
    """The last column of a row."""
    if row in EXCEPTIONS:
        return EXCEPTIONS[row]
    return "<br>".join(f"`{name}`" for name in tests.get(row, []))


def with_tests(text: str, tests: dict[int, list[str]]) -> str:
    """The page with its last column made anew."""
    lines = []
    for line in text.splitlines():
        match = _ROW.match(line)
        lines.append(f"| {match[1]} | {match[2]} | {match[3]} | {cell_of(int(match[1]), tests)} |" if match else line)
    return "\n".join(lines) + "\n"


def _marks(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, list[int]]]:
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            yield inside.removesuffix("::"), _rows_in(node.value)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            for decorator in node.decorator_list:
                yield inside + node.name, _rows_in(decorator)
            if isinstance(node, ast.ClassDef):
                yield from _marks(node.body, f"{node.name}::")


def _rows_in(tree: ast.expr) -> list[int]:
    """The numbers in all calls of `pytest.mark.fault` in an expression, such as a decorator or a list of marks."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    marks = [call for call in calls if ast.unparse(call.func) == "pytest.mark.fault"]
    return [int(ast.literal_eval(argument)) for call in marks for argument in call.args]


if __name__ == "__main__":
    PAGE.write_text(with_tests(PAGE.read_text(encoding="utf-8"), marked_tests()), encoding="utf-8")
