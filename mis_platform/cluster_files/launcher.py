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
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from mis_platform.cluster_files.documents import Document
from mis_platform.cluster_files.findings import WARNING, Finding, shown
from mis_platform.cluster_files.rules import (
    EVERYWHERE,
    LOOPBACK,
    UNKNOWN,
    Keys,
    everywhere,
    image,
    names,
    nearest,
    storage,
    unknown_keys,
    walk,
)

# What Ray's providers read beyond its schema, which allows any key there.
PROVIDER_KEYS = {"aws_credentials", "coordinator_address", "external_head_ip", "use_external_head_ip", "_has_tpus"}

# Fields of EC2's RunInstances and of a Compute Engine instance.
NODE_CONFIG: dict[str, Keys] = {
    "aws": names(
        "BlockDeviceMappings CapacityReservationSpecification CpuOptions CreditSpecification EbsOptimized "
        "IamInstanceProfile ImageId InstanceInitiatedShutdownBehavior InstanceMarketOptions InstanceType "
        "KeyName LaunchTemplate LicenseSpecifications MetadataOptions Monitoring NetworkInterfaces Placement "
        "PrivateDnsNameOptions SecurityGroupIds SecurityGroups SubnetId SubnetIds TagSpecifications UserData"
    ),
    "gcp": names(
        "acceleratorConfig advancedMachineFeatures canIpForward confidentialInstanceConfig description disks "
        "guestAccelerators hostname labels machineType metadata minCpuPlatform networkInterfaces "
        "networkPerformanceConfig privateIpv6GoogleAccess reservationAffinity resourcePolicies scheduling "
        "serviceAccounts shieldedInstanceConfig shieldedVmConfig sourceInstanceTemplate sourceMachineImage "
        "tags"
    ),
}

# Flags of `ray start` in Ray 2.60; reading them from Ray itself takes seconds, so a test compares.
START_FLAGS = set(
    names(
        "address autoscaling-config block cgroup-path dashboard-agent-grpc-port dashboard-agent-listen-port "
        "dashboard-host dashboard-port disable-usage-stats enable-object-reconstruction "
        "enable-resource-isolation head include-dashboard include-log-monitor labels labels-file log-color "
        "log-style max-worker-port memory metrics-export-port min-worker-port no-monitor no-redirect-output "
        "node-ip-address node-manager-port node-name num-cpus num-gpus object-manager-port "
        "object-spilling-directory object-store-memory plasma-directory port proxy-server-url "
        "ray-client-server-port ray-debugger-external redis-password redis-shard-ports redis-username "
        "resources runtime-env-agent-port system-config system-reserved-cpu system-reserved-memory temp-dir "
        "tracing-startup-hook verbose worker-port-list"
    )
)

NETWORK_MOUNT = re.compile(r"\bmount\b[^;&|]*?-t\s*(?:nfs4?|efs|cifs|ceph|lustre|glusterfs|beegfs)\b([^;&|]*)")
MOUNT_CHECK = re.compile(r"\bmountpoint\s+(?:-q\s+)?(/\S+)")
EXPORT = re.compile(r"\bexport\s+(\w+)=(\"[^\"]*\"|'[^']*'|[^\s;\"']+)")
GPU_MACHINE = {"aws": re.compile(r"^(p\d|g\d)"), "gcp": re.compile(r"^(a\d|g\d)-")}
ROLES = ("head", "worker")


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
    yield from _settings(document.file, config)
    yield from _start(document, config)
    yield from _network(document)
    yield from _machines(document.file, config, cpu_only)


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
    if _is_local(config):
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
        path = ("available_node_types", str(name))
        yield from unknown_keys(
            document.file, node_type.get("node_config"), NODE_CONFIG.get(kind), (*path, "node_config")
        )
        for resource in node_type.get("resources") or {}:
            right = str(resource).upper().rstrip("S")
            if right in {"CPU", "GPU"} and resource != right:
                yield Finding(
                    document.file,
                    (*path, "resources", resource),
                    f"{resource} is a resource that nothing asks for",
                    f"did you mean {right}?",
                )


# -- what runs where -------------------------------------------------------------------------------------------------


def _is_local(config: Mapping[str, Any]) -> bool:
    provider = config.get("provider")
    return isinstance(provider, dict) and provider.get("type") == "local"


def _workers(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The node types that there can be workers of."""
    head = config.get("head_node_type")
    types = {
        name: each for name, each in config.get("available_node_types", {}).items() if each.get("max_workers", 0) > 0
    }
    return {name: each for name, each in types.items() if name != head or _is_local(config)}


def _node_count(config: Mapping[str, Any]) -> int:
    most = sum(each["max_workers"] for each in _workers(config).values())
    return 1 + min(most, config.get("max_workers", most))


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
    """Variables of the container, and those that commands export."""
    found: dict[str, str] = {}
    options = _docker_options(config, role)
    for position, option in enumerate(options):
        flag, mark, rest = option.partition("=")
        if flag in {"-e", "--env"}:
            text = rest if mark else (options[position + 1] if position + 1 < len(options) else "")
            name, _, value = text.partition("=")
            found[name] = value
    for command in _commands(config, role):
        found |= {name: value.strip("\"'") for name, value in EXPORT.findall(command)}
    return found


def _shared_directories(config: Mapping[str, Any], role: str) -> list[str]:
    """Network mounts that commands make or insist on, as the container sees them."""
    mounted = []
    for command in _commands(config, role):
        mounted += [match.split()[-1] for match in NETWORK_MOUNT.findall(command) if match.split()]
        mounted += MOUNT_CHECK.findall(command)
    options = _docker_options(config, role)
    if not (config.get("docker") or {}).get("image"):
        return mounted
    inside = []
    for option, value in pairwise(options):
        if option in {"-v", "--volume"} and value.count(":") >= 1:
            host, container = value.split(":")[:2]
            if any((host.rstrip("/") + "/").startswith(each.rstrip("/") + "/") for each in mounted):
                inside.append(container)
    return inside


def _images(file: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    docker = config.get("docker") or {}
    for name in ("image", "head_image", "worker_image"):
        if name in docker:
            yield from image(file, ("docker", name), docker[name], runs_ray=True)
    for node_type, value in config.get("available_node_types", {}).items():
        if "worker_image" in (value.get("docker") or {}):
            path = ("available_node_types", node_type, "docker", "worker_image")
            yield from image(file, path, value["docker"]["worker_image"], runs_ray=True)
    if not docker.get("image") and not (docker.get("head_image") and docker.get("worker_image")):
        yield Finding(
            file,
            "docker.image",
            "no image: the nodes would run whatever Ray they find or install",
            "build cluster/Dockerfile, push it and write its tag",
        )


def _settings(file: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Storage and authentication, of the head and of the workers; said once if both lack the same."""
    said = set()
    for role in ROLES:
        if role == "worker" and not _workers(config):
            continue
        environment = _environment(config, role)
        shared = _shared_directories(config, role)
        for finding in [
            *storage(file, "docker.run_options", environment, _node_count(config), shared),
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
    mounts = config.get("file_mounts") or {}
    if not any(str(target).endswith("auth_token") for target in mounts) and "RAY_AUTH_TOKEN_PATH" not in environment:
        yield Finding(
            file,
            "file_mounts",
            "no token reaches the nodes",
            "mount the one that `ray get-auth-token --generate` made: /home/ray/.ray/auth_token: ~/.ray/auth_token",
        )


# -- ray start -------------------------------------------------------------------------------------------------------


def start_flags(command: str) -> Iterator[tuple[str, str]]:
    """Flags of every `ray start` in a shell command with their values: `--num-cpus=0` is ("num-cpus", "0")."""
    for part in re.split(r"[;&|\n]+", command):
        try:
            words = shlex.split(part)
        except ValueError:
            continue
        if "ray" not in words or words[words.index("ray") + 1 : words.index("ray") + 2] != ["start"]:
            continue
        flags = words[words.index("ray") + 2 :]
        for position, word in enumerate(flags):
            if word.startswith("--"):
                name, mark, value = word[2:].partition("=")
                following = flags[position + 1] if position + 1 < len(flags) else ""
                yield name, value if mark or following.startswith("-") else following


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
    if _node_count(config) > 1 and _head_cpus(config) != 0:
        head = config.get("head_node_type", "")
        local = _is_local(config)
        yield Finding(
            document.file,
            "head_start_ray_commands" if local else ("available_node_types", head, "resources", "CPU"),
            "the head would run work, and take the cluster with it when that work uses up its memory",
            "add --num-cpus=0" if local else "write CPU: 0",
        )


def _head_cpus(config: Mapping[str, Any]) -> int | None:
    """CPUs that the head offers; None: as many as it has. The launcher's resources win over the command's flags."""
    head = config.get("available_node_types", {}).get(config.get("head_node_type"), {})
    if "CPU" in (head.get("resources") or {}):
        return head["resources"]["CPU"]
    if not _is_local(config):
        return None  # detected from the machine's type, whatever the command says
    flags = dict(flag for command in config.get("head_start_ray_commands") or [] for flag in start_flags(str(command)))
    return int(flags["num-cpus"]) if flags.get("num-cpus", "").isdigit() else None


# -- network and machines --------------------------------------------------------------------------------------------


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


def _machines(file: str, config: Mapping[str, Any], cpu_only: bool) -> Iterator[Finding]:
    workers, kind = _workers(config), str(config["provider"].get("type"))
    if _is_local(config):  # Ray finds out what the hosts have
        return
    gpus = {name: _gpus(each, kind) for name, each in workers.items()}
    if not any(gpus.values()) and not cpu_only:
        yield Finding(
            file,
            "available_node_types",
            "no GPU in any node type: the paper's training would take months",
            "add GPU workers, or say --cpu-only",
        )
    spot = {name for name, each in workers.items() if gpus[name] and _is_spot(each.get("node_config") or {})}
    if spot and not any(gpus[name] for name in set(workers) - spot):
        yield Finding(
            file,
            ("available_node_types", min(spot)),
            "spot GPUs only: the run waits when there are none",
            "add an on-demand type with a lower priority",
            WARNING,
        )
    if spot and _environment(config, "head").get("RAY_enable_autoscaler_v2") != "1":
        yield Finding(
            file,
            "docker.run_options",
            "Ray's first autoscaler asks for spot machines for ever, capacity or not",
            "add -e RAY_enable_autoscaler_v2=1: the second one takes the on-demand type then",
            WARNING,
        )
    if workers and not any(each.get("min_workers") for each in workers.values()):
        yield Finding(
            file,
            "available_node_types",
            "starts without a worker: mis plans with the nodes that it finds",
            "write min_workers: 1 where work is to run",
            WARNING,
        )
    if kind == "aws" and not all((each.get("node_config") or {}).get("ImageId") for each in workers.values()):
        yield Finding(
            file,
            "available_node_types",
            "Ray's own machine image has CUDA 11.2: its driver is too old for CUDA 13",
            "write ImageId of a Deep Learning Base AMI in every node type",
            WARNING,
        )
    for name, each in workers.items():
        if gpus[name] and "GPU" not in (each.get("resources") or {}) and kind != "aws":
            yield Finding(file, ("available_node_types", name, "resources"), "no GPU among them", "write GPU: 1")


def _gpus(node_type: Mapping[str, Any], kind: str) -> int:
    resources, machine = node_type.get("resources") or {}, node_type.get("node_config") or {}
    if "GPU" in resources:
        return int(resources["GPU"])
    name = str(machine.get("InstanceType") or machine.get("machineType") or "").rpartition("/")[2]
    pattern = GPU_MACHINE.get(kind)
    return int(bool(machine.get("guestAccelerators")) or bool(pattern and pattern.match(name)))


def _is_spot(machine: Mapping[str, Any]) -> bool:
    return any(
        value in ("spot", "SPOT") or (path[-1] == "preemptible" and value is True)
        for path, value in walk(dict(machine))
        if path
    )
