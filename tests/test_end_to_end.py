"""The commands of the README on real photographs from wheels: photos in, a scored model and its MLflow record out."""

import re
from pathlib import Path

import pytest
from commands import mis
from mlflow.tracking import MlflowClient

from mis_platform.data import synthetic
from mis_platform.data.images import read_image
from mis_platform.evaluation.predictor import Predictor

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TINY = [
    *("--set", "features.extractor=color_texture"),
    *("--set", "model.variant=vit_xt", "--set", "model.init=random", "--set", "model.image_size=224"),
    *("--set", "eval.zoom_size=224", "--set", "eval.max_clicks=3"),
    *("--set", "train.batch_size=2", "--set", "train.max_steps=3", "--set", "resources.log_every=1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ray_cluster) -> Path:
    """Six photos, three benchmark objects, and a model trained on the photos by the command line."""
    folder = tmp_path_factory.mktemp("end_to_end")
    synthetic.write_photos(folder / "photos", 6)
    synthetic.write_benchmark(folder / "benchmark", 3)
    assert mis("train", "--dataset", f"folder:{folder / 'photos'}", "--root", str(folder / "root"), *TINY) == 0
    return folder


def evaluate(folder: Path, *more: str) -> int:
    benchmark = f"synthetic:{folder / 'benchmark'}"
    return mis("eval", "--dataset", benchmark, "--root", str(folder / "root"), *TINY, *more)


def test_a_trained_model_is_scored_and_recorded(folder, capsys):
    assert evaluate(folder) == 0
    printed = capsys.readouterr().out
    assert "NoC@85" in printed
    assert "synthetic" in printed

    client = MlflowClient(f"sqlite:///{folder / 'root' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mis")
    (run,) = client.search_runs([experiment.experiment_id])  # training and evaluation share one
    assert run.info.status == "FINISHED"
    assert run.data.params["sampling.alpha"] == "0.9"
    assert run.data.params["eval.max_clicks"] == "3"
    assert {"synthetic/noc85", "synthetic/noc90", "train/loss", "train/loss_smooth"} <= run.data.metrics.keys()
    assert [point.step for point in client.get_metric_history(run.info.run_id, "synthetic/iou")] == [1, 2, 3]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
    drawn = {item.path for item in client.list_artifacts(run.info.run_id, "figures")}
    assert "figures/loss.png" in drawn
    assert len(client.list_artifacts(run.info.run_id, "figures/synthetic")) == 4  # three objects and the curve


def test_a_second_call_computes_nothing_again(folder, capsys):
    assert evaluate(folder) == 0
    first = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (folder / "root").rglob("manifest.json")}
    assert mis("train", "--dataset", f"folder:{folder / 'photos'}", "--root", str(folder / "root"), *TINY) == 0
    capsys.readouterr()
    assert evaluate(folder) == 0
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in (folder / "root").rglob("manifest.json")} == before
    client = MlflowClient(f"sqlite:///{folder / 'root' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("mis").experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]


def test_a_model_is_found_by_its_run_in_mlflow(folder, capsys):
    assert evaluate(folder) == 0
    expected = capsys.readouterr().out
    client = MlflowClient(f"sqlite:///{folder / 'root' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("mis").experiment_id])
    assert evaluate(folder, "--model", run.info.run_id) == 0
    assert capsys.readouterr().out == expected
    assert evaluate(folder, "--model", "0123456789abcdef") == 3
    assert "no single model is called '0123456789abcdef'" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_tells_the_whole_story(ray_cluster, tmp_path, capsys):
    """The README's first command, as it is: the trained model must be better than the untrained one."""
    assert mis("quickstart", "--root", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "three things to try next" in printed
    assert re.search(r"mean IoU after 20 clicks: untrained 0\.\d\d, trained 0\.\d\d\n", printed)
    (folder,) = (tmp_path / "pictures").iterdir()
    pictures = sorted(path.name for path in folder.iterdir())
    assert pictures == ["clicks-0.png", "clicks-1.png", "iou.png", *(f"merge-levels-{k}.png" for k in range(3))]
    assert all(str(folder / name) in printed for name in pictures)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    runs.sort(key=lambda run: run.info.run_name != "untrained")  # the other one has the name of its settings
    assert {run.data.params["eval_datasets"] for run in runs} == {f"synthetic:{tmp_path / 'benchmark'}"}
    before, after = (client.get_metric_history(run.info.run_id, "synthetic/iou")[-1] for run in runs)
    assert before.step == after.step == 20
    assert after.value > before.value + 0.3
    logged = {Path(item.path).name for item in client.list_artifacts(runs[1].info.run_id, "figures/story")}
    assert logged == set(pictures)


def test_another_smoothness_shares_the_trees(folder, capsys):
    arguments = ["--dataset", f"folder:{folder / 'photos'}", "--root", str(folder / "root"), *TINY]
    assert mis("train", *arguments, "--set", "train.smooth_weight=0", "--dry-run") == 0
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert states == ["done", "missing"]


def test_proposals_are_scored_without_training(folder, capsys):
    assert evaluate(folder, "--proposals") == 0
    assert "mean best IoU" in capsys.readouterr().out


def test_the_model_answers_clicks_in_python(folder):
    (checkpoint,) = (folder / "root" / "checkpoint").iterdir()
    predictor = Predictor.from_pretrained(checkpoint)
    image = read_image(folder / "photos" / "000.png")
    predictor.set_image(image)
    first = predictor.click(y=100, x=100)
    assert first.mask.shape == image.shape[:2]
    predictor.click(y=10, x=10, positive=False)
    assert (predictor.undo().probability == first.probability).all()
