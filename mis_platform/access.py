"""Who may talk to a cluster: addresses, and where Ray's token is. Nothing is sent from here.

Ray's Jobs API runs whatever it is sent, by design (CVE-2023-48022), and so does its GCS: without a token, anybody who
reaches the port owns the cluster. So this package talks without one only to the loopback address.
"""

import ipaddress
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from mis_platform.redaction import scrub

PLACES = "RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"  # in the order in which Ray looks


@dataclass(frozen=True)
class Token:
    """Ray's token, and the place where it was found. The value never shows in a repr."""

    value: str = field(repr=False)
    place: str


def find_token() -> Token | None:
    """The token that Ray would use, or None. Raises ValueError for a RAY_AUTH_TOKEN_PATH that cannot be read."""
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given or "~/.ray/auth_token").expanduser()
    try:
        value = path.read_text(encoding="utf8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if given:
            raise ValueError(f"RAY_AUTH_TOKEN_PATH: cannot read {path}: {_reason(error)}") from None
        return None
    return Token(value, str(path)) if value else None


def is_disabled() -> bool:
    """Whether Ray's processes started from here would join a cluster without a token."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    return mode == "disabled" or (mode != "token" and find_token() is None)


def is_loopback(host: str) -> bool:
    """Whether a host name or address stays on this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_dashboard(address: str) -> str:
    """The base URL of a cluster's dashboard, if it is safe to talk to.

    Beyond loopback a token is required, and TLS where the address is public: the token travels with every request.
    Raises ValueError that says what to do, ConnectionError for a name that does not resolve.
    """
    url = urlsplit(address if "://" in address else f"http://{address}")
    if url.scheme not in {"http", "https"}:
        raise ValueError(f"--address {scrub(address)}: the Jobs API is at http(s)://HOST:8265; ray:// is not used")
    if url.username or url.password:
        raise ValueError(f"--address must not hold a password; the token is looked for in {PLACES}")
    try:
        host, port = url.hostname or "", url.port
    except ValueError as error:
        raise ValueError(f"--address {address}: {error}") from None
    if not host:
        raise ValueError(f"--address {address}: expected http://HOST:8265")
    base = f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"
    if is_loopback(host):
        return base
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled" or find_token() is None:
        raise ValueError(
            f"{host} is not this machine, and there is no token for it: whoever reaches a Jobs API without one can "
            f"run anything there. Start the cluster with RAY_AUTH_MODE=token and put its token in {PLACES}; or reach "
            "it through a tunnel that ends on 127.0.0.1 (ssh -L, kubectl port-forward, ray dashboard)"
        )
    if url.scheme == "http" and _is_public(host, port or 80):
        raise ValueError(
            f"{host} is a public address and http would show the token to everybody on the way; use https, or a tunnel "
            "that ends on 127.0.0.1 (ssh -L, kubectl port-forward, ray dashboard)"
        )
    return base


def check_ray_address(address: str) -> None:
    """Refuse a RAY_ADDRESS that is joined without a token beyond loopback, and Ray Client. Raises ValueError."""
    if address.startswith("ray://"):
        raise ValueError("RAY_ADDRESS=ray://...: Ray Client is not used here; send the command with `mis submit`")
    if address in {"auto", "local"}:  # a Ray of this machine
        return
    host = urlsplit(f"//{address}").hostname or ""
    if not is_loopback(host) and is_disabled():
        raise ValueError(
            f"RAY_ADDRESS={address} is not the loopback address and token authentication is off: whoever reaches such "
            f"a cluster can run anything on it. Start it with RAY_AUTH_MODE=token and put its token in {PLACES}"
        )


def _is_public(host: str, port: int) -> bool:
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectionError(f"the host {host} is not known: {_reason(error)}") from None
    return any(ipaddress.ip_address(str(each[4][0]).partition("%")[0]).is_global for each in found)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
