"""Each fault of the catalogue has a test, and docs/faults.md names it."""

from __future__ import annotations

import ast
import re

import pytest
from fault_catalogue import EXCEPTIONS, FAULTS, PAGE, ROOT, marked_tests, page_faults, with_tests

TESTS = marked_tests()
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_fault_once() -> None:
    faults = page_faults(TEXT)
    assert list(faults) == list(FAULTS)
    assert all(fault.strip() and promise.strip() for fault, promise in faults.values())


def test_every_fault_has_a_test_or_a_reason() -> None:
    assert set(TESTS) <= set(FAULTS), "a mark names a fault that is not in the catalogue"
    assert {fault for fault in FAULTS if not TESTS.get(fault)} == set(EXCEPTIONS)


def test_the_page_names_the_tests_of_each_fault() -> None:
    assert with_tests(TEXT, TESTS) == TEXT, "run `python tests/unit/fault_catalogue.py`"


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
    paragraphs = [text for text in GUARANTEES.split("\n\n") if text.startswith("**Trials.**")]
    assert {name for text in paragraphs for name in re.findall(r"`([a-z-]+)`", text)} == played
