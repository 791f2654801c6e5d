"""Malformed tables, class lists, JSON files, recipes and weights: read, or refused by the documented error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzzing import amounts, fuzz
from recipe_files import MINIMAL
from safetensors.torch import save

from sfa_dist.data.packing.annotations import read_rows
from sfa_dist.data.packing.annotations.classes import class_lists, class_numbers, read_class_list
from sfa_dist.data.shards.quarantine import read_quarantine
from sfa_dist.data.shards.shard_index import _described
from sfa_dist.errors import CheckpointError, DataError, LostRankError, RecipeError, UsageError
from sfa_dist.models.weights import read_state
from sfa_dist.recipe.schema import Recipe, dump_recipe, load_recipe
from sfa_dist.recipe.strict_yaml import format_tree, parse, plain
from sfa_dist.run.attempts import Attempts
from sfa_dist.run.record import RESULT_NUMBERS, read_done
from sfa_dist.run.report.run_files import read_log

TABLES = [
    b"path,label,split\na.mp4,0,train\nb.mp4,1,val\n\"c, d.mp4\",2,train\n",
    "\ufeffpath,verb,noun\r\na.mp4,run,dög\r\nb.mp4,\"cut, up\",onion\r\n".encode(),
    b"label,youtube_id,time_start,time_end,split\nabseiling,0347ZoDXyP0,95,105,train\nzumba,xyz,1,11,train\n",
    b"a.mp4 0\nb.mp4 1\n",
]  # fmt: skip


@amounts
def test_tables(tmp_path: Path, inputs: int) -> None:
    source, videos = tmp_path / "list.csv", tmp_path

    def read(data: bytes) -> None:
        source.write_bytes(data)
        for format in ("auto",) if b"youtube" in data else ("table", "auto"):
            chosen, rows = read_rows(source, format, videos)
            assert all(label for row in rows for label in row.labels.values()), "a clip without a label"
            heads = class_lists(rows, source, chosen, None)
            for numbers in class_numbers(rows, heads):
                assert all(0 <= number < len(heads[head]) for head, number in numbers.items())

    fuzz("tables", TABLES[:3], read, (DataError, UsageError), inputs=inputs)


@amounts
@pytest.mark.parametrize("suffix", ["json", "txt"])
def test_class_lists(tmp_path: Path, suffix: str, inputs: int) -> None:
    file = tmp_path / f"classes.{suffix}"
    seeds = {
        "json": [b'["run", "walk"]', b'{"run": 0, "walk": 1}', b'{"packs": [{}], "classes": ["run", "walk"]}'],
        "txt": [b"run\nwalk\n", b"run,0\nwalk,1\n"],
    }[suffix]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        names = read_class_list(file)
        assert names
        assert len(set(names)) == len(names)
        assert all(isinstance(name, str) for name in names)

    fuzz(f"class lists .{suffix}", seeds, read, (DataError,), inputs=inputs)


def in_file(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    def parse_file(data: bytes) -> object:
        path.write_bytes(data)
        return read()

    return parse_file


@amounts
def test_manifests_of_shards(tmp_path: Path, inputs: int) -> None:
    seeds = [
        b'{"classes": ["a", "b"], "packs": {"train": {"decoder": "d", "shards": ["x.tar"]}}}',
        b'{"heads": {"noun": ["a"], "verb": ["b"]}}',
    ]
    read = in_file(tmp_path / "manifest.json", lambda: _described([tmp_path / "x.tar"], None))  # type: ignore[arg-type]
    fuzz("manifest.json of shards", seeds, read, (DataError,), inputs=inputs)


@amounts
@pytest.mark.parametrize("name", ["attempts.json", "done.json", "quarantine.jsonl", "log.jsonl"])
def test_json_of_runs(tmp_path: Path, name: str, inputs: int) -> None:
    began = {"began": "2026", "identity": "x", "code": 70, "stage": "stage1", "step": 5, "error": "e"}
    done = {"inputs": {"a": {"b": 1}}, "result": dict.fromkeys(RESULT_NUMBERS, 1.5)}
    seed, read = {
        "attempts.json": (json.dumps([began, began]), lambda: Attempts(tmp_path, "x", 3).begin()),
        "done.json": (json.dumps(done), lambda: read_done(tmp_path)),
        "quarantine.jsonl": (
            json.dumps({"shard": "s.tar", "key": "k", "reason": "r"}) + "\n",
            lambda: read_quarantine(tmp_path / name),
        ),
        "log.jsonl": (json.dumps({"kind": "train", "step": 1}) + "\n", lambda: read_log(tmp_path / name)),
    }[name]
    fuzz(name, [seed.encode()], in_file(tmp_path / name, read), (CheckpointError, LostRankError), inputs=inputs)


YAMLS = [
    MINIMAL.encode(),
    b"a: &x {b: 1, c: [1, 2.5e-3, ~, 'q']}\nd: \"\\u00e9\"\ne: |\n  text\nf: [1,\n 2]\n",
    b"model: {size: tiny}\noptimizer: {lr: 1.0e-3}\nname: ${USER:-x}\n",
]


@amounts
def test_yaml(inputs: int) -> None:
    """What is read comes back equal when it is written and read again."""

    def read(data: bytes) -> None:
        value = plain(parse(data.decode(errors="replace"), lambda line: f"x.yaml:{line}"))
        if isinstance(value, dict) and "a" not in value:
            again = plain(parse(format_tree(value), lambda line: f"x.yaml:{line}"))
            assert repr(again) == repr(value), "it is read back as something else"

    fuzz("YAML", [YAMLS[0], YAMLS[2]], read, (RecipeError,), inputs=inputs, one_line=False)


FULL = MINIMAL + "data: {train: [d/*.tar], workers: 0}\nname: n\n"


@amounts
def test_recipes(tmp_path: Path, inputs: int) -> None:
    path, again = tmp_path / "r.yaml", tmp_path / "again.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        recipe = load_recipe(path, [], {"USER": "u"}).recipe
        again.write_text(dump_recipe(recipe))
        assert load_recipe(again, [], {}).recipe == recipe, "it is read back as something else"
        assert isinstance(recipe, Recipe)

    fuzz("recipes", [FULL.encode()], read, (RecipeError,), inputs=inputs // 4, one_line=False)


TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


@amounts
def test_weights(tmp_path: Path, inputs: int) -> None:
    path = tmp_path / "w.safetensors"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for tensor in read_state(path).values():
            assert tensor.numel() * tensor.element_size() <= len(data), "numbers that are not in the file"

    fuzz("safetensors", [save(TENSORS), save(TENSORS, {"format": "pt"})], read, (CheckpointError,), inputs=inputs)


@amounts
def test_pth(tmp_path: Path, inputs: int) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": TENSORS}, path)
    fuzz("pth", [path.read_bytes()], in_file(path, lambda: read_state(path)), (CheckpointError,), inputs=inputs)
