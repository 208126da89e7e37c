"""What holds for every kind of file: pinned images of our Ray, no secrets, known keys, storage that all nodes see."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from mis_platform.cluster_files.documents import Document
from mis_platform.cluster_files.findings import ERROR, WARNING, Finding, Path, shown
from mis_platform.cluster_files.shell import images, scripts
from mis_platform.redaction import SECRET_NAME

PLACEHOLDER = "CHANGE-ME"
UNKNOWN = "unknown key"
LOOPBACK = {"127.0.0.1", "localhost", "::1", "[::1]"}
EVERYWHERE = {"0.0.0.0/0", "::/0"}
CAPABILITIES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "KILL",
    "NET_BIND_SERVICE",
    "SETGID",
    "SETUID",
)  # of the container alone
BUCKETS = {"s3", "gs", "abfs", "abfss", "hdfs"}  # schemes of pyarrow.fs
MOVING_TAGS = re.compile(r"(^|-)(latest|nightly|edge|main|master)(-|$)")

# Ray as a requirement, `ray[default]==2.9`, and as a file; what installs packages, to the end of its command.
RAY_PACKAGE = re.compile(
    r"(?<![\w./:@=-])ray(?:-(?:all|core|default))?(?:\[[^\]]*\])?\s*((?:[=<>~!]+|@)\s*[\w/+][\w.*+!:/-]*)?(?=[\s,;\"'\])}]|$)"
)
RAY_FILE = re.compile(r"(?<![\w.-])ray-(\d[\w.+]*)-[\w.-]+\.whl|ray-project/ray(?:\.git)?@|\bray install-nightly\b")
INSTALLER = re.compile(r"\b(pip3?|uv|conda|mamba|micromamba|poetry)\b.*\b(install|add|create|update|sync)\b")

# Keys of a mapping, each with the keys below it; None: anything. Lists are looked through.
Keys = Mapping[str, Any] | None

WHEREABOUTS = re.compile(r"(_PATH|_FILE|NAME|REF|_URI)$|^key$", re.IGNORECASE)  # says where a secret is
SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|\b(ghp|gho|ghs)_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bhf_[A-Za-z0-9]{20,}|\bglpat-[\w-]{15,}|\bxox[abprs]-[\w-]{10,}|://[^/\s:@$]+:[^/\s@$]+@"
)
ASSIGNMENT = re.compile(r"\b([A-Za-z][A-Za-z0-9_-]*)=(\"[^\"]*\"|'[^']*'|[^\s;\"']+)")
NO_SECRET = re.compile(
    r"^$|^[$~/<{]|^(required|optional|true|false|yes|no|none|token|disabled)$|\.(pem|key)$", re.IGNORECASE
)
KNOWN_PASSWORDS = {"admin", "changeme", "minioadmin", "mlflow", "password", "password1234", "postgres"}
FALLBACK = re.compile(r"^\$\{\w+:?-(.*)\}$")  # ${NAME:-what it is when not set}
UNSET = re.compile(r"^\$(\w+|\{\w+\})$")  # empty, without a word, when not set


@cache
def installed_ray() -> str:
    """The version of Ray on this machine; client and cluster must have the same one."""
    return version("ray")


def installs_another_ray(text: str, is_list: bool = False) -> bool:
    """Whether a command installs a Ray that need not be ours. is_list: requirements, with no command before them."""
    ours = installed_ray()
    if any(found[1] != ours for found in RAY_FILE.finditer(text)):
        return True
    for command in re.split(r"[;&|\n]+", text):
        installs = is_list or bool(INSTALLER.search(command))
        for found in RAY_PACKAGE.finditer(command):
            wanted = "".join((found[1] or "").split())
            if wanted.lstrip("=") != ours if wanted.startswith("==") else installs and wanted != f"={ours}":
                return True
    return False


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or what there is to choose from."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    lower = [name for name in names if name.lower() == word.lower()]
    if lower or close:
        return f"did you mean {(lower or close)[0]}?"
    return f"known here: {', '.join(names)}"


def names(text: str) -> dict[str, Keys]:
    """Keys below which anything may stand: "a b" is {"a": None, "b": None}."""
    return dict.fromkeys(text.split())


def unknown_keys(file: str, value: Any, known: Keys, path: Path = ()) -> Iterator[Finding]:
    """Every key of a document that is not one of `known`."""
    if known is None:
        return
    if isinstance(value, list):
        for position, each in enumerate(value):
            yield from unknown_keys(file, each, known, (*path, position))
    elif isinstance(value, dict):
        for key, below in value.items():
            if key in known or "*" in known:
                yield from unknown_keys(file, below, known.get(key, known.get("*")), (*path, str(key)))
            else:
                yield Finding(file, (*path, str(key)), UNKNOWN, nearest(str(key), known))


def mapping(value: Any) -> dict[str, Any]:
    """A mapping of a document, or an empty one where something else stands."""
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    """A list of a document, or an empty one where something else stands."""
    return value if isinstance(value, list) else []


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every scalar of a document with its place."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from walk(below, (*path, str(key)))
    elif isinstance(value, list):
        for position, below in enumerate(value):
            yield from walk(below, (*path, position))
    else:
        yield path, value


def everywhere(document: Document) -> Iterator[Finding]:
    """What may stand nowhere: secrets, addresses of Ray Client, impossible numbers; and what is left to fill in."""
    open_places = []
    for path, value in walk(document.value):
        if isinstance(value, float) and not math.isfinite(value):
            yield Finding(document.file, path, f"{value} is not a number to plan with", "write a finite number")
        if not isinstance(value, str):
            continue
        if "ray://" in value:
            problem = "ray:// is Ray Client: a lost connection loses the run, and its port runs any code"
            yield Finding(document.file, path, problem, "submit a job instead: mis submit -- ...")
        is_list = path[-1:] == ("runtimeEnvYAML",)
        if any(installs_another_ray(script, is_list) for script in scripts(value)):
            problem = f"installs another Ray than that of this machine, {installed_ray()}"
            yield Finding(document.file, path, problem, "remove it: Ray is in the image")
        for name in images(value):
            repository = _split_image(name)[0]
            runs_ray = repository.endswith("rayproject/ray") or repository.rpartition("/")[2].startswith("ray-ml")
            if runs_ray or MOVING_TAGS.search(_split_image(name)[1]):
                yield from image(document.file, path, name, runs_ray)
        if PLACEHOLDER in value:
            open_places.append(path)
        yield from _secret(document, path, value)
    if open_places:
        more = f", and {len(open_places) - 1} other values" if len(open_places) > 1 else ""
        yield Finding(document.file, open_places[0], f"still says {PLACEHOLDER}{more}", "write your own", WARNING)


def _secret(document: Document, path: Path, value: str) -> Iterator[Finding]:
    """At most one finding for a value; it never quotes what it found."""
    named = [(_name_of(document.value, path), value), *((n, v.strip("\"'")) for n, v in ASSIGNMENT.findall(value))]
    problems = [f"{name} {why}" for name, text in named if _is_secret(name) and (why := _exposed(text))]
    if SECRET_VALUE.search(value):
        problems.append("looks like a secret written into the file")
    for problem in problems[:1]:
        remedy = "take it from a file, a secret or ${NAME:?how to set it}, and replace it where it was used"
        yield Finding(document.file, path, problem, remedy)


def _is_secret(name: str) -> bool:
    return bool(SECRET_NAME.search(name)) and not WHEREABOUTS.search(name)


def _exposed(text: str) -> str:
    """What is wrong with the value of something secret; empty if it only says where the secret is."""
    if FALLBACK.match(text) or text.lower() in KNOWN_PASSWORDS:
        return "has a default that everybody knows"
    if UNSET.match(text):
        return "is empty when the variable is not set"
    return "" if NO_SECRET.search(text) else "is written into the file"


def _name_of(root: Any, path: Path) -> str:
    """What a value is called: its key, or, in `{name: X, value: ...}` and `X: {value: ...}`, X."""
    keys = [part for part in path if isinstance(part, str)]
    if path[-1:] != ("value",):
        return keys[-1] if keys else ""
    parent = root
    for part in path[:-1]:
        parent = parent[part]
    name = parent.get("name")
    return name if isinstance(name, str) else "".join(keys[-2:-1])


def image(file: str, path: Path, name: Any, runs_ray: bool) -> Iterator[Finding]:
    """An image: pinned, not ray-ml, and, where Ray runs in it, of the Ray of this machine."""
    if not isinstance(name, str) or not name:
        yield Finding(file, path, "no image", "write registry/name:tag")
        return
    repository, tag = _split_image(name)
    if repository.rpartition("/")[2].startswith("ray-ml"):
        remedy = f"build cluster/Dockerfile, on rayproject/ray:{installed_ray()}"
        yield Finding(file, path, "ray-ml images are no longer built", remedy)
    if not tag and "@sha256:" not in name:
        yield Finding(file, path, f"image {shown(name)} has no tag: it means latest", "write the tag")
    elif MOVING_TAGS.search(tag):
        yield Finding(file, path, f"tag {shown(tag)} means another image tomorrow", "pin a version, best with a digest")
    elif runs_ray or repository.endswith("rayproject/ray"):
        yield from _image_ray(file, path, repository, tag)


def _image_ray(file: str, path: Path, repository: str, tag: str) -> Iterator[Finding]:
    pattern = r"^(\d+\.\d+\.\d+)" if repository.endswith("rayproject/ray") else r"ray-?(\d+\.\d+\.\d+)"
    found, ours = re.search(pattern, tag), installed_ray()
    if found is None:
        remedy = f"tag it ...-ray{ours}-... to have it checked"
        yield Finding(file, path, "the tag does not say which Ray is in the image", remedy, WARNING)
    elif found[1] != ours:
        problem = f"the image has Ray {found[1]}, this machine {ours}: they do not talk to each other"
        yield Finding(file, path, problem, f"build cluster/Dockerfile on Ray {ours}, or install ray=={found[1]} here")


def is_without_cuda(name: Any) -> bool:
    """Whether the tag of an image says that it is for CPUs; Ray's own says so by naming no accelerator."""
    repository, tag = _split_image(str(name))
    official = repository.endswith("rayproject/ray") and not re.search(r"-(gpu|cu\d+)", tag)
    return official or bool(re.search(r"(^|-)cpu(-|$)", tag))


def no_cuda(file: str, path: Path, name: Any) -> Iterator[Finding]:
    """An image of nodes with GPUs: made for them."""
    if is_without_cuda(name):
        yield Finding(file, path, f"an image for CPUs on nodes with GPUs: {shown(name)}", "use the one with -gpu")


def _split_image(name: str) -> tuple[str, str]:
    """Repository and tag, which may be empty; a registry's port is no tag."""
    bare = name.partition("@")[0]
    head, colon, tail = bare.rpartition(":")
    return (head, tail) if colon and "/" not in tail else (bare, "")


def ray_version(file: str, path: Path, value: Any) -> Iterator[Finding]:
    """rayVersion of KubeRay: that of this machine."""
    ours = installed_ray()
    if str(value) != ours:
        yield Finding(file, path, f"Ray {shown(value)}, this machine has {ours}", f"write {ours}")


def storage(
    file: str, where: Path | str, environment: Mapping[str, str], nodes: int, shared: Iterable[str]
) -> Iterator[Finding]:
    """Whether all nodes see the same MIS_ROOT. shared: directories that are network mounts on every node."""
    root = environment.get("MIS_ROOT", "")
    scheme = root.partition("://")[0] if "://" in root else ""
    local = scheme in {"", "file"}
    directory = root.removeprefix("file://").rstrip("/") + "/"
    if not root:
        remedy = "set it to s3://bucket/prefix, gs://bucket/prefix or a directory on a network mount"
        yield Finding(file, where, "no MIS_ROOT: every node would write to its own disk", remedy)
    elif not local and scheme not in BUCKETS:
        yield Finding(file, where, f"MIS_ROOT: unknown storage {scheme}://", nearest(scheme, BUCKETS))
    elif not local and scheme != "hdfs" and not re.match(r"[^/?]", root.partition("://")[2]):
        yield Finding(file, where, "MIS_ROOT names no bucket", f"write {scheme}://bucket/prefix")
    elif local and nodes > 1 and not any(directory.startswith(each.rstrip("/") + "/") for each in shared):
        problem = f"MIS_ROOT is on a disk of one machine, but there are up to {nodes} nodes"
        yield Finding(file, where, problem, "use s3://bucket/prefix, gs://bucket/prefix or declare the network mount")
    yield from _tracking(file, where, environment.get("MLFLOW_TRACKING_URI", ""), local)


def _tracking(file: str, where: Path | str, uri: str, local: bool) -> Iterator[Finding]:
    remedy = "set it to an MLflow server on its own machine (cluster/compose.yaml)"
    if not uri:
        yield Finding(file, where, "no MLFLOW_TRACKING_URI", remedy, WARNING if local else ERROR)
    elif uri.startswith(("sqlite:", "file:", "/")) or any(f"//{host}" in uri for host in LOOPBACK):
        yield Finding(file, where, "MLFLOW_TRACKING_URI is on the head: its records go with it", remedy, WARNING)
