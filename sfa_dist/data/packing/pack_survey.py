"""Finds out which of the listed clips can be packed.

Several processes probe the clips, and the results go into a journal, so that an interrupted survey of a large data set
goes on where it stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from sfa_dist.boundary.disk import parse_json
from sfa_dist.data.packing.annotations.classes import Heads
from sfa_dist.data.packing.annotations.rows import ClipRow
from sfa_dist.data.packing.pack_probe import VideoProbe, VideoProber, is_there, start_probe_process
from sfa_dist.data.packing.reencode import SUFFIX
from sfa_dist.data.video.decode import choose_decoder
from sfa_dist.data.video.pixel_statistics import mean_and_std
from sfa_dist.errors import DataError

Progress = Callable[[int, int], None]
PROBLEMS = ("missing", "corrupt", "short", "contradictory")
KINDS = (*PROBLEMS, "duplicate")


@dataclass(frozen=True)
class Clip:
    """A good clip, with its key in the shards and its class numbers by head."""

    key: str
    row: ClipRow
    probe: VideoProbe
    labels: dict[str, int]

    @property
    def file(self) -> Path:
        """The file to pack: the source's, or the one that it was encoded to."""
        return Path(self.probe.encoded) if self.probe.encoded else self.row.path

    @property
    def suffix(self) -> str:
        """The suffix of `file`, without the dot."""
        return SUFFIX if self.probe.encoded else self.probe.suffix or self.row.suffix


def probe_all(
    rows: Sequence[ClipRow], prober: VideoProber, journal: Path | None, progress: Progress | None
) -> list[VideoProbe]:
    """The probe of each row, in order, from as many processes as the settings say.

    Files that are in `journal` (a path, or None) and have not changed since are not probed again.
    """
    for reading in prober.settings.readings:
        choose_decoder(reading.decoder)  # raises here, once, for a decoder that cannot be used
    known = _read_journal(journal) if journal else {}
    keys = [prober.identity(row) if is_there(row) else "" for row in rows]
    found: dict[int, VideoProbe] = {number: known[key] for number, key in enumerate(keys) if key in known}
    left = [number for number in range(len(rows)) if number not in found]
    with _journal(journal) as add:
        for number, probe in zip(left, _probes([rows[number] for number in left], prober), strict=True):
            found[number] = probe
            if keys[number] and not probe.passing:  # a missing file may be there the next time
                add(keys[number], probe)
            if progress is not None:
                progress(len(found), len(rows))
    return [found[number] for number in range(len(rows))]


def _probes(rows: Sequence[ClipRow], prober: VideoProber) -> Iterator[VideoProbe]:
    workers = prober.settings.workers
    if workers < 1:
        yield from map(prober, rows)
        return
    try:
        with ProcessPoolExecutor(workers, initializer=start_probe_process) as pool:
            yield from pool.map(prober, rows, chunksize=8)
    except BrokenProcessPool as error:
        raise DataError("a file crashed the decoder: run with --workers 0 to find which one") from error


def _read_journal(path: Path) -> dict[str, VideoProbe]:
    known = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = parse_json(line.encode())
            entry["probe"]["suffix"]  # KeyError for entries of old releases, which went by the file's name
            probe = VideoProbe(**{**entry["probe"], "moments": tuple(entry["probe"].get("moments", ()))})
        except (ValueError, KeyError, TypeError):  # such as a line that was cut off when the pack was stopped
            continue
        if not probe.encoded or Path(probe.encoded).is_file():
            known[entry["key"]] = probe
    return known


@contextmanager
def _journal(path: Path | None) -> Iterator[Callable[[str, VideoProbe], None]]:
    """A function that adds a line to the journal and flushes it; does nothing without a journal."""
    if path is None:
        yield lambda key, probe: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        _end_line(file)
        yield lambda key, probe: print(json.dumps({"key": key, "probe": asdict(probe)}), file=file, flush=True)


def _end_line(file: TextIO) -> None:
    """Ends a line that was cut off, so that the next one stands alone; an empty line is ignored."""
    if file.tell():
        file.write("\n")


def sort_out(
    rows: Sequence[ClipRow], numbers: Sequence[dict[str, int]], probes: Sequence[VideoProbe], heads: Heads
) -> tuple[list[Clip], dict[str, Any]]:
    """(clips to pack, report). A clip's key is its row's number in the source, so it is unique and stays the same.

    Clips with the same content and different labels contradict each other, and none of them is packed. The report has
    `listed`, `packed`, `bad_fraction`, a list for each of KINDS, `class_counts` (number of classes by head), `clips`
    (`clip_facts`), and `classes` (by head and name, the counts of classes whose clips are not all packed).
    """
    probes = _contradictions(rows, numbers, probes)
    clips: list[Clip] = []
    first_with: dict[str, Clip] = {}
    report: dict[str, Any] = {"listed": len(rows), "packed": 0, "bad_fraction": 0.0, **{kind: [] for kind in KINDS}}
    kinds: list[str] = []
    for number, (row, labels, probe) in enumerate(zip(rows, numbers, probes, strict=True)):
        if probe.problem:
            report[probe.problem].append({"path": row.name, "where": row.where, "reason": probe.reason})
            kinds.append(probe.problem)
            continue
        clip = Clip(f"{number:08d}", row, probe, labels)
        first = first_with.setdefault(probe.sha256, clip)
        if first is clip:
            clips.append(clip)
            kinds.append("packed")
            continue
        same = {"path": row.name, "same_as": first.row.name, "same_label": first.labels == labels}
        report["duplicate"].append(same)
        kinds.append("duplicate")
    report["packed"] = len(clips)
    report["bad_fraction"] = sum(len(report[problem]) for problem in PROBLEMS) / len(rows)
    report["class_counts"] = {head: len(names) for head, names in heads.items()}
    report["clips"] = clip_facts([clip.probe for clip in clips])
    report["classes"] = {head: _by_class(names, [n[head] for n in numbers], kinds) for head, names in heads.items()}
    return clips, report


def _contradictions(
    rows: Sequence[ClipRow], numbers: Sequence[dict[str, int]], probes: Sequence[VideoProbe]
) -> list[VideoProbe]:
    """The probes, with a problem for each clip whose content another clip has under a different label."""
    same: dict[str, list[int]] = {}
    for number, probe in enumerate(probes):
        if not probe.problem:
            same.setdefault(probe.sha256, []).append(number)
    found = list(probes)
    for group in same.values():
        for number in group:
            other = next((each for each in group if numbers[each] != numbers[number]), None)
            if other is not None:
                labels = " and ".join(repr(label) for label in rows[other].labels.values())
                reason = f"{rows[other].name} ({rows[other].where}) has the same content and the label {labels}"
                found[number] = replace(probes[number], problem="contradictory", reason=reason)
    return found


def clip_facts(probes: Sequence[VideoProbe]) -> dict[str, Any]:
    """Facts of the clips that a recipe must fit.

    `frames`: minimum, quartile, median and maximum of the clips' frames.   `lengths`: the number of clips by frames.
    `fps`: the median.   `mean`, `std`: of the pixels by channel, from 0 to 1; None where no clip was decoded.
    """
    if not probes:
        return {"frames": None, "lengths": {}, "fps": None, "mean": None, "std": None}
    counts = sorted(probe.frames for probe in probes)
    positions = {"min": 0, "quartile": (len(counts) - 1) // 4, "median": (len(counts) - 1) // 2, "max": len(counts) - 1}
    mean, std = mean_and_std([probe.moments for probe in probes if probe.moments])
    return {
        "frames": {name: counts[position] for name, position in positions.items()},
        "lengths": {str(frames): count for frames, count in sorted(Counter(counts).items())},
        "fps": round(median(probe.fps for probe in probes), 3),
        "mean": mean,
        "std": std,
    }


def _by_class(names: Sequence[str], labels: Iterable[int], kinds: Sequence[str]) -> dict[str, dict[str, int]]:
    """The counts of each class's clips by kind; classes whose clips are all packed are left out, empty ones are not."""
    counts = [Counter[str]() for _ in names]
    for label, kind in zip(labels, kinds, strict=True):
        counts[label][kind] += 1
    return {
        name: {"listed": count.total(), **dict(sorted(count.items()))}
        for name, count in zip(names, counts, strict=True)
        if count["packed"] < count.total() or not count
    }
