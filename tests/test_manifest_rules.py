"""Schemas and our own rules catch what is planted into the objects of a job."""

import copy
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kubeflow_trainer_api import models

from cluster.manifest_rules import faults
from cluster.render import render
from tests.test_profile import SECRETS
from tests.test_render_kubernetes import container_of, objects_of, round_trip, site, validate
from tests.test_render_slurm import job

PLACES = {
    "container": lambda objects: container_of(objects),
    "pod": lambda objects: objects[-1]["spec"]["template"]["spec"],
    "job": lambda objects: objects[-1]["spec"],
    "meta": lambda objects: objects[-1]["metadata"],
    "service": lambda objects: objects[-2],
    "config": lambda objects: objects[0]["data"],
}


def planted(flavour: str, place: str, path: str, value: Any) -> list[dict]:
    """Valid objects but for one value; `...` takes it away."""
    objects = copy.deepcopy(objects_of(flavour))
    node, (*parents, last) = PLACES[place](objects), path.split("/")
    for parent in parents:
        node = node[int(parent) if parent.isdecimal() else parent]
    if value is ...:
        del node[last]
    elif isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value
    return objects


# What each validator of a kind catches that is not valid to it.
@pytest.mark.parametrize(
    ("flavour", "place", "path", "value"),
    [
        ("job", "job", "backofLimit", 3),
        ("job", "job", "completions", "two"),
        ("job", "pod", "containers/0/imagePullPolice", "Always"),
        ("job", "service", "spec/clusterIp", "None"),
        ("jobset", "job", "failurePolicy/rules/0/action", "FailEverything"),
        ("jobset", "job", "failurePolicy/rules/0/name", ...),
        ("jobset", "job", "failurePolicy/restartStrategie", "Recreate"),
        ("jobset", "container", "securityContext/runAsRoot", True),
        ("jobset", "job", "replicatedJobs/0/replicas", "one"),
        ("trainjob", "job", "trainer/numNode", 2),
        ("trainjob", "job", "runtimeRef/name", ...),
        ("trainjob", "job", "trainer/numNodes", "two"),
    ],
)
def test_schemas_catch_planted_faults(flavour, place, path, value):
    objects = planted(flavour, place, path, value)
    with pytest.raises(
        (
            jsonschema.ValidationError,
            kubernetes_validate.ValidationError,
            AssertionError,
            ValueError,
        )
    ):
        validate(objects)


def test_a_typo_in_a_runtime_does_not_come_back():
    objects = objects_of("trainjob")
    objects[1]["spec"]["mlPolicie"] = {}
    with pytest.raises(AssertionError):
        round_trip(models.TrainerV1alpha1TrainingRuntime, objects[1])
    train_job = objects_of("trainjob")[2]
    train_job["spec"]["trainer"]["imagee"] = "x"
    with pytest.raises(AssertionError):
        round_trip(models.TrainerV1alpha1TrainJob, train_job)


@pytest.mark.parametrize(
    ("flavour", "place", "path", "value", "said"),
    [
        ("job", "meta", "name", "Bad_Name", "no DNS name"),
        ("job", "service", "metadata/name", "1name", "begin with a letter"),
        ("job", "meta", "labels/a b", "x", "no label"),
        ("job", "meta", "labels/a", "x y", "no label"),
        ("job", "meta", "annotations", {"a": 3}, "no annotation"),
        ("job", "container", "resources/limits/memory", "64 GB", "no quantity"),
        ("job", "pod", "volumes/3/emptyDir/sizeLimit", "2gigs", "no quantity"),
        ("job", "pod", "restartPolicy", "OnFailure", "none of ['Never']"),
        ("job", "job", "completionMode", "Indexd", "none of ['Indexed']"),
        ("job", "job", "podFailurePolicy/rules/0/action", "Fail", "action 'Fail'"),
        ("job", "job", "completions", 3, "not the 2 nodes"),
        ("job", "job", "parallelism", 1, "not the 2 nodes"),
        ("jobset", "container", "resources/requests/cpu", "1", "requests are not limits"),
        ("trainjob", "job", "trainer/numNodes", 3, "not the 2 nodes"),
        ("trainjob", "container", "resourcesPerNode/limits/nvidia.com~gpu", "1", "GPUs"),
        ("job", "container", "image", "registry.example/t2v:latest", "not given by digest"),
        ("trainjob", "container", "image", "t2v", "not given by digest"),
        ("job", "pod", "securityContext/runAsNonRoot", False, "may run as root"),
        ("job", "pod", "securityContext/runAsUser", 0, "may run as root"),
        ("job", "pod", "securityContext/seccompProfile", ..., "no seccompProfile"),
        ("jobset", "container", "securityContext/allowPrivilegeEscalation", ..., "may grow"),
        ("jobset", "container", "securityContext/privileged", True, "may grow"),
        ("jobset", "container", "securityContext/readOnlyRootFilesystem", False, "written to"),
        ("jobset", "container", "securityContext/capabilities/add", ["SYS_ADMIN"], "too many"),
        ("jobset", "container", "securityContext/capabilities/drop", ..., "too many"),
        ("job", "pod", "hostNetwork", True, "the host's is used"),
        ("job", "pod", "volumes/0", {"name": "config", "hostPath": {"path": "/"}}, "of the host"),
        ("job", "pod", "automountServiceAccountToken", ..., "API server"),
        ("job", "pod", "terminationGracePeriodSeconds", 120, "too short"),
        ("job", "pod", "terminationGracePeriodSeconds", ..., "too short"),
        ("job", "pod", "volumes/3", {"name": "shared-memory", "emptyDir": {}}, "/dev/shm"),
        ("job", "container", "volumeMounts/0/name", "other", "has no volume"),
        ("job", "container", "args/7", "elsewhere-0.tiny:29500", "name of the first pod"),
        ("jobset", "container", "args/7", "tiny-0.tiny:29500", "name of the first pod"),
        ("job", "service", "spec/selector", {"app": "x"}, "no Service"),
        ("job", "pod", "subdomain", "other", "name of the Service"),
        ("job", "config", "config.yaml", f"a: {SECRETS[0]}", "holds a secret"),
        ("jobset", "container", "env/0", {"name": "HF_TOKEN", "value": "x"}, "written out"),
        ("jobset", "container", "env/0", {"name": "A B", "value": "x"}, "no name of a variable"),
        ("jobset", "container", "workingDir", f"/x/{SECRETS[2]}", "holds a secret"),
    ],
)
def test_our_own_rules_catch_planted_faults(flavour, place, path, value, said):
    if "~" in path:  # a key with a slash in it
        objects = copy.deepcopy(objects_of(flavour))
        limits = container_of(objects)["resourcesPerNode"]
        for part in ("requests", "limits"):
            limits[part]["nvidia.com/gpu"] = value
    else:
        objects = planted(flavour, place, path, value)
    found = faults(objects)
    assert any(said in fault for fault in found), found
    assert not any(secret in fault for fault in found for secret in SECRETS)


@pytest.mark.parametrize("resource", ["rdma/ib", "nvidia.com/hostdev"])
def test_rdma_adds_one_capability_and_the_rules_know_it(resource):
    objects = objects_of("jobset", rdma_resource=resource)
    validate(objects, rdma_resource=resource)
    assert container_of(objects)["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert any("too many" in fault for fault in faults(objects))
    assert render(job(), site(rdma_resource=resource))
