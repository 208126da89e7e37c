"""Fixtures of the whole suite: the real photographs, if they are there, and one Ray cluster for the session."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("MIS_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


@functools.cache
def needs_ray(file: Path) -> bool:
    """Whether any test of the file does."""
    return "pytest.mark.ray" in file.read_text(encoding="utf8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not needs_ray(item.path))  # the longest first


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` one process runs the files that need Ray, on one cluster; the other runs the rest meanwhile."""
    from xdist.scheduler import LoadScopeScheduling

    class OneForRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = nodeid.partition("::")[0]
            return "ray" if needs_ray(config.rootpath / file) else file

    return OneForRay(config, log)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with GrabCut/, photos/ and COCO-sbd-layout/; tests that need it say so when it is missing."""
    if not (REAL_DATA / "GrabCut" / "data_GT").is_dir():
        pytest.skip(f"real photographs are not at {REAL_DATA}; set MIS_TEST_DATA to the folder that holds GrabCut/")
    return REAL_DATA


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that need it (starting one takes 5-10 s)."""
    from mis_platform.stages.cluster import cluster

    with cluster():
        yield
