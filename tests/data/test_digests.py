"""The digest of a data set, when what earlier calls have read is remembered."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mis_platform import pipeline, verification
from mis_platform.artifacts import Output, write_manifest
from mis_platform.config import Resources, Run, with_values
from mis_platform.data import benchmarks, digests
from mis_platform.data.benchmarks import Dataset, open_dataset, verify
from mis_platform.data.digests import Memory, cache_folder
from mis_platform.errors import DataError
from mis_platform.storage import Storage

PHOTOS = 100
_opened: list[str] = []  # an audit hook stays for as long as its process


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


@pytest.fixture(scope="session")
def opened() -> list[str]:
    """The paths of all files that Python opens, in any thread."""
    sys.addaudithook(_note)
    return _opened


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of files that are old enough, and an empty cache folder; even small data sets are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmarks, "SLOW_BYTES", 0)
    monkeypatch.setattr(digests, "SETTLING_NS", 50_000_000)
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(PHOTOS):
        (folder / f"{k:03d}.jpg").write_bytes(f"photo {k}".encode())
    settle()
    return folder


def settle() -> None:
    time.sleep(0.1)


def dataset(folder: Path) -> Dataset:
    return open_dataset(f"folder:{folder}")


def truth(folder: Path) -> str:
    """What the digest is defined to be, in the plainest way."""
    total = hashlib.sha256()
    for image_id, path in sorted((path.stem, path) for path in folder.iterdir()):
        content = path.read_bytes()
        text = f"{image_id!r}\n{len(content)} {hashlib.sha256(content).hexdigest()}"
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()


def read_of(folder: Path, opened: list[str], digest: Callable[[], str]) -> list[str]:
    """Names of the files that are opened for a digest, which must be the right one."""
    expected = truth(folder)
    opened.clear()
    assert digest() == expected
    return sorted(os.path.basename(path) for path in opened if path.startswith(f"{folder}/"))


def only_cache() -> Path:
    folder = cache_folder()
    assert folder is not None
    (file,) = folder.iterdir()
    return file


def test_the_second_call_opens_no_photo(photos: Path, opened: list[str]) -> None:
    assert len(read_of(photos, opened, dataset(photos).digest)) == PHOTOS
    assert read_of(photos, opened, dataset(photos).digest) == []
    assert only_cache().stat().st_size < PHOTOS * 48 + 2000
    os.chmod(photos / "007.jpg", 0o600)  # a status change may be any change
    settle()
    assert read_of(photos, opened, dataset(photos).digest) == ["007.jpg"]
    assert read_of(photos, opened, dataset(photos).digest) == []


def test_other_content_of_the_same_size_and_time_is_noticed(photos: Path, opened: list[str]) -> None:
    before = dataset(photos).digest()
    changed, replaced = photos / "011.jpg", photos / "012.jpg"
    for path in (changed, replaced):
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        target = path if path == changed else photos.parent / "other.jpg"
        target.write_bytes(b"PHOTO " + path.read_bytes()[6:])
        os.utime(target, ns=times)
        os.replace(target, path)
        assert path.stat().st_mtime_ns == times[1]
    assert read_of(photos, opened, dataset(photos).digest) == ["011.jpg", "012.jpg"]
    assert dataset(photos).digest() != before


def test_files_that_come_go_and_change_their_names(photos: Path, opened: list[str]) -> None:
    dataset(photos).digest()
    os.rename(photos / "000.jpg", photos / "new name é.jpg")
    os.remove(photos / "001.jpg")
    (photos / "added.jpg").write_bytes(b"added")
    os.rename(photos / "002.jpg", photos / "swap")
    os.rename(photos / "003.jpg", photos / "002.jpg")
    os.rename(photos / "swap", photos / "003.jpg")
    settle()
    expected = ["002.jpg", "003.jpg", "added.jpg", "new name é.jpg"]
    assert read_of(photos, opened, dataset(photos).digest) == expected
    assert read_of(photos, opened, dataset(photos).digest) == []


def test_a_photo_that_is_gone_or_no_file_counts_as_absent_though_it_is_remembered(photos: Path) -> None:
    opened_before = dataset(photos)
    whole = opened_before.digest()
    os.rename(photos / "004.jpg", photos.parent / "kept")
    gone = opened_before.digest()
    os.mkfifo(photos / "004.jpg")
    assert gone == opened_before.digest() == replace(opened_before, read_anew=True).digest() != whole
    os.remove(photos / "004.jpg")
    os.rename(photos.parent / "kept", photos / "004.jpg")
    assert opened_before.digest() == whole


def test_a_link_that_is_turned_to_another_file_is_noticed(photos: Path, opened: list[str]) -> None:
    (photos / "link.jpg").symlink_to("005.jpg")
    settle()
    dataset(photos).digest()
    os.remove(photos / "link.jpg")
    (photos / "link.jpg").symlink_to("006.jpg")
    assert read_of(photos, opened, dataset(photos).digest) == ["link.jpg"]


def test_what_has_just_been_written_is_not_remembered(photos: Path, opened: list[str]) -> None:
    dataset(photos).digest()
    (photos / "020.jpg").write_bytes(b"fresh")
    assert read_of(photos, opened, dataset(photos).digest) == ["020.jpg"]
    assert read_of(photos, opened, dataset(photos).digest) == ["020.jpg"]
    settle()
    assert read_of(photos, opened, dataset(photos).digest) == ["020.jpg"]
    assert read_of(photos, opened, dataset(photos).digest) == []


def test_subsets_masks_and_the_whole_share_what_is_remembered(photos: Path, opened: list[str]) -> None:
    root = photos.parent / "set"
    (root / "masks").mkdir(parents=True)
    os.rename(photos, root / "images")
    for k in range(PHOTOS):
        (root / "masks" / f"{k:03d}.png").write_bytes(f"mask {k}".encode())
    settle()
    labelled = dataset(root)
    some = labelled.subset(0.2, seed=0)
    counts = []
    for call in (some.digest, labelled.digest, some.digest, lambda: labelled.digest(masks=True), labelled.digest):
        opened.clear()
        call()
        counts.append(sum(path.startswith(f"{root}/") for path in opened))
    assert counts == [20, 80, 0, 100, 0]
    assert labelled.digest(masks=True) == replace(labelled, read_anew=True).digest(masks=True) != labelled.digest()


def test_verification_reads_every_photo(photos: Path, opened: list[str]) -> None:
    report = verify(dataset(photos))
    assert not list(photos.parent.glob("cache/**/*.parquet")), "what is to be checked is not believed later"
    dataset(photos).digest()
    anew = replace(dataset(photos), read_anew=True)
    assert len(read_of(photos, opened, anew.digest)) == PHOTOS
    opened.clear()
    assert verify(dataset(photos)).digest == report.digest == truth(photos)
    assert sum(path.startswith(f"{photos}/") for path in opened) >= PHOTOS


def test_a_repair_reads_every_photo(photos: Path, opened: list[str], tmp_path: Path) -> None:
    """What is remembered is enough for a stage, but not to say which photos a damaged artifact was made from."""
    run = with_values(Run(), {"dataset": f"folder:{photos}", "features.extractor": "color_texture"})
    root = Storage(str(tmp_path / "root"))
    stage = pipeline.trees_stage(dataset(photos), run, Resources())
    output = Output(parts=(), digest="0" * 64)
    write_manifest(stage, output, stage.directory(root))
    asked = read_of(
        photos, opened, lambda: str(pipeline.trees_stage(dataset(photos), run, Resources()).config["dataset"])
    )
    assert asked == []
    (photos / "000.jpg").write_bytes(b"another photo")
    opened.clear()
    with pytest.raises(DataError, match="was not made from these photos"):
        verification.repair(root, f"trees/{stage.fingerprint}", [], run, Resources(), None)
    assert sum(path.startswith(f"{photos}/") for path in opened) == PHOTOS


# -- the file of the cache -------------------------------------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def test_a_damaged_or_foreign_cache_is_passed_over(photos: Path, opened: list[str]) -> None:
    dataset(photos).digest()
    whole = only_cache().read_bytes()
    size = len(whole)
    damaged = [b"", b"PAR1", whole[:-1], whole[: size // 2], b"\0" * size, whole + b"x", os.urandom(size)]
    foreign = photos.parent / "foreign.parquet"
    pq.write_table(pq.read_table(only_cache()).rename_columns(["place", "check", "md5"]), foreign)
    for content in [*damaged, foreign.read_bytes()]:
        only_cache().write_bytes(content)
        assert len(read_of(photos, opened, dataset(photos).digest)) == PHOTOS
        assert only_cache().stat().st_size == size  # and is replaced
        assert read_of(photos, opened, dataset(photos).digest) == []


def test_a_flipped_bit_of_the_cache_changes_no_digest(photos: Path) -> None:
    """Anywhere: in a checksum of a photo it is the page's own checksum that tells."""
    expected = dataset(photos).digest()
    whole = only_cache().read_bytes()
    places = np.random.default_rng(0).choice(len(whole), 25, replace=False)
    for place in map(int, places):
        only_cache().write_bytes(whole)
        flip(only_cache(), place)
        assert dataset(photos).digest() == expected, place


def test_a_cache_of_somebody_else_is_passed_over(
    photos: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(photos).digest()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)  # only root can give files away
    assert len(read_of(photos, opened, dataset(photos).digest)) == PHOTOS


@pytest.mark.parametrize("kind", ["below a file", "below a pipe", "no home", "relative"])
def test_a_cache_that_cannot_be_written_is_no_error(
    kind: str, photos: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file: root may write where permissions forbid it."""
    monkeypatch.chdir(photos.parent)
    home = photos.parent / "home"
    if kind == "below a pipe":
        os.mkfifo(home)
    elif kind != "no home":
        home.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", {"no home": "", "relative": "cache"}.get(kind, str(home)))
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError()) if kind == "no home" else home)
    assert (cache_folder() is None) == (kind == "no home")
    for _ in range(2):
        assert len(read_of(photos, opened, dataset(photos).digest)) == PHOTOS
    assert not (photos.parent / "cache").exists()


def test_small_data_sets_leave_nothing_behind(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "SLOW_BYTES", PHOTOS * 8)  # at least as many as there are
    dataset(photos).digest()
    assert not list(photos.parent.glob("cache/**/*.parquet"))


def test_the_cache_is_bounded(photos: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are gone make room; a data set that is too large is not remembered; old data sets go."""
    dataset(photos).digest()
    monkeypatch.setattr(digests, "LARGEST", PHOTOS)
    os.rename(photos / "000.jpg", photos / "a.jpg")
    settle()
    assert read_of(photos, opened, dataset(photos).digest) == ["a.jpg"]
    assert pq.read_metadata(only_cache()).num_rows == PHOTOS
    assert read_of(photos, opened, dataset(photos).digest) == []
    (photos / "b.jpg").write_bytes(b"one more")
    settle()
    for _ in range(2):
        assert read_of(photos, opened, dataset(photos).digest) == ["b.jpg"]
    other = photos.parent / "other"
    other.mkdir()
    (other / "a.jpg").write_bytes(b"a")
    settle()
    before = only_cache()
    monkeypatch.setattr(digests, "FOLDER_BYTES", before.stat().st_size)
    (before.parent / ".tmp-of-a-killed-process").write_bytes(before.read_bytes())
    dataset(other).digest()
    assert only_cache() != before


def test_what_was_read_is_kept_while_the_rest_is_read(
    photos: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader who is killed on the way loses only the last window."""
    monkeypatch.setattr(benchmarks, "DIGEST_WINDOW", 30)
    monkeypatch.setattr(benchmarks, "SAVED_BYTES", 0)
    saved = Memory.save
    calls = iter(range(2))

    def save_twice(self: Memory, at_least: int) -> None:
        saved(self, at_least)
        if next(calls, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Memory, "save", save_twice)
    with pytest.raises(KeyboardInterrupt):
        dataset(photos).digest()
    monkeypatch.setattr(Memory, "save", saved)
    assert read_of(photos, opened, dataset(photos).digest) == [f"{k:03d}.jpg" for k in range(90, PHOTOS)]


AGAIN_AND_AGAIN = """
import sys
from mis_platform.data import benchmarks, digests

benchmarks.SLOW_BYTES = digests.SETTLING_NS = 0
for _ in range(40):
    print(benchmarks.open_dataset(f"folder:{sys.argv[1]}").digest())
    for each in digests.cache_folder().glob("*.parquet"):
        each.unlink(missing_ok=True)
"""


def test_two_processes_at_once_do_each_other_no_harm(photos: Path) -> None:
    """Each writes and removes the same file all the time."""
    command = [sys.executable, "-c", AGAIN_AND_AGAIN, str(photos)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [process.communicate(timeout=60)[0].split() for process in both]
    assert found == [[truth(photos)] * 40] * 2
    assert not list(photos.parent.glob("cache/**/.tmp-*"))


def test_threads_recall_what_threads_have_read(photos: Path) -> None:
    memory = Memory(photos)
    files = [f"{k:03d}.jpg" for k in range(PHOTOS)]
    threads = [threading.Thread(target=memory.contents, args=(files[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.save(0)
    again = Memory(photos)
    expected = [
        f"{(photos / name).stat().st_size} {hashlib.sha256((photos / name).read_bytes()).hexdigest()}" for name in files
    ]
    assert again.contents(files) == memory.contents(files) == expected
    assert not again._new


# -- copies ----------------------------------------------------------------------------------------------------------


def test_copies_are_known_from_what_the_digest_read(photos: Path, opened: list[str]) -> None:
    """Nothing is read for them that the digest has read, and it is what it was; files that are gone are no copies."""
    for copy, of in (("050", "000"), ("099", "000"), ("020", "010")):
        (photos / f"{copy}.jpg").write_bytes((photos / f"{of}.jpg").read_bytes())
    settle()
    dataset = open_dataset(f"folder:{photos}")
    for gone in ("001", "002"):
        (photos / f"{gone}.jpg").unlink()
    total = hashlib.sha256()
    for image_id in sorted(dataset.image_ids):
        content = b"" if image_id in ("001", "002") else (photos / f"{image_id}.jpg").read_bytes()
        known = f"{len(content)} {hashlib.sha256(content).hexdigest()}" if content else "absent"
        total.update(hashlib.sha256(f"{image_id!r}\n{known}".encode()).digest())
    assert dataset.digest() == total.hexdigest()
    opened.clear()
    expected = {("000", "050", "099"), ("010", "020")}
    assert set(dataset.copies) == expected
    again = open_dataset(f"folder:{photos}")
    assert set(again.copies) == expected, "also where nobody asked for a digest"
    assert [path for path in opened if path.endswith(".jpg")] == []
    (photos / "050.jpg").write_bytes(b"another one")
    assert set(replace(again).copies) == {("000", "099"), ("010", "020")}
    assert open_dataset(f"folder:{photos}").subset(0.05, 0).copies == ()
