"""What several files of this folder write."""

from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_files import MINIMAL


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a recipe and works in its folder, so that places read `a.yaml:3`. Gives MINIMAL a last line of data."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "a.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        needs_data = text.startswith(MINIMAL[:6]) and "\ndata:" not in text
        path.write_text(text + "data: {}\n" * needs_data, encoding="utf-8")
        return path

    return write
