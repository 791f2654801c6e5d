"""The faults as small functions: on files, checkpoints, shards and the disk. `processes.Job` sends signals.

Each does one thing, to copies that belong to a trial, and most return a few words on what they did.
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
    """Cuts a file at a random offset."""
    size = path.stat().st_size
    left = chance.randrange(size // 4, max(size // 4 + 1, size * 3 // 4))
    os.truncate(path, left)
    return f"{path.name} cut from {size} to {left} bytes"


def flip_bit(path: Path, chance: random.Random, low: int = 0, high: int | None = None) -> str:
    """Flips one random bit between two offsets, in bytes (default: anywhere in the file)."""
    data = bytearray(path.read_bytes())
    offset, bit = chance.randrange(low, len(data) if high is None else high), chance.randrange(8)
    data[offset] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {offset} of {path.name} flipped"


def delete(path: Path, chance: random.Random) -> str:
    """Removes a file."""
    del chance
    path.unlink()
    return f"{path.name} deleted"


def swap(one: Path, other: Path) -> str:
    """Exchanges the contents of two files."""
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
    """Exchanges a random file of the newest checkpoint with the file of the same name in an older one."""
    name = chance.choice(
        [p.name for p in checkpoint_files(newest) if p.name != MANIFEST and (older / p.name).is_file()]
    )
    return swap(newest / name, older / name)


def pickle_that_touches(canary: Path) -> bytes:
    """A pickle that makes the file `canary` when anything loads it, as a hostile checkpoint or shard member could.

    It is written by hand (protocol 0: the global `posix.system`, a string, call), since nothing here may import
    pickle's functions.
    """
    return b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."


def replace_by_pickle(checkpoint: Path, canary: Path) -> str:
    """Replaces the tensors of a checkpoint by a hostile pickle, and makes the manifest match."""
    model = checkpoint / "model.safetensors"
    model.write_bytes(pickle_that_touches(canary))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][model.name] |= {"size": model.stat().st_size, "sha256": file_sha256(model)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    return f"{model.name} replaced by a hostile pickle, {MANIFEST} made to match"


# ---------------------------------------------------------------------------------------------------- shards


def damage_clip(shard: Path, chance: random.Random) -> str:
    """Flips a bit in the payload of one clip of an indexed shard; returns the clip's name `shard/key`."""
    sample = chance.choice([s for s in read_index(shard.parent)[shard.name].samples if s.error is None])
    _damage(shard, sample.members, chance)
    return f"{shard.name}/{sample.key}"


def damage_all_clips(shard: Path, chance: random.Random) -> int:
    """Flips a bit in every clip of an indexed shard; returns the number of clips."""
    samples = [s for s in read_index(shard.parent)[shard.name].samples if s.error is None]
    for sample in samples:
        _damage(shard, sample.members, chance)
    return len(samples)


def _damage(shard: Path, members: dict[str, TarMember], chance: random.Random) -> None:
    offset, size, _ = next(member for suffix, member in members.items() if suffix not in ("json", "cls", "txt"))
    flip_bit(shard, chance, offset, offset + size)


def forget_index(folder: Path) -> None:
    """Removes a folder's index, so that its shards count as new."""
    (folder / INDEX_NAME).unlink(missing_ok=True)


def drop_last_sample(shard: Path) -> str:
    """Replaces a shard by another valid one: the same without its last sample."""
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
    """Adds members to the last sample of a shard, with suffixes that WebDataset's own decoders unpickle."""
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
    """A `prepare` of Job: mounts a tmpfs of `size` bytes on `folder`, which only this process sees.

    When the process ends, the contents are copied to `keep`; the disk itself ends with the process.
    """
    return partial(_enter_small_disk, str(folder), size, str(keep))


def can_mount() -> bool:
    """Whether processes of this user may make mounts of their own."""
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
    """Gives this process mounts of its own. Raises OSError if neither root nor a user namespace allows it."""
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
