"""A child process that decodes photos and masks of folders that nobody vouches for, and photos that may take long.

Decoders are C code, and a file can be made to crash them, to keep them busy, or to fill the memory. Here this process
only reads bytes; what they mean is found out by a child that may use 1.5 GiB of memory, 10 s of CPU and 60 s by the
clock for a file, that can open neither files nor connections, and that has nothing of our environment. A child that
dies or is late costs its one file, and the next file gets a new child.

Of folders that are trusted, only files whose decoding time has no low bound (see `images.read_picture`) go to such a
child; there, time alone is limited.

What comes back are the arrays and the refusals of `images` and `masks`, unchanged. It is no answer to a decoder that
runs foreign code: the child has its user's rights. A container is.
"""

import atexit
import functools
import json
import math
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from mis_platform.data import images, masks
from mis_platform.data.images import MAX_MEGAPIXELS, MIN_SIDE, ImageRefused, Picture, Reason
from mis_platform.data.masks import ObjectMask, Reader

START_SECONDS = 120.0
_READERS: dict[str, Reader] = {
    "read_binary": masks.read_binary,
    "read_union": masks.read_union,
    "read_palette": masks.read_palette,
    "read_palette_as_grey": masks.read_palette_as_grey,
    "read_sbd": masks.read_sbd,
}
_FIRST = "first"  # name of the pixels of a file with more frames or pages
_DTYPES = {"uint8", "int8", "int64"}
_LENGTH = struct.Struct("<I")  # of the JSON that a message begins with; the arrays or the file follow
_MESSAGE_BYTES, _BLOB_BYTES = 2**20, 2**32
_START = "import sys; sys.path[:] = sys.argv[2:]; from mis_platform.data.sandbox import serve; serve(int(sys.argv[1]))"

Message = dict[str, Any]
Named = tuple[str, np.ndarray]


class Limits(NamedTuple):
    """What a child may use for a file."""

    # Bytes, beside what it has when it starts, or no limit; 50 megapixels of any kind need 1.4 GiB at most.
    memory: int | None = 3 * 2**29
    cpu: int = 10  # seconds
    wall: float = 60.0  # seconds


TRUSTED = Limits(memory=None)  # data.max_megapixels is all that says how large photos of trusted folders may be


class Sandbox:
    """One child at a time, started when it is first needed. Threads may share it; they wait for each other."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.started = 0  # children so far
        self._child: _Child | None = None
        self._turn = threading.Lock()

    def read_image(
        self, source: str | Path | bytes, *, max_megapixels: float = MAX_MEGAPIXELS, min_side: int = MIN_SIDE
    ) -> np.ndarray:
        """As `images.read_image`."""
        return self.read_picture(source, max_megapixels=max_megapixels, min_side=min_side).pixels

    def read_picture(
        self, source: str | Path | bytes, *, max_megapixels: float = MAX_MEGAPIXELS, min_side: int = MIN_SIDE
    ) -> Picture:
        """As `images.read_picture`."""
        content = _content(source, images.file_limit(max_megapixels))
        question = {"do": "image", "max_megapixels": max_megapixels, "min_side": min_side}
        ((name, pixels),) = self._ask(question, content, lambda found: len(found) == 1 and _is_photo(found[0][1]))
        return Picture(pixels, name == _FIRST)

    def probe_size(
        self, source: str | Path | bytes, *, max_megapixels: float = MAX_MEGAPIXELS, min_side: int = MIN_SIDE
    ) -> tuple[int, int]:
        """As `images.probe_size`, but the whole file is read."""
        limit = images.file_limit(min(max_megapixels, MAX_MEGAPIXELS))
        question = {"do": "size", "max_megapixels": min(max_megapixels, 1e9), "min_side": min_side}  # JSON: no infinity
        content = _content(source, limit)
        ((_, size),) = self._ask(question, content, lambda found: len(found) == 1 and found[0][1].shape == (2,))
        return int(size[0]), int(size[1])

    def read_masks(self, reader: Reader, content: bytes, object_id: str) -> tuple[ObjectMask, ...]:
        """What `reader`, a function of `masks`, makes of the content of a file. Raises ValueError."""
        name = next(name for name, known in _READERS.items() if known is reader)
        question = {"do": name, "object_id": object_id}
        found = self._ask(question, content, lambda found: all(_is_mask(array) for _, array in found))
        return tuple(ObjectMask(*named) for named in found)

    def close(self) -> None:
        """End the child. The next question starts another."""
        with self._turn:
            self._end()

    def _ask(self, question: Message, content: bytes, is_answer: Callable[[list[Named]], bool]) -> list[Named]:
        """The named arrays of the answer. Raises ImageRefused or ValueError: the child's, or how it ended."""
        with self._turn:
            if self._child is None:
                self._child = _Child(self.limits)
                self.started += 1
            try:
                answer = self._child.ask(question, content)
                if isinstance(answer, list) and not is_answer(answer):
                    raise ValueError("no answer to this question")
            except (OSError, ValueError) as error:
                reason, message = self._end(is_late=isinstance(error, TimeoutError))
                raise ImageRefused(reason, message) from None
            except BaseException:  # Ctrl-C: what is left of this answer must not become the next one
                self._end()
                raise
            if isinstance(answer, ImageRefused) and answer.reason is Reason.MEMORY_LIMIT:
                self._end()  # with whatever it could not give back
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def _end(self, is_late: bool = False) -> tuple[Reason, str]:
        child, self._child = self._child, None
        return child.end(is_late) if child is not None else (Reason.DECODER_DIED, "it had ended")


@functools.cache
def shared(limits: Limits | None = None) -> Sandbox:
    """The sandbox of this process, one for each limits."""
    sandbox = Sandbox(limits)
    atexit.register(sandbox.close)
    return sandbox


class Trusting:
    """Decodes in this process, but for photos that may take long: those, in a child."""

    def read_image(self, source: str | Path | bytes, **limits: Any) -> np.ndarray:
        """As `images.read_image`."""
        return self.read_picture(source, **limits).pixels

    def read_picture(self, source: str | Path | bytes, **limits: Any) -> Picture:
        """As `images.read_picture`."""
        return images.read_picture(source, **limits, elsewhere=shared(TRUSTED))

    def probe_size(self, source: str | Path | bytes, **limits: Any) -> tuple[int, int]:
        """As `images.probe_size`."""
        return images.probe_size(source, **limits, elsewhere=shared(TRUSTED))


def decoder(untrusted: bool) -> Sandbox | Trusting:
    """Who reads photos for this process. No child is started before it is needed."""
    return shared() if untrusted else Trusting()


def _content(source: str | Path | bytes, limit: int) -> bytes:
    return source if isinstance(source, bytes) else images.read_file(source, limit)


# -- this side -------------------------------------------------------------------------------------------------------


class _Child:
    """A running child. Raises RuntimeError when it cannot be started: that is no fault of a file."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.connection, theirs = socket.socketpair()
        with theirs:
            handle = theirs.fileno()
            package = Path(__file__).resolve().parents[2]  # an editable install is not on the path
            paths = [str(package), *(path for path in sys.path if os.path.isabs(path))]
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, str(handle), *paths],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders complain there
                cwd="/",
                env=_environment(),
                pass_fds=(handle,),
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            _send(self.connection, {"limits": limits}, [], deadline)
            _receive(self.connection, deadline)  # it is ready
        except (OSError, ValueError) as error:
            _, how = self.end(is_late=isinstance(error, TimeoutError))
            raise RuntimeError(f"the decoding process did not start: {how}") from None

    def ask(self, question: Message, content: bytes) -> list[Named] | ValueError:
        """Named arrays, or what the child raised.

        Raises TimeoutError, another OSError when the child has died, ValueError for what is no answer.
        """
        deadline = time.monotonic() + self.limits.wall
        _send(self.connection, question, [content], deadline)
        answer, blobs = _receive(self.connection, deadline)
        if "refused" in answer:
            return ImageRefused(Reason(answer["refused"]), str(answer.get("message")))
        if "error" in answer:
            return ValueError(str(answer["error"]))
        described = answer.get("arrays")
        if not isinstance(described, list) or not all(isinstance(each, list) and len(each) == 3 for each in described):
            raise ValueError("no answer")
        return [_array(about, blob) for about, blob in zip(described, blobs, strict=True)]

    def end(self, is_late: bool) -> tuple[Reason, str]:
        """Reap it, and say how it ended."""
        self.connection.close()
        try:
            code = self.process.wait(0 if is_late else 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if is_late:
            return Reason.TIMEOUT, f"decoding took more than {self.limits.wall:g} s"
        if code == -signal.SIGXCPU:
            return Reason.TIMEOUT, f"decoding took more than {self.limits.cpu} s of CPU time"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Reason.DECODER_DIED, f"the decoding process died of this file ({how})"


def _environment() -> dict[str, str]:
    """Nothing of ours but where libraries lie: no secrets."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _is_photo(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3


def _is_mask(array: np.ndarray) -> bool:
    return array.dtype == np.int8 and array.ndim == 2


def _array(about: list[Any], blob: bytearray) -> Named:
    name, dtype, shape = about
    sides = shape if isinstance(shape, list) else [None]
    if dtype not in [*_DTYPES] or not all(type(side) is int for side in sides):
        raise ValueError("no array")
    return str(name), np.frombuffer(blob, dtype).reshape(shape)


# -- messages --------------------------------------------------------------------------------------------------------
# JSON with the lengths of the blobs that follow it. Both sides check what they get.


def _send(connection: socket.socket, message: Message, blobs: Sequence[Any], deadline: float) -> None:
    views = [memoryview(blob).cast("B") for blob in blobs]
    text = json.dumps({**message, "blobs": [view.nbytes for view in views]}).encode()
    connection.settimeout(_left(deadline))
    connection.sendall(_LENGTH.pack(len(text)) + text)
    for view in views:
        connection.settimeout(_left(deadline))
        connection.sendall(view)


def _receive(connection: socket.socket, deadline: float) -> tuple[Message, list[bytearray]]:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))
    if length > _MESSAGE_BYTES:
        raise ValueError("a message that is too long")
    message = json.loads(_exactly(connection, length, deadline))
    if not isinstance(message, dict) or not isinstance(lengths := message.get("blobs"), list):
        raise ValueError("no message")
    if not all(type(each) is int and each >= 0 for each in lengths) or sum(lengths) > _BLOB_BYTES:
        raise ValueError("a message of impossible length")
    return message, [_exactly(connection, each, deadline) for each in lengths]


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        connection.settimeout(_left(deadline))
        if not (more := connection.recv_into(view[got:])):
            raise ConnectionError("the other side is gone")
        got += more
    return data


def _left(deadline: float) -> float | None:
    if math.isinf(deadline):
        return None
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError("too late")
    return left


# -- the child's side ------------------------------------------------------------------------------------------------


def serve(handle: int) -> None:
    """Answer questions until the other side is gone. handle: file descriptor of the socket to it."""
    connection = socket.socket(fileno=handle)
    message, _ = _receive(connection, math.inf)
    limits = Limits(*message["limits"])
    Image.init()  # decoders are modules, and no file can be opened later
    np.unique([0])  # imports a module when it is first called
    cv2.setNumThreads(1)
    _confine(limits)
    _send(connection, {}, [], math.inf)
    while True:
        try:
            question, blobs = _receive(connection, math.inf)
        except ConnectionError:
            return
        _allow_cpu(limits.cpu)
        content = bytes(blobs.pop())
        answer, arrays = _answer(question, content)
        del content
        _send(connection, answer, [np.ascontiguousarray(array) for array in arrays], math.inf)


def _confine(limits: Limits) -> None:
    """Give up, for good, what decoding does not need."""
    statm = Path("/proc/self/statm")
    if limits.memory is not None and statm.exists():  # macOS has neither it nor a limit that holds
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + limits.memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # bytes of a file it could write
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # new files, sockets and pipes; open ones stay


def _allow_cpu(seconds: int) -> None:
    """From now on; the kernel ends the process with SIGXCPU after that."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, hard))


def _answer(question: Message, content: bytes) -> tuple[Message, list[np.ndarray]]:
    try:
        named = _decode(question, content)
    except ImageRefused as refusal:
        return {"refused": refusal.reason, "message": refusal.message}, []
    except ValueError as error:
        return {"error": str(error)[:1000]}, []
    except MemoryError:
        return {"refused": Reason.MEMORY_LIMIT, "message": "decoding needs more memory than one file may have"}, []
    arrays = [array for _, array in named]
    return {"arrays": [(name, str(array.dtype), array.shape) for name, array in named]}, arrays


def _decode(question: Message, content: bytes) -> list[Named]:
    what = question["do"]
    if what in _READERS:
        return [(each.object_id, each.mask) for each in _READERS[what](content, question["object_id"])]
    limits = {name: question[name] for name in ("max_megapixels", "min_side")}
    if what == "size":
        return [("size", np.array(images.probe_size(content, **limits), np.int64))]
    picture = images.read_picture(content, **limits)
    return [(_FIRST if picture.has_more else "pixels", picture.pixels)]
