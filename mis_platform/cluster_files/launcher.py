"""The YAML of `ray up`: machines of a cloud, or a list of hosts.

Ray's own validation runs too, in this one place, because it is private; what it leaves open (keys of the provider and
of the machines, flags of `ray start`) is checked here.
"""

import contextlib
import copy
import io
import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from mis_platform.cluster_files.documents import Document
from mis_platform.cluster_files.findings import WARNING, Finding, shown
from mis_platform.cluster_files.machines import NODE_CONFIG, TYPES, check_machines, is_local, node_count, workers_of
from mis_platform.cluster_files.rules import (
    CAPABILITIES,
    EVERYWHERE,
    LOOPBACK,
    UNKNOWN,
    everywhere,
    image,
    installs_another_ray,
    mapping,
    nearest,
    storage,
    unknown_keys,
    walk,
)
from mis_platform.cluster_files.shell import START_FLAGS, start_flags, variables

# What Ray's providers read beyond its schema, which allows any key there.
PROVIDER_KEYS = {"aws_credentials", "coordinator_address", "external_head_ip", "use_external_head_ip", "_has_tpus"}

NETWORK_MOUNT = re.compile(r"\bmount\b[^;&|]*?-t\s*(?:nfs4?|efs|cifs|ceph|lustre|glusterfs|beegfs)\b([^;&|]*)")
MOUNT_CHECK = re.compile(r"\bmountpoint\s+(?:-q\s+)?(/\S+)")
ROOT_ON_HOST = re.compile(
    r"--privileged(?!=false)|\S*docker\.sock|--(?:pid|userns)[= ]host|--security-opt[= ]\S*unconfined"
    rf"|(?<!\S)(?:-v ?|--volume[= ])/:\S+|--cap-add[= ](?!(?:CAP_)?(?:{'|'.join(CAPABILITIES)})(?!\w))\S+"
)
TOKEN_FILE = re.compile(r"^(~|/home/[^/]+|/root)/\.ray/auth_token$")  # where Ray looks
HEAD_ADDRESS = re.compile(r"^(?:\$RAY_HEAD_IP|\$\{RAY_HEAD_IP\}|(?P<fixed>[^$]\S*)):(?P<port>\d+)$")
HEAD_PORT = "6379"  # Ray's default
ROLES = ("head", "worker")
COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands")


def check_launcher(document: Document, cpu_only: bool) -> Iterator[Finding]:
    """Everything that is wrong with one cluster YAML."""
    yield from everywhere(document)
    complaints = list(_schema(document))
    yield from complaints
    yield from _further_keys(document)
    if any(complaint.problem != UNKNOWN for complaint in complaints):
        return  # with values of a wrong type there is nothing to go on
    config, complaint = _prepared(document.value)
    if complaint and not complaints:
        yield Finding(document.file, "", f"Ray refuses it: {complaint}", "compare with cluster/aws.yaml")
    if config is None:
        return
    yield from _images(document.file, config)
    yield from _confinement(document.file, config)
    yield from _installations(document, config)
    yield from _settings(document.file, config)
    yield from _start(document, config)
    yield from _joining(document, config)
    yield from _network(document)
    has_v2 = _environment(config, "head").get("RAY_enable_autoscaler_v2") == "1"
    yield from check_machines(document.file, config, cpu_only, has_v2)


# -- keys ------------------------------------------------------------------------------------------------------------


@cache
def _ray_schema() -> dict[str, Any]:
    import ray.autoscaler

    with open(os.path.join(os.path.dirname(ray.autoscaler.__file__), "ray-schema.json"), encoding="utf8") as stream:
        return json.load(stream)


def _schema(document: Document) -> Iterator[Finding]:
    """All that Ray's schema forbids; Ray itself would name only the first."""
    import jsonschema

    validator, config = jsonschema.Draft7Validator(_ray_schema()), dict(document.value)
    if is_local(config):
        config.pop("min_workers", None)  # not in the schema, yet read for a list of hosts
    for error in sorted(validator.iter_errors(config), key=lambda each: list(map(str, each.absolute_path))):
        path = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            for key in sorted(set(error.instance) - set(known), key=str):
                yield Finding(document.file, (*path, key), UNKNOWN, nearest(str(key), known))
        else:  # the message of the library would quote the value
            yield Finding(document.file, path, f"not what Ray's schema wants: {_wanted(error)}", "correct it")


def _wanted(error: Any) -> str:
    description = error.schema.get("description", "") if isinstance(error.schema, dict) else ""
    return f"{error.validator} {shown(error.validator_value)}" + (f" ({shown(description)})" if description else "")


def _prepared(config: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The configuration with Ray's defaults, as `ray up` would use it, or None and why Ray refuses it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    chatter = io.StringIO()  # Ray prints; what it says is in the exceptions
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter), _silence():
            prepared = prepare_config(copy.deepcopy(config))
            try:
                validate_config(prepared)
            except Exception as error:
                return prepared, _first_line(error)
        return prepared, ""
    except (Exception, SystemExit) as error:  # its own errors, KeyError, AssertionError, click's, ...
        said = [line for line in chatter.getvalue().splitlines() if line.strip()]
        return None, _first_line(error) if str(error) else " ".join(said[-1:]) or type(error).__name__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    text = str(getattr(error, "message", "") or error)
    return f"{type(error).__name__}: {shown(text.splitlines()[0] if text else '')}"


def _further_keys(document: Document) -> Iterator[Finding]:
    provider = document.value.get("provider")
    if not isinstance(provider, dict):
        return
    known = {*_ray_schema()["properties"]["provider"]["properties"], *PROVIDER_KEYS}
    yield from unknown_keys(document.file, provider, dict.fromkeys(known), ("provider",))
    kind, types = str(provider.get("type")), document.value.get("available_node_types")
    for name, node_type in types.items() if isinstance(types, dict) else ():
        if not isinstance(node_type, dict):
            continue
        path = (TYPES, str(name))
        yield from unknown_keys(
            document.file, node_type.get("node_config"), NODE_CONFIG.get(kind), (*path, "node_config")
        )
        for resource in mapping(node_type.get("resources")):
            right = str(resource).upper().rstrip("S")
            if right in {"CPU", "GPU"} and resource != right:
                yield Finding(
                    document.file,
                    (*path, "resources", resource),
                    f"{resource} is a resource that nothing asks for",
                    f"did you mean {right}?",
                )


# -- what runs where -------------------------------------------------------------------------------------------------


def _docker_options(config: Mapping[str, Any], role: str) -> list[str]:
    docker = config.get("docker") or {}
    lists = [docker.get("run_options") or [], docker.get(f"{role}_run_options") or []]
    try:
        return shlex.split(" ".join(str(option) for options in lists for option in options))
    except ValueError:
        return []


def _commands(config: Mapping[str, Any], role: str) -> list[str]:
    """Shell commands of a role, in the order in which they run; setup commands already contain the common ones."""
    names = ["initialization_commands", f"{role}_setup_commands", f"{role}_start_ray_commands"]
    return [str(command) for name in names for command in config.get(name) or []]


def _environment(config: Mapping[str, Any], role: str) -> dict[str, str]:
    """Variables of the container, and those that commands set for Ray."""
    found: dict[str, str] = {}
    options = _docker_options(config, role)
    for position, option in enumerate(options):
        flag, mark, rest = option.partition("=")
        if flag in {"-e", "--env"}:
            text = rest if mark else (options[position + 1] if position + 1 < len(options) else "")
            name, _, value = text.partition("=")
            found[name] = value
    for command in _commands(config, role):
        found |= dict(variables(command))
    return found


def _shared_directories(config: Mapping[str, Any], role: str) -> list[str]:
    """Network mounts that commands make or insist on, as the container sees them."""
    mounted = []
    for command in _commands(config, role):
        mounted += [match.split()[-1] for match in NETWORK_MOUNT.findall(command) if match.split()]
        mounted += MOUNT_CHECK.findall(command)
    if not (config.get("docker") or {}).get("image"):
        return mounted
    return [inside for host, inside in _binds(config, role) if any(_holds(each, host) for each in mounted)]


def _binds(config: Mapping[str, Any], role: str) -> list[tuple[str, str]]:
    """(directory of the host, directory in the container) of every `-v`."""
    options = pairwise(_docker_options(config, role))
    volumes = [value.split(":") for flag, value in options if flag in {"-v", "--volume"} and ":" in value]
    return [(host, inside) for host, inside, *_ in volumes]


def _images(file: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    docker = config.get("docker") or {}
    for name in ("image", "head_image", "worker_image"):
        if name in docker:
            yield from image(file, ("docker", name), docker[name], runs_ray=True)
    for node_type, value in config.get(TYPES, {}).items():
        if "worker_image" in (value.get("docker") or {}):
            path = (TYPES, node_type, "docker", "worker_image")
            yield from image(file, path, value["docker"]["worker_image"], runs_ray=True)
    if not docker.get("image") and not (docker.get("head_image") and docker.get("worker_image")):
        yield Finding(
            file,
            "docker.image",
            "no image: the nodes would run whatever Ray they find or install",
            "build cluster/Dockerfile, push it and write its tag",
        )


def _confinement(file: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What docker is told that makes the container as good as root on its host."""
    common = ((("docker",), config.get("docker") or {}),)
    own = (((TYPES, name, "docker"), each.get("docker") or {}) for name, each in config.get(TYPES, {}).items())
    for path, docker in (*common, *own):
        for key in ("run_options", "head_run_options", "worker_run_options"):
            for found in ROOT_ON_HOST.finditer(" ".join(map(str, docker.get(key) or []))):
                yield Finding(file, (*path, key), f"{shown(found[0])} is root on the host", "remove it")


def _installations(document: Document, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What Ray's defaults install; what is written in the file is read with everything else in it."""
    written = {command for key in COMMANDS for command in document.value.get(key) or []}
    for key in COMMANDS:
        if any(command not in written and installs_another_ray(str(command)) for command in config.get(key) or []):
            problem = "Ray's default for it installs another Ray than that of this machine"
            yield Finding(document.file, key, problem, f"write {key}: []")


def _settings(file: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Storage and authentication, of the head and of the workers; said once if both lack the same."""
    said = set()
    for role in ROLES:
        if role == "worker" and not workers_of(config):
            continue
        environment = _environment(config, role)
        shared = _shared_directories(config, role)
        for finding in [
            *storage(file, "docker.run_options", environment, node_count(config), shared),
            *_authentication(file, config, environment),
        ]:
            if str(finding) not in said:
                said.add(str(finding))
                yield finding


def _authentication(file: str, config: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[Finding]:
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        yield Finding(
            file,
            "docker.run_options",
            "no authentication: whoever reaches the cluster runs any code on it",
            "add -e RAY_AUTH_MODE=token on head and workers",
        )
    wanted = environment.get("RAY_AUTH_TOKEN_PATH", "")
    targets = [str(target) for target in config.get("file_mounts") or {}] + _volumes(config)
    if not any(_holds(target, wanted) if wanted else TOKEN_FILE.match(target) for target in targets):
        yield Finding(
            file,
            "file_mounts",
            f"no token reaches the nodes{f' at {shown(wanted)}' if wanted else ''}",
            "mount the one that `ray get-auth-token --generate` made: /home/ray/.ray/auth_token: ~/.ray/auth_token",
        )


def _volumes(config: Mapping[str, Any]) -> list[str]:
    """Where directories of the host are seen in the containers of all nodes."""
    shared = set.intersection(*({each for _, each in _binds(config, role)} for role in ROLES))
    return sorted(shared)


def _holds(directory: str, file: str) -> bool:
    return (file + "/").startswith(directory.rstrip("/") + "/")


# -- ray start -------------------------------------------------------------------------------------------------------


def _start(document: Document, config: Mapping[str, Any]) -> Iterator[Finding]:
    for role in ROLES:
        key = f"{role}_start_ray_commands"
        ours = "" if key in document.value else "Ray's default for it: "
        flags = [flag for command in config.get(key) or [] for flag in start_flags(str(command))]
        for name, value in flags:
            if name not in START_FLAGS:
                yield Finding(document.file, key, f"{ours}ray start has no --{name}", nearest(name, START_FLAGS))
            if name == "dashboard-host" and value not in LOOPBACK:
                yield Finding(
                    document.file,
                    key,
                    f"{ours}the dashboard, which runs any job, listens on {shown(value)}",
                    "write --dashboard-host=127.0.0.1 and reach it with `ray dashboard` (SSH)",
                )
            if name == "include-dashboard" and value.lower() in {"false", "0"}:
                yield Finding(
                    document.file, key, "without the dashboard Ray Tune leaks placement groups", "leave it on"
                )
        if role == "head" and flags and "autoscaling-config" not in dict(flags):
            yield Finding(
                document.file,
                key,
                "no --autoscaling-config: no worker would ever be started",
                "add --autoscaling-config=~/ray_bootstrap_config.yaml",
            )
    if node_count(config) > 1 and _head_cpus(config) != 0:
        head = config.get("head_node_type", "")
        local = is_local(config)
        yield Finding(
            document.file,
            "head_start_ray_commands" if local else ("available_node_types", head, "resources", "CPU"),
            "the head would run work, and take the cluster with it when that work uses up its memory",
            "add --num-cpus=0" if local else "write CPU: 0",
        )


def _joining(document: Document, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether workers look for the head where it listens."""
    key = "worker_start_ray_commands"
    head, worker = (_flags(config.get(f"{role}_start_ray_commands") or []) for role in ROLES)
    if not worker or not workers_of(config):
        return
    port, address = head.get("port") or HEAD_PORT, worker.get("address", "")
    found = HEAD_ADDRESS.match(address)
    fixed = found and found["fixed"]
    if "head" in worker:
        problem = "every worker would be a head of its own"
    elif found is None or (fixed and fixed != config["provider"].get("head_ip")):
        problem = f"workers look for the head at {shown(address) or 'no address'}"
    elif found["port"] != port:
        problem = f"workers look for the head at port {found['port']}, it listens on {shown(port)}"
    else:
        return
    yield Finding(document.file, key, problem, f"write ray start --address=$RAY_HEAD_IP:{shown(port)}")


def _flags(commands: Iterable[Any]) -> dict[str, str]:
    return {name: value for command in commands for name, value in start_flags(str(command))}


def _head_cpus(config: Mapping[str, Any]) -> int | None:
    """CPUs that the head offers; None: as many as it has. The launcher's resources win over the command's flags."""
    head = config.get("available_node_types", {}).get(config.get("head_node_type"), {})
    if "CPU" in (head.get("resources") or {}):
        return head["resources"]["CPU"]
    if not is_local(config):
        return None  # detected from the machine's type, whatever the command says
    flags = _flags(config.get("head_start_ray_commands") or [])
    return int(flags["num-cpus"]) if flags.get("num-cpus", "").isdigit() else None


# -- network ----------------------------------------------------------------------------------------------------------


def _network(document: Document) -> Iterator[Finding]:
    for path, value in walk(document.value):
        if value in EVERYWHERE:
            yield Finding(document.file, path, f"open to the whole internet ({value})", "write your own network")
    provider = document.value.get("provider") or {}
    types = document.value.get("available_node_types") or {}
    named = [{"SecurityGroupIds", "NetworkInterfaces"} & set(each.get("node_config") or {}) for each in types.values()]
    if provider.get("type") == "aws" and not all(named):
        yield Finding(
            document.file,
            "available_node_types",
            "Ray's own security group opens SSH to the whole internet",
            "write SecurityGroupIds of one that opens it to your network only, in every node type",
            WARNING,
        )
