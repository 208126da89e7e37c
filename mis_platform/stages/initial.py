"""The untrained model as an artifact, so that it is scored like any other."""

import tempfile
from pathlib import Path

from mis_platform.artifacts import Output, Part, sha256
from mis_platform.config import Run, plain
from mis_platform.model.weights import CONFIG_FILE, WEIGHTS_FILE, save_model
from mis_platform.stages.training_loop import initial_model
from mis_platform.storage import Storage

VERSION = 1


def write_initial_model(run: Run, out: Storage) -> Output:
    """The model of `run` as it is before the first training step: model.safetensors and config.json in `out`."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, initial_model(run), {"run": plain(run)})
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            data = (Path(folder) / name).read_bytes()
            out.write_bytes(name, data)
            parts.append(Part(name=name, rows=1, bytes=len(data), sha256=sha256(data), digest=sha256(data)))
    return Output(parts=tuple(parts), digest=parts[0].digest)
