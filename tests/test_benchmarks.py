"""The measuring scripts that the documentation names can still be run."""

import importlib.util
import re
import sys
from pathlib import Path

import cv2
import pytest

from mis_platform.baselines.sources import VERSIONS
from mis_platform.config import CLASSICAL_METHODS

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.slow
def test_every_method_and_source_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("benchmarks_methods", FOLDER / "methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["methods.py", "--clicks", "1", "--photos", "1"])
    threads = cv2.getNumThreads()
    try:
        module.main()
    finally:
        cv2.setNumThreads(threads)
    lines = re.findall(r"^  (\w+) +median +([\d.]+) +largest +([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, *_ in lines] == [*CLASSICAL_METHODS, *VERSIONS]
    for name, median, largest in lines:
        assert 0 < float(median) == float(largest) < 30, name  # one click and one photo: nothing between them
