"""Checkpoints: safetensors and JSON, made complete by one rename, readable by any number of ranks.

    <stage>/checkpoints/step-00000120/
      model.safetensors                     fp32 master value of every trained parameter, by name
      optimizer-00000-of-00002.safetensors  the moments that each rank owns: `<parameter>/<start>/<moment>`
      state.json                            step, epoch, counters, hashes of trunk and recipe
      MANIFEST.json                         size and sha256 of the files above; written last

The frozen trunk is not in it: `state.json` carries its hash. A directory ending in `.tmp` is a save that did not
finish; it is never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfa_dist.errors import CheckpointError
from sfa_dist.parallel.engine import Engine, Fragment
from sfa_dist.parallel.runtime import Runtime

FORMAT = 1
STEP_NAME = re.compile(r"^step-\d{8}(\.old)?$")
MAIN_FILES = ("model.safetensors", "state.json")


def save_checkpoint(root: Path, step: int, engine: Engine, state: dict[str, Any], runtime: Runtime, keep: int) -> Path:
    """Writes step-<step> under `root` and drops all but the newest `keep`. Collective.

    Raises CheckpointError on every rank when any rank could not write; what was there before stays.
    """
    final, temporary, replaced = (root / f"step-{step:08d}{suffix}" for suffix in ("", ".tmp", ".old"))
    parameters = engine.full_parameters()

    def prepare() -> None:
        for remains in root.glob("step-*.tmp"):
            shutil.rmtree(remains)
        temporary.mkdir(parents=True)

    def write_own() -> None:
        moments = {
            f"{f.name}/{f.start}/{key}": tensor.detach().cpu().contiguous()
            for f in (engine.fragments() if runtime.is_main or not engine.replicated else ())
            for key, tensor in f.tensors.items()
            if key != "master"
        }
        write_tensors(temporary / _optimizer_file(runtime.rank, runtime.world_size), moments)
        if runtime.is_main:
            write_tensors(temporary / "model.safetensors", parameters)
            write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state})

    def commit() -> None:
        names = [_optimizer_file(rank, runtime.world_size) for rank in range(runtime.world_size)]
        files = {name: _describe(temporary / name) for name in (*MAIN_FILES, *names)}
        write_json(temporary / "MANIFEST.json", {"format": FORMAT, "files": files})
        _sync_directory(temporary)
        if final.exists():  # Written again, at an epoch's end or after a resume: one of the two is there at any time.
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        _sync_directory(root)
        # Later steps are of a course that was left by going back: they must neither be resumed nor push out others.
        stay = [path for path in list_checkpoints(root) if path.name <= final.name][-keep:]
        for path in set(list_checkpoints(root)) - set(stay):
            shutil.rmtree(path)

    _together(runtime, prepare if runtime.is_main else None, f"prepare {temporary}")
    _together(runtime, write_own, f"write {temporary}")
    _together(runtime, commit if runtime.is_main else None, f"commit {final}")
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, intact or not, oldest first; what one replaced (`.old`, until it is removed) before it."""
    if not root.is_dir():
        return []
    found = (path for path in root.iterdir() if STEP_NAME.match(path.name))
    return sorted(found, key=lambda path: (path.stem, path.suffix == ""))


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match its manifest, and a line for each newer one that does not.

    Raises CheckpointError when there are checkpoints and none is valid: starting over in silence would lose the run.
    """
    faults: list[str] = []
    for path in reversed(list_checkpoints(root)):
        fault = verify(path)
        if fault is None:
            return path, faults
        faults.append(fault)
    if faults:
        raise CheckpointError(f"no checkpoint under {root} is intact ({'; '.join(faults)}); remove them to start over")
    return None, []


def verify(path: Path) -> str | None:
    """None when each file has the size and sha256 of the manifest, else what is wrong."""
    try:
        files = json.loads((path / "MANIFEST.json").read_text())["files"]
        if not files.keys() >= set(MAIN_FILES):
            return f"{path.name}: MANIFEST.json names too few files"
        for name, expected in files.items():
            if not (path / name).is_file():
                return f"{path.name}: {name} is missing"
            if _describe(path / name) != expected:
                return f"{path.name}: {name} does not match its sha256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path.name}: MANIFEST.json cannot be read ({error})"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises CheckpointError when it cannot be read."""
    try:
        return dict(json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}/state.json: {error}") from error


def load_engine(path: Path, engine: Engine, step: int) -> None:
    """Moments of the pieces that this rank owns, from whatever pieces they were saved in. Masters come by
    `read_parameters`
    before the engine is made."""
    engine.make_optimizer_state(step)
    with_readers = _open_all(sorted(path.glob("optimizer-*.safetensors")))
    pieces = _piece_table(with_readers)
    with safe_open(path / "model.safetensors", framework="pt") as model:
        for fragment in engine.fragments():
            fragment.tensors["master"].copy_(model.get_tensor(fragment.name).view(-1)[_span(fragment)])
            for key in fragment.tensors.keys() - {"master"}:
                _fill(fragment, key, pieces, path)


def read_parameters(path: Path) -> dict[str, Tensor]:
    """fp32 parameters of a checkpoint by name."""
    try:
        with safe_open(path / "model.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}/model.safetensors: {error}") from error


def _span(fragment: Fragment) -> slice:
    return slice(fragment.start, fragment.start + fragment.numel)


def _open_all(files: Iterable[Path]) -> Iterator[Any]:
    for file in files:
        yield safe_open(file, framework="pt")


def _piece_table(readers: Iterable[Any]) -> dict[tuple[str, str], list[tuple[int, Any, str]]]:
    table: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
    for reader in readers:
        for key in reader.keys():  # noqa: SIM118 (no dictionary)
            name, start, moment = key.rsplit("/", 2)
            table.setdefault((name, moment), []).append((int(start), reader, key))
    return table


def _fill(
    fragment: Fragment, moment: str, pieces: dict[tuple[str, str], list[tuple[int, Any, str]]], path: Path
) -> None:
    """Copies the overlap of each saved piece with this fragment; together they must cover it."""
    covered, end = 0, fragment.start + fragment.numel
    for start, reader, key in pieces.get((fragment.name, moment), []):
        length = reader.get_slice(key).get_shape()[0]
        low, high = max(start, fragment.start), min(start + length, end)
        if low < high:
            target = fragment.tensors[moment][low - fragment.start : high - fragment.start]
            target.copy_(reader.get_slice(key)[low - start : high - start])
            covered += high - low
    if covered != fragment.numel:
        raise CheckpointError(f"{path} lacks {moment} of {fragment.name}: {covered} of {fragment.numel} elements")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, flushed to disk. Equal tensors and metadata give equal bytes."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    with path.open("r+b") as file:
        if metadata:
            _sort_metadata(file)
        file.flush()
        os.fsync(file.fileno())


def _sort_metadata(file: BinaryIO) -> None:
    """safetensors writes metadata in a random order; a file's hash is what the next stage knows it by."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > length:
        raise AssertionError("the same header in another order has grown")
    file.seek(8)
    file.write(text.ljust(length))


def write_json(path: Path, value: Any) -> None:
    """A JSON file, complete or not there: written beside, flushed, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A stage's final weights, by write and rename. Raises CheckpointError when the disk refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, tensors, metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_explain(error, f"write {path}", path)) from error


def _optimizer_file(rank: int, world_size: int) -> str:
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(runtime: Runtime, work: Any, what: str) -> None:
    """Runs `work` on the ranks that have some; a failure on one is a CheckpointError on all."""
    fault = None
    try:
        if work is not None:
            work()
    except (OSError, SafetensorError) as error:
        fault = f"rank {runtime.rank} on {runtime.host} could not {_explain(error, what, Path(what.split(' ', 1)[1]))}"
    faults = [f for f in runtime.gather(fault) if f is not None]
    if faults:
        raise runtime.for_all(CheckpointError(f"{faults[0]}; older checkpoints are untouched"))


def _explain(error: BaseException, what: str, path: Path) -> str:
    """The operating system's reason in words; safetensors hides the number of a full disk in its text."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if not full:
        return f"{what}: {error}"
    parent = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    return f"{what}: no space left on the device ({shutil.disk_usage(parent).free / 2**20:.0f} MiB free at {parent})"
