"""Strict YAML: text to values that know their source, and values back to text.

YAML is read through PyYAML's safe composer and never constructed: tags, anchors, aliases, duplicate keys, keys that are
not text and several documents are refused. Scalars follow YAML 1.2: `1e-3` and `.5` are numbers, only true and false
are booleans (so `on`, `off`, `yes` and `no` stay text), dates and `1_000` are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sfa_dist.errors import RecipeError

Scalar = str | int | float | bool | None

MAX_DEPTH = 32  # Of blocks and lists inside one another.
MAX_VALUES = 20_000  # Keys and values of one text; reading so many takes about two seconds.

_NULL = ("", "~", "null", "Null", "NULL")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# A number of more than 100 digits falls through to the float pattern, becomes inf and is refused by the schema.
_INT = re.compile(r"[-+]?[0-9]{1,100}")
_BASED_INT = re.compile(r"0o[0-7]{1,100}|0x[0-9a-fA-F]{1,100}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_PLAIN = re.compile(r"[A-Za-z_/](?:[A-Za-z0-9_./*+-]|:(?=\w))*")
# Text here, booleans in YAML 1.1: quoted when written, so that other tools read text as well.
_BOOL_ELSEWHERE = ("y", "n", "yes", "no", "on", "off")


@dataclass(frozen=True)
class Node:
    """A value, the source it came from (`recipes/h_96f.yaml:12`) and its dotted key as written there (`batch.size`)."""

    value: Scalar | list[Node] | dict[str, Node]
    source: str
    key: str = ""


def plain(node: Node) -> Any:
    """The value without its sources."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


# ---------------------------------------------------------------------------------------------------- reading


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes only; refuses what would make a value depend on anything but its own text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(f"alias '*{event.anchor}' is not allowed (quote text that starts with '*')", event)
        if event.anchor is not None:
            raise _refusal(f"anchor '&{event.anchor}' is not allowed (quote text that starts with '&')", event)
        if event.tag is not None:
            raise _refusal(f"tag '{event.tag}' is not allowed (quote text that starts with '!')", event)
        self._values += 1
        if self._values > MAX_VALUES:
            raise _refusal(f"more than {MAX_VALUES:,} keys and values: this is not a recipe", event)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal("blocks or lists are nested too deeply", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _refusal(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def parse(text: str, source: Callable[[int], str], key: str = "", flow_only: bool = False) -> Node:
    """Reads one document; empty text is null. `source` turns a line number into what errors and origins name.

    `flow_only` refuses blocks: a command line holds one scalar, `[list]` or `{block}`.
    Raises RecipeError for whatever the docstring of this module refuses.
    """
    try:
        root = _StrictLoader(text).get_single_node()
        if root is None:
            return Node(None, source(1), key)
        if flow_only and isinstance(root, yaml.CollectionNode) and not root.flow_style:
            raise RecipeError(f"{source(1)}: give a single value, [a, b] or {{key: value}}")
        return _build(root, key, root.start_mark.line + 1, source)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_syntax_message(error, source)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{source(line)}: the character #x{error.character:02x} is not allowed") from None
    except RecursionError:
        raise RecipeError(f"{source(1)}: blocks or lists are nested too deeply") from None


def _syntax_message(error: yaml.MarkedYAMLError, source: Callable[[int], str]) -> str:
    began, found = error.context_mark, error.problem_mark or error.context_mark
    line = found.line + 1 if found else 1
    message = error.problem or "not YAML"
    if error.context:
        since = f" that begins on line {began.line + 1}" if began and began.line + 1 != line else ""
        message = f"{error.context}{since}, {message}"
    return f"{source(line)}: {message}"


def _build(node: yaml.Node, key: str, line: int, source: Callable[[int], str]) -> Node:
    if isinstance(node, yaml.ScalarNode):
        return Node(resolve_scalar(node.value) if node.style is None else node.value, source(line), key)
    if isinstance(node, yaml.SequenceNode):
        items = [_build(item, f"{key}[{i}]", item.start_mark.line + 1, source) for i, item in enumerate(node.value)]
        return Node(items, source(line), key)
    children: dict[str, Node] = {}
    lines: dict[str, int] = {}
    for name_node, child in node.value:
        child_line = name_node.start_mark.line + 1
        name = _key_name(name_node, source(child_line))
        if name in children:
            raise RecipeError(f"{source(child_line)}: duplicate key '{name}'; it is already on line {lines[name]}")
        children[name] = _build(child, f"{key}.{name}" if key else name, child_line, source)
        lines[name] = child_line
    return Node(children, source(line), key)


def _key_name(node: yaml.Node, source: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise RecipeError(f"{source}: a key must be text, not a list or a block")
    if node.style is None and not isinstance(resolve_scalar(node.value), str):
        raise RecipeError(f"{source}: the key {node.value or 'null'} is not text; quote it if text is meant")
    return str(node.value)


def resolve_scalar(text: str) -> Scalar:
    """The value of a scalar without quotes."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASED_INT.fullmatch(text):
        return int(text, base=0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return text


# ---------------------------------------------------------------------------------------------------- writing


def format_value(value: Any) -> str:
    """One value on one line, so that `parse` reads it back equal."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return repr(value).replace("inf", ".inf").replace("nan", ".nan")
        text = repr(value)  # Readers of YAML 1.1 take 1e-05 for text and 1.0e-05 for a number.
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, str):
        return _format_text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_format_text(key)}: {format_value(child)}" for key, child in value.items()) + "}"
    return "[" + ", ".join(format_value(item) for item in value) + "]"


def _format_text(text: str) -> str:
    readable = _PLAIN.fullmatch(text) and isinstance(resolve_scalar(text), str)
    if readable and text.lower() not in _BOOL_ELSEWHERE:
        return text
    quoted: str = yaml.safe_dump(text, default_style='"', width=2**31, allow_unicode=True)
    return quoted.rstrip("\n")


def format_tree(tree: Mapping[str, Any], comment: Callable[[str], str] = lambda key: "") -> str:
    """A block as YAML, one leaf a line; `comment` gives each leaf's remark from its dotted key."""
    return "".join(_lines(tree, "", 0, comment))


def _lines(tree: Mapping[str, Any], prefix: str, depth: int, comment: Callable[[str], str]) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        start = f"{'  ' * depth}{_format_text(name)}:"
        if isinstance(value, Mapping) and value:
            yield f"{start}\n"
            yield from _lines(value, f"{key}.", depth + 1, comment)
        else:
            remark = " ".join(comment(key).split())
            yield f"{start} {format_value(value)}" + (f"  # {remark}\n" if remark else "\n")
