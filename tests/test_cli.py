"""The command line: what a person types, the exit code, and the one line that says what to do."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from commands import mis
from PIL import Image
from processes import running, wait_until_gone

from mis_platform import __version__, cli, stopping
from mis_platform.config import Run, TargetConfig, override, plain
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import save_model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--help"], 0, "precompute"),
        (["-h"], 0, "precompute"),
        (["run", "sweep", "-h"], 0, "--profile"),
        (["--version"], 0, f"mis {__version__}\n"),
        (["trian"], 2, "No such command"),
        (["sweep", "x"], 2, "did you mean: mis run sweep?"),
        (["validate", "x"], 2, "did you mean: mis cluster validate?"),
        (["run", "figure5"], 2, "did you mean: mis run sweep figure5?"),
        (["run", "figure5", "--dry-run"], 2, "did you mean: mis run sweep figure5?"),
        (["figure5"], 2, "did you mean: mis run sweep figure5?"),
        (["run", "train"], 2, "did you mean: mis train?"),
        (["train", "--epochs", "3"], 2, "No such option"),
        (["train", "--set", "train.epoch=1"], 2, "did you mean train.epochs?"),
        (["train", "--set", "sampling.alpha=1.5"], 2, "sampling.alpha must lie in [0, 1)"),
        (["precompute", "--set", "resources.chunk_images=0"], 2, "Error: resources.chunk_images=0: Input should be gr"),
        (["precompute", "--set", "resources.trialz=2"], 2, "'resources.trialz'; did you mean resources.trials?"),
        (["precompute", "--dataset", "graabcut:/nowhere"], 3, "grabcut"),
        (["precompute", "--dataset", "folder:/nowhere"], 3, "/nowhere"),
        (["data", "verify", "--dataset", "folder:/nowhere"], 3, "/nowhere"),
        (["eval", "--dataset", "grabcut:/nowhere"], 3, "/nowhere"),
        (
            ["eval", "--proposals", "--source", "bogus"],
            2,
            "'bogus' is not one of 'tree',",
        ),
        (["eval", "--proposals", "--source", "labels"], 2, "'labels' is not one of 'tree'"),
        (["eval", "--source", "tree"], 2, "it needs --proposals"),
        (["verify", "--root", "/nowhere"], 3, "there are no artifacts in /nowhere"),
        (["run", "sweep", "ablation_alpha", "--set", "eval.zoom_size=400"], 2, "multiples of 224 pixels"),
        (["quickstart", "--set", "eval.davis_zoom_size=300"], 2, "multiples of 224 pixels"),
        (["submit", "--", "run", "sweep", "ablation_alfa"], 2, "did you mean ablation_alpha?"),
        (["submit", "--", "trian"], 2, "did you mean train?"),
        (["submit", "--", "sweep", "figure5"], 2, "did you mean: mis run sweep?"),
        (["submit", "run", "sweep", "ablation_alfa", "--profile", "smoke"], 2, "did you mean ablation_alpha?"),
        (["submit", "run", "sweep", "ablation_alpha", "--profil", "smoke"], 2, "No such option: --profil"),
        (["ui", "--root", "/nowhere"], 3, "there are no runs yet: /nowhere/mlflow.db does not exist"),
        (["quickstart", "--root", "s3://bucket/prefix"], 2, "the quickstart needs a local folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_exit_code_and_one_line(arguments, code, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mis(*arguments) == code
    printed = capsys.readouterr()
    assert expected in printed.out + printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("signals", "code", "expected"),
    [
        ([signal.SIGTERM], 75, "preempted; run the same command again"),
        ([signal.SIGTERM, signal.SIGTERM], 75, "preempted; run the same command again"),
        ([signal.SIGINT], 130, "stopped; run the same command again"),
        ([signal.SIGINT, signal.SIGTERM], 130, "stopped; run the same command again"),
    ],
)
@pytest.mark.parametrize("is_broken", [False, True], ids=["clean", "what is left of Ray fails"])
def test_signals_stop_the_work_and_not_the_stopping(signals, code, expected, is_broken, capsys, monkeypatch):
    """The first signal interrupts; the others come while the work is being stopped."""
    finished = []

    def show(*_: object) -> None:
        try:
            signal.raise_signal(signals[0])
        finally:
            for number in signals[1:]:
                signal.raise_signal(number)
            finished.append(True)
            if is_broken and signals[0] == signal.SIGTERM:
                raise RuntimeError("Ray is gone")

    monkeypatch.setattr(cli, "_print_settings", show)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert mis("show") == code
    assert finished
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_that_a_finaliser_swallows_comes_again(number, code, capsys, monkeypatch):
    class Finaliser:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def show(*_: object) -> None:
        Finaliser()
        time.sleep(10)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(cli, "_print_settings", show)
    hook = sys.unraisablehook
    assert mis("show") == code
    assert sys.unraisablehook == hook
    assert "Finaliser" not in capsys.readouterr().err


STUBBORN = """
import signal
import subprocess
import sys
import time

import ray
import psutil

from mis_platform import cli

child = subprocess.Popen(["sleep", "60"], start_new_session=True)

def show(*_):
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        print(child.pid, flush=True)
        time.sleep(60)

cli._print_settings = show
sys.argv = ["mis", "show"]
cli.main()
"""


def test_a_second_ctrl_c_leaves_at_once_and_alone():
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True)
    try:
        child = int(process.stdout.readline())
        family = {child: running()[child][1]}
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        wait_until_gone(family, 5)
    finally:
        process.kill()
        process.communicate()


LOSING = """
import socket
import subprocess
import sys
import time

from mis_platform import cli
from mis_platform.stages import cluster

head = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(head.getsockname()[1], child.pid, flush=True)

def show(*_):
    with cluster._head_watched(f"127.0.0.1:{head.getsockname()[1]}"):
        print("trees: 4/9 photos", end="", file=sys.stderr)
        head.close()
        time.sleep(60)

cli._print_settings = show
sys.argv = ["mis", "show"]
cli.main()
"""


def test_a_lost_cluster_is_told_in_one_line():
    environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "1", "MY_SECRET": "has been lost"}
    process = subprocess.Popen(
        [sys.executable, "-c", LOSING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        port, child = map(int, process.stdout.readline().split())
        family = {child: running()[child][1]}
        assert process.wait(40) == 6
        wait_until_gone(family, 5)
    finally:
        process.kill()
        _, said = process.communicate()
    told = f"Error: the Ray cluster at 127.0.0.1:{port} ***; the same command goes on from what is finished"
    assert said.splitlines() == ["trees: 4/9 photos", told]


def test_a_preempted_command_that_also_loses_its_cluster_is_run_again(capsys, monkeypatch):
    """As with errors, whoever sent the signal hears 75."""
    codes = []

    def show(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            stopping.abandon("lost")

    monkeypatch.setattr(cli, "_print_settings", show)
    monkeypatch.setattr(stopping, "_end", codes.append)
    assert mis("show") == 75
    assert codes == [75]
    assert "Error: lost\n" in capsys.readouterr().err


def test_a_loss_outside_of_the_command_line_is_left_to_ray(capsys, monkeypatch):
    stopping.abandon("lost")
    monkeypatch.setattr(cli, "_print_settings", lambda *_: None)
    assert mis("show") == 0
    stopping.abandon("lost")
    assert "lost" not in capsys.readouterr().err


def test_a_training_that_diverges_is_a_failure():
    from mis_platform.stages.training_loop import TrainingDiverged

    assert cli._exit_code(TrainingDiverged("the loss is not finite at step 3")) == 4


def test_an_artifact_of_other_settings_is_exit_code_5_and_stays(photos, capsys, tmp_path):
    """Copied to where another one belongs: its manifest says what it is."""
    from mis_platform.artifacts import MANIFEST, Output, Stage, write_manifest
    from mis_platform.storage import Storage

    root = tmp_path / "root"
    arguments = ["precompute", "--dataset", f"folder:{photos}", "--set", "features.extractor=color_texture"]
    arguments += ["--root", str(root)]
    assert mis(*arguments, "--dry-run") == 0
    address = Path(capsys.readouterr().out.split()[-1])
    other = Stage(
        name="trees", version=1, config={"features": {"extractor": "dino_vits8"}}, run=lambda inputs, out: None
    )
    write_manifest(other, Output(parts=(), digest="0" * 64), Storage(str(address)))
    before = (address / MANIFEST).read_bytes()
    assert mis(*arguments) == 5
    printed = capsys.readouterr().err
    assert "was made with other settings" in printed
    assert "features.extractor: 'dino_vits8' -> 'color_texture'" in printed
    assert len(printed.splitlines()) == 1
    assert (address / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["features.weights={}"], "features.weights: there is no file at {}. Download"),
        (
            ["model.init_weights={}", "features.extractor=color_texture"],
            "cannot read model.init_weights={}: No such file",
        ),
    ],
)
def test_weights_at_a_mistyped_path_are_missing_data(settings, expected, photos, capsys, tmp_path):
    weights = tmp_path / "none.pth"
    words = [word for text in settings for word in ("--set", text.format(weights))]
    assert mis("train", "--dataset", f"folder:{photos}", "--root", str(tmp_path / "root"), *words) == 3
    assert expected.format(weights) in capsys.readouterr().err


TRAIN = ["--set", "features.extractor=color_texture", "--set", "model.image_size=224"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["precompute", "--set", "features.weights=WEIGHTS"], "weights.safetensors is not a whole"),
        (
            ["train", "--set", "features.weights=WEIGHTS", "--set", "model.init=random"],
            "is not a whole safetensors file",
        ),
        (["train", *TRAIN, "--set", "model.init_weights=WEIGHTS"], "is not a whole safetensors file"),
        (["train", *TRAIN, "--set", "model.init=random", "--set", "resources.num_workers=3"], "train.batch_size=32"),
    ],
)
def test_wrong_weights_and_workers_are_refused_before_ray_starts(words, told, photos, capsys, tmp_path, monkeypatch):
    """And before hours of trees that a training could not use."""
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    weights, root = tmp_path / "weights.safetensors", tmp_path / "root"
    weights.write_bytes(b"\0no tensors")
    words = [word.replace("WEIGHTS", str(weights)) for word in words]
    for more in ([], ["--dry-run"]):
        assert mis(*words, "--dataset", f"folder:{photos}", "--root", str(root), *more) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]
        assert not list(root.glob("trees/*/*.parquet"))


def test_eval_without_a_model_says_how_to_get_one(photos, capsys, tmp_path):
    assert mis("eval", "--dataset", f"folder:{photos}", "--root", str(tmp_path / "root")) == 3
    assert "mis train" in capsys.readouterr().err


def test_an_unwritable_root_is_refused_before_anything_starts(photos, capsys, tmp_path):
    root = tmp_path / "file"
    root.write_text("not a folder")
    arguments = ["precompute", "--dataset", f"folder:{photos}", "--set", "features.extractor=color_texture"]
    assert mis(*arguments, "--root", str(root)) == 2
    assert "choose another --root" in capsys.readouterr().err
    for command in (arguments, ["quickstart"], ["ui"], ["verify"], ["report", "figure5"]):
        assert mis(*command, "--root", str(root)) == 2
        assert capsys.readouterr().err == f"Error: {root} is a file, not a folder; choose another --root\n"
    if os.geteuid() != 0:  # root may write anywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert mis(*arguments, "--root", str(closed)) == 2


def test_dry_run_says_what_is_missing_and_writes_nothing(photos, capsys, tmp_path):
    root = tmp_path / "root"
    arguments = ["--dataset", f"folder:{photos}", "--set", "features.extractor=color_texture", "--root", str(root)]
    tiny = ["--set", "model.variant=vit_xt", "--set", "model.init=random"]
    assert mis("train", *arguments, *tiny, "--dry-run") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["missing", "missing"]
    assert "/trees/" in printed[0]
    assert "/checkpoint/" in printed[1]
    assert not root.exists()


def test_show_lists_every_setting_and_marks_changes(photos, capsys, tmp_path):
    from mis_platform.config import Run, flatten

    arguments = [
        "--dataset",
        f"folder:{photos}",
        "--set",
        "sampling.alpha=0.8",
        "--set",
        "features.extractor=color_texture",
    ]
    assert mis("show", *arguments, "--root", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in flatten(Run()))
    assert "sampling.alpha" in printed
    assert "(default 0.9)" in printed


@pytest.fixture
def half_labelled(photos: Path) -> Path:
    """Three photos, one with a mask."""
    for name in "abc":
        (photos / "images").mkdir(exist_ok=True)
        (photos / f"{name}.png").rename(photos / "images" / f"{name}.png")
    (photos / "masks").mkdir()
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 10:30] = 255
    Image.fromarray(mask).save(photos / "masks" / "a.png")
    return photos


def test_images_without_masks_are_left_out_on_request_only(half_labelled, capsys, tmp_path):
    arguments = ["eval", "--method", "geodesic", "--dataset", f"folder:{half_labelled}", "--root", str(tmp_path / "r")]
    assert mis(*arguments, "--dry-run", "--allow-missing") == 0
    printed = capsys.readouterr()
    assert "2 of 3 images are left out, files are missing (b, c); the score is not comparable" in printed.err
    assert mis(*arguments, "--dry-run") == 0
    assert capsys.readouterr().out != printed.out, "another benchmark has another address"
    (half_labelled / "masks" / "a.png").rename(half_labelled / "masks" / "z.png")
    assert mis(*arguments, "--allow-missing") == 3
    assert "none of the 3 images" in capsys.readouterr().err


def test_settings_without_effect_are_named(half_labelled, capsys, tmp_path):
    """In one line; those that the model was trained with are no news."""
    (half_labelled / "images" / "b.png").unlink()
    (half_labelled / "images" / "c.png").unlink()
    made = override(Run(), ["model.variant=vit_xt", "model.init=random", "sampling.alpha=0.8"])
    save_model(tmp_path / "trained", SimpleClick("vit_xt", 224), {"run": plain(made)})
    save_model(tmp_path / "other", SimpleClick("vit_xt", 224), {})
    words = ["--set", "sampling.alpha=0.8", "--set", "train.seed=3", "--set", "eval.flip=false"]
    words += ["--set", "resources.eval_batch=2", "--set", "features.extractor=color_texture"]

    def notes(*more: str) -> list[str]:
        arguments = ["eval", "--dataset", f"folder:{half_labelled}", "--root", str(tmp_path / "root"), "--dry-run"]
        assert mis(*arguments, *words, *more) == 0
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]

    trained = "note: no effect here, for the model is trained already: "
    assert notes("--model", str(tmp_path / "trained")) == [f"{trained}train.seed, features.extractor"]
    assert notes("--model", str(tmp_path / "other")) == [f"{trained}sampling.alpha, train.seed, features.extractor"]
    untrained = "note: no effect here, for geodesic needs no training: sampling.alpha, train.seed, features.extractor"
    assert notes("--method", "geodesic", "--set", "classical.frame=false") == [untrained]
    assert notes("--method", "geodesic", "--set", "classical.gamma=1") == [f"{untrained}, classical.gamma"]
    proposals = "note: no effect here, for proposals need no training: sampling.alpha, train.seed, eval.flip"
    datasets = f'eval_datasets=["folder:{half_labelled}"]'
    assert notes("--proposals", "--source", "tree", "--set", "data.min_side=9", "--set", datasets) == [proposals]
    words.clear()
    assert notes("--model", str(tmp_path / "trained")) == []


def test_no_command_starts_a_ray_that_nobody_asked_for():
    """As a thread would that is still at work when Ray was shut down."""
    code = "import mis_platform.cli, ray._private.auto_init_hook as hook; assert not hook.enable_auto_connect"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_unsupervised_source_can_be_scored():
    allowed = get_args(TargetConfig.model_fields["source"].annotation)
    assert {*allowed} == {*cli.Source, "labels"}


def test_an_archive_is_unpacked_and_verified(photos, capsys, tmp_path):
    archive, out = tmp_path / "photos.zip", tmp_path / "unpacked"
    with zipfile.ZipFile(archive, "w") as writer:
        for file in photos.iterdir():
            writer.write(file, file.name)
    wrong = ["data", "unpack", str(archive), "--out", str(out), "--sha256"]
    assert mis(*wrong, "0" * 64) == 3
    assert "is not the file it should be" in capsys.readouterr().err
    assert mis(*wrong, "no digest") == 2
    assert mis("data", "unpack", str(archive), "--out", str(out)) == 0
    assert "3 files" in capsys.readouterr().out
    assert mis("data", "unpack", str(archive), "--out", str(out)) == 2
    assert "in use" in capsys.readouterr().err
    (out / "d.png").write_bytes(b"no photo")
    found = []
    for option in ([], ["--untrusted"]):
        assert mis("data", "verify", "--dataset", f"folder:{out}", *option) == 3
        found.append(capsys.readouterr().out)
    assert "unreadable image" in found[0]
    assert found[0] == found[1]


def test_verify_finds_a_broken_photo(photos, capsys):
    (photos / "d.png").write_bytes((photos / "a.png").read_bytes()[:100])
    assert mis("data", "verify", "--dataset", f"folder:{photos}") == 3
    assert "d" in capsys.readouterr().out
