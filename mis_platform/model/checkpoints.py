"""Official checkpoints of SimpleClick, MIS and RITM, read without running anything in them.

Such a file pickles Python objects beside its weights, so `torch.load` either runs what the file says or refuses it.
Here the pickle is *read*, not loaded: `pickletools` names its instructions one by one, and a small stack machine
follows them with plain values only. It imports no module and calls nothing that the file names. A tensor is a
description (storage, shape, strides) until its name and shape have been checked, every other object an inert
placeholder, and a name outside the short lists below ends the reading: a file that needs one is no checkpoint of these
models.

Formats: torch's zip archive (since 1.6) and its older stream of pickles followed by raw storages.
"""

import contextlib
import functools
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from mis_platform.model.simpleclick import VARIANTS
from mis_platform.model.weights import (
    FAMILIES,
    WEIGHTS_FILE,
    check_layout,
    check_refinement,
    check_values,
    empty_model,
    licence_of,
    save_model,
)

PICKLE_BYTES = 2**24  # of structure: a hundred times that of the largest official file
INTEGER_BYTES = 16  # of a pickled integer; torch's magic number has 10
MAX_AXES = 8  # of a tensor
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

# How each family is asked for its published numbers (the evaluation scripts of the three projects).
_ZOOM = {"flip": True, "zoom_expansion": 1.4, "zoom_min_crop": 200, "zoom_recompute_iou": 0.5}
SIMPLECLICK_EVAL: dict[str, Any] = {
    "threshold": 0.49,
    "zoom_size": 448,
    "davis_zoom_size": 672,
    "zoom_skip_clicks": -1,
    **_ZOOM,
}
MIS_EVAL: dict[str, Any] = {**SIMPLECLICK_EVAL, "threshold": 0.5}
RITM_EVAL: dict[str, Any] = {
    "threshold": 0.49,
    "zoom_size": 400,
    "davis_zoom_size": 600,
    "zoom_skip_clicks": 1,
    **_ZOOM,
}


def import_checkpoint(path: str | Path, directory: str | Path, refine: str | None = None) -> dict[str, Any]:
    """Write the model in the official checkpoint `path` into `directory`, in our format; returns its configuration.

    The configuration names the family ("simpleclick", also for MIS, or "ritm"), variant, input size (pixels) and, as
    `eval`, the settings of EvalConfig behind the family's published numbers. refine: "fbrs", for RITM, makes the model
    one that is refined by f-BRS-B at every click. Nothing is written unless the whole file is right.
    Raises ValueError for a file that is missing, damaged, no such checkpoint, or names Python objects that have no
    place in one, and for the first tensor of a wrong shape or type, unknown, missing or not finite, by its name; and
    if `directory` already holds a model, or cannot be made.
    """
    path, directory = Path(path), Path(directory)
    _check_folder(directory)
    with _open(path) as source:
        described = _tensors(source.content, path)
        layout = {name: each.on_meta() for name, each in described.items()}
        family, variant, image_size = _recognise(layout, path)
        if refine is not None:
            check_refinement(refine, family, path)
        model = empty_model(family, variant, image_size)
        check_layout(layout, model, path)
        state = _read_tensors(described, source)
    check_values(state, path)
    model.load_state_dict(state, assign=True)
    class_name = _class_name(source.content)
    config = {
        "family": family,
        "eval": _eval_settings(family, class_name),
        "source": {"file": path.name, "class": class_name},
        **({"refine": refine} if refine else {}),
    }
    config["licence"] = licence_of(config)
    _make_folder(directory)
    save_model(directory, model, config)
    return {**config, "variant": variant, "image_size": image_size}


def _check_folder(directory: Path) -> None:
    """Raises ValueError for what is seen to be no place for a model before the checkpoint is read."""
    nearest = next(each for each in (directory, *directory.parents) if each.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file; a model is a folder of files, choose another directory")
    if (directory / WEIGHTS_FILE).exists():
        raise ValueError(f"{directory} already holds a model; choose another directory")


def _make_folder(directory: Path) -> None:
    """Raises ValueError where there can be none; a full disk or a lost one is no matter of the path and stays."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"{directory}: no folder can be made there ({error.strerror}); choose another one") from None


def _eval_settings(family: str, class_name: str | None) -> dict[str, Any]:
    if family == "ritm":
        return RITM_EVAL
    return MIS_EVAL if class_name is not None and class_name.startswith("mis.") else SIMPLECLICK_EVAL


# -- what the file is about ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StorageRef:
    """One run of numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read. offset and strides count elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises _Damaged unless there is at least one number and all of them lie in the storage."""
        numbers = (self.offset, *self.strides, *(side - 1 for side in self.shape if type(side) is int))
        is_shape = len(numbers) == 1 + 2 * len(self.shape) and len(self.shape) <= MAX_AXES
        if not is_shape or not all(type(each) is int and each >= 0 for each in numbers):
            raise _Damaged("a tensor without a proper shape")
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides))
        size = math.prod(self.shape)
        if last >= self.storage.numel or size > self.storage.numel:
            raise _Damaged(f"a tensor of shape {self.shape} in a storage of {self.storage.numel} numbers")

    def on_meta(self) -> Tensor:
        """A contiguous tensor of the same shape and dtype without numbers, to check layouts with."""
        return torch.empty(self.shape, dtype=self.storage.dtype, device="meta")


def _tensors(content: Any, path: Path) -> dict[str, TensorRef]:
    """The tensors by name, without the "module." that multi-GPU training puts before all of them."""
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no state_dict (tensors by name)")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise ValueError(f"{path}: {_short(name)} in its state_dict is no tensor")
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _class_name(content: Any) -> str | None:
    """The class the file says it is, such as isegm.model.is_hrnet_model.HRNetModel."""
    config = content.get("config") if isinstance(content, dict) else None
    name = config.get("class") if isinstance(config, dict) else None
    return name if isinstance(name, str) and len(name) <= 200 else None


def _recognise(layout: Mapping[str, Tensor], path: Path) -> tuple[str, str, int]:
    """(family, variant, input size in pixels): the variant with which most tensors agree."""
    if "patch_embed_coords.proj.weight" in layout:
        family = "simpleclick"
    elif "feature_extractor.cls_head.weight" in layout and "maps_transform.0.weight" in layout:
        family = "ritm"
    else:
        first = ", ".join(map(_short, sorted(layout)[:3]))
        raise ValueError(
            f"{path} is no checkpoint that can be imported: SimpleClick and MIS (ViT-B, L, H, xT) and RITM (HRNet-18s, "
            f"18, 32 with OCR) can; its tensors are {first}, ..."
        )
    variant = max(FAMILIES[family], key=lambda each: _agreement(layout, family, each))
    return family, variant, RITM_EVAL["zoom_size"] if family == "ritm" else _vit_size(layout, variant)


def _agreement(layout: Mapping[str, Tensor], family: str, variant: str) -> int:
    """Tensors with name and shape of this variant, less those it lacks or has too many."""
    expected = _expected(family, variant)
    same = sum(name in layout and layout[name].shape == tensor.shape for name, tensor in expected.items())
    return same - len(expected.keys() ^ layout.keys())


@functools.cache
def _expected(family: str, variant: str) -> dict[str, Tensor]:
    return empty_model(family, variant, RITM_EVAL["zoom_size"] if family == "ritm" else 448).state_dict()


def _vit_size(layout: Mapping[str, Tensor], variant: str) -> int:
    """Side of the input that the position embedding is for; 448, every official model's, if that cannot be told."""
    position = layout.get("backbone.pos_embed")
    patches = position.shape[1] - 1 if position is not None and position.ndim == 3 else 0
    side = math.isqrt(max(patches, 0))
    size = side * VARIANTS[variant].patch
    return size if side * side == patches and 0 < size <= 224 * 16 and size % 224 == 0 else 448


def _read_tensors(described: Mapping[str, TensorRef], source: "Source") -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    storages: dict[str, Tensor] = {}
    for name, each in described.items():
        ref = each.storage
        if ref.key not in storages:
            # A bytearray, because torch does not want tensors of memory that must not be written.
            storages[ref.key] = torch.frombuffer(bytearray(source.read(ref)), dtype=ref.dtype)
        state[name] = storages[ref.key].as_strided(each.shape, each.strides, each.offset).contiguous()
    return state


# -- containers ------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """A file whose structure has been read."""

    content: Any

    def read(self, storage: StorageRef) -> bytes:
        """All bytes of a storage. Raises Refused or _Damaged where they are not as they should be."""


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Source]:
    """Raises ValueError for anything that is not a whole checkpoint; errors while reading storages too."""
    if not path.is_file():
        raise ValueError(f"there is no checkpoint file at {path}")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            yield ZipSource(file) if is_zip else LegacySource(file)
    except Refused as error:
        raise ValueError(f"{path} was refused, and nothing in it was run: {error}") from None
    except _Damaged as error:
        raise ValueError(f"{path} is damaged or no torch checkpoint: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


class ZipSource:
    """`NAME/data.pkl` with the structure, `NAME/data/KEY` with the storages, none of them compressed."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            self.archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise _Damaged(str(error)) from None
        names = [name for name in self.archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise _Damaged(f"{len(names)} files called data.pkl in the archive")
        self.prefix = names[0].removesuffix("data.pkl")
        if self.prefix + "byteorder" in self.archive.namelist():
            _check_little(self._entry("byteorder", 6) == b"little")
        machine = Machine()
        self.content = machine.run(BytesIO(self._entry("data.pkl", PICKLE_BYTES)))
        file.seek(0, 2)
        if sum(each.nbytes for each in machine.storages.values()) > file.tell():
            raise _Damaged("its storages are larger than the file")

    def read(self, storage: StorageRef) -> bytes:
        """As `Source.read`: the entry of that name."""
        content = self._entry(f"data/{storage.key}", storage.nbytes)
        if len(content) != storage.nbytes:
            raise _Damaged(f"storage {_short(storage.key)} has {len(content)} bytes instead of {storage.nbytes}")
        return content

    def _entry(self, name: str, limit: int) -> bytes:
        try:
            entry = self.archive.getinfo(self.prefix + name)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
                raise Refused(f"{_short(name)} is compressed or larger than {limit} bytes")
            return self.archive.read(entry)
        except KeyError:
            raise _Damaged(f"{_short(name)} is missing in the archive") from None
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
            raise _Damaged(str(error)) from None


class LegacySource:
    """Pickles of a magic number, a version, the system, the structure and the storages' keys; then the storages."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        head = BytesIO(file.read(PICKLE_BYTES))
        if Machine().run(head) != LEGACY_MAGIC or Machine().run(head) != LEGACY_PROTOCOL:
            raise _Damaged("it does not begin as torch files do")
        system = Machine().run(head)
        _check_little(isinstance(system, dict) and system.get("little_endian") is True)
        machine = Machine()
        self.content = machine.run(head)
        keys = Machine().run(head)
        self.starts = self._locate(keys, machine.storages, head.tell())

    def _locate(self, keys: Any, storages: Mapping[str, StorageRef], position: int) -> dict[str, int]:
        """Key -> place in the file; each storage is preceded by its length."""
        end = self.file.seek(0, 2)
        starts: dict[str, int] = {}
        for key in keys if isinstance(keys, list) else []:
            if not isinstance(key, str) or key not in storages:
                raise _Damaged(f"a storage {_short(key)} that no tensor mentions")
            self.file.seek(position)
            numel = int.from_bytes(self.file.read(8), "little")
            starts[key], position = position + 8, position + 8 + storages[key].nbytes
            if numel != storages[key].numel or position > end:
                raise _Damaged(f"storage {_short(key)} is not whole")
        if missing := storages.keys() - starts.keys():
            raise _Damaged(f"storage {_short(min(missing))} is missing")
        return starts

    def read(self, storage: StorageRef) -> bytes:
        """As `Source.read`: from the place that the keys told."""
        self.file.seek(self.starts[storage.key])
        return self.file.read(storage.nbytes)


def _check_little(is_little: bool) -> None:
    if not is_little:
        raise _Damaged("its numbers are not stored in little-endian order")


# -- pickles ---------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """The file asks for something that no checkpoint of these models needs."""


class _Damaged(Exception):
    """The file is not what it should be."""


class Global(NamedTuple):
    """A class or function that the file names. It is never looked up."""

    module: str
    name: str


@dataclass(frozen=True)
class Inert:
    """Stands for an object of the file; holds nothing and does nothing."""

    kind: Global


_BUILTINS = {
    *("set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "bytearray", "complex"),
    *("object", "slice", "range"),
}
_DTYPES = {"float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool"}
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What a file may name beside the classes of these projects.
_KNOWN = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch", name) for name in (*_STORAGES, *_DTYPES)),
    *((module, name) for module in ("builtins", "__builtin__") for name in _BUILTINS),
    *((module, "_reconstructor") for module in ("copyreg", "copy_reg")),
    *((module, "scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
_PROJECTS = ("isegm", "mis")  # the packages of RITM and SimpleClick, and of MIS

_MARK = object()
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


@dataclass
class Machine:
    """The stack machine that a pickle is a program for, without any way to call or import."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, StorageRef] = field(default_factory=dict)

    def run(self, file: BinaryIO) -> Any:
        """The value of the next pickle in `file`, which is left behind it. Raises Refused or _Damaged."""
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except (Refused, _Damaged):
            raise
        except Exception as error:  # a pickle that is none can fail in any way; it has done nothing
            raise _Damaged(f"{type(error).__name__}: {str(error)[:100]}") from None
        raise _Damaged("a pickle without an end")

    def _step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > 8 * INTEGER_BYTES:
                raise Refused(f"an integer of {argument.bit_length()} bits")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"the pickle instruction {name}")

    def since_mark(self) -> list[Any]:
        """What is above the last mark; both are taken off the stack."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise _Damaged("an unmatched mark")

    def pop(self, count: int) -> list[Any]:
        """The `count` topmost values, lowest first."""
        if len(self.stack) < count or any(each is _MARK for each in self.stack[len(self.stack) - count :]):
            raise _Damaged("too few values")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def extend(self, items: Sequence[Any]) -> None:
        """Append to the list on top; placeholders ignore it."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def update(self, items: Sequence[Any]) -> None:
        """Set keys and values, in turn, in the dict on top; placeholders ignore it."""
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_pairs(items))

    def remember(self, place: int | None) -> None:
        """Note the value on top of the stack under a number, the next free one for None."""
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def named(self, module: Any, name: Any) -> None:
        """A name, if it may be there at all."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Damaged("a name that is no text")
        if (module, name) not in _KNOWN and module.partition(".")[0] not in _PROJECTS:
            called = _short(f"{module}.{name}")
            raise Refused(f"it names {called}, which has no place beside weights and could run code")
        self.push(Global(module, name))

    def build(self, kind: Any, arguments: Any) -> None:
        """What stands for kind(*arguments)."""
        if not isinstance(kind, Global) or not isinstance(arguments, tuple):
            raise _Damaged("an object without a class")
        self.push(_VALUES[kind](*arguments) if kind in _VALUES else Inert(kind))

    def storage(self, identity: Any) -> None:
        """A storage, from what torch writes in its place: ("storage", type, key, device, length).

        The older format also writes ("module", class, file, source) in place of a class of networks.
        """
        if identity[0] == "module" and isinstance(identity[1], Global):
            return self.push(identity[1])
        tag, kind, key, _, numel, *view = identity
        dtype = _STORAGES.get(kind.name) if isinstance(kind, Global) and kind.module == "torch" else None
        if tag != "storage" or dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise _Damaged("a storage that is none of torch's")
        if any(each is not None for each in view):
            raise Refused("storages that are parts of others (torch 0.3)")
        ref = StorageRef(key, dtype, numel)
        if self.storages.setdefault(key, ref) != ref:
            raise _Damaged(f"storage {_short(key)} in two types")
        return self.push(ref)


def _pairs(items: Sequence[Any]) -> dict[Any, Any]:
    """Keys and values in turn. Keys are text or numbers: hashing nested tuples can take for ever."""
    keys, values = items[::2], items[1::2]
    if len(keys) != len(values) or not all(isinstance(key, str | int | float | None) for key in keys):
        raise _Damaged("a dict with keys that are neither text nor numbers")
    return dict(zip(keys, values))


def _short(text: Any) -> str:
    """A name from the file, for an error message."""
    return repr(text[:80]) if isinstance(text, str) else f"a {type(text).__name__}"


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise _Damaged("a tensor without a storage")
    return TensorRef(storage, offset, shape, strides)


# What stands for a call, for the few that make data.
_VALUES: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
}


def _inert(machine: Machine, _: Any) -> None:
    machine.push(Inert(Global("builtins", "set")))


def _frozenset(machine: Machine, _: Any) -> None:
    machine.since_mark()
    _inert(machine, None)


def _object(machine: Machine, _: Any) -> None:
    """A class and its arguments, above a mark."""
    kind, *arguments = machine.since_mark()
    machine.build(kind, tuple(arguments))


def _instance(machine: Machine, names: str) -> None:
    """As `_object`, with the class in the instruction."""
    arguments = tuple(machine.since_mark())
    machine.named(*names.split(" ", 1))
    machine.build(machine.pop(1)[0], arguments)


_ACTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, place: machine.push(machine.memo[place])),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": _inert,
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "DICT": lambda machine, _: machine.push(_pairs(machine.since_mark())),
    "FROZENSET": _frozenset,
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.since_mark(),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "GLOBAL": lambda machine, names: machine.named(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.named(*machine.pop(2)),
    "REDUCE": lambda machine, _: machine.build(*machine.pop(2)),
    "NEWOBJ": lambda machine, _: machine.build(*machine.pop(2)),
    "NEWOBJ_EX": lambda machine, _: machine.build(*machine.pop(3)[:2]),
    "BUILD": lambda machine, _: machine.pop(1),  # an object's attributes: nothing here has any
    "OBJ": _object,
    "INST": _instance,
    "BINPERSID": lambda machine, _: machine.storage(*machine.pop(1)),
}
