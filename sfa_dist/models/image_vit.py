"""Loads the weights of an image ViT into a trunk: as exactly the function that they were trained as, or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.models.image_function import (
    ImageFunction,
    Pixels,
    function_of_own,
    function_of_timm,
    pooled_norm_error,
    timm_config_beside,
)
from sfa_dist.models.vivit import Trunk
from sfa_dist.models.weights import (
    State,
    central_frame_kernel,
    fitting,
    grid_side,
    load_exactly,
    read_state,
    resize_grid_positions,
)
from sfa_dist.models.weights_file import checked_sha256
from sfa_dist.recipe.shipped import weights_path

TIMM_PREFIX = "timm:"
REACH_S = 5.0  # Seconds for the hub to answer; without a network its own client tries for over a minute.
SHOWN_CHARS = 700
# The parts of an image ViT that classify images: a trunk has none.
IMAGE_HEAD_KEYS = ("head.", "head_dist.", "pre_logits.")
TIMM_POOL, OWN_POOL = "attn_pool.", "attn_pool.0."
LAYER_SCALE = re.compile(r"(blocks\.\d+\.)(?:ls([12])\.gamma|gamma_([12]))")
SCALED = {"1": "attn.proj", "2": "mlp.fc2"}


@dataclass(frozen=True)
class Loaded:
    """What was loaded, in words; `doubt` warns of what the source does not say and was assumed."""

    text: str
    doubt: str = ""


def load_image_vit(trunk: Trunk, source: str, pixels: Pixels | None = None) -> Loaded:
    """Initialises a trunk from an image ViT, and describes what was loaded.

    `source` is `timm:<name>` (pretrained weights by timm), `timm:<name>@<file>` (that architecture, weights from a
    local file in any format that timm reads), `sfa:<name>` (weights that come with the package), or a .safetensors/.pth
    file with timm's ViT names or those of this project's stages. `pixels` are the recipe's data.mean and data.std.
    Raises CheckpointError when the weights cannot be read, RecipeError when they are of another architecture or would
    compute another function in this trunk.
    """
    function: ImageFunction | None
    if source.startswith(TIMM_PREFIX):
        state, function = _from_timm(source.removeprefix(TIMM_PREFIX))
    else:
        state, function = _from_file(weights_path(source))
    with fitting(source):
        if any(key.startswith("trunk.") for key in state):
            own = trunk_state_from_own(state, trunk)
        else:
            own = trunk_state_from_timm(state, trunk, source)
    if function is not None:
        function.refuse_other(trunk, pixels, source)
    load_exactly(trunk, own, source)
    notes = [f"{len(own)} tensors", *_notes(state, trunk)]
    return Loaded(f"{source}: loaded {', '.join(notes)}", _doubt(function, trunk, pixels))


def _doubt(function: ImageFunction | None, trunk: Trunk, pixels: Pixels | None) -> str:
    """A warning about what neither the weights nor the recipe says; "" where nothing was assumed."""
    if function is not None or trunk.function_is_stated:
        return ""
    encoder = trunk.encoder
    mean, std = pixels or ((), ())
    about = f"model.gelu {encoder.gelu}, model.norm_eps {encoder.norm.eps:g}, {encoder.heads} heads"
    if trunk.subtract != "none":
        about += f", model.subtract {trunk.subtract}"
    if pixels:
        about += f", data.mean {_numbers(mean)}, data.std {_numbers(std)}"
    return (
        f"warning: the file does not say what its tensors were trained with; assumed: {about}. If that is wrong, the "
        "features are wrong: set model.gelu and model.norm_eps in the recipe, or name the architecture: "
        "timm:NAME@FILE (docs/weights.md)"
    )


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def _from_file(path: Path) -> tuple[State, ImageFunction | None]:
    state = read_state(path)
    if any(key.startswith("trunk.") for key in state):
        return state, function_of_own(path)
    folder = timm_config_beside(path)
    if folder is None:
        return state, None
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(f"local-dir:{folder}")
    except Exception as error:
        raise CheckpointError(f"{folder}/config.json is not one of timm's models: {_one_line(error)}") from error
    return state, function_of_timm(model, str(path))


def _from_timm(spec: str) -> tuple[State, ImageFunction]:
    import timm

    name, _, file = spec.partition("@")
    if name not in timm.list_models() and name.split(".")[0] not in timm.list_models():
        raise RecipeError(f"image checkpoint: timm knows no model {name!r}; `timm.list_models('vit_*')` lists them")
    if file and not Path(file).is_file():
        raise CheckpointError(f"image checkpoint: no file {file}")
    if file:
        checked_sha256(Path(file))
    with torch.device("meta"):
        shapes = timm.create_model(name)
    function = function_of_timm(shapes, f"timm:{name}")  # Raises before a gigabyte is downloaded.
    try:
        with _quick_without_network(bool(file)) as reached:
            model: nn.Module = timm.create_model(name, pretrained=not file, checkpoint_path=file)
    except Exception as error:
        if file:
            why = f"timm could not load {name} from {file}: {_one_line(error)}"
            raise CheckpointError(f"image checkpoint: {why}") from error
        why = _one_line(error) if reached() else "it does not answer"
        raise CheckpointError(_how_without_network(name, why)) from error
    return model.state_dict(), function


def _how_without_network(name: str, why: str) -> str:
    return (
        f"image checkpoint: timm could not load {name} from its hub ({why}); on a machine without a network, download "
        f"it elsewhere and give `timm:{name}@FILE` (docs/weights.md has the command)"
    )


@contextmanager
def _quick_without_network(local: bool) -> Iterator[Callable[[], bool]]:
    """Lets the hub's client use its cache at once where the hub does not answer.

    Yields a function that returns whether it answered; with `local` weights the hub is not asked.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    answers = local or before or _hub_answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = before or not answers
    try:
        yield lambda: answers
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=REACH_S)
    except Exception:  # noqa: BLE001 (whichever HTTP library the client has, the hub does not answer)
        return False
    return True


def trunk_state_from_own(state: State, trunk: Trunk) -> dict[str, Tensor]:
    """The trunk's tensors in the weights of a stage, with positions resized to the grid of `trunk`."""
    own = {key.removeprefix("trunk."): value for key, value in state.items() if key.startswith("trunk.")}
    table = own.get("encoder.pos_embed")
    if table is not None and table.dim() == 3:  # If it is not, load_exactly names it.
        own["encoder.pos_embed"] = resize_grid_positions(table, trunk.tokens, trunk.encoder.pooling == "cls")
    return own


def trunk_state_from_timm(state: State, trunk: Trunk, source: str) -> dict[str, Tensor]:
    """Maps timm's ViT names to a trunk's: central-frame tubelet kernel, positions resized to the trunk's grid,
    LayerScale multiplied into the linear layers before it.

    The official code leaves the cls token at zero ("not in target"). Here it is loaded, because its position was
    trained with it. Raises RecipeError for what a trunk does not compute.
    """
    if any(key.startswith("fc_norm.") for key in state):
        raise pooled_norm_error(source)
    with_cls = trunk.encoder.pooling == "cls"
    _require_pooling(state, trunk, source)
    _require_shapes(state, source)
    out: dict[str, Tensor] = {}
    for key, value in without_layer_scale(state, source).items():
        if key.startswith(IMAGE_HEAD_KEYS):
            continue
        if key == "patch_embed.proj.weight":
            out["embed.weight"] = central_frame_kernel(value, trunk.tubelet)
        elif key == "patch_embed.proj.bias":
            out["embed.bias"] = value
        elif key == "pos_embed":
            if with_cls and grid_side(value.shape[1]):  # timm's no_embed_class: the cls token has no position.
                value = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)
            out["encoder.pos_embed"] = resize_grid_positions(value, trunk.tokens, with_cls)
        else:
            out[f"encoder.{key.replace(TIMM_POOL, OWN_POOL)}"] = value
    return out


def _require_pooling(state: State, trunk: Trunk, source: str) -> None:
    """Raises RecipeError where the weights of an image ViT pool otherwise than the trunk."""
    pooling = trunk.encoder.pooling
    if "cls_token" in state:
        if pooling != "cls":
            raise RecipeError(f"{source} has a cls token, to which all its tokens attend; set model.pooling: cls")
        return
    own = "attention" if any(key.startswith(TIMM_POOL) for key in state) else "gap"
    is_vit = "patch_embed.proj.weight" in state  # If it is not, load_exactly names the keys.
    if is_vit and pooling != own:
        has = "pools its tokens by attention" if own == "attention" else "has no cls token and no attention pool"
        raise RecipeError(f"{source} {has}; set model.pooling: {own}")


def _require_shapes(state: State, source: str) -> None:
    """Checks the tensors that are used before load_exactly compares all shapes. Raises RecipeError."""
    for key, dimensions in (("patch_embed.proj.weight", 4), ("pos_embed", 3)):
        if key in state and state[key].dim() != dimensions:
            shape = tuple(state[key].shape)
            why = f"{key} is {shape}, wanted {dimensions} axes"
            raise RecipeError(f"weights from {source} are not those of an image ViT: {why}")


def without_layer_scale(state: State, source: str) -> dict[str, Tensor]:
    """The same function without LayerScale: gamma * (W x + b) = (gamma W) x + gamma b."""
    out = {key: value for key, value in state.items() if not LAYER_SCALE.fullmatch(key)}
    for key, gamma in state.items():
        found = LAYER_SCALE.fullmatch(key)
        if found is None:
            continue
        layer = found[1] + SCALED[found[2] or found[3]]
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in out:
                continue  # load_exactly names it.
            value = out[name]
            if gamma.dim() != 1 or value.dim() == 0 or gamma.shape[0] != value.shape[0]:
                raise RecipeError(f"weights from {source}: {key} is {tuple(gamma.shape)}, {name} {tuple(value.shape)}")
            out[name] = (value.float() * gamma.float().view(-1, *[1] * (value.dim() - 1))).to(value.dtype)
    return out


def _notes(state: State, trunk: Trunk) -> list[str]:
    """What was changed or left out, in words."""
    notes = []
    wanted = grid_side(trunk.tokens - (trunk.encoder.pooling == "cls"))
    table = next((state[key] for key in ("pos_embed", "trunk.encoder.pos_embed") if key in state), None)
    count = trunk.tokens if table is None else table.shape[1]
    side = grid_side(count) or grid_side(count - 1)
    if side != wanted:
        notes.append(f"resized positions {side}x{side} -> {wanted}x{wanted}")
    folded = sum(LAYER_SCALE.fullmatch(key) is not None for key in state)
    if folded:
        notes.append(f"multiplied {folded} LayerScale tensors into the layers before them")
    left = sorted(key for key in state if key.startswith((*IMAGE_HEAD_KEYS, "tail.")))
    if left:
        more = f" and {len(left) - 6} more" if len(left) > 6 else ""
        notes.append(f"left out {', '.join(left[:6])}{more}")
    return notes


def _one_line(error: BaseException) -> str:
    """The whole message of an error, on one line of at most SHOWN_CHARS characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 4]} ..."
