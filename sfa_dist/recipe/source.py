"""Puts the sources of a recipe together: its file, the files under `_base_`, `--set` overrides and `${VAR}`s.

Everything stays a tree of `Node`s, so that each value keeps the source it came from. This module knows no schema:
`schema.py` types the tree.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfa_dist.boundary.secret import is_secret_variable, remember
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.shipped import shipped_recipe
from sfa_dist.recipe.strict_yaml import Node, parse, plain

MAX_BYTES = 1 << 20
MAX_FILES = 100  # Of one recipe; a file that is a base twice counts twice.
MAX_SET_KEYS = 32  # In one `--set`: a.b.c=1 has three.
BASE = "_base_"
DELETE = "_delete_"
NAME = "name"  # It is not inherited.

# `$${` is a literal `${`; a `${` that opens neither form is refused instead of passed on.
_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(:-(?P<default>[^${}]*))?\}|\$\{")
# NUL, which ends a path, and lone surrogates, which cannot be written.
_UNUSABLE = re.compile(r"[\x00\ud800-\udfff]")


def read_source(path: Path, overrides: Sequence[str], environ: Mapping[str, str]) -> Node:
    """The whole tree of a recipe: bases merged, overrides set, variables filled in.

    It still holds the `_delete_` marks, which stage defaults obey as well: `drop_marks` takes them out.
    Raises RecipeError, with the source, for whatever is wrong before types are known.
    """
    root = _Files(environ).read(path)
    for override in overrides:
        root = _override(root, override)
    return _expand(root, environ)


# ---------------------------------------------------------------------------------------------------- merging


def merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: blocks are merged key by key, everything else (lists too) is replaced.

    A block with `_delete_: true` drops what the base had there. The mark stays for merges still to come.
    """
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    mark = over.value.get(DELETE)
    if mark is not None and mark.value is True:
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return replace(over, value=merged)


def drop_marks(node: Node) -> Node:
    """The tree without `_delete_`. Raises RecipeError where one is not a boolean."""
    if not isinstance(node.value, dict):
        return node
    mark = node.value.get(DELETE)
    if mark is not None and not isinstance(mark.value, bool):
        raise RecipeError(f"{mark.source}: {mark.key}: expected true or false, got {plain(mark)!r}")
    return replace(node, value={key: drop_marks(child) for key, child in node.value.items() if key != DELETE})


def leaves(node: Node) -> list[Node]:
    """All values below a node that are not blocks."""
    if not isinstance(node.value, dict):
        return [node]
    return [leaf for child in node.value.values() for leaf in leaves(child)]


def texts(node: Node) -> Iterator[str]:
    """All text below a node, that of lists too."""
    if isinstance(node.value, str):
        yield node.value
    elif isinstance(node.value, dict | list):
        for child in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from texts(child)


def find(node: Node, path: Sequence[Any]) -> tuple[Node, int]:
    """The deepest node on `path` (keys and list indices), and how many steps of the path lead to it."""
    for step, key in enumerate(path):
        children: Mapping[Any, Node] = {}
        if isinstance(node.value, dict):
            children = node.value
        elif isinstance(node.value, list):
            children = dict(enumerate(node.value))
        if key not in children:
            return node, step
        node = children[key]
    return node, len(path)


# ---------------------------------------------------------------------------------------------------- files


class _Files:
    """Reads files on top of their bases, and counts them: bases that each name one twice double at each level."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._count = 0

    def read(self, path: Path, chain: tuple[Path, ...] = (), named_at: str = "") -> Node:
        """One file. `chain` holds the files that led to it, `named_at` the source of the `_base_` that names it."""
        if path.resolve() in [earlier.resolve() for earlier in chain]:
            names = " -> ".join(str(file) for file in (*chain, path))
            raise RecipeError(f"{named_at}: {BASE} leads back to the same file: {names}")
        self._count += 1
        if self._count > MAX_FILES:
            raise RecipeError(f"{named_at}: {BASE}: the recipe is put together from more than {MAX_FILES} files")
        root = parse(_read_text(path, named_at), source=lambda line: f"{path}:{line}")
        if root.value is None:
            root = Node({}, str(path))
        if not isinstance(root.value, dict):
            raise RecipeError(f"{root.source}: a recipe is a block of `key: value` lines")
        own = replace(root, source=str(path), value={key: child for key, child in root.value.items() if key != BASE})
        merged = Node({}, str(path))
        for base in _bases(root.value.get(BASE), self._environ):
            base_path = _base_path(path.parent, str(base.value))
            merged = merge(merged, _unnamed(self.read(base_path, (*chain, path), named_at=base.source)))
        return merge(merged, own)


def _base_path(folder: Path, name: str) -> Path:
    """A base beside the file that names it, or one that comes with the package."""
    path = Path(os.path.normpath(folder / name))
    return path if path.exists() else shipped_recipe(Path(name)) or path


def _unnamed(root: Node) -> Node:
    """A base without its name: a run directory is named after its own recipe, or two recipes would share one."""
    assert isinstance(root.value, dict)
    return replace(root, value={key: child for key, child in root.value.items() if key != NAME})


def _bases(entry: Node | None, environ: Mapping[str, str]) -> list[Node]:
    if entry is None:
        return []
    names = entry.value if isinstance(entry.value, list) else [entry]
    for name in names:
        if not isinstance(name.value, str):
            raise RecipeError(f"{name.source}: {BASE}: expected a path or a list of paths, got {plain(name)!r}")
    return [_expand(name, environ) for name in names]


def _read_text(path: Path, named_at: str) -> str:
    where = f"{named_at}: {BASE}: " if named_at else ""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # Opening a pipe waits for its other end.
            raise RecipeError(f"{where}{path}: not a regular file but a pipe or a device")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{where}{path}: no such recipe{_neighbours(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise RecipeError(f"{where}{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}:1: larger than 1 MiB: this is not a recipe")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text") from None


def _neighbours(path: Path) -> str:
    try:
        names = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    except OSError:
        return f"; there is no folder {path.parent}"
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; {path.parent} holds {', '.join(names[:10]) or 'no recipes'}"


# ---------------------------------------------------------------------------------------------------- overrides


def _override(root: Node, text: str) -> Node:
    """Sets one `key.path=value`. Raises RecipeError where it cannot be read or its path leads through a value."""
    source = f"--set {text}"
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"{source}: expected key.path=value")
    if len(keys) > MAX_SET_KEYS:
        raise RecipeError(f"{source[:200]}...: {len(keys)} keys deep, a recipe has at most {MAX_SET_KEYS}")
    leaf = parse(value, source=lambda line: source, key=".".join(keys), flow_only=True)
    return _assign(root, keys, leaf)


def _assign(node: Node, keys: list[str], leaf: Node) -> Node:
    if not keys:
        return merge(node, leaf)
    if not isinstance(node.value, dict):
        raise RecipeError(f"{leaf.source}: '{node.key}' is {_short(node)} ({node.source}), not a block")
    name = keys[0]
    key = f"{node.key}.{name}" if node.key else name
    child = node.value.get(name) or Node({}, leaf.source, key)
    return replace(node, value={**node.value, name: _assign(child, keys[1:], leaf)})


def _short(node: Node) -> str:
    if node.value is None:
        return "null"
    return "a list" if isinstance(node.value, list) else repr(node.value)


# ---------------------------------------------------------------------------------------------------- variables


def _expand(node: Node, environ: Mapping[str, str]) -> Node:
    """Fills in `${VAR}` and `${VAR:-default}` in all text below.

    Raises RecipeError for an undefined variable, and for text that no file, name or message can hold.
    """
    if isinstance(node.value, dict):
        for key in node.value:
            _require_usable(key, node)
        return replace(node, value={key: _expand(child, environ) for key, child in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[_expand(child, environ) for child in node.value])
    if not isinstance(node.value, str):
        return node

    def fill(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match[0] == "$${":
            return "${"
        if name is None:
            raise RecipeError(
                f"{node.source}: {node.key}: '${{' opens no variable: write ${{NAME}}, ${{NAME:-default}}, "
                "or $${ for the two characters"
            )
        if default is not None:
            return environ.get(name) or default
        if name not in environ:
            raise RecipeError(
                f"{node.source}: {node.key}: the environment variable {name} is not set; "
                f"set it or write ${{{name}:-default}}"
            )
        return environ[name]

    for match in _VARIABLE.finditer(node.value):
        if match["name"] and is_secret_variable(match["name"]):
            remember(environ.get(match["name"], ""))
    text = _VARIABLE.sub(fill, node.value)
    _require_usable(text, node)
    return replace(node, value=text)


def _require_usable(text: str, node: Node) -> None:
    if found := _UNUSABLE.search(text):
        key = f"{node.key}: " if node.key else ""
        raise RecipeError(f"{node.source}: {key}the character {found[0]!a} is not allowed")


def escape_variables(value: Any) -> Any:
    """The inverse of filling in variables: text that is read back unchanged."""
    if isinstance(value, dict):
        return {key: escape_variables(child) for key, child in value.items()}
    if isinstance(value, list):
        return [escape_variables(child) for child in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
