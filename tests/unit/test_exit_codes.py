"""Every failure is one line on stderr and the contract's exit code."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

import pytest

from sfa_dist import errors
from sfa_dist.run.command_line import Parser, exit_code_of
from sfa_dist.tools import cli

CODES = {
    errors.UsageError: 64,
    errors.DataError: 65,
    errors.LostRankError: 70,
    errors.SfaError: 70,
    errors.CheckpointError: 74,
    errors.RecipeError: 78,
}


def run(failure: BaseException | None, *arguments: str) -> int:
    """The exit code of a command that ends with this error."""

    def work(_: argparse.Namespace) -> None:
        if failure is not None:
            raise failure

    parser = Parser()
    parser.add_argument("--debug", action="store_true")
    parser.set_defaults(run=work)
    return exit_code_of(arguments, parser)


def test_success_is_0() -> None:
    assert run(None) == 0


@pytest.mark.parametrize(("error", "code"), CODES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_errors_that_a_user_can_act_on(
    error: type[errors.SfaError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(error("what is wrong")) == code
    assert capsys.readouterr() == ("", "error: what is wrong\n")


def test_every_error_has_a_code_of_the_contract() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SfaError)]
    assert {kind.exit_code for kind in kinds} == {64, 65, 70, 74, 75, 78}


def test_preemption_is_75_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(errors.PreemptedError("at step 3")) == 75
    assert capsys.readouterr().err == "stopped: at step 3\n"


def test_what_all_ranks_raise_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.DataError("bad")
    error.print_suppressed = True
    assert run(error) == 65
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("two\nlines"), 70),
        (RuntimeError("Connection closed by peer"), 70),
        (ConnectionResetError("peer"), 70),
        (OSError(28, "No space left on device", "log.jsonl"), 74),
        (PermissionError(13, "Permission denied", "runs"), 74),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_unforeseen_is_one_line_and_a_file(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run(error) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert type(error).__name__ in line
    [file] = tmp_path.iterdir()
    assert str(file) in line
    assert "Traceback" in file.read_text()


def test_where_the_traceback_cannot_be_kept_the_line_is_told_all_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert run(OSError(28, "No space left on device")) == 74
    assert capsys.readouterr().err.count("\n") == 1


def test_debug_shows_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(errors.DataError("what"), "--debug") == 65
    assert run(ValueError("what"), "--debug") == 70
    assert capsys.readouterr().err.count("Traceback") == 2


def test_an_interrupt_before_there_is_a_state_is_70(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(KeyboardInterrupt()) == 70
    assert capsys.readouterr().err.startswith("stopped: interrupted")


@pytest.mark.parametrize("path", ["", "a\0b", "a" * 256, "a/" * 2100, "\u00e4" * 128])
def test_a_path_that_no_file_system_has_is_64(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "--recipe", path], ["train", "--recipe", "r", "--run-dir", path], ["report", path]):
        assert cli.main(words) == 64
        assert capsys.readouterr().err.count("\n") == 1


def test_stderr_on_a_full_disk_changes_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run(errors.DataError("bad")) == 65
        assert run(ValueError("bad")) == 70
        with contextlib.suppress(OSError):
            full.close()


def test_a_wrong_option_is_64(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(None, "--no-such-option") == 64
    assert "--no-such-option" in capsys.readouterr().err
