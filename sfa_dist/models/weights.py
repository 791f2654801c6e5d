"""Weights into a ViViT: from an image ViT, and from stage 1 into stage 2.

Nothing is loaded by pickle and nothing is skipped in silence: a missing or unexpected key is an error that names it.
"""

from __future__ import annotations

import pickle  # only for the name of an error
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.models.vivit import Tail, Trunk
from sfa_dist.models.weights_file import checked_sha256

TIMM_PREFIX = "timm:"
# What an image ViT has for classifying images, and a trunk has no use for.
IMAGE_HEAD_KEYS = ("head.", "head_dist.", "pre_logits.")

State = Mapping[str, Tensor]


def load_image_vit(trunk: Trunk, source: str) -> None:
    """Initialises a trunk from an image ViT.

    `source` is `timm:<name>` (pretrained weights by timm), `timm:<name>@<file>` (that architecture, weights from a
    local
    file in any format timm reads), or a .safetensors/.pth file with timm's ViT names or with those of our own stages.
    Raises CheckpointError when the weights cannot be read, RecipeError when they are of another architecture.
    """
    state = (
        _timm_state(source.removeprefix(TIMM_PREFIX)) if source.startswith(TIMM_PREFIX) else read_state(Path(source))
    )
    if any(key.startswith("trunk.") for key in state):
        own = {key.removeprefix("trunk."): value for key, value in state.items() if key.startswith("trunk.")}
    else:
        with _fitting(source):
            own = trunk_state_from_timm(state, trunk, source)
    load_exactly(trunk, own, source)


def _timm_state(spec: str) -> dict[str, Tensor]:
    import timm

    name, _, file = spec.partition("@")
    if name not in timm.list_models() and name.split(".")[0] not in timm.list_models():
        raise RecipeError(f"image checkpoint: timm knows no model {name!r}; `timm.list_models('vit_*')` lists them")
    if file and not Path(file).is_file():
        raise CheckpointError(f"image checkpoint: no file {file}")
    if file:
        checked_sha256(Path(file))
    try:
        model = timm.create_model(name, pretrained=not file, checkpoint_path=file)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"from {file}" if file else "from its hub"
        raise CheckpointError(
            f"image checkpoint: timm could not load {name} {where} ({_first_line(error)}); on a machine without "
            f"network download it elsewhere and give `timm:{name}@FILE`"
        ) from error
    return dict(model.state_dict())


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pth/.pt file read with `weights_only`.

    Raises CheckpointError when the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights file {path}")
    checked_sha256(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and is not loaded; convert it to .safetensors"
        ) from error
    except Exception as error:  # A file that may be anybody's: the readers raise whatever its bytes lead to.
        raise CheckpointError(f"cannot read weights file {path}: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    plain = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not plain:
        raise CheckpointError(f"{path} is no plain dictionary of tensors")
    return state


def trunk_state_from_timm(state: State, trunk: Trunk, source: str) -> dict[str, Tensor]:
    """Maps timm's ViT names to a trunk's: central-frame tubelet kernel, positions resized to the trunk's grid.

    The official code leaves the cls token at zero ("not in target"); here it is loaded, which its position entry
    expects.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(IMAGE_HEAD_KEYS):
            continue
        if key == "patch_embed.proj.weight":
            out["embed.weight"] = central_frame_kernel(value, trunk.tubelet)
        elif key == "patch_embed.proj.bias":
            out["embed.bias"] = value
        elif key == "pos_embed":
            out["encoder.pos_embed"] = resize_grid_positions(value, trunk.tokens, trunk.encoder.pooling == "cls")
        elif key == "fc_norm.weight" or key == "fc_norm.bias":
            out[key.replace("fc_norm", "encoder.norm")] = value
        else:
            out[f"encoder.{key}"] = value
    if "encoder.cls_token" not in out and trunk.encoder.pooling == "cls":
        raise RecipeError(f"{source} has no cls token; set model.pooling: gap")
    if "encoder.cls_token" in out and trunk.encoder.pooling == "gap":
        del out["encoder.cls_token"]
    return out


def central_frame_kernel(image_kernel: Tensor, tubelet: int) -> Tensor:
    """2D patch kernel (D, 3, p, p) -> tubelet kernel (D, 3, t, p, p): zero but for frame t // 2 (ViViT, equation 9)."""
    kernel = torch.zeros(*image_kernel.shape[:2], tubelet, *image_kernel.shape[2:], dtype=image_kernel.dtype)
    kernel[:, :, tubelet // 2] = image_kernel
    return kernel


def resize_grid_positions(positions: Tensor, tokens: int, with_cls: bool) -> Tensor:
    """Position table (1, N[+1], D) of a square grid -> (1, tokens, D), bilinear on the grid, the cls entry kept.

    Equals the official `scipy.ndimage.zoom(order=1)`, hence align_corners.
    """
    has_cls = _side(positions.shape[1]) is None
    cls, grid = (positions[:, :1], positions[:, 1:]) if has_cls else (positions[:, :0], positions)
    side, wanted = _side(grid.shape[1]), _side(tokens - with_cls)
    if side is None or wanted is None:
        raise RecipeError(
            f"position table of {positions.shape[1]} entries does not fit a square grid of {tokens} tokens"
        )
    if side != wanted:
        image = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
        image = F.interpolate(image, size=(wanted, wanted), mode="bilinear", align_corners=True)
        grid = image.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([cls, grid], dim=1) if with_cls else grid


def _side(count: int) -> int | None:
    side = round(count**0.5)
    return side if side * side == count else None


def resize_time_positions(positions: Tensor, steps: int, with_cls: bool) -> Tensor:
    """Temporal position table (1, F[+1], D) -> (1, steps[+1], D): linear in time, the cls entry kept (scenic)."""
    first = int(with_cls)
    cls, table = positions[:, :first], positions[:, first:]
    if table.shape[1] != steps:
        table = F.interpolate(table.float().transpose(1, 2), size=steps, mode="linear", align_corners=True)
        table = table.transpose(1, 2).to(positions.dtype)
    return torch.cat([cls, table], dim=1)


def load_stage1_into_tail(tail: Tail, stage1: State, keep_head: bool, source: str) -> None:
    """Temporal encoder (positions interpolated to the tail's length) and, if `keep_head`, the head of stage 1.

    The adapter keeps its initialisation. A temporal encoder of another depth takes the first blocks, as many as both
    have; further ones keep their initialisation. Raises RecipeError when the architectures differ otherwise.
    """
    state = {key.removeprefix("tail."): value for key, value in stage1.items() if key.startswith("tail.")}
    state = _first_blocks(state, tail)
    with _fitting(source):
        state = fit_time_positions(state, tail)
    own = tail.state_dict()
    if not keep_head:
        state |= {key: own[key] for key in own if key.startswith("head.")}
    state = {key: value for key, value in state.items() if not key.startswith("adapter.")}
    state |= {key: own[key] for key in own if key.startswith("adapter.")}
    load_exactly(tail, state, source)


def fit_time_positions(state: State, tail: Tail, prefix: str = "") -> dict[str, Tensor]:
    """The state with the temporal positions of the tail, whose names begin with `prefix`, for as many frames as `tail`
    takes."""
    key = f"{prefix}temporal.pos_embed"
    if tail.temporal is None or key not in state:
        return dict(state)
    with_cls = tail.temporal.pooling == "cls"
    steps = tail.temporal.pos_embed.shape[1] - with_cls
    return {**state, key: resize_time_positions(state[key], steps, with_cls)}


def _first_blocks(state: dict[str, Tensor], tail: Tail) -> dict[str, Tensor]:
    """Stage 1's temporal encoder as deep as the tail's: blocks left out, or the tail's own put in their place."""
    own = {key: value for key, value in tail.state_dict().items() if key.startswith("temporal.")}
    if "temporal.pos_embed" not in state or not own:
        return {key: value for key, value in state.items() if not key.startswith("temporal.")} | own
    blocks = {key for key in (*state, *own) if key.startswith("temporal.blocks.")}
    kept = {key: value for key, value in state.items() if key not in blocks or key in own}
    return kept | {key: own[key] for key in own.keys() & blocks if key not in state}


def load_trunk(trunk: Trunk, stage1: State, source: str) -> None:
    """The trunk of a stage-1 weights file. Raises RecipeError when it is of another architecture."""
    state = {key.removeprefix("trunk."): value for key, value in stage1.items() if key.startswith("trunk.")}
    load_exactly(trunk, state, source)


def load_exactly(module: nn.Module, state: State, source: str) -> None:
    """`load_state_dict` that accepts neither missing, nor unexpected, nor wrongly shaped tensors (RecipeError names
    them)."""
    own = module.state_dict()
    faults = [f"missing {key}" for key in own if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in own]
    faults += [
        f"{key} is {tuple(state[key].shape)}, wanted {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults += [f"{key} is {state[key].dtype}, wanted floating point" for key in own if not _has_numbers(state.get(key))]
    if faults:
        more = f" and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise RecipeError(f"weights from {source} do not fit the recipe's model: {'; '.join(faults[:6])}{more}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


@contextmanager
def _fitting(source: str) -> Iterator[None]:
    """Tensors that are reshaped inside of the block may have any shape: those that cannot be are told."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise RecipeError(f"weights from {source} do not fit the recipe's model: {_first_line(error)}") from error


def _has_numbers(tensor: Tensor | None) -> bool:
    """Whether a tensor, where there is one, holds floating-point numbers as they are: no quantised or sparse ones, none
    without storage."""
    if tensor is None:
        return True
    return tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type != "meta"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
