"""Rules that a rendered job must keep and that no schema states; `t2v launch` asks them itself."""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from cluster.job import GOODBYE_SECONDS
from cluster.names import (
    DNS_LABEL,
    DNS_NAME,
    ENVIRONMENT_NAME,
    IMAGE_BY_DIGEST,
    LABEL,
    LABEL_VALUE,
    QUANTITY,
)
from cluster.secrets import names_secret, secrets_in

Object = dict[str, Any]

SAFE_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}
HOST_FIELDS = ("hostNetwork", "hostPID", "hostIPC")
OWN_GPU = re.compile(r"[a-z0-9.-]+/gpu")
WORKLOADS = ("Job", "JobSet", "TrainJob")
# What is appended to the name of a pod: JobSet refuses what is too long with it, a bare Job cuts.
POD_SUFFIX = "-abcde"
ONE_OF = {
    "restartPolicy": {"Never"},
    "completionMode": {"Indexed"},
    "podReplacementPolicy": {"Failed"},
    "medium": {"Memory"},
    "action": {
        *("FailJob", "FailIndex", "Ignore", "Count"),
        *("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    },
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "operator": {"In", "NotIn", "Exists", "Equal"},
}


def faults(objects: list[Object], *, rdma_resource: str | None = None) -> list[str]:
    """All that is wrong with the objects of a job, as `Kind/name: what`; `rdma_resource` is the
    site's, if it has one."""
    found = []
    for described in objects:
        metadata = described.get("metadata", {})
        where = f"{described.get('kind')}/{metadata.get('name')}"
        rules = (_metadata, _words, _quantities, _secrets)
        found += [f"{where}: {fault}" for rule in rules for fault in rule(described)]
    for where, job, owner in _indexed_jobs(objects):
        told = chain(_gang(job), _restricted(job, rdma_resource), _patience(job), _image(job))
        found += [f"{where}: {fault}" for fault in chain(told, _meeting_point(job, owner, objects))]
    return found


def _metadata(described: Object) -> Iterator[str]:
    """Names, labels and annotations that the API server would refuse."""
    metadata = described.get("metadata", {})
    label_kinds = ("Service", *WORKLOADS)
    pattern = DNS_LABEL if described.get("kind") in label_kinds else DNS_NAME
    if not re.fullmatch(pattern, metadata.get("name", "")):
        yield f"metadata.name {metadata.get('name')!r} is no DNS name"
    if described.get("kind") == "Service" and metadata.get("name", "")[:1].isdigit():
        yield "metadata.name of a Service must begin with a letter"
    for path, node in _mappings(described):
        for name, value in (node.get("labels") or {}).items():
            if not re.fullmatch(LABEL, name) or not re.fullmatch(LABEL_VALUE, value):
                yield f"{path}labels: {name}={value!r} is no label"
        for name, value in (node.get("annotations") or {}).items():
            if not re.fullmatch(LABEL, name) or not isinstance(value, str):
                yield f"{path}annotations: {name!r} is no annotation"


def _words(described: Object) -> Iterator[str]:
    """Fields with few allowed values, which the schemas of core kinds leave open."""
    for path, node in _mappings(described):
        for field, allowed in ONE_OF.items():
            value = node.get(field)
            if isinstance(value, str) and value not in allowed:
                yield f"{path}{field} {value!r} is none of {sorted(allowed)}"


def _quantities(described: Object) -> Iterator[str]:
    for path, node in _mappings(described):
        for field in ("requests", "limits"):
            for name, value in (node.get(field) or {}).items():
                if not re.fullmatch(QUANTITY, str(value)):
                    yield f"{path}{field}.{name} {value!r} is no quantity"
        if "sizeLimit" in node and not re.fullmatch(QUANTITY, str(node["sizeLimit"])):
            yield f"{path}sizeLimit {node['sizeLimit']!r} is no quantity"


def _secrets(described: Object) -> Iterator[str]:
    """Secrets written out, and variables that would hold one written out."""
    for path in secrets_in(described):
        yield f"{path} holds a secret"
    for path, node in _mappings(described):
        for entry in node.get("env") or []:
            name = entry.get("name", "")
            if not re.fullmatch(ENVIRONMENT_NAME, name):
                yield f"{path}env: {name!r} is no name of a variable"
            if "value" in entry and names_secret(name):
                yield f"{path}env: {name} is written out; use secretKeyRef"


def _gang(job: Object) -> Iterator[str]:
    """As many pods as nodes, as many GPUs as ranks, all at once."""
    spec, container = job["spec"], _container(job)
    nodes, ranks = _argument(container, "--nnodes"), _argument(container, "--nproc-per-node")
    if nodes is None:
        return
    if not str(spec.get("completions")) == str(spec.get("parallelism")) == nodes:
        yield (
            f"completions {spec.get('completions')} and parallelism {spec.get('parallelism')} are "
            f"not the {nodes} nodes that are told to meet"
        )
    resources = container.get("resources", {})
    if resources.get("requests") != resources.get("limits"):
        yield "resources: requests are not limits"
    gpus = [amount for name, amount in resources.get("limits", {}).items() if OWN_GPU.match(name)]
    if gpus and gpus != [ranks]:
        yield f"resources: {gpus} GPUs for {ranks} ranks"


def _restricted(job: Object, rdma_resource: str | None) -> Iterator[str]:
    """The restricted Pod Security Standard, and a root file system that cannot be written to;
    RDMA alone adds a capability.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/
    """
    pod, container = job["spec"]["template"]["spec"], _container(job)
    of_pod, of_container = pod.get("securityContext", {}), container.get("securityContext", {})
    if of_pod.get("runAsNonRoot") is not True or not of_pod.get("runAsUser"):
        yield "securityContext: may run as root"
    if of_pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "securityContext: no seccompProfile RuntimeDefault"
    if of_container.get("allowPrivilegeEscalation") is not False or of_container.get("privileged"):
        yield "securityContext: privileges may grow"
    if of_container.get("readOnlyRootFilesystem") is not True:
        yield "securityContext: the root file system can be written to"
    capabilities = of_container.get("capabilities", {})
    limits = container.get("resources", {}).get("limits", {})
    allowed = {"IPC_LOCK"} if rdma_resource in limits else set()
    if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", [])) - allowed:
        yield f"securityContext: capabilities {capabilities} are too many"
    for field in HOST_FIELDS:
        if pod.get(field):
            yield f"{field}: the host's is used"
    for volume in pod.get("volumes", []):
        if set(volume) - {"name"} - SAFE_VOLUMES:
            yield f"volumes: {volume.get('name')} is of the host"
    if pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken: every process could talk to the API server"


def _patience(job: Object) -> Iterator[str]:
    """Pods that are told to stop are given the time that their wrapper counts on."""
    pod, container = job["spec"]["template"]["spec"], _container(job)
    if pod.get("restartPolicy") != "Never":
        yield "restartPolicy: a container that restarts alone never meets the others"
    told = _argument(container, "--grace-seconds")
    given = pod.get("terminationGracePeriodSeconds", 30)
    if told is not None and given < int(told) + GOODBYE_SECONDS:
        yield (
            f"terminationGracePeriodSeconds {given} is too short because the wrapper counts on "
            f"{told} s, and {GOODBYE_SECONDS} s to say goodbye"
        )
    mounted = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    memory = [
        volume for volume in pod.get("volumes", [])
        if volume["name"] == mounted.get("/dev/shm") and volume.get("emptyDir", {}).get("medium")
    ]  # fmt: skip
    if not memory or not memory[0]["emptyDir"].get("sizeLimit"):
        yield "/dev/shm: no memory of a stated size"
    if set(mounted.values()) - {volume["name"] for volume in pod.get("volumes", [])}:
        yield "volumeMounts: one has no volume"


def _image(job: Object) -> Iterator[str]:
    image = _container(job).get("image", "")
    if not re.fullmatch(IMAGE_BY_DIGEST, image):
        yield f"image {image!r} is not given by digest"


def _meeting_point(job: Object, owner: Object, objects: list[Object]) -> Iterator[str]:
    """The host that nodes are told to meet at is the name that pod 0 will have."""
    endpoint = _argument(_container(job), "--rdzv-endpoint")
    if endpoint is None:
        return
    name = owner["metadata"]["name"]
    is_bare = owner["kind"] == "Job"
    host = f"{name}-0.{name}" if is_bare else f"{name}-{owner['group']}-0-0.{name}"
    if endpoint.rpartition(":")[0] != host:
        yield f"--rdzv-endpoint {endpoint!r} is not {host!r}, the name of the first pod"
    suffix = "" if is_bare else POD_SUFFIX
    first = host.partition(".")[0]
    longest = len(f"{first[:-1]}{job['spec'].get('completions', 1) - 1}{suffix}")
    if longest > 63:
        yield f"pods would have names of {longest} letters, more than 63"
    if is_bare:
        services = [each for each in objects if each["kind"] == "Service"]
        selectors = [each["spec"].get("selector") for each in services]
        if {"batch.kubernetes.io/job-name": name} not in selectors:
            yield "no Service gives the pods their names"
        if job["spec"]["template"]["spec"].get("subdomain") != name:
            yield "subdomain: is not the name of the Service"


def _indexed_jobs(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """(where, Job, whose it is) of every Job that the objects will become."""
    runtimes = {each["metadata"]["name"]: each for each in objects if "Runtime" in each["kind"]}
    for described in objects:
        metadata, spec = described.get("metadata", {}), described.get("spec", {})
        where = f"{described['kind']}/{metadata.get('name')}"
        owner = {"kind": described["kind"], "metadata": metadata}
        if described["kind"] == "Job":
            yield where, described, owner
        elif described["kind"] == "JobSet":
            for group in spec["replicatedJobs"]:
                yield where, group["template"], owner | {"group": group["name"]}
        elif described["kind"] == "TrainJob":
            runtime = runtimes.get(spec["runtimeRef"]["name"])
            if runtime is None:
                continue
            for group in runtime["spec"]["template"]["spec"]["replicatedJobs"]:
                merged = _with_trainer(group["template"], spec["trainer"])
                yield where, merged, owner | {"group": group["name"]}


def _with_trainer(job: Object, trainer: Object) -> Object:
    """The Job of a runtime with what a TrainJob runs on it, as Kubeflow's controller makes it."""
    pod = job["spec"]["template"]
    container = pod["spec"]["containers"][0] | {
        "image": trainer.get("image", ""),
        "command": trainer.get("command", []),
        "args": trainer.get("args", []),
        "env": trainer.get("env", []),
        "resources": trainer.get("resourcesPerNode", {}),
    }
    count = trainer["numNodes"]
    template = pod | {"spec": pod["spec"] | {"containers": [container]}}
    spec = job["spec"] | {"template": template, "completions": count, "parallelism": count}
    return job | {"spec": spec}


def _container(job: Object) -> Object:
    return job["spec"]["template"]["spec"]["containers"][0]


def _argument(container: Object, name: str) -> str | None:
    """The value after an option of our own, before `--`."""
    arguments = container.get("args", [])
    own = arguments[: arguments.index("--")] if "--" in arguments else []
    return own[own.index(name) + 1] if name in own else None


def _mappings(node: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """Every mapping inside plain data, with its path."""
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from _mappings(value, f"{path}{key}.")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _mappings(value, f"{path}{index}.")
