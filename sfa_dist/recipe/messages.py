"""Turns the schema's errors into lines that a user can act on: source, key, what was expected, and a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sfa_dist.boundary.secret import MASK, is_secret_name, shown_source
from sfa_dist.recipe.blocks import RecipeBlock, block_in
from sfa_dist.recipe.source import find
from sfa_dist.recipe.strict_yaml import Node, format_value, plain

MAX_ERRORS = 10

# What other trainers call the same key; difflib does not find these.
SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "base_lr": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "grad_clip": "optimizer.clip_norm",
    "max_grad_norm": "optimizer.clip_norm",
    "gradient_clipping": "optimizer.clip_norm",
    "smoothing": "optimizer.label_smoothing",
    "batch_size": "batch.size",
    "global_batch": "batch.size",
    "global_batch_size": "batch.size",
    "micro_batch": "batch.micro",
    "micro_batch_size": "batch.micro",
    "num_frames": "stage2.frames",
    "num_classes": "model.classes",
    "crop_size": "model.image_size",
    "num_workers": "data.workers",
    "sampling_rate": "data.stride",
    "frame_interval": "data.stride",
    "max_epochs": "schedule.epochs",
    "num_epochs": "schedule.epochs",
    "zero_stage": "engine.zero",
    "dtype": "engine.precision",
    "pretrained": "stage1.image_checkpoint",
    "init_from": "stage1.image_checkpoint",
    "save_every": "checkpoint.every_steps",
}


def describe_errors(error: ValidationError, root: Node, schema: type[RecipeBlock], shared: Collection[str]) -> str:
    """All errors, one a line, each once. `shared` names the blocks that may also stand at the top level."""
    keys = _keys_by_block(schema, shared)
    lines = list(dict.fromkeys(_describe(detail, root, keys, shared) for detail in error.errors()))
    rest = len(lines) - MAX_ERRORS
    return "\n".join(lines[:MAX_ERRORS] + ([f"... and {rest} more"] if rest > 0 else []))


def _describe(detail: ErrorDetails, root: Node, keys: Mapping[str, list[str]], shared: Collection[str]) -> str:
    path = [*detail["loc"], *_field_of(detail)]
    node, depth = find(root, path)
    kind, start = detail["type"], f"{node.source}: {node.key}: " if node.key else f"{node.source}: "
    if kind == "missing":
        name = str(path[-1])
        top = " (it may also stand at the top level)" if name in shared else ""
        return f"{start}'{name}' is missing{top}"
    if kind == "extra_forbidden":
        parent = path[1:-1] if len(path) > 2 and path[1] in shared else path[:-1]
        return f"{node.source}: unknown key '{node.key}'; {_suggest(str(path[-1]), '.'.join(map(str, parent)), keys)}"
    expected = _EXPECTED.get(kind)
    if expected is None:
        return start + detail["msg"].removeprefix("Value error, ")
    got = _got(node) if depth == len(path) else "nothing"
    return f"{start}expected {expected(detail.get('ctx', {}))}, got {got}"


def _field_of(detail: ErrorDetails) -> list[str]:
    """The field that a check of a whole block reports, where it names one (`blocks.field_error`)."""
    field = detail.get("ctx", {}).get("field")
    return [field] if isinstance(field, str) else []


def _got(node: Node) -> str:
    if is_secret_name(node.key):
        return MASK
    if isinstance(node.value, dict):
        return "a block"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    text = format_value(plain(node)) if not isinstance(node.value, str) else repr(shown_source(node.value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _says(text: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda context: text.format(**context)


_EXPECTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "int_type": _says("a whole number"),
    "float_type": _says("a number"),
    "finite_number": _says("a finite number"),
    "string_type": _says("text"),
    "string_too_short": _says("text that is not empty"),
    "bool_type": _says("true or false"),
    "list_type": _says("a list"),
    "dict_type": _says("a block of keys"),
    "model_type": _says("a block of keys"),
    "literal_error": _says("{expected}"),
    "greater_than": _says("a number greater than {gt}"),
    "greater_than_equal": _says("a number of at least {ge}"),
    "less_than": _says("a number less than {lt}"),
    "less_than_equal": _says("a number of at most {le}"),
    "too_short": _says("a list of {min_length}"),
    "too_long": _says("a list of {max_length}"),
}


def _keys_by_block(schema: type[RecipeBlock], shared: Collection[str]) -> dict[str, list[str]]:
    """The keys of each block, such as `optimizer` -> [name, lr, ...]; "" is the top level."""
    keys: dict[str, list[str]] = {}

    def visit(model: type[RecipeBlock], path: str) -> None:
        keys[path] = list(model.model_fields)
        for name, field in model.model_fields.items():
            inner = block_in(field.annotation)
            if inner is not None:
                visit(inner, name if name in shared or not path else f"{path}.{name}")

    visit(schema, "")
    keys[""] += shared
    return keys


def _suggest(name: str, parent: str, keys: Mapping[str, list[str]]) -> str:
    siblings = keys.get(parent, [])
    known = SYNONYMS.get(name, "")
    if known:
        own = known.rpartition(".")[2]
        return f"did you mean '{own if own in siblings else known}'?"
    owners = ["the top level"] if name in keys[""] else [block for block, own in keys.items() if name in own]
    if owners:
        return f"'{name}' belongs to {' or '.join(owners)}"
    near = difflib.get_close_matches(name, siblings, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(siblings)}"
