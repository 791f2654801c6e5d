"""Final weights and other files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from sfa_dist import checkpoint as ckpt
from sfa_dist.checkpoint import files
from sfa_dist.errors import CheckpointError

FULL = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_final_weights_on_a_full_disk_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "stage1" / "weights.safetensors"
    ckpt.write_weights(path, {"a": torch.ones(2)}, {"stage": "old"})

    def save_file(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(files, "save_file", save_file)
    with pytest.raises(CheckpointError, match=r"no space left, needed 0\.0 MiB, have"):
        ckpt.write_weights(path, {"a": torch.zeros(2)}, {"stage": "new"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"stage": "old"}


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """The next stage knows a weights file by its hash."""
    metadata = {f"key {n}": json.dumps(["\u00e4", '"', "\n", "\\", n]) for n in range(8)}
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    files = [tmp_path / f"{n}.safetensors" for n in range(6)]
    for file in files:
        ckpt.write_weights(file, tensors, metadata)
    assert len({ckpt.file_sha256(file) for file in files}) == 1
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    ckpt.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        ckpt.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
