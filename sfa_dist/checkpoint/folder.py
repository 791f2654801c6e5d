"""The checkpoints in a folder: listing, verifying, committing and purging them.

A checkpoint is committed when its folder has its final name. It is intact when each file has the size and sha256 that
the manifest records. File times are never used: clocks differ between nodes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import explain, file_sha256, parse_json, read_plain, write_json
from sfa_dist.checkpoint.failpoints import NO_FAILPOINTS, Failpoints
from sfa_dist.checkpoint.files import FAILING, patiently, sync_directory
from sfa_dist.checkpoint.layout import Layout, TensorReader
from sfa_dist.checkpoint.writing import MODEL, STATE, Described, Written, check_model
from sfa_dist.errors import CheckpointError
from sfa_dist.parallel.runtime import Runtime

FORMAT = 2
MANIFEST = "MANIFEST.json"
STEP_NAME = re.compile(r"step-\d{8}(\.old)?")
OPTIMIZER_NAME = re.compile(r"optimizer-\d{5}-of-\d{5}\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_JSON = 512 * 2**20  # Bytes; a list of millions of bad clips is smaller.


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, intact or not, oldest first; a replaced one (`.old`) precedes its successor."""
    if not root.is_dir():
        return []
    found = (path for path in root.iterdir() if STEP_NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: (path.stem, path.suffix == ""))


def newest_valid(
    root: Path, runtime: Runtime | None = None, failpoints: Failpoints = NO_FAILPOINTS
) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint (None without any), and a line for each newer one that is damaged.

    With a runtime it is collective: rank 0 lists the checkpoints, and the ranks share the hashing.

    Raises CheckpointError if there are checkpoints but none is intact (to start over silently would lose the run), and
    if the disk fails for longer than `files.patiently` waits.
    """
    found = list_checkpoints(root)
    candidates: list[Path] = found if runtime is None else runtime.broadcast(found)
    faults: list[str] = []
    for path in reversed(candidates):
        fault = verify(path, runtime, failpoints)
        if fault is None:
            return path, faults
        faults.append(fault)
    if faults:
        error = CheckpointError(
            f"no checkpoint under {root} is intact ({'; '.join(faults)}); remove them to start over"
        )
        raise error if runtime is None else runtime.for_all(error)
    return None, []


def verify(path: Path, runtime: Runtime | None = None, failpoints: Failpoints = NO_FAILPOINTS) -> str | None:
    """None if a checkpoint is intact, else a message that says what is wrong.

    With a runtime it is collective: the ranks share the hashing. Raises CheckpointError if the disk fails.
    """
    if runtime is None:
        files, fault = _manifest(path)
        return fault or next(filter(None, (_fault(path / name, files[name], failpoints) for name in files)), None)
    files, fault = runtime.on_main(lambda: _manifest(path))
    if fault is None:
        largest_first = sorted(files, key=lambda name: (-files[name]["size"], name))
        mine = largest_first[runtime.rank :: runtime.world_size]
        faults = runtime.everywhere(lambda: [_fault(path / name, files[name], failpoints) for name in mine])
        fault = next((fault for own in faults for fault in own if fault), None)
    return fault


def _manifest(path: Path) -> tuple[dict[str, Described], str | None]:
    """(the manifest's entry of each file, what is wrong with the manifest or the files that are there, or None).

    The files are not read. Raises CheckpointError if the disk fails.
    """

    def look() -> tuple[dict[str, Described], str | None]:
        files = read_manifest(path)
        odd = [name for name in files if (path / name).is_symlink() or not (path / name).is_file()]
        return files, f"{path.name}: {odd[0]} is missing or not a regular file" if odd else None

    try:
        return patiently(look, FAILING)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FAILING:
            raise CheckpointError(f"cannot read {path / MANIFEST}: {explain(error, path)}") from error
        return {}, f"{path.name}: {MANIFEST} cannot be read ({error})"


def read_manifest(path: Path) -> dict[str, Described]:
    """Size and sha256 of each file of a checkpoint, by file name.

    Raises OSError, and ValueError if it is not a manifest or names a file that does not belong to a checkpoint.
    """
    if path.is_symlink():
        raise ValueError("the folder is a symbolic link")
    value = parse_json(_read_small(path / MANIFEST))
    files = value.get("files") if isinstance(value, dict) else None
    if not isinstance(files, dict):
        raise ValueError("it lists no files")
    if value.get("format") != FORMAT:
        raise ValueError(f"format {value.get('format')!r}, this version reads {FORMAT}")
    if not files.keys() >= {MODEL, STATE}:
        raise ValueError("it names too few files")
    for name, described in files.items():
        if name not in (MODEL, STATE) and not OPTIMIZER_NAME.fullmatch(name):
            raise ValueError(f"it names {name!r}, which is not a file of a checkpoint")
        size, digest = (described.get(key) if isinstance(described, dict) else None for key in ("size", "sha256"))
        if type(size) is not int or not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise ValueError(f"it lacks size or sha256 of {name}")
    return files


def _fault(file: Path, expected: Described, failpoints: Failpoints) -> str | None:
    """What is wrong with one file; None if it is intact. Raises CheckpointError if the disk fails."""

    def check() -> str | None:
        failpoints.reach("load.read")
        if file.stat().st_size != expected["size"] or file_sha256(file) != expected["sha256"]:
            return f"{file.parent.name}: {file.name} does not match its sha256"
        if file.suffix == ".safetensors":
            try:
                TensorReader(file).close()
            except ValueError as error:
                return f"{file.parent.name}: {error}"
            except TypeError:
                return None  # Another dtype: the file is intact, but loading it is refused.
        return None

    try:
        return patiently(check)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {explain(error, file)}") from error


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        state = parse_json(patiently(lambda: _read_small(path / STATE)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path / STATE}: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"cannot read {path / STATE}: it is not a JSON object")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path / STATE} has format {state.get('format')!r}, this version reads {FORMAT}")
    return state


def _read_small(path: Path) -> bytes:
    if path.is_symlink():
        raise ValueError("it is a symbolic link")
    return read_plain(path, MAX_JSON, follow=False)


def clear_remains(root: Path) -> None:
    """Removes what unfinished saves have left behind."""
    for remains in root.glob("step-*.tmp"):
        if remains.is_symlink() or not remains.is_dir():
            remains.unlink()
        else:
            shutil.rmtree(remains)


class CheckpointDir:
    """The checkpoints of one stage, kept by rank 0: the newest `keep` intact ones. Damaged ones do not count."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self._intact: dict[str, dict[str, Described]] = {}  # Manifests of checkpoints already verified, by name.

    def names(self, step: int) -> tuple[Path, Path, Path]:
        """The three paths of a step's checkpoint: final, `.tmp` while written, `.old` while being replaced."""
        final, temporary, replaced = (self.root / f"step-{step:08d}{suffix}" for suffix in ("", ".tmp", ".old"))
        return final, temporary, replaced

    def commit(self, step: int, layout: Layout, written: Sequence[Written], failpoints: Failpoints) -> Path:
        """Turns a save that all ranks have written into a checkpoint, purges old ones, and returns its path.

        A kill at any moment leaves an intact checkpoint: the new one is in place before an old one is removed.
        Raises OSError if the files are not what the ranks wrote or the disk refuses, ValueError as `check_model`.
        """
        final, temporary, replaced = self.names(step)
        files = {name: described for rank in written for name, described in rank.files.items()}
        for name, described in files.items():
            size = patiently((temporary / name).stat).st_size
            if size != described["size"]:
                raise OSError(f"{temporary / name} has {size} bytes, {described['size']} were written")
        files[MODEL] = check_model(temporary / MODEL, layout, [span for rank in written for span in rank.spans])
        state = temporary / STATE
        files[STATE] = {"size": state.stat().st_size, "sha256": file_sha256(state)}
        write_json(temporary / MANIFEST, {"format": FORMAT, "files": files})
        sync_directory(temporary)
        failpoints.reach("save.before_commit", step=step)
        if final.exists():  # Saved again at an epoch's end or after a resume: at any time one of the two exists.
            if replaced.exists():
                shutil.rmtree(replaced)
            final.rename(replaced)
            failpoints.reach("save.between_renames", step=step)
        temporary.rename(final)
        sync_directory(self.root)
        failpoints.reach("save.after_rename", step=step)
        self._intact[final.name] = files
        self._purge(final)
        failpoints.reach("save.after_purge", step=step)
        return final

    def _purge(self, newest: Path) -> None:
        """Removes old checkpoints, and those of later steps than `newest`.

        The run went back before the later ones, so they must neither be resumed nor count among the kept ones.
        """
        stay: list[Path] = []
        for path in reversed([path for path in list_checkpoints(self.root) if path.name <= newest.name]):
            if len(stay) < self.keep and self._is_intact(path):
                stay.append(path)
        for path in set(list_checkpoints(self.root)) - set(stay):
            self._intact.pop(path.name, None)
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)

    def _is_intact(self, path: Path) -> bool:
        """Whether a checkpoint is intact. It is hashed once per process; later calls compare manifest and sizes."""
        files, fault = _manifest(path)
        if fault is None and self._intact.get(path.name) == files:
            return all((path / name).stat().st_size == described["size"] for name, described in files.items())
        if fault is None and verify(path) is None:
            self._intact[path.name] = files
            return True
        return False
