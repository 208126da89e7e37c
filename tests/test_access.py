"""Who may be talked to without a token, and what counts as a password."""

import pytest

from mis_platform import access
from mis_platform.redaction import holds_secret, scrub


@pytest.fixture(autouse=True)
def no_token(tmp_path, monkeypatch):
    """A home without a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_the_token_is_found_where_ray_looks_in_its_order(tmp_path, monkeypatch):
    assert access.find_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    assert access.find_token() == access.Token("from-home", str(tmp_path / ".ray" / "auth_token"))
    (tmp_path / "other").write_text("from-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert access.find_token() == access.Token("from-path", str(tmp_path / "other"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-variable")
    token = access.find_token()
    assert token == access.Token("from-variable", "RAY_AUTH_TOKEN")
    assert "from-variable" not in repr(token)


def test_a_token_path_that_cannot_be_read_is_told(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ValueError, match="/nowhere/token"):
        access.find_token()


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "localhost:8265", "http://[::1]:8265/", "https://127.1.2.3"]
)
def test_loopback_needs_no_token(address):
    assert access.check_dashboard(address).startswith(("http://", "https://"))


@pytest.mark.parametrize("address", ["http://10.0.0.7:8265", "https://10.0.0.7:8265", "http://0.0.0.0:8265"])
def test_beyond_loopback_a_token_is_required(address, monkeypatch):
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=token"):
        access.check_dashboard(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "some-token")
    assert access.check_dashboard(address) == address
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="there is no token"):
        access.check_dashboard(address)


def test_a_public_address_needs_tls_too(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "some-token")
    with pytest.raises(ValueError, match="use https"):
        access.check_dashboard("http://8.8.8.8:8265")
    assert access.check_dashboard("https://8.8.8.8:8265") == "https://8.8.8.8:8265"


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://", "http://me:word@127.0.0.1:8265", "ftp://a"])
def test_what_is_no_jobs_api_is_refused(address):
    with pytest.raises(ValueError, match="--address") as told:
        access.check_dashboard(address)
    assert "word@" not in str(told.value)


@pytest.mark.parametrize(
    ("address", "mode", "token", "refused"),
    [
        ("10.0.0.7:6379", None, None, True),
        ("10.0.0.7:6379", "disabled", "some-token", True),
        ("10.0.0.7:6379", None, "some-token", False),
        ("10.0.0.7:6379", "token", None, False),  # Ray itself then asks for the token
        ("127.0.0.1:6379", "disabled", None, False),
        ("[::1]:6379", None, None, False),
        ("auto", None, None, False),
        ("ray://127.0.0.1:10001", "token", "some-token", True),
    ],
)
def test_a_cluster_is_joined_without_a_token_on_loopback_alone(address, mode, token, refused, monkeypatch):
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_AUTH_TOKEN", token)):
        if value:
            monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(ValueError, match="RAY_ADDRESS"):
            access.check_ray_address(address)
    else:
        access.check_ray_address(address)


def test_joining_refuses_before_ray_is_started(monkeypatch):
    import ray

    from mis_platform.stages.cluster import cluster

    if ray.is_initialized():
        pytest.skip("the session's Ray is used as it is")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    with pytest.raises(ValueError, match="token authentication is off"), cluster():
        pass
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/prefix?region=eu-west-1", False),
        ("http://mlflow.example:5000", False),
        ("folder:/data/photos", False),
        ("http://me:word@mlflow.example", True),
        ("s3://AKEY:asecret@bucket/prefix", True),
        ("s3://bucket?secret_key=x", True),
        ("--root=s3://key@bucket", True),
        ("train.epochs=1", False),
        ("the-canary-value", True),
    ],
)
def test_passwords_are_recognised_and_blotted_out(text, expected, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "the-canary-value")
    assert holds_secret(text) is expected
    shown = scrub(text)
    assert (shown != text) is expected
    assert not any(secret in shown for secret in ("word@", "asecret", "canary", "secret_key=x"))
