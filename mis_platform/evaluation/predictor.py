"""The model in a notebook: set a photo, click, look, undo."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mis_platform.config import EvalConfig
from mis_platform.evaluation.brs import FeatureRefinement
from mis_platform.evaluation.session import Network, Session, advance, probability, upload
from mis_platform.model.weights import CONFIG_FILE, WEIGHTS_FILE, eval_config, load_model, read_config, set_zoom_size
from mis_platform.saved_models import find_model
from mis_platform.simulation.clicks import Click
from mis_platform.storage import Storage


class Prediction(NamedTuple):
    """The model's answer to all clicks so far."""

    mask: np.ndarray  # bool [H, W]
    probability: np.ndarray  # float32 [H, W] in [0, 1]; 0 outside the zoom-in window


class Predictor:
    """Interactive segmentation of one photo at a time, exactly as the click protocol runs it.

        predictor = Predictor.from_pretrained("artifacts/checkpoint/...")  # or a fingerprint, or an MLflow run
        predictor.set_image(image)
        mask, probability = predictor.click(y=120, x=200)
        mask, probability = predictor.click(y=40, x=30, positive=False)
        mask, probability = predictor.undo()

    Every state since `set_image` is kept for `undo`: one map at network size (0.8 MB at 448 pixels) per click.
    """

    def __init__(
        self,
        network: Network,
        *,
        zoom_size: int = 448,
        config: EvalConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """network: in eval mode on `device`; zoom_size: side of its input in pixels; config: default the paper's."""
        if getattr(network, "training", False):
            raise ValueError("the network is in training mode; call network.eval() first")
        self._network = network
        self._zoom_size = zoom_size
        self._config = config or EvalConfig()
        self._device = device
        self._states: list[Session] = []  # before the first click, after the first, ...

    @classmethod
    def from_pretrained(
        cls,
        path_or_run: str | Path,
        device: torch.device | str = "cpu",
        *,
        zoom_size: int | None = None,
        config: EvalConfig | None = None,
    ) -> "Predictor":
        """From a saved model, under the protocol of its family (the paper's if trained here) unless told otherwise.

        path_or_run: a directory with model.safetensors and config.json, here or in an object store; the first digits of
        the fingerprint of a training under MIS_ROOT (default ./artifacts), or "latest"; the id of an MLflow run, or the
        first digits of its fingerprint, in the store of that root or at MLFLOW_TRACKING_URI. zoom_size: pixels, default
        the size of its training. Raises ValueError if there is no such model, StorageError (an OSError) if its store
        cannot be reached.
        """
        root = Storage(os.environ.get("MIS_ROOT") or "artifacts")
        with find_model(root, str(path_or_run)).on_disk((CONFIG_FILE, WEIGHTS_FILE)) as directory:
            described = read_config(directory)
            size = described["image_size"]
            zoom_size = zoom_size or (size if isinstance(size, int) else size[0])
            network = load_network(directory, zoom_size, device)
        return cls(network, zoom_size=zoom_size, config=config or eval_config(described), device=device)

    @property
    def clicks(self) -> tuple[Click, ...]:
        """The clicks made on this photo and not undone."""
        return self._state().clicks

    def set_image(self, image: np.ndarray) -> None:
        """Start on a new photo, uint8 [H, W, 3] RGB. Raises ValueError for anything else."""
        self._states = [Session(upload(image, self._device))]

    def click(self, y: float, x: float, positive: bool = True) -> Prediction:
        """Click at row y and column x, in pixels from the top left; positive=False for "this is not the object".

        Raises ValueError for a click outside the photo and RuntimeError before `set_image`.
        """
        state = self._state()
        for name, value, length in (("y", y, state.height), ("x", x, state.width)):
            if not math.isfinite(value) or not 0 <= value < length:
                raise ValueError(f"{name} must lie in [0, {length}) on this photo, not {value}")
        click = Click(float(y), float(x), bool(positive))
        self._states += advance(self._network, [state], [click], self._config, self._zoom_size)
        return self._prediction()

    def undo(self) -> Prediction:
        """Take the last click back, with everything it changed. Raises RuntimeError if there is none."""
        if not self._state().clicks:
            raise RuntimeError("there is no click to undo; call click(y, x) first")
        self._states.pop()
        return self._prediction()

    def reset(self) -> None:
        """Forget all clicks and keep the photo. Raises RuntimeError before `set_image`."""
        self._state()
        del self._states[1:]

    def _state(self) -> Session:
        if not self._states:
            raise RuntimeError("there is no image yet; call set_image(image) first")
        return self._states[-1]

    def _prediction(self) -> Prediction:
        soft = probability(self._state()).cpu().numpy()
        return Prediction(soft > self._config.threshold, soft)


def load_network(directory: str | Path, zoom_size: int, device: torch.device | str = "cpu") -> Network:
    """The saved model, set up for crops of `zoom_size` pixels, with the refinement that its configuration asks for.

    Raises ValueError if it cannot be loaded.
    """
    model = load_model(directory)
    set_zoom_size(model, zoom_size)
    network: Network = model.to(device)
    return FeatureRefinement(model) if read_config(directory).get("refine") == "fbrs" else network
