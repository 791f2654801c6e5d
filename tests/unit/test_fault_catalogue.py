"""Each row of the fault catalogue has a test, and docs/faults.md names it."""

from __future__ import annotations

from fault_catalogue import EXCEPTIONS, PAGE, PENDING, ROWS, cell_of, marked_tests, page_rows, with_tests

TESTS = marked_tests()
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_row_once() -> None:
    rows = page_rows(TEXT)
    assert list(rows) == list(ROWS)
    assert all(fault.strip() and promise.strip() for fault, promise, _ in rows.values())


def test_every_row_has_a_test_or_a_reason() -> None:
    assert set(TESTS) <= set(ROWS), "a mark names a row that is none"
    without = [row for row in ROWS if not TESTS.get(row)]
    assert set(without) <= set(EXCEPTIONS) | PENDING
    assert not set(EXCEPTIONS) & set(TESTS), "a row of EXCEPTIONS has a test"


def test_the_page_names_the_tests_of_each_row() -> None:
    rows = page_rows(TEXT)
    wrong = [row for row in ROWS if rows[row][2] != cell_of(row, TESTS)]
    assert not wrong, f"rows {wrong}: run `python tests/unit/fault_catalogue.py`"
    assert with_tests(TEXT, TESTS) == TEXT
