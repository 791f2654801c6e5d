"""`sfa init`: recipes that fit packed clips; and what commands print under --json when they fail."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from data_samples import video_bytes
from hypothesis import given
from hypothesis import strategies as st

from sfa_dist.errors import UsageError
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.tools.cli import build_parser, main
from sfa_dist.tools.init import choose_packs, fitting_epochs, fitting_span
from sfa_dist.tools.pack import line_now_and_then

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine clips of 16 frames and one of 8, of two classes, in two splits; and a list of them."""
    monkeypatch.chdir(tmp_path)
    lines = ["path,label,split"]
    for number in range(10):
        frames = 8 if number == 4 else 16
        (tmp_path / f"{number}.mp4").write_bytes(video_bytes(frames, height=32 + 2 * number))
        lines.append(f"{number}.mp4,{'ab'[number % 2]} class,{'val' if number >= 8 else 'train'}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_recipe_that_fits_what_was_packed(clips, capsys):
    for split in ("train", "val"):
        assert main(["pack", "list.csv", "own", "--split", split]) == 0
    printed = capsys.readouterr().out
    assert "frames: median 16 (8 to 16), 10 a second (median)" in printed
    assert "write a recipe that fits: sfa init mine.yaml --shards own" in printed
    assert main(["init", "sub/mine.yaml", "--shards", "own"]) == 0
    printed = capsys.readouterr().out
    assert "sfa check-learning --recipe sub/mine.yaml" in printed
    assert "sfa check-learning --recipe sub/mine.yaml" in Path("sub/mine.yaml").read_text()
    assert "2 classes, 8 training clips" in printed
    assert "  16 frames span 16; 1 of 8 clips are shorter and loop" in printed
    assert "apart" not in printed
    recipe = load_recipe(Path("sub/mine.yaml"), [], {}).recipe
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    for stage, frames, stride in ((recipe.stage1, 16, 1), (recipe.stage2, 16, 1)):
        assert (stage.model.classes, stage.frames, stage.data.stride) == (2, frames, stride)
        assert (stage.data.train, stage.data.val, stage.data.test) == (
            *(["own/train-*.tar"], ["own/val-*.tar"], ["own/val-*.tar"]),
        )
        assert (stage.schedule.epochs, stage.batch.size) == (200 if stage is recipe.stage2 else 0, 8)
    assert main(["init", "sub/mine.yaml", "--shards", "own"]) == 64
    assert "exists already" in capsys.readouterr().err


def test_what_no_recipe_fits_is_refused_or_said(clips, capsys):
    for split in ("train", "val"):
        assert main(["pack", "list.csv", "own", "--split", split]) == 0
    manifest = json.loads((clips / "own" / "manifest.json").read_text())
    facts = manifest["packs"]["train"]["clips"]
    facts["frames"]["quartile"], facts["fps"] = 18_000, 30.0
    (clips / "own" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["init", "long.yaml", "--shards", "own"]) == 0
    assert "the two frames of a tubelet are 40.0 s apart" in capsys.readouterr().out
    (clips / "own" / "manifest.json").write_text(json.dumps({**manifest, "classes": ["a"]}))
    assert main(["init", "one.yaml", "--shards", "own"]) == 65
    assert "all its clips are of one class" in capsys.readouterr().err
    assert not Path("one.yaml").exists()


def test_a_recipe_is_compared_with_what_is_packed(clips, capsys):
    (clips / "mine.yaml").write_text("_base_: recipes/own_videos.yaml\n")
    assert main(["pack", "list.csv", "own", "--check", "--recipe", "mine.yaml"]) == 0
    printed = capsys.readouterr()
    assert "stage1: model.classes is 3, and the clips have 2 classes" in printed.out
    assert "stage2: 16 frames span 16; 1 of 10 clips are shorter and loop" in printed.out
    assert "all splits are packed together (8 of 'train', 2 of 'val')" in printed.err
    assert main(["pack", "list.csv", "own", "--recipe", "gone.yaml"]) == 78
    assert not (clips / "own").exists()


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_json_is_printed_on_failure_too(clips, capsys, check):
    (clips / "3.mp4").write_bytes(b"x" * 100)
    assert main(["pack", "list.csv", "own", "--json", *check]) == 65
    found = json.loads(capsys.readouterr().out)
    assert (found["exit_code"], found["packed"], [entry["path"] for entry in found["corrupt"]]) == (65, 9, ["3.mp4"])
    assert "1 corrupt of 10 clips" in found["error"]
    assert main(["pack", "list.csv", "own", *check]) == 65
    out, err = capsys.readouterr()
    assert "9 of 10 clips can be packed" in out
    assert "nothing was packed" in err or check


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["pack", "gone.csv", "out", "--json"], 65),
        (["pack", "--json"], 64),
        (["plan", "--recipe", "gone.yaml", "--json"], 78),
        (["evaluate", "gone", "--json"], 64),
        (["predict", "gone.mp4", "--run", "gone", "--json"], 64),
    ],
)
def test_every_command_says_its_failure_as_json(tmp_path, monkeypatch, capsys, words, code):
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == code
    assert err == f"error: {json.loads(out)['error']}\n"


@given(st.integers(1, 2000))
def test_spans_do_not_loop(length):
    span = fitting_span(length)
    assert span.frames % 2 == 0
    assert span.frames <= 16
    assert span.length <= max(length, 2)
    assert span.length > length / 2 or length == 1


@given(st.integers(1, 100_000))
def test_few_clips_get_enough_steps_and_many_not_many_epochs(clips):
    epochs = fitting_epochs(clips)
    steps = epochs * -(-clips // 16)
    assert 4 <= epochs <= 200
    assert steps >= 200
    assert steps < 2 * 200 or epochs == 4


@pytest.mark.parametrize(
    ("names", "options", "chosen"),
    [
        (["train", "test"], (None, None), ("train", "test", "test")),
        (["train", "val", "test"], (None, None), ("train", "val", "test")),
        (["training", "validation"], (None, None), ("training", "validation", "validation")),
        (["shard"], (None, None), ("shard", None, None)),
        (["one"], (None, None), ("one", None, None)),
        (["one", "two"], ("two", "one"), ("two", "one", "one")),
        (["one", "two"], (None, None), "give --train"),
        (["train"], ("x", None), "--train x: the packs are train"),
        (["train"], (None, "train"), "is the pack to train on"),
    ],
)
def test_which_packs_a_recipe_takes(names, options, chosen):
    if isinstance(chosen, str):
        with pytest.raises(UsageError, match=chosen):
            choose_packs(names, *options)
    else:
        assert choose_packs(names, *options) == chosen


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    times = iter([0.0, 5.0, 10.0, 10.0, 11.0, 21.0, 21.0])
    tell = line_now_and_then(10.0, lambda: next(times))
    for done in range(1, 5):
        tell(done, 4)
    assert capsys.readouterr().err == "2 of 4 clips are checked\n4 of 4 clips are checked\n"


def commands() -> list[str]:
    """Every `sfa ...` line of the documentation, continued lines joined, without comments and redirections."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text().replace("\\\n", " ")
        found += [
            re.split(r"#| > ", line.strip())[0] for line in re.findall(r"^    +(sfa [a-z-]+ .*)$", text, re.MULTILINE)
        ]
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_documentation_are_commands(line):
    build_parser().parse_args(shlex.split(re.sub(r"\$\(.*?\)|\$\{?\w+\}?", "x", line))[1:])
