"""The machines of a cluster YAML: what the cloud is asked for, what it costs to lose, and who reaches it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mis_platform.cluster_files.findings import ERROR, WARNING, Finding, Path, shown
from mis_platform.cluster_files.rules import Keys, mapping, names, no_cuda, walk

# Fields of EC2's RunInstances and of a Compute Engine instance.
NODE_CONFIG: dict[str, Keys] = {
    "aws": names(
        "BlockDeviceMappings CapacityReservationSpecification CpuOptions CreditSpecification EbsOptimized "
        "IamInstanceProfile ImageId InstanceInitiatedShutdownBehavior InstanceMarketOptions InstanceType "
        "KeyName LaunchTemplate LicenseSpecifications MetadataOptions Monitoring NetworkInterfaces Placement "
        "PrivateDnsNameOptions SecurityGroupIds SecurityGroups SubnetId SubnetIds TagSpecifications UserData"
    )
    | {
        "BlockDeviceMappings": names("DeviceName NoDevice VirtualName")
        | {
            "Ebs": names(
                "AvailabilityZone AvailabilityZoneId DeleteOnTermination EbsCardIndex Encrypted Iops KmsKeyId "
                "OutpostArn SnapshotId Throughput VolumeInitializationRate VolumeSize VolumeType"
            )
        },
        "IamInstanceProfile": names("Arn Name"),
        "InstanceMarketOptions": {
            "MarketType": None,
            "SpotOptions": names(
                "BlockDurationMinutes InstanceInterruptionBehavior MaxPrice SpotInstanceType ValidUntil"
            ),
        },
        "MetadataOptions": names(
            "HttpEndpoint HttpProtocolIpv6 HttpPutResponseHopLimit HttpTokens InstanceMetadataTags"
        ),
    },
    "gcp": names(
        "acceleratorConfig advancedMachineFeatures canIpForward confidentialInstanceConfig description disks "
        "guestAccelerators hostname labels machineType metadata minCpuPlatform networkInterfaces "
        "networkPerformanceConfig privateIpv6GoogleAccess reservationAffinity resourcePolicies scheduling "
        "serviceAccounts shieldedInstanceConfig shieldedVmConfig sourceInstanceTemplate sourceMachineImage "
        "tags"
    )
    | {
        "disks": names(
            "architecture autoDelete boot deviceName diskEncryptionKey diskSizeGb forceAttach guestOsFeatures index "
            "interface kind licenses mode savedState shieldedInstanceInitialState source type"
        )
        | {
            "initializeParams": names(
                "architecture description diskName diskSizeGb diskType enableConfidentialCompute labels licenses "
                "onUpdateAction provisionedIops provisionedThroughput replicaZones resourceManagerTags "
                "resourcePolicies sourceImage sourceImageEncryptionKey sourceSnapshot sourceSnapshotEncryptionKey "
                "storagePool"
            )
        },
        "networkInterfaces": names(
            "accessConfigs aliasIpRanges fingerprint igmpQuery internalIpv6PrefixLength ipv6AccessConfigs "
            "ipv6AccessType ipv6Address kind name network networkAttachment networkIP nicType parentNicName "
            "queueCount stackType subnetwork vlan"
        ),
        "scheduling": names(
            "automaticRestart availabilityDomain hostErrorTimeoutSeconds instanceTerminationAction "
            "localSsdRecoveryTimeout locationHint maxRunDuration minNodeCpus nodeAffinities onHostMaintenance "
            "onInstanceStopAction preemptible provisioningModel skipGuestOsShutdown terminationTime"
        ),
        "serviceAccounts": names("email scopes"),
    },
}

# CPUs and GPUs of the machines in cluster/; of others only the family is known.
MACHINES = {
    **{"m7i.xlarge": (4, 0), "c7i.4xlarge": (16, 0), "g6.2xlarge": (8, 1)},
    **{"n2-standard-4": (4, 0), "n2-highcpu-16": (16, 0), "g2-standard-8": (8, 1)},
}
GPU_MACHINE = {"aws": re.compile(r"^(p|gr?)\d"), "gcp": re.compile(r"^[ag]\d-")}
PRIVATE_BY = {  # what says in which network a machine is
    "aws": {"LaunchTemplate", "NetworkInterfaces", "SubnetId", "SubnetIds"},
    "gcp": {"networkInterfaces", "sourceInstanceTemplate"},
}
TYPES = "available_node_types"


def is_local(config: Mapping[str, Any]) -> bool:
    """Whether it lists hosts instead of asking a cloud."""
    provider = config.get("provider")
    return isinstance(provider, dict) and provider.get("type") == "local"


def workers_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The node types that there can be workers of."""
    head = config.get("head_node_type")
    types = {name: each for name, each in config.get(TYPES, {}).items() if each.get("max_workers", 0) > 0}
    return {name: each for name, each in types.items() if name != head or is_local(config)}


def node_count(config: Mapping[str, Any]) -> int:
    """The most nodes there can be, with the head."""
    most = sum(each["max_workers"] for each in workers_of(config).values())
    return 1 + min(most, config.get("max_workers", most))


def check_machines(file: str, config: Mapping[str, Any], cpu_only: bool, has_v2: bool) -> Iterator[Finding]:
    """What is wrong with the node types of a cloud. has_v2: Ray's second autoscaler is on."""
    if is_local(config):  # Ray finds out what the hosts have
        return
    workers, kind = workers_of(config), str(config["provider"].get("type"))
    gpus = {name: _gpus(each, kind) for name, each in workers.items()}
    if not any(gpus.values()) and not cpu_only:
        problem = "no GPU in any node type: the paper's training would take months"
        yield Finding(file, TYPES, problem, "add GPU workers, or say --cpu-only")
    yield from _spot(file, workers, gpus, has_v2)
    if workers and not any(each.get("min_workers") for each in workers.values()):
        problem = "starts without a worker: mis plans with the nodes that it finds"
        yield Finding(file, TYPES, problem, "write min_workers: 1 where work is to run", WARNING)
    if kind == "aws" and not all((each.get("node_config") or {}).get("ImageId") for each in workers.values()):
        problem = "Ray's own machine image has CUDA 11.2: its driver is too old for CUDA 13"
        yield Finding(file, TYPES, problem, "write ImageId of a Deep Learning Base AMI in every node type", WARNING)
    for name, each in workers.items():
        if gpus[name] and "GPU" not in (each.get("resources") or {}) and kind != "aws":
            yield Finding(file, (TYPES, name, "resources"), "no GPU among them", "write GPU: 1")
        if gpus[name]:
            yield from _gpu_image(file, config, name, each)
    if kind in PRIVATE_BY and not config["provider"].get("use_internal_ips"):
        problem = "Ray takes public subnets only, and waits for public addresses"
        remedy = "write true, and use ray up where the private addresses can be reached"
        yield Finding(file, "provider.use_internal_ips", problem, remedy, WARNING)
    for name, each in config.get(TYPES, {}).items():
        yield from _size(file, kind, name, each)
        yield from _public(file, (TYPES, name, "node_config"), config["provider"], each.get("node_config") or {})


def _spot(
    file: str, workers: Mapping[str, Mapping[str, Any]], gpus: Mapping[str, int], has_v2: bool
) -> Iterator[Finding]:
    spot = {name for name, each in workers.items() if gpus[name] and _is_spot(each.get("node_config") or {})}
    if spot and not any(gpus[name] for name in set(workers) - spot):
        problem = "spot GPUs only: the run waits when there are none"
        yield Finding(file, (TYPES, min(spot)), problem, "add an on-demand type with a lower priority", WARNING)
    if spot and not has_v2:
        problem = "Ray's first autoscaler asks for spot machines for ever, capacity or not"
        remedy = "add -e RAY_enable_autoscaler_v2=1: the second one takes the on-demand type then"
        yield Finding(file, "docker.run_options", problem, remedy, WARNING)


def _gpu_image(file: str, config: Mapping[str, Any], name: str, node_type: Mapping[str, Any]) -> Iterator[Finding]:
    own, common = node_type.get("docker") or {}, config.get("docker") or {}
    if own.get("worker_image"):
        yield from no_cuda(file, (TYPES, name, "docker", "worker_image"), own["worker_image"])
    else:
        key = "worker_image" if common.get("worker_image") else "image"
        yield from no_cuda(file, ("docker", key), common.get(key) or "")


def _size(file: str, kind: str, name: str, node_type: Mapping[str, Any]) -> Iterator[Finding]:
    """What a node type promises and its machine does not have: work that asks for it would wait for ever."""
    machine, resources = node_type.get("node_config") or {}, node_type.get("resources") or {}
    called = _machine_name(machine)
    if called in MACHINES:
        most = dict(zip(("CPU", "GPU"), MACHINES[called], strict=True))
    elif not called or kind not in GPU_MACHINE or GPU_MACHINE[kind].match(called) or machine.get("guestAccelerators"):
        return
    else:
        most = {"GPU": 0}
    for resource, count in most.items():
        if int(resources.get(resource, 0)) > count:
            problem = f"{shown(called)} has {count or 'no'} {resource}, not {resources[resource]}"
            yield Finding(file, (TYPES, name, "resources", resource), problem, f"write {resource}: {count}")


def _public(file: str, path: Path, provider: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[Finding]:
    """Addresses on the internet, and credentials that any request from the machine gets."""
    kind = str(provider.get("type"))
    wanted = PRIVATE_BY.get(kind, set())
    if wanted and not wanted & set(machine):
        remedy = f"write {' or '.join(sorted(wanted))}, of a private subnet"
        yield Finding(file, path, "a public address, which is Ray's default", remedy, WARNING)
    for below, value in walk(dict(machine)):
        if (below[-1:] == ("AssociatePublicIpAddress",) and value is True) or "accessConfigs" in below:
            remedy = "remove it, and use a private subnet with a NAT gateway for the way out"
            yield Finding(file, (*path, *below), "a public address", remedy)
    tokens = mapping(machine.get("MetadataOptions")).get("HttpTokens")
    if kind == "aws" and tokens != "required":
        problem = "whatever can make the machine send a request gets its credentials"
        remedy = "write MetadataOptions: {HttpTokens: required, HttpPutResponseHopLimit: 1}"
        yield Finding(file, (*path, "MetadataOptions"), problem, remedy, ERROR if tokens else WARNING)


def _machine_name(machine: Mapping[str, Any]) -> str:
    return str(machine.get("InstanceType") or machine.get("machineType") or "").rpartition("/")[2]


def _gpus(node_type: Mapping[str, Any], kind: str) -> int:
    resources, machine = node_type.get("resources") or {}, node_type.get("node_config") or {}
    if "GPU" in resources:
        return int(resources["GPU"])
    pattern = GPU_MACHINE.get(kind)
    return int(bool(machine.get("guestAccelerators")) or bool(pattern and pattern.match(_machine_name(machine))))


def _is_spot(machine: Mapping[str, Any]) -> bool:
    return any(
        value in ("spot", "SPOT") or (path[-1] == "preemptible" and value is True)
        for path, value in walk(dict(machine))
        if path
    )
