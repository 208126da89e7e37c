"""Compose files: nothing listens beyond loopback unless asked, nothing has a default password, nothing runs as root."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

from mis_platform.cluster_files.documents import Document
from mis_platform.cluster_files.findings import WARNING, Finding, Path, shown
from mis_platform.cluster_files.rules import (
    CAPABILITIES,
    LOOPBACK,
    Keys,
    everywhere,
    image,
    mapping,
    names,
    sequence,
    unknown_keys,
)

SERVICE: dict[str, Keys] = {
    **names(
        "annotations build cap_add cap_drop command configs container_name cpus deploy depends_on devices "
        "entrypoint env_file environment expose extra_hosts gpus group_add healthcheck hostname image init "
        "ipc labels logging mem_limit network_mode networks pid pids_limit platform ports privileged profiles "
        "pull_policy read_only restart secrets security_opt shm_size stop_grace_period stop_signal tmpfs tty "
        "ulimits user volumes working_dir"
    ),
    "healthcheck": names("test interval timeout retries start_period start_interval disable"),
}
COMPOSE: dict[str, Keys] = {
    "services": {"*": SERVICE},
    "volumes": {"*": None},
    "networks": {"*": None},
    "secrets": {"*": names("file environment external name")},
    "configs": {"*": names("file content environment external name")},
    **names("name include version"),
}
VARIABLE = re.compile(r"\$\{\w+(?:(:?[-?+])([^{}]*))?\}|\$\w+")  # without another one in it
ANY_HOST = re.compile(r":[\d*]*$|[*?.\s]")  # the port, and what stands for any letters
LOGIN = {
    "MLFLOW_AUTH_ADMIN_PASSWORD": "a new MLflow does not start, an old one has the password that everybody knows",
    "MLFLOW_AUTH_CONFIG_PATH": "users are kept in the container, and everybody may read everything",
}
ASKED_FOR = "(asked for)"  # ${NAME:?how to set it}: nothing starts without it


def check_compose(document: Document) -> Iterator[Finding]:
    """Everything that is wrong with one Compose file."""
    yield from everywhere(document)
    extensions = {key: None for key in document.value if str(key).startswith("x-")}
    yield from unknown_keys(document.file, document.value, {**COMPOSE, **extensions})
    for name, service in mapping(document.value.get("services")).items():
        path: Path = ("services", str(name))
        if not isinstance(service, dict):
            yield Finding(document.file, path, "is not a mapping", "write image: and what else it needs")
            continue
        if "image" in service or "build" not in service:
            yield from image(document.file, (*path, "image"), service.get("image"), runs_ray=False)
        yield from _network(document.file, path, service)
        yield from _confinement(document.file, path, service)
        yield from _postgres(document.file, path, service)
        yield from _mlflow(document.file, path, service)


def _network(file: str, path: Path, service: dict[str, Any]) -> Iterator[Finding]:
    if service.get("network_mode") == "host":
        yield Finding(file, (*path, "network_mode"), "every port of it is the host's", "publish single ports")
    ports = service.get("ports")
    for position, port in enumerate(sequence(ports)):
        host = _host_of(port)
        if host not in {*LOOPBACK, ASKED_FOR}:
            yield Finding(
                file,
                (*path, "ports", position),
                f"published on {host or 'all addresses'}",
                f"write 127.0.0.1:{shown(port)}" if not host else "write 127.0.0.1",
            )


def _host_of(port: Any) -> str:
    """The host address of a published port; empty for all of them."""
    if isinstance(port, dict):
        return _default(str(port.get("host_ip", "")))
    text = _default(str(port))
    return text.rsplit(":", 2)[0] if text.count(":") >= 2 else ""


def _default(text: str) -> str:
    """What a text is when its variables are set to nothing, from the innermost one outwards."""
    while (after := VARIABLE.sub(_value_when_empty, text)) != text:
        text = after
    return text


def _value_when_empty(variable: re.Match[str]) -> str:
    return {":-": variable[2], ":?": ASKED_FOR}.get(variable[1], "")


def _confinement(file: str, path: Path, service: dict[str, Any]) -> Iterator[Finding]:
    if service.get("privileged"):
        yield Finding(file, (*path, "privileged"), "is root on the host", "remove it")
    if any("docker.sock" in str(volume) for volume in sequence(service.get("volumes"))):
        yield Finding(file, (*path, "volumes"), "the Docker socket is root on the host", "remove it")
    for name in sequence(service.get("cap_add")):
        if str(name).upper().removeprefix("CAP_") not in CAPABILITIES:
            yield Finding(file, (*path, "cap_add"), f"{shown(name)} reaches beyond the container", "remove it")
    once = str(service.get("restart")) in {"no", "False"}
    alone = once and service.get("network_mode") == "none" and not service.get("ports")
    if not alone and str(service.get("user", "root")).split(":")[0] in {"root", "0"}:
        yield Finding(file, (*path, "user"), "runs as root", "write user: UID:GID")
    if not service.get("read_only"):
        yield Finding(file, (*path, "read_only"), "can change its own image", "write read_only: true", WARNING)
    if "ALL" not in sequence(service.get("cap_drop")):
        yield Finding(file, (*path, "cap_drop"), "keeps capabilities", "write cap_drop: [ALL]", WARNING)
    if not any("no-new-privileges" in str(option) for option in sequence(service.get("security_opt"))):
        yield Finding(file, (*path, "security_opt"), "may gain privileges", "write [no-new-privileges:true]", WARNING)
    if not once and "healthcheck" not in service:
        yield Finding(file, (*path, "healthcheck"), "nobody notices when it hangs", "write a test", WARNING)


def _postgres(file: str, path: Path, service: dict[str, Any]) -> Iterator[Finding]:
    if "postgres" not in str(service.get("image", "")):
        return
    environment = _environment(service)
    if environment.get("POSTGRES_HOST_AUTH_METHOD") == "trust":
        yield Finding(file, (*path, "environment"), "PostgreSQL without authentication", "remove trust")
    if not {"POSTGRES_PASSWORD", "POSTGRES_PASSWORD_FILE"} & set(environment):
        yield Finding(file, (*path, "environment"), "no POSTGRES_PASSWORD", "write ${POSTGRES_PASSWORD:?how to set it}")


def _mlflow(file: str, path: Path, service: dict[str, Any]) -> Iterator[Finding]:
    words, environment = _words(service.get("command")), _environment(service)
    if "mlflow" not in words or "server" not in words:
        return
    key = (*path, "command")
    if "--disable-security-middleware" in words:
        yield Finding(file, key, "MLflow without host and origin checks", "remove --disable-security-middleware")
    hosts = _default(_option(words, "--allowed-hosts") or environment.get("MLFLOW_SERVER_ALLOWED_HOSTS", ""))
    if not all(ANY_HOST.sub("", host) for host in hosts.split(",")):
        yield Finding(file, key, "MLflow answers to any host name", "write --allowed-hosts with the names that it has")
    if _option(words, "--app-name") != "basic-auth":
        yield Finding(
            file, key, "MLflow without authentication", "write --app-name basic-auth and set an admin password"
        )
    for name, lacks in LOGIN.items():
        if name not in environment and "env_file" not in service:
            yield Finding(file, (*path, "environment"), f"no {name}: {lacks}", "compare with cluster/compose.yaml")
    store = _option(words, "--backend-store-uri") or environment.get("MLFLOW_BACKEND_STORE_URI", "sqlite:")
    if store.startswith(("sqlite:", "file:", "/", ".")):
        yield Finding(file, key, "records in a file do not stand several writers", "use PostgreSQL", WARNING)
    artifacts = _option(words, "--artifacts-destination") or environment.get("MLFLOW_ARTIFACTS_DESTINATION", "")
    if "://" not in artifacts:
        yield Finding(file, key, "artifacts stay in the container", "write --artifacts-destination s3://bucket/prefix")


def _environment(service: dict[str, Any]) -> dict[str, str]:
    environment = service.get("environment") or {}
    if isinstance(environment, list):
        return {name: value for name, _, value in (str(each).partition("=") for each in environment)}
    return {str(name): str(value) for name, value in mapping(environment).items()}


def _words(command: Any) -> list[str]:
    if isinstance(command, list):
        return [str(word) for word in command]
    try:
        return shlex.split(str(command or ""))
    except ValueError:
        return []


def _option(words: list[str], name: str) -> str:
    for position, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and position + 1 < len(words):
            return words[position + 1]
    return ""
