"""Each row of the fault catalogue has a test, and docs/faults.md names it."""

from __future__ import annotations

import ast
import re

import pytest
from fault_catalogue import EXCEPTIONS, PAGE, PENDING, ROOT, ROWS, cell_of, marked_tests, page_rows, with_tests

TESTS = marked_tests()
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
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


def test_the_guarantees_name_tests_that_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::([\w:]+)`", GUARANTEES)
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(name.split("::")) <= defined, f"{file} has no {name}"


def test_the_guarantees_name_all_trials_of_the_chaos_command() -> None:
    files = sorted((ROOT / "sfa_dist" / "chaos").glob("trials*.py"))
    if not files:
        pytest.skip("there is no sfa chaos")
    played = {
        node.name.replace("_", "-")
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and any("trial(" in ast.unparse(mark) for mark in node.decorator_list)
    }
    lines = [line for line in GUARANTEES.splitlines() if line.startswith("**Trials.**")]
    assert {name for line in lines for name in re.findall(r"`([a-z-]+)`", line)} == played
