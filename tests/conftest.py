"""Fixtures of the whole suite: the real photographs, if they are there, and one Ray cluster for the session."""

import ast
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devices import wants_gpus
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("MIS_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
RAY = "pytest.mark.ray"

# The default run draws the same examples every time; HYPOTHESIS_PROFILE=default, for the nightly one, draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_configure(config: pytest.Config) -> None:
    if not wants_gpus(config.option.markexpr):  # results to the bit, and two workers on any machine, are of CPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@functools.cache
def ray_tests(file: Path) -> frozenset[str]:
    """The tests of the file that carry the mark; the process that hands tests out knows nothing but their names."""
    module = ast.parse(file.read_bytes())
    assignments = (ast.unparse(node) for node in module.body if isinstance(node, ast.Assign))
    is_whole = any(text.startswith("pytestmark =") and RAY in text for text in assignments)
    functions = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))
    return frozenset(each.name for each in functions if is_whole or RAY in map(ast.unparse, each.decorator_list))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not ray_tests(item.path))  # the longest first


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` one process runs the tests that need Ray, on one cluster; the other runs the rest meanwhile."""
    from xdist.scheduler import LoadScopeScheduling

    class OneForRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, *_, name = nodeid.split("::")
            return "ray" if name.partition("[")[0] in ray_tests(config.rootpath / file) else file

    return OneForRay(config, log)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with GrabCut/, photos/ and COCO-sbd-layout/; tests that need it say so when it is missing."""
    if not (REAL_DATA / "GrabCut" / "data_GT").is_dir():
        pytest.skip(f"real photographs are not at {REAL_DATA}; set MIS_TEST_DATA to the folder that holds GrabCut/")
    return REAL_DATA


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with its tables; making one takes seconds, so tests copy it to ROOT/mlflow.db."""
    from mis_platform import tracking
    from mis_platform.storage import Storage

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.connect(Storage(str(folder)))
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that need it (starting one takes 5-10 s)."""
    from mis_platform.stages.cluster import cluster

    with cluster():
        yield
