"""A real MLflow server on the loopback address, and a proxy before it that is slow, answers errors, or is away."""

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SECONDS_TO_START = 90


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The address of a server that keeps its runs in SQLite and its artifacts below `folder`."""
    port = free_port()
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    words += ["--artifacts-destination", str(folder / "server-artifacts")]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        _wait_until_healthy(server, f"http://127.0.0.1:{port}", folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=15)


def _wait_until_healthy(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < SECONDS_TO_START:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(f"no MLflow server after {SECONDS_TO_START} s: {log.read_text()}")


class FaultyProxy:
    """Passes requests on to `upstream`; its attributes may be changed while it runs.

    down: connections are cut without an answer. delay: seconds before a request is passed on. failing: share of the
    requests that are answered with 500 or 429, half of them after they were passed on: then the server has done what
    was asked, and its answer is lost.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.down = False
        self.delay = 0.0
        self.failing = 0.0
        self.requests = self.refused = self.lost = 0
        self._host = upstream.removeprefix("http://")
        self._random = random.Random(seed)
        self._guard = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _fate(self) -> str:
        with self._guard:
            self.requests += 1
            if self._random.random() >= self.failing:
                return "pass"
            fate = self._random.choice(("refuse", "lose"))
            self.refused += fate == "refuse"
            self.lost += fate == "lose"
            return fate

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.down:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                time.sleep(proxy.delay)
                fate = proxy._fate()
                status, kind, content = (500, "text/plain", b"") if fate == "refuse" else self.ask(body)
                if fate != "pass":
                    status, kind, content = proxy._random.choice((500, 429)), "text/plain", b"out of order"
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def ask(self, body: bytes) -> tuple[int, str, bytes]:
                connection = http.client.HTTPConnection(proxy._host, timeout=30)
                headers = {name: value for name, value in self.headers.items() if name != "Host"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                found = answer.status, answer.headers.get("Content-Type", "application/json"), answer.read()
                connection.close()
                return found

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = pass_on

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
