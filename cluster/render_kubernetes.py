"""Kubernetes objects: a JobSet, a Kubeflow TrainJob or an Indexed Job from one typed job.

A gang is only ever restarted whole. What an exit code of `t2v node` means stands here in the
policies: a saved preemption and a lost node are free, what would fail again ends the job.
"""

import json
import re

import yaml

from cluster.checks import MEETING_SECONDS
from cluster.job import DataJob, TrainingJob, digest_of, record_text, run_folder
from cluster.manifest_rules import POD_SUFFIX
from cluster.pod import (
    CONFIG_FOLDER,
    CONTAINER,
    TMP_GIB,
    Object,
    container_of,
    environment_of,
    literal,
    pod_template,
    probes,
    resources_of,
)
from cluster.profile import KubernetesProfile
from cluster.requeue import HOPELESS, PREEMPTED
from data_pipeline.errors import ConfigError


class _Readable(yaml.SafeDumper):
    """Plain data only; text of several lines stands as it is."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = "|" if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Readable.add_representer(str, _Readable.represent_str)

GROUP = "node"  # of equal pods: the only replicated job
PORT = 29500
RESTART = "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
USAGE, BAD_NODE = 2, 69
# Pods cannot be told to avoid a node; the job that is launched again is.
FATAL_CODES = sorted(HOPELESS | {USAGE, BAD_NODE})
DATA_FATAL_CODES = [USAGE, 65, 66, 78]
# An encoder of 11 B parameters in fp32 is 42 GiB, in both formats of weights twice that; downloads
# keep up to 10 GB of chunks beside it.
HUB_GIB = 96
LEAST_CACHE_GIB = 2
DATA_SECRETS = ("AWS_", "HF_", "HUGGING_FACE_")


def training_objects(job: TrainingJob, profile: KubernetesProfile) -> list[Object]:
    """What is created for a run, in order; the last one is the workload."""
    suffix = "" if profile.flavour == "job" else POD_SUFFIX
    name = object_name(job.name, room=len(f"-{GROUP}-0-{job.nodes - 1}{suffix}"))
    recipe = _config_map(name, job, profile)
    is_bare = profile.flavour == "job"
    host = f"{name}-0.{name}" if is_bare else f"{name}-{GROUP}-0-0.{name}"
    restart = None if is_bare else RESTART
    pod = _training_pod(job, profile, name, recipe, host=host, restart=restart)
    match profile.flavour:
        case "jobset":
            jobset = _workload("jobset.x-k8s.io/v1alpha2", "JobSet", name, profile)
            jobset["spec"] = _suspended(profile) | _gang(_gang_job(pod, job.nodes), profile)
            return [recipe, jobset]
        case "trainjob":
            return [recipe, *_train_job(name, job, profile, pod)]
        case "job":
            return [recipe, _service(name, profile), _indexed_job(name, job, profile, pod)]


def data_objects(job: DataJob, profile: KubernetesProfile) -> list[Object]:
    """An Indexed Job whose pods are the tasks of a data job; none waits for another."""
    name = object_name(job.name, room=len(f"-{job.tasks - 1}"))
    record = _config_map(name, job, profile)
    hub_gib = _hub_gib(profile) if job.downloads else 0
    profile = _of_one_task(job, profile, hub_gib=hub_gib)
    task = ["--task", f"$(JOB_COMPLETION_INDEX)/{job.tasks}"] if job.is_split else []
    container = container_of(
        profile,
        command=list(job.program),
        arguments=[*(literal(argument) for argument in job.arguments), *task],
        resources=resources_of(profile, job.cpus, job.memory_gib, job.gpus),
        environment=environment_of(profile, hub_gib=hub_gib),
    )
    pod = pod_template(profile, name, container, record, shared_memory_gib=1, grace_seconds=60)
    indexed = _workload("batch/v1", "Job", name, profile)
    indexed["spec"] = _suspended(profile) | _indexed(
        pod,
        job.tasks,
        job.at_once,
        [_on_codes("FailJob", DATA_FATAL_CODES), _on_disruption("Ignore")],
        backoffLimitPerIndex=3,
        podReplacementPolicy="Failed",
    )
    return [record, indexed]


def _hub_gib(profile: KubernetesProfile) -> int:
    """What of a cache may hold encoders; none where a pod's /tmp has more room for them."""
    there = min(HUB_GIB, profile.cache_gib - LEAST_CACHE_GIB)
    return there if there > TMP_GIB else 0


def _of_one_task(job: DataJob, profile: KubernetesProfile, *, hub_gib: int) -> KubernetesProfile:
    """The profile as a data task needs it: its CPUs' share of the cache beside `hub_gib`, secrets
    of stores alone, and nothing that brings tasks together, for none waits for another."""
    share = (profile.cache_gib - hub_gib) * job.cpus // profile.cpus_per_node
    return profile.model_copy(
        update={
            "cache_gib": max(share, LEAST_CACHE_GIB) + hub_gib,
            "secrets": [s for s in profile.secrets if s.variable.startswith(DATA_SECRETS)],
            "topology": None,
            "rdma_resource": None,
        }
    )


def to_yaml(objects: list[Object]) -> str:
    """The objects as the documents of one file."""
    return yaml.dump_all(objects, Dumper=_Readable, sort_keys=False, width=100)


def object_name(name: str, *, room: int) -> str:
    """The name of a run as a DNS label that leaves room for what Kubernetes appends."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"t2v-{label}"  # a Service begins with a letter
    if len(label) + room > 63:
        raise ConfigError(
            f"name: {name!r} is too long because pods called '{label}' with their number would "
            f"have {len(label) + room} letters, more than 63; choose a shorter one."
        )
    return label


def _gang(indexed: Object, profile: KubernetesProfile) -> Object:
    """The spec of a JobSet of one group of pods that is restarted whole."""
    codes = "|".join(map(str, FATAL_CODES))
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": profile.restart_limit,
            "restartStrategy": "BlockingRecreate",
            "rules": [
                {
                    "name": "fatal",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                    "onJobFailureMessagePatterns": [f".*exit code ({codes}) .*"],
                },
                {
                    "name": "preempted",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                },
            ],
        },
        "replicatedJobs": [{"name": GROUP, "replicas": 1, "template": indexed}],
    }


def _indexed(
    pod: Object, completions: int, parallelism: int, on_failures: list[Object], **more: int | str
) -> Object:
    """The spec of a Job whose pods are numbered."""
    return {
        "completionMode": "Indexed",
        "completions": completions,
        "parallelism": parallelism,
        **more,
        "podFailurePolicy": {"rules": on_failures},
        "template": pod,
    }


def _gang_job(pod: Object, nodes: int) -> Object:
    """The Job template of a gang: the first failed pod fails it, for the JobSet to restart."""
    codes = [_on_codes("FailJob", FATAL_CODES), _on_codes("FailJob", [PREEMPTED])]
    rules = [*codes, _on_disruption("FailJob")]
    return {"spec": _indexed(pod, nodes, nodes, rules, backoffLimit=0)}


def _train_job(
    name: str, job: TrainingJob, profile: KubernetesProfile, pod: Object
) -> list[Object]:
    """A runtime that says how pods run here, and the TrainJob that says what they run."""
    container = pod["spec"]["containers"][0]
    what = {key: container.pop(key) for key in ("image", "command", "args", "env")}
    resources = container.pop("resources")
    indexed = _gang_job(pod, job.nodes)
    indexed["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    spec = {
        "mlPolicy": {"numNodes": job.nodes, "torch": {}},
        "template": {"spec": _gang(indexed, profile)},
    }
    # Named by what it says: a job that is refused must not have changed the runtime of a live one.
    named = f"{name}-{digest_of(json.dumps(spec))}"
    runtime = _object("trainer.kubeflow.org/v1alpha1", "TrainingRuntime", named, profile)
    runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] = "torch"
    runtime["metadata"]["labels"]["app.kubernetes.io/instance"] = name
    runtime["spec"] = spec
    train_job = _workload("trainer.kubeflow.org/v1alpha1", "TrainJob", name, profile)
    train_job["spec"] = _suspended(profile) | {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "TrainingRuntime",
            "name": named,
        },
        "trainer": {
            "numNodes": job.nodes,
            "numProcPerNode": job.ranks_per_node,
            **what,
            "resourcesPerNode": resources,
        },
    }
    return [runtime, train_job]


def _indexed_job(name: str, job: TrainingJob, profile: KubernetesProfile, pod: Object) -> Object:
    """A bare Job: when one pod fails the others follow, and all are made anew and meet again."""
    indexed = _workload("batch/v1", "Job", name, profile)
    codes = [_on_codes("FailJob", FATAL_CODES), _on_codes("Ignore", [PREEMPTED])]
    indexed["spec"] = _suspended(profile) | _indexed(
        pod,
        job.nodes,
        job.nodes,
        [*codes, _on_disruption("Ignore")],
        backoffLimit=job.nodes * profile.restart_limit,
        podReplacementPolicy="Failed",
    )
    return indexed


def _service(name: str, profile: KubernetesProfile) -> Object:
    """Gives the pods of a bare Job their names, also before they are ready."""
    service = _object("v1", "Service", name, profile)
    service["spec"] = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": name},
    }
    return service


def _training_pod(
    job: TrainingJob,
    profile: KubernetesProfile,
    name: str,
    recipe: Object,
    *,
    host: str,
    restart: str | None,
) -> Object:
    folder = run_folder(job.run_dir, profile)
    identity = [{"name": "T2V_RESTART", "valueFrom": {"fieldRef": {"fieldPath": restart}}}]
    container = container_of(
        profile,
        command=["t2v", "node"],
        arguments=[
            *("--nnodes", str(job.nodes)),
            *("--nproc-per-node", str(job.ranks_per_node)),
            *("--node-rank", "$(JOB_COMPLETION_INDEX)"),
            *("--rdzv-endpoint", f"{host}:{PORT}"),
            # A bare Job's pods that are made anew have no other sign of their attempt.
            *("--rdzv-id", f"{name}-{'$(T2V_RESTART)' if restart else job.snapshot}"),
            *("--rendezvous-timeout-seconds", str(MEETING_SECONDS)),
            *("--run-dir", literal(str(folder))),
            *("--grace-seconds", str(job.grace.seconds)),
            *(["--on-end", literal(profile.on_end)] if profile.on_end else []),
            *("--preflight", *profile.promise.words),
            *("--", f"{CONFIG_FOLDER}/config.yaml"),
        ],
        resources=resources_of(
            profile, profile.cpus_per_node, profile.memory_gib, profile.gpus_per_node
        ),
        environment=[
            *(identity if restart else []),
            {"name": "T2V_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            *environment_of(profile, T2V_BAD_NODES=f"{folder}/bad_nodes"),
        ],
    )
    pod = pod_template(
        profile,
        name,
        container | probes(job.setup_seconds),
        recipe,
        shared_memory_gib=job.shared_memory.gib,
        grace_seconds=job.grace.notice_seconds,
    )
    pod["metadata"]["annotations"] |= {
        "t2v/grace": job.grace.reason,
        "t2v/dev-shm": job.shared_memory.reason,
    }
    if job.bad_nodes:
        pod["spec"]["affinity"] = {"nodeAffinity": _away_from(job.bad_nodes)}
    if restart is None:
        pod["spec"]["subdomain"] = name
    return pod


def _away_from(nodes: tuple[str, ...]) -> Object:
    """Where pods must not be placed: nodes that were found bad."""
    away = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(nodes)}
    terms = [{"matchExpressions": [away]}]
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}


def _config_map(name: str, job: TrainingJob | DataJob, profile: KubernetesProfile) -> Object:
    """The recipe, if it is a run, and where the job came from."""
    files = {"config.yaml": job.recipe} if isinstance(job, TrainingJob) else {}
    config = _object("v1", "ConfigMap", f"{name}-{job.snapshot}", profile)
    config["metadata"]["labels"]["app.kubernetes.io/instance"] = name
    return config | {"immutable": True, "data": {**files, "launch.json": record_text(job.record)}}


def _object(api: str, kind: str, name: str, profile: KubernetesProfile) -> Object:
    labels = {"app.kubernetes.io/name": "t2v", "app.kubernetes.io/instance": name}
    return {
        "apiVersion": api,
        "kind": kind,
        "metadata": {"name": name, "namespace": profile.namespace, "labels": labels},
    }


def _workload(api: str, kind: str, name: str, profile: KubernetesProfile) -> Object:
    """An object that Kueue queues."""
    workload = _object(api, kind, name, profile)
    if profile.queue:
        workload["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = profile.queue
    if profile.queue_priority:
        label = "kueue.x-k8s.io/priority-class"
        workload["metadata"]["labels"][label] = profile.queue_priority
    return workload


def _suspended(profile: KubernetesProfile) -> Object:
    """Kueue starts what is created suspended; without a queue nobody would."""
    return {"suspend": True} if profile.queue else {}


def _on_codes(action: str, codes: list[int]) -> Object:
    return {
        "action": action,
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes},
    }


def _on_disruption(action: str) -> Object:
    return {
        "action": action,
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
