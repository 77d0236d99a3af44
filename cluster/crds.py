"""Whether a cluster knows all that a job says: what its custom resources do not know, the API
server drops without a word, and with it what decides about preemption.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from cluster.profile import KubernetesProfile
from data_pipeline.errors import ConfigError

Object = dict[str, Any]

# The definition of each kind, and the oldest version that is known to have all fields.
DEFINITIONS = {
    "JobSet": ("jobsets.jobset.x-k8s.io", "JobSet 0.10"),
    "TrainJob": ("trainjobs.trainer.kubeflow.org", "Kubeflow Trainer 2.1"),
    "TrainingRuntime": ("trainingruntimes.trainer.kubeflow.org", "Kubeflow Trainer 2.1"),
}
QUEUES, TOPOLOGIES = "localqueues.kueue.x-k8s.io", "topologies.kueue.x-k8s.io"
# Of TrainJobs, the first Kueue that places them by topology and counts them as a whole.
OLDEST_KUEUE = {"trainjob": "Kueue 0.14"}


def refuse_old(
    objects: list[Object], profile: KubernetesProfile, call: Callable[[list[str]], str]
) -> None:
    """ConfigError for what the cluster has not, or would drop; what it may not be asked about is
    passed over. `call` runs kubectl."""
    for described in objects:
        if described["kind"] in DEFINITIONS:
            name, oldest = DEFINITIONS[described["kind"]]
            found = _definition(name, oldest, call)
            version = described["apiVersion"].rpartition("/")[2]
            schema = _schema(found, version) if found else None
            lost = list(dropped(described, schema)) if schema else []
            if lost:
                raise ConfigError(
                    f"flavour: {profile.flavour!r} is wrong because this cluster's "
                    f"{described['kind']} does not know {', '.join(lost)} and would drop it; "
                    f"install {oldest} or newer, or use another flavour."
                )
    oldest = OLDEST_KUEUE.get(profile.flavour, "Kueue 0.10")
    if profile.queue:
        _definition(QUEUES, oldest, call)
    if profile.topology:
        _definition(TOPOLOGIES, oldest, call)


def dropped(node: Any, schema: Object, path: str = "") -> Iterator[str]:
    """The fields of plain data that a structural schema does not know."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from dropped(item, schema.get("items", {}), f"{path}[{number}]")
    if not isinstance(node, dict):
        return
    known, others = schema.get("properties"), schema.get("additionalProperties")
    for name, value in node.items():
        where = f"{path}.{name}" if path else name
        if not path and name in ("apiVersion", "kind", "metadata"):
            continue
        if known and name in known:
            yield from dropped(value, known[name], where)
        elif isinstance(others, dict):
            yield from dropped(value, others, where)
        elif not others and schema.get("type") == "object" and known is not None:
            yield where


def _definition(name: str, oldest: str, call: Callable[[list[str]], str]) -> Object | None:
    try:
        return json.loads(call(["kubectl", "get", "crd", name, "-o", "json"]))
    except ConfigError as refusal:
        if "NotFound" in str(refusal):
            raise ConfigError(
                f"{name}: this cluster has no such resource; install {oldest} or newer, or change "
                "the profile."
            ) from None
        return None  # who submits need not have a right to look
    except ValueError:
        return None


def _schema(definition: Object, version: str) -> Object | None:
    versions = definition.get("spec", {}).get("versions", [])
    found = next((each for each in versions if each.get("name") == version), {})
    return found.get("schema", {}).get("openAPIV3Schema")
