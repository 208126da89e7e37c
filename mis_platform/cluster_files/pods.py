"""Pods of Kubernetes manifests: what they may do on their node, and what they name exists."""

from collections.abc import Iterable, Iterator
from typing import Any

from mis_platform.cluster_files.findings import WARNING, Finding, Path, shown
from mis_platform.cluster_files.rules import Keys, mapping, names, nearest, sequence

META = names("annotations finalizers generateName labels name namespace")
SECURITY = names(
    "allowPrivilegeEscalation appArmorProfile capabilities privileged procMount readOnlyRootFilesystem "
    "runAsGroup runAsNonRoot runAsUser seLinuxOptions seccompProfile windowsOptions"
) | {"capabilities": names("add drop"), "seccompProfile": names("type localhostProfile")}
ENVIRONMENT = {"name": None, "value": None} | {
    "valueFrom": names("configMapKeyRef fieldRef resourceFieldRef secretKeyRef fileKeyRef")
}
RESOURCES = names("claims limits requests")
PROBE = names(
    "exec failureThreshold grpc httpGet initialDelaySeconds periodSeconds successThreshold tcpSocket "
    "terminationGracePeriodSeconds timeoutSeconds"
)
CONTAINER: dict[str, Keys] = names(
    "args command image imagePullPolicy name resizePolicy restartPolicy stdin stdinOnce "
    "terminationMessagePath terminationMessagePolicy tty volumeDevices workingDir lifecycle"
) | {
    "env": ENVIRONMENT,
    "envFrom": names("configMapRef prefix secretRef"),
    "livenessProbe": PROBE,
    "readinessProbe": PROBE,
    "startupProbe": PROBE,
    "ports": names("containerPort hostIP hostPort name protocol"),
    "resources": RESOURCES,
    "securityContext": SECURITY,
    "volumeMounts": names("mountPath mountPropagation name readOnly recursiveReadOnly subPath subPathExpr"),
}
VOLUME: dict[str, Keys] = names(
    "azureDisk azureFile cephfs configMap csi downwardAPI ephemeral fc flexVolume gcePersistentDisk "
    "glusterfs hostPath image iscsi name projected rbd secret awsElasticBlockStore"
) | {
    "emptyDir": names("medium sizeLimit"),
    "nfs": names("path readOnly server"),
    "persistentVolumeClaim": names("claimName readOnly"),
}
POD: dict[str, Keys] = names(
    "activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy enableServiceLinks "
    "hostAliases hostIPC hostNetwork hostPID hostUsers hostname imagePullSecrets nodeName nodeSelector os "
    "overhead preemptionPolicy priority priorityClassName readinessGates resourceClaims restartPolicy "
    "runtimeClassName schedulerName schedulingGates serviceAccountName setHostnameAsFQDN "
    "shareProcessNamespace subdomain terminationGracePeriodSeconds topologySpreadConstraints"
) | {
    "containers": CONTAINER,
    "initContainers": CONTAINER,
    "securityContext": SECURITY
    | names("fsGroup fsGroupChangePolicy supplementalGroups supplementalGroupsPolicy sysctls"),
    "tolerations": names("effect key operator tolerationSeconds value"),
    "volumes": VOLUME,
}
TEMPLATE: dict[str, Keys] = {"metadata": META, "spec": POD}


def templates(value: Any, path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every pod template below a manifest."""
    if isinstance(value, dict):
        for key, below in value.items():
            if key in {"template", "submitterPodTemplate"} and isinstance(below, dict):
                yield (*path, key), below
            else:
                yield from templates(below, (*path, str(key)))
    elif isinstance(value, list):
        for position, below in enumerate(value):
            yield from templates(below, (*path, position))


def check_pod(file: str, path: Path, template: dict[str, Any], claims: Iterable[Any] = ()) -> Iterator[Finding]:
    """What is wrong with a pod besides its images. claims: volumes that a StatefulSet adds to it."""
    pod, where = mapping(template.get("spec")), (*path, "spec")
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield Finding(file, (*where, name), "reaches into the node", "remove it")
    volumes = [mapping(each) for each in sequence(pod.get("volumes"))]
    for position, volume in enumerate(volumes):
        if "hostPath" in volume:
            yield Finding(
                file, (*where, "volumes", position, "hostPath"), "reaches into the node", "use a claim or an emptyDir"
            )
    named = {str(each.get("name")) for each in volumes} | {
        str(mapping(mapping(each).get("metadata")).get("name")) for each in claims
    }
    for kind in ("initContainers", "containers"):
        for position, each in enumerate(sequence(pod.get(kind))):
            here, container = (*where, kind, position), mapping(each)
            if "image" not in container:
                yield Finding(file, (*here, "image"), "no image", "write registry/name:tag")
            yield from _confinement(file, here, container, mapping(pod.get("securityContext")))
            yield from _openings(file, here, container, named)


def _openings(file: str, path: Path, container: dict[str, Any], volumes: set[str]) -> Iterator[Finding]:
    """Ports on the node, and mounts of volumes that there are not."""
    for position, port in enumerate(sequence(container.get("ports"))):
        if "hostPort" in mapping(port):
            key = (*path, "ports", position, "hostPort")
            yield Finding(file, key, "open on the node's own address, past every NetworkPolicy", "use a Service")
    for position, mount in enumerate(sequence(container.get("volumeMounts"))):
        name = str(mapping(mount).get("name"))
        if name not in volumes:
            key = (*path, "volumeMounts", position, "name")
            yield Finding(file, key, f"the pod has no volume {shown(name)}", nearest(name, volumes))


def _confinement(file: str, path: Path, container: dict[str, Any], pod: dict[str, Any]) -> Iterator[Finding]:
    own = mapping(container.get("securityContext"))
    both = {**pod, **own}
    key = (*path, "securityContext")
    if own.get("privileged"):
        yield Finding(file, key, "privileged: is root on the node", "remove it")
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield Finding(file, key, "may run as root", "write runAsNonRoot: true")
    if mapping(both.get("seccompProfile")).get("type") not in ("RuntimeDefault", "Localhost"):
        yield Finding(file, key, "may make any system call", "write seccompProfile: {type: RuntimeDefault}")
    if own.get("allowPrivilegeEscalation") is not False:
        yield Finding(file, key, "may become root", "write allowPrivilegeEscalation: false")
    if "ALL" not in sequence(mapping(own.get("capabilities")).get("drop")):
        yield Finding(file, key, "keeps capabilities", "write capabilities: {drop: [ALL]}")
    added = {str(name) for name in sequence(mapping(own.get("capabilities")).get("add"))} - {"NET_BIND_SERVICE"}
    if added:
        yield Finding(file, key, f"{shown(min(added))} is more than the namespace allows", "remove it")
    if own.get("readOnlyRootFilesystem") is not True:
        yield Finding(file, key, "can change its own image", "write readOnlyRootFilesystem: true", WARNING)
    resources = mapping(container.get("resources"))
    if not resources.get("limits") or not resources.get("requests"):
        yield Finding(
            file, (*path, "resources"), "no requests or limits: the node decides who is killed", "write both", WARNING
        )


def references(path: Path, template: dict[str, Any]) -> Iterator[tuple[Path, str, str]]:
    """(where, kind, name) of the manifests that a pod names."""
    pod, where = mapping(template.get("spec")), (*path, "spec")
    if "serviceAccountName" in pod:
        yield (*where, "serviceAccountName"), "ServiceAccount", str(pod["serviceAccountName"])
    for position, volume in enumerate(sequence(pod.get("volumes"))):
        if "persistentVolumeClaim" in mapping(volume):
            claim = str(mapping(volume["persistentVolumeClaim"]).get("claimName"))
            key = (*where, "volumes", position, "persistentVolumeClaim", "claimName")
            yield key, "PersistentVolumeClaim", claim
    for kind in ("initContainers", "containers"):
        for position, container in enumerate(sequence(pod.get(kind))):
            for number, source in enumerate(sequence(mapping(container).get("envFrom"))):
                if "configMapRef" in mapping(source):
                    key = (*where, kind, position, "envFrom", number, "configMapRef", "name")
                    yield key, "ConfigMap", str(mapping(source["configMapRef"]).get("name"))
