"""Loss and accuracy are sums: over clips that count, and over any split of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss, top_k_accuracy_score

from sfa_dist.metrics import ClassificationSums, weighted_loss_sum

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
