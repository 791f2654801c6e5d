"""Named classes out of scores, against the outer product by hand, and names that do not fit the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfa_dist.errors import RecipeError
from sfa_dist.inference.class_scores import ClassScores, classes_of
from sfa_dist.recipe.blocks import ModelBlock
from sfa_dist.training.metrics import action_heads, action_numbers

KITCHEN = ClassScores({"noun": ["door", "cup", "tap", "pan"], "verb": ["open", "wash", "take"]})


def weights(folder: Path, classes: object) -> Path:
    file = folder / "w.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"classes": json.dumps(classes)})
    return file


def test_the_lists_are_those_of_softmax_and_outer_product() -> None:
    scores = torch.randn(7, generator=torch.Generator().manual_seed(3)) * 2
    noun, verb = scores[:4].softmax(0), scores[4:].softmax(0)
    torch.testing.assert_close(KITCHEN.probabilities(scores), torch.cat([noun, verb]))
    found = KITCHEN.top(scores)
    actions = sorted(((float(n * v), i * 3 + j) for i, n in enumerate(noun) for j, v in enumerate(verb)), reverse=True)
    assert [entry["label"] for entry in found["top5"]] == [label for _, label in actions[:5]]
    assert [entry["score"] for entry in found["top5"]] == pytest.approx([score for score, _ in actions[:5]], rel=1e-5)
    for entry in found["top5"]:
        i, j = divmod(entry["label"], 3)
        assert entry["name"] == f"{KITCHEN.names['verb'][j]} {KITCHEN.names['noun'][i]}"
    assert [entry["label"] for entry in found["noun_top5"]] == noun.argsort(descending=True).tolist()
    assert [entry["label"] for entry in found["verb_top5"]] == verb.argsort(descending=True).tolist()


def test_a_single_head_has_one_list() -> None:
    found = ClassScores({"label": ["a", "b", "c"]}).top(torch.tensor([0.0, 2.0, 1.0]), 2)
    assert found.keys() == {"top5"}
    assert [entry["name"] for entry in found["top5"]] == ["b", "c"]
    wanted = torch.tensor([0.0, 2.0, 1.0]).softmax(0)
    assert [entry["score"] for entry in found["top5"]] == pytest.approx([wanted[1].item(), wanted[2].item()])


def test_actions_whose_probabilities_would_underflow_keep_their_order() -> None:
    """exp(-120) squared is 0 in fp32: all actions but the best would be equal."""
    scores = torch.tensor([0.0, -120.0, -121.0, -400.0, 0.0, -119.0, -300.0])
    assert [entry["label"] for entry in KITCHEN.top(scores)["top5"]] == [0, 1, 3, 6, 4]


def test_numbers_of_actions_and_back() -> None:
    labels = torch.tensor([[noun, verb] for noun in range(4) for verb in range(3)])
    assert [action_heads(int(number), (4, 3)) for number in action_numbers(labels, (4, 3))] == labels.tolist()


@pytest.mark.parametrize(
    ("recorded", "model", "names"),
    [
        (["a", "b"], {"classes": 2}, {"label": ["a", "b"]}),
        (None, {"classes": 2}, {"label": ["0", "1"]}),
        (2, {"classes": 2}, {"label": ["0", "1"]}),
        (KITCHEN.names, {"class_heads": {"noun": 4, "verb": 3}}, KITCHEN.names),
        ({"noun": 2, "verb": 2}, {"class_heads": {"noun": 2, "verb": 2}}, {"noun": ["0", "1"], "verb": ["0", "1"]}),
    ],
)
def test_names_are_those_of_the_weights(tmp_path, recorded, model, names) -> None:
    assert classes_of(weights(tmp_path, recorded), ModelBlock(size="tiny", **model)).names == names


@pytest.mark.parametrize(
    ("recorded", "model", "said"),
    [
        (["a", "b"], {"classes": 3}, "names other classes (2 of label) than the recipe's model has (3 of label)"),
        (["a"] * 7, {"class_heads": {"noun": 4, "verb": 3}}, "(7 of label)"),
        (KITCHEN.names, {"classes": 7}, "(4 of noun, 3 of verb)"),
        (KITCHEN.names, {"class_heads": {"noun": 3, "verb": 4}}, "than the recipe's model has (3 of noun, 4 of verb)"),
    ],
)
def test_names_that_do_not_fit_the_model_are_refused(tmp_path, recorded, model, said) -> None:
    with pytest.raises(RecipeError) as error:
        classes_of(weights(tmp_path, recorded), ModelBlock(size="tiny", **model))
    assert said in str(error.value)
