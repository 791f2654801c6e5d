"""EPIC-Kitchens-100 from its own lists to a tested model: packed, trained in both stages, tested by its protocol."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import assert_refused, sfa, train, train_ranks
from epic_clips import TRAIN, VALIDATION, make_epic
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import START, log_lines, read_json, sets

from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.shards.shard_names import expand_shards

HEADS = ("noun", "verb", "action")
SCORES = {f"{head}_acc{k}" for head in HEADS for k in (1, 5)}
STAGE2 = ("stage1.weights=run/stage1/weights.safetensors", "test.also_views=[]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_epic(tmp_path_factory.mktemp("epic"))


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A whole run of both stages, on one process."""
    finished = train(place, *START, "run")
    assert finished.code == 0, finished.err
    return place / "run"


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def head_weight(weights: Path) -> torch.Tensor:
    with safe_open(weights, framework="pt") as file:
        return file.get_tensor("tail.head.weight")


def scores_of(lines: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in lines.items() if "acc" in key or key in ("loss", "samples")}


def test_the_index_has_noun_and_verb(place: Path) -> None:
    index = load_index(expand_shards([str(place / "shards" / "train-*.tar")]))
    assert index.label.shape == (TRAIN, 2)
    assert not index.errors
    assert {tuple(labels) for labels in index.label.tolist()} == {(n % 4 + 7, n % 3 + 5) for n in range(12)}
    assert isinstance(index.classes, dict)
    assert [(head, len(names)) for head, names in index.classes.items()] == [("noun", 300), ("verb", 97)]


def test_every_evaluation_tells_noun_verb_and_action(run: Path) -> None:
    lines = [line for line in log_lines(run) if line["kind"] == "eval"]
    assert len(lines) == 3 + 3 + 2
    for line in lines:
        assert line.keys() >= SCORES
        assert (line["acc1"], line["acc5"]) == (line["action_acc1"], line["action_acc5"])
        assert line["action_acc1"] <= min(line["noun_acc1"], line["verb_acc1"])
        assert line["samples"] == VALIDATION
    assert [line["views"] for line in lines[-2:]] == [1, 6]
    by_views = read_json(run / "result.json")["by_views"]
    assert [scores_of(line) for line in by_views] == [scores_of(line) for line in lines[-2:]]


def test_it_learns(run: Path) -> None:
    """Of four nouns by their grey, from 24 clips: better than the most frequent one."""
    losses = [line["loss"] for line in log_lines(run) if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 1.5  # It begins at the mean of log 300 and log 97, 5.1.
    assert losses[0] == pytest.approx((np.log(300) + np.log(97)) / 2, abs=1e-3)
    assert read_json(run / "result.json")["noun_acc5"] == 1.0


def test_predictions_give_the_scores_of_the_result(run: Path) -> None:
    result, arrays = read_json(run / "result.json"), arrays_of(run / "test" / "predictions.npz")
    assert arrays["logits"].shape == (VALIDATION, 397)
    assert arrays["views"].tolist() == [2, 3]
    nouns, verbs = np.split(arrays["logits"].astype(np.float64), [300], axis=1)
    labels = arrays["labels"]
    assert (nouns.argmax(1) == labels[:, 0]).mean() == pytest.approx(result["noun_acc1"])
    assert (verbs.argmax(1) == labels[:, 1]).mean() == pytest.approx(result["verb_acc1"])
    softmax = [torch.from_numpy(part).softmax(1).numpy() for part in (nouns, verbs)]
    right1 = right5 = 0
    for noun, verb, (wanted, how) in zip(*softmax, labels.tolist(), strict=True):
        order = np.argsort(-np.outer(noun, verb).reshape(-1))
        right1 += order[0] == wanted * 97 + how
        right5 += wanted * 97 + how in order[:5]
    assert (right1 / VALIDATION, right5 / VALIDATION) == (result["action_acc1"], result["action_acc5"])
    assert len(set(zip(arrays["shards"], arrays["keys"], strict=True))) == VALIDATION


def test_classes_and_pictures_are_in_the_report(run: Path) -> None:
    heads = read_json(run / "test" / "classes.json")["heads"]
    assert list(heads) == list(HEADS)
    result = read_json(run / "result.json")
    for head, table in heads.items():
        assert sum(clips for *_, clips in table["classes"]) == VALIDATION
        assert sum(clips for *_, clips in table["confusion"]) == VALIDATION
        shares = [right / clips for _, right, clips in table["classes"]]
        assert np.mean(shares) == pytest.approx(result[f"{head}_mean_class_acc1"])
        assert (run / "figures" / f"confusion_{head}.png").is_file()
    assert heads["action"]["names"][str(7 * 97 + 5)] == "5 7"  # Verb, then noun; without their files, by number.
    page = (run / "report.md").read_text()
    assert "**Confused most (noun)**" in page
    assert "| 2 x 3 | action |" in page


def test_stage_2_keeps_the_head_of_the_same_classes_only(place: Path, run: Path) -> None:
    frozen = (*STAGE2, "stage2.optimizer.lr=0", "stage2.schedule.epochs=1")
    for name, own, kept in (("kept", (), True), ("zeroed", ("stage2.head=zero",), False)):
        finished = train(place, *START, name, *sets(*frozen, *own), "--stage", "stage2")
        assert finished.code == 0, finished.err
        weight = head_weight(place / name / "stage2" / "weights.safetensors")
        assert weight.shape == (397, 24)
        assert torch.equal(weight, head_weight(run / "stage1" / "weights.safetensors")) == kept


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_test_each_clip_to_the_same_scores(place: Path, run: Path, world_size: int) -> None:
    copy = place / f"on {world_size}"
    shutil.copytree(run, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "test")
    for rank in train_ranks(world_size, place, *START, copy.name, "--stage", "test"):
        assert (finished := rank.wait()).code == 0, finished.err
    alone, found = arrays_of(run / "test" / "predictions.npz"), arrays_of(copy / "test" / "predictions.npz")
    assert (found["keys"] == alone["keys"]).all()
    assert (found["labels"] == alone["labels"]).all()
    np.testing.assert_allclose(found["logits"], alone["logits"], atol=1e-4)
    result = scores_of(read_json(copy / "result.json"))
    assert result == pytest.approx(scores_of(read_json(run / "result.json")), rel=1e-4)


class TestFeatureCache:
    """Stage 2 on stored features of clips with a noun and a verb."""

    def test_gives_what_a_live_run_gives_with_its_augmentation(self, place: Path, run: Path) -> None:
        """One epoch of one view: the same crops, the same clips, in fp32."""
        own = sets(*STAGE2, "stage2.schedule.epochs=1")
        cached = sets("stage2.cache={views: 1, phases: 2}")
        for name, more in (("live", []), ("cached", cached)):
            finished = train(place, *START, name, *own, *more)
            assert finished.code == 0, finished.err
        live, stored = (
            [line["loss"] for line in log_lines(place / name) if line["kind"] == "train"] for name in ("live", "cached")
        )
        assert stored == pytest.approx(live, rel=1e-4)
        for shard in (place / "cached" / "cache" / "train" / "view-00").glob("*.tar"):
            assert load_index([shard]).label.shape[1] == 2  # The cache's own samples tell theirs too.

    def test_mixes_nouns_and_verbs(self, place: Path, run: Path) -> None:
        own = sets(*STAGE2, "stage2.schedule.epochs=2", "stage2.cache={views: 1, mixup: 0.3}")
        finished = train(place, *START, "mixed", *own)
        assert finished.code == 0, finished.err
        assert read_json(place / "mixed" / "result.json").keys() >= SCORES

    def test_sweeps_them(self, place: Path, run: Path) -> None:
        own = sets(*STAGE2[:1], "stage2.schedule.epochs=1", "stage2.cache={views: 1}", "sweep={seed: [0, 1]}")
        finished = train(place, *START, "swept", *own)
        assert finished.code == 0, finished.err
        result = read_json(place / "swept" / "result.json")
        assert [line.keys() >= SCORES for line in result["sweep"]] == [True, True]
        [best] = [line for line in result["sweep"] if line["member"] == result["best"]]
        assert best["verb_acc5"] == result["verb_acc5"]
        assert [line["views"] for line in result["by_views"]] == [1, 6]
        arrays = arrays_of(place / "swept" / "test" / "predictions.npz")
        right = (arrays["logits"][:, :300].argmax(1) == arrays["labels"][:, 0]).mean()
        assert right == pytest.approx(result["noun_acc1"])
        told = json.loads(sfa(place, "evaluate", "swept", "--json").out)
        assert scores_of(told) == pytest.approx(scores_of({key: result[key] for key in scores_of(told)}), rel=1e-6)


class TestRefusals:
    def test_clips_with_a_noun_and_a_verb_for_a_model_with_one_label(self, place: Path) -> None:
        finished = train(place, *START, "one label", *sets("model.class_heads=null", "model.classes=397"))
        assert_refused(finished, 65, "a noun and a verb each: set model.class_heads: {noun: ..., verb: ...}")

    def test_a_noun_that_does_not_fit(self, place: Path) -> None:
        heads = "model.class_heads={noun: 9, verb: 97}"
        finished = train(place, *START, "few nouns", *sets(heads))
        assert_refused(finished, 65, "noun 10 of train-", "model.class_heads.noun = 9")

    def test_an_index_of_before(self, place: Path, tmp_path: Path) -> None:
        """Where index.json has null for such clips, it has to be made anew."""
        shutil.copytree(place / "shards", tmp_path / "shards")
        index = read_json(tmp_path / "shards" / "index.json")
        for shard in index["shards"].values():
            shard["labels"] = [None] * len(shard["labels"])
        (tmp_path / "shards" / "index.json").write_text(json.dumps(index))
        (tmp_path / "t.yaml").write_text((place / "t.yaml").read_text())
        assert_refused(train(tmp_path, *START, "old"), 65, "run `sfa index` on the shards")
        assert sfa(tmp_path, "index", "shards/*.tar").code == 0
        assert train(tmp_path, *START, "new", "--dry-run").code == 0


# -------------------------------------------------------------------------------------------------------- sfa evaluate


@pytest.fixture
def untouched(run: Path) -> Callable[[], bool]:
    """Whether all files of the run outside of evaluate/ are what they were."""

    def state() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in sorted(run.rglob("*"))
            if path.is_file() and "evaluate" not in path.parts
        }

    before = state()
    return lambda: state() == before


def test_evaluate_gives_the_numbers_of_the_test(place: Path, run: Path, untouched: Callable[[], bool]) -> None:
    finished = sfa(place, "evaluate", "run", "--json")
    assert finished.code == 0, finished.err
    told, result = json.loads(finished.out), read_json(run / "result.json")
    assert told.keys() >= result.keys()
    for key in result.keys() - {"test_seconds"}:
        assert told[key] == result[key], key
    assert told["test_seconds"] > 0
    assert read_json(run / "evaluate" / "stage2-1x1_2x3-8f.json") == told
    kept, again = (arrays_of(run / where / "predictions.npz") for where in ("test", "evaluate/stage2-1x1_2x3-8f"))
    assert all((kept[name] == again[name]).all() for name in kept)
    assert untouched()


def test_evaluate_weights_alone(place: Path, run: Path, untouched: Callable[[], bool]) -> None:
    weights = ("--weights", "run/stage2/weights.safetensors", "--trunk-weights", "run/stage1/weights.safetensors")
    finished = sfa(place, "evaluate", *START[:2], *weights, "--views", "2x3", "--out", "scores/own.json")
    assert finished.code == 0, finished.err
    assert "2 x 3" in finished.out
    told, result = read_json(place / "scores" / "own.json"), read_json(run / "result.json")
    assert scores_of(told) == scores_of(result)
    assert told.keys() >= result.keys()
    assert told["trainable_parameters"] == result["trainable_parameters"]
    assert (place / "scores" / "own" / "predictions.npz").is_file()
    assert untouched()


def test_evaluate_another_stage_other_views_shards_and_frames(
    place: Path, run: Path, untouched: Callable[[], bool]
) -> None:
    stage1 = json.loads(sfa(place, "evaluate", "run", "--stage", "stage1", "--views", "1x1", "--json").out)
    last = [line for line in log_lines(run) if line["kind"] == "eval" and line["stage"] == "stage1"][-1]
    assert scores_of(stage1).items() >= scores_of(last).items()  # A test over one view is the last validation.
    part = ("--shards", "shards/validation-000000.tar", "--set", "test.average=softmax")
    found = json.loads(sfa(place, "evaluate", "run", *part, "--frames", "16", "--json").out)
    assert (found["samples"], found["frames"]) == (6, 16)
    assert found["evaluated"]["set"] == ["test.average=softmax"]
    names = {path.name.split("f-")[0] for path in (run / "evaluate").glob("*16f*.json")}
    assert names == {"stage2-1x1_2x3-16"}
    assert untouched()


@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluate_on_ranks(place: Path, run: Path, untouched: Callable[[], bool], world_size: int) -> None:
    out = f"on{world_size}.json"
    ranks = train_ranks(world_size, place, "evaluate", "run", "--json", "--out", out, command="sfa")
    ended = [rank.wait() for rank in ranks]
    assert [end.code for end in ended] == [0] * world_size, ended[0].err
    assert [bool(end.out) for end in ended] == [True] + [False] * (world_size - 1)
    assert json.loads(ended[0].out) == read_json(place / out)
    assert scores_of(read_json(place / out)) == pytest.approx(scores_of(read_json(run / "result.json")), rel=1e-4)
    assert untouched()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 64, "give a run directory, or --recipe and --weights"),
        (("nowhere",), 64, "nowhere is not a run directory"),
        (("run", "--weights", "x"), 64, "leave out --weights"),
        (("run", "--views", "4x2"), 64, "--views 4x2"),
        (("run", "--stage", "image"), 64, "no such stage (it has stage1, stage2)"),
        (("run", "--out", "here"), 64, "must end with .json"),
        (("run", "--shards", "none/*.tar"), 65, "no shard matches"),
        (("run", "--frames", "7"), 78, "not a multiple"),
        (("run", "--set", "test.averag=softmax"), 78, "did you mean 'average'?"),
        (("run", "--set", "stage2.frames=16"), 78, "temporal.pos_embed"),
        (("--recipe", "t.yaml", "--weights", "none.safetensors"), 74, "no weights file none.safetensors"),
        (("--recipe", "t.yaml", "--weights", "run/stage2/weights.safetensors"), 64, "with --trunk-weights"),
        (("--recipe", "none.yaml", "--weights", "x"), 78, "no such recipe"),
    ],
)
def test_evaluate_says_what_is_wrong_in_one_line(
    place: Path, run: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    finished = sfa(place, "evaluate", *words)
    assert_refused(finished, code, said)
    assert not finished.out


def test_evaluate_broken_weights(place: Path, run: Path, tmp_path: Path) -> None:
    """Scores of NaN are no accuracy: class 0 would be right."""
    weights = tmp_path / "huge.safetensors"
    with safe_open(run / "stage1" / "weights.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) * 1e30 for name in file.keys()}  # noqa: SIM118 -- no dictionary
        save_file(state, weights, file.metadata())
    finished = sfa(
        place, "evaluate", "--recipe", "t.yaml", "--weights", str(weights), "--out", str(tmp_path / "x.json")
    )
    assert_refused(finished, 70, "the model's scores are not finite")
    assert not (tmp_path / "x.json").exists()


def test_evaluate_a_run_that_is_not_trained_yet(place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((place / "t.yaml").read_text())
    assert_refused(sfa(place, "evaluate", str(tmp_path)), 74, "has no weights yet")


def test_evaluate_weights_of_a_stage_that_the_recipe_has_not(place: Path, run: Path) -> None:
    words = ("--recipe", "t.yaml", "--weights", "run/stage2/weights.safetensors", "--set", "stage2=null")
    assert_refused(sfa(place, "evaluate", *words), 78, "is of stage2, and the recipe has no such stage")


# --------------------------------------------------------------------------------------------------------- sfa predict


@pytest.fixture(scope="module")
def clips(place: Path, run: Path) -> list[str]:
    """Files of the validation clips, in the order of the test's predictions."""
    index = load_index(expand_shards([str(place / "shards" / "validation-*.tar")]))
    assert arrays_of(run / "test" / "predictions.npz")["keys"].tolist() == list(index.keys)
    for number in range(len(index)):
        (place / f"{number}.mp4").write_bytes(read_clip_bytes(index, number))
    return [f"{number}.mp4" for number in range(len(index))]


def best_five(scores: np.ndarray) -> list[tuple[int, float]]:
    return [(int(label), float(scores[label])) for label in np.argsort(-scores)[:5]]


def assert_lists(line: dict[str, Any], noun: np.ndarray, verb: np.ndarray) -> None:
    """All three lists, from the probabilities of both heads."""
    for key, wanted in (("noun_top5", noun), ("verb_top5", verb), ("top5", np.outer(noun, verb).reshape(-1))):
        found = line[key]
        assert [entry["score"] for entry in found] == pytest.approx([score for _, score in best_five(wanted)], rel=1e-3)
        # Classes that never occurred are equally unlikely but for rounding: their order is nobody's.
        assert [wanted[entry["label"]] for entry in found] == pytest.approx([e["score"] for e in found], rel=1e-3)
    best = line["top5"][0]
    assert best["label"] == line["noun_top5"][0]["label"] * 97 + line["verb_top5"][0]["label"]
    assert best["name"] == f"{line['verb_top5'][0]['name']} {line['noun_top5'][0]['name']}"


@pytest.mark.parametrize("average", ["logits", "softmax"])
def test_predict_tells_noun_verb_and_action_as_the_test_scores_them(
    place: Path, run: Path, clips: list[str], average: str
) -> None:
    setting = ("--set", f"test.average={average}")
    assert sfa(place, "evaluate", "run", *setting, "--out", f"{average}.json").code == 0
    logits = arrays_of(place / average / "predictions.npz")["logits"].astype(np.float64)
    finished = sfa(place, "predict", *clips, "--run", "run", *setting, "--json")
    assert finished.code == 0, finished.err
    lines = [json.loads(line) for line in finished.out.splitlines()]
    assert [line.keys() for line in lines] == [{"file", "top5", "noun_top5", "verb_top5"}] * VALIDATION
    for line, row in zip(lines, torch.from_numpy(logits), strict=True):
        assert_lists(line, row[:300].softmax(0).numpy(), row[300:].softmax(0).numpy())


def test_predict_in_words_and_over_time(place: Path, run: Path, clips: list[str], tmp_path: Path) -> None:
    told = sfa(place, "predict", clips[0], "--run", "run", "--top", "2").out.splitlines()
    assert [line.strip() for line in told[1::3]] == ["action", "noun", "verb"]
    assert len(told) == 10
    timeline = ("--timeline", "--hop", "0.1", "--out", str(tmp_path), "--json")
    finished = sfa(place, "predict", clips[0], "--run", "run", *timeline)
    assert finished.code == 0, finished.err
    windows = read_json(tmp_path / "0.timeline.json")["windows"]
    assert windows == [json.loads(line) for line in finished.out.splitlines()]
    assert len(windows) > 1
    for window in windows:
        assert [len(window[key]) for key in ("top5", "noun_top5", "verb_top5")] == [5, 5, 5]
    assert (tmp_path / "0.timeline.png").read_bytes().startswith(b"\x89PNG")
