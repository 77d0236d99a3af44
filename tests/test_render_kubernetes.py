"""Kubernetes objects: valid to every schema there is, and to the rules that no schema states."""

import copy
import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from cluster.checks import PREFLIGHT_SECONDS
from cluster.job import DataJob
from cluster.manifest_rules import faults
from cluster.pod import literal
from cluster.profile import KubernetesProfile, parse_profile
from cluster.render import render
from cluster.render_kubernetes import data_objects, object_name, to_yaml, training_objects
from data_pipeline.errors import ConfigError
from tests.test_profile import KUBERNETES, SECRETS
from tests.test_render_slurm import NASTY, job

FLAVOURS = ("jobset", "trainjob", "job")
CRDS = Path(__file__).parent / "crds"
CORE_KINDS = ("ConfigMap", "Service", "Job")
KUBERNETES_VERSION = "1.37"
EVERYTHING = {
    "queue": "team-a",
    "queue_priority": "research",
    "priority_class": "high",
    "topology": "example.org/rack",
    "node_selector": {"example.org/gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}, {"key": "a", "value": "b"}],
    "image_pull_secret": "registry",
    "s3_endpoint": "https://s3.example:9000",
    "environment": {"NCCL_DEBUG": "WARN"},
    "resources": {"hugepages-2Mi": "5Gi", "vpc.amazonaws.com/efa": 32},
    "labels": {"team": "video"},
    "annotations": {"example.org/note": "any text: at all"},
    "fs_group": False,
    "gpu_model": "H100",
    "interface": "eth0",
    "on_end": "/shared/tell '$(X)'",
    "secrets": [{"variable": "WANDB_API_KEY", "secret": "wandb", "key": "api-key"}],
}


def site(**changes) -> KubernetesProfile:
    profile = parse_profile({**KUBERNETES, **changes}, "site")
    assert isinstance(profile, KubernetesProfile)
    return profile


def objects_of(flavour: str, **changes) -> list[dict]:
    """The objects of a run, with every setting of a profile in use."""
    return training_objects(job(), site(flavour=flavour, **EVERYTHING, **changes))


def data_job() -> DataJob:
    return DataJob("data-embed", ("embed", "data/videos", "--name", "t5"), 8, 4, 2, 16, 1, {})


def strict(schema: Any) -> Any:
    """A schema that also refuses unknown fields, as the API server would warn of them."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    closed = "additionalProperties" in made or "x-kubernetes-preserve-unknown-fields" in made
    if "properties" in made and isinstance(made["properties"], dict) and not closed:
        made["additionalProperties"] = False
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    return made


@functools.cache
def crd(name: str, part: str | None = None) -> jsonschema.Draft202012Validator:
    """A validator of a custom resource, or of one part of it."""
    schema = json.loads((CRDS / f"{name}.json").read_text())
    # The custom resource's own head is the API server's to know.
    schema["properties"]["metadata"] = {"type": "object", "additionalProperties": True}
    schema = strict(schema)
    return jsonschema.Draft202012Validator(schema["properties"][part] if part else schema)


def round_trip(model: Any, described: dict) -> None:
    """Fields that the client library does not know do not come back."""
    assert model.from_dict(copy.deepcopy(described)).to_dict() == described


def validate(objects: list[dict], *, rdma_resource: str | None = None) -> None:
    """Ask every validator there is."""
    for described in objects:
        kind = described["kind"]
        if kind in CORE_KINDS:
            kubernetes_validate.validate(described, KUBERNETES_VERSION, strict=True)
        elif kind == "JobSet":
            crd("jobset").validate(described)
            round_trip(models.JobsetV1alpha2JobSet, described)
        elif kind == "TrainJob":
            crd("trainjob").validate(described)
            round_trip(models.TrainerV1alpha1TrainJob, described)
        elif kind == "TrainingRuntime":
            round_trip(models.TrainerV1alpha1TrainingRuntime, described)
            spec = described["spec"]["template"]["spec"]
            crd("jobset", "spec").validate(spec)
        else:
            raise AssertionError(f"nothing validates {kind}")
    assert faults(objects, rdma_resource=rdma_resource) == []


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_is_valid(flavour):
    validate(objects_of(flavour))
    validate(training_objects(job(), site(flavour=flavour)))
    cpus = {"gpus_per_node": 0, "gpu_memory_gib": 0.0}
    validate(training_objects(replace(job(), ranks_per_node=1), site(flavour=flavour, **cpus)))


def test_data_jobs_are_valid():
    validate(data_objects(data_job(), site(**EVERYTHING)))
    validate(data_objects(replace(data_job(), gpus=0), site()))


def variables(objects: list[dict]) -> dict[str, str]:
    return {entry["name"]: entry.get("value") for entry in container_of(objects)["env"]}


def test_a_data_task_takes_its_share_of_a_node_and_secrets_that_it_uses():
    secrets = [{"variable": name, "secret": "keys", "key": name.lower()}
               for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")]  # fmt: skip
    profile = site(**{**EVERYTHING, "secrets": secrets}, cache_gib=512, rdma_resource="rdma/ib")
    build = replace(data_job(), arguments=("build", "media", "data/videos"), gpus=0)
    objects = data_objects(build, profile)
    validate(objects, rdma_resource="rdma/ib")
    limits = container_of(objects)["resources"]["limits"]
    assert limits["ephemeral-storage"] == f"{512 * 2 // 16 + 16 + 4}Gi"
    told = variables(objects)
    assert told["T2V_CACHE_GIB"] == "63"
    assert "HF_HOME" not in told
    assert {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} <= told.keys()
    assert "WANDB_API_KEY" not in told
    assert "topology" not in to_yaml(objects)


@pytest.mark.parametrize(("node", "hub", "quota"), [(512, 96, 51), (64, 62, 1)])
def test_an_encoder_is_downloaded_where_there_is_room_for_it(node, hub, quota):
    objects = data_objects(data_job(), site(cache_gib=node))
    told = variables(objects)
    assert told["HF_HOME"].startswith(f"{told['T2V_CACHE']}/")
    assert told["T2V_CACHE_GIB"] == str(quota)
    volumes = objects[-1]["spec"]["template"]["spec"]["volumes"]
    (cache,) = [each["emptyDir"] for each in volumes if each["name"] == "cache"]
    assert cache["sizeLimit"] == f"{hub + quota + 1}Gi"
    assert hub + quota + 1 <= node
    limits = container_of(objects)["resources"]["limits"]
    assert limits["ephemeral-storage"] == f"{hub + quota + 1 + 16 + 4}Gi"


def test_an_encoder_stays_in_tmp_where_the_cache_is_smaller():
    assert "HF_HOME" not in variables(data_objects(data_job(), site(cache_gib=16)))


@pytest.mark.parametrize("setup_seconds", [1800.0, 3 * 3600.0])
def test_a_slow_setup_is_for_the_watchdog_to_end(setup_seconds):
    container = container_of(training_objects(job(setup_seconds=setup_seconds), site()))
    arguments, probe = container["args"], container["startupProbe"]
    rendezvous = int(arguments[arguments.index("--rendezvous-timeout-seconds") + 1])
    patience = probe["failureThreshold"] * probe["periodSeconds"]
    assert patience > 2 * rendezvous + setup_seconds + PREFLIGHT_SECONDS
    assert patience < 2 * rendezvous + setup_seconds + PREFLIGHT_SECONDS + 600


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_yaml_reads_back_as_the_same_objects(flavour):
    objects = objects_of(flavour)
    assert list(yaml.safe_load_all(to_yaml(objects))) == objects


def container_of(objects: list[dict]) -> dict:
    """What the pods of the last object run, wherever it is written."""
    last = objects[-1]
    if last["kind"] == "TrainJob":
        return last["spec"]["trainer"]
    spec = last["spec"]
    if last["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    return spec["template"]["spec"]["containers"][0]


def handed_on(text: str, environment: dict[str, str]) -> str:
    """What a container is given for a text, by Kubernetes' rules for `$(NAME)` and `$$`.

    https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/ (command)
    """

    def replaced(match: re.Match) -> str:
        if match[0] == "$$":
            return "$"
        return environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, text)


@pytest.mark.parametrize("text", [*NASTY, "$(HOME)", "$$(HOME)", "$$$", "$HOME"])
def test_arguments_and_values_reach_the_program_as_they_were_given(text):
    assert handed_on(literal(text), {"HOME": "/tmp"}) == text
    data = replace(data_job(), arguments=("build", text))
    objects = data_objects(data, site(environment={"NASTY": text}))
    read = list(yaml.safe_load_all(to_yaml(objects)))
    container = container_of(read)
    assert handed_on(container["args"][1], {"HOME": "/tmp"}) == text
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert handed_on(values["NASTY"], {"HOME": "/tmp"}) == text
    plain = data_objects(replace(data, arguments=("build", "x")), site(environment={"NASTY": "x"}))
    assert len(read) == len(plain)
    assert read[-1]["spec"].keys() == plain[-1]["spec"].keys()


@pytest.mark.parametrize("text", ["x\0y", "x\x1b[31my", "x\ud800y"])
def test_what_no_job_can_hold_is_refused(text):
    with pytest.raises(ConfigError, match="no job can hold") as caught:
        data_objects(replace(data_job(), arguments=("build", text)), site())
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("name", "label"),
    [("base_36x64", "base-36x64"), ("UCF101.S", "ucf101-s"), ("36x64_", "t2v-36x64")],
)
def test_names_of_runs_become_dns_labels(name, label):
    assert object_name(name, room=10) == label


def test_names_too_long_for_their_pods_are_refused():
    long = replace(job(), name="x" * 60)
    for flavour in FLAVOURS:
        with pytest.raises(ConfigError, match="too long") as caught:
            training_objects(long, site(flavour=flavour))
        assert caught.value.exit_code == 78


@pytest.mark.parametrize("flavour", ["jobset", "trainjob"])
def test_names_leave_room_for_the_suffix_that_jobset_counts(flavour):
    """`-node-0-1-abcde` has 15 letters; JobSet's webhook refuses pods' names of more than 63."""
    longest = training_objects(replace(job(), name="x" * 48), site(flavour=flavour))
    validate(longest)
    with pytest.raises(ConfigError, match="64 letters, more than 63"):
        training_objects(replace(job(), name="x" * 49), site(flavour=flavour))
    text = to_yaml(longest).replace("x" * 48, "x" * 49)
    assert any("names of 64 letters" in fault for fault in faults(list(yaml.safe_load_all(text))))
    training_objects(replace(job(), name="x" * 49), site(flavour="job"))


def test_another_runtime_has_another_name():
    """What is applied before a TrainJob is refused must not change that of a live one."""
    one, same, other = (
        training_objects(job(), site(flavour="trainjob", **changes))[1]
        for changes in ({}, {}, {"restart_limit": 3})
    )
    assert one == same
    assert one["metadata"]["name"] != other["metadata"]["name"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_no_secret_is_written(flavour):
    text = to_yaml(objects_of(flavour))
    assert "secretKeyRef" in text
    for secret in SECRETS:
        with pytest.raises(ConfigError, match="secret") as caught:
            render(replace(job(), recipe=f"name: tiny\n# {secret} #\n"), site(flavour=flavour))
        assert secret not in str(caught.value)


def test_exit_codes_mean_the_same_everywhere():
    """75 and lost nodes restart for free; what would fail again ends the job."""
    jobset = objects_of("jobset")[-1]["spec"]
    pods = jobset["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    rules = jobset["failurePolicy"]["rules"]
    for code in range(1, 256):
        matched = [n for n, rule in enumerate(pods)
                   if code in rule.get("onExitCodes", {}).get("values", [])]  # fmt: skip
        action = "RestartJobSet"  # JobSet's own, counted
        if matched:
            # https://kubernetes.io/docs/tasks/job/pod-failure-policy/
            message = (
                f"Container node for pod team/tiny-node-0-1-x2x failed with exit code {code} "
                f"matching FailJob rule at index {matched[0]}"
            )
            action = next(
                rule["action"]
                for rule in rules
                if all(re.search(p, message) for p in rule.get("onJobFailureMessagePatterns", []))
            )
        wanted = "RestartJobSet"
        if code in (2, 65, 66, 69, 70, 73, 78):
            wanted = "FailJobSet"
        elif code == 75:
            wanted = "RestartJobSetAndIgnoreMaxRestarts"
        assert action == wanted, code
    bare = objects_of("job")[-1]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in bare] == ["FailJob", "Ignore", "Ignore"]
    assert bare[0]["onExitCodes"]["values"] == [2, 65, 66, 69, 70, 73, 78]
    assert bare[1]["onExitCodes"]["values"] == [75]


def test_without_a_queue_nothing_waits_suspended():
    for flavour in FLAVOURS:
        assert "suspend" not in training_objects(job(), site(flavour=flavour))[-1]["spec"]
        assert objects_of(flavour)[-1]["spec"]["suspend"] is True


def test_devices_pages_labels_and_bad_nodes_stand_where_kubernetes_looks():
    objects = training_objects(
        replace(job(), bad_nodes=("n7", "n9")),
        site(
            rdma_resource="vpc.amazonaws.com/efa",
            resources={"vpc.amazonaws.com/efa": 32, "hugepages-2Mi": "5Gi"},
            labels={"team": "video"},
            annotations={"example.org/cost": "17"},
            fs_group=False,
            tolerations=[{"key": "spot", "effect": "NoExecute", "seconds": 30}],
        ),
    )
    validate(objects, rdma_resource="vpc.amazonaws.com/efa")
    container = container_of(objects)
    for amounts in container["resources"].values():
        assert (amounts["vpc.amazonaws.com/efa"], amounts["hugepages-2Mi"]) == ("32", "5Gi")
    template = objects[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "video"
    assert template["metadata"]["annotations"]["example.org/cost"] == "17"
    assert "fsGroup" not in template["spec"]["securityContext"]
    assert template["spec"]["tolerations"][0]["tolerationSeconds"] == 30
    terms = template["spec"]["affinity"]["nodeAffinity"]
    (term,) = terms["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    (away,) = term["matchExpressions"]
    assert (away["operator"], away["values"]) == ("NotIn", ["n7", "n9"])
    words = container["args"]
    assert words[words.index("--preflight") : words.index("--")] == [
        *("--preflight", "--gpus", "2", "--gpu-memory-gib", "79.6"),
    ]
