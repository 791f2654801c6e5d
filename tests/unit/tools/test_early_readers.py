"""A reader of stdout that leaves early, as `| head` does, ends a command quietly; other broken pipes are errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DEMO = "recipes/demo.yaml"
OTHER_PIPE = """\
import argparse, sys
from sfa_dist.run.command_line import Parser, exit_code_of
from sfa_dist.tools import cli

def work(arguments):
    print("what was found", flush=True)
    raise BrokenPipeError(32, "Broken pipe")  # Of a worker, say.

parser = Parser()
parser.set_defaults(run=cli._while_read(work))
sys.exit(exit_code_of([], parser))
"""


def run(command: list[str], unread: bool) -> tuple[int, str]:
    """(exit code, stderr) of a command whose stdout nobody reads, or which is read to its end."""
    read, write = os.pipe()
    if unread:
        os.close(read)
    with os.fdopen(write, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, *command], cwd=Path.cwd(), stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=180
        )
    if not unread:
        os.close(read)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--recipe", DEMO, "--print-recipe"),
        ("chaos", "--list"),  # A table, by rich.
    ],
    ids=" ".join,
)
def test_a_reader_that_leaves_ends_a_command_quietly(arguments: tuple[str, ...]) -> None:
    assert run(["-m", "sfa_dist.tools.cli", *arguments], unread=True) == (0, "")


def test_another_broken_pipe_is_an_error() -> None:
    code, err = run(["-c", OTHER_PIPE], unread=False)
    assert code == 70
    assert "BrokenPipeError" in err


def test_what_fails_fails_without_a_reader_too() -> None:
    code, err = run(["-m", "sfa_dist.tools.cli", "plan", "--recipe", "nowhere.yaml"], unread=True)
    assert code == 78
    assert err.startswith("error: ")
