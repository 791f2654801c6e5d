"""Malformed checkpoints."""

from __future__ import annotations

import pytest
from checkpoint_samples import Save
from fuzzing import amounts, fuzz

from sfa_dist import checkpoint as ckpt
from sfa_dist.errors import CheckpointError, RecipeError


@amounts
@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "model.safetensors"])
def test_checkpoints(name: str, inputs: int, save: Save) -> None:
    """A damaged one is never the newest valid one; read without a check, it is an error or as large as it says."""
    path = save(5)
    file = path / name
    whole = file.read_bytes()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        found, _ = ckpt.newest_valid(path.parent)
        if name != "MANIFEST.json":
            assert (found == path) == (data == whole), "damage that is not noticed"
        if name == "state.json":
            assert isinstance(ckpt.read_state(path), dict)
        if name == "model.safetensors":
            ckpt.read_parameters(path)

    fuzz(f"checkpoints: {name}", [whole], read, (CheckpointError, RecipeError), inputs=inputs)
