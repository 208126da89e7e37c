"""What may not be in the source, what may not be in the output, and who may connect."""

import ast
import http.client
import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import ray
from commands import mis
from hostile_files import encoded, hostile_photos, picture, write_all
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from mis_platform import tracking
from mis_platform.artifacts import Output, Stage, write_manifest
from mis_platform.data.benchmarks import LAYOUTS, open_dataset
from mis_platform.data.trees import TreeReader, tree_row
from mis_platform.errors import DataError
from mis_platform.redaction import scrub
from mis_platform.simulation.ward import merge
from mis_platform.stages.precompute import write_part
from mis_platform.storage import Storage

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("mis_platform", "experiments", "benchmarks", "cluster")


# -- foreign code (S1) -----------------------------------------------------------------------------------------------

RUNS_WHAT_IT_READS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
DOWNLOADS = {
    *("urllib.request", "urllib3", "requests", "httpx", "aiohttp", "http.client", "ftplib", "smtplib", "telnetlib"),
    *("wget", "gdown", "huggingface_hub", "boto3", "paramiko", "xmlrpc"),
}
# Everything below such a name counts too.
FORBIDDEN_CALLS = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "input", "breakpoint"), "runs text as code"),
    **dict.fromkeys(("importlib.import_module", "importlib.util.spec_from_file_location"), "imports by a name"),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), "is a shell"),
    **dict.fromkeys(("os.execvp", "os.execvpe", "os.spawnlp", "os.execlp", "pty.spawn"), "runs a program"),
    **dict.fromkeys(("torch.hub", "torch.utils.model_zoo", "torchvision.datasets"), "downloads what is not pinned"),
    **dict.fromkeys(("torch.jit.load", "torch.package", "torch.serialization.add_safe_globals"), "runs what it reads"),
    **dict.fromkeys(("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader"), "runs YAML"),
    **dict.fromkeys(("pandas.read_pickle", "numpy.lib.format.read_array", "numpy.loads"), "unpickles"),
    **dict.fromkeys(("scipy.io.loadmat", "scipy.io.readsav", "scipy.io.mmread"), "crashes on crafted files"),
    **dict.fromkeys(("shutil.unpack_archive", "tempfile.mktemp"), "is not safe"),
    **dict.fromkeys(("cv2.imread", "cv2.imdecode", "cv2.VideoCapture", "PIL.Image.open"), "decodes"),
    **dict.fromkeys(("skimage.io", "imageio", "matplotlib.image.imread", "matplotlib.pyplot.imread"), "decodes"),
    **dict.fromkeys(("torchvision.io", "ray.data.read_images"), "decodes"),
    **dict.fromkeys(("tarfile.open", "zipfile.ZipFile", "tarfile.TarFile"), "opens archives"),
    **dict.fromkeys(("ssl._create_unverified_context", "ssl.CERT_NONE"), "trusts any server"),
}
FORBIDDEN_METHODS = {"extractall": "unpacks archives", "read_pickle": "unpickles", "from_pretrained": "may download"}
# keyword -> the only value it may have, as it is written
KEYWORDS = {"shell": "False", "allow_pickle": "False", "trust_remote_code": "False", "verify": "True"}


class Allowed(NamedTuple):
    """Something forbidden that one file may have."""

    file: str
    what: str
    reason: str


ALLOWED = [
    Allowed("mis_platform/__init__.py", "importlib.import_module", "of a fixed table of our own modules"),
    Allowed("mis_platform/experiment.py", "importlib.util.spec_from_file_location", "an experiment is a Python file"),
    Allowed("mis_platform/stages/evaluate.py", "importlib.import_module", "--method module:class is code by request"),
    Allowed("mis_platform/cli.py", "os.execvpe", "mis ui becomes MLflow's server; an argument list, no shell"),
    Allowed("mis_platform/model/hub.py", "huggingface_hub", "the one place that downloads: weights as safetensors"),
    Allowed("mis_platform/data/images.py", "PIL.Image.open", "the reader of photos: allow-list, limits"),
    Allowed("mis_platform/data/masks.py", "PIL.Image.open", "the reader of masks: allow-list, limits"),
    Allowed("mis_platform/data/archives.py", "tarfile.open", "members are checked and written by us, none extracted"),
    Allowed("mis_platform/data/archives.py", "tarfile.TarFile", "as above"),
    Allowed("mis_platform/data/archives.py", "zipfile.ZipFile", "as above"),
    Allowed("mis_platform/model/weights.py", "zipfile.ZipFile", "looks for names in a pickle; nothing is extracted"),
    Allowed("mis_platform/doctor.py", "urllib.request", "asks whether the MLflow server answers"),
    Allowed("mis_platform/submission.py", "aiohttp", "Ray's job client talks to the dashboard with it"),
    Allowed("mis_platform/submission.py", "requests", "the errors of Ray's job client"),
    Allowed("mis_platform/model/checkpoints.py", "zipfile.ZipFile", "entries are read by name, none extracted"),
]


def violations(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what, why) of everything in Python text that reads or runs what it should not."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # as it is called here -> its full name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield from _bad_import(node, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from _bad_import(node, f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            yield from _bad_name(node, _full_name(node, names))
        if isinstance(node, ast.Call):
            yield from _bad_call(node, _full_name(node.func, names))


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    head = names.get(node.id, node.id) if isinstance(node, ast.Name) else ""
    return ".".join([head, *reversed(parts)])


def _within(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def _bad_import(node: ast.stmt, name: str) -> Iterator[tuple[int, str, str]]:
    for module in RUNS_WHAT_IT_READS:
        if _within(name, module):
            yield node.lineno, module, "runs what it reads"
    for module in DOWNLOADS:
        if _within(name, module):
            yield node.lineno, module, "downloads"


def _bad_name(node: ast.expr, name: str) -> Iterator[tuple[int, str, str]]:
    """Names count wherever they are mentioned: `load = yaml.load` is a call in waiting."""
    for bad, why in FORBIDDEN_CALLS.items():
        if name == bad or ("." in bad and name.startswith(f"{bad}.")):
            yield node.lineno, bad, why
    if _within(name, "mis_platform"):
        return
    if isinstance(node, ast.Attribute) and (why := FORBIDDEN_METHODS.get(node.attr)):
        yield node.lineno, f".{node.attr}", why


def _bad_call(node: ast.Call, name: str) -> Iterator[tuple[int, str, str]]:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    for keyword, only in KEYWORDS.items():
        if given.get(keyword, only) != only:
            yield node.lineno, f"{keyword}={given[keyword]}", "is not allowed"
    if name == "torch.load" and given.get("weights_only") != "True":
        yield node.lineno, "torch.load", "needs weights_only=True"
    if name == "timm.create_model" and given.get("pretrained", "False") != "False":
        yield node.lineno, "timm.create_model", "downloads what is not pinned"
    if name in ("subprocess.run", "subprocess.Popen", "subprocess.check_output", "subprocess.call") and node.args:
        command = node.args[0]
        if isinstance(command, ast.Constant | ast.JoinedStr):
            yield node.lineno, name, "needs a list of arguments, not a line"
    for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
        if isinstance(argument, ast.Constant) and argument.value in ("0.0.0.0", "::"):
            yield node.lineno, str(argument.value), "is open to everybody"


def _files() -> list[Path]:
    return sorted(file for folder in SOURCES for file in (REPOSITORY / folder).rglob("*.py"))


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_nothing_runs_or_fetches_foreign_code(file: Path) -> None:
    here = file.relative_to(REPOSITORY).as_posix()
    allowed = {each.what for each in ALLOWED if each.file == here}
    found = [each for each in violations(file.read_text(encoding="utf8")) if each[1] not in allowed]
    assert not found, "\n".join(f"{here}:{line}: {what} {why}" for line, what, why in found)


PLANTED = [
    "import pickle",
    "from pickle import loads as read",
    "import cloudpickle as c",
    "import marshal, os",
    "import joblib.externals",
    "eval('1')",
    "run = exec",
    "compile(text, '', 'exec')",
    "__import__('os')",
    "import importlib as i\ni.import_module(name)",
    "import os\nos.system('ls')",
    "from os import popen\npopen('ls')",
    "import subprocess\nsubprocess.run(command, shell=True)",
    "import subprocess as s\ns.run(['ls'], shell=flag)",
    "import subprocess\nsubprocess.run('ls -l')",
    "from subprocess import Popen\nPopen(f'ls {x}')",
    "import torch\ntorch.load(path)",
    "import torch as t\nt.load(path, weights_only=False)",
    "from torch import load\nload(path, map_location='cpu')",
    "import torch\ntorch.load(path, weights_only=trusted)",
    "import torch\ntorch.hub.load('a/b:main', 'model')",
    "from torch.hub import load_state_dict_from_url\nload_state_dict_from_url(u)",
    "import torch\ntorch.jit.load(p)",
    "import yaml\nyaml.load(text)",
    "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    "from yaml import unsafe_load\nunsafe_load(t)",
    "import numpy as np\nnp.load(p, allow_pickle=True)",
    "import numpy\nnumpy.load(p, allow_pickle=maybe)",
    "import pandas as pd\npd.read_pickle(p)",
    "model = AutoModel.from_pretrained(name, trust_remote_code=True)",
    "model = AutoModel.from_pretrained(name)",
    "import timm\ntimm.create_model('vit', pretrained=True)",
    "import urllib.request",
    "from urllib.request import urlretrieve",
    "import requests",
    "import huggingface_hub",
    "session.get(url, verify=False)",
    "import cv2\ncv2.imread(p)",
    "from PIL import Image\nImage.open(p)",
    "import PIL.Image as I\nI.open(p)",
    "from skimage import io\nio.imread(p)",
    "from torchvision.io import read_image\nread_image(p)",
    "from scipy.io import loadmat\nloadmat(p)",
    "import scipy.io as sio\nreader = sio.loadmat",
    "import tempfile\ntempfile.mktemp()",
    "import shutil\nshutil.unpack_archive(p)",
    "import tarfile\ntarfile.open(p)",
    "archive.extractall(p)",
    "serve(host='0.0.0.0')",
    "def f():\n    if True:\n        import dill",
]
HARMLESS = [
    "import torch\ntorch.load(path, weights_only=True)",
    "import subprocess\nsubprocess.run(['git', 'status'], shell=False)",
    "import numpy as np\nnp.load(p)",
    "import yaml\nyaml.safe_load(text)",
    "import timm\ntimm.create_model('vit', pretrained=False)",
    "from PIL import Image\nImage.fromarray(a).save(p)",
    "import cv2\ncv2.resize(a, b)",
    "model.eval()",
    "re.compile('x')",
    "import pickletools",
    "from urllib.parse import urlsplit",
    "serve(host='127.0.0.1')",
    "file.open()",
]


@pytest.mark.parametrize("source", PLANTED)
def test_the_check_finds_what_is_planted(source: str) -> None:
    assert list(violations(f"x = 1\n{source}\n"))


@pytest.mark.parametrize("source", HARMLESS)
def test_the_check_leaves_the_rest_alone(source: str) -> None:
    assert not list(violations(source))


def test_every_exception_is_needed() -> None:
    for each in ALLOWED:
        if not (REPOSITORY / each.file).exists():
            continue
        found = {what for _, what, _ in violations((REPOSITORY / each.file).read_text(encoding="utf8"))}
        assert each.what in found, f"{each.file} has no {each.what} any more"
        assert each.reason, f"why may {each.file} have {each.what}?"


# -- secrets (S6) ----------------------------------------------------------------------------------------------------

PASSWORD = "canary-pw-7f3a"
CANARIES = {
    "AWS_ACCESS_KEY_ID": "canary-id-81c2",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-5d1f",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-90ab",
    "HF_TOKEN": "canary-hub-33ee",
}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("postgresql://me:p@ss@host:5432/db", "postgresql://***@host:5432/db"),
        ("see http://u:p@a/x, https://v:q@b/y", "see http://***@a/x, https://***@b/y"),
        ("https://host/x?access_token=abc&page=2", "https://host/x?access_token=***&page=2"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("mail me@example.org", "mail me@example.org"),
        ("key canary-aws-5d1f.", "key ***."),
        ("https://host/x?key=abcdef&page=2&keyboard=de", "https://host/x?key=***&page=2&keyboard=de"),
    ],
)
def test_scrubbed_text(text: str, clean: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARIES["AWS_SECRET_ACCESS_KEY"])
    assert scrub(text) == clean


@pytest.mark.parametrize(
    "name", ["ENCRYPTION_KEY", "SSH_KEY", "KEY", "my_key", "S3_ACCESSKEY", "DB_PASSWD", "X_TOKEN_1"]
)
def test_names_of_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "canary-4f7c")
    assert scrub("with canary-4f7c") == "with ***"


@pytest.mark.parametrize("name", ["KEYBOARD", "MONKEY", "KEY_COUNT", "SSH_PUBLIC_KEY", "TOPOLOGYKEY"])
def test_names_that_are_no_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "us-layout")
    assert scrub("with us-layout") == "with us-layout"


def test_an_address_with_a_password_is_never_printed() -> None:
    """It may be refused; else it is hidden."""
    try:
        storage = Storage(f"s3://user:{PASSWORD}@bucket/x").child("trees")
    except ValueError as error:
        printed = str(error)
    else:
        printed = f"{storage} {storage!r} {[storage]}"
    assert PASSWORD not in printed


@pytest.mark.parametrize("root", ["ftp://user:{}@host/x", "s3://user:{}@bucket/x?no_such=1"])
def test_errors_about_the_root_hide_its_password(
    root: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "a.png").write_bytes(encoded(picture(), "PNG"))
    extractor = ("--set", "features.extractor=color_texture")
    assert mis("precompute", "--dataset", f"folder:{tmp_path}", "--root", root.format(PASSWORD), *extractor) == 2
    printed = capsys.readouterr()
    assert "Error: " in printed.err
    assert PASSWORD not in printed.out + printed.err


def test_a_crash_hides_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"login with {CANARIES['HF_TOKEN']} at http://u:{PASSWORD}@host failed")

    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    monkeypatch.setattr("mis_platform.data.benchmarks.list_datasets", broken)
    assert mis("data", "list") == 1
    printed = capsys.readouterr()
    assert "Traceback" in printed.err
    assert "RuntimeError: login with *** at http://***@host failed" in printed.err
    assert not any(secret in printed.out + printed.err for secret in (PASSWORD, CANARIES["HF_TOKEN"]))


def files_with(folder: Path, secrets: Iterable[str]) -> list[str]:
    """Which files below hold one of the secrets, in text or in a database."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    contents = ((file, file.read_bytes()) for file in files)
    return [f"{file}: {secret}" for file, content in contents for secret in secrets if secret.encode() in content]


TINY = [
    *("--set", "features.extractor=color_texture", "--set", "resources.log_every=1"),
    *("--set", "model.variant=vit_xt", "--set", "model.init=random", "--set", "model.image_size=224"),
    *("--set", "train.batch_size=1", "--set", "train.max_steps=1", "--set", "eval.max_clicks=1"),
]


@pytest.mark.ray
def test_no_secret_is_written_by_precompute(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    write_all(tmp_path / "photos", hostile_photos())
    (tmp_path / "photos" / "good.png").write_bytes(encoded(picture(), "PNG"))
    dataset = f"folder:{tmp_path / 'photos'}"
    assert mis("precompute", "--dataset", dataset, "--root", str(tmp_path / "root"), *TINY) == 0
    printed = capfd.readouterr()
    assert (tmp_path / "root" / "trees").exists()
    assert not files_with(tmp_path / "root", CANARIES.values())
    assert not any(secret in printed.out + printed.err for secret in CANARIES.values())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_no_secret_is_written_by_a_training(tmp_path: Path) -> None:
    """Everything a new cluster, a training and its record leave on disk, with a tracking server that is down."""
    secrets = {**CANARIES, "RAY_AUTH_TOKEN": "canary-ray-b1b2c3d4e5f60718", "AWS_SESSION_TOKEN": "canary-sts-42"}
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        (tmp_path / "photos" / f"{seed}.png").write_bytes(encoded(picture(160, 200, seed=seed), "PNG"))
    home = Path(tempfile.mkdtemp(prefix="mis-", dir="/tmp"))  # short: Ray's socket paths end at 107 bytes
    tracking = {"MLFLOW_TRACKING_URI": f"http://user:{PASSWORD}@127.0.0.1:9", "RAY_TMPDIR": str(home / "r")}
    environment = {**os.environ, **secrets, **tracking, "HOME": str(home)}
    environment.pop("RAY_ADDRESS", None)
    arguments = ["--dataset", f"folder:{tmp_path / 'photos'}", "--root", str(tmp_path / "root"), *TINY]
    try:
        for command in ("precompute", "train"):
            done = subprocess.run(
                [sys.executable, "-m", "mis_platform.cli", command, *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=400,
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            assert not [each for each in (*secrets.values(), PASSWORD) if each in done.stdout + done.stderr]
        assert list((tmp_path / "root").rglob("events.jsonl")), "the record waits for the server"
        found = files_with(tmp_path, [*secrets.values(), PASSWORD]) + files_with(home, [*secrets.values(), PASSWORD])
        assert not found, "\n".join(found)
    finally:
        shutil.rmtree(home, ignore_errors=True)


# -- names (S5, S11) -------------------------------------------------------------------------------------------------

NAMES = [
    *("../../etc/x", "/etc/x", "..", "a/../../b", "%2e%2e/x", "x#fragment", "x?query", "x;rm -rf /", "$(id)", "`id`"),
    *("-rf", "two words", "line%0Abreak", "é", "e\u0301", "\N{GRINNING FACE}", "<img src=x onerror=alert(1)>"),
    *("a" * 255, "|pipe", "CON"),
]


def test_ids_go_through_parquet_and_make_no_file_names(tmp_path: Path) -> None:
    """Twenty hostile image ids come back as they were; files are named by digests of them."""
    assert len(NAMES) == 20
    tree = merge(np.arange(24, dtype=np.float32).reshape(6, 4), (2, 3))
    out = Storage(str(tmp_path / "trees"))
    parts = [write_part([tree_row(name, (20, 30), tree)], out) for name in NAMES]
    stage = Stage(name="trees", version=1, config={}, run=lambda inputs, out: Output(parts=(), digest=""))
    write_manifest(stage, Output(parts=tuple(parts), digest="0"), out)
    reader = TreeReader(out)
    assert sorted(reader.image_ids) == sorted(NAMES)
    for name in NAMES:
        np.testing.assert_array_equal(reader.tree(name).children, tree.children)
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert all(re.fullmatch(r"trees/(trees-[0-9a-f]{16}\.parquet|manifest\.json)", file) for file in files), files
    assert len(files) == 21


def test_names_of_data_sets_can_be_parts_of_paths() -> None:
    """Directories, artifacts and metrics are named after them; no other data set can be opened."""
    assert all(re.fullmatch(r"[a-z_]+", name) for name in LAYOUTS)
    for name in NAMES:
        with pytest.raises(DataError, match="unknown data set"):
            open_dataset(f"{name}:/")


# -- who may connect (S2, S3) ----------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_cluster_that_we_start_asks_for_its_token(ray_cluster: None) -> None:
    """Its dashboard, which can run jobs, is on the loopback address and refuses who has no token or a wrong one."""
    assert is_token_auth_enabled()
    url = ray._private.worker._global_node.webui_url
    assert url.startswith("127.0.0.1:")
    answers = {}
    for name, header in {"none": {}, "wrong": {"Authorization": "Bearer " + "0" * 64}}.items():
        connection = http.client.HTTPConnection(url, timeout=20)
        connection.request("GET", "/api/jobs/", headers=header)
        answers[name] = connection.getresponse().status
        connection.close()
    assert set(answers.values()) <= {401, 403}, answers


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_ui_listens_on_the_loopback_address_only(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tracking.connect(Storage(str(tmp_path)))  # it refuses a root without runs
    command = [sys.executable, "-m", "mis_platform.cli", "ui", "--root", str(tmp_path), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (found := listening_on(port)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert found == {"0100007F"}, "127.0.0.1 as the kernel writes it"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def listening_on(port: int) -> set[str]:
    """Local addresses, in hexadecimal, of sockets that listen on a TCP port of this machine."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and int(line[1].split(":")[1], 16) == port}


# -- versions (S8) ---------------------------------------------------------------------------------------------------

FLOORS = {"pillow": (12, 3), "mlflow": (3, 16, 1), "ray": (2, 52), "torch": (2, 6)}  # with known holes closed


@pytest.mark.parametrize("package", FLOORS)
def test_versions_with_known_holes_are_ruled_out(package: str) -> None:
    """By pyproject.toml, by constraints.txt, and here."""
    floor = FLOORS[package]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (wanted,) = [each for each in project["dependencies"] if re.match(rf"{package}\b", each)]
    pinned = re.search(rf"(?im)^{package}==(\S+)$", (REPOSITORY / "constraints.txt").read_text())
    assert pinned is not None
    lowest = re.search(r">=([\d.]+)", wanted)
    assert lowest is not None
    for version in (lowest.group(1), pinned.group(1), importlib.metadata.version(package)):
        assert tuple(int(part) for part in re.findall(r"\d+", version)[:3]) >= floor, version


def test_constraints_pin_all_that_is_needed() -> None:
    """With what needs it in turn, tests and all; what a package needs besides depends on the machine (its GPU)."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if re.search(r"==\d", line)}
    needed = [Requirement(each) for each in [*project["dependencies"], *project["optional-dependencies"]["test"]]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while needed:
        each = needed.pop()
        key = (canonicalize_name(each.name), frozenset(each.extras or {""}))
        if key not in seen:
            seen.add(key)
            further = map(Requirement, importlib.metadata.distribution(each.name).requires or [])
            needed += [
                new for new in further if not new.marker or any(new.marker.evaluate({"extra": x}) for x in key[1])
            ]
    names = {name for name, _ in seen if not name.startswith(("nvidia-", "cuda-", "triton"))} - {"setuptools"}
    assert names - pinned == set()
    assert len(names) > 150
