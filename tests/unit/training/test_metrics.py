"""Loss and accuracy are sums: over clips that count, and over any split of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from sfa_dist.models.loss import clip_losses, weighted_loss_sum
from sfa_dist.training.metrics import ClassificationSums, action_numbers, average_views

CLASSES = 7


def predictions(clips: int = 40, classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random logits and labels with every fourth clip of weight 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(clips, classes, generator=generator)
    labels = torch.randint(0, classes, (clips,), generator=generator)
    return logits, labels, (torch.arange(clips) % 4 != 0).float()


def result(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, parts: int = 1) -> dict[str, float]:
    sums = ClassificationSums()
    for logit, label, weight in zip(logits.chunk(parts), labels.chunk(parts), weights.chunk(parts), strict=True):
        sums.update(logit, label, weight)
    return sums.result()


@pytest.mark.parametrize("classes", [2, 3, 5, 7, 20])
def test_accuracy_and_loss_are_scikit_learns(classes: int) -> None:
    logits, labels, weights = predictions(classes=classes)
    real = weights > 0
    truth, scores, every = labels[real].numpy(), logits[real].softmax(1).double().numpy(), range(classes)
    found = result(logits, labels, weights)
    if classes == 2:  # scikit-learn takes two classes for one score
        assert found["acc1"] == (scores.argmax(1) == truth).mean()
    else:
        assert found["acc1"] == pytest.approx(top_k_accuracy_score(truth, scores, k=1, labels=every))
    if classes > 5:
        assert found["acc5"] == pytest.approx(top_k_accuracy_score(truth, scores, k=5, labels=every))
    else:
        assert found["acc5"] == 1.0
    assert found["loss"] == pytest.approx(log_loss(truth, scores / scores.sum(1, keepdims=True), labels=every))
    assert found["samples"] == int(real.sum())


def test_top_k_is_what_counting_by_hand_gives() -> None:
    logits, labels, weights = predictions()
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    counted = [rank for rank, weight in zip(ranks, weights, strict=True) if weight > 0]
    found = result(logits, labels, weights)
    assert found["acc1"] == sum(rank < 1 for rank in counted) / len(counted)
    assert found["acc5"] == sum(rank < 5 for rank in counted) / len(counted)


@pytest.mark.parametrize("parts", [2, 5, 40])
def test_sums_add_up_over_any_split(parts: int) -> None:
    assert result(*predictions(), parts=parts) == pytest.approx(result(*predictions()), rel=1e-6)


def test_clips_of_weight_0_do_not_count_even_where_they_are_nan() -> None:
    logits, labels, weights = predictions()
    damaged = torch.where(weights[:, None] > 0, logits, torch.nan)
    assert result(damaged, labels, weights) == result(logits, labels, weights)


def test_scores_that_are_not_finite_are_never_right() -> None:
    """The best of seven NaN is class 0, which is as wrong as any."""
    scores = torch.full((4, CLASSES), torch.nan)
    scores[0] = torch.arange(CLASSES)
    found = result(scores, torch.tensor([CLASSES - 1, 0, 1, 2]), torch.ones(4))
    assert (found["acc1"], found["acc5"], found["samples"]) == (0.25, 0.25, 4)
    assert found["loss"] != found["loss"]


def test_without_a_clip_there_is_no_accuracy() -> None:
    found = result(*predictions()[:2], torch.zeros(40))
    assert found["samples"] == 0
    assert all(found[key] != found[key] for key in ("acc1", "acc5", "loss"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_sum_over_clips_that_count(smoothing: float) -> None:
    logits, labels, weights = predictions()
    real = weights > 0
    expected = F.cross_entropy(logits[real], labels[real], reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(weighted_loss_sum(logits, labels, weights, smoothing), expected)


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_a_clip_of_weight_0_changes_neither_loss_nor_gradient(damage: float) -> None:
    logits, labels, weights = predictions()
    plain = logits.clone().requires_grad_()
    weighted_loss_sum(plain, labels, weights, 0.1).backward()
    damaged = torch.where(weights[:, None] > 0, logits, damage).requires_grad_()
    loss = weighted_loss_sum(damaged, labels, weights, 0.1)
    loss.backward()
    torch.testing.assert_close(loss, weighted_loss_sum(logits, labels, weights, 0.1))
    torch.testing.assert_close(damaged.grad, plain.grad)
    assert not plain.grad[weights == 0].any()


def test_micro_batches_add_up_to_the_batch() -> None:
    whole = weighted_loss_sum(*predictions(), 0.0)
    parts = sum(
        weighted_loss_sum(*part, 0.0) for part in zip(*(tensor.chunk(5) for tensor in predictions()), strict=True)
    )
    torch.testing.assert_close(parts, whole)


# ------------------------------------------------------------------------------------------------------- several heads

HEADS = {"noun": 6, "verb": 4}
SIZES = (6, 4)


def action_predictions(clips: int = 60, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random logits and nouns and verbs, which the logits know a little of; every fourth clip has weight 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(clips, sum(SIZES), generator=generator)
    labels = torch.stack([torch.randint(0, size, (clips,), generator=generator) for size in SIZES], dim=1)
    logits[torch.arange(clips), labels[:, 0]] += 1
    logits[torch.arange(clips), SIZES[0] + labels[:, 1]] += 1
    return logits, labels, (torch.arange(clips) % 4 != 0).float()


def sums_of(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, heads: dict[str, int] = HEADS, parts: int = 1
) -> ClassificationSums:
    """Counted on `parts` ranks."""
    ranks = []
    for logit, label, weight in zip(logits.chunk(parts), labels.chunk(parts), weights.chunk(parts), strict=True):
        ranks.append(ClassificationSums(heads))
        ranks[-1].update(logit, label, weight)
    return ClassificationSums.added(ranks)


def test_each_head_is_scikit_learns() -> None:
    logits, labels, weights = action_predictions()
    real = weights > 0
    found = sums_of(logits, labels, weights).result()
    start = 0
    for place, (head, size) in enumerate(HEADS.items()):
        scores, truth = logits[real, start : start + size].softmax(1).numpy(), labels[real, place].numpy()
        for k in (1, 5) if size > 5 else (1,):
            wanted = top_k_accuracy_score(truth, scores, k=k, labels=range(size))
            assert found[f"{head}_acc{k}"] == pytest.approx(wanted)
        start += size
    assert found["verb_acc5"] == 1.0  # of four
    assert found["samples"] == int(real.sum())


def test_an_action_is_the_outer_product_of_the_heads() -> None:
    logits, labels, weights = action_predictions()
    found = sums_of(logits, labels, weights).result()
    right1 = right5 = both = clips = 0
    for row, (noun, verb), weight in zip(logits.double(), labels.tolist(), weights, strict=True):
        if weight == 0:
            continue
        products = np.outer(row[:6].softmax(0).numpy(), row[6:].softmax(0).numpy()).reshape(-1)
        order = np.argsort(-products)
        right1 += order[0] == noun * 4 + verb
        right5 += noun * 4 + verb in order[:5]
        both += int(row[:6].argmax()) == noun and int(row[6:].argmax()) == verb
        clips += 1
    assert (found["action_acc1"], found["action_acc5"]) == (right1 / clips, right5 / clips)
    assert (found["acc1"], found["acc5"]) == (found["action_acc1"], found["action_acc5"])
    assert right1 == both  # The best action is the best noun with the best verb.
    assert 0 < right1 < right5 < clips


def test_an_action_that_is_nearly_certain_still_has_a_top_5() -> None:
    """In fp32 the product of these softmax underflows to 0 for all actions but one."""
    logits = torch.tensor([[200.0, 10, 5, 0, 0, 0, 300.0, 20, 10, 0]])
    sums = sums_of(logits, torch.tensor([[1, 0]]), torch.ones(1))
    assert sums.by_head["action"].pairs == {(4, 0): 1}
    assert (sums.result()["action_acc1"], sums.result()["action_acc5"]) == (0.0, 1.0)


def test_the_official_action_number_is_noun_times_97_plus_verb() -> None:
    assert action_numbers(torch.tensor([[0, 96], [1, 0], [299, 96]]), (300, 97)).tolist() == [96, 97, 300 * 97 - 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_of_the_heads_each_smoothed_over_its_own_classes(smoothing: float) -> None:
    logits, labels, weights = action_predictions()
    losses = []
    for row, wanted in zip(logits.double(), labels.tolist(), strict=True):
        heads = []
        for part, label, size in zip(row.split(SIZES), wanted, SIZES, strict=True):
            target = torch.full((size,), smoothing / size, dtype=torch.float64)
            target[label] += 1 - smoothing
            heads.append(-(target * part.log_softmax(0)).sum())
        losses.append(sum(heads) / 2)
    each = clip_losses(logits, labels, smoothing, SIZES)
    torch.testing.assert_close(each.double(), torch.stack(losses), rtol=1e-5, atol=1e-6)
    wanted = (torch.stack(losses) * weights).sum()
    torch.testing.assert_close(weighted_loss_sum(logits, labels, weights, smoothing, SIZES).double(), wanted)
    if not smoothing:
        mean = float(wanted / weights.sum())
        assert sums_of(logits, labels, weights).result()["loss"] == pytest.approx(mean)


def test_a_clip_of_weight_0_changes_no_head() -> None:
    logits, labels, weights = action_predictions()
    damaged = torch.where(weights[:, None] > 0, logits, torch.nan).requires_grad_()
    loss = weighted_loss_sum(damaged, labels, weights, 0.1, SIZES)
    loss.backward()
    torch.testing.assert_close(loss, weighted_loss_sum(logits, labels, weights, 0.1, SIZES))
    assert damaged.grad.isfinite().all()
    assert sums_of(damaged.detach(), labels, weights) == sums_of(logits, labels, weights)


@pytest.mark.parametrize("heads", [{}, HEADS])
def test_confusion_and_class_means_are_scikit_learns(heads: dict[str, int]) -> None:
    logits, labels, weights = action_predictions() if heads else predictions(clips=90, classes=10)
    real = weights > 0
    sums = sums_of(logits, labels, weights, heads)
    parts = logits.split(SIZES, dim=1) if heads else [logits]
    found = sums.class_means()
    for place, (head, part) in enumerate(zip(heads or ("label",), parts, strict=True)):
        truth = labels[real, place] if heads else labels[real]
        best = part[real].argmax(1)
        size = part.shape[1]
        matrix = np.zeros((size, size), dtype=int)
        for (label, taken_for), clips in sums.by_head[head].pairs.items():
            matrix[label, taken_for] = clips
        assert (matrix == confusion_matrix(truth, best, labels=range(size))).all()
        wanted = balanced_accuracy_score(truth, best)
        assert found[f"{head}_mean_class_acc1" if heads else "mean_class_acc1"] == pytest.approx(wanted)
        recalls = sums.by_head[head].recalls()
        assert {label: clips for label, (_, clips) in recalls.items()} == Counter(truth.tolist())
    if heads:
        assert found["mean_class_acc1"] == found["action_mean_class_acc1"]


def test_classes_without_clips_do_not_count_in_the_mean() -> None:
    logits = torch.eye(5)[[0, 1, 1, 1]]
    sums = sums_of(logits, torch.tensor([0, 0, 1, 1]), torch.ones(4), {})
    assert sums.main.recalls() == {0: (1, 2), 1: (2, 2)}
    assert sums.class_means() == {"mean_class_acc1": 0.75}


@given(data=st.data(), heads=st.sampled_from([{}, HEADS]), ranks=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_any_order_of_clips_and_views_on_any_ranks_gives_the_same(
    data: st.DataObject, heads: dict[str, int], ranks: int
) -> None:
    views, average = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(["logits", "softmax"]))
    logits, labels, weights = action_predictions(24) if heads else predictions(clips=24)
    sizes = tuple(heads.values())
    noise = torch.randn(24, views, logits.shape[1], generator=torch.Generator().manual_seed(views))
    each = logits[:, None] + noise
    wanted = sums_of(average_views(each.flatten(0, 1), views, average, sizes), labels, weights, heads)
    clips = torch.tensor(data.draw(st.permutations(range(24))))
    order = torch.tensor(data.draw(st.permutations(range(views))))
    shuffled = average_views(each[clips][:, order].flatten(0, 1), views, average, sizes)
    found = sums_of(shuffled, labels[clips], weights[clips], heads, ranks)
    assert found.by_head == wanted.by_head
    assert found.result() == pytest.approx(wanted.result(), rel=1e-9)


@pytest.mark.parametrize("sizes", [(), SIZES])
def test_softmax_is_averaged_in_each_head(sizes: tuple[int, ...]) -> None:
    logits = torch.randn(4 * 3, 10, generator=torch.Generator().manual_seed(0)) * 4
    scores = average_views(logits, 3, "softmax", sizes)
    for part, found in zip(logits.split(sizes or 10, dim=1), scores.split(sizes or 10, dim=1), strict=True):
        wanted = part.double().softmax(1).unflatten(0, (4, 3)).mean(1)
        torch.testing.assert_close(found.exp(), wanted)
    torch.testing.assert_close(average_views(logits, 3, "logits", sizes), logits.double().unflatten(0, (4, 3)).mean(1))
    far = torch.tensor([[0.0, 900.0], [0.0, 800.0]])
    assert average_views(far, 2, "softmax", ()).isfinite().all()  # No logarithm of an underflown 0.
