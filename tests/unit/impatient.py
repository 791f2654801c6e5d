"""Remote shards without the pauses and the caches of a user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sfa_dist.data.shards import remote, remote_index, retry
from sfa_dist.recipe.blocks import RemoteBlock

HTTP = RemoteBlock(allow=["http"], retries=0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote_index, "USER_CACHE", str(tmp_path / "user cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    remote._file_system.cache_clear()
    yield
    remote._file_system.cache_clear()
