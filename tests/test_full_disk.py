"""Disks that are full, read-only or no disk: one line, nothing torn, and it goes on when there is room again."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow_here import serving
from processes import common_ground, without_rights
from training_material import tiny_run

from mis_platform import cli, tracking
from mis_platform.data.trees import tree_row
from mis_platform.leases import hold
from mis_platform.stages import training_loop
from mis_platform.stages.precompute import finished_parts, write_part
from mis_platform.stages.training_loop import Learner, Schedule, complete_steps, load_checkpoint_model, save_checkpoint
from mis_platform.storage import Storage, StorageError

MEGABYTE = 2**20


class Disk:
    """A file system in memory of a few megabytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        with open(self.path / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.path / "ballast").unlink()

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True, timeout=20)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=20)


def tree_rows(count: int) -> list[dict[str, object]]:
    import numpy as np

    from mis_platform.simulation.ward import merge

    rng = np.random.default_rng(0)
    return [
        tree_row(f"photo {k}", (64, 80), merge(rng.normal(size=(8, 10, 6)).astype(np.float32))) for k in range(count)
    ]


def test_a_part_that_does_not_fit_leaves_nothing_and_fits_later(disk: Disk) -> None:
    out, rows = Storage(str(disk.path / "trees")), tree_rows(6)
    with hold(out) as held:
        first = write_part(rows[:3], held)
        disk.fill()
        with pytest.raises(StorageError, match=r"cannot write trees-.* in .*: No space left on device"):
            write_part(rows[3:], held)
        assert [name for name in os.listdir(disk.path / "trees") if not name.startswith(".")] == [first.name]
        disk.free()
        second = write_part(rows[3:], held)
        found = finished_parts(held, [str(row["image_id"]) for row in rows])
    assert {each.part for each in found} == {first, second}
    disk.fill()
    with pytest.raises(StorageError, match="No space left on device"), hold(Storage(str(disk.path / "new"))):
        pass


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(disk: Disk) -> None:
    run = tiny_run()
    model = training_loop.initial_model(run)
    optimizer = training_loop.optimizer_of(model, run.train)
    learner = Learner(run, Schedule(4, run.train), model, model, optimizer, torch.device("cpu"), images_at_once=1)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    disk.remount(f"size={size + size // 2 + MEGABYTE}")
    out = Storage(str(disk.path / "checkpoint"))
    save_checkpoint(out, 1, learner, [{"step": 1, "loss": 1.0}])
    with pytest.raises(StorageError, match=r"cannot write model.safetensors .*No space left on device"):
        save_checkpoint(out, 2, learner, [{"step": 1, "loss": 1.0}])
    assert complete_steps(out) == [1]
    load_checkpoint_model(out, 1)
    disk.remount(f"size={3 * size}")
    save_checkpoint(out, 2, learner, [{"step": 1, "loss": 1.0}])
    assert complete_steps(out) == [1, 2]
    load_checkpoint_model(out, 2)


def test_an_mlflow_store_that_does_not_fit_is_told_in_one_line(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = Storage(str(disk.path))
    disk.fill()
    with pytest.raises(StorageError, match=r"cannot make the MLflow store .*mlflow.db: .*(full|disk)") as error:
        tracking.connect(root)
    assert "\n" not in str(error.value)
    assert not (disk.path / "mlflow.db").exists()
    disk.free()
    tracking.connect(root).search_experiments()


def test_a_spool_that_does_not_fit_is_told_and_goes_on_later(
    disk: Disk, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MLflow server is away, and then the disk is full that its records wait on: none is lost or torn."""
    monkeypatch.setattr(tracking, "FAILURES", 2)
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.05)
    root, port = Storage(str(disk.path)), free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    about: dict[str, Any] = {"experiment": "mis", "name": "train", "fingerprint": "f24", "params": {}}
    tracker = tracking.open_run(root, **about)
    disk.fill()
    tracker.set_tags({f"tag{k}": "x" * 400 for k in range(50)})  # more than what is left of the spool's last page
    with pytest.raises(OSError, match="No space left on device") as error:
        tracker.flush()
    assert cli._exit_code(error.value) == cli.LOST
    tracker.log_metrics({"train/loss": 0.5}, 1)
    disk.free()
    tracker.close()
    monkeypatch.setattr(tracking, "_outboxes", {})  # as in a new process, which knows nothing of an outage
    database = tmp_path / "server.db"
    database.write_bytes(empty_store.read_bytes())
    with serving(database, port):
        with tracking.open_run(root, **{**about, "fingerprint": "another"}):
            pass  # the next run on this root sends what waits
        client = tracking.connect(root)
        (found,) = client.search_runs(["1"], f"tags.`{tracking.FINGERPRINT}` = 'f24'")
    assert {name for name in found.data.tags if name.startswith("tag")} == {f"tag{k}" for k in range(50)}
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"train/loss": 0.5})
    assert not list(disk.path.glob("mlflow-spool/*"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mis(*words: str) -> tuple[int, str, float]:
    """(exit code, last line of stderr, seconds) of a command in a new process."""
    code = "import sys; from mis_platform.cli import main; sys.argv = ['mis', *sys.argv[1:]]; main()"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr.strip().splitlines()[-1], time.monotonic() - began


def test_roots_that_cannot_be_written_are_told_before_ray_starts(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    from mis_platform.data import synthetic

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))

    def check(root: Path, photos: Path, reason: str) -> None:
        words = ["precompute", "--dataset", f"folder:{photos}", "--root", str(root)]
        monkeypatch.setattr(sys, "argv", ["mis", *words, "--set", "features.extractor=color_texture"])
        began = time.monotonic()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert time.monotonic() - began < 3
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"Error: {reason}")
        assert line.endswith("choose another --root")

    synthetic.write_photos(tmp_path / "photos", 2)
    (tmp_path / "file").write_text("")
    disk.remount("ro")
    file, below, locked = tmp_path / "file", tmp_path / "file" / "below", disk.path / "root"
    check(locked, tmp_path / "photos", f"cannot write to {locked}: Read-only file system")
    check(file, tmp_path / "photos", f"{file} is a file")
    check(below, tmp_path / "photos", f"cannot write to {below}: ")
    with common_ground() as folder:
        synthetic.write_photos(folder / "photos", 2)
        forbidden = folder / "forbidden"
        forbidden.mkdir(mode=0o555)
        with without_rights():
            check(forbidden / "root", folder / "photos", f"cannot write to {forbidden / 'root'}: Permission denied")


@pytest.mark.slow
@pytest.mark.ray
def test_precompute_on_a_full_disk_ends_with_six_and_goes_on_later(disk: Disk, tmp_path: Path) -> None:
    from mis_platform.data import synthetic

    synthetic.write_photos(tmp_path / "photos", 4)
    words = ["precompute", "--dataset", f"folder:{tmp_path / 'photos'}", "--root", str(disk.path / "root")]
    words += ["--set", "features.extractor=color_texture", "--set", "resources.chunk_images=1"]
    disk.fill()
    code, line, _ = mis(*words)
    assert code == 6, line
    assert line.startswith("Error: cannot")
    assert "No space left on device" in line
    disk.free()
    code, line, _ = mis(*words)
    assert code == 0, line
