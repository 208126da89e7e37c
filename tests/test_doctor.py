"""`mis doctor`: each check on something that is really right or wrong, and the exit code of the worst."""

import base64
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mis_platform import doctor
from mis_platform.config import ModelConfig, Resources, Run, override
from mis_platform.doctor import FAIL, OK, WARN, Finding
from mis_platform.storage import Storage


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No hub and nothing in its cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def only(findings: Iterator[Finding], state: str) -> list[str]:
    return [str(each) for each in findings if each.state == state]


def test_a_smoke_sweep_needs_nothing(tmp_path, offline):
    root = Storage(str(tmp_path / "root"))
    found = list(doctor.examine(root, None, Resources(), "ablation_alpha", "smoke"))
    assert only(found, FAIL) == []
    text = "\n".join(map(str, found))
    for expected in ("Python 3", "ray 2.60", "training(s) x 1 worker(s)", "1 MiB write", "weights: none are needed"):
        assert expected in text
    assert not (tmp_path / "root").exists()


def test_the_paper_needs_data_and_weights_and_says_how_to_get_them(tmp_path, offline, capsys, monkeypatch):
    from test_cli import mis

    assert mis("doctor", "ablation_alpha", "--root", str(tmp_path), "--data-root", str(tmp_path)) == 3
    out = capsys.readouterr().out
    for expected in ("FAIL  data: ", "sbd", "berkeley", "FAIL  no weights for features.extractor=dino_vits8", "MAE"):
        assert expected in out
    assert "features.weights=PATH" in out
    assert mis("doctor", "ablation_alfa") == 2
    assert "did you mean ablation_alpha?" in capsys.readouterr().err


def test_the_worst_kind_is_the_exit_code(tmp_path, capsys, offline, monkeypatch):
    from test_cli import mis

    assert mis("doctor", "ablation_alpha", "--profile", "smoke", "--root", str(tmp_path)) == 0
    wide = ["--set", "resources.num_workers=1000"]
    assert mis("doctor", "ablation_alpha", "--profile", "smoke", "--root", str(tmp_path), *wide) == 2
    assert "resources.num_workers=1000 needs at least 1000 x 0.1 = 100 CPUs" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert mis("doctor", "ablation_alpha", "--profile", "smoke", "--root", str(tmp_path), *wide) == 6


def test_a_root_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").write_text("")
    found = list(doctor._guarded("storage", lambda: doctor._storage(Storage(str(tmp_path / "file")))))
    assert [each.exit_code for each in found] == [2]
    assert "choose another --root" in str(found[0])


def test_versions_below_the_floors_are_found(monkeypatch):
    monkeypatch.setattr(doctor, "FLOORS", {"ray": "99", "pillow": "12.3", "no-such-package": "1"})
    found = only(doctor._versions(), FAIL)
    assert len(found) == 1
    assert "is not >=99" in found[0]
    assert "no-such-package is not installed" in found[0]
    assert "pillow" not in found[0]


def test_pins_that_differ_are_named(tmp_path, monkeypatch):
    (tmp_path / "mis_platform").mkdir()
    (tmp_path / "constraints.txt").write_text("# the tests' own\nray==1.0.0\n")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "mis_platform" / "doctor.py"))
    assert "(pin 1.0.0)" in only(doctor._versions(), WARN)[0]


def test_a_token_that_others_may_read_and_a_cluster_without_one(tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("the-canary-token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    token.chmod(0o644)
    assert "chmod 600" in only(doctor._token(), WARN)[0]
    token.chmod(0o600)
    assert only(doctor._token(), WARN) == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "token authentication is off" in only(doctor._guarded("token", doctor._token), FAIL)[0]


def test_a_gpu_that_pytorch_cannot_use_is_found_unless_it_is_hidden(tmp_path, monkeypatch):
    assert only(doctor._gpus(Resources()), FAIL) == []  # GPUs are hidden from tests
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(doctor, "GPU_FILE", tmp_path / "nvidia0")
    assert only(doctor._gpus(Resources()), FAIL) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 0)
    (fault,) = only(doctor._gpus(Resources()), FAIL)
    assert "there is one, and PyTorch cannot use it" in fault


def test_open_files(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    assert "ulimit -n" in only(doctor._open_files(), WARN)[0]


class Tracking(http.server.BaseHTTPRequestHandler):
    """As much of an MLflow server with basic authentication as a login needs. logins: those it accepts."""

    logins: frozenset[str] = frozenset()

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Basic ")
        accepted = base64.b64decode(given).decode() in self.logins
        self.send_response(200 if accepted else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"experiments": []}).encode() if accepted else b"not authenticated")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tracking)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize(("login", "screams"), [("admin:password1234", True), ("admin:a-better-one", False)])
def test_the_default_password_of_mlflow_is_screamed_about(login, screams, server, tmp_path, monkeypatch):
    monkeypatch.setattr(Tracking, "logins", frozenset({login}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_address[1]}")
    found = list(doctor._guarded("MLflow", lambda: doctor._mlflow(Storage(str(tmp_path)))))
    assert any("ACCEPTS THE DEFAULT PASSWORD" in str(each) for each in found) is screams
    assert not any("password1234" in str(each) for each in found)
    assert found[-1].state == FAIL  # we have no login: it cannot be written


def test_a_sqlite_store_is_written(tmp_path):
    from mis_platform import tracking

    root = Storage(str(tmp_path))
    assert "will be made" in only(doctor._mlflow(root), OK)[0]
    client = tracking.connect(root)
    assert "written" in only(doctor._mlflow(root), OK)[0]
    assert "mis.doctor" in client.get_experiment_by_name("mis").tags


def test_no_secret_is_shown(tmp_path, offline, monkeypatch):
    """S6: values of secret variables, passwords in addresses and the token, in whatever goes wrong."""
    canary = "canary-8d1f4c"
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, canary)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:another-{canary[:6]}@127.0.0.1:9")
    found = list(doctor.examine(Storage(str(tmp_path)), None, Resources(), "ablation_alpha", "small"))
    assert any(each.state == FAIL for each in found)
    assert canary[:6] not in "\n".join(map(str, found))
    with pytest.raises(ValueError, match="password") as refused:  # such a root is not even looked at
        Storage(f"s3://key:{canary}@bucket/p")
    assert canary[:6] not in str(refused.value)


def test_weights_that_are_given_are_looked_at(tmp_path):
    from mis_platform.config import Run

    weights = tmp_path / "w.pth"
    run = override(Run(), [f"features.weights={weights}", f"model.init_weights={weights}"])
    assert [each.exit_code for each in doctor._weights([run])] == [3, 3]
    weights.write_bytes(b"1")
    assert [each.state for each in doctor._weights([run])] == [OK, OK]


# Two nodes; a path below /proc/self/cwd is, for each process, another folder: as unshared as two disks.
STORY = """
    import os, sys
    from pathlib import Path
    from ray.cluster_utils import Cluster
    from mis_platform import doctor
    from mis_platform.config import Resources
    from mis_platform.storage import Storage

    def told(root, data):
        for each in doctor.examine(Storage(str(root)), data, Resources(), "ablation_alpha", "smoke"):
            print(each.exit_code, each, flush=True)

    folder = Path(sys.argv[1])
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        os.environ["RAY_ADDRESS"] = nodes.address
        told(folder, folder)
        print("-- apart", flush=True)
        (folder / "here").mkdir()
        os.chdir(folder / "here")
        told("/proc/self/cwd", Path("/proc/self/cwd/.."))
    finally:
        nodes.shutdown()
    """


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_node_is_asked_what_it_sees(tmp_path):
    """In a process of its own: this one may have joined another Ray."""
    repository = Path(doctor.__file__).parent.parent
    paths = os.pathsep.join([str(repository), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
    command = [sys.executable, "-c", textwrap.dedent(STORY), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    shared, apart = done.stdout.split("-- apart")
    assert "2 node(s)" in shared
    assert shared.count("seen by all 2 nodes") == 2, shared
    assert "root: /proc/self/cwd is not the same directory on all 2 nodes" in apart
    assert max(int(line.split()[0]) for line in apart.splitlines() if line[:1].isdigit()) == 2, apart


def test_memory_and_disk_are_counted_for_the_runs_that_were_named(tmp_path, monkeypatch):
    small, paper = Run(model=ModelConfig(variant="vit_xt", init="random")), Run()
    other_eval = override(paper, ["eval.max_clicks=5"])
    root = Storage(str(tmp_path / "not" / "there"))
    (memory, disk) = map(str, doctor._memory([small, paper, other_eval], Resources(num_workers=2), root))
    assert "1 training(s) x 2 worker(s) x 1.5 GiB for vit_b, its gradients and Adam; 2.9 of " in memory
    assert "checkpoints of 2 training(s), 6.6 GiB; 6.6 of " in disk
    assert list(doctor._memory([override(paper, ["method=graphcut"])], Resources(), root)) == []
    monkeypatch.setattr(doctor, "_memory_of_nodes", lambda: 2.0)
    (fault,) = only(doctor._memory([paper], Resources(num_workers=2), root), FAIL)
    assert "2.9 of 2.0 GiB" in fault
    assert "fewer resources.num_workers" in fault


def test_a_store_that_cannot_be_made_fails() -> None:
    (fault,) = only(doctor._mlflow(Storage("/proc/nowhere")), FAIL)
    assert "sqlite:////proc/nowhere/mlflow.db cannot be made" in fault
