"""Loads weights into a ViViT: files of tensors, positions for another grid or length, and stage 1 into stage 2.

Nothing is loaded by pickle, and nothing is skipped silently: a missing or unexpected key is an error that names it.
"""

from __future__ import annotations

import pickle  # Only for the name of an error.
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.models.vivit import Tail, Trunk
from sfa_dist.models.weights_file import checked_sha256

State = Mapping[str, Tensor]
NAMES_SHOWN, NAME_CHARS = 5, 100


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pth/.pt file read with `weights_only`.

    Raises CheckpointError when the file is missing, damaged or of another kind, or holds values that are not finite.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights file {path}")
    checked_sha256(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _load_tensors(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and is not loaded; convert it to .safetensors"
        ) from error
    except Exception as error:
        raise CheckpointError(f"cannot read weights file {path}: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(map(_is_named_tensor, state.items())):
        raise CheckpointError(f"{path} is not a plain dictionary of named tensors")
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    odd = next((key for key, value in state.items() if not _is_finite(value)), None)
    if odd is not None:
        raise CheckpointError(f"{path}: {odd[:100]} has values that are not finite")
    return state


def _load_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    # isfinite does not take float8.
    return bool((value.float() if value.element_size() == 1 else value).isfinite().all())


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    key, value = item
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def central_frame_kernel(image_kernel: Tensor, tubelet: int) -> Tensor:
    """2D patch kernel (D, 3, p, p) -> tubelet kernel (D, 3, t, p, p), zero outside frame t // 2 (ViViT, equation 9)."""
    kernel = torch.zeros(*image_kernel.shape[:2], tubelet, *image_kernel.shape[2:], dtype=image_kernel.dtype)
    kernel[:, :, tubelet // 2] = image_kernel
    return kernel


def resize_grid_positions(positions: Tensor, tokens: int, with_cls: bool) -> Tensor:
    """Position table (1, N[+1], D) of a square grid -> (1, tokens, D), bilinear on the grid; the cls entry is kept.

    Equals the official `scipy.ndimage.zoom(order=1)`, hence align_corners. Raises RecipeError for what is no square.
    """
    has_cls = grid_side(positions.shape[1]) is None
    cls, grid = (positions[:, :1], positions[:, 1:]) if has_cls else (positions[:, :0], positions)
    side, wanted = grid_side(grid.shape[1]), grid_side(tokens - with_cls)
    if not side or not wanted:
        raise RecipeError(
            f"position table of {positions.shape[1]} entries does not fit a square grid of {tokens} tokens"
        )
    if side != wanted:
        image = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
        image = F.interpolate(image, size=(wanted, wanted), mode="bilinear", align_corners=True)
        grid = image.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([cls, grid], dim=1) if with_cls else grid


def grid_side(count: int) -> int | None:
    """The side of a square grid of `count` entries; None where they do not fill one."""
    side = round(count**0.5)
    return side if side * side == count else None


def resize_time_positions(positions: Tensor, steps: int, with_cls: bool) -> Tensor:
    """Temporal position table (1, F[+1], D) -> (1, steps[+1], D), linear in time; the cls entry is kept (scenic)."""
    first = int(with_cls)
    cls, table = positions[:, :first], positions[:, first:]
    if table.shape[1] != steps:
        table = F.interpolate(table.float().transpose(1, 2), size=steps, mode="linear", align_corners=True)
        table = table.transpose(1, 2).to(positions.dtype)
    return torch.cat([cls, table], dim=1)


def load_stage1_into_tail(tail: Tail, stage1: State, keep_head: bool, source: str) -> None:
    """Loads stage 1's temporal encoder (positions interpolated to the tail's length) and, if `keep_head`, its head.

    The adapter keeps its initialisation. Of encoders of different depths the first blocks are loaded, as many as both
    have; the tail's further blocks keep their initialisation. Raises RecipeError when the architectures differ
    otherwise.
    """
    state = {key.removeprefix("tail."): value for key, value in stage1.items() if key.startswith("tail.")}
    state = _first_blocks(state, tail)
    with fitting(source):
        state = fit_time_positions(state, tail)
    own = tail.state_dict()
    if not keep_head:
        state |= {key: own[key] for key in own if key.startswith("head.")}
    state = {key: value for key, value in state.items() if not key.startswith("adapter.")}
    state |= {key: own[key] for key in own if key.startswith("adapter.")}
    load_exactly(tail, state, source)


def fit_time_positions(state: State, tail: Tail, prefix: str = "") -> dict[str, Tensor]:
    """The state with its temporal positions resized to the frames that `tail` takes.

    In `state` the names of the tail's tensors begin with `prefix`.
    """
    key = f"{prefix}temporal.pos_embed"
    if tail.temporal is None or key not in state:
        return dict(state)
    with_cls = tail.temporal.pooling == "cls"
    steps = tail.temporal.pos_embed.shape[1] - with_cls
    return {**state, key: resize_time_positions(state[key], steps, with_cls)}


def _first_blocks(state: dict[str, Tensor], tail: Tail) -> dict[str, Tensor]:
    """The state with a temporal encoder as deep as the tail's: blocks left out, or the tail's own blocks added."""
    own = {key: value for key, value in tail.state_dict().items() if key.startswith("temporal.")}
    if "temporal.pos_embed" not in state or not own:
        return {key: value for key, value in state.items() if not key.startswith("temporal.")} | own
    blocks = {key for key in (*state, *own) if key.startswith("temporal.blocks.")}
    kept = {key: value for key, value in state.items() if key not in blocks or key in own}
    return kept | {key: own[key] for key in own.keys() & blocks if key not in state}


def load_trunk(trunk: Trunk, stage1: State, source: str) -> None:
    """Loads the trunk of stage 1's weights. Raises RecipeError when it is of another architecture."""
    state = {key.removeprefix("trunk."): value for key, value in stage1.items() if key.startswith("trunk.")}
    load_exactly(trunk, state, source)


def load_exactly(module: nn.Module, state: State, source: str) -> None:
    """A `load_state_dict` that takes no missing, unexpected or wrongly shaped tensors: RecipeError names them."""
    own = module.state_dict()
    faults = [
        *_named("missing", [key for key in own if key not in state]),
        *_named("unexpected", [key for key in state if key not in own]),
        *_named(
            "of another shape",
            [
                f"{key} is {tuple(state[key].shape)}, wanted {tuple(own[key].shape)}"
                for key in own
                if key in state and state[key].shape != own[key].shape
            ],
        ),
        *_named(
            "of another type",
            [
                f"{key} is {state[key].dtype}"
                for key in own
                if key in state and own[key].is_floating_point() and not state[key].is_floating_point()
            ],
        ),
    ]
    if faults:
        raise RecipeError(f"weights from {source} do not fit the recipe's model: {'; '.join(faults)}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def _named(what: str, names: list[str]) -> list[str]:
    """`N missing: a, b and 7 more`, or nothing for no names. Another architecture differs in hundreds."""
    if not names:
        return []
    shown = ", ".join(name if len(name) <= NAME_CHARS else f"{name[:NAME_CHARS]}..." for name in names[:NAMES_SHOWN])
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return [f"{len(names)} {what}: {shown}{more}"]


@contextmanager
def fitting(source: str) -> Iterator[None]:
    """Turns the failure to reshape a tensor inside into a RecipeError that names the source."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"weights from {source}: {error}") from error
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise RecipeError(f"weights from {source} do not fit the recipe's model: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
