"""Jobs on a real Ray: what is sent, how it is followed, the exit codes that come home."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
import requests
from commands import mis as run_mis

import mis_platform
from mis_platform import submission
from mis_platform.submission import Cluster, Job

LOOPBACK = "http://127.0.0.1:8265"


# -- what is sent ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A folder and an environment of our own."""
    monkeypatch.chdir(tmp_path)
    for name in (*submission.HANDED_ON, "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["run", "sweep", "ablation_alpha", "--profile", "smoke", "--root", "s3://bucket/prefix"],
        ["eval", "--dataset", "grabcut", "--model", "latest"],
        ["train", "--set", "train.epochs=1", "--set", "features.weights=/nowhere/on/this/machine.pth"],
        ["precompute", "--dataset", "folder:/nowhere/photos", "--root", "/nowhere/root"],
        ["run", "sweep", "x", "--only", "alpha=0.5", "--set", "dataset=grabcut", "--set", "train.decay_epochs=[1, 2]"],
    ],
)
def test_words_that_can_travel(words, bare):
    for name in ("grabcut", "train", "run"):  # not taken for the folders that happen to be called so
        (bare / name).mkdir()
    assert submission.check_words(words) == []


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--set", "features.weights=w.pth"],
        ["train", "--set", "features.weights=./w.pth"],
        ["train", "--dataset", "folder:photos"],
        ["train", "--dataset=folder:photos"],
        ["eval", "--model", "photos"],
        ["import", "w.pth", "--out", "/nowhere/out"],
        ["train", "--root", "not-there-yet"],
        ["train", "--root=not-there-yet"],
        ["train", "--set=model.init_weights=photos"],
        ["train", "--set", "model.init_weights=photos"],
    ],
)
def test_files_of_this_folder_do_not_travel(words, bare):
    (bare / "w.pth").write_bytes(b"1")
    (bare / "photos").mkdir()
    with pytest.raises(ValueError, match="every node of the cluster sees"):
        submission.check_words(words)


def test_absolute_paths_of_this_machine_are_noted(bare):
    (bare / "w.pth").write_bytes(b"1")
    notes = submission.check_words(["train", "--set", f"features.weights={bare / 'w.pth'}"])
    assert len(notes) == 1
    assert str(bare / "w.pth") in notes[0]


def test_passwords_do_not_travel(bare, monkeypatch):
    with pytest.raises(ValueError, match="password") as told:
        submission.check_words(["train", "--root", "s3://key:aword@bucket"])
    assert "aword" not in str(told.value)
    for name in submission.HANDED_ON:
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://me:aword@example.org/x")
            with pytest.raises(ValueError, match=name) as told:
                submission.variables([], LOOPBACK)
            assert "aword" not in str(told.value)


def test_only_named_variables_travel(bare, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-canary")
    monkeypatch.setenv("MIS_ROOT", "s3://bucket/prefix")
    found = submission.variables([], LOOPBACK)
    assert set(found) - {"MIS_GIT_COMMIT"} == {"MIS_ROOT", "RAY_JOB_STOP_WAIT_TIME_S"}
    assert submission.variables(["AWS_SECRET_ACCESS_KEY"], LOOPBACK)["AWS_SECRET_ACCESS_KEY"] == "the-canary"


@pytest.mark.parametrize("name", ["NOT_SET_ANYWHERE", "HF_TOKEN=the-canary", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "a b"])
def test_variables_that_cannot_travel(name, bare):
    with pytest.raises(ValueError, match="--env") as told:
        submission.variables([name], LOOPBACK)
    assert "canary" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "value", "address"),
    [
        ("MIS_ROOT", "artifacts", LOOPBACK),
        ("MIS_DATA", "data", LOOPBACK),
        ("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db", LOOPBACK),
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000", "http://10.0.0.7:8265"),
    ],
)
def test_places_that_only_this_machine_knows_are_refused(name, value, address, bare, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        submission.variables([], address)


@pytest.mark.parametrize("root", ["", "s3://bucket"])
def test_the_shell_gets_every_word_as_it_was(root, bare):
    """The entrypoint is run by a real shell, with a `python` that shows what it was given."""
    (bare / "bin").mkdir()
    shown = bare / "bin" / "python"
    shown.write_text('#!/bin/sh\necho "$MIS_EXPERIMENTS"\nfor each in "$@"; do echo "[$each]"; done\n')
    shown.chmod(0o755)
    words = ["run", "sweep", "x", "--only", "alpha=0.5; rm -rf $HOME `id`", "--set", "a='b' \"c\""]
    environment = {"PATH": f"{bare / 'bin'}:/usr/bin:/bin", "MIS_ROOT": root}
    command = ["sh", "-c", submission.entrypoint(words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    if not root:
        assert done.returncode == 2
        assert "--root" in done.stdout
        return
    expected = [f"{bare}/experiments", "[-m]", "[mis_platform.cli]", *(f"[{word}]" for word in words)]
    assert done.stdout.splitlines() == expected


def test_commands_without_artifacts_need_no_root():
    assert "MIS_ROOT" not in submission.entrypoint(["list"])
    assert "MIS_ROOT" not in submission.entrypoint(["train", "--root", "s3://bucket"])
    assert "MIS_ROOT" in submission.entrypoint(["train"])


def test_ids_are_readable_and_differ():
    words = ["run", "sweep", "../ablation alpha", "--only", "x"]
    found = {submission.new_id(words) for _ in range(100)}
    assert len(found) == 100
    assert all(name.startswith("mis-run-sweep-_ablation_alpha-") and "/" not in name for name in found)


@pytest.mark.parametrize(
    ("state", "code", "message", "expected", "said"),
    [
        ("RUNNING", None, "", None, ""),
        ("SUCCEEDED", 0, "", 0, "exit code 0"),
        ("FAILED", 2, "", 2, "exit code 2"),
        ("FAILED", 75, "", 75, "exit code 75"),
        ("FAILED", 1, "", 1, "exit code 1"),
        ("FAILED", -9, "", 6, "signal 9 (often: out of memory)"),
        ("FAILED", 143, "", 6, "signal 15"),
        ("FAILED", 127, "", 6, "exit code 127"),
        ("FAILED", None, "The node died\ns3://a:aword@b", 6, "lost: The node died"),
        ("STOPPED", None, "", 130, "stopped"),
    ],
)
def test_exit_codes_come_home(state, code, message, expected, said):
    job = Job("mis-x", state, "train", 1.0, None, code, message)
    assert job.exit_code == expected
    if expected is not None:
        assert said in job.ending()
        assert "aword" not in job.ending()


def test_an_unreachable_cluster_is_told_in_a_line():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match="no Ray cluster answers") as told:
            Cluster(f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert "connection refused" in str(told.value)
    assert len(str(told.value)) < 200


class HeadWithoutAgent(BaseHTTPRequestHandler):
    """What Ray's dashboard answers while nothing on its node takes jobs."""

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"version": "4", "ray_version": ray.__version__}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(500, "No available agent to submit job, please try again later.")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words: object) -> None: ...


def test_a_head_whose_port_another_ray_holds_is_told_with_the_cure():
    with HTTPServer(("127.0.0.1", 0), HeadWithoutAgent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cluster = Cluster(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ConnectionError, match="ray start --dashboard-agent-listen-port"), cluster._explained():
            cluster._send(entrypoint="true")
        server.shutdown()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port of the loopback address where connections are accepted and nothing is ever answered."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for each in accepted:
        each.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "words",
    [
        ["submit", "--address", "ADDRESS", "--", "list"],
        ["status", "--address", "ADDRESS"],
        ["status", "mis-x", "--address", "ADDRESS"],
        ["logs", "mis-x", "--address", "ADDRESS"],
        ["logs", "mis-x", "--follow", "--address", "ADDRESS"],
        ["stop", "mis-x", "--address", "ADDRESS"],
    ],
)
def test_a_head_that_accepts_and_never_answers_is_told_in_a_line(words, silent, bare, monkeypatch, capsys):
    assert submission.CONNECT_SECONDS + submission.FIRST_SECONDS <= 30  # what it takes at most
    monkeypatch.setattr(submission, "FIRST_SECONDS", 0.3)
    address = f"http://127.0.0.1:{silent}"
    began = time.monotonic()
    assert run_mis(*(word.replace("ADDRESS", address) for word in words)) == 6
    assert time.monotonic() - began < 5
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert told == [
        f"Error: no Ray cluster answers at {address} (it does not answer in time); is it running, does a tunnel lead "
        "there?"
    ]


class HeadWithoutTail(HeadWithoutAgent):
    """What answers every question but that for the log's end, while a job runs and is soon over."""

    asked = 0

    def do_GET(self) -> None:
        if self.path.endswith("/tail"):
            time.sleep(30)
        elif self.path.endswith("/logs"):
            self.answer(200, json.dumps({"logs": "all of it"}))
        elif "/jobs/" in self.path:
            type(self).asked += 1
            status = "RUNNING" if self.asked < 3 else "SUCCEEDED"
            job = {"type": "SUBMISSION", "submission_id": "mis-x", "status": status, "entrypoint": "true"}
            self.answer(200, json.dumps(job))
        else:
            super().do_GET()


@pytest.mark.timeout(60)
def test_a_log_whose_end_never_comes_is_given_up_with_its_job(monkeypatch, capsys):
    monkeypatch.setattr(submission, "ANSWER_SECONDS", 0.3)
    with ThreadingHTTPServer(("127.0.0.1", 0), HeadWithoutTail) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        began = time.monotonic()
        job = Cluster(f"http://127.0.0.1:{server.server_port}").follow("mis-x")
        assert time.monotonic() - began < 10
        server.shutdown()
    assert job.exit_code == 0
    assert capsys.readouterr().out == "all of it\n"


# -- on a real cluster -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The dashboard of a Ray of its own, on the loopback address and with a token of its own.

    Not the session's: a Ray that a process starts takes one fixed port for its jobs, which another may hold.
    """
    dashboard, folder = free_port(), tempfile.mkdtemp(prefix="mis-ray-", dir="/tmp")  # sockets need a short path
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--port=0"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}", "--disable-usage-stats"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
        # A job runs the `python` of the path, which need not be that of the tests.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        url = f"http://127.0.0.1:{dashboard}"
        with open(Path(folder, "head.log"), "w") as log:
            head = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(lambda: head.poll() is not None or listens(dashboard), seconds=100)
            assert head.poll() is None, Path(folder, "head.log").read_text()
            yield url
        finally:
            head.terminate()  # it ends what it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(timeout=5)
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if folder.encode() in (process / "cmdline").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for the package that talks for a while, then waits; it says so when it is asked to stop."""
    package = tmp_path_factory.mktemp("chatty") / "mis_platform"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(
        "import os, signal, sys, time\n"
        # Ray's own first line waits in a buffer until the job has been started, and would fall into one of ours.
        "log, until = os.readlink('/proc/self/fd/1'), time.monotonic() + 20\n"
        "while 'Running entrypoint' not in open(log).read() and time.monotonic() < until:\n    time.sleep(0.02)\n"
        "def stop(*_):\n    time.sleep(4)\n    print('committed', flush=True)\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "for number in range(int(sys.argv[1])):\n"
        "    sys.stdout.write(f'line {number} \\u00e4\\u00f6')\n    sys.stdout.flush()\n"
        "    time.sleep(0.02)\n    print(flush=True)\n"
        "print('end of the talk', end='', flush=True)\n"
        "time.sleep(float(sys.argv[2]))\n"
    )
    return package


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


class Proxy:
    """A TCP proxy to a port of this machine whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self._port, self._pairs = port, []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.is_open, self.accepted = True, 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if not self.is_open:
                    client.close()
                    continue
                self.accepted += 1
                server = socket.create_connection(("127.0.0.1", self._port))
                self._pairs.append((client, server))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for pair in self._pairs:
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def close(self) -> None:
        self._server.close()
        self.cut()


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_our_own_sources_and_exit_codes(address, tmp_path, capsys):
    """The uploaded package wins over the installed one; 0, a typo's 2 and missing data's 3 come home as they are."""
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    (experiments / "own_question.py").write_text('"""Does it travel?"""\n')
    package = tmp_path / "mis_platform"
    for each in Path(mis_platform.__file__).parent.rglob("*.py"):
        target = package / each.relative_to(Path(mis_platform.__file__).parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(each.read_bytes())
    with open(package / "__init__.py", "a") as source:
        source.write("print('these are the sources that were sent')\n")
    cluster = Cluster(address)
    commands = {
        0: ["list"],
        2: ["train", "--set", "train.epoch=1", "--root", "/nowhere/root"],
        3: ["eval", "--dataset", "grabcut:/nowhere", "--root", "/nowhere/root"],
    }
    expected = {0: "Does it travel?", 2: "did you mean train.epochs?", 3: "/nowhere"}
    sent = {code: cluster.submit(words, experiments=experiments, package=package) for code, words in commands.items()}
    for code, name in sent.items():
        job = cluster.follow(name)
        said = capsys.readouterr().out
        assert (job.exit_code, job.driver_exit_code) == (code, code), said
        assert expected[code] in said
        assert "these are the sources that were sent" in said
        assert "Traceback" not in said
    assert {job.id for job in cluster.jobs()} >= set(sent.values())
    with pytest.raises(ValueError, match=f"did you mean {sent[2]}"):
        cluster.job(sent[2][:-1] + "x")
    table = submission.table(cluster.jobs())
    assert "train --set train.epoch=1" in table


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_log_is_said_once_however_often_the_connection_breaks(address, chatty, nothing):
    proxy = Proxy(int(address.rpartition(":")[2]))
    lines, notes = [], []
    try:
        cluster = Cluster(proxy.address)
        name = cluster.submit(["150", "0", "--help"], experiments=nothing, package=chatty)
        assert "--root" not in cluster.job(name).words

        def interfere() -> None:
            wait_for(lambda: len(lines) > 20)
            proxy.cut()
            wait_for(lambda: len(lines) > 60)
            proxy.is_open = False
            proxy.cut()
            wait_for(lambda: bool(notes))
            proxy.is_open = True

        thread = threading.Thread(target=interfere, daemon=True)
        thread.start()
        job = cluster.follow(name, lines.append, notes.append)
        thread.join(timeout=10)
    finally:
        proxy.close()
    assert job.exit_code == 0
    own = [line for line in lines if line.startswith("line")]
    assert own == [f"line {number} äö" for number in range(150)]
    assert lines[-1] == "end of the talk"
    assert "connection is lost" in notes[0]
    assert "connected again" in notes[-1]


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_twins_are_refused_ctrl_c_detaches_and_stop_lets_it_commit(address, chatty, nothing):
    cluster = Cluster(address)
    words = ["3", "300", "--help"]  # of the stand-in: without it a root would be asked for
    name = cluster.submit(words, experiments=nothing, package=chatty)
    with pytest.raises(ValueError, match=name):
        cluster.submit(words, experiments=nothing, package=chatty)
    with mis("logs", name, "--follow", "--address", address) as following:
        assert following.stdout is not None
        for line in following.stdout:
            if line.startswith("line 2"):
                break
        following.send_signal(signal.SIGINT)
        _, told = following.communicate(timeout=30)
    assert following.returncode == 130
    assert f"mis stop {name}" in told
    assert "run the same command again" not in told
    assert "Traceback" not in told
    assert not cluster.job(name).is_over
    stopped = cluster.stop(name)  # it takes longer over it than the three seconds that Ray leaves by itself
    assert (stopped.state, stopped.exit_code) == ("STOPPED", 130)
    assert "committed" in cluster.logs(name)
    again = cluster.submit(words, experiments=nothing, package=chatty)
    assert again != name  # the first one no longer runs

    def stop() -> None:  # nobody waits for it: the cluster may end before the job has
        with contextlib.suppress(ConnectionError):
            cluster.stop(again)

    threading.Thread(target=stop, daemon=True).start()


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_wrong_or_missing_token_is_refused(address, tmp_path, monkeypatch):
    assert requests.get(f"{address}/api/jobs/", timeout=20).status_code == 401
    wrong = {"Authorization": "Bearer the-canary-token"}
    body = {"entrypoint": "touch " + str(tmp_path / "ran")}
    assert requests.post(f"{address}/api/jobs/", json=body, headers=wrong, timeout=20).status_code == 403
    assert requests.post(f"{address}/api/jobs/", json=body, timeout=20).status_code == 401
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-canary-token")
    with pytest.raises(
        ValueError, match=r"the token of RAY_AUTH_TOKEN is not the cluster's.*~/.ray/auth_token"
    ) as told:
        Cluster(address)
    assert "canary" not in str(told.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    with mis("status", "--address", address) as done:
        output, told_here = done.communicate(timeout=60)
    assert done.returncode == 2, output
    assert "the cluster wants a token" in told_here
    assert "RAY_AUTH_TOKEN_PATH" in told_here
    assert not (tmp_path / "ran").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_with_refused_photos_says_four(address, tmp_path, real_data, monkeypatch):
    """Through the command line, on the cluster that the job runs on: a strict precompute with a broken photo."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for each in sorted((real_data / "GrabCut" / "data_GT").iterdir())[:2]:
        (photos / each.name).write_bytes(each.read_bytes())
    (photos / "broken.jpg").write_bytes(each.read_bytes()[:1000])
    words = ["precompute", "--strict", "--dataset", f"folder:{photos}", "--root", str(tmp_path / "root")]
    words += ["--set", "features.extractor=color_texture"]
    with mis("submit", "--address", address, "--", *words) as done:
        output, told = done.communicate(timeout=280)
    assert done.returncode == 4, output + told
    assert "quarantined 1" in output
    assert "exit code 4" in told


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_doctor_looks_at_the_cluster_that_it_is_sent_to(address, tmp_path):
    words = ["doctor", "ablation_alpha", "--profile", "smoke", "--root", str(tmp_path / "root")]
    with mis("submit", "--address", address, "--", *words) as done:
        output, told = done.communicate(timeout=110)
    assert done.returncode == 0, output + told
    assert "ok    token: in RAY_AUTH_TOKEN" in output
    assert re.search(r"ok    cluster: joined \S+:\d+ in .* 1 node\(s\)", output), output
    assert "1 node(s): 1 training(s) x 1 worker(s)" in output
    assert os.environ["RAY_AUTH_TOKEN"] not in output + told


@contextlib.contextmanager
def mis(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """`mis ARGUMENTS` as a process of its own, ended with the block."""
    command = [sys.executable, "-m", "mis_platform.cli", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()
