"""The checks of `sfa check-learning`, in this order; each gives a verdict and a sentence.

classes           the clips of each class, chance, classes without clips
same clips        training clips among the test clips
loops             videos that are shorter than the span of a clip
reading           the time to read a clip
baselines         simple classifiers without a network, after a line for each kind of features
overfit           a few clips, learned by heart
learn             a short training
shuffled labels   the same with shuffled labels, from which nothing can be learned
shuffled frames   the same with shuffled frames, which shows what their order is worth
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.stream import check_labels
from sfa_dist.data.shards.index_columns import Int64
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.shards.subset import balanced, relabelled, same_clips, subset
from sfa_dist.data.video.decode import Decoder, decoder_of
from sfa_dist.data.video.video import Video
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import DataBlock
from sfa_dist.recipe.schema import StageBlock
from sfa_dist.run.chance import SURE, guessing, tail
from sfa_dist.run.context import Run
from sfa_dist.stages.notices import class_notices
from sfa_dist.tools.learning_table import Check
from sfa_dist.tools.learning_trials import FEWEST_STEPS, OVERFITTED, ShortTraining, Trials, guessing_loss
from sfa_dist.tools.simple_classifiers import FEATURES, Features, in_random_order, linear, nearest, thumbnails

TRAIN_CLIPS, TEST_CLIPS = 240, 120  # Clips to read, at most.
TEST_BYTES = 256 << 20  # Bytes of the test clips that are held in memory.
UNEVEN = 10  # The ratio of the largest class to the smallest from which the check notes it.
LEARNED_BY_HEART = 0.1  # The loss, as a part of that of guessing.
LEAK = 1e-3  # The probability below which a score on shuffled labels is not luck.


@dataclass
class DrawnClips:
    """The clips of a split to check: the whole index, the clips drawn from it, their thumbnails and labels."""

    whole: SampleIndex
    drawn: SampleIndex
    small: Features
    labels: Int64  # Those of the single head, or of the last one.
    batches: list[Batch] = field(default_factory=list)


class Checks:
    """All checks of a stage, which take about `seconds` together; `each` runs them in order."""

    def __init__(self, run: Run, name: str, train: SampleIndex, test: SampleIndex, seconds: float) -> None:
        self.run, self.name, self.end = run, name, time.monotonic() + seconds
        self.stage: StageBlock = getattr(run.recipe, name).on_ranks(1)
        self.whole = train, test
        self.lengths: list[int] = []
        own = _readable(self.stage.data)
        decoder = decoder_of(own)
        self.trials = Trials(run, name, self.stage.model_copy(update={"data": own}), _recording(decoder, self.lengths))
        self.rng = np.random.default_rng(run.recipe.seed)

    def each(self) -> Iterator[Check]:
        """Yields the result of each check. Raises DataError if clips cannot be read or labels do not fit."""
        train, test = self.whole
        for index in self.whole:
            check_labels(index, self.stage.model)
        yield self._classes(train, test)
        yield self._same_clips(train, test)
        started = time.monotonic()
        share = self._left() * 0.2
        self.train = self._read(train, TRAIN_CLIPS, started + share * 2 / 3)
        self.test = self._read(test, min(TEST_CLIPS, self._held_at_most()), started + share, keep=True)
        took = time.monotonic() - started
        yield self._loops()
        yield self._reading(took)
        yield from self._baselines()
        if len(np.unique(self.train.labels)) < 2:
            return  # There is nothing to learn; the first check has reported it.
        yield self._overfit()
        learned = self._learn()
        yield learned
        yield self._shuffled_labels()
        yield self._shuffled_frames(learned)

    def _left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)

    def _held_at_most(self) -> int:
        side = self.stage.model.image_size
        return max(OVERFITTED, TEST_BYTES // (3 * self.stage.frames * side * side))

    def _classes(self, train: SampleIndex, test: SampleIndex) -> Check:
        counts = [np.bincount(_labels(index)[_labels(index) >= 0]) for index in (train, test)]
        present = [count[count > 0] for count in counts]
        if not all(len(count) for count in present):
            return Check("classes", "fail", "one of the splits has no clip with a label")
        shares = [f"{len(index):,} in {len(count)} classes" for index, count in zip(self.whole, present, strict=True)]
        chance, majority = 1 / _choices(self.stage), float(present[1].max() / present[1].sum())
        values = {"train": len(train), "test": len(test), "chance_acc1": chance, "majority_acc1": majority}
        guessed = f"by chance {chance:.1%}, the largest class {majority:.1%}"
        text = f"{shares[0]} to train on, {shares[1]} to test on; {guessed}"
        if min(len(count) for count in present) < 2:
            return Check("classes", "fail", f"{text}: with one class there is nothing to tell apart", values)
        notices = class_notices(train, self.stage.model)
        ratio = present[0].max() / present[0].min()
        if ratio >= UNEVEN:
            notices.append(f"the largest class has {ratio:.0f} times the clips of the smallest")
        return Check("classes", "note" if notices else "ok", "; ".join([text, *notices]), values)

    def _same_clips(self, train: SampleIndex, test: SampleIndex) -> Check:
        same = same_clips(test, train)
        values = {"same_clips": same}
        if not same:
            return Check("same clips", "ok", "no test clip is a training clip", values)
        found = f"{same:,} of {len(test):,} test clips are training clips, to the byte"
        return Check("same clips", "fail", found, values)

    def _read(self, index: SampleIndex, most: int, end: float, keep: bool = False) -> DrawnClips:
        """Draws clips evenly from all classes and reads them until the time `end`."""
        chosen = balanced(_labels(index), most, self.rng)
        small, drawn, batches = [], [], []
        size = self.stage.batch.eval_micro or self.stage.batch.micro
        for first in range(0, len(chosen), size):
            part = chosen[first : first + size]
            for batch in self.trials.test_batches(subset(index, part)):
                good = batch.weights > 0
                if batch.clips is not None and good.any():
                    drawn.append(np.sort(part)[batch.ids[good].numpy()])
                    small.append(thumbnails(batch.clips[good]))
                    batches += [batch] if keep else []
            if time.monotonic() >= end and len(drawn) * size >= OVERFITTED:
                break
        if not drawn:
            text = f"{self.name}: none of {len(chosen)} clips can be read"
            raise DataError(f"{text}: run `sfa pack --check` on the videos")
        order = np.argsort(np.concatenate(drawn), kind="stable")
        samples = np.concatenate(drawn)[order]
        own = subset(index, samples)
        return DrawnClips(index, own, np.concatenate(small)[order], _labels(own), batches)

    def _loops(self) -> Check:
        lengths = np.array(self.lengths)
        found = []
        for name in ("image", "stage1", "stage2"):
            stage = getattr(self.run.recipe, name)
            if stage is not None:
                span = (stage.frames - 1) * stage.data.stride + 1
                found.append((name, span, float((lengths < span).mean())))
        least, most = int(lengths.min()), int(lengths.max())
        text = f"videos have {least} to {most} frames, half of them {int(np.median(lengths))} or more"
        if least == most:
            text = f"all videos have {least} frames"
        looped = [f"{share:.0%} are shorter than the {span} of {name} and loop" for name, span, share in found if share]
        values = {"median_frames": float(np.median(lengths)), "looped": {name: share for name, _, share in found}}
        if not looped:
            return Check("loops", "ok", f"{text}: each is as long as a clip spans", values)
        return Check("loops", "note", f"{text}: {'; '.join(looped)}; lower data.stride or frames", values)

    def _reading(self, seconds: float) -> Check:
        each = seconds / len(self.lengths)
        epoch = each * len(self.whole[0])
        text = f"{each * 1000:.1f} ms a clip on one core, {epoch:.0f} s for all training clips once"
        return Check("reading", "ok", text, {"seconds_per_clip": each, "seconds_per_epoch": epoch})

    def _baselines(self) -> Iterator[Check]:
        """One line for each kind of features, then the conclusion from all of them."""
        shuffled = [in_random_order(clips.small, self.rng) for clips in (self.train, self.test)]
        wrong = self.rng.permutation(self.train.labels)
        self.best = ("", 0.0)
        tried = len(FEATURES) * 2
        for title, of in FEATURES.items():
            train, test, labels = of(self.train.small), of(self.test.small), self.train.labels
            in_disorder = [of(each) for each in shuffled]
            scores = {
                "nearest": self._share(nearest(train, labels, test)),
                "linear": self._share(linear(train, labels, test)),
                "linear_shuffled_frames": self._share(linear(in_disorder[0], labels, in_disorder[1])),
                "linear_shuffled_labels": self._share(linear(train, wrong, test)),
            }
            self.best = max(self.best, (title, max(scores["nearest"], scores["linear"])), key=lambda best: best[1])
            leaks = self._tail(scores["linear_shuffled_labels"]) < LEAK
            text = (
                f"nearest neighbour {scores['nearest']:.1%}, linear {scores['linear']:.1%}; linear with frames "
                f"shuffled {scores['linear_shuffled_frames']:.1%}, with labels shuffled "
                f"{scores['linear_shuffled_labels']:.1%}"
            )
            yield Check(title, "fail" if leaks else "ok", text, scores)
        self.simple = self._tail(self.best[1]) < SURE / tried
        words = "is above chance" if self.simple else "is no better than chance, so the label needs more than this"
        guessed = self._guessed()
        found = f"the best of these, {self.best[0]}, {words} ({self.best[1]:.1%}, guessing {guessed:.1%})"
        yield Check("baselines", "ok" if self.simple else "note", found, {"best": self.best[1], "guessing": guessed})

    def _share(self, predicted: Int64) -> float:
        return float((predicted == self.test.labels).mean())

    def _guessed(self) -> float:
        """The score of always naming the largest class, on the test clips that were read."""
        return float(np.unique(self.test.labels, return_counts=True)[1].max() / len(self.test.labels))

    def _tail(self, share: float) -> float:
        return tail(round(share * len(self.test.labels)), len(self.test.labels), self._guessed())

    def _overfit(self) -> Check:
        chosen = balanced(self.train.labels, OVERFITTED, self.rng)
        trial = self.trials.overfit(subset(self.train.drawn, chosen), self._left() * 0.3)
        guessed = guessing_loss(self.stage.model)
        text = f"{len(chosen)} clips: loss {trial.loss:.3f} after {trial.steps} steps, guessing {guessed:.3f}"
        values = {**_values(trial), "loss": trial.loss, "guessing": guessed}
        if trial.diverged:
            return Check("overfit", "fail", f"{text}; the loss is no longer finite: lower optimizer.lr", values)
        if trial.loss < LEARNED_BY_HEART * guessed:
            return Check("overfit", "ok", f"{text}: learned by heart", values)
        if trial.steps < FEWEST_STEPS:
            return Check("overfit", "undecided", f"{text}: too few steps, give more --seconds", values)
        why = "it cannot learn even these; look at optimizer.lr, data.mean and data.std"
        return Check("overfit", "fail", f"{text}: {why}", values)

    def _learn(self) -> Check:
        self.learned = self.trials.learn(self.train.drawn, self.test.batches, self._left() / 3)
        scores = self.learned.scores
        text = _scored(self.learned)
        if scores.get("better_than_chance"):
            return Check("learn", "ok", f"{text}: better than chance", _values(self.learned))
        why = f"; {self.best[0]} with a simple classifier gets {self.best[1]:.1%}" if self.simple else ""
        return Check("learn", "note", f"{text}: no better than chance in this time{why}", _values(self.learned))

    def _shuffled_labels(self) -> Check:
        trial = self.trials.learn(relabelled(self.train.drawn, self.rng), self.test.batches, self._left() / 2)
        scores = trial.scores
        right, clips = round(scores["acc1"] * scores["samples"]), scores["samples"]
        leaks = tail(right, clips, guessing(scores) or 0.0) < LEAK
        words = "above chance, though there is nothing to learn" if leaks else "at chance, as it must be"
        return Check("shuffled labels", "fail" if leaks else "ok", f"{_scored(trial)}: {words}", _values(trial))

    def _shuffled_frames(self, learned: Check) -> Check:
        if learned.verdict != "ok":
            return Check("shuffled frames", "skipped", "in order nothing was learned in this time")
        batches = self.trials.test_batches(self.test.drawn, "shuffled")
        trial = self.trials.learn(self.train.drawn, batches, self._left() * 0.9, "shuffled")
        gap = self.learned.scores["acc1"] - trial.scores["acc1"]
        values = {**_values(trial), "needs_order": gap}
        words = f"the order of frames gives {gap:.1%} of top-1" if gap > 0 else "the order of frames gives nothing here"
        return Check("shuffled frames", "ok", f"{_scored(trial)}: {words}", values)


def _labels(index: SampleIndex) -> Int64:
    """The labels of the single head, or of the last one; -1 for a clip without."""
    return index.label.reshape(len(index), -1)[:, -1]


def _choices(stage: StageBlock) -> int:
    """The number of classes of that head."""
    return (stage.model.head_sizes or (stage.model.classes,))[-1]


def _readable(data: DataBlock) -> DataBlock:
    """The data settings for reading in this process, on the CPU."""
    return data.model_copy(update={"workers": 0, "decode_device": "cpu"})


def _recording(decoder: Decoder, lengths: list[int]) -> Decoder:
    """The decoder, which also appends the frames of each video that it opens to `lengths`."""

    def recorded(opened: Callable[[bytes], Video], data: bytes) -> Video:
        video = opened(data)
        lengths.append(video.num_frames)
        return video

    return decoder._replace(open=lambda data: recorded(decoder.open, data))


def _scored(trial: ShortTraining) -> str:
    return f"top-1 {trial.scores['acc1']:.1%} on {trial.scores['samples']} test clips after {trial.steps} steps"


def _values(trial: ShortTraining) -> dict[str, Any]:
    return {"steps": trial.steps, "seconds": trial.seconds, "training_loss": trial.loss, "acc1": trial.scores["acc1"]}
