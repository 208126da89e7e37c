"""Weights in and out: saved click models, MAE initialisation, foreign files read without executing them.

A saved model is a directory with `model.safetensors` and `config.json`, whose `family` says which network it is.
Foreign files are safetensors or .pth/.pt; the latter are only ever read with `weights_only=True`, so a file can carry
tensors but no code (the official checkpoints of click models, which carry more, are for `checkpoints.py`). Every
refusal is a ValueError that names the file and the first offending key.
"""

import contextlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mis_platform.config import EvalConfig, build, plain
from mis_platform.model import hub
from mis_platform.model.simpleclick import (
    PREVIOUS_MASKS,
    VARIANTS,
    SimpleClick,
    interpolate_position,
    resize_position_embedding,
)

if TYPE_CHECKING:
    from mis_platform.model.ritm import Ritm

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

# He et al., "Masked Autoencoders Are Scalable Vision Learners" (CC BY-NC 4.0), without fine-tuning.
MAE_REPOSITORIES = {
    "vit_b": "timm/vit_base_patch16_224.mae",
    "vit_l": "timm/vit_large_patch16_224.mae",
    "vit_h": "timm/vit_huge_patch14_224.mae",
}
MAE_ORIGINALS = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{base,large,huge}.pth"
MAE_LEFT_OUT = frozenset({"norm.weight", "norm.bias"})  # SimpleClick has no final norm
NOT_IN_MAE = ("fc_norm.", "head.")  # of the backbone; unused in SimpleClick
_SCAN_BYTES = 2**24  # of a pickle: far more than the structure of any checkpoint
_SCAN_TEXT = 256  # bytes: no file of weights does without a control character in that many

# family -> names of its variants; a configuration without a family is older than the second one
FAMILIES = {"simpleclick": tuple(VARIANTS), "ritm": ("hrnet18s", "hrnet18", "hrnet32", "hrnet18_baseline")}
REFINEMENTS = {"fbrs": "ritm"}  # -> the family it is for

# What else decides the answers, and what to do about a model of which it was changed. It is written into the weights
# file, too, because the digest of that stands for the model.
BESIDE_WEIGHTS = {
    "refine": "import the checkpoint again with the refinement it shall have",
    "previous_mask": "train a model for the form it shall have",
}

# What a user of a saved model has to know; in its config.json, and handed on to models that start from it.
MAE_LICENCE = "CC-BY-NC-4.0, from the MAE weights it started from: no commercial use"
OWN_LICENCE = "started from random weights: only the licences of its photos matter"
FOREIGN_LICENCE = "that of the imported checkpoint: ask its authors"

Shapes = dict[str, tuple[int, ...]]
Model: TypeAlias = "SimpleClick | Ritm"


# -- saved models ----------------------------------------------------------------------------------------------------


def save_model(directory: str | Path, model: Model, config: Mapping[str, Any]) -> None:
    """Write `model` and `config` (JSON values) into `directory`, which is made if missing.

    `variant`, `image_size` (pixels: a side, or [height, width]), `licence`, `previous_mask` where it is binary and, for
    all but SimpleClick, `family` are set from the model. Each file appears whole or not at all, config.json last.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    height, width = model.image_size
    described = {**config, "variant": model.variant, "image_size": height if height == width else [height, width]}
    if not isinstance(model, SimpleClick):
        described["family"] = "ritm"
    elif model.previous_mask != "soft":
        described["previous_mask"] = model.previous_mask
    described.setdefault("licence", model.licence or OWN_LICENCE)
    text = json.dumps(described, indent=2, sort_keys=True, allow_nan=False) + "\n"
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {name: described[name] for name in BESIDE_WEIGHTS if described.get(name)} or None
    _write(directory / WEIGHTS_FILE, safetensors.torch.save(state, metadata))
    _write(directory / CONFIG_FILE, text.encode())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_model(directory: str | Path) -> Any:
    """The model saved in `directory`, on the CPU in evaluation mode: a SimpleClick or, if its family says so, a Ritm.

    Raises ValueError for a missing or damaged file, an unknown family or variant, and weights that do not belong: the
    key, both shapes and, if there is one, the variant that would fit are named.
    """
    directory = Path(directory)
    if directory.is_file():
        state = read_state_dict(directory)
        raise ValueError(f"{directory} is {_kind(state)}, not a saved model: {_wanted_directory(state)}")
    config = read_config(directory)
    state = read_state_dict(directory / WEIGHTS_FILE)
    model = empty_model(family_of(config), config["variant"], config["image_size"])
    check_layout(state, model, directory / WEIGHTS_FILE)
    check_values(state, directory / WEIGHTS_FILE)
    _check_beside_weights(directory, config)
    # The tensors are views of the file; copies survive if it is rewritten in place or its network drive goes away.
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    model.licence = licence_of(config)
    if isinstance(model, SimpleClick):
        model.previous_mask = config.get("previous_mask", "soft")
    return model.eval()


def licence_of(config: Mapping[str, Any]) -> str:
    """What a user of the model with this config.json has to know; also of one that was saved before it said so."""
    if isinstance(said := config.get("licence"), str):
        return said
    if "source" in config:
        return MAE_LICENCE if family_of(config) == "simpleclick" else FOREIGN_LICENCE
    run = config.get("run")
    model = run.get("model") if isinstance(run, dict) else None
    return OWN_LICENCE if isinstance(model, dict) and model.get("init") == "random" else MAE_LICENCE


def empty_model(family: str, variant: str, image_size: int | Sequence[int]) -> Model:
    """A model on torch's meta device: neither time nor random numbers for weights that are assigned at once."""
    with torch.device("meta"):
        if family != "ritm":
            return SimpleClick(variant, image_size)
        from mis_platform.model.ritm import Ritm  # with timm: seconds of every process that trains or scores

        return Ritm(variant, image_size)


def set_zoom_size(model: Model, zoom_size: int) -> None:
    """Set `model` up, in place, for a zoomed-in crop of `zoom_size` pixels.

    That is the side of SimpleClick's square input, whose position embedding is resized, or the longest side of RITM's.
    Raises ValueError for a size that the family cannot take.
    """
    if isinstance(model, SimpleClick):
        if model.image_size != (zoom_size, zoom_size):
            resize_position_embedding(model, zoom_size)
    elif zoom_size < 1:
        raise ValueError(f"the longest side of RITM's input is at least 1 pixel, not {zoom_size}")
    else:
        model.image_size = (zoom_size, zoom_size)


def read_config(directory: str | Path) -> dict[str, Any]:
    """What `save_model` was given, with all that loading needs checked; ValueError if it is wrong or missing."""
    path = Path(directory) / CONFIG_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{directory} holds no model: {CONFIG_FILE} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} is not readable: {error}") from None
    return parse_config(content, path)


def parse_config(content: bytes, path: str | Path) -> dict[str, Any]:
    """`read_config` with the file's content at hand; `path` names it in errors."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    family = family_of(config) if isinstance(config, dict) else "simpleclick"
    if family not in list(FAMILIES):
        raise ValueError(f"{path}: family must be one of: {', '.join(FAMILIES)}, got {family!r}")
    if not isinstance(config, dict) or config.get("variant") not in FAMILIES[family]:
        raise ValueError(f"{path} must be an object with variant set to one of: {', '.join(FAMILIES[family])}")
    size = config.get("image_size")
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ValueError(f"{path}: image_size must be pixels, a side or [height, width], got {size!r}")
    if config.get("refine") is not None:
        check_refinement(config["refine"], family, path)
    if config.get("previous_mask", "soft") not in list(PREVIOUS_MASKS):
        raise ValueError(f"{path}: previous_mask must be one of: {', '.join(PREVIOUS_MASKS)}")
    return config


def family_of(config: Mapping[str, Any]) -> Any:
    """The family of a saved model, a key of FAMILIES once it is checked."""
    return config.get("family", "simpleclick")


def check_refinement(refine: Any, family: str, origin: str | Path) -> None:
    """ValueError unless `refine` names a refinement for models of `family`."""
    if refine not in list(REFINEMENTS):
        raise ValueError(f"{origin}: refine must be one of: {', '.join(REFINEMENTS)}, got {refine!r}")
    if REFINEMENTS[refine] != family:
        raise ValueError(f"{origin}: refine={refine} needs a model of family {REFINEMENTS[refine]}, this is {family}")


def _check_beside_weights(directory: Path, config: Mapping[str, Any]) -> None:
    """config.json and the weights file must agree, or scores with and without refinement would share an address."""
    with safetensors.safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
        written = file.metadata() or {}
    for name, remedy in BESIDE_WEIGHTS.items():
        if written.get(name) != config.get(name):
            raise ValueError(
                f"{directory}: {CONFIG_FILE} says {name}={config.get(name)}, {WEIGHTS_FILE} was made with "
                f"{name}={written.get(name)}; {remedy}"
            )


def eval_config(config: Mapping[str, Any], base: EvalConfig | None = None, given: Iterable[str] = ()) -> EvalConfig:
    """The click protocol for a saved model: `base` (default the paper's) with the model's own settings.

    config: of the model; its `eval` is a dict of EvalConfig's names, which a training leaves out. given: names whose
    value in `base` stays. Raises ValueError for a setting that does not exist or is out of range.
    """
    base = base or EvalConfig()
    found = config.get("eval") or {}
    if not isinstance(found, dict):
        raise ValueError(f"the eval settings of a model must be an object, got {found!r}")
    own = {name: value for name, value in found.items() if name not in set(given)}
    if not own:
        return base
    checked: EvalConfig = build(EvalConfig, plain(base) | own)
    return checked


def _wanted_directory(state: Mapping[str, Tensor]) -> str:
    if _is_vit(state):
        return "train from it with model.init=mae and model.init_weights set to this file"
    return f"give the directory that holds {WEIGHTS_FILE} and {CONFIG_FILE}, or make one with `mis import`"


# -- MAE -------------------------------------------------------------------------------------------------------------


def load_mae(model: SimpleClick, source: str | Path | None = None) -> None:
    """Initialise the backbone of `model`, in place, from MAE-pretrained weights; all other parts stay as they are.

    source: a file in MAE's own format (a dict with key "model") or timm's (flat), .pth or .safetensors; None, and a pin
    "sha256:HEX", fetch timm's file from the Hugging Face hub, or take it from the hub's cache. The position embedding
    is resized bicubically from the 14x14 (ViT-H: 16x16) patches of MAE to the model's grid, its class entry kept. MAE's
    final norm is left out. Raises ValueError if the file cannot be had, is something else (a click model, a supervised
    classifier), or does not fit.
    """
    path = mae_file(model.variant, None if source is None else str(source))
    load_mae_state(model, read_state_dict(path), path)


def load_mae_state(model: SimpleClick, state: Mapping[str, Tensor], origin: str | Path) -> None:
    """`load_mae` with tensors at hand; `origin` names them in errors."""
    if _kind(state) in _CLICK_MODELS:
        raise ValueError(f"{origin} is {_kind(state)}: MAE initialisation needs a pre-trained MAE encoder")
    supervised = [name for name in state if name.startswith(NOT_IN_MAE)]
    if supervised:
        raise ValueError(
            f"{origin} has a classifier ({supervised[0]}): its backbone was fine-tuned on labels, "
            f"which an unsupervised model must not see; use a file that is only pre-trained ({MAE_ORIGINALS})"
        )
    expected = _mae_shapes(model)
    position = tuple(state["pos_embed"].shape) if "pos_embed" in state else ()
    side = math.isqrt(max(0, position[1] - 1)) if len(position) == 3 else 0
    if side and position == (1, 1 + side * side, expected["pos_embed"][2]):
        expected["pos_embed"] = position  # any square grid can be resized
    encoder = {name: tensor for name, tensor in state.items() if name not in MAE_LEFT_OUT}
    _check(encoder, expected, origin, model.variant)
    check_values(encoder, origin)
    encoder["pos_embed"] = interpolate_position(encoder["pos_embed"], (side, side), model.backbone.grid)
    problems = model.backbone.load_state_dict(encoder, strict=False)
    assert not problems.unexpected_keys
    assert all(name.startswith(NOT_IN_MAE) for name in problems.missing_keys)
    model.licence = MAE_LICENCE


def _mae_shapes(model: SimpleClick) -> Shapes:
    """What a MAE encoder for this model holds, but for the final norm; pos_embed at MAE's own 224 pixels."""
    shapes = _shapes(model.backbone.state_dict())
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(NOT_IN_MAE)}
    shapes["pos_embed"] = (1, 1 + VARIANTS[model.variant].window ** 2, shapes["pos_embed"][2])
    return shapes


def mae_file(variant: str, source: str | None) -> Path:
    """The file that model.init_weights=`source` asks for. Raises as `fetch_mae`; whether a path exists is not asked."""
    pin = hub.pin_of(source)
    return Path(source) if source is not None and pin is None else fetch_mae(variant, pin)


def mae_hub_file(variant: str, source: str | None) -> str | None:
    """REPOSITORY/FILE of the hub where `mae_file` gets it; None for a path."""
    return f"{MAE_REPOSITORIES[variant]}/{WEIGHTS_FILE}" if source is None or hub.pin_of(source) is not None else None


def fetch_mae(variant: str, sha256: str | None = None) -> Path:
    """timm's MAE weights of `variant` ("vit_b", "vit_l", "vit_h"), from the hub's cache or the hub.

    sha256: of the file that is wanted; default: whichever the cache has, else the hub. Raises ValueError, within
    seconds, that says how to get them.
    """
    if variant not in MAE_REPOSITORIES:
        raise ValueError(f"there are no MAE weights for {variant}; there are for: {', '.join(MAE_REPOSITORIES)}")
    repository = MAE_REPOSITORIES[variant]
    try:
        return hub.fetch(repository, WEIGHTS_FILE, sha256)
    except ConnectionError as error:
        raise ValueError(
            f"there are no MAE weights for {variant} at hand: {error}. "
            f"Fetch {MAE_ORIGINALS}, or {WEIGHTS_FILE} of {repository}, on a machine with access and set "
            "model.init_weights to its path; or start from random weights with model.init=random"
        ) from None


# -- reading ---------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth/.pt file by name, on the CPU; no code in the file is run.

    A dict under "model" (MAE) or "state_dict" is unwrapped. Raises ValueError for a file that is missing, damaged,
    holds Python objects other than tensors and plain values, or holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file at {path}")
    if path.suffix == ".safetensors" or _starts_like_safetensors(path):
        return _read_safetensors(path)
    content = _read_pickle(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict (tensors by name), but a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds no state dict: {name!r} is a {type(value).__name__}, not a tensor")
    return dict(content)


def _starts_like_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"  # after the length of the header comes its JSON


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        _refuse_text(path)
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _read_pickle(path: Path) -> Any:
    """Never torch's own words about a refused file: they advise to load it without care."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise almost anything; nothing of it has been executed
        if _names_click_model(path):
            raise ValueError(
                f"{path} looks like an official checkpoint of a click model: it pickles Python objects beside the "
                "weights, which could run code when loaded. Import it with `mis import`, which runs none of it"
            ) from None
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds more than tensors and plain values ({named[1]}), which could run code when loaded; "
                "it was refused, and nothing in it was run"
            ) from None
        _refuse_text(path)
        reason = "" if "weights_only" in str(error) else str(error).partition(". ")[0]
        about = f" ({' '.join(reason.split())})" if reason else ""
        raise ValueError(f"{path} is damaged, or no file of weights; nothing in it was run{about}") from None


def _refuse_text(path: Path) -> None:
    """ValueError for a web page, which is what a failed download leaves, and other text, e.g. a pointer of Git LFS."""
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:  # that it is unreadable is said by who asks
        start = file.read(_SCAN_TEXT)
    if start and all(byte >= 32 or byte in b"\t\n\f\r" for byte in start):
        words = " ".join(start.decode("utf8", "replace").split())
        raise ValueError(f"{path} is a web page or text, no file of weights; it begins with {words[:60]!r}")


def _names_click_model(path: Path) -> bool:
    """Whether a pickle mentions the classes of SimpleClick or MIS; looks at bytes only, loads nothing."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                parts = [archive.open(name).read(_SCAN_BYTES) for name in names]
        else:
            with path.open("rb") as file:
                parts = [file.read(_SCAN_BYTES)]
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        return False
    return any(b"isegm." in part or b"mis.model." in part for part in parts)


# -- checks ----------------------------------------------------------------------------------------------------------


def check_layout(state: Mapping[str, Tensor], model: Model, origin: str | Path) -> None:
    """ValueError for the first tensor of another shape or type than in `model`, unknown or missing, in this order.

    Neither needs to hold values: tensors on the meta device will do.
    """
    expected = model.state_dict()
    _check(state, _shapes(expected), origin, model.variant, {name: tensor.dtype for name, tensor in expected.items()})


def _check(
    state: Mapping[str, Tensor],
    expected: Shapes,
    origin: str | Path,
    variant: str,
    types: Mapping[str, torch.dtype] | None = None,
) -> None:
    """As `check_layout`; types: those that are not float32."""
    for name in sorted(state.keys() & expected.keys()):
        if tuple(state[name].shape) != expected[name]:
            raise ValueError(
                f"{origin} does not fit {variant}: {name} has shape {tuple(state[name].shape)}, "
                f"{variant} needs {expected[name]}{_fitting_variant(state, variant)}"
            )
    for problem, names in (
        ("unexpected", state.keys() - expected.keys()),
        ("missing", expected.keys() - state.keys()),
    ):
        if names:
            raise ValueError(f"{origin} is {_kind(state)} that does not fit {variant}: {problem} {_listed(names)}")
    for name, tensor in state.items():
        wanted = (types or {}).get(name, torch.float32)
        if tensor.dtype != wanted:
            found, needed = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, wanted))
            raise ValueError(f"{origin}: {name} is {found}, expected {needed}")


def check_values(state: Mapping[str, Tensor], origin: str | Path) -> None:
    """ValueError for the first tensor with NaN or infinity."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{origin}: {name} holds NaN or infinity; the training that made it has diverged")


def _listed(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


def _fitting_variant(state: Mapping[str, Tensor], tried: str) -> str:
    """What to add to the refusal of a wrong size: the variant whose transformer has these shapes."""
    if tried not in VARIANTS:
        return ""
    prefix = "" if _is_vit(state) else "backbone."
    for variant in VARIANTS:
        with torch.device("meta"):
            expected = _mae_shapes(SimpleClick(variant))
        del expected["pos_embed"]  # depends on the image size as well
        found = {name: tuple(state[prefix + name].shape) for name in expected if prefix + name in state}
        if found == expected and f"{prefix}blocks.{VARIANTS[variant].depth}.norm1.weight" not in state:
            return "" if variant == tried else f"; it fits {variant} (model.variant={variant})"
    return f"; it fits none of: {', '.join(VARIANTS)}"


# what it is called -> a tensor that tells it
_CLICK_MODELS = {
    "a click model (SimpleClick)": "patch_embed_coords.proj.weight",
    "a click model (RITM)": "feature_extractor.cls_head.weight",
}


def _is_vit(state: Mapping[str, Tensor]) -> bool:
    return "blocks.0.attn.qkv.weight" in state and "patch_embed.proj.weight" in state


def _kind(state: Mapping[str, Tensor]) -> str:
    for kind, name in _CLICK_MODELS.items():
        if name in state:
            return kind
    if _is_vit(state):
        return "a plain vision transformer such as MAE's encoder"
    return "a set of weights of another network"


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
