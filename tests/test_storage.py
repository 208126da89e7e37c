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

import pyarrow.fs as pafs
import pytest

from mis_platform.evaluation.predictor import Predictor
from mis_platform.leases import hold
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


@pytest.mark.parametrize("uri", ["s3:/bucket/prefix", "s3:bucket", "gs:/bucket", "file:/data"])
def test_an_address_without_its_slashes_is_no_folder(uri: str) -> None:
    with pytest.raises(ValueError, match=rf"it begins with {uri.partition(':')[0]}://"):
        Storage(uri)
    assert Storage(f"./{uri}").local is not None


ESCAPES = [
    *(
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "/etc/passwd",
        "//x",
        "./x",
        ".",
        "",
        "a//b",
        "a/",
        "..\\x",
        "a\\..\\x",
        "a\0b",
    ),
    *("../../../etc/cron.d/x", "a/./b", "/", "\\\\host\\x", "..\\..\\x", "a/b/../../../c"),
]


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_its_directory(tmp_path: Path, name: str) -> None:
    for storage in (Storage(str(tmp_path / "root")), Storage("s3://bucket/root?region=us-east-1")):
        with pytest.raises(ValueError, match="no name"):
            storage.child(name)
        for use in (storage.read_bytes, storage.exists, storage.remove):
            with pytest.raises(ValueError, match="no name"):
                use(name)
        with pytest.raises(ValueError, match="no name"):
            storage.write_bytes(name, b"")
    assert os.listdir(tmp_path) == []


def test_a_name_that_looks_encoded_is_taken_as_it_is() -> None:
    """Else %2e%2e in the address of a child would lead out of it."""
    child = Storage("s3://bucket/root?region=us-east-1").child("%2e%2e", "a b#c?d")
    assert child.uri == "s3://bucket/root/%252e%252e/a%20b%23c%3Fd?region=us-east-1"
    assert child._target[1] == "bucket/root/%2e%2e/a b#c?d"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://key:secret@bucket/x", "ends up in logs"),
        ("s3://bucket/x?nonsense=1", "unknown option 'nonsense'; there are allow_bucket_creation, endpoint_override"),
        ("s3:///x", "must look like s3://bucket/prefix"),
    ],
)
def test_addresses_that_cannot_be_right(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Storage(uri).names()


def test_a_file_uri_is_a_local_path(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/a%20b")
    storage.write_bytes("x", b"1")
    assert storage.local == tmp_path / "a b"
    assert (tmp_path / "a b" / "x").exists()


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
    with pytest.raises(StorageError, match="cannot lock"), hold(Storage(str(tmp_path / "file"))):
        pass


def test_a_read_only_root_is_refused() -> None:
    with pytest.raises(ValueError, match="choose another --root"):
        Storage("/proc/mis").check_writable()


def test_a_bucket_that_cannot_be_found_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the SDK says without a network; asking for real takes it ten seconds."""
    said = "When resolving region for bucket 'nope': AWS Error NETWORK_CONNECTION\nDetails: Could not resolve host"

    def resolve(bucket: str) -> str:
        raise OSError(said)

    monkeypatch.setattr(pafs, "resolve_s3_region", resolve)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    about = said.splitlines()[0]
    with pytest.raises(StorageError) as lost:
        Storage("s3://nope/x").exists("model.safetensors")
    assert str(lost.value) == f"cannot reach s3://nope/x: {about}"
    with pytest.raises(StorageError, match="cannot reach s3://nope/x"):
        Predictor.from_pretrained("s3://nope/x")
    with pytest.raises(ValueError) as refused:
        Storage("s3://nope/x").check_writable()
    assert str(refused.value) == f"cannot write to s3://nope/x: {about}; choose another --root"


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
