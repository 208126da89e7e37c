"""Patch features of a photo: what the merge tree is built from (paper section 3.1 and "Implementation Details").

Nothing here imports torch: the networks (`backbones.py`) are loaded only when one is asked for, so that the
weightless extractor and `weights_digest` stay cheap.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mis_platform.config import FeaturesConfig, plain
from mis_platform.errors import DataError
from mis_platform.model import hub

WITHOUT_WEIGHTS = "color_texture"
GRID_PIXELS = 8  # of the photo, per patch: the same grid for every extractor
# In one forward pass, unless one photo has more: enough to fill any device, and for ViT-B in fp32 some 0.7 GB.
BATCH_PATCHES = 2**14
_HUB_FILE = "model.safetensors"
_DINO = "https://dl.fbaipublicfiles.com/dino"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
_DINOV3 = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads"


@dataclass(frozen=True)
class Backbone:
    """A self-supervised vision transformer, as timm knows it."""

    architecture: str  # timm's name
    patch: int  # pixels
    dim: int
    repository: str  # on the Hugging Face hub, timm's key names
    original: str  # where the authors' file is


def _dino(size: str, dim: int, patch: int, name: str) -> Backbone:
    architecture = f"vit_{size}_patch{patch}_224"
    return Backbone(
        architecture, patch, dim, f"timm/{architecture}.dino", f"{_DINO}/{name}_pretrain/{name}_pretrain.pth"
    )


def _dinov2(size: str, dim: int) -> Backbone:
    architecture, name = f"vit_{size}_patch14_dinov2", f"dinov2_vit{size[0]}14"
    return Backbone(architecture, 14, dim, f"timm/{architecture}.lvd142m", f"{_DINOV2}/{name}/{name}_pretrain.pth")


def _dinov3(size: str, dim: int) -> Backbone:
    # "qkvb" keeps the biases of queries and values, which the authors' files hold; timm's files leave out those of 0.
    architecture, name = f"vit_{size}_patch16_dinov3", f"dinov3_vit{size[0]}16_pretrain_lvd1689m"
    return Backbone(f"{architecture}_qkvb", 16, dim, f"timm/{architecture}.lvd1689m", f"{name} from {_DINOV3}")


BACKBONES = {
    "dino_vits8": _dino("small", 384, 8, "dino_deitsmall8"),
    "dino_vits16": _dino("small", 384, 16, "dino_deitsmall16"),
    "dino_vitb8": _dino("base", 768, 8, "dino_vitbase8"),
    "dino_vitb16": _dino("base", 768, 16, "dino_vitbase16"),
    "dinov2_vits14": _dinov2("small", 384),
    "dinov2_vitb14": _dinov2("base", 768),
    "dinov3_vits16": _dinov3("small", 384),
    "dinov3_vitb16": _dinov3("base", 768),
}


@dataclass(frozen=True)
class Extractor:
    """Turns photos into patch features. All extractors share one grid: ceil(side / 8) patches along a side.

    The features of a photo are, to the last bit, those of the first place in a forward pass over nothing but copies of
    it. So they do not depend on what else is described with it. Different photos share a pass where a trial has shown
    that every place gives the same bits, which is a matter of the device and the shape (docs/decisions/005).
    """

    name: str
    patch_size: int  # pixels of the resized photo
    dim: int
    # uint8 [B, H', W', 3] -> float32 [B, N, dim], one forward pass; B is always `photos_at_once`
    describe: Callable[[np.ndarray], np.ndarray]
    batch_size: int = 1
    # shape [H', W', 3] -> whether every place gives the same bits, as far as that was tried
    _trials: dict[tuple[int, ...], bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def photos_at_once(self, patches: int) -> int:
        """Photos of so many patches in every forward pass: see `photos_at_once`."""
        return photos_at_once(self.batch_size, patches)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches for a photo of that many pixels."""
        new_height, new_width = network_size(height, width, self.patch_size)
        return new_height // self.patch_size, new_width // self.patch_size

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H', W', 3]: a photo, uint8 [H, W, 3] RGB, at the size that the network takes; see `prepare`."""
        return prepare(image, self.patch_size)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Features of prepared photos of one size: uint8 [B, H', W', 3] -> float32 [B, N, dim], patches row-major."""
        assert batch.dtype == np.uint8, batch.dtype
        assert batch.ndim == 4, batch.shape
        assert batch.shape[1] % self.patch_size == batch.shape[2] % self.patch_size == 0, batch.shape
        patches = (batch.shape[1] // self.patch_size) * (batch.shape[2] // self.patch_size)
        count = self.photos_at_once(patches)
        step = count if len(batch) > 1 and self._may_share(batch[0], count) else 1
        groups = [batch[start : start + step] for start in range(0, len(batch), step)]
        found = [self.describe(filled_up(group, count))[: len(group)] for group in groups]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _may_share(self, photo: np.ndarray, count: int) -> bool:
        """Whether a photo of this shape has the same features at all `count` places, tried with `photo`."""
        if count == 1:
            return False
        if photo.shape not in self._trials:
            bits = self.describe(filled_up(photo[None], count)).view(np.int32)
            self._trials[photo.shape] = bool((bits == bits[:1]).all())
            if not self._trials[photo.shape]:
                logging.getLogger(__name__).warning(
                    "features.batch_size=%d: at %dx%d pixels the place in a batch decides the last bits on this "
                    "device; such photos are described one at a time, which is slow",
                    *(count, *photo.shape[:2]),
                )
        return self._trials[photo.shape]


def photos_at_once(batch_size: int, patches: int) -> int:
    """Photos of so many patches in a forward pass: `batch_size`, or fewer where they are large."""
    return max(1, min(batch_size, BATCH_PATCHES // patches))


def network_size(height: int, width: int, patch: int) -> tuple[int, int]:
    """The size in pixels that `prepare` resizes to: side * patch / 8, rounded, then the next multiple of the patch.

    For patch 8 this is the paper's rule, h + p - (h mod p) where p does not divide h. For others the official MIS code
    enlarges the photo first, so that the grid stays that of patch 8: 500x375 pixels are 63x47 patches.
    """
    scaled = (round(side * patch / GRID_PIXELS) for side in (height, width))
    new_height, new_width = (-(-side // patch) * patch for side in scaled)
    return new_height, new_width


def prepare(image: np.ndarray, patch: int) -> np.ndarray:
    """The photo, uint8 [H, W, 3] RGB, resized to `network_size` (Pillow's bicubic on 8 bits, as upstream)."""
    height, width = network_size(image.shape[0], image.shape[1], patch)
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def filled_up(photos: np.ndarray, count: int) -> np.ndarray:
    """uint8 [count, H, W, 3]: `photos`, at most as many, and copies of the last one."""
    if len(photos) == count:
        return photos
    return np.concatenate([photos, np.repeat(photos[-1:], count - len(photos), axis=0)])


def patch_size(config: FeaturesConfig) -> int:
    """Pixels of the resized photo along a side of a patch."""
    return GRID_PIXELS if config.extractor == WITHOUT_WEIGHTS else BACKBONES[config.extractor].patch


def build_extractor(config: FeaturesConfig, device: str = "cpu") -> Extractor:
    """The extractor that `config` names, its weights loaded onto `device` ("cpu", "cuda", "cuda:1").

    Raises ValueError for weights that cannot be had, are damaged, or belong to another network. The weightless
    extractor has no network and ignores weights, position_resize, layer, precision, batch_size and device.
    """
    if config.extractor == WITHOUT_WEIGHTS:
        from mis_platform.model import color_texture

        return Extractor(
            config.extractor,
            color_texture.PATCH,
            color_texture.DIM,
            lambda batch: color_texture.describe(batch[0])[None],
        )
    path = weights_file(config)  # before torch is imported: what is missing is said at once
    from mis_platform.model import backbones

    backbone = BACKBONES[config.extractor]
    describe = backbones.load(config, backbone, path, device)
    return Extractor(config.extractor, backbone.patch, backbone.dim, describe, config.batch_size)


def weights_file(config: FeaturesConfig) -> Path:
    """Where the weights of a network extractor are: features.weights, or timm's file in the hub's cache (sha256:HEX: if
    that is its digest).

    Of a folder, the file that is called as the extractor (.safetensors or .pth) or as its authors call it: extractors
    that are compared have one setting in common.

    Downloads timm's file if it is missing. Raises, within seconds, DataError for a features.weights that is not there
    and ValueError for weights that the hub cannot give; both say how to get them.
    """
    backbone, pin = BACKBONES[config.extractor], hub.pin_of(config.weights)
    if config.weights is not None and pin is None:
        path = Path(config.weights)
        names = [f"{config.extractor}.safetensors", f"{config.extractor}.pth", backbone.original.rpartition("/")[2]]
        found = [file for file in ((path / name for name in names) if path.is_dir() else [path]) if file.is_file()]
        if not found:
            where = f"{path} (or {', '.join(names)} in it)" if path.is_dir() else path
            raise DataError(f"features.weights: there is no file at {where}. {_how_to_get(backbone)}")
        return found[0]
    try:
        return hub.fetch(backbone.repository, _HUB_FILE, pin)
    except ConnectionError as error:
        raise ValueError(
            f"no weights for features.extractor={config.extractor}: {error}. {_how_to_get(backbone)}"
        ) from None


def _how_to_get(backbone: Backbone) -> str:
    return (
        f"Download {backbone.original} (or {_HUB_FILE} of {backbone.repository}) and give its path with "
        f"--set features.weights=PATH; or use --set features.extractor={WITHOUT_WEIGHTS}, which needs no weights"
    )


def features_identity(config: FeaturesConfig) -> dict[str, Any]:
    """What decides the features of a photo: the settings, with the content of the weights in place of their path.

    The weightless extractor ignores all others, which count as their defaults: rows that differ in them alone share
    their trees. Raises as `weights_file`.
    """
    read = FeaturesConfig(extractor=WITHOUT_WEIGHTS) if config.extractor == WITHOUT_WEIGHTS else config
    return plain(read) | {"weights": weights_digest(config)}


def hub_file(config: FeaturesConfig) -> str | None:
    """REPOSITORY/FILE of the hub that the features are made with; None where they need none, or are given a path."""
    is_ours = config.weights is None or hub.pin_of(config.weights) is not None
    if config.extractor == WITHOUT_WEIGHTS or not is_ours:
        return None
    return f"{BACKBONES[config.extractor].repository}/{_HUB_FILE}"


def weights_digest(config: FeaturesConfig) -> str:
    """SHA-256 of the weights file in hexadecimal, "none" for the weightless extractor. Raises as `weights_file`."""
    if config.extractor == WITHOUT_WEIGHTS:
        return "none"
    with weights_file(config).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
