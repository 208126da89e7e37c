"""YAML files in, plain values out. A file is read as if a stranger had written it: bounded in size and depth, no
object of Python, no alias that explodes, no key that silently hides another one."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import yaml

from mis_platform.cluster_files.findings import Finding, Path
from mis_platform.errors import DataError

LARGEST = 256 * 1024  # bytes; the files here have 10 kB
MOST_NODES = 20_000  # with every alias written out
DEEPEST = 50  # levels
LONGEST_TEXT = 4000  # characters of one value: what expressions that search it may take grows with the square
PREFIX = "tag:yaml.org,2002:"
PLAIN = {f"{PREFIX}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp")}


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: a mapping with string keys at the top."""

    file: str
    value: dict[str, Any]


class _Refused(Exception):
    """The document is not looked at any further. args: where, why, and what to do."""


def read_documents(file: File) -> tuple[list[Document], list[Finding]]:
    """The documents of a file, and what is wrong with it as YAML.

    Raises DataError when there is no such regular file or it cannot be read as UTF-8.
    """
    text = _read(file)
    if len(text) > LARGEST:
        return [], [Finding(str(file), "", f"is larger than {LARGEST // 1024} KiB", "split it, or drop what it embeds")]
    documents: list[Document] = []
    findings: list[Finding] = []
    try:
        for node in _nodes(text):
            findings += [Finding(str(file), path, problem, remedy) for path, problem, remedy in _flaws(node)]
            value = yaml.constructor.SafeConstructor().construct_document(node)
            if value is None:
                continue
            if not isinstance(value, dict):
                raise _Refused((), "is not a mapping of keys to values", "compare with the files in cluster/")
            documents.append(Document(str(file), value))
    except _Refused as refused:
        path, problem, remedy = refused.args
        return [], [*findings, Finding(str(file), path, problem, remedy)]
    except (yaml.YAMLError, ValueError) as error:
        return [], [*findings, Finding(str(file), "", f"is not YAML: {_reason(error)}", "correct it")]
    except RecursionError:
        return [], [*findings, Finding(str(file), "", "is nested too deeply", "flatten it")]
    if not documents and not findings:
        findings.append(Finding(str(file), "", "is empty", "compare with the files in cluster/"))
    return documents, findings


def _read(file: File) -> str:
    """At most LARGEST + 1 characters."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for its writer
            raise DataError(f"cannot read {file}: not a regular file")
        with open(file, encoding="utf-8-sig") as stream:
            return stream.read(LARGEST + 1)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"cannot read {file}: not UTF-8 text") from None


def _nodes(text: str) -> Iterator[yaml.Node]:
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_node():
            yield loader.get_node()
    finally:
        loader.dispose()


def _flaws(root: yaml.Node) -> list[tuple[Path, str, str]]:
    """Keys that are written twice. Raises _Refused for what must not even be constructed."""
    duplicates: list[tuple[Path, str, str]] = []
    sizes: dict[int, int] = {}  # nodes below, once for each node: an alias costs nothing to measure
    open_nodes: set[int] = set()

    def size(node: yaml.Node, path: Path) -> int:
        if id(node) in open_nodes:
            raise _Refused(path, "contains itself", "remove the alias")
        if id(node) in sizes:
            return sizes[id(node)]
        if len(path) > DEEPEST:
            raise _Refused(path[:3], "is nested too deeply", "flatten it")
        if node.tag not in PLAIN:
            raise _Refused(path, f"tag {node.tag.replace(PREFIX, '!!')} is refused", "write the plain value")
        if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_TEXT:
            raise _Refused(path, f"has more than {LONGEST_TEXT} characters", "put it into a file of its own")
        open_nodes.add(id(node))
        total = 1 + sum(size(child, below) for child, below in _children(node, path, duplicates))
        if total > MOST_NODES:
            raise _Refused(path, f"has more than {MOST_NODES} values with its aliases written out", "remove them")
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    size(root, ())
    return duplicates


def _children(node: yaml.Node, path: Path, duplicates: list[tuple[Path, str, str]]) -> list[tuple[yaml.Node, Path]]:
    if isinstance(node, yaml.SequenceNode):
        return [(child, (*path, position)) for position, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return []
    children, seen = [], set()
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        below = (*path, name)
        if name in seen and name != "<<":
            duplicates.append((below, "is written twice; the last one would win", "keep one of them"))
        seen.add(name)
        children += [(key, below), (value, below)]
    return children


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())
