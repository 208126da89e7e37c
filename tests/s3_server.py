"""A local S3 server, and a proxy before it that does what object stores do on bad days."""

import contextlib
import http.client
import random
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.etree import ElementTree

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"
ElementTree.register_namespace("", NAMESPACE.strip("{}"))  # S3's clients know its tags without a prefix only
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Faults:
    """Shares of requests in [0, 1], tried in this order for each request; times in seconds."""

    unavailable: float = 0.0  # 503 SlowDown, nothing is done
    dropped: float = 0.0  # the connection ends before an answer, nothing is done
    forgotten: float = 0.0  # the request is done, but the connection ends before the answer
    slow: float = 0.0  # answered after `delay`
    delay: float = 0.0
    listing_lag: float = 0.0  # new objects are missing from listings that long, and removed ones still there
    seed: int = 0
    is_down: bool = False  # 503 for everything
    seen: Counter[str] = field(default_factory=Counter)  # what happened how often, "requests" among it

    def __post_init__(self) -> None:
        self._random, self._guard = random.Random(self.seed), threading.Lock()
        self._changed: dict[str, tuple[float, bool]] = {}  # key -> when, and whether it was there before

    def next(self) -> str:
        with self._guard:
            self.seen["requests"] += 1
            fault = self._draw()
            self.seen[fault] += 1
        return fault

    def _draw(self) -> str:
        if self.is_down:
            return "unavailable"
        for name in ("unavailable", "dropped", "forgotten", "slow"):
            if self._random.random() < getattr(self, name):
                return name
        return "none"

    def note(self, key: str, is_there: bool) -> None:
        with self._guard:
            self._changed.setdefault(key, (time.monotonic(), not is_there))

    def lagging(self) -> dict[str, bool]:
        """Key -> whether a listing still shows it, for those that changed a short time ago."""
        with self._guard:
            young = time.monotonic() - self.listing_lag
            self._changed = {key: each for key, each in self._changed.items() if each[0] > young}
            return {key: before for key, (_, before) in self._changed.items()}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address, host:port, of an empty S3 with the bucket BUCKET; on the loopback address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        connection = http.client.HTTPConnection(host, port, timeout=30)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        connection.close()
        yield f"{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def faulty(address: str, faults: Faults) -> Iterator[str]:
    """The address of a proxy before the server at `address`."""

    class Handler(_Proxy):
        upstream, trouble = address, faults

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def uri(address: str, prefix: str = "root") -> str:
    return f"s3://{BUCKET}/{prefix}?scheme=http&endpoint_override={address}&region=us-east-1"


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    upstream: str
    trouble: Faults

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test has its own words."""

    def _answer(self) -> None:
        body = self._body()
        fault = self.trouble.next()
        if fault == "unavailable":
            return self._send(503, {"Content-Type": "application/xml"}, BUSY)
        if fault == "dropped":
            return self._hang_up()
        if fault == "slow":
            time.sleep(self.trouble.delay)
        status, headers, content = self._forward(body)
        if fault == "forgotten":
            return self._hang_up()
        return self._send(status, headers, content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return body

    def _hang_up(self) -> None:
        self.close_connection = True

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            kept = {name: text for name, text in self.headers.items() if name.lower() not in _HOPPING}
            connection.request(self.command, self.path, body, kept)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        headers = {name: text for name, text in response.getheaders() if name.lower() not in _OWN}
        if self.command == "HEAD":
            headers["Content-Length"] = response.getheader("Content-Length", "0")
        if self.trouble.listing_lag:
            content = self._outdated(content)
        return response.status, headers, content

    def _outdated(self, content: bytes) -> bytes:
        """What an eventually consistent store says: listings are behind, reads are not."""
        path, _, query = self.path.partition("?")
        key = urllib.parse.unquote(path).removeprefix(f"/{BUCKET}/")
        if self.command == "PUT" or (self.command == "POST" and "uploadId" in query):
            self.trouble.note(key, True)
        elif self.command == "DELETE":
            self.trouble.note(key, False)
        if self.command != "GET" or "list-type=2" not in query:
            return content
        lagging = self.trouble.lagging()
        root = ElementTree.fromstring(content)
        for each in root.findall(f"{NAMESPACE}Contents"):
            if not lagging.get(urllib.parse.unquote(each.findtext(f"{NAMESPACE}Key", "")), True):
                root.remove(each)
        return ElementTree.tostring(root)

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client did not wait
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            if self.command != "HEAD" or "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)


_HOPPING = {"connection", "transfer-encoding", "content-length", "expect"}
_OWN = {"content-length", "connection", "transfer-encoding", "date", "server"}  # set by this server
