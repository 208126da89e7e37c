"""Imports only point down, each heavy dependency has one home, and what is public has a docstring."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mis_platform"
HEAVY = {
    *("cv2", "matplotlib", "mlflow", "numba", "numpy", "PIL", "pyarrow", "pydantic", "ray", "safetensors"),
    *("maxflow", "scipy", "skimage", "sklearn", "timm", "torch", "torchvision", "triton", "typer"),
}

# place -> (heavy packages it may import, parts of this package it may import)
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "simulation": ({"numba", "numpy"}, {"config"}),
    "model": (
        {"cv2", "numpy", "PIL", "safetensors", "timm", "torch", "torchvision", "triton"},
        {"config", "errors", "simulation", "threads"},
    ),
    "evaluation": (
        {"cv2", "numpy", "pyarrow", "scipy", "torch"},
        {"config", "errors", "model", "saved_models", "simulation", "storage", "threads"},
    ),
    "data": (
        {"cv2", "numpy", "PIL", "pyarrow", "scipy", "skimage", "sklearn", "torch", "torchvision"},
        {"artifacts", "config", "errors", "simulation", "storage"},
    ),
    "baselines": (
        {"cv2", "maxflow", "numpy", "scipy", "skimage", "sklearn"},
        {"config", "data", "evaluation", "simulation"},
    ),
    "stages": (
        {"cv2", "numpy", "pyarrow", "ray", "torch"},
        {
            "access",
            "artifacts",
            "baselines",
            "config",
            "data",
            "errors",
            "evaluation",
            "model",
            "progress",
            "simulation",
            "stopping",
            "storage",
            "threads",
        },
    ),
    "cluster_files": ({"ray"}, {"errors", "redaction"}),
    "access.py": (set(), {"redaction"}),
    "packing.py": (set(), {"experiment"}),
    "submission.py": ({"ray"}, {"access", "artifacts", "config", "packing", "progress", "redaction"}),
    "doctor.py": (
        {"ray", "torch"},
        {"access", "config", "data", "errors", "experiment", "model", "redaction", "stages", "storage", "sweep"}
        | {"tracking"},
    ),
    "config.py": ({"pydantic"}, set()),
    "errors.py": (set(), set()),
    "stopping.py": (set(), {"errors"}),
    "threads.py": (set(), set()),
    "experiment.py": (set(), {"config"}),
    "comparison.py": ({"numpy"}, {"artifacts", "config", "evaluation", "experiment", "report"}),
    "progress.py": (set(), set()),
    "redaction.py": (set(), set()),
    "storage.py": ({"pyarrow"}, {"redaction"}),
    "leases.py": (set(), {"storage"}),
    "artifacts.py": (set(), {"config", "errors", "leases", "storage"}),
    "saved_models.py": (set(), {"artifacts", "errors", "model", "storage", "tracking"}),
    "verification.py": (
        {"pyarrow"},
        {"artifacts", "config", "data", "errors", "leases", "pipeline", "stages", "storage"},
    ),
    "tracking.py": ({"mlflow", "numpy", "matplotlib"}, {"artifacts", "config", "errors", "redaction", "storage"}),
    "report.py": ({"numpy", "pyarrow"}, {"artifacts", "config", "evaluation", "simulation", "storage"}),
    "drawing.py": (
        {"numpy"},
        {"comparison", "config", "data", "evaluation", "figures", "jobs", "model", "pipeline", "report", "storage"},
    ),
    "sweep.py": (
        {"ray"},
        {"artifacts", "comparison", "config", "data", "drawing", "errors", "evaluation", "experiment", "figures"}
        | {"jobs", "model", "pipeline", "report", "saved_models", "stages", "storage", "tracking", "trial"},
    ),
    "trial.py": (
        {"ray"},
        {"artifacts", "config", "data", "errors", "experiment", "pipeline", "progress", "stopping", "storage"},
    ),
    "figures.py": ({"cv2", "matplotlib", "numpy"}, {"simulation"}),
    "cli.py": (
        {"typer"},
        {"artifacts", "cluster_files", "comparison", "config", "data", "doctor", "errors", "experiment", "jobs"}
        | {
            "model",
            "packing",
            "pipeline",
            "progress",
            "quickstart",
            "redaction",
            "report",
            "saved_models",
            "stages",
            "stopping",
            "storage",
            "submission",
        }
        | {"sweep", "tracking", "verification"},
    ),
}


def imports_of(file: Path) -> set[str]:
    """Dotted names that a file imports anywhere, in functions too; type-checking blocks count as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_point_downwards(place: str) -> None:
    heavy, parts = ALLOWED[place]
    target = PACKAGE / place
    files = [target] if target.suffix == ".py" else sorted(target.rglob("*.py"))
    assert files, f"{place} is gone: update this table"
    own = place.removesuffix(".py")
    for file in files:
        for name in imports_of(file):
            top, *rest = name.split(".")
            if top == "mis_platform":
                assert not rest or rest[0] in parts | {own, "__version__"}, f"{file.name} imports {name}"
            else:
                assert top not in HEAVY - heavy, f"{file.name} imports {name}"


def test_experiments_are_values() -> None:
    for file in (PACKAGE.parent / "experiments").glob("*.py"):
        modules = {name.rpartition(".")[0] for name in imports_of(file)}
        assert modules <= {"mis_platform.config", "mis_platform.experiment"}, file.name


def silent(body: list[ast.stmt], place: str) -> list[str]:
    """Functions, classes, and methods and properties of classes, whose names are public and that have no docstring."""
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found += [f"{place}{node.name}"] if ast.get_docstring(node) is None else []
            found += silent(node.body, f"{place}{node.name}.") if isinstance(node, ast.ClassDef) else []
    return found


def test_what_is_public_says_what_it_is() -> None:
    files = PACKAGE.rglob("*.py")
    assert [name for file in files for name in silent(ast.parse(file.read_bytes()).body, f"{file.name}: ")] == []


def test_a_silent_method_or_property_is_found() -> None:
    code = """
class Noun:
    "Said."
    @property
    def size(self): return 1
    async def go(self): ...
    def said(self): "Said."
    def _own(self): ...
class _Own:
    def anything(self): ...
def verb(): ...
"""
    assert silent(ast.parse(code).body, "m: ") == ["m: Noun.size", "m: Noun.go", "m: verb"]


def test_only_tracking_knows_mlflow() -> None:
    users = {
        file.name for file in PACKAGE.rglob("*.py") if any(name.split(".")[0] == "mlflow" for name in imports_of(file))
    }
    assert users == {"tracking.py"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["precompute", "--help"],
        ["train", "--set", "train.epoch=1"],
        ["trian"],
        ["list"],
        ["run", "sweep", "nothing"],
    ],
)
def test_help_and_typos_answer_without_heavy_imports(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom mis_platform import cli\nsys.argv = ['mis', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'ray', 'torch', 'mlflow', 'numba', 'pyarrow', 'matplotlib', 'cv2'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_what_every_trial_starts_imports_no_heavy_package_it_may_not_need() -> None:
    """Starting processes is most of what a short trial takes: of `mis_platform.trial` and of an evaluator."""
    needless = {"mlflow", "matplotlib", "timm", "torchvision", "sklearn", "skimage", "torch._dynamo", "triton"}
    code = f"import sys; import mis_platform.trial, mis_platform.stages.evaluate; print({needless} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr
