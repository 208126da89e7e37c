"""What the tests of several readers share."""

import pytest

from mis_platform.storage import Storage


@pytest.fixture
def names_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that a Storage has read since the test began, in order."""
    names: list[str] = []
    read_bytes = Storage.read_bytes
    monkeypatch.setattr(
        Storage, "read_bytes", lambda self, name, *limit: (names.append(name), read_bytes(self, name))[1]
    )
    return names
