"""Pictures of some tested clips, right and wrong ones: a few small JPEGs, where the shards can be read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from sfa_dist.data.sampling.clip_sampling import spread_frames
from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.data.shards.shard_names import expand_shards, shard_name
from sfa_dist.data.video.decode import decoder_of
from sfa_dist.errors import DataError
from sfa_dist.recipe.blocks import DataBlock, shard_kind
from sfa_dist.run.report.apart import NoPicturesError, made_apart
from sfa_dist.run.report.document import Block, Clip, Clips, Section, Text
from sfa_dist.run.report.outcomes import NoOutcomesError, Outcomes, read_outcomes
from sfa_dist.run.report.run_files import RunFiles

MOST_CLIPS = 6  # Of each kind.
FRAMES = 4  # Of a clip.
HEIGHT, WIDEST = 80, 160  # Pixels of a frame.
QUALITIES = (72, 50, 30, 10)  # Of the JPEG, the first that needs no more than MOST_BYTES.
MOST_BYTES = 20_000
SECONDS = 120.0  # For all pictures.
HOW = (
    "Right ones first, then wrong ones, of each kind those of which the model is surest and different classes first. "
    f"Each shows {FRAMES} frames from the first to the last of its video."
)


def clip_section(run: RunFiles, stopped: Callable[[], bool] = bool) -> Section:
    """The pictures; in words why there are none, or fewer. Ends soon once `stopped` says so."""
    try:
        outcomes = read_outcomes(run.directory)
    except NoOutcomesError as error:
        return Section("Clips", [Text(f"No clips are shown: {error}.")])
    if not run.stages:
        return Section("Clips", [Text("No clips are shown: the run has no recipe that this version reads.")])
    rows = [row for is_right in (True, False) for row in choose(outcomes, is_right)]
    try:
        make = partial(_pictures, list(run.stages.values())[-1].data, outcomes, rows)
        made = made_apart(len(rows), make, SECONDS, stopped)
    except (NoPicturesError, OSError) as error:
        return Section("Clips", [Text(f"No clips are shown: their shards cannot be read here ({error}).")])
    pairs = zip(rows, made.pictures, strict=True)
    shown = [_clip(outcomes, row, jpeg) for row, jpeg in pairs if jpeg is not None]
    lost = len(rows) - len(shown)
    blocks: list[Block] = [Text(HOW), *_doubt(run, outcomes), Clips(shown)]
    blocks += [Text(f"{lost} of {len(rows)} clips cannot be shown: unreadable, or changed.")] if lost else []
    blocks += [Text(f"The decoder {how} at {_name(outcomes, rows[at])}.") for at, how in made.ended.items()]
    return Section("Clips", blocks)


def _doubt(run: RunFiles, outcomes: Outcomes) -> list[Text]:
    """That the recorded scores give another top-1 than the test: equal scores, or files of two tests."""
    counted, recorded = round(run.result["acc1"] * run.result["samples"]), int(outcomes.right.sum())
    if counted == recorded:
        return []
    return [Text(f"The test counted {counted:,} right clips, its recorded scores give {recorded:,}.")]


def choose(outcomes: Outcomes, is_right: bool) -> list[int]:
    """Rows of at most MOST_CLIPS clips: a class's surest clip before the second one of any class."""
    rows = np.flatnonzero(outcomes.right == is_right)
    if outcomes.probability is not None:
        rows = rows[np.argsort(-outcomes.probability[rows], kind="stable")]
    seen: dict[tuple[int, ...], int] = {}
    rounds = []
    for row in rows.tolist():
        label = tuple(outcomes.labels[row].tolist())
        rounds.append((seen.get(label, 0), row))
        seen[label] = seen.get(label, 0) + 1
    return [row for _, row in sorted(rounds, key=lambda pair: pair[0])][:MOST_CLIPS]


def _pictures(data: DataBlock, outcomes: Outcomes, rows: Sequence[int], first: int) -> Iterator[bytes | None]:
    """Of the rows from position `first` on, None where a clip cannot be decoded. Raises SfaError, OSError."""
    wanted = {outcomes.shards[row] for row in rows}
    # A report waits for no network, and no pipe of a recipe is run for it.
    local = [pattern for pattern in data.test or data.val if not shard_kind(pattern)]
    if not local:
        raise DataError("only shards on a disk are read")
    shards = [shard for shard in expand_shards(local) if shard_name(shard) in wanted]
    index = load_index(shards) if shards else None
    samples = {} if index is None else {_name_of(index, number): number for number in range(len(index))}
    for row in rows[first:]:
        sample = samples.get((outcomes.shards[row], outcomes.keys[row]))
        yield None if index is None or sample is None else _picture(index, sample, data)


def _name_of(index: SampleIndex, number: int) -> tuple[str, str]:
    return shard_name(index.shards[index.shard[number]]), index.keys[number]


def _name(outcomes: Outcomes, row: int) -> str:
    return f"{outcomes.shards[row]}/{outcomes.keys[row]}"


def _clip(outcomes: Outcomes, row: int, jpeg: bytes) -> Clip:
    return Clip(
        _name(outcomes, row),
        outcomes.words(outcomes.labels[row]),
        outcomes.words(outcomes.predicted[row]),
        None if outcomes.probability is None else float(outcomes.probability[row]),
        bool(outcomes.right[row]),
        jpeg,
    )


def _picture(index: SampleIndex, sample: int, data: DataBlock) -> bytes | None:
    """FRAMES frames of a clip side by side; None where it is not readable."""
    cpu = data.model_copy(update={"decode_device": "cpu"})
    try:
        video = decoder_of(cpu).open(read_clip_bytes(index, sample))
        return strip(video.frames_at(np.array(spread_frames(video.num_frames, FRAMES), dtype=np.int64)))
    except Exception:  # noqa: BLE001 (whatever a file does to its readers costs its own picture; the page counts it)
        return None


def strip(frames: torch.Tensor) -> bytes:
    """uint8 (T, H, W, 3) -> a JPEG of the frames side by side, each at most HEIGHT high and WIDEST wide."""
    _, height, width, _ = frames.shape
    scale = min(HEIGHT / height, WIDEST / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    smooth = Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST
    whole = Image.new("RGB", ((size[0] + 2) * len(frames) - 2, size[1]))
    for number, frame in enumerate(frames):
        whole.paste(Image.fromarray(frame.numpy()).resize(size, smooth), (number * (size[0] + 2), 0))
    for quality in QUALITIES:
        out = io.BytesIO()
        whole.save(out, "JPEG", quality=quality)
        if out.tell() <= MOST_BYTES:
            break
    return out.getvalue()
