"""Faults that no file and no signal from outside makes, put into the process of a forked train.py."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import faulty_decoder

from sfa_dist.chaos import injectors
from sfa_dist.run.report import clips

VARIABLE = "TEST_FAULTS"  # Separated by semicolons.
DISK_BYTES = 4 << 20


def install(fault: str) -> None:
    """`decoder ACTION@CRC32` (faulty_decoder.py); `report ACTION`: the same for each of the report's pictures;
    `nan_loss N`: the first N losses are not finite; `full_disk FOLDER` or `full_disk FOLDER after MODULE.FUNCTION`: the
    folder is a small disk of this process's own, with what lies in FOLDER.state, and full at once or once the function
    has returned; `bug MODULE.FUNCTION`: the function has one."""
    kind, _, rest = fault.partition(" ")
    if kind == "decoder":
        faulty_decoder.install(rest)
    elif kind == "report":
        _break_pictures(rest)
    elif kind == "full_disk":
        _fill_disk(*rest.split(" after "))
    elif kind == "bug":
        _break(rest)
    else:
        assert kind == "nan_loss", fault
        _spoil_losses(int(rest))


def _break_pictures(action: str) -> None:
    assert hasattr(clips, "decoder_of"), "a name that moved would leave the real decoder, without a word"
    clips.decoder_of = lambda data: faulty_decoder.faulty_decoder(action)


def _fill_disk(folder: str, function: str = "") -> None:
    injectors.small_disk(Path(folder), DISK_BYTES, Path(folder).with_suffix(".kept"))()
    if (state := Path(folder).with_suffix(".state")).is_dir():
        shutil.copytree(state, folder, dirs_exist_ok=True)
    if not function:
        fill(Path(folder))
        return
    module, _, name = function.rpartition(".")
    place = importlib.import_module(f"sfa_dist.{module}")
    whole = getattr(place, name)

    def and_fill(*arguments: Any, **words: Any) -> Any:
        value = whole(*arguments, **words)
        fill(Path(folder))
        return value

    setattr(place, name, and_fill)


def _break(function: str) -> None:
    def broken(*arguments: Any, **words: Any) -> Any:
        raise AttributeError("a bug of the program")

    module, _, name = function.rpartition(".")
    setattr(importlib.import_module(f"sfa_dist.{module}"), name, broken)


def fill(folder: Path) -> None:
    """Takes all the room that a disk has."""
    with contextlib.suppress(OSError), (folder / "somebody else's").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def _spoil_losses(number: int) -> None:
    from sfa_dist.training import trainer

    whole, calls = trainer.weighted_loss_sum, count()
    trainer.weighted_loss_sum = lambda *a: whole(*a) * (float("nan") if next(calls) < number else 1.0)
