"""What may not be in the source, what may not be in the output, and who may connect."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

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
    **dict.fromkeys(("os.execvp", "os.spawnlp", "os.execlp", "pty.spawn"), "runs a program"),
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
    Allowed("mis_platform/cli.py", "os.execvp", "mis ui becomes MLflow's server; an argument list, no shell"),
    Allowed("mis_platform/model/hub.py", "huggingface_hub", "the one place that downloads: weights as safetensors"),
    Allowed("mis_platform/data/images.py", "PIL.Image.open", "the reader of photos: allow-list, limits"),
    Allowed("mis_platform/data/masks.py", "PIL.Image.open", "the reader of masks: allow-list, limits"),
    Allowed("mis_platform/data/archives.py", "tarfile.open", "members are checked and written by us, none extracted"),
    Allowed("mis_platform/data/archives.py", "tarfile.TarFile", "as above"),
    Allowed("mis_platform/data/archives.py", "zipfile.ZipFile", "as above"),
    Allowed("mis_platform/model/weights.py", "zipfile.ZipFile", "looks for names in a pickle; nothing is extracted"),
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
