"""Fixtures of the whole suite: the real photographs, if they are there, and one Ray cluster for the session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("MIS_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2` one process runs, from the start, what needs Ray, on one cluster; the other runs the rest meanwhile,
    the tests of a file together because they share fixtures."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


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
