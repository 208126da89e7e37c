"""Saved models by what people call them: a directory, a training's fingerprint, a run in MLflow."""

import re
from typing import Any

from mis_platform.artifacts import MANIFEST, read_manifest
from mis_platform.errors import DataError
from mis_platform.model.weights import CONFIG_FILE, WEIGHTS_FILE, parse_config
from mis_platform.storage import Storage

LATEST = "latest"
_RUN = re.compile(r"[0-9a-f]{4,64}")  # a run id, or the first digits of a run's fingerprint


def find_model(root: Storage, text: str) -> Storage:
    """The directory of a saved model: `text` itself, or that of a training below `root` or of a run in its MLflow.

    A training is called by the first digits of its fingerprint, or "latest"; a run by its id or the first digits of its
    fingerprint. A directory comes first, then trainings. Raises DataError, which lists the trainings, when nothing is
    called that, or more than one.
    """
    if text not in ("", LATEST) and Storage(text).exists(WEIGHTS_FILE):
        return Storage(text)
    shelf = root.child("checkpoint")
    finished = [name for name in shelf.names() if shelf.exists(f"{name}/{MANIFEST}")]
    if text == LATEST and finished:
        return shelf.child(max(finished, key=lambda name: _created(shelf.child(name))))
    matching = [name for name in finished if text and name.startswith(text)]
    if len(matching) == 1:
        return shelf.child(matching[0])
    about = [f"it is no directory with {WEIGHTS_FILE}"]
    if not matching and _RUN.fullmatch(text):
        try:
            return _of_run(root, text)
        except ValueError as error:
            about.append(str(error))
    about.append(f"the trainings in {shelf} are: {', '.join(finished) or 'none, `mis train` makes one'}")
    raise DataError(f"no single model is called {text!r}: {'; '.join(about)}")


def describe(model: Storage) -> dict[str, Any]:
    """The config.json of a saved model. Raises DataError if it is missing, ValueError as `weights.parse_config`."""
    try:
        content = model.read_bytes(CONFIG_FILE)
    except FileNotFoundError:
        raise DataError(f"{model} holds no model: {CONFIG_FILE} is missing") from None
    return parse_config(content, f"{model}/{CONFIG_FILE}")


def _of_run(root: Storage, text: str) -> Storage:
    """Raises ValueError when no run, or more than one, is called `text`, or its model is gone."""
    from mis_platform import tracking  # seconds, and MLflow, which a worker that loads a model has no use for

    directory = tracking.find_model(root, text)
    if not directory.exists(WEIGHTS_FILE):
        raise ValueError(f"the run {text} in MLflow has its model in {directory}, where there is none")
    return directory


def _created(directory: Storage) -> str:
    return str(read_manifest(directory)["information"]["created"])
