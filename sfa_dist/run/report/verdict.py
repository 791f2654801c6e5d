"""What came out of a run, in words: the score and how sure it is, whether it is better than chance, what it cost."""

from __future__ import annotations

from typing import Any

from sfa_dist.boundary.counted import counted
from sfa_dist.run.chance import chance_words, guessing, heads_of, shows_top5, verdicts
from sfa_dist.run.cost import REASON, cost_words
from sfa_dist.run.intervals import wilson
from sfa_dist.run.report.run_files import RunFiles

NO_RESULT = "No test result yet."


def headline(result: dict[str, Any]) -> str:
    """The result in one sentence."""
    if not result:
        return NO_RESULT
    scores = f"top-1 {result['acc1']:.2%}" + (f", top-5 {result['acc5']:.2%}" if shows_top5(result) else "")
    text = f"{scores} on {result['samples']:,} clips ({counted(result['views'], 'view')})"
    if "acc1_shuffled_frames" in result:
        text += f"; top-1 {result['acc1_shuffled_frames']:.2%} when the frames of each clip are in random order"
    return text + f". Training took {result['total_seconds']:,.0f} s."


def verdict_lines(run: RunFiles) -> list[str]:
    """The verdict, a sentence each, and what was noticed of the clips of the stages."""
    result = run.result
    if not result:
        return ["The run has no result.json: it goes on, has ended early, or its test was not run.", *said(run)]
    words = [*_chance(result), *verdicts(result), *chance_words(result)]
    lines = [f"{line[0].upper()}{line[1:]}." for line in words]
    return [*lines, *_interval(result), _shuffled(result), *_cost(result), *said(run)]


def _chance(result: dict[str, Any]) -> list[str]:
    """Of each head that is better than chance, or of which that is not recorded; `verdicts` has the others."""
    lines = []
    for head in heads_of(result):
        guessed, titled = guessing(result, head), f"{head.removesuffix('_')}: " if head else ""
        if guessed is None:
            lines.append(f"{titled}whether this is better than chance is not recorded (the run is of an older version)")
        elif result[f"{head}better_than_chance"]:
            lines.append(f"{titled}better than chance: top-1 {result[f'{head}acc1']:.2%}, guessing {guessed:.2%}")
    return lines


def interval_of(result: dict[str, Any], head: str = "") -> tuple[float, float] | None:
    """The interval of top-1 by clips; None without a clip."""
    clips = result["samples"]
    return wilson(round(result[f"{head}acc1"] * clips), clips) if clips else None


def interval_words(interval: tuple[float, float] | None) -> str:
    """`61.2% to 70.1%`."""
    return "none: no clips" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"


def _interval(result: dict[str, Any]) -> list[str]:
    intervals = [
        (f"{head.removesuffix('_')} " if head else "") + interval_words(interval_of(result, head))
        for head in heads_of(result)
    ]
    return [
        f"95 % interval of top-1 by clips (Wilson): {'; '.join(intervals)}. It says how far other clips would move the "
        "score, and nothing of other seeds."
    ]


def _shuffled(result: dict[str, Any]) -> str:
    shuffled, interval = result.get("acc1_shuffled_frames"), interval_of(result)
    if shuffled is None:
        return "The control with shuffled frames was not measured (test.shuffled_frames: true measures it)."
    text = f"With the frames of each clip in random order top-1 is {shuffled:.2%}"
    if interval is None:
        return f"{text}."
    if shuffled < interval[0]:
        return f"{text}, below that interval: the score depends on the order of the frames."
    if shuffled > interval[1]:
        return f"{text}, above that interval: the order of the frames does not help this model."
    return f"{text}, within that interval: that the order of the frames counts is not shown by these clips."


def _cost(result: dict[str, Any]) -> list[str]:
    ranks = sum(stage.get("gpu_seconds", 0) for stage in result.get("stages", {}).values())
    text = f"Training took {result['total_seconds']:,.0f} s ({ranks:,.0f} rank-seconds)"
    ratio = result.get("cost_ratio")
    if ratio is None:
        why = f": {result[REASON]}" if result.get(REASON) else ""
        return [f"{text}. Its cost beside end-to-end training is not in result.json (cost_ratio){why}."]
    dear = "; sfa plan says why it is above 1" if ratio > 1 else ""
    return [f"{text}, {ratio:.2f} times what end-to-end training costs ({cost_words(result)}){dear}."]


def said(run: RunFiles) -> list[str]:
    """What was noticed of the clips of a stage (events `notice`), each once."""
    return list(dict.fromkeys(f"{notice['stage']}: {notice['text']}" for notice in run.events("notice")))
