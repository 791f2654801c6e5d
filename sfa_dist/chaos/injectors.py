"""The faults as small functions: on shards, on checkpoints, on the disk. Signals are sent by processes.Job.

Each does one thing, to copies that belong to a trial, and tells in a few words what it did.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sfa_dist.checkpoint import file_sha256
from sfa_dist.data.shards.index_file import INDEX_NAME, read_index
from sfa_dist.data.shards.shard_walk import TarMember

MANIFEST = "MANIFEST.json"
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REC_PRIVATE = 0x4000 | 0x40000

# ---------------------------------------------------------------------------------------------------- any file


def truncate(path: Path, chance: random.Random) -> str:
    """Cuts a file at a random place in it."""
    size = path.stat().st_size
    left = chance.randrange(size // 4, max(size // 4 + 1, size * 3 // 4))
    os.truncate(path, left)
    return f"{path.name} cut from {size} to {left} bytes"


def flip_bit(path: Path, chance: random.Random, low: int = 0, high: int | None = None) -> str:
    """Turns one random bit between two offsets."""
    data = bytearray(path.read_bytes())
    place, bit = chance.randrange(low, len(data) if high is None else high), chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {path.name} turned"


def delete(path: Path, chance: random.Random) -> str:
    """Removes a file."""
    del chance
    path.unlink()
    return f"{path.name} deleted"


def swap(one: Path, other: Path) -> str:
    """Exchanges the contents of two files under their names."""
    aside = one.with_name(one.name + ".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"contents of {one.parent.name}/{one.name} and {other.parent.name}/{other.name} exchanged"


# ---------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint, by name."""
    return sorted(path for path in checkpoint.iterdir() if path.is_file())


def swap_with_older(newest: Path, older: Path, chance: random.Random) -> str:
    """One file of the newest checkpoint takes the place of the same file of an older one, and the other way round."""
    name = chance.choice(
        [p.name for p in checkpoint_files(newest) if p.name != MANIFEST and (older / p.name).is_file()]
    )
    return swap(newest / name, older / name)


def pickle_that_touches(canary: Path) -> bytes:
    """A pickle that makes a file when anything loads it: what a hostile checkpoint or shard member would do.

    Written out by hand (protocol 0: the global `posix.system`, a string, call), since nothing here may import pickle's
    functions.
    """
    return b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."


def replace_by_pickle(checkpoint: Path, canary: Path) -> str:
    """The tensors of a checkpoint become a hostile pickle, and its manifest vouches for it."""
    model = checkpoint / "model.safetensors"
    model.write_bytes(pickle_that_touches(canary))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][model.name] |= {"size": model.stat().st_size, "sha256": file_sha256(model)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    return f"{model.name} replaced by a hostile pickle, {MANIFEST} made to match"


# ---------------------------------------------------------------------------------------------------- shards


def damage_clip(shard: Path, chance: random.Random) -> str:
    """Turns a bit in the payload of one clip of an indexed shard, and gives the clip's name `shard/key`."""
    sample = chance.choice([s for s in read_index(shard.parent)[shard.name].samples if s.error is None])
    _damage(shard, sample.members, chance)
    return f"{shard.name}/{sample.key}"


def damage_all_clips(shard: Path, chance: random.Random) -> int:
    """The same in every clip of the shard; gives how many there are."""
    samples = [s for s in read_index(shard.parent)[shard.name].samples if s.error is None]
    for sample in samples:
        _damage(shard, sample.members, chance)
    return len(samples)


def _damage(shard: Path, members: dict[str, TarMember], chance: random.Random) -> None:
    offset, size, _ = next(place for suffix, place in members.items() if suffix not in ("json", "cls", "txt"))
    flip_bit(shard, chance, offset, offset + size)


def forget_index(folder: Path) -> None:
    """Removes a folder's index, so that its shards are taken as new."""
    (folder / INDEX_NAME).unlink(missing_ok=True)


def drop_last_sample(shard: Path) -> str:
    """Another valid shard in the place of this one: the same without its last sample."""
    beside = shard.with_name(shard.name + ".new")
    with tarfile.open(shard) as old, tarfile.open(beside, "w") as new:
        members = old.getmembers()
        last = members[-1].name.split(".")[0]
        for member in members:
            if member.name.split(".")[0] != last:
                new.addfile(member, old.extractfile(member))
    beside.replace(shard)
    return f"{shard.name} replaced by a valid shard without {last}"


def add_hostile_members(shard: Path, canary: Path) -> str:
    """To the last sample of a shard come members with suffixes that WebDataset's own decoders unpickle."""
    beside = shard.with_name(shard.name + ".new")
    payload = beside.with_name("payload")
    payload.write_bytes(pickle_that_touches(canary))
    suffixes = ("pyd", "pkl", "pickle", "pth")
    with tarfile.open(shard) as old, tarfile.open(beside, "w") as new:
        members = old.getmembers()
        for member in members:
            new.addfile(member, old.extractfile(member))
        for suffix in suffixes:
            new.add(payload, f"{members[-1].name.split('.')[0]}.{suffix}")
    payload.unlink()
    beside.replace(shard)
    return f"{shard.name} got hostile {', '.join(suffixes)} members"


# ---------------------------------------------------------------------------------------------------- the disk


def small_disk(folder: Path, size: int, keep: Path) -> Callable[[], Callable[[], object] | None]:
    """For Job's `prepare`: `folder` becomes a tmpfs of `size` bytes that only this process sees.

    At the process's end its contents are copied to `keep`; with the process the disk is gone.
    """
    return partial(_enter_small_disk, str(folder), size, str(keep))


def can_mount() -> bool:
    """Whether a process of this user may have mounts of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            _private_mounts()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _enter_small_disk(folder: str, size: int, keep: str) -> Callable[[], object]:
    _private_mounts()
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode())
    return lambda: shutil.copytree(folder, keep)


def _private_mounts() -> None:
    """Raises OSError where neither root nor a user namespace allows it."""
    user, group = os.getuid(), os.getgid()
    try:
        _call("unshare", _CLONE_NEWNS)
    except PermissionError:
        _call("unshare", _CLONE_NEWNS | _CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, _MS_REC_PRIVATE, None)


def _call(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
