"""One pod of a job: its container, volumes, environment, probes and what it may do."""

import math
from typing import Any

from cluster.checks import MEETING_SECONDS, PREFLIGHT_SECONDS
from cluster.names import refuse_unprintable
from cluster.profile import KubernetesProfile
from data_pipeline.errors import ConfigError

Object = dict[str, Any]

CONFIG_FOLDER = "/etc/t2v"
CACHE_FOLDER = "/cache"
HUB_FOLDER = f"{CACHE_FOLDER}/huggingface"
CONTAINER = "node"
TMP_GIB = 16
LAYER_GIB = 4  # what logs and the container's own layer take of the node's disk
PROBE_SECONDS = 60
# Ranks import torch before their watchdog begins, and it asks all ranks before it ends them.
WATCHDOG_SECONDS = 300
HEARTBEAT_SECONDS = 900


# The root of a large volume is looked at, not every file of it.
GROUP_OF_VOLUMES: Object = {"fsGroupChangePolicy": "OnRootMismatch"}


def literal(text: str) -> str:
    """Text that Kubernetes hands on as it is: it would replace `$(NAME)` in commands and values."""
    try:
        refuse_unprintable("an argument or value", text, allowed="\n\t")
    except ValueError as problem:
        raise ConfigError(f"{problem}; remove it.") from None
    return text.replace("$", "$$")


def probes(setup_seconds: float) -> Object:
    """On the node's own heartbeat, and patient: a slow step must not cost the gang a restart, and a
    start that takes too long is for the wrapper and the watchdog to end, who say why."""

    def probe(*arguments: str, failures: int) -> Object:
        return {
            "exec": {"command": ["t2v", "health", *arguments]},
            "periodSeconds": PROBE_SECONDS,
            "timeoutSeconds": 30,
            "failureThreshold": failures,
        }

    aged = ("--max-age", str(HEARTBEAT_SECONDS))
    # Nodes wait for the first one's name, check each other, and wait for each other.
    startup_seconds = 2 * MEETING_SECONDS + PREFLIGHT_SECONDS + setup_seconds + WATCHDOG_SECONDS
    failures = math.ceil(startup_seconds / PROBE_SECONDS)
    return {
        "startupProbe": probe(*aged, "--startup", failures=failures),
        "livenessProbe": probe(*aged, failures=3),
    }


def pod_template(
    profile: KubernetesProfile,
    name: str,
    container: Object,
    config: Object,
    *,
    shared_memory_gib: int,
    grace_seconds: int,
) -> Object:
    """A pod template that passes the restricted Pod Security Standard."""
    annotations = dict(profile.annotations)
    if profile.topology:
        annotations["kueue.x-k8s.io/podset-required-topology"] = profile.topology
    spec: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_seconds,
        "serviceAccountName": profile.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": profile.user,
            "runAsGroup": profile.user,
            **(GROUP_OF_VOLUMES | {"fsGroup": profile.user} if profile.fs_group else {}),
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": _volumes(profile, config, shared_memory_gib),
    }
    if profile.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": profile.image_pull_secret}]
    if profile.priority_class:
        spec["priorityClassName"] = profile.priority_class
    if profile.node_selector:
        spec["nodeSelector"] = dict(profile.node_selector)
    if profile.tolerations:
        spec["tolerations"] = [
            {
                "key": toleration.key,
                "operator": "Exists" if toleration.value is None else "Equal",
                **toleration.model_dump(include={"value", "effect"}, exclude_none=True),
                **({} if toleration.seconds is None else {"tolerationSeconds": toleration.seconds}),
            }
            for toleration in profile.tolerations
        ]
    ours = {"app.kubernetes.io/name": "t2v", "app.kubernetes.io/instance": name}
    labels = {**profile.labels, **ours}
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}


def container_of(
    profile: KubernetesProfile,
    *,
    command: list[str],
    arguments: list[str],
    resources: Object,
    environment: list[Object],
) -> Object:
    capabilities: Object = {"drop": ["ALL"]}
    if profile.rdma_resource in resources["limits"]:
        capabilities["add"] = ["IPC_LOCK"]  # registers memory with the network card
    mounts = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE_FOLDER},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    mounts += [
        {"name": f"claim-{number}", "mountPath": mount.path, "readOnly": mount.read_only}
        for number, mount in enumerate(profile.mounts)
    ]
    return {
        "name": CONTAINER,
        "image": profile.image,
        "command": command,
        "args": arguments,
        "workingDir": profile.workdir,
        "env": environment,
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": capabilities,
        },
        "volumeMounts": mounts,
    }


def _volumes(profile: KubernetesProfile, config: Object, shared_memory_gib: int) -> list[Object]:
    memory = {"medium": "Memory", "sizeLimit": f"{shared_memory_gib}Gi"}
    volumes: list[Object] = [
        {"name": "config", "configMap": {"name": config["metadata"]["name"]}},
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{TMP_GIB}Gi"}},
        {"name": "cache", "emptyDir": {"sizeLimit": f"{profile.cache_gib}Gi"}},
        {"name": "shared-memory", "emptyDir": memory},
    ]
    for number, mount in enumerate(profile.mounts):
        claim = {"claimName": mount.claim, "readOnly": mount.read_only}
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": claim})
    return volumes


def environment_of(profile: KubernetesProfile, *, hub_gib: int = 0, **more: str) -> list[Object]:
    """Variables of a pod, of whose cache `hub_gib` are kept for what the model hub gives."""
    # Nothing else of the container's root can be written to; a user that the image does not know
    # has no name, which torch.compile asks for.
    own = {"HOME": "/tmp", "USER": "t2v"}
    quota = {"T2V_CACHE": CACHE_FOLDER, "T2V_CACHE_GIB": str(profile.cache_gib - hub_gib - 1)}
    hub = {"HF_HOME": HUB_FOLDER} if hub_gib else {}
    values = {**own, **quota, **hub, **more, **profile.variables}
    secrets = [
        {
            "name": secret.variable,
            "valueFrom": {"secretKeyRef": {"name": secret.secret, "key": secret.key}},
        }
        for secret in profile.secrets
    ]
    return [{"name": name, "value": literal(value)} for name, value in values.items()] + secrets


def resources_of(profile: KubernetesProfile, cpus: int, memory_gib: int, gpus: int) -> Object:
    """Requests equal limits: whole CPUs can then be pinned, and nothing is promised twice."""
    amounts: Object = {
        "cpu": str(cpus),
        "memory": f"{memory_gib}Gi",
        "ephemeral-storage": f"{profile.cache_gib + TMP_GIB + LAYER_GIB}Gi",
    }
    if gpus:
        amounts[profile.gpu_resource] = str(gpus)
        if profile.rdma_resource:
            amounts[profile.rdma_resource] = "1"
        amounts |= {name: str(amount) for name, amount in profile.resources.items()}
    return {"requests": dict(amounts), "limits": dict(amounts)}
