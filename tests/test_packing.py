"""What travels to a cluster, and what stops everything before anything is sent (B44)."""

import os
from pathlib import Path

import pytest

import mis_platform
from mis_platform import packing

PACKAGE = Path(mis_platform.__file__).parent


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "mine.py").write_text('"""Mine?"""\n')
    (folder / "numbers.json").write_text("[1]")
    return folder


def names(experiments: Path) -> set[str]:
    return {each.name for each in packing.collect(experiments)}


def test_the_whole_package_and_the_experiments_travel_and_nothing_else(experiments, tmp_path):
    (experiments / "__pycache__").mkdir()
    for skipped in (".git", ".venv", "artifacts", "data", "node_modules"):
        (experiments / skipped).mkdir()
        (experiments / skipped / "credentials").write_text("never looked at, never sent")
    (experiments / "__pycache__" / "mine.pyc").write_bytes(b"1")
    (experiments / "mlflow.db").write_bytes(b"1")
    found = names(experiments)
    sources = {f"mis_platform/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    assert sources <= found
    assert "mis_platform/data/images.py" in found
    rest = {name for name in found - sources if not name.startswith("mis_platform/")}
    assert rest == {"experiments/mine.py", "experiments/numbers.json"}
    assert not any("__pycache__" in name for name in found)
    packing.pack(packing.collect(experiments), tmp_path / "out")
    packed = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert packed == found
    assert (tmp_path / "out/mis_platform/cli.py").read_bytes() == (PACKAGE / "cli.py").read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        *(".env", ".env.local", "server.pem", "TLS.KEY", "id_rsa", "id_ed25519", "id_rsa.pub", ".netrc", "credentials"),
        *(".aws/config", ".ssh/known_hosts", "deep/er/.aws/credentials", ".kube/config", "gcp-credentials.json"),
        *("auth_token", "deep/.env", ".pgpass", "store.p12", "secrets.yaml"),
        *("prod.env", ".envrc", "aws_credentials", "hf_token.txt", "passwords.csv", "key.ppk", "my_secret.yaml"),
        *(".dockerconfigjson", "prod-kubeconfig.yaml", "Gcp-Service-Account-1.json"),
    ],
)
def test_secrets_are_refused_by_name(name, experiments):
    path = experiments / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("word")
    with pytest.raises(ValueError, match="nothing was sent") as told:
        packing.collect(experiments)
    named = next(part for part in (path, *path.parents) if str(part) in str(told.value))
    assert named != experiments
    assert "word" not in str(told.value).replace("passwords.csv", "")


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN " + "RSA PRIVATE KEY-----\nabc",
        "aws_access_key_id=" + "AKIA" + "ABCDEFGHIJKLMNOP",
        "export HF_TOKEN=" + "hf_" + "aBcDeFgHiJ" * 3 + "aBcD",
        "https://" + "ghp_" + "a1B2c3D4e5F6" * 3 + "@github.com",
        "key: " + "AIza" + "Sy0-_" * 7,
    ],
)
def test_a_key_is_refused_whatever_the_name_of_its_file(experiments, text):
    (experiments / "notes.txt").write_text(text)
    with pytest.raises(ValueError, match=r"notes\.txt \(holds a key or token\)"):
        packing.collect(experiments)


def test_modules_may_be_called_like_secrets(experiments):
    (experiments / "id_map.py").write_text("")
    (experiments / "token.py").write_text("")
    (experiments / "secrets_of_sampling.py").write_text("")
    assert {"experiments/id_map.py", "experiments/token.py", "experiments/secrets_of_sampling.py"} <= names(experiments)


def test_five_gigabytes_are_refused_and_the_biggest_named(experiments):
    for name, size in (("huge.bin", 5 * 2**30), ("big.bin", 30 * 2**20), ("small.bin", 1)):
        with open(experiments / name, "wb") as file:
            file.truncate(size)
    with pytest.raises(ValueError, match="at most 20 may; nothing was sent") as told:
        packing.collect(experiments)
    message = str(told.value)
    assert message.index("huge.bin (5120.0 MiB)") < message.index("big.bin (30.0 MiB)")
    assert "small.bin" not in message


def test_just_below_the_limit_travels(experiments):
    rest = sum(each.size for each in packing.collect(experiments))
    with open(experiments / "table.bin", "wb") as file:
        file.truncate(packing.MAX_BYTES - rest)
    assert "experiments/table.bin" in names(experiments)
    with open(experiments / "one.bin", "wb") as file:
        file.truncate(1)
    with pytest.raises(ValueError, match=r"table\.bin"):
        packing.collect(experiments)


def test_links_cannot_smuggle(experiments, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "words.txt").write_text("word")
    for link, target in (
        ("file.py", tmp_path / "home" / "words.txt"),
        ("folder", tmp_path / "home"),
        ("dead", "/nowhere"),
    ):
        (experiments / link).symlink_to(target)
        with pytest.raises(ValueError, match=f"{link} .is a link"):
            packing.collect(experiments)
        (experiments / link).unlink()


def test_a_pipe_does_not_hang_it(experiments):
    os.mkfifo(experiments / "pipe")
    with pytest.raises(ValueError, match=r"pipe .is no file"):
        packing.collect(experiments)


def test_a_folder_that_is_no_folder_of_experiments_is_told(experiments, monkeypatch):
    monkeypatch.setattr(packing, "MAX_FILES", 200)
    for number in range(200):
        (experiments / f"{number}.txt").touch()
    with pytest.raises(ValueError, match="MIS_EXPERIMENTS"):
        packing.collect(experiments)


def test_the_users_folder_is_the_one_of_mis_experiments(experiments, monkeypatch):
    monkeypatch.setenv("MIS_EXPERIMENTS", str(experiments))
    assert "experiments/mine.py" in {each.name for each in packing.collect()}
