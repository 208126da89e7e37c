"""Is what lies in a root what its manifests say? And the way back where it is not.

Manifests are followed, never directories: a file that no manifest names is only listed, as left over. Nothing is
believed before it was looked at: sizes come before reading, checksums before parsing, the size that a file says it
unpacks to before unpacking.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from mis_platform import pipeline
from mis_platform.artifacts import CODE_FILE, MANIFEST, Stage, combine_digests, read_manifest, remake, sha256
from mis_platform.config import Resources, Run, fingerprint, with_values
from mis_platform.data import proposals, trees
from mis_platform.data.parts import MAX_PART_BYTES, decode_parquet
from mis_platform.data.schemas import CLICKS, OVERLAPS
from mis_platform.data.trees import rows_of, tree_from_row
from mis_platform.errors import DataError
from mis_platform.leases import BEAT_FILE, LEASE_FILE, LOCK_FILE, last_holder
from mis_platform.stages import cluster
from mis_platform.stages.evaluate import row_digest as click_digest
from mis_platform.stages.precompute import LEDGER_FILE, QUARANTINE_FILE
from mis_platform.stages.products import TREES_PRODUCT
from mis_platform.storage import READERS, TEMPORARY, Storage, check_name

TABLES = ("trees", "proposals")  # stages whose parts can be made again one by one
FLAT = (*TABLES, "checkpoint", "initial")  # trees/FINGERPRINT
NESTED = ("clicks", "overlap")  # clicks/DATASET/FINGERPRINT
FINGERPRINT, CHECKSUM = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")
OWN_FILES = {MANIFEST, CODE_FILE, LOCK_FILE, LEASE_FILE, BEAT_FILE, LEDGER_FILE, QUARANTINE_FILE}  # beside the parts
ORPHAN_SECONDS = 24 * 3600.0  # a younger file may belong to somebody at work
IDENTITY = ("stage", "version", "config", "inputs")


class Problem(NamedTuple):
    """Something that is not as it should be."""

    artifact: str  # "trees/0123456789abcdef"
    part: str  # a file of it, or "manifest.json"
    what: str


@dataclass
class Verdict:
    """What was found in a root."""

    artifacts: int = 0
    parts: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)  # nothing wrong: unfinished artifacts, files left over

    def damaged(self, artifact: str) -> list[str]:
        """Names of its parts that are not right."""
        return sorted({each.part for each in self.problems if each.artifact == artifact})

    def __str__(self) -> str:
        rows = [("problem", *each) for each in self.problems] + [("note", *each) for each in self.notes]
        widths = [max((len(row[k]) for row in rows), default=0) for k in range(3)]
        lines = ["  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[3]]) for row in rows]
        total = (
            f"{self.artifacts} artifacts, {self.parts} parts, {self.bytes / 1e6:.1f} MB, {len(self.problems)} problems"
        )
        return "\n".join([*lines, total])


def verify(root: Storage, names: Iterable[str] = ()) -> Verdict:
    """Look at every part of the artifacts called `names` ("trees/0123", a beginning is enough), or of all of them.

    Raises DataError for a name that fits none, and for an empty root.
    """
    verdict = Verdict()
    for artifact in _chosen(root, list(names)):
        directory = root.child(*artifact.split("/"))
        if directory.exists(MANIFEST):
            verdict.artifacts += 1
            _verify_artifact(directory, artifact, verdict)
        else:
            holder = last_holder(directory)
            by = f", in the hands of {holder}" if holder is not None else ""
            verdict.notes.append(Problem(artifact, "", f"unfinished{by}; the command that began it goes on from here"))
            verdict.notes += _left_over(directory, artifact, known=None)
    return verdict


def _chosen(root: Storage, names: list[str]) -> list[str]:
    found = list(_artifacts(root))
    if not found:
        raise DataError(f"there are no artifacts in {root}; is it the right --root?")
    for name in names:
        if not any(each.startswith(name) for each in found):
            raise DataError(f"no artifact in {root} is called {name!r}; there are: {', '.join(found) or 'none'}")
    return [each for each in found if not names or any(each.startswith(name) for name in names)]


def has_artifacts(root: Storage) -> bool:
    """Whether anything was begun in this root, by its listing alone."""
    return any(True for _ in _artifacts(root))


def _artifacts(root: Storage) -> Iterator[str]:
    """What looks like an artifact; that listing decides nothing about what is inside."""
    shelves = [*FLAT, *(f"{kind}/{name}" for kind in NESTED for name in root.child(kind).names())]
    for shelf in shelves:
        for name in root.child(*shelf.split("/")).names():
            if FINGERPRINT.fullmatch(name):
                yield f"{shelf}/{name}"


# -- one artifact ----------------------------------------------------------------------------------------------------


def _verify_artifact(directory: Storage, artifact: str, verdict: Verdict) -> None:
    def complain(part: str, what: str) -> None:
        verdict.problems.append(Problem(artifact, part, what))

    try:
        manifest = read_manifest(directory)
        _check_manifest(manifest, artifact)
    except ValueError as error:
        return complain(MANIFEST, str(error))
    parts = {part["name"]: part for part in manifest["parts"]}
    sizes = directory.sizes(parts)
    owners = {part["sha256"]: name for name, part in parts.items()}
    look = functools.partial(_look, directory, manifest["stage"], owners)
    seen: dict[str, str] = {}  # image id -> part
    with ThreadPoolExecutor(READERS) as pool:
        for name, (problems, image_ids) in zip(parts, pool.map(look, parts.values(), sizes.values()), strict=True):
            for what in problems:
                complain(name, what)
            for image_id in image_ids:
                if seen.setdefault(image_id, name) != name:
                    complain(name, f"image {image_id!r} is in {seen[image_id]} too")
            verdict.parts += 1
            verdict.bytes += sizes[name] or 0
    verdict.notes += _left_over(directory, artifact, known={*parts, *OWN_FILES})
    return None


def _check_manifest(manifest: Mapping[str, Any], artifact: str) -> None:
    """Raises ValueError when it is not the manifest of this address, or does not add up.

    manifest: as `read_manifest` lets it pass.
    """
    missing = set(IDENTITY) - manifest.keys()
    if missing:
        raise ValueError(f"the manifest lacks {min(missing)!r}")
    if f"{manifest['stage']}/{manifest['fingerprint']}" != artifact:
        raise ValueError(f"it belongs to {manifest['stage']}/{manifest['fingerprint']}")
    if fingerprint({name: manifest[name] for name in IDENTITY}) != manifest["fingerprint"]:
        raise ValueError("its settings were altered: they have another fingerprint")
    for part in manifest["parts"]:
        check_name(part["name"])
        if any(not CHECKSUM.fullmatch(part[name]) for name in ("sha256", "digest")):
            raise ValueError(f"the checksums of {part['name']} are none")
    names = [part["name"] for part in manifest["parts"]]
    if len(set(names)) != len(names):
        raise ValueError("a part is listed twice")
    if (
        _is_table(manifest["stage"])
        and combine_digests([part["digest"] for part in manifest["parts"]]) != manifest["digest"]
    ):
        raise ValueError("the digests of its parts do not add up to its digest")


def _is_table(stage: str) -> bool:
    return stage in TABLES or stage.partition("/")[0] in NESTED


def _look(
    directory: Storage, stage: str, owners: Mapping[str, str], part: Mapping[str, Any], size: int | None
) -> tuple[list[str], list[str]]:
    """(what is wrong with a part, the image ids in it)."""
    if size is None:
        return ["missing"], []
    limit = MAX_PART_BYTES if _is_table(stage) else max(MAX_PART_BYTES, part["bytes"])
    if size > limit:
        return [f"larger than {limit} bytes, it was not read"], []
    data = directory.read_bytes(part["name"])
    found = sha256(data)
    if found != part["sha256"]:
        if found in owners:
            return [f"holds what belongs in {owners[found]}"], []
        if len(data) != part["bytes"]:
            return [f"{len(data)} bytes instead of {part['bytes']}"], []
        return ["its content was altered: another SHA-256"], []
    if not _is_table(stage):
        return [], []
    try:
        return _look_inside(stage, data, part)
    except (ValueError, pa.ArrowException) as error:
        return [str(error).splitlines()[0]], []


def _look_inside(stage: str, data: bytes, part: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A table whose checksum is right: its rows may have been wrong when it was written. Raises ValueError."""
    image_ids: list[str] = []
    problems: list[str] = []
    if stage == "trees":
        rows = list(rows_of(trees.decode(data)))
        digests = [TREES_PRODUCT.digest(row) for row in rows]
        problems += filter(None, map(_tree_problem, rows))
        image_ids = [row["image_id"] for row in rows]
    elif stage == "proposals":
        rows = list(rows_of(proposals.decode(data)))
        digests = [proposals.row_digest(row) for row in rows]
        problems += filter(None, map(_masks_problem, rows))
        image_ids = [row["image_id"] for row in rows]
    else:
        rows = decode_parquet(data, CLICKS if stage.startswith("clicks/") else OVERLAPS).to_pylist()
        digests = [click_digest(row) for row in rows]
    if len(rows) != part["rows"]:
        problems.append(f"{len(rows)} rows, the manifest says {part['rows']}")
    if combine_digests(digests) != part["digest"]:
        problems.append("its rows do not have the digest that the manifest says")
    if len(set(image_ids)) != len(image_ids):
        problems.append("an image is in it twice")
    return problems, image_ids


def _tree_problem(row: Mapping[str, Any]) -> str | None:
    try:
        tree_from_row(row)
    except ValueError as error:
        return str(error)
    return None


def _masks_problem(row: Mapping[str, Any]) -> str | None:
    try:
        proposals.check_row(row)
    except ValueError as error:
        return f"image {row['image_id']!r}: {error}"
    return None


def _left_over(directory: Storage, artifact: str, known: set[str] | None) -> list[Problem]:
    """Files that nobody needs any more. known: names that belong there; None: all but interrupted writes do."""
    return [
        Problem(artifact, name, f"left over: no manifest names it, {facts.age / 3600:.0f} hours old")
        for name, facts in sorted(directory.files().items())
        if facts.age > ORPHAN_SECONDS and (name.startswith(TEMPORARY) if known is None else name not in known)
    ]


# -- repairing -------------------------------------------------------------------------------------------------------


def repair(
    root: Storage, artifact: str, damaged: list[str], run: Run, resources: Resources, data_root: Path | None
) -> dict[str, Any]:
    """Make damaged parts of trees or proposals again from the photos of `run`; its new manifest.

    run: names the photos, and where the features' weights lie; the other settings are the manifest's. Raises DataError
    when these are not the photos or weights that the artifact was made from, when something else comes out than before,
    and for what cannot be made again part by part, with the command that makes it.
    """
    directory = root.child(*artifact.split("/"))
    if not artifact.startswith(TABLES) or MANIFEST in damaged:
        raise DataError(f"{artifact} cannot be repaired part by part: {how_to_make(directory, artifact)}")
    stage = _stage_of(read_manifest(directory), run, resources, data_root)
    if f"{stage.name}/{stage.fingerprint}" != artifact:
        raise DataError(
            f"{artifact} was not made from these photos and weights (they make {stage.name}/{stage.fingerprint}); "
            "give those that it was made from with --dataset, --data-root and --set features.weights=..."
        )
    with cluster.cluster(root):
        return remake(stage, root, damaged)


def _stage_of(manifest: Mapping[str, Any], run: Run, resources: Resources, data_root: Path | None) -> Stage:
    config = manifest["config"]
    values = {f"data.{name}": value for name, value in config["data"].items()}
    values |= {f"features.{name}": value for name, value in config["features"].items() if name != "weights"}
    photos = replace(pipeline.training_photos(run, data_root), read_anew=True)
    if manifest["stage"] == "trees":
        return pipeline.trees_stage(photos, with_values(run, values), resources)
    source = config["source"]
    values |= {"target.source": source, "target.fraction": 1.0, "target.subset": "first"}
    values |= {f"sources.{source}.{name}": value for name, value in config["settings"].items() if name != "version"}
    return pipeline.proposals_stage(photos, with_values(run, values), resources)


def how_to_make(directory: Storage, artifact: str) -> str:
    """The way to whole data again, as a sentence with a command."""
    kind = artifact.split("/")[0]
    if kind in TABLES:
        return f"`mis verify --repair {artifact} --dataset NAME:PATH` makes it again from its photos"
    command = {"checkpoint": "mis train", "initial": "mis run sweep"}.get(kind)
    if kind in NESTED:
        command = f"mis eval --dataset {artifact.split('/')[1]}" + (" --proposals" if kind == "overlap" else "")
    return (
        f"remove {directory}/{MANIFEST} and run the command again that made it (`{command} ...`); what is whole is kept"
    )
