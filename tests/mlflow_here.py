"""MLflow's own server in a thread of this process, on the loopback address: there within a second, whenever wanted."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from mlflow.server import app, handlers
from werkzeug.serving import make_server


@contextlib.contextmanager
def serving(database: Path, port: int) -> Iterator[None]:
    """The store in an SQLite file at http://127.0.0.1:PORT; its artifacts go beside the file."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    before = os.environ.get("MLFLOW_TRACKING_URI")
    handlers._tracking_store = None
    handlers._get_tracking_store(f"sqlite:///{database}", str(database.with_name("artifacts")))
    if before is None:  # the server has set it to its own store
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before
    server = make_server("127.0.0.1", port, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
        handlers._tracking_store = None
