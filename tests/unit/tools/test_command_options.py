"""The options of every program stand here once more, so that a new one is a decision."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from sfa_dist.run.command_line import EXIT_CODES, Parser
from sfa_dist.run.train_options import add_arguments
from sfa_dist.tools import cli

ROOT = Path(__file__).resolve().parents[3]
TRAINING = "--recipe --set --run-dir --resume --stage --print-recipe --dry-run --debug --local_rank --local-rank"
COMMANDS = {
    "sfa train": TRAINING,
    "sfa pack": (
        "source out_dir --format --videos --root --classes --split-column --split --prefix --shard-size "
        "--shard-bytes --min-frames --max-bad-fraction --seed --workers --recipe --decoder --decode-all "
        "--short-side --gop --crf --overwrite --check --json"
    ),
    "sfa init": "recipe --shards --train --test",
    "sfa index": "shards --verify --cache-dir --cache-gib --anonymous --workers",
    "sfa show": "--recipe --set --stage --out --draws --rows --generated",
    "sfa plan": ("--recipe --set --stage --card --gib --ranks --nodes --gpus-per-node --clips --probe --table4 --json"),
    "sfa check-learning": "--recipe --set --stage --seconds --json --debug",
    "sfa motion-prior": "--out --size --seed --steps --json",
    "sfa cache": TRAINING,
    "sfa evaluate": (
        "run_dir --recipe --weights --trunk-weights --stage --set --views --shards --frames --out --json "
        "--debug --local_rank --local-rank"
    ),
    "sfa predict": (
        "videos --run --recipe --weights --trunk-weights --stage --set --device --top --timeline --hop --out --json"
    ),
    "sfa report": "run_dir --compare --out",
    "sfa recipes": "--json",
    "sfa submit": (
        "--recipe --set --run-dir --name --nodes --gpus-per-node --cpus-per-task --time --account --partition "
        "--qos --sbatch --stage --chain --stage-nodes --seeds --vary --at-once --submit"
    ),
    "sfa reproduce": "name --scale --seeds --ranks --out --slurm --json --debug",
    "sfa chaos": (
        "--recipe --set --tiny-model --steps --ranks --rounds --only --thorough --seed --out --keep --list --json"
    ),
}


def words_of(parser: argparse.ArgumentParser) -> str:
    """All that a command line may hold, but for `--help` and the names of sub-commands."""
    skipped = (argparse._HelpAction, argparse._SubParsersAction)
    actions = [action for action in parser._actions if not isinstance(action, skipped)]
    return " ".join(word for action in actions for word in action.option_strings or [action.dest])


def test_options_of_train_py() -> None:
    parser = Parser()
    add_arguments(parser)
    assert words_of(parser) == TRAINING


def test_options_of_sfa() -> None:
    parser = cli.build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert words_of(parser) == "--version"
    assert {f"sfa {name}": words_of(command) for name, command in commands.choices.items()} == COMMANDS


def test_no_line_of_a_help_text_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse wraps the options only: descriptions are wrapped here, and examples stay as they are written."""
    monkeypatch.setenv("COLUMNS", "100")
    parser = cli.build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for each in (parser, *commands.choices.values()):
        assert [line for line in each.format_help().splitlines() if len(line) > 120] == []


def test_the_help_of_train_py_ends_with_one_line_an_exit_code_and_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from sfa_dist import train\n"
        "try:\n"
        "    train.main(['--help'])\n"
        "finally:\n"
        "    assert not {'torch', 'deepspeed', 'numpy', 'yaml'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"\n{EXIT_CODES}\n")
    assert [line.split()[0] for line in EXIT_CODES.splitlines()[1:]] == ["0", "64", "65", "70", "74", "75", "78"]
