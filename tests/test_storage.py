"""Storage: whole files or none, one writer at a time, and errors that say what to do."""

import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mis_platform.storage import TEMPORARY, Storage, StorageError


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["a.bin", "trees.parquet", "Größe 1.txt", "a%2eb", "x#y?z.json", "-rf", "🌳", "a.gz"])
def test_bytes_come_back_under_any_name(tmp_path: Path, name: str) -> None:
    storage = Storage(str(tmp_path / "new" / "directory"))
    storage.write_bytes(name, b"\0\1payload")
    assert storage.read_bytes(name) == b"\0\1payload"
    assert storage.names() == [name]
    assert (tmp_path / "new" / "directory" / name).read_bytes() == b"\0\1payload"


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("a", b"old" * 1000)
    storage.write_bytes("a", b"new")
    assert storage.read_bytes("a") == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_missing_things(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path)).child("nothing", "here")
    assert storage.names() == []
    assert not storage.exists("a")
    storage.remove("a")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a")


def test_remove_takes_files_and_whole_directories(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("a", b"")
    storage.child("b", "c").write_bytes("d", b"")
    assert storage.names() == ["a", "b"]
    storage.remove("a")
    storage.remove("b")
    assert storage.names() == []


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket", "s3://bucket/trees/0123"),
        ("s3://bucket/prefix/", "s3://bucket/prefix/trees/0123"),
        ("s3://bucket/prefix?region=eu-west-1", "s3://bucket/prefix/trees/0123?region=eu-west-1"),
        ("/data/what?/x", "/data/what?/x/trees/0123"),
        ("/data/../data/", "/data/trees/0123"),
    ],
)
def test_child_addresses(uri: str, expected: str) -> None:
    assert Storage(uri).child("trees", "0123").uri == expected


def test_relative_paths_are_fixed_when_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("artifacts")
    storage.write_bytes("a", b"1")
    monkeypatch.chdir("/")
    assert storage.read_bytes("a") == b"1"
    assert storage.local == tmp_path / "artifacts"


def test_it_travels_to_another_process(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("a", b"1")  # the file system is open now
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301
    assert copy == storage
    assert copy.read_bytes("a") == b"1"


def test_an_object_store_is_written_in_one_piece() -> None:
    storage = Storage("mock:///bucket/prefix/")  # Arrow's object store in memory
    storage._target[0].create_dir("bucket/prefix")
    storage.write_bytes("a", b"1")
    storage.write_bytes(f"{TEMPORARY}x", b"torn")
    assert storage.names() == ["a"]
    storage.remove_unfinished()
    assert [info.base_name for info in storage._target[0].get_file_info(pafs_selector("bucket/prefix"))] == ["a"]
    assert storage.read_bytes("a") == b"1"
    assert storage.local is None
    with storage.lock(), storage.lock():  # object stores have no locks
        pass


def pafs_selector(base: str) -> object:
    import pyarrow.fs

    return pyarrow.fs.FileSelector(base)


@pytest.mark.parametrize("uri", ["ftp://host/directory", "nonsense://x"])
def test_unknown_schemes_are_refused_with_the_known_ones(uri: str) -> None:
    with pytest.raises(ValueError, match="use a local path, s3://bucket/prefix"):
        Storage(uri).names()


# -- what cannot be written ------------------------------------------------------------------------------------------


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot write to .*choose another --root"):
            Storage(str(root)).check_writable()
    with pytest.raises(StorageError, match="cannot lock"), Storage(str(tmp_path / "file")).lock():
        pass


def test_a_read_only_root_is_refused() -> None:
    with pytest.raises(ValueError, match="choose another --root"):
        Storage("/proc/mis").check_writable()


def test_a_writable_root_stays_as_it_was(tmp_path: Path) -> None:
    Storage(str(tmp_path / "root")).check_writable()
    assert os.listdir(tmp_path / "root") == []


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """The kernel's limit on file sizes fails a write half-way, as a full disk does."""
    Storage(str(tmp_path)).write_bytes("a", b"old")
    done = run_python(
        """
        import resource, sys
        from mis_platform.storage import Storage, StorageError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            Storage(sys.argv[1]).write_bytes("a", bytes(1_000_000))
        except StorageError as error:
            print(error)
        """,
        str(tmp_path),
    )
    assert done.stdout.strip() == f"cannot write a in {tmp_path}: File too large", done.stderr
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_killed_writer_leaves_whole_files_only(tmp_path: Path) -> None:
    writer = """
        import sys
        from mis_platform.storage import Storage
        storage = Storage(sys.argv[1])
        print("ready", flush=True)
        while True:
            for letter in b"abc":
                storage.write_bytes("file", bytes([letter]) * 4_000_000)
        """
    storage = Storage(str(tmp_path))
    for seed in range(4):
        command = [sys.executable, "-c", textwrap.dedent(writer), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(random.Random(seed).uniform(0.02, 0.1))
            child.send_signal(signal.SIGKILL)
        if storage.exists("file"):
            content = storage.read_bytes("file")
            assert len(content) == 4_000_000
            assert len(set(content)) == 1
        assert storage.names() in ([], ["file"])
    storage.remove_unfinished()
    assert set(os.listdir(tmp_path)) <= {"file"}


# -- locks -----------------------------------------------------------------------------------------------------------


def test_one_process_at_a_time(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "stage"))
    code = """
        import sys
        from mis_platform.storage import Storage, StorageError
        try:
            with Storage(sys.argv[1]).lock():
                print("got it")
        except StorageError as error:
            print(error)
        """
    with storage.lock():
        assert "another mis process is working on" in run_python(code, storage.uri).stdout
    assert run_python(code, storage.uri).stdout.strip() == "got it"


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """Even if a child of it lives on, as a cluster's processes may."""
    code = """
        import subprocess, sys, time
        from mis_platform.storage import Storage
        with Storage(sys.argv[1]).lock():
            child = subprocess.Popen(["sleep", "20"])
            print(child.pid, flush=True)
            time.sleep(60)
        """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        grandchild = int(holder.stdout.readline())
        with pytest.raises(StorageError), Storage(str(tmp_path)).lock():
            pass
        holder.kill()
        holder.wait()
        try:
            with Storage(str(tmp_path)).lock():
                pass
        finally:
            os.kill(grandchild, signal.SIGKILL)
