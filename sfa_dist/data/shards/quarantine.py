"""Clips whose decoding crashed a process, listed in the run directory: from the next start on they count as bad.

One JSON object per line: {"shard", "key", "reason"}. A crash cannot be caught like an error of the decoder, so a
surviving process records the clip, and later starts skip it. To try a clip again, remove its line or the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from sfa_dist.boundary.disk import explain, parse_object, read_plain
from sfa_dist.boundary.secret import without_secrets
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.shards.shard_names import shard_name
from sfa_dist.errors import CheckpointError

Entries = dict[tuple[str, str], str]  # (shard's file name, key) -> reason.


def add_to_quarantine(path: Path, index: SampleIndex, sample: int, reason: str) -> None:
    """Appends a sample in one write, so that lines of several ranks do not mix. Raises CheckpointError."""
    shard = shard_name(index.shards[index.shard[sample]])
    entry = {"shard": shard, "key": index.keys[sample], "reason": without_secrets(reason)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(entry).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = explain(error, path)
        raise CheckpointError(
            f"cannot add the clip {entry['shard']}/{entry['key']} to the quarantine {path}: {reason}"
        ) from error


def read_quarantine(path: Path) -> Entries:
    """The entries of a file; empty if there is no file. Raises CheckpointError for a line that cannot be read."""
    entries: Entries = {}
    try:
        lines = read_plain(path).split(b"\n")
    except FileNotFoundError:
        return entries
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({explain(error, path)}); remove it") from error
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                entry = parse_object(line, shard=str, key=str, reason=str)
                entries[entry["shard"], entry["key"]] = entry["reason"]
        except ValueError as error:
            raise CheckpointError(f"{path}:{number} cannot be read ({error}); remove the line") from error
    return entries


def without_quarantined(index: SampleIndex, entries: Entries) -> SampleIndex:
    """The same index with the samples of `entries` marked as bad. Its sha256, a hash of the data, does not change."""
    names = {shard for shard, _ in entries}
    errors = dict(index.errors)
    for number, path in enumerate(index.shards):
        if (name := shard_name(path)) in names:
            for sample in np.flatnonzero(index.shard == number).tolist():
                if reason := entries.get((name, index.keys[sample])):
                    errors[sample] = f"quarantined: {reason}"
    return dataclasses.replace(index, errors=errors)
