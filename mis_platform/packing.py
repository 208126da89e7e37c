"""What travels to a cluster: this package's source and the experiments. Nothing is packed that was not asked for.

Everything is looked at before anything is sent: a file that looks like a secret, a link, or too many bytes, and nothing
leaves this machine.
"""

import fnmatch
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mis_platform
from mis_platform.experiment import experiments_folder

MIB = 2**20
MAX_BYTES = 20 * MIB
MAX_FILES = 5000  # a folder of experiments has tens
NAMED = 5  # files in a message

# Names, in lower case, whatever folder they are in.
SECRETS = (
    *(".env*", "*.env", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.asc", "*.gpg", "id_*"),
    *("*secret*", "*token*", "*password*", "*passwd*", "*credential*", "*service-account*", "*service_account*"),
    *(".netrc", "_netrc", ".pgpass", ".htpasswd", ".npmrc", ".pypirc", ".boto", ".s3cfg", ".docker*", "*kubeconfig*"),
)
SECRET_FOLDERS = {".aws", ".ssh", ".gnupg", ".kube", ".azure", ".config", ".docker", ".ray"}
# Made by programs, or far too large; they are left behind without a word.
CACHES = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".ipynb_checkpoints", ".cache"}
SKIPPED_FOLDERS = CACHES | {
    *(".git", ".hg", ".svn", ".venv", "venv", "env", "node_modules", "artifacts", "data", "mlruns", "quickstart"),
}
SKIPPED_FILES = ("*.pyc", "*.pyo", "*.db", "*.swp", "*~", ".ds_store", ".gitignore")
# Keys and tokens that have a form of their own: PEM, PuTTY, AWS, Hugging Face, GitHub, Google, Slack.
_PRIVATE = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|PuTTY-User-Key-File-\d|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z]{34}\b"
    rb"|\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{82})\b|\bAIza[\w-]{35}\b|\bxox[abprs]-[\w-]{10,}"
)


@dataclass(frozen=True)
class Packed:
    """One file that travels. name: where it lies in the job's working directory, with forward slashes."""

    name: str
    source: Path
    size: int  # bytes


def collect(experiments: Path | None = None, package: Path | None = None) -> list[Packed]:
    """The files of the package and of the experiments' folder (MIS_EXPERIMENTS, or the one beside the package).

    Raises ValueError that names what must not travel: secrets, links, more than 20 MiB.
    """
    package = package or Path(mis_platform.__file__).resolve().parent
    experiments = experiments or experiments_folder()
    files, refused = [], []
    # Some installers make a package of links; its folder `data` is code.
    for folder, name, skipped, may_link in (
        (package.resolve(), "mis_platform", CACHES, True),
        (experiments.resolve(), "experiments", SKIPPED_FOLDERS, False),
    ):
        for path in _walk(folder, skipped):
            if reason := _refusal(path, may_link):
                refused.append(f"{path} ({reason})")
            elif path.is_file():
                files.append(Packed(f"{name}/{path.relative_to(folder).as_posix()}", path, path.stat().st_size))
            if len(files) + len(refused) > MAX_FILES:
                raise ValueError(
                    f"{folder} holds more than {MAX_FILES} files: nothing was sent; MIS_EXPERIMENTS must name a folder "
                    "with experiments only"
                )
    if refused:
        raise ValueError(
            f"these must not travel, so nothing was sent: {_some(refused)}; move them out of the folder of experiments"
        )
    check_size(files)
    if leaking := [
        f"{each.source} (holds a key or token)" for each in files if _PRIVATE.search(each.source.read_bytes())
    ]:
        raise ValueError(f"these must not travel, so nothing was sent: {_some(leaking)}; remove the key")
    return sorted(files, key=lambda each: each.name)


def check_size(files: Iterable[Packed]) -> None:
    """Raises ValueError that names the biggest files when they are more than 20 MiB together."""
    largest = sorted(files, key=lambda each: -each.size)
    total = sum(each.size for each in largest)
    if total > MAX_BYTES:
        biggest = [f"{each.source} ({each.size / MIB:.1f} MiB)" for each in largest]
        raise ValueError(
            f"{total / MIB:.1f} MiB would travel, at most {MAX_BYTES // MIB} may; nothing was sent. The biggest: "
            f"{_some(biggest)}. Data and weights belong where every node sees them (s3://..., NFS)"
        )


def pack(files: Iterable[Packed], out: Path) -> None:
    """Copy the files under `out`, as the working directory of a job."""
    for each in files:
        target = out / each.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(each.source, target)


def _walk(folder: Path, skipped: set[str]) -> Iterator[Path]:
    """Files, links and folders of secrets; a folder of secrets is named, not entered. Nothing if there is no folder."""
    for here, folders, files in os.walk(folder):
        kept = []
        for name in sorted(folders):
            path = Path(here, name)
            if name.lower() in SECRET_FOLDERS or path.is_symlink():
                yield path
            elif name.lower() not in skipped and not name.endswith(".egg-info"):
                kept.append(name)
        folders[:] = kept
        yield from (Path(here, name) for name in sorted(files) if not _matches(name, SKIPPED_FILES))


def _refusal(path: Path, may_link: bool) -> str:
    if path.name.lower() in SECRET_FOLDERS and path.is_dir():
        return "holds secrets"
    if not _is_source(path) and _matches(path.name, SECRETS):
        return "looks like a secret"
    if path.is_symlink() and not may_link:
        return "is a link; put the file itself there"
    if not path.exists() or not (path.is_file() or path.is_dir()):
        return "is no file"
    return ""


def _is_source(path: Path) -> bool:
    return path.suffix == ".py" and not path.name.startswith(".")  # id_map.py, token.py


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
