"""The files of cluster/ are right, and `mis cluster validate` finds what is wrong with others."""

import ast
import importlib.util
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from commands import mis

from mis_platform.cluster_files import ERROR, WARNING, check_files
from mis_platform.cluster_files.machines import MACHINES, NODE_CONFIG
from mis_platform.cluster_files.rules import installed_ray
from mis_platform.cluster_files.shell import START_FLAGS
from mis_platform.errors import DataError

REPOSITORY = Path(__file__).resolve().parent.parent
CLUSTER = REPOSITORY / "cluster"
BASE = CLUSTER / "kuberay" / "base.yaml"
SHIPPED = sorted(file for folder in (CLUSTER, BASE.parent) for file in folder.glob("*.yaml"))


def together(file: Path) -> list[Path]:
    """A file and what it is applied with."""
    return [BASE, file] if file.parent == BASE.parent and file.name != BASE.name else [file]


def broken(tmp_path: Path, name: str, old: str, new: str) -> list[str]:
    """What is found in a shipped file of which every `old` became `new`."""
    text = (CLUSTER / name).read_text()
    assert old in text, f"{name} no longer contains {old!r}: update the table"
    file = tmp_path / Path(name).name
    file.write_text(text.replace(old, new))
    company = [BASE] if name.startswith("kuberay/ray") else []
    return [str(finding).removeprefix(f"{tmp_path}/") for finding in check_files([*company, file])]


# -- what is shipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_files_have_nothing_left_but_what_is_yours(file):
    findings = check_files(together(file))
    assert {finding.severity for finding in findings} <= {WARNING}
    assert [finding.problem for finding in findings if "CHANGE-ME" not in finding.problem] == []


def test_all_targets_are_shipped():
    names = {str(file.relative_to(CLUSTER)) for file in SHIPPED}
    assert names == {
        *("aws.yaml", "gcp.yaml", "on-premises.yaml", "compose.yaml", "kuberay/base.yaml", "kuberay/raycluster.yaml"),
        *("kuberay/rayjob-precompute.yaml", "kuberay/rayjob-sweep.yaml"),
    }


def test_ray_is_the_one_that_was_tested():
    pinned = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert pinned == installed_ray()
    texts = {file: file.read_text() for file in [*SHIPPED, CLUSTER / "Dockerfile"]}
    found = {(file.name, version) for file, text in texts.items() for version in re.findall(r"-ray(\d[\d.]*\d)", text)}
    assert {version for _, version in found} == {pinned}
    assert len({name for name, _ in found}) == 7  # all but compose.yaml and base.yaml
    assert f"ARG RAY_VERSION={pinned}\n" in texts[CLUSTER / "Dockerfile"]
    mlflow = re.search(r"^mlflow==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"ghcr.io/mlflow/mlflow:v{mlflow}-full" in texts[CLUSTER / "compose.yaml"]


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments; comments are gone, continued lines are joined."""
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def test_dockerfile_is_pinned_and_not_root():
    instructions = dockerfile()
    assert {name for name, _ in instructions} == {"ARG", "FROM", "USER", "WORKDIR", "COPY", "RUN", "ENV"}
    assert dict(instructions)["FROM"] == "rayproject/ray:${RAY_VERSION}-py311-${ACCELERATOR}"
    assert [value for name, value in instructions if name == "USER"] == ["ray"]
    assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false" in dict(instructions)["ENV"]
    assert "-c constraints.txt" in dict(instructions)["RUN"]
    pinned = re.findall(r"\s([a-z0-9-]+)==\S+", dict(instructions)["RUN"])
    assert pinned == ["boto3", "google-api-python-client"]


def test_dockerfile_copies_what_is_there_and_its_context_lets_through():
    allowed = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = [word for name, value in dockerfile() if name == "COPY" for word in value.split()[1:-1]]
    assert set(copied) == allowed
    assert all((REPOSITORY / name).exists() for name in copied)


def source_of(package: str, file: str) -> str:
    """Source of an installed package: importing these two command lines would take ten seconds."""
    return (Path(importlib.util.find_spec(package).origin).parent / file).read_text(encoding="utf8")


def test_start_flags_are_those_of_ray():
    tree = ast.parse(source_of("ray", "scripts/scripts.py"))
    (start,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "start"]
    words = [word for option in start.decorator_list for word in getattr(option, "args", [])]
    flags = {word.value[2:] for word in words if isinstance(word, ast.Constant) and word.value.startswith("--")}
    logging = set(re.findall(r'"--([a-z-]+)"', source_of("ray", "autoscaler/_private/cli_logger.py")))
    assert flags | logging == START_FLAGS
    assert {"num-cpus", "dashboard-host", "log-style"} <= START_FLAGS


def test_mlflow_knows_the_flags_of_compose():
    command = yaml.safe_load((CLUSTER / "compose.yaml").read_text())["services"]["mlflow"]["command"]
    assert command[:2] == ["mlflow", "server"]
    source = source_of("mlflow", "cli/__init__.py") + source_of("mlflow", "utils/cli_args.py")
    assert [flag for flag in command[2:] if f'"{flag.partition("=")[0]}"' not in source] == []


def test_compose_has_no_password_and_stays_on_this_machine():
    text = (CLUSTER / "compose.yaml").read_text()
    secret = r"\$\{[A-Z0-9_]*(?:PASSWORD|SECRET|KEY)[^}]*\}"
    assert len(re.findall(secret, text)) == 8
    assert all(":?" in each for each in re.findall(secret, text))
    services = yaml.safe_load(text)["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("${MIS_BIND:-127.0.0.1}:") for port in ports)
    ignored = subprocess.run(["git", "check-ignore", "-q", "cluster/.env"], cwd=REPOSITORY, timeout=30)
    assert ignored.returncode in {0, 128}  # 128: not a git checkout
    assert not (CLUSTER / ".env").exists()


RAY_HEAD = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}  # labels that KubeRay gives
RAY_WORKER = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
SUBMITTER = {"app.kubernetes.io/component": "mis-submitter"}
REDIS = {"app.kubernetes.io/name": "mis-redis"}


def may_reach(source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether the policies of base.yaml let a pod of the namespace open a connection to another one."""
    policies = [each["spec"] for each in yaml.safe_load_all(BASE.read_text()) if each["kind"] == "NetworkPolicy"]

    def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
        return selector is not None and selector.get("matchLabels", {}).items() <= labels.items()

    def allows(direction: str, peers: str, own: dict[str, str], other: dict[str, str]) -> bool:
        return any(
            any(selects(peer.get("podSelector"), other) for peer in rule[peers])
            and ("ports" not in rule or port in {each["port"] for each in rule["ports"]})
            for policy in policies
            if selects(policy["podSelector"], own)
            for rule in policy.get(direction, [])
        )

    return allows("egress", "to", source, target) and allows("ingress", "from", target, source)


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        (RAY_HEAD, RAY_WORKER, 10002, True),
        (RAY_WORKER, RAY_HEAD, 6379, True),
        (SUBMITTER, RAY_HEAD, 8265, True),
        (RAY_HEAD, REDIS, 6379, True),
        (SUBMITTER, RAY_HEAD, 6379, False),
        (SUBMITTER, RAY_WORKER, 8265, False),
        (SUBMITTER, REDIS, 6379, False),
        (RAY_WORKER, REDIS, 6379, False),
        (REDIS, RAY_HEAD, 8265, False),
        ({"app": "a neighbour"}, RAY_HEAD, 8265, False),
        ({"app": "a neighbour"}, REDIS, 6379, False),
        (RAY_HEAD, {"app": "a neighbour"}, 80, False),
    ],
)
def test_who_may_talk_to_whom(source, target, port, expected):
    assert may_reach(source, target, port) is expected


def manifests_and_pods(value: Any) -> Iterator[dict[str, Any]]:
    """A manifest of Kubernetes' own; of KubeRay's, whose schema is in no Python package, the pods that it makes."""
    if isinstance(value, dict):
        if not str(value.get("apiVersion", "ray.io/v1")).startswith("ray.io/"):
            yield value
            return
        for key in {"template", "submitterPodTemplate"} & set(value):
            about = {"name": "x", **value[key].get("metadata", {})}
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": value[key]["spec"]}
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from manifests_and_pods(below)


def test_manifests_are_what_kubernetes_accepts():
    """Strictly: an unknown key is an error. By the schemas of the newest release that the package has."""
    files = sorted(BASE.parent.glob("*.yaml"))
    found = [
        each for file in files for part in yaml.safe_load_all(file.read_text()) for each in manifests_and_pods(part)
    ]
    assert Counter(each["kind"] == "Pod" for each in found) == {False: 14, True: 11}
    for each in found:
        kubernetes_validate.validate(each, "1.37", strict=True)
    *_, pod = found
    for spoiled in ({**pod["spec"], "hostNetwrk": True}, {**pod["spec"], "containers": [{"image": "x"}]}):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**pod, "spec": spoiled}, "1.37", strict=True)


def test_submitters_have_the_label_that_lets_them_in():
    for name in ("precompute", "sweep"):
        spec = yaml.safe_load((CLUSTER / f"kuberay/rayjob-{name}.yaml").read_text())["spec"]
        assert spec["submitterPodTemplate"]["metadata"]["labels"] == SUBMITTER


def test_sizes_of_all_machines_are_known():
    files = [yaml.safe_load((CLUSTER / name).read_text()) for name in ("aws.yaml", "gcp.yaml")]
    machines = [each["node_config"] for file in files for each in file["available_node_types"].values()]
    assert {each.get("InstanceType") or each["machineType"] for each in machines} == set(MACHINES)


def test_keys_of_machines_are_those_of_ec2():
    """Of the release of boto3 that the constraints name."""
    from botocore.loaders import Loader

    shapes = Loader().load_service_model("ec2", "service-2")["shapes"]

    def keys(shape: dict[str, Any]) -> dict[str, Any]:
        while shape["type"] == "list":
            shape = shapes[shape["member"]["shape"]]
        return {key: shapes[value["shape"]] for key, value in shape.get("members", {}).items()}

    def compared(known: Any, shape: dict[str, Any]) -> int:
        ours = {key for key in known if key != "SubnetIds"}  # Ray's own: it takes one of them
        assert ours <= set(keys(shape))
        below = [(known[key], keys(shape)[key]) for key in ours if known[key]]
        assert all(set(each) == set(keys(part)) for each, part in below)
        return len(ours) + sum(compared(*each) for each in below)

    assert compared(NODE_CONFIG["aws"], shapes["RunInstancesRequest"]) > 50


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_spot_is_asked_for_first_and_on_demand_when_there_is_none(name):
    """By the scheduler of Ray itself, with the node types of the file."""
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    config = prepare_config(yaml.safe_load((CLUSTER / name).read_text()))
    types = {
        key: NodeTypeConfig(
            name=key,
            min_worker_nodes=0,
            max_worker_nodes=each["max_workers"],
            resources=each["resources"],
            priority=each.get("priority", 0),
        )
        for key, each in config["available_node_types"].items()
        if key != config["head_node_type"]
    }

    def launched(demand: dict[str, float], scores: dict[str, float]) -> set[str]:
        request = SchedulingRequest(
            node_type_configs=types,
            resource_requests=[ResourceRequestByCount(request=ResourceRequestUtil.make(demand), count=2)],
            max_num_nodes=config["max_workers"] + 1,
            disable_launch_config_check=True,
            recoverable_resource_availabilities=scores,
        )
        return {each.instance_type for each in ResourceDemandScheduler(None).schedule(request).to_launch}

    assert launched({"GPU": 1}, {}) == {"gpu_spot"}
    assert launched({"GPU": 1}, {"gpu_spot": 0.0}) == {"gpu_on_demand"}
    assert launched({"CPU": 1}, {}) == {"cpu_spot"}


# -- what is found ---------------------------------------------------------------------------------------------------

AWS, GCP, HOSTS, COMPOSE, NAMESPACE = "aws.yaml", "gcp.yaml", "on-premises.yaml", "compose.yaml", "kuberay/base.yaml"
TYPES, OPTIONS, START = "available_node_types", "docker.run_options", "head_start_ray_commands"
HEAD = "spec.headGroupSpec.template.spec"
IMAGE = "CHANGE-ME/mis-platform:0.1.0-ray2.60.0-py311-gpu"
ROOT = "    - -e MIS_ROOT=s3://CHANGE-ME/mis\n"
JOB = "kuberay/rayjob-sweep.yaml"
RAY = "kuberay/raycluster.yaml"
POD, NODE, JOIN = "spec.template.spec.containers", f"{TYPES}.head.node_config", "worker_start_ray_commands"
OTHER = f"installs another Ray than that of this machine, {installed_ray()}"
WHEEL = "https://example.org/ray-wheels/latest/ray-3.0.0.dev0-cp311-cp311-manylinux2014_x86_64.whl"
INTO_RAY = '    - from: [{podSelector: {matchLabels: {ray.io/is-ray-node: "yes"}}}]\n'
OUT_OF_RAY = '    - to: [{podSelector: {matchLabels: {ray.io/is-ray-node: "yes"}}}]\n'

# file, what it says, what it says instead, the key that is named, and what is said of it
STOP = "  - ray stop"  # the first command of head and workers
BIND = "ray start --head --dashboard-host=0.0.0.0 --autoscaling-config=x"


def command(text: str) -> str:
    """In the place of STOP."""
    return f"  - {json.dumps(text)}"


def nested(text: str, depth: int) -> str:
    """In so many shells."""
    return nested(f"sh -c {shlex.quote(text)}", depth - 1) if depth else text


PUBLIC = [
    f'bash -lc "{BIND}"',
    f"sh -c '{BIND}'",
    f"sudo -u ray /bin/bash -l -o pipefail -ec 'ulimit -n 9; exec {BIND}' && true",
    f'su - ray -c "{BIND}"',
    f"su ray --command='{BIND}'",
    f'eval "{BIND}"',
    f"ssh host '{BIND}'",
    f"docker exec x bash -c '{BIND}'",
    f'bash -c "true && sh -c \\"{BIND}\\""',
    nested(BIND, 5),
    f"({BIND})",
    f"nohup $({BIND})",
    BIND.replace("ray start", "/opt/ray/bin/ray start"),
    BIND.replace("ray start", "python -m ray.scripts.scripts start"),
]
WITHOUT_TOKEN = [
    "bash -lc 'RAY_AUTH_MODE=disabled ray start --head'",
    "RAY_AUTH_MODE=disabled bash -c 'ray start --head'",
    "bash -c 'export RAY_AUTH_MODE=no; ray start --head'",
    "sh -c \"unset RAY_AUTH_MODE && bash -c 'ray start --head'\"",
]
OTHER_RAYS = [
    "bash -lc 'pip install -U ray==2.9.0'",
    'bash -lc "pip install \\"ray[default]==2.9.0\\""',
    'sh -c \'bash -c "pip install -U \\"ray[data]\\""\'',
]
MOVING = [
    ("bash -lc 'docker pull minio/minio:latest'", "tag latest"),
    ("docker run --rm -v /a:/b registry.example:5000/mis:main mis list", "tag main"),
    ('bash -c "podman create \\"mis:nightly\\""', "tag nightly"),
    ("eval docker pull rayproject/ray:2.9.0", "has Ray 2.9.0"),
    ("sh -c 'docker pull rayproject/ray-ml:2.9.0'", "ray-ml images are no longer built"),
]
TABLE = [
    # B43, the seven
    (AWS, ", GPU: 1", ", GPU: 0", TYPES, "no GPU in any node type"),
    (GCP, ", GPU: 1", ", GPU: 0", TYPES, "no GPU in any node type"),
    (JOB, "nvidia.com/gpu: 1", "nvidia.com/gpu: 0", "spec.rayClusterSpec.workerGroupSpecs", "no GPU in any group"),
    (AWS, "ray2.60.0", "ray2.52.0", "docker.image", "the image has Ray 2.52.0, this machine 2.60.0"),
    (RAY, "ray2.60.0", "ray2.52.0", f"{HEAD}.containers.0.image", "has Ray 2.52.0"),
    (GCP, IMAGE, "rayproject/ray:2.9.3-py311", "docker.image", "the image has Ray 2.9.3"),
    (RAY, "rayVersion: 2.60.0", "rayVersion: 2.52.0", "spec.rayVersion", "Ray 2.52.0, this machine has 2.60.0"),
    (AWS, IMAGE, "rayproject/ray-ml:2.60.0-py311", "docker.image", "ray-ml images are no longer built"),
    (JOB, IMAGE, "rayproject/ray-ml:2.60.0", "spec.submitterPodTemplate.spec.containers.0.image", "ray-ml"),
    (AWS, IMAGE, "rayproject/ray:latest", "docker.image", "tag latest means another image tomorrow"),
    (GCP, IMAGE, "rayproject/ray:latest-py311-gpu", "docker.image", "another image tomorrow"),
    (AWS, IMAGE, "registry:5000/mis-platform", "docker.image", "has no tag"),
    (COMPOSE, "postgres:17.10", "postgres", "services.postgres.image", "has no tag"),
    (NAMESPACE, "redis:8.2.8", "redis:latest", "spec.template.spec.containers.0.image", "tag latest"),
    (AWS, "host=127.0.0.1", "host=0.0.0.0", START, "listens on 0.0.0.0"),
    (HOSTS, "host=127.0.0.1", "host 10.0.0.4", START, "listens on 10.0.0.4"),
    (
        RAY,
        'num-cpus: "0"',
        'num-cpus: "0"\n      dashboard-host: 0.0.0.0',
        "spec.headGroupSpec.rayStartParams.dash",
        "0.0",
    ),
    (AWS, ROOT, "", OPTIONS, "no MIS_ROOT"),
    (NAMESPACE, "MIS_ROOT: s3", "MIS_ROTT: s3", "", ""),  # alone it is only a ConfigMap
    (AWS, "s3://CHANGE-ME/mis", "/home/ray/mis", OPTIONS, "disk of one machine, but there are up to 17"),
    (GCP, "gs://CHANGE-ME/mis", "file:///tmp/mis", OPTIONS, "disk of one machine"),
    (HOSTS, "MIS_ROOT=/mnt/mis/root", "MIS_ROOT=/home/mis", OPTIONS, "disk of one machine"),
    (HOSTS, "mountpoint -q /mnt/mis ||", "true ||", "", ""),  # the mount itself still says it
    (HOSTS, "-v /mnt/mis:/mnt/mis", "-v /srv:/mnt/mis", OPTIONS, "disk of one machine"),
    # keys
    (AWS, "max_workers: 16", "max_worker: 16", "max_worker", "unknown key; did you mean max_workers?"),
    (AWS, "    min_workers: 1", "    min_worker: 1", f"{TYPES}.gpu_spot.min_worker", "min_workers?"),
    (AWS, "InstanceType: m7i", "InstanceTyp: m7i", f"{TYPES}.head.node_config.InstanceTyp", "InstanceType?"),
    (GCP, "machineType: g2", "machine_type: g2", f"{TYPES}.gpu_spot.node_config.machine_type", "machineType?"),
    (AWS, "  region: us-west-2\n", "  regoin: us-west-2\n", "provider.regoin", "did you mean region?"),
    (AWS, "{CPU: 8, GPU: 1}", "{CPU: 8, gpus: 1}", f"{TYPES}.gpu_spot.resources.gpus", "did you mean GPU?"),
    (AWS, "max_workers: 16", "max_workers: many", "max_workers", "not what Ray's schema wants: type integer"),
    (AWS, "head_node_type: head", "head_node_type: haed", "", "`head_node_type` must be one of"),
    (AWS, "--num-cpus=0", "--num-cpu=0", START, "no --num-cpu; did you mean num-cpus?"),
    (GCP, "cluster_name: mis", "cluster_name: mis\nmin_workers: 1", "min_workers", "unknown key"),
    (RAY, "authOptions", "authOption", "spec.authOption", "unknown key; did you mean authOptions?"),
    (RAY, "minReplicas", "minReplica", "spec.workerGroupSpecs.0.minReplica", "did you mean minReplicas?"),
    (JOB, "shutdownAfterJobFinishes", "shutdownAfterJobFinished", "spec.shutdownAfterJobFinished", "Finishes?"),
    (
        JOB,
        "readOnlyRootFilesystem",
        "readOnlyRootFileSystem",
        "spec.submitterPodTemplate.spec.containers.0.sec",
        "Filesystem?",
    ),
    (RAY, 'num-cpus: "0"', "num-cpus: 0", "spec.headGroupSpec.rayStartParams.num-cpus", "KubeRay takes strings"),
    (NAMESPACE, "podSelector: {}", "podSelecter: {}", "spec.podSelecter", "did you mean podSelector?"),
    (JOB, "ray.io/v1\n", "ray.io/v1alpha1\n", "apiVersion", "write ray.io/v1"),
    (JOB, "kind: RayJob", "kind: RayJobs", "kind", "RayJobs is not checked; did you mean RayJob?"),
    (COMPOSE, "    healthcheck:", "    helthcheck:", "services.postgres.helthcheck", "did you mean healthcheck?"),
    (COMPOSE, "volumes:\n  postgres", "volume:\n  postgres", "volume", "did you mean volumes?"),
    (AWS, "max_workers: 16", "max_workers: 16\nmax_workers: 2", "max_workers", "is written twice"),
    (COMPOSE, '    restart: "no"', '    restart: "no"\n    restart: always', "services.store-volume.restart", "twice"),
    (AWS, "idle_timeout_minutes: 5", "idle_timeout_minutes: .nan", "idle_timeout_minutes", "nan is not a number"),
    (AWS, "idle_timeout_minutes: 5", "idle_timeout_minutes: 1e400", "idle_timeout_minutes", "type number"),
    (AWS, "idle_timeout_minutes: 5", "idle_timeout_minutes: 1.0e+400", "idle_timeout_minutes", "inf is not"),
    # who gets in
    (AWS, "    - -e RAY_AUTH_MODE=token\n", "", OPTIONS, "no authentication"),
    (GCP, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", OPTIONS, "no authentication"),
    (AWS, "/home/ray/.ray/auth_token: ~/.ray/auth_token", "/data: ~/data", "file_mounts", "no token reaches"),
    (RAY, "mode: token", "mode: disabled", "spec.authOptions.mode", "no authentication"),
    (JOB, "authOptions: {mode: token}", "suspend: false", "spec.rayClusterSpec.authOptions.mode", "no authentication"),
    (COMPOSE, "${MIS_BIND:-127.0.0.1}:5000", "5000", "services.mlflow.ports.0", "published on all addresses"),
    (COMPOSE, "${MIS_BIND:-127.0.0.1}", "${MIS_BIND:-0.0.0.0}", "services.store.ports.0", "published on 0.0.0.0"),
    (COMPOSE, "network_mode: none", "network_mode: host", "services.store-volume.network_mode", "the host's"),
    (COMPOSE, "localhost:*,127.0.0.1:*", "*", "services.mlflow.command", "answers to any host name"),
    (COMPOSE, "- --app-name=basic-auth", "- --dev", "services.mlflow.command", "MLflow without authentication"),
    (
        COMPOSE,
        "- --x-frame-options=DENY",
        "- --disable-security-middleware",
        "services.mlflow.command",
        "origin checks",
    ),
    (
        COMPOSE,
        "POSTGRES_DB: mlflow",
        "POSTGRES_HOST_AUTH_METHOD: trust",
        "services.postgres.environment",
        "without auth",
    ),
    (
        RAY,
        "headGroupSpec:\n",
        "headGroupSpec:\n    serviceType: LoadBalancer\n",
        "spec.headGroupSpec.serviceType",
        "outside",
    ),
    (
        RAY,
        "headGroupSpec:\n",
        "headGroupSpec:\n    enableIngress: true\n",
        "spec.headGroupSpec.enableIngress",
        "outside",
    ),
    (NAMESPACE, "clusterIP: None", "type: LoadBalancer", "spec.type", "reachable from outside"),
    (NAMESPACE, "clusterIP: None", "type: NodePort", "spec.type", "reachable from outside"),
    (
        NAMESPACE,
        "        - podSelector: {matchLabels: {ray.io/node-type: head}}\n",
        "        - ipBlock: {cidr: 0.0.0.0/0}\n",
        "spec.ingress.0.from.0.ipBlock.cidr",
        "open to the whole internet",
    ),
    (
        AWS,
        "provider:\n",
        "provider:\n  security_group: {IpPermissions: [{FromPort: 22, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}\n",
        "provider.security_group.IpPermissions.0.IpRanges.0.CidrIp",
        "open to the whole internet",
    ),
    (AWS, "      SecurityGroupIds: [sg-CHANGE-ME]\n", "", TYPES, "opens SSH to the whole internet"),
    # secrets
    (
        COMPOSE,
        "${POSTGRES_PASSWORD:?see the top of cluster/compose.yaml}",
        "${POSTGRES_PASSWORD:-mlflow}",
        "services.postgres.environment.POSTGRES_PASSWORD",
        "has a default that everybody knows",
    ),
    (
        COMPOSE,
        "${S3_SECRET_KEY:?see the top of cluster/compose.yaml}",
        "minioadmin",
        "services.store.environment.ROOT_SECRET_ACCESS_KEY",
        "has a default that everybody knows",
    ),
    (
        COMPOSE,
        "${MLFLOW_SECRET_KEY:?see the top of cluster/compose.yaml}",
        "${MLFLOW_SECRET_KEY}",
        "services.mlflow.environment.MLFLOW_FLASK_SERVER_SECRET_KEY",
        "is empty when the variable is not set",
    ),
    (
        COMPOSE,
        "postgresql://mlflow@postgres",
        "postgresql://mlflow:hunter2canary@postgres",
        "services.mlflow.command.6",
        "looks like a secret",
    ),
    (AWS, "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=0123canary", "docker.run_options.1", "RAY_AUTH_TOKEN is written"),
    (AWS, "MIS_DATA=/data", "ENCRYPTION_KEY=0123canary", "docker.run_options.6", "ENCRYPTION_KEY is written"),
    (AWS, "MIS_DATA=/data", "SSH_KEY_FILE=/data/0123", "", ""),
    (AWS, "MIS_DATA=/data", "X=AKIAIOSFODNN7CANARY1", "docker.run_options.6", "looks like a secret"),
    (
        RAY,
        "valueFrom: {secretKeyRef: {name: mis-redis, key: password}}",
        "value: 5canary",
        "spec.gcsFaultToleranceOptions.redisPassword.value",
        "redisPassword is written into the file",
    ),
    (
        NAMESPACE,
        "valueFrom: {secretKeyRef: {name: mis-redis, key: password}}",
        "value: 5canary",
        "spec.template.spec.containers.0.env.0.value",
        "REDIS_PASSWORD is written into the file",
    ),
    (NAMESPACE, "kind: ConfigMap", "kind: Secret", "data", "a secret written into the file"),
    # what would go wrong later
    (AWS, "resources: {CPU: 0}", "resources: {CPU: 4}", f"{TYPES}.head.resources.CPU", "head would run work"),
    (AWS, "resources: {CPU: 0}", "resources: {}", f"{TYPES}.head.resources.CPU", "head would run work"),
    (HOSTS, "--num-cpus=0 ", "", START, "head would run work"),
    (RAY, 'num-cpus: "0"', 'num-cpus: "4"', "spec.headGroupSpec.rayStartParams.num-cpus", "head would run work"),
    (AWS, "https://CHANGE-ME\n", "ray://CHANGE-ME:10001\n", "docker.run_options.5", "ray:// is Ray Client"),
    (JOB, "entrypoint: mis", "entrypoint: RAY_ADDRESS=ray://head:10001 mis", "spec.entrypoint", "ray:// is Ray Client"),
    (AWS, "    - -e MLFLOW_TRACKING_URI=https://CHANGE-ME\n", "", OPTIONS, "no MLFLOW_TRACKING_URI"),
    (
        AWS,
        "MLFLOW_TRACKING_URI=https://CHANGE-ME",
        "MLFLOW_TRACKING_URI=http://localhost:5000",
        OPTIONS,
        "on the head: its records go with it",
    ),
    (AWS, "s3://CHANGE-ME/mis", "s4://CHANGE-ME/mis", OPTIONS, "unknown storage s4://; known here: abfs"),
    (AWS, "    - -e RAY_enable_autoscaler_v2=1\n", "", OPTIONS, "asks for spot machines for ever"),
    (AWS, "max_workers: 4", "max_workers: 0", f"{TYPES}.gpu_spot", "spot GPUs only"),
    (GCP, "min_workers: 1", "min_workers: 0", TYPES, "starts without a worker"),
    (AWS, "      ImageId: ami-CHANGE-ME\n", "", TYPES, "driver is too old"),
    (AWS, f"  image: {IMAGE}\n", "", "", "Ray refuses it: AssertionError: Must provide a container & image name"),
    (AWS, "--autoscaling-config=~/ray_bootstrap_config.yaml", "--verbose", START, "no worker would"),
    (AWS, "--disable-usage-stats\n", "--include-dashboard=false\n", START, "leaks placement groups"),
    (AWS, f"  image: {IMAGE}\n  container_name: mis\n", "", "docker.image", "no image"),
    (RAY, "minReplicas: 1", "minReplicas: 0", "spec.workerGroupSpecs", "starts without a worker"),
    (RAY, "      maxReplicas: 8\n", "", "spec.workerGroupSpecs.0.maxReplicas", "no limit on what it may cost"),
    (
        JOB,
        "shutdownAfterJobFinishes: true",
        "shutdownAfterJobFinishes: false",
        "spec.shutdownAfterJobFinishes",
        "and cost",
    ),
    (JOB, "  activeDeadlineSeconds: 604800  # a week\n", "", "spec.activeDeadlineSeconds", "a hanging job never ends"),
    (JOB, "backoffLimit: 3", "backoffLimit: 0", "spec.backoffLimit", "a lost head ends the job"),
    (RAY, "version: v2", "version: v1", "spec.autoscalerOptions.version", "write v2"),
    (
        RAY,
        "gcsFaultToleranceOptions:",
        "upgradeStrategy:",
        "spec.gcsFaultToleranceOptions",
        "a lost head takes all workers",
    ),
    (JOB, "namespace: mis}", "namespace: other}", "", "no NetworkPolicy denies all traffic in namespace other"),
    # confinement
    (
        JOB,
        "runAsNonRoot: true",
        "runAsNonRoot: false",
        "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0",
        "root",
    ),
    (
        JOB,
        "runAsUser: 1000",
        "runAsUser: 0",
        "spec.submitterPodTemplate.spec.containers.0.securityContext",
        "may run as root",
    ),
    (
        RAY,
        "type: RuntimeDefault",
        "type: Unconfined",
        "spec.workerGroupSpecs.0.template.spec.containers.0.sec",
        "system call",
    ),
    (RAY, "allowPrivilegeEscalation: false", "privileged: true", f"{HEAD}.containers.0", "root on the node"),
    (RAY, "capabilities: {drop: [ALL]}", "runAsUser: 1000", f"{HEAD}.containers.0.sec", "capabilities"),
    (RAY, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", HEAD, "its own image"),
    (RAY, "emptyDir: {sizeLimit: 20Gi}", "hostPath: {path: /tmp}", f"{HEAD}.volumes.0.hostPath", "node"),
    (RAY, "      restartPolicy: Never\n", "      hostNetwork: true\n", f"{HEAD}.hostNetwork", "node"),
    (RAY, 'limits: {cpu: "4"', 'claims: {cpu: "4"', f"{HEAD}.containers.0.resources", "no requests or"),
    (COMPOSE, 'user: "999:999"', "user: root", "services.postgres.user", "runs as root"),
    (COMPOSE, "read_only: true", "read_only: false", "services.postgres.read_only", "can change its own image"),
    (COMPOSE, "cap_drop: [ALL]", "privileged: true", "services.postgres.privileged", "is root on the host"),
    (
        COMPOSE,
        "volumes: [store:/store]\n    tmpfs",
        "volumes: [/var/run/docker.sock:/s]\n    tmpfs",
        "services.store.volumes",
        "Docker socket",
    ),
    (COMPOSE, "security_opt: [no-new-privileges:true]", "init: true", "services.postgres.security_opt", "privileges"),
    (
        COMPOSE,
        "- --artifacts-destination=s3://mis/mlflow",
        "- --dev",
        "services.mlflow.command",
        "stay in the container",
    ),
    # published ports, whatever variables say
    (COMPOSE, "${MIS_BIND:-127.0.0.1}", "${MIS_BIND}", "services.store.ports.0", "published on all addresses"),
    (COMPOSE, "${MIS_BIND:-127.0.0.1}", "$MIS_BIND", "services.mlflow.ports.0", "published on all addresses"),
    (COMPOSE, "${MIS_BIND:-127.0.0.1}", "${MIS_BIND:+0.0.0.0}", "services.mlflow.ports.0", "all addresses"),
    (COMPOSE, "${MIS_BIND:-127.0.0.1}", "${MIS_BIND-127.0.0.1}", "services.mlflow.ports.0", "all addresses"),
    (COMPOSE, "${MIS_BIND:-127.0.0.1}", "${MIS_BIND:-${ALL:-0.0.0.0}}", "services.mlflow.ports.0", "on 0.0.0.0"),
    (COMPOSE, "${MIS_BIND:-127.0.0.1}", "${MIS_BIND:?which address: see above}", "", ""),
    (COMPOSE, "${MIS_BIND:-127.0.0.1}", "${MIS_BIND:-${HERE:-127.0.0.1}}", "", ""),
    # another Ray
    (
        RAY,
        "    version: v2\n",
        "    version: v2\n    image: rayproject/ray:latest\n",
        "spec.autoscalerOptions.image",
        "tag latest",
    ),
    (
        JOB,
        "      version: v2\n",
        "      version: v2\n      image: rayproject/ray:2.9.0\n",
        "spec.rayClusterSpec.autoscalerOptions.image",
        "has Ray 2.9.0",
    ),
    (AWS, "\nsetup_commands: []", "\nsetup_commands: [pip install -U ray==2.9.0]", "setup_commands.0", OTHER),
    (AWS, "\nsetup_commands: []", "\nsetup_commands:\n  - pip install -U ray[default]", "setup_commands.0", OTHER),
    (GCP, "head_setup_commands: []", f"head_setup_commands: [pip install {WHEEL}]", "head_setup_commands.0", OTHER),
    (HOSTS, "worker_setup_commands: []", "worker_setup_commands: [uv pip install 'ray>=2']", "worker_setup_c", OTHER),
    (HOSTS, "  - ray stop", "  - ray stop; ray install-nightly", "head_start_ray_commands.0", OTHER),
    (HOSTS, "  - ray stop", "  - conda install ray-default=2.9 && ray stop", "worker_start_ray_commands.0", OTHER),
    (AWS, "\nsetup_commands: []", "", "setup_commands", "Ray's default for it installs another Ray"),
    (AWS, "\nsetup_commands: []", "\nsetup_commands: ['pip install ray[tune]==2.60.0 ray-x; ray stop']", "", ""),
    (JOB, "  backoffLimit:", '  runtimeEnvYAML: "pip: [ray==2.9.0]"\n  backoffLimit:', "spec.runtimeEnvYAML", OTHER),
    (JOB, "  backoffLimit:", "  runtimeEnvYAML: |\n    pip:\n    - ray\n  backoffLimit:", "spec.runtimeEnvYAML", OTHER),
    (JOB, "  backoffLimit:", '  runtimeEnvYAML: "pip: [rayon==1, ray==2.60.0]"\n  backoffLimit:', "", ""),
    (JOB, "entrypoint: mis", "entrypoint: pip install ray==2.9.0 && mis", "spec.entrypoint", OTHER),
    # storage and authentication
    (AWS, "s3://CHANGE-ME/mis", "s3://", OPTIONS, "MIS_ROOT names no bucket"),
    (GCP, "gs://CHANGE-ME/mis", "gs:///mis", OPTIONS, "MIS_ROOT names no bucket"),
    (AWS, "; ray start", "; RAY_AUTH_MODE=disabled ray start", OPTIONS, "no authentication"),
    (HOSTS, "ulimit -n 65536; ray", "export A=1 RAY_AUTH_MODE=disabled; ray", OPTIONS, "no authentication"),
    (AWS, "; ray start", "; (RAY_AUTH_MODE=disabled ray start", OPTIONS, "no authentication"),
    (AWS, "; ray start", "; if true; then export RAY_AUTH_MODE=no; fi; ray start", OPTIONS, "no authentication"),
    (HOSTS, "ulimit -n 65536; ray", "unset RAY_AUTH_MODE; ray", OPTIONS, "no authentication"),
    (GCP, "ulimit -n 65536; ray", 'RAY_AUTH_MODE="disabled"; ray', OPTIONS, "no authentication"),
    (AWS, "    - -e RAY_AUTH_MODE=token\n", "    - --init\n", OPTIONS, "no authentication"),
    (AWS, "; ray start", "; export RAY_AUTH_MODE=token; ray start", "", ""),
    # what is quoted for other shells, or starts Ray by another name
    *((AWS, STOP, command(text), "head_start_ray_commands", "listens on 0.0.0.0") for text in PUBLIC),
    (HOSTS, STOP, command(PUBLIC[0]), "worker_start_ray_commands", "listens on 0.0.0.0"),
    *((AWS, STOP, command(text), OPTIONS, "no authentication") for text in WITHOUT_TOKEN),
    *((GCP, STOP, command(text), "head_start_ray_commands.0", OTHER) for text in OTHER_RAYS),
    *((GCP, STOP, command(text), "head_start_ray_commands.0", told) for text, told in MOVING),
    (AWS, STOP, command("bash -lc 'docker pull redis:7.4; docker run -v /a:/b --network=x:latest redis:7.4'"), "", ""),
    (AWS, STOP, command("bash -lc 'export RAY_AUTH_MODE=no; ray stop'"), "", ""),  # told to nobody who starts Ray
    (AWS, STOP, command("echo 'docker: pull from registry:latest'"), "", ""),
    (AWS, STOP, command("bash -c 'ray start --dashboard-host=0.0.0.0"), "", ""),  # the shell itself refuses it
    (AWS, "/home/ray/.ray/auth_token:", "/tmp/auth_token:", "file_mounts", "no token reaches the nodes"),
    (
        AWS,
        "MIS_DATA=/data",
        "RAY_AUTH_TOKEN_PATH=/run/token",
        "file_mounts",
        "no token reaches the nodes at /run/token",
    ),
    (AWS, "MIS_DATA=/data", "RAY_AUTH_TOKEN_PATH=/home/ray/.ray/auth_token", "", ""),
    (
        RAY,
        "            envFrom: &settings",
        "            env: [{name: RAY_AUTH_MODE, value: disabled}]\n            envFrom: &settings",
        f"{HEAD}.containers.0.env",
        "RAY_AUTH_MODE turns authentication off",
    ),
    # what undoes the network policy and the namespace's confinement
    (NAMESPACE, INTO_RAY, "    - {}\n", "spec.ingress.0", "lets everybody in"),
    (NAMESPACE, INTO_RAY, "    - ports: [{port: 8265}]\n", "spec.ingress.0", "lets everybody in"),
    (NAMESPACE, INTO_RAY, "    - from: [{}]\n", "spec.ingress.0", "lets everybody in"),
    (NAMESPACE, INTO_RAY, "    - from: [{namespaceSelector: {}}]\n", "spec.ingress.0.from.0", "every namespace"),
    (
        NAMESPACE,
        INTO_RAY,
        "    - from: [{podSelector: {}, namespaceSelector: {matchLabels: {}}}]\n",
        "spec.ingress.0.from.0",
        "every namespace",
    ),
    (NAMESPACE, OUT_OF_RAY, "    - {}\n", "spec.egress.0", "lets everything out"),
    (NAMESPACE, "enforce: restricted", "enforce: privileged", "metadata.labels", "enforce is privileged"),
    (NAMESPACE, "/enforce: restricted", "/warn: restricted", "metadata.labels", "enforce is not set"),
    (NAMESPACE, "containerPort: 6379,", "containerPort: 6379, hostPort: 6379,", f"{POD}.0.ports.0.hostPort", "node"),
    (
        RAY,
        "            envFrom: &settings",
        "            ports: [{containerPort: 8265, hostPort: 8265}]\n            envFrom: &settings",
        f"{HEAD}.containers.0.ports.0.hostPort",
        "open on the node's own address",
    ),
    (RAY, "{drop: [ALL]}", "{drop: [ALL], add: [SYS_ADMIN]}", f"{HEAD}.containers.0.sec", "SYS_ADMIN is more than"),
    # what containers may do, and who may log in
    (COMPOSE, "localhost:*,127.0.0.1:*", "*:*", "services.mlflow.command", "answers to any host name"),
    (COMPOSE, "localhost:*,127.0.0.1:*", "localhost:*,*.*", "services.mlflow.command", "answers to any host name"),
    (COMPOSE, "[CHOWN]", "[SYS_ADMIN]", "services.store-volume.cap_add", "SYS_ADMIN reaches beyond the container"),
    (COMPOSE, "    network_mode: none", "    ports: [127.0.0.1:80:80]", "services.store-volume.user", "runs as root"),
    (
        COMPOSE,
        '"1000:1000"\n    command: [--',
        '"0:0"\n    restart: "no"\n    command: [--',
        "services.store.user",
        "root",
    ),
    (
        COMPOSE,
        "      MLFLOW_AUTH_ADMIN_PASSWORD:",
        "      OTHER:",
        "services.mlflow.environment",
        "no MLFLOW_AUTH_ADMIN",
    ),
    (COMPOSE, "      MLFLOW_AUTH_CONFIG_PATH:", "      OTHER:", "services.mlflow.environment", "no MLFLOW_AUTH_CONFIG"),
    (AWS, "- --ulimit", "- --privileged\n    - --ulimit", OPTIONS, "--privileged is root on the host"),
    (GCP, "- --ulimit", "- --cap-add SYS_ADMIN\n    - --ulimit", OPTIONS, "--cap-add SYS_ADMIN is root on the host"),
    (AWS, "- --ulimit", "- --cap-add=KILL\n    - --ulimit", "", ""),
    (AWS, "-v /home/ubuntu/data:/data:ro", "-v /:/host", OPTIONS, "-v /:/host is root on the host"),
    (
        AWS,
        "-v /home/ubuntu/data:/data:ro",
        "-v /var/run/docker.sock:/var/run/docker.sock",
        OPTIONS,
        "docker.sock is root on the host",
    ),
    (
        HOSTS,
        "  run_options:",
        "  worker_run_options: [--security-opt, seccomp=unconfined]\n  run_options:",
        "docker.worker_run_options",
        "root on the host",
    ),
    # machines
    (AWS, "$RAY_HEAD_IP:6379", "localhost:6379", JOIN, "workers look for the head at localhost:6379"),
    (AWS, "$RAY_HEAD_IP:6379", "$RAY_HEAD_IP:6380", JOIN, "at port 6380, it listens on 6379"),
    (GCP, "--port=6379", "--port=6380", JOIN, "at port 6379, it listens on 6380"),
    (HOSTS, "$RAY_HEAD_IP:6379", "10.0.0.9:6379", JOIN, "look for the head at 10.0.0.9:6379"),
    (AWS, "--address=$RAY_HEAD_IP:6379 ", "", JOIN, "look for the head at no address"),
    (AWS, "--address=$RAY_HEAD_IP:6379", "--head", JOIN, "a head of its own"),
    (AWS, "--address=$RAY_HEAD_IP:6379", "--address '${RAY_HEAD_IP}:6379'", "", ""),
    (AWS, ", GPU: 1", ", GPU: 100", f"{TYPES}.gpu_spot.resources.GPU", "g6.2xlarge has 1 GPU, not 100"),
    (AWS, "{CPU: 16}", "{CPU: 64}", f"{TYPES}.cpu_spot.resources.CPU", "c7i.4xlarge has 16 CPU, not 64"),
    (GCP, "g2-standard-8", "n2-standard-8", f"{TYPES}.gpu_spot.resources.GPU", "n2-standard-8 has no GPU, not 1"),
    (AWS, "py311-gpu", "py311-cpu", "docker.image", "an image for CPUs on nodes with GPUs"),
    (GCP, IMAGE, "rayproject/ray:2.60.0-py311", "docker.image", "an image for CPUs on nodes with GPUs"),
    (GCP, IMAGE, "rayproject/ray:2.60.0-py311-cu128", "", ""),
    (RAY, "py311-gpu", "py311-cpu", "spec.workerGroupSpecs.0.template.spec.containers.0.image", "an image for CPUs"),
    (AWS, "HttpTokens: required", "HttpTokens: optional", f"{NODE}.MetadataOptions", "gets its credentials"),
    (AWS, "{HttpTokens: required, ", "{", f"{NODE}.MetadataOptions", "gets its credentials"),
    (
        AWS,
        "      SecurityGroupIds: [sg-CHANGE-ME]\n",
        "      NetworkInterfaces: [{AssociatePublicIpAddress: true, DeviceIndex: 0}]\n",
        f"{NODE}.NetworkInterfaces.0.AssociatePublicIpAddress",
        "a public address",
    ),
    (
        GCP,
        "- subnetwork:",
        "- accessConfigs: [{type: ONE_TO_ONE_NAT}]\n          subnetwork:",
        f"{NODE}.networkInterfaces.0.accessConfigs.0.type",
        "a public address",
    ),
    (AWS, "      SubnetIds: [subnet-CHANGE-ME-a, subnet-CHANGE-ME-b]\n", "", NODE, "a public address, which is Ray's"),
    (AWS, "use_internal_ips: true", "use_internal_ips: false", "provider.use_internal_ips", "public subnets only"),
    (GCP, "  use_internal_ips: true\n", "", "provider.use_internal_ips", "waits for public addresses"),
    (GCP, "      networkInterfaces: *network\n", "", f"{TYPES}.gpu_spot.node_config", "a public address, which is"),
    (AWS, "MarketType", "MarketTyp", f"{TYPES}.gpu_spot.node_config.InstanceMarketOptions.MarketTyp", "MarketType?"),
    (AWS, "VolumeSize", "VolumSize", f"{NODE}.BlockDeviceMappings.0.Ebs.VolumSize", "did you mean VolumeSize?"),
    (AWS, "DeviceName", "DevicName", f"{NODE}.BlockDeviceMappings.0.DevicName", "did you mean DeviceName?"),
    (AWS, "HttpPutResponseHopLimit", "HttpHopLimit", f"{NODE}.MetadataOptions.HttpHopLimit", "unknown key"),
    (AWS, "{Name: CHANGE", "{Nam: CHANGE", f"{NODE}.IamInstanceProfile.Nam", "did you mean Name?"),
    (GCP, "provisioningModel", "provisionningModel", f"{TYPES}.gpu_spot.node_config.scheduling.prov", "ioningModel?"),
    (GCP, "diskSizeGb", "diskSizeGB", f"{NODE}.disks.0.initializeParams.diskSizeGB", "did you mean diskSizeGb?"),
    (GCP, "autoDelete", "autodelete", f"{NODE}.disks.0.autodelete", "did you mean autoDelete?"),
    (GCP, "- subnetwork:", "- subnet:", f"{NODE}.networkInterfaces.0.subnet", "did you mean subnetwork?"),
    (GCP, "scopes:", "scope:", f"{NODE}.serviceAccounts.0.scope", "did you mean scopes?"),
    # values of a wrong type
    (GCP, "resources: {CPU: 16}", "resources: true", f"{TYPES}.cpu_spot.resources", "type object"),
    (RAY, "type: RuntimeDefault", "type: [RuntimeDefault]", f"{HEAD}.containers.0.sec", "system call"),
    (RAY, "headGroupSpec:\n", "headGroupSpec:\n    serviceType: [NodePort]\n", "spec.headGroupSpec.serv", "outside"),
    (NAMESPACE, "clusterIP: None", "type: {}", "", ""),
    # what pods name
    (RAY, "{name: tmp, mountPath", "{name: temp, mountPath", f"{HEAD}.containers.0.volumeMounts.0.name", "mean tmp?"),
    (NAMESPACE, "{name: data, mountPath", "{name: dat, mountPath", f"{POD}.0.volumeMounts.0.name", "mean data?"),
    (
        RAY,
        "claimName: mis-data",
        "claimName: mis-date",
        f"{HEAD}.volumes.2.persistentVolumeClaim.claimName",
        "mean mis-data?",
    ),
    (RAY, "AccountName: mis", "AccountName: miss", f"{HEAD}.serviceAccountName", "no ServiceAccount miss"),
    (
        RAY,
        "{name: mis-settings}",
        "{name: mis-setings}",
        f"{HEAD}.containers.0.envFrom.0.configMapRef.name",
        "mis-settings?",
    ),
    (RAY, "groupName: cpu", "groupName: gpu", "spec.workerGroupSpecs.1.groupName", "another group has this name"),
    (RAY, "- groupName: cpu\n      replicas", "- replicas", "spec.workerGroupSpecs.1.groupName", "has no name"),
]


@pytest.mark.parametrize(
    ("name", "old", "new", "key", "message"),
    TABLE,
    ids=[f"{row[0]}: {row[2][:40]!r} for {row[1][:30]!r}" for row in TABLE],
)
def test_what_is_broken_is_named(tmp_path, name, old, new, key, message):
    lines = broken(tmp_path, name, old, new)
    place = f"{Path(name).name}: {key}"
    if not message:
        assert [line for line in lines if ": error: " in line] == []
        return
    assert [line for line in lines if line.startswith(place) and message in line], lines
    assert all("; " in line and "\n" not in line for line in lines)
    assert "canary" not in "".join(lines).lower()


def test_settings_of_another_file_count(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(BASE.read_text().replace("  MIS_ROOT: s3://CHANGE-ME/mis\n", ""))
    findings = check_files([base, CLUSTER / JOB])
    assert any("no MIS_ROOT" in finding.problem for finding in findings)
    base.write_text(BASE.read_text().replace("s3://CHANGE-ME/mis", "/data/mis"))  # the claim is mounted at /data
    assert not any(finding.severity == ERROR for finding in check_files([base, CLUSTER / JOB]))
    base.write_text(BASE.read_text().replace("s3://CHANGE-ME/mis", "/tmp/mis"))
    assert any("disk of one machine" in finding.problem for finding in check_files([base, CLUSTER / JOB]))


def test_a_job_without_its_network_policy_is_refused():
    findings = check_files([CLUSTER / JOB])
    assert any("no NetworkPolicy denies all traffic in namespace mis" in finding.problem for finding in findings)


def test_ray_itself_binds_the_dashboard_to_all_addresses_when_nothing_is_said(tmp_path):
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    del config["head_start_ray_commands"]
    (tmp_path / "aws.yaml").write_text(yaml.safe_dump(config))
    findings = [finding for finding in check_files([tmp_path / "aws.yaml"]) if "dashboard" in finding.problem]
    assert [finding.problem for finding in findings] == [
        "Ray's default for it: the dashboard, which runs any job, listens on 0.0.0.0"
    ]


# -- hostile and unreadable files ------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
HOSTILE = {
    "object": ("x: !!python/object/apply:os.system ['touch canary']", "python/object/apply:os.system is refused"),
    "local tag": ("x: !Ref y", "is refused"),
    "billion laughs": (LAUGHS, "values with its aliases written out"),
    "contains itself": ("a: &a [*a]", "contains itself"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep but not very": ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
    "a long value": (f"cluster_name: {'ray[' * 1001}", "has more than 4000 characters"),
    "a slow word": (f"services: {{a: {{command: '{'pip ' * 1000}'}}}}", "no image"),
    "nested variables": (f"services: {{a: {{ports: ['{'${A:-' * 500}{'}' * 500}:1:1']}}}}", "published on"),
    "tabs": ("provider:\n\ttype: aws", "cannot start any token in line 2"),
    "unclosed": ("a: [", "is not YAML"),
    "list key": ("? [a]\n: b", "is not YAML"),
    "impossible date": ("a: 2020-99-99", "is not YAML"),
    "empty": ("", "is empty"),
    "a list": ("- a", "is not a mapping"),
    "something else": ("a: 1", "is neither a Ray cluster YAML"),
    "escape sequence": ('"\\e[31m\\nfile: ok": 1\ncluster_name: x\nprovider: {type: aws}', "unknown key"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml_is_a_finding(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    text, message = HOSTILE[kind]
    file = tmp_path / "x.yaml"
    file.write_text(text)
    started = time.process_time()
    lines = [str(finding) for finding in check_files([file])]
    assert time.process_time() - started < 5
    assert any(message in line for line in lines), lines
    assert all(line.isprintable() for line in lines)
    assert not (tmp_path / "canary").exists()


def test_a_hundred_megabytes_are_not_read(tmp_path):
    file = tmp_path / "x.yaml"
    with open(file, "wb") as stream:
        stream.truncate(100_000_000)
    started = time.process_time()
    (finding,) = check_files([file])
    assert "larger than 256 KiB" in finding.problem
    assert time.process_time() - started < 1


def test_unreadable_files_are_data_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(DataError, match="no YAML files in"):
        check_files([tmp_path / "folder.yaml"])
    for name in ("missing.yaml", "pipe.yaml", "binary.yaml"):
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            check_files([tmp_path / name])


def mutated(value: Any, chance: random.Random) -> Any:
    """A copy in which one place holds something else."""
    places: list[tuple[Any, Any]] = []
    copy = json.loads(json.dumps(value))

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []:
            places.append((node, key))
            collect(node[key])

    collect(copy)
    node, key = chance.choice(places)
    node[key] = chance.choice([None, "", "x", 0, -1, 1.5, True, [], {}, ["x"], {"x": 1}, [None], {"a": {"b": []}}])
    return copy


@pytest.mark.parametrize("name", ["aws.yaml", "on-premises.yaml", "compose.yaml", RAY, JOB])
def test_any_value_in_any_place_is_judged_and_not_a_crash(tmp_path, name):
    chance, original = random.Random(0), yaml.safe_load((CLUSTER / name).read_text())
    file = tmp_path / "x.yaml"
    for _ in range(25):
        file.write_text(yaml.safe_dump(mutated(original, chance)))
        check_files([file])


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_where_what_and_what_instead(tmp_path, capsys):
    assert mis("cluster", "validate", CLUSTER, BASE.parent) == 0
    assert capsys.readouterr().err == "0 errors, 8 warnings\n"
    (tmp_path / "aws.yaml").write_text((CLUSTER / "aws.yaml").read_text().replace(", GPU: 1", ", GPU: 0"))
    assert mis("cluster", "validate", tmp_path / "aws.yaml") == 2
    assert "aws.yaml: available_node_types: error: no GPU in any node type: " in capsys.readouterr().out
    assert mis("cluster", "validate", tmp_path / "aws.yaml", "--cpu-only") == 0
    assert mis("cluster", "validate", tmp_path / "missing.yaml") == 3
    assert "missing.yaml: No such file or directory" in capsys.readouterr().err


def test_it_answers_at_once_and_starts_nothing():
    code = (
        "import resource, sys, ray\nfrom mis_platform import cli\nsys.argv = ['mis', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    print('CODE', stop.code)\n"
        "print('RAY', ray.is_initialized())\n"
        "print('CHILDREN', resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)\n"
        "use = resource.getrusage(resource.RUSAGE_SELF)\nprint('SECONDS', use.ru_utime + use.ru_stime)\n"
    )
    command = [sys.executable, "-c", code, "cluster", "validate", CLUSTER, BASE.parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    words = done.stdout.split()
    assert "RAY False" in done.stdout, done.stdout + done.stderr
    assert "CHILDREN 0.0" in done.stdout
    assert float(words[words.index("SECONDS") + 1]) < 3
