"""Cluster files, read before money is spent: Ray's cluster YAML, KubeRay manifests and Compose files.

Nothing is started and nothing is asked over the network.
"""

from collections.abc import Iterable
from pathlib import Path

from mis_platform.cluster_files.compose import check_compose
from mis_platform.cluster_files.documents import Document, read_documents
from mis_platform.cluster_files.findings import ERROR, WARNING, Finding
from mis_platform.cluster_files.kubernetes import check_manifests
from mis_platform.cluster_files.launcher import check_launcher
from mis_platform.errors import DataError

__all__ = ["ERROR", "WARNING", "Finding", "check_files"]


def check_files(files: Iterable[Path], cpu_only: bool = False) -> list[Finding]:
    """What is wrong with files that are used together, in their order; a directory stands for its YAML files.

    cpu_only: a cluster without GPUs is what is wanted. Raises DataError when one cannot be read.
    """
    found: list[Finding] = []
    manifests: list[Document] = []
    named = [each for file in files for each in (_yaml_files(file) if file.is_dir() else [file])]
    for file in named:
        documents, flaws = read_documents(file)
        found += flaws
        for document in documents:
            keys = set(document.value)
            if {"apiVersion", "kind"} & keys:
                manifests.append(document)
            elif "services" in keys:
                found += check_compose(document)
            elif {"provider", "available_node_types", "cluster_name", "head_node_type"} & keys:
                found += check_launcher(document, cpu_only)
            else:
                problem = "is neither a Ray cluster YAML, nor a Kubernetes manifest, nor a Compose file"
                found.append(Finding(document.file, "", problem, "compare with the files in cluster/"))
    found += check_manifests(manifests, cpu_only)
    order = {str(file): position for position, file in enumerate(named)}
    return sorted(dict.fromkeys(found), key=lambda finding: (order[finding.file], finding.severity != ERROR))


def _yaml_files(directory: Path) -> list[Path]:
    try:
        files = sorted(file for file in directory.iterdir() if file.suffix in {".yaml", ".yml"})
    except OSError as error:
        raise DataError(f"cannot read {directory}: {error.strerror}") from None
    if not files:
        raise DataError(f"no YAML files in {directory}")
    return files
