"""What MLflow is told about a model: what its config.json says, and nothing that is made up."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import mis
from mlflow.tracking import MlflowClient

from mis_platform import jobs
from mis_platform.config import EvalConfig, Resources, Run, flatten, override, plain
from mis_platform.data import synthetic
from mis_platform.model.checkpoints import import_checkpoint
from mis_platform.model.ritm import Ritm
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import save_model
from mis_platform.storage import Storage

RUN = override(Run(), ["dataset=folder:photos", "model.variant=vit_xt", "model.init=random", "train.smooth_weight=3"])


def described(folder: Path, config: dict[str, Any]) -> Storage:
    """A directory that says what a model is; nothing here looks at the weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"variant": "vit_xt", "image_size": 224, **config}))
    return Storage(str(folder))


@pytest.mark.parametrize(
    ("config", "title", "known"),
    [
        ({}, "simpleclick vit_xt bare", {"variant": "vit_xt", "image_size": 224, "family": "simpleclick"}),
        ({"run": {}}, "simpleclick vit_xt bare", {"variant": "vit_xt", "image_size": 224, "family": "simpleclick"}),
        (
            {"run": {"train": {"momentum": 0.9}}},  # of another version
            "simpleclick vit_xt bare",
            {"variant": "vit_xt", "image_size": 224, "family": "simpleclick"},
        ),
        (
            {"family": "ritm", "variant": "hrnet18s", "image_size": [320, 480], "refine": "fbrs"}
            | {"source": {"file": "h18s.pth", "class": "isegm.model.is_hrnet_model.HRNetModel"}},
            "ritm hrnet18s fbrs h18s.pth",
            {"variant": "hrnet18s", "image_size": [320, 480], "family": "ritm", "refine": "fbrs", "source": "h18s.pth"},
        ),
    ],
)
def test_a_model_from_elsewhere_has_no_settings_of_a_training(
    config: dict[str, Any], title: str, known: dict[str, Any], tmp_path: Path
) -> None:
    model = described(tmp_path / "bare", config)
    run = override(Run(), ["eval.max_clicks=7"])
    assert jobs.model_title(model) == title
    assert jobs.settings_of(model, run) == {
        **{f"model.{name}": value for name, value in known.items()},
        **flatten(EvalConfig(max_clicks=7), "eval."),
    }


def test_a_model_that_was_trained_here_has_all_its_settings_under_the_protocol_asked_for(tmp_path: Path) -> None:
    model = described(tmp_path / "m", {"run": plain(RUN)})
    asked = override(Run(), ["eval.max_clicks=7"])
    assert jobs.model_title(model) == jobs.title(RUN) == "vit_xt folder:photos alpha 0.9 lambda 3"
    assert jobs.settings_of(model, asked) == flatten(override(RUN, ["eval.max_clicks=7"]))


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_models_from_elsewhere_are_scored_and_recorded_as_what_they_are(
    ray_cluster: None, empty_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    torch.save({"state_dict": Ritm("hrnet18s").state_dict()}, tmp_path / "official.pth")
    import_checkpoint(tmp_path / "official.pth", tmp_path / "imported")
    save_model(tmp_path / "saved", SimpleClick("vit_xt", 224), {})
    synthetic.write_benchmark(tmp_path / "benchmark", 1)
    root = tmp_path / "root"
    root.mkdir()
    shutil.copyfile(empty_store, root / "mlflow.db")
    expected = {
        "ritm hrnet18s official.pth": {"variant": "hrnet18s", "family": "ritm", "source": "official.pth"},
        "simpleclick vit_xt saved": {"variant": "vit_xt", "family": "simpleclick", "image_size": "224"},
    }
    for name, folder in zip(expected, ("imported", "saved"), strict=True):
        words = ["eval", "--dataset", f"synthetic:{tmp_path / 'benchmark'}", "--model", str(tmp_path / folder)]
        assert mis(*words, "--root", str(root), "--set", "eval.max_clicks=1", "--set", "eval.flip=false") == 0
        assert name in capsys.readouterr().out
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("mis").experiment_id])
    found = {run.info.run_name: run for run in runs}
    assert found.keys() == expected.keys()
    for name, run in found.items():
        params = run.data.params
        told = {key.removeprefix("model."): value for key, value in params.items() if key.startswith("model.")}
        assert told == {"image_size": told["image_size"], **expected[name]}
        others = params.keys() - {f"model.{key}" for key in told}
        assert others == flatten(EvalConfig(), "eval.").keys() | flatten(Resources(), "resources.").keys()
        assert params["eval.max_clicks"] == "1"
        assert "synthetic/noc90" in run.data.metrics
