"""Kubernetes manifests: KubeRay's RayCluster and RayJob and what stands around them.

Keys are those of KubeRay 1.7 and Kubernetes 1.37. Manifests are judged together: the NetworkPolicy and the settings
that a RayJob needs may be in another file of the same command.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mis_platform.cluster_files.documents import Document
from mis_platform.cluster_files.findings import WARNING, Finding, Path, shown
from mis_platform.cluster_files.pods import (
    CONTAINER,
    ENVIRONMENT,
    META,
    RESOURCES,
    TEMPLATE,
    check_pod,
    references,
    templates,
)
from mis_platform.cluster_files.rules import (
    EVERYWHERE,
    LOOPBACK,
    Keys,
    everywhere,
    image,
    mapping,
    names,
    nearest,
    no_cuda,
    ray_version,
    sequence,
    storage,
    unknown_keys,
    walk,
)
from mis_platform.cluster_files.shell import START_FLAGS

CREDENTIAL = {"value": None, "valueFrom": ENVIRONMENT["valueFrom"]}
GROUP = names("labels rayStartParams resources") | {"template": TEMPLATE}
CLUSTER: dict[str, Keys] = names("enableInTreeAutoscaling headServiceAnnotations managedBy rayVersion suspend") | {
    "authOptions": names("enableK8sTokenAuth mode secretName"),
    "autoscalerOptions": names("image imagePullPolicy idleTimeoutSeconds upscalingMode version")
    | {key: CONTAINER[key] for key in ("env", "envFrom", "resources", "securityContext", "volumeMounts")},
    "gcsFaultToleranceOptions": names("externalStorageNamespace redisAddress")
    | {"redisPassword": CREDENTIAL, "redisUsername": CREDENTIAL},
    "headGroupSpec": {**GROUP, **names("enableIngress headService serviceType")},
    "networkPolicy": None,
    "upgradeStrategy": None,
    "workerGroupSpecs": {
        **GROUP,
        **names(
            "groupName idleTimeoutSeconds maxReplicas minReplicas numOfHosts priority replicas scaleStrategy suspend"
        ),
    },
}
JOB: dict[str, Keys] = names(
    "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
    "entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds "
    "runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig suspend "
    "ttlSecondsAfterFinished"
) | {"rayClusterSpec": CLUSTER, "submitterPodTemplate": TEMPLATE}
PEER = {"podSelector": None, "namespaceSelector": None, "ipBlock": names("cidr except")}
ADMISSION = "pod-security.kubernetes.io/enforce"
POLICY_PORT = names("endPort port protocol")

# kind -> (apiVersion, keys of the document besides apiVersion, kind and metadata)
KINDS: dict[str, tuple[str, dict[str, Keys]]] = {
    "RayCluster": ("ray.io/v1", {"spec": CLUSTER}),
    "RayJob": ("ray.io/v1", {"spec": JOB}),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        {
            "spec": {
                **names("podSelector policyTypes"),
                "ingress": {"from": PEER, "ports": POLICY_PORT},
                "egress": {"to": PEER, "ports": POLICY_PORT},
            }
        },
    ),
    "PodDisruptionBudget": (
        "policy/v1",
        {"spec": names("maxUnavailable minAvailable selector unhealthyPodEvictionPolicy")},
    ),
    "Namespace": ("v1", {"spec": None}),
    "ServiceAccount": ("v1", names("automountServiceAccountToken imagePullSecrets secrets")),
    "ConfigMap": ("v1", names("binaryData data immutable")),
    "Secret": ("v1", names("data immutable stringData type")),
    "Service": (
        "v1",
        {
            "spec": names(
                "allocateLoadBalancerNodePorts clusterIP clusterIPs externalIPs externalName externalTrafficPolicy "
                "internalTrafficPolicy ipFamilies ipFamilyPolicy loadBalancerClass loadBalancerIP "
                "loadBalancerSourceRanges publishNotReadyAddresses selector sessionAffinity sessionAffinityConfig "
                "type"
            )
            | {"ports": names("appProtocol name nodePort port protocol targetPort")}
        },
    ),
    "Ingress": ("networking.k8s.io/v1", {"spec": None}),
    "PersistentVolumeClaim": (
        "v1",
        {
            "spec": names("accessModes dataSource dataSourceRef selector storageClassName volumeMode volumeName")
            | {"resources": RESOURCES}
        },
    ),
    "StatefulSet": (
        "apps/v1",
        {
            "spec": names(
                "minReadySeconds ordinals persistentVolumeClaimRetentionPolicy podManagementPolicy replicas "
                "revisionHistoryLimit selector serviceName updateStrategy volumeClaimTemplates"
            )
            | {"template": TEMPLATE}
        },
    ),
    "Deployment": (
        "apps/v1",
        {
            "spec": names(
                "minReadySeconds paused progressDeadlineSeconds replicas revisionHistoryLimit selector strategy"
            )
            | {"template": TEMPLATE}
        },
    ),
}


@dataclass(frozen=True, slots=True)
class _Manifest:
    """One manifest and all that came with it."""

    file: str
    value: dict[str, Any]
    company: Sequence[Document]

    @property
    def kind(self) -> str:
        return str(self.value.get("kind"))

    @property
    def namespace(self) -> Any:
        return mapping(self.value.get("metadata")).get("namespace")

    def others(self, kind: str) -> list[dict[str, Any]]:
        """Manifests of a kind in the same namespace."""
        found = [each.value for each in self.company if each.value.get("kind") == kind]
        return [each for each in found if mapping(each.get("metadata")).get("namespace") == self.namespace]


def check_manifests(documents: Sequence[Document], cpu_only: bool) -> Iterator[Finding]:
    """Everything that is wrong with manifests that are applied together."""
    for document in documents:
        yield from everywhere(document)
        manifest = _Manifest(document.file, document.value, documents)
        yield from _keys(manifest)
        yield from _exposure(manifest)
        yield from _images(manifest)
        claims = sequence(mapping(manifest.value.get("spec")).get("volumeClaimTemplates"))
        for path, template in templates(manifest.value):
            yield from check_pod(manifest.file, path, template, claims)
            yield from _references(manifest, path, template)
        if manifest.kind == "RayCluster":
            yield from _cluster(manifest, ("spec",), mapping(manifest.value.get("spec")), cpu_only)
            if not mapping(manifest.value.get("spec")).get("gcsFaultToleranceOptions"):
                yield Finding(
                    manifest.file,
                    "spec.gcsFaultToleranceOptions",
                    "a lost head takes all workers with it",
                    "name a Redis",
                    WARNING,
                )
        if manifest.kind == "RayJob":
            yield from _job(manifest, cpu_only)


def _keys(manifest: _Manifest) -> Iterator[Finding]:
    known = KINDS.get(manifest.kind)
    if known is None:
        yield Finding(
            manifest.file, "kind", f"{shown(manifest.kind)} is not checked", nearest(manifest.kind, KINDS), WARNING
        )
        return
    if manifest.value.get("apiVersion") != known[0]:
        yield Finding(
            manifest.file,
            "apiVersion",
            f"{shown(manifest.value.get('apiVersion'))} has no {manifest.kind} that is checked",
            f"write {known[0]}",
        )
    keys: dict[str, Keys] = {"apiVersion": None, "kind": None, "metadata": META, **known[1]}
    yield from unknown_keys(manifest.file, manifest.value, keys)


def _images(manifest: _Manifest) -> Iterator[Finding]:
    """Every image, wherever it stands."""
    for path, value in walk(manifest.value.get("spec"), ("spec",)):
        if path[-1] == "image" or path[-2:] == ("image", "reference"):
            yield from image(manifest.file, path, value, runs_ray=manifest.kind in {"RayCluster", "RayJob"})


def _references(manifest: _Manifest, path: Path, template: dict[str, Any]) -> Iterator[Finding]:
    """Whether what a pod names is there, if manifests of that kind are among the files."""
    for where, kind, name in references(path, template):
        known = {str(mapping(each.get("metadata")).get("name")) for each in manifest.others(kind)}
        if known and name not in known | ({"default"} if kind == "ServiceAccount" else set()):
            yield Finding(manifest.file, where, f"no {kind} {shown(name)}", nearest(name, known))


# -- one Ray cluster -------------------------------------------------------------------------------------------------


def _job(manifest: _Manifest, cpu_only: bool) -> Iterator[Finding]:
    spec, file = mapping(manifest.value.get("spec")), manifest.file
    if not spec.get("entrypoint"):
        yield Finding(file, "spec.entrypoint", "nothing to run", "write the mis command")
    if "clusterSelector" in spec:  # somebody else's cluster: neither made nor ended by this job
        return
    yield from _cluster(manifest, ("spec", "rayClusterSpec"), mapping(spec.get("rayClusterSpec")), cpu_only)
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield Finding(
            file, "spec.shutdownAfterJobFinishes", "the pods stay, and cost, when the job is done", "write true"
        )
    if "activeDeadlineSeconds" not in spec:
        yield Finding(file, "spec.activeDeadlineSeconds", "a hanging job never ends", "write the longest time", WARNING)
    if not spec.get("backoffLimit"):
        yield Finding(
            file, "spec.backoffLimit", "a lost head ends the job; mis would go on where it was", "write 3", WARNING
        )


def _cluster(manifest: _Manifest, path: Path, spec: dict[str, Any], cpu_only: bool) -> Iterator[Finding]:
    file = manifest.file
    yield from ray_version(file, (*path, "rayVersion"), spec.get("rayVersion"))
    if mapping(spec.get("authOptions")).get("mode") != "token":
        yield Finding(
            file,
            (*path, "authOptions", "mode"),
            "no authentication: whoever reaches the cluster runs any code on it",
            "write mode: token",
        )
    if spec.get("enableInTreeAutoscaling") and mapping(spec.get("autoscalerOptions")).get("version") != "v2":
        yield Finding(
            file,
            (*path, "autoscalerOptions", "version"),
            "not the autoscaler that knows idle nodes",
            "write v2",
            WARNING,
        )
    workers = [each for each in sequence(spec.get("workerGroupSpecs")) if isinstance(each, dict)]
    yield from _head(file, (*path, "headGroupSpec"), mapping(spec.get("headGroupSpec")), bool(workers))
    yield from _groups(file, (*path, "workerGroupSpecs"), workers, cpu_only)
    nodes = 1 + sum(_count(each.get("maxReplicas")) for each in workers)
    said = set()
    for where, group in [(("headGroupSpec",), mapping(spec.get("headGroupSpec")))] + [
        (("workerGroupSpecs", position), group) for position, group in enumerate(workers)
    ]:
        container, pod = _ray_container(group)
        key = (*path, *where, "template", "spec", "containers", 0, "env")
        environment = _environment(manifest, container)
        if environment.get("RAY_AUTH_MODE", "token").lower() != "token":
            yield Finding(file, key, "RAY_AUTH_MODE turns authentication off again", "remove it")
        for finding in storage(file, key, environment, nodes, _network_mounts(pod, container)):
            if (finding.problem, finding.severity) not in said:
                said.add((finding.problem, finding.severity))
                yield finding
    yield from _policies(manifest)


def _head(file: str, path: Path, head: dict[str, Any], has_workers: bool) -> Iterator[Finding]:
    yield from _start_params(file, (*path, "rayStartParams"), mapping(head.get("rayStartParams")))
    cpus = mapping(head.get("resources")).get("CPU", mapping(head.get("rayStartParams")).get("num-cpus"))
    if has_workers and str(cpus) != "0":
        yield Finding(
            file,
            (*path, "rayStartParams", "num-cpus"),
            "the head would run work, and take the cluster with it when that work uses up its memory",
            'write "0"',
        )
    if head.get("serviceType") not in (None, "ClusterIP"):
        yield Finding(
            file,
            (*path, "serviceType"),
            f"{shown(head['serviceType'])} puts the Jobs API outside the cluster",
            "write ClusterIP and use kubectl port-forward",
        )
    if head.get("enableIngress"):
        yield Finding(file, (*path, "enableIngress"), "puts the Jobs API outside the cluster", "write false")


def _groups(file: str, path: Path, workers: list[dict[str, Any]], cpu_only: bool) -> Iterator[Finding]:
    gpus = 0.0
    called: set[str] = set()
    for position, group in enumerate(workers):
        where, name = (*path, position), str(group.get("groupName", ""))
        if not name or name in called:
            problem = "another group has this name" if name else "the group has no name"
            yield Finding(file, (*where, "groupName"), problem, "give each group its own")
        called.add(name)
        yield from _start_params(file, (*where, "rayStartParams"), mapping(group.get("rayStartParams")))
        if not isinstance(group.get("maxReplicas"), int):
            yield Finding(file, (*where, "maxReplicas"), "no limit on what it may cost", "write the largest number")
        container, _ = _ray_container(group)
        limits = mapping(mapping(container.get("resources")).get("limits"))
        each = sum(_count(value) for name, value in limits.items() if str(name).endswith("/gpu"))
        gpus += each * _count(group.get("maxReplicas"))
        if each:
            yield from no_cuda(file, (*where, "template", "spec", "containers", 0, "image"), container.get("image"))
    if not gpus and not cpu_only:
        yield Finding(
            file,
            path,
            "no GPU in any group: the paper's training would take months",
            "give a group limits of nvidia.com/gpu, or say --cpu-only",
        )
    if workers and not any(_count(group.get("minReplicas")) for group in workers):
        yield Finding(
            file,
            path,
            "starts without a worker: mis plans with the nodes that it finds",
            "write minReplicas: 1 where work is to run",
            WARNING,
        )


def _start_params(file: str, path: Path, params: dict[str, Any]) -> Iterator[Finding]:
    for name, value in params.items():
        key = (*path, name)
        if name not in START_FLAGS:
            yield Finding(file, key, f"ray start has no --{name}", nearest(str(name), START_FLAGS))
        if not isinstance(value, str):
            yield Finding(file, key, "KubeRay takes strings here", f'write "{shown(value)}"')
        if name == "dashboard-host" and str(value) not in LOOPBACK:
            yield Finding(
                file,
                key,
                f"the dashboard, which runs any job, listens on {shown(value)}",
                "leave it out: KubeRay opens it to the head's service, which the NetworkPolicy guards",
            )


def _environment(manifest: _Manifest, container: dict[str, Any]) -> dict[str, str]:
    """Variables of a container; those from a ConfigMap count when it is among the files, others as a reference."""
    found: dict[str, str] = {}
    for source in sequence(container.get("envFrom")):
        name = mapping(mapping(source).get("configMapRef")).get("name")
        for config in manifest.others("ConfigMap"):
            if name and mapping(config.get("metadata")).get("name") == name:
                found |= {str(key): str(value) for key, value in mapping(config.get("data")).items()}
    for variable in sequence(container.get("env")):
        each = mapping(variable)
        found[str(each.get("name"))] = str(
            each.get("value", "" if "valueFrom" not in each else "s3://from-a-reference")
        )
    return found


def _network_mounts(pod: dict[str, Any], container: dict[str, Any]) -> list[str]:
    """Where claims and NFS are mounted; other volumes are of one node."""
    shared = [
        each.get("name")
        for each in sequence(pod.get("volumes"))
        if isinstance(each, dict) and ("persistentVolumeClaim" in each or "nfs" in each)
    ]
    mounts = [mapping(each) for each in sequence(container.get("volumeMounts"))]
    return [str(each.get("mountPath")) for each in mounts if each.get("name") in shared]


# -- network and pods ------------------------------------------------------------------------------------------------


def _policies(manifest: _Manifest) -> Iterator[Finding]:
    """Whether all traffic is denied to every pod of the namespace, and something allowed again."""
    specs = [mapping(each.get("spec")) for each in manifest.others("NetworkPolicy")]
    closed = [
        spec
        for spec in specs
        if spec.get("podSelector") == {}
        and not spec.get("ingress")
        and not spec.get("egress")
        and {"Ingress", "Egress"} <= set(sequence(spec.get("policyTypes")))
    ]
    if not closed:
        yield Finding(
            manifest.file,
            "",
            f"no NetworkPolicy denies all traffic in namespace {shown(manifest.namespace)}",
            "check it together with cluster/kuberay/base.yaml, or write one",
        )


def _exposure(manifest: _Manifest) -> Iterator[Finding]:
    spec, file = mapping(manifest.value.get("spec")), manifest.file
    if manifest.kind == "Service" and spec.get("type") in ("LoadBalancer", "NodePort"):
        yield Finding(
            file,
            "spec.type",
            f"{spec['type']} is reachable from outside",
            "write ClusterIP and use kubectl port-forward",
        )
    if manifest.kind == "Ingress":
        yield Finding(file, "kind", "an Ingress is reachable from outside", "remove it and use kubectl port-forward")
    if manifest.kind == "Secret":
        yield Finding(
            file,
            "data",
            "a secret written into the file",
            "create it with kubectl create secret --from-file or --from-literal",
        )
    if manifest.kind == "Namespace":
        yield from _admission(manifest)
    if manifest.kind == "NetworkPolicy":
        yield from _open_rules(file, spec)


def _admission(manifest: _Manifest) -> Iterator[Finding]:
    level = mapping(mapping(manifest.value.get("metadata")).get("labels")).get(ADMISSION)
    if level != "restricted":
        problem = f"{ADMISSION} is {shown(level or 'not set')}: pods that are not confined are let in"
        yield Finding(manifest.file, "metadata.labels", problem, "write restricted")


def _open_rules(file: str, spec: dict[str, Any]) -> Iterator[Finding]:
    """Rules that undo the denial of everything: for all peers, for pods of any namespace, for the whole internet."""
    for position, rule in enumerate(sequence(spec.get("egress"))):
        if not rule:
            yield Finding(file, ("spec", "egress", position), "lets everything out", "name who is reached")
    for position, rule in enumerate(sequence(spec.get("ingress"))):
        path, peers = ("spec", "ingress", position), sequence(mapping(rule).get("from"))
        if not all(peers) or not peers:
            yield Finding(file, path, "lets everybody in", "name who may come in under from")
        for number, peer in enumerate(peers):
            selector = mapping(peer).get("namespaceSelector", {"unset": True})
            if not any(mapping(selector).values()):
                yield Finding(file, (*path, "from", number), "lets every namespace in", "name the namespaces")
    for where, value in walk(spec.get("ingress"), ("spec", "ingress")):
        if value in EVERYWHERE:
            yield Finding(file, where, f"open to the whole internet ({value})", "write your own network")


# -- shared ----------------------------------------------------------------------------------------------------------


def _ray_container(group: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The container in which Ray runs (KubeRay: the first one), and its pod."""
    pod = mapping(mapping(group.get("template")).get("spec"))
    containers = sequence(pod.get("containers"))
    return (mapping(containers[0]) if containers else {}), pod


def _count(value: Any) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0
    return int(number) if math.isfinite(number) else 0
