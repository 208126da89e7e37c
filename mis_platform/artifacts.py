"""Stages and their artifacts: what is done, what is missing, and the manifest that says so.

A stage is a function and a directory, `<root>/<stage>/<fingerprint>/`. The fingerprint covers the stage's own settings,
its inputs' fingerprints and a version that is raised by hand when the code starts to produce something else; nothing
else may decide the output. `manifest.json` is written last: a directory without one is unfinished.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

from mis_platform.config import PIN, differences, fingerprint, plain
from mis_platform.errors import DataError, FingerprintMismatch
from mis_platform.leases import hold
from mis_platform.storage import Storage

MANIFEST = "manifest.json"
CODE_FILE = ".code"  # beside the parts: the code of each attempt, a line each
EDITED = "+changes"  # behind the commit of source that was edited
DOWNLOADS = "downloads"  # directory below a root: the SHA-256 of what its artifacts read of the hub, a file each
REPAIR = "`mis verify` tells all that is wrong, and with --repair makes it again"
HASHED_BYTES = 2**30  # of an input: its checksums are looked at before a stage begins, up to a few seconds' worth
_TEXTS = ("stage", "fingerprint", "digest")  # of a manifest
PACKAGES = ("mis-platform", "ray", "torch", "timm", "numpy", "numba", "opencv-python-headless", "pillow", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of an artifact. digest: of its rows, whatever their order and grouping (see `combine_digests`)."""

    name: str
    rows: int
    bytes: int
    sha256: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a stage's function returns: its files, a digest of their content, and a few counts for people."""

    parts: tuple[Part, ...]
    digest: str
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One unit of work. `config`, `version` and the inputs decide its output; nothing else may."""

    name: str  # "trees", "checkpoint", "clicks/grabcut": also the directory
    version: int
    config: Any  # settings, or plain JSON values
    run: Callable[[dict[str, Storage], Storage], Output]  # run(inputs, out): where inputs lie, where to write
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    check: Callable[[], object] = lambda: None  # raises, within moments, what would end `run`: settings and weights
    # Files of the Hugging Face hub that it reads, REPOSITORY/FILE -> SHA-256: what `config` says by their content.
    downloads: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over `identity`: the name of its directory."""
        return fingerprint(self.identity())

    def identity(self) -> dict[str, Any]:
        """What the fingerprint covers, as plain JSON values."""
        return {
            "stage": self.name,
            "version": self.version,
            "config": plain(self.config),
            "inputs": {key: stage.fingerprint for key, stage in self.inputs.items()},
        }

    def directory(self, root: Storage) -> Storage:
        """Where its output lies below `root`, finished or not: NAME/FINGERPRINT."""
        return root.child(self.name, self.fingerprint)

    def is_done(self, root: Storage) -> bool:
        """Whether the manifest, which is written last, is there. Raises StorageError for a root that cannot be read."""
        return self.directory(root).exists(MANIFEST)


def walk(stage: Stage) -> Iterator[Stage]:
    """The stage and all that it needs, inputs first, each once."""
    seen: set[str] = set()

    def visit(current: Stage) -> Iterator[Stage]:
        if current.fingerprint in seen:
            return
        seen.add(current.fingerprint)
        for needed in current.inputs.values():
            yield from visit(needed)
        yield current

    return visit(stage)


def missing(stage: Stage, root: Storage) -> Iterator[Stage]:
    """What `ensure` would run, inputs first; one that several need may come several times."""
    if not stage.is_done(root):
        for needed in stage.inputs.values():
            yield from missing(needed, root)
        yield stage


def check_missing(stage: Stage, root: Storage) -> None:
    """Raise what would end one of the stages that `ensure` would run, before any of them has run for hours."""
    for each in missing(stage, root):
        each.check()
        check_downloads(each, root)


def ensure(stage: Stage, root: Storage) -> Storage:
    """The directory of the finished stage; runs it, and what it reads, only if missing.

    Raises FingerprintMismatch when a manifest there was made with other settings, StorageError when another process is
    at work on the same artifact or took it over, DataError when an input is damaged.
    """
    out = stage.directory(root)
    if out.exists(MANIFEST):
        check_identity(stage, read_manifest(out))
        return out
    inputs = {key: ensure(needed, root) for key, needed in stage.inputs.items()}
    check_downloads(stage, root, remember=True)
    with hold(out) as held:
        if not out.exists(MANIFEST):  # nobody finished it while we waited for the inputs
            for directory in inputs.values():
                check_whole(directory)
            _note_code(held)
            started = time.time()
            output = stage.run(inputs, held)
            write_manifest(stage, output, held, seconds=time.time() - started)
    return out


def check_downloads(stage: Stage, root: Storage, remember: bool = False) -> None:
    """Refuse a file of the hub with other content than the first one of its name that was used in this root.

    Nobody says so when a file on the hub is exchanged, and artifacts of a root are there to be compared. remember: this
    may be that first one. Raises DataError that names both.
    """
    for file, digest in stage.downloads.items():
        shelf, name = root.child(DOWNLOADS), f"{file.replace('/', '--')}.sha256"
        if not shelf.exists(name):
            if not remember:
                continue
            shelf.write_bytes(name, f"{digest}\n".encode())
        first = shelf.read_bytes(name).decode("ascii", "replace").strip()  # that of another who came at the same time
        if first != digest:
            raise DataError(
                f"{file} of the hub has the SHA-256 {digest} here, and {first} when {root} was begun: ask for that one "
                f"with {PIN}{first} in place of a path of weights, use another root, or remove {shelf}/{name}"
            )


def remake(stage: Stage, root: Storage, damaged: Sequence[str]) -> dict[str, Any]:
    """Make the damaged parts of a finished artifact again, and return its new manifest.

    damaged: names of parts; the others must be whole, they are kept. The artifact counts as unfinished until it is
    whole again. Raises DataError when what comes out is not what was there, FingerprintMismatch as `ensure`.
    """
    inputs = {key: ensure(needed, root) for key, needed in stage.inputs.items()}
    with hold(stage.directory(root)) as held:
        before = read_manifest(held)
        check_identity(stage, before)
        held.remove(MANIFEST)
        for name in damaged:
            held.remove(name)
        _note_code(held)
        started = time.time()
        output = stage.run(inputs, held)
        if output.digest != before["digest"]:
            raise DataError(
                f"{held} came out otherwise than before: its digest was {before['digest'][:16]} and is now "
                f"{output.digest[:16]} (other versions of the packages?); remove it and all that was made from it"
            )
        write_manifest(stage, output, held, seconds=time.time() - started)
    return read_manifest(held)


def write_manifest(stage: Stage, output: Output, out: Storage, seconds: float = 0.0) -> None:
    """What makes an artifact finished; written last. seconds: that the stage took."""
    worked = _noted_code(out)
    manifest = {
        **stage.identity(),
        "fingerprint": stage.fingerprint,
        "digest": output.digest,
        "parts": [vars(part) for part in sorted(output.parts, key=lambda part: part.name)],
        "summary": plain(dict(output.summary)),
        "information": {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": seconds,
            **({"machine": _machine} if _machine else {}),
            **versions(),
            **({"code": worked} if len(worked) > 1 else {}),
        },
    }
    out.write_bytes(MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())


def read_manifest(directory: Storage) -> dict[str, Any]:
    """Raises ValueError when there is none or it is not one of ours."""
    try:
        manifest = json.loads(directory.read_bytes(MANIFEST))
        if _is_manifest(manifest):
            return cast(dict[str, Any], manifest)
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {MANIFEST}: the artifact is missing or unfinished") from None
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{directory}/{MANIFEST} is damaged; remove it and run the command again")


def check_whole(directory: Storage) -> None:
    """Refuse a finished artifact whose parts are not what its manifest says, as far as that can be told quickly.

    All sizes are compared, and the checksums too unless there are more than HASHED_BYTES; readers compare those of
    larger ones as they go. Raises DataError that names the parts and the way out.
    """
    parts = read_manifest(directory)["parts"]
    sizes = directory.sizes(part["name"] for part in parts)
    wrong = [part["name"] for part in parts if sizes[part["name"]] != part["bytes"]]
    if not wrong and sum(part["bytes"] for part in parts) <= HASHED_BYTES:
        wrong = [part["name"] for part in parts if sha256(directory.read_bytes(part["name"])) != part["sha256"]]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(parts)} parts of {directory} are damaged or missing: {', '.join(wrong[:3])}"
            f"{', ...' if len(wrong) > 3 else ''}; {REPAIR}"
        )


def _is_manifest(value: Any) -> bool:
    """Whether it has what its readers rely on, in the right types."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in _TEXTS):
        return False
    parts, summary = value.get("parts"), value.get("summary", {})
    return isinstance(parts, list) and isinstance(summary, dict) and all(map(_is_part, parts))


def _is_part(value: Any) -> bool:
    kinds = {"name": str, "rows": int, "bytes": int, "sha256": str, "digest": str}
    return (
        isinstance(value, dict)
        and all(type(value.get(key)) is kind for key, kind in kinds.items())
        and value["name"].isprintable()
    )


def check_identity(stage: Stage, manifest: Mapping[str, Any]) -> None:
    """Refuse an artifact that was made with other settings than the stage's."""
    found = {key: manifest.get(key) for key in stage.identity()}
    changed = list(differences(found, stage.identity()))
    if changed:
        raise FingerprintMismatch(
            f"{stage.name}/{stage.fingerprint} was made with other settings: {'; '.join(changed)}"
        )


# -- digests ---------------------------------------------------------------------------------------------------------


def combine_digests(digests: Iterator[str] | list[str] | tuple[str, ...]) -> str:
    """One digest of many, the same in any order and grouping: their sum modulo 2^256."""
    return f"{sum(int(digest, 16) for digest in digests) % 2**256:064x}"


def sha256(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


# -- information -----------------------------------------------------------------------------------------------------


_machine = ""  # that computes what this process asks for


def note_machine(description: str) -> None:
    """Whoever joins a cluster says what it is; manifests that are written from then on tell it."""
    global _machine
    _machine = description


def code_of(information: Mapping[str, Any]) -> list[str]:
    """The code that a manifest's information tells of, the oldest first: commits, or versions of what is installed."""
    version = information.get("packages", {}).get("mis-platform", "unknown")
    return list(information.get("code") or [information.get("git_commit") or f"version {version}"])


def check_code(stages: Iterable[Stage], root: Storage) -> None:
    """Refuse to go on with what other code has made or begun, of these stages and all that they need.

    Source that was edited counts as other code, because two edits of one commit cannot be told apart. Raises
    FingerprintMismatch that names both.
    """
    (now,) = code_of(versions())
    for stage in chain.from_iterable(map(walk, stages)):
        out = stage.directory(root)
        found = code_of(read_manifest(out)["information"]) if out.exists(MANIFEST) else _noted_code(out)
        for before in found:
            if before != now or now.endswith(EDITED):
                raise FingerprintMismatch(
                    f"{stage.name}/{stage.fingerprint} was computed by the code {before}, and this is {now}; "
                    "without --strict it is used, as long as the stage's version is the same"
                )


def _noted_code(directory: Storage) -> list[str]:
    """Of the attempts at an artifact; none for one that was never begun, or before this was noted."""
    try:
        return directory.read_bytes(CODE_FILE).decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []


def _note_code(directory: Storage) -> None:
    worked, now = _noted_code(directory), code_of(versions())
    if worked[-1:] != now:
        directory.write_bytes(CODE_FILE, "\n".join([*worked, *now]).encode())


@functools.cache
def versions() -> dict[str, Any]:
    """What computed this: package versions and the git commit of the source, if it is a checkout."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"packages": installed, "git_commit": git_commit()}


@functools.cache
def git_commit() -> str | None:
    """The commit of this source tree, with "+changes" if it was edited.

    Sources that came without their history: MIS_GIT_COMMIT, which `mis submit` sets; None for an installed package.
    """
    source = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "--error-unmatch", str(source / "artifacts.py")):
            return os.environ.get("MIS_GIT_COMMIT")
        return git("rev-parse", "HEAD") + (EDITED if git("status", "--porcelain", "--", str(source)) else "")
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("MIS_GIT_COMMIT")
