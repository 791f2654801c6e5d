"""The test of a sweep: scores of all members in one pass, the member that validation chooses, and means over seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfa_dist.boundary.file_names import WEIGHTS
from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.feed import BatchFeed
from sfa_dist.recipe.schema import Member, sweep_members
from sfa_dist.run.context import Run
from sfa_dist.run.record import DIVERGED
from sfa_dist.stages.assemble import Parts, load_for_test, load_tail_for_test
from sfa_dist.stages.sweep import member_directory, member_result, trained_members
from sfa_dist.stages.trunk_setup import place_trunk
from sfa_dist.training.bad_clips import note_bad_test_clips
from sfa_dist.training.evaluation import Scoring, evaluate_all
from sfa_dist.training.metrics import ClassificationSums
from sfa_dist.training.model_inputs import model_inputs
from sfa_dist.training.prediction_file import PredictionFile


@dataclass(frozen=True)
class SweepResult:
    """The test of a sweep's members, as result.json lists them, and the member with the best validation score."""

    diverged: list[dict[str, Any]]
    """Members that have diverged: name, settings, reason."""
    lines: list[dict[str, Any]]
    """One for each trained member: name, settings, scores."""
    means: list[dict[str, Any]]
    """Scores averaged over seeds (`means_over_seeds`)."""
    best: Member
    best_parts: Parts
    best_sums: ClassificationSums


def score_sweep(
    run: Run, batches: BatchFeed, scoring: Scoring, max_bad_fraction: float, keep: PredictionFile | None
) -> SweepResult:
    """Scores all trained members in one pass, with the trunk run once per batch. Collective.

    `keep` gets the clips' scores of the best member. Raises RecipeError for members trained on another trunk, DataError
    over the budget of bad clips, PreemptedError on a stop request.
    """
    members = trained_members(run)
    weights = [member_directory(run, member) / WEIGHTS for member in members]
    first = load_for_test(members[0].stage, weights[0], run.weights("stage1"))
    trunk, device = first.frozen, run.runtime.device
    assert trunk is not None
    trunk_sha256 = trunk.sha256()
    others = [load_tail_for_test(m.stage, path, trunk_sha256) for m, path in zip(members[1:], weights[1:], strict=True)]
    tails: list[nn.Module] = [module.to(device) for module in (first.trainable, *others)]
    place_trunk(trunk, members[0].stage, run.runtime)

    @torch.no_grad()
    def predict(batch: Batch) -> list[Tensor]:
        features = model_inputs(batch, trunk, device)
        return [tail(features) for tail in tails]

    trained = run.runtime.on_main(lambda: [member_result(run, member) for member in members])
    chosen = max(range(len(members)), key=lambda number: (_val(trained[number]) or 0.0, -number))
    if all(_val(own) is None for own in trained):
        run.tracker.say(f"test: no member has a validation score (data.val), so {members[0].name} stands for the sweep")
    sums = evaluate_all(
        predict,
        len(tails),
        scoring,
        batches,
        run.runtime,
        run.stop,
        lambda bad, clips: note_bad_test_clips(bad, clips, "test", 0, max_bad_fraction, run.tracker),
        {} if keep is None else {chosen: keep},
    )
    results = [own.result() for own in sums]
    lines = [
        {
            "member": member.name,
            "settings": member.settings,
            **{key: value for key, value in result.items() if key != "samples"},
            "val_acc1": _val(own),
            "steps": own["steps"],
            "trainable_parameters": own["trainable_parameters"],
        }
        for member, result, own in zip(members, results, trained, strict=True)
    ]
    tested = {member.name for member in members}
    lost = [member for member in sweep_members(run.recipe) if member.name not in tested]
    reasons = run.runtime.on_main(lambda: [member_result(run, member)[DIVERGED] for member in lost])
    diverged = [
        {"member": member.name, "settings": member.settings, "reason": reason}
        for member, reason in zip(lost, reasons, strict=True)
    ]
    best = Parts(tails[chosen], trunk)
    return SweepResult(diverged, lines, means_over_seeds(lines), members[chosen], best, sums[chosen])


def _val(result: dict[str, Any]) -> float | None:
    """The validation accuracy in a member's result; None where it has none."""
    scores = result.get("val")
    found = scores.get("acc1") if isinstance(scores, dict) else None
    return found if isinstance(found, float | int) else None


def means_over_seeds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation of the scores of members that differ only in the seed.

    The deviation is None for a single seed.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        settings = {key: value for key, value in line["settings"].items() if key != "seed"}
        groups.setdefault(repr(settings), []).append({**line, "settings": settings})
    means = []
    for group in groups.values():
        mean: dict[str, Any] = {"settings": group[0]["settings"], "members": [line["member"] for line in group]}
        for key in ("acc1", "acc5", "loss"):
            values = [line[key] for line in group]
            mean[key] = statistics.fmean(values)
            mean[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        means.append(mean)
    return means
