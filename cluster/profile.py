"""What a site is: a SLURM or Kubernetes cluster with its nodes, disks, environment and secrets."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from cluster.containers import Apptainer, Mount, Pyxis, refuse_hiding, refuse_unmounted
from cluster.names import (
    DIRECTIVE_VALUE,
    DNS_LABEL,
    DNS_NAME,
    ENVIRONMENT_NAME,
    IMAGE_BY_DIGEST,
    Directive,
    Folder,
    Label,
    LabelValue,
    refuse_unprintable,
)
from cluster.secrets import holds_secret, is_secret
from data_pipeline.errors import ConfigError, InputMissing
from data_pipeline.strict import Strict
from t2v.recipe.reading import read_mapping

# sbatch options that a profile must not give, and why.
REFUSED_DIRECTIVES = {
    **dict.fromkeys(
        (
            *("account", "partition", "qos", "exclude", "exclusive", "nodes", "ntasks-per-node"),
            *("cpus-per-task", "gpus-per-node", "mem", "time", "array", "wrap"),
            *("chdir", "export", "job-name", "open-mode", "output", "requeue", "signal"),
        ),
        "is set by t2v launch",
    ),
    **dict.fromkeys(
        (
            *("ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket", "tres-per-task"),
            *("gpus", "gpus-per-socket", "gpus-per-task", "cpus-per-gpu", "mem-per-cpu"),
            *("mem-per-gpu", "overcommit", "oversubscribe"),
        ),
        "contradicts the nodes, tasks, CPUs, GPUs and memory that t2v launch asks for",
    ),
    **dict.fromkeys(("error", "parsable", "quiet"), "hides what t2v launch and its users read"),
    **dict.fromkeys(
        ("help", "hold", "no-requeue", "test-only", "usage", "version", "wait"),
        "keeps the job from being submitted, started or requeued",
    ),
    **dict.fromkeys(("no-kill",), "keeps a job that has lost a node from starting anew"),
    **dict.fromkeys(("gid", "uid"), "makes the job another user's"),
    **dict.fromkeys(
        ("export-file", "get-user-env"), "changes variables, which stand under `environment`"
    ),
    **dict.fromkeys(("container", "container-image"), "is what the field `container` is for"),
}
# What bash itself reads or keeps, and the names of the script's own variables.
SHELL_NAMES = {
    *("BASHOPTS", "EUID", "IFS", "POSIXLY_CORRECT", "PPID"),
    *("SHELLOPTS", "UID", "attempt", "bad", "container", "head", "launch", "pid"),
    *("port", "rc", "run_dir", "step", "T2V_BAD_NODES", "T2V_NODE_NAMES", "T2V_TASKS"),
}
SCHEDULER_NAMES = ("SBATCH_", "SLURM_", "SLURMD_", "SRUN_")


class Site(Strict):
    """What both kinds of clusters have."""

    nodes: int = Field(ge=1, le=4096, description="a job's nodes, unless told; never more")
    gpus_per_node: int = Field(ge=0, le=64, description="ranks of a node; 0: one rank on its CPUs")
    gpu_memory_gib: float = Field(
        default=0.0, ge=0, le=4096, description="of one GPU; 0 where none are"
    )
    # Upper bounds are far above any machine: they catch a value in another unit.
    cpus_per_node: int = Field(ge=1, le=4096)
    memory_gib: int = Field(ge=1, le=65536, description="main memory of a node that a job may use")
    workdir: Folder = Field(description="folder on the shared disk: relative paths begin there")
    storage_gib_per_second: float = Field(
        default=2.0,
        gt=0,
        le=65536,
        description="what all nodes together write to it; sizes the grace period",
    )
    restart_limit: int = Field(default=50, ge=0, le=1000)
    environment: dict[str, str] = Field(default={}, description="NCCL and fabric settings go here")
    s3_endpoint: str | None = Field(default=None, pattern=r"^https?://[A-Za-z0-9.:_\[\]/-]+$")

    @field_validator("environment")
    @classmethod
    def _refuse_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if not re.fullmatch(ENVIRONMENT_NAME, name):
                raise ValueError(f"{name!r} is no name of a variable; use letters, digits and _")
            refuse_unprintable(f"environment.{name}", value, allowed="\n\t")
            if is_secret(name, value):
                raise ValueError(
                    f"{name} looks like a secret, which would stand in the job for all to read; "
                    "name where it is kept under `secrets`"
                )
        return environment

    @model_validator(mode="after")
    def _refuse_gpus_without_memory(self) -> "Site":
        if self.gpus_per_node and not self.gpu_memory_gib:
            raise ValueError("gpu_memory_gib: missing although there are GPUs; add it")
        return self

    @model_validator(mode="after")
    def _refuse_variables_given_twice(self) -> "Site":
        given = [*self.variables, *(secret.variable for secret in getattr(self, "secrets", []))]
        if twice := sorted({name for name in given if given.count(name) > 1}):
            raise ValueError(f"secrets: {twice[0]} is given twice; leave one out")
        return self

    @property
    def ranks_per_node(self) -> int:
        """One per GPU; one where there are none."""
        return max(self.gpus_per_node, 1)

    @property
    def rank_memory_gib(self) -> float:
        """What one rank's state and activations must fit into."""
        return self.gpu_memory_gib if self.gpus_per_node else float(self.memory_gib)

    @property
    def variables(self) -> dict[str, str]:
        """The environment with the object store's address."""
        endpoint = {"AWS_ENDPOINT_URL_S3": self.s3_endpoint} if self.s3_endpoint else {}
        return {**self.environment, **endpoint}


class FileSecret(Strict):
    """A variable whose value is read on the node from a file that only its owner can read."""

    variable: str = Field(pattern=ENVIRONMENT_NAME)
    file: Folder


class SlurmProfile(Site):
    """A SLURM site."""

    kind: Literal["slurm"]
    partition: Directive | None = None
    account: Directive | None = None
    qos: Directive | None = None
    gpu_type: Directive | None = Field(default=None, description="as in --gpus-per-node=h100:8")
    exclusive: bool = Field(default=True, description="no other job on our nodes; all their memory")
    time_limit_minutes: int = Field(ge=5, le=366 * 24 * 60)
    exclude: list[Directive] = Field(default=[], description="nodes that are never used")
    directives: dict[str, str | Literal[True]] = Field(
        default={},
        description="other sbatch options by their long name, such as switches: 1@10:00; "
        "true for one without a value, such as contiguous",
    )
    container: Annotated[Apptainer | Pyxis, Field(discriminator="kind")] | None = None
    setup: list[str] = Field(
        default=[], description="shell lines run first, such as `module load cuda`"
    )
    secrets: list[FileSecret] = Field(default=[])

    @field_validator("directives")
    @classmethod
    def _refuse_contradictions(
        cls, directives: dict[str, str | Literal[True]]
    ) -> dict[str, str | Literal[True]]:
        for name, value in directives.items():
            if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
                raise ValueError(f"{name!r} is no long option of sbatch; see `man sbatch`")
            # sbatch takes the beginning of a name for the whole.
            refused = (known for known in REFUSED_DIRECTIVES if known.startswith(name))
            if meant := next(refused, None):
                raise ValueError(f"{name!r} {REFUSED_DIRECTIVES[meant]}; leave it out")
            if value is not True and not re.fullmatch(DIRECTIVE_VALUE, value):
                raise ValueError(
                    f"{name!r} has a value that sbatch would read otherwise; use letters, digits "
                    "and @+=:,./_[]*&|- only"
                )
            if name == "gres" and "gpu" in str(value):
                raise ValueError(
                    f"'gres' of {value!r} contradicts the GPUs that t2v launch asks for; give "
                    "gpus_per_node and gpu_type instead"
                )
        return directives

    @field_validator("setup")
    @classmethod
    def _refuse_strange_lines(cls, setup: list[str]) -> list[str]:
        for line in setup:
            refuse_unprintable("setup", line)
            if line.lstrip().startswith("#"):
                raise ValueError(f"{line!r} is a comment; leave it out")
            if holds_secret(line):
                raise ValueError("a line holds a secret; name where it is kept under `secrets`")
        return setup

    @model_validator(mode="after")
    def _refuse_variables_of_the_script(self) -> "SlurmProfile":
        given = [("environment", name) for name in self.environment]
        given += [("secrets", secret.variable) for secret in self.secrets]
        for field, name in given:
            if name in SHELL_NAMES or name.startswith(SCHEDULER_NAMES):
                raise ValueError(
                    f"{field}: {name!r} is wrong because SLURM, bash or the job's script uses it; "
                    "leave it out"
                )
        return self

    @model_validator(mode="after")
    def _refuse_a_workdir_outside_the_container(self) -> "SlurmProfile":
        if self.container:
            refuse_unmounted(self.workdir, self.container.mounted)
        return self


class KeySecret(Strict):
    """A variable whose value is a key of a Secret of the namespace."""

    variable: str = Field(pattern=ENVIRONMENT_NAME)
    secret: str = Field(pattern=DNS_NAME)
    key: str = Field(pattern=r"^[A-Za-z0-9._-]{1,253}$")


class Toleration(Strict):
    """A taint of the nodes that our pods may run on."""

    key: Label
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class KubernetesProfile(Site):
    """A Kubernetes cluster's namespace."""

    kind: Literal["kubernetes"]
    flavour: Literal["jobset", "trainjob", "job"] = Field(
        default="jobset", description="JobSet; Kubeflow TrainJob; Indexed Job with its Service"
    )
    namespace: str = Field(pattern=DNS_LABEL)
    image: str = Field(pattern=IMAGE_BY_DIGEST, description="by digest: registry/name@sha256:...")
    image_pull_secret: str | None = Field(default=None, pattern=DNS_NAME)
    service_account: str = Field(default="default", pattern=DNS_NAME)
    gpu_resource: Label = "nvidia.com/gpu"
    rdma_resource: Label | None = Field(default=None, description="such as rdma/ib; adds IPC_LOCK")
    cache_gib: int = Field(
        default=64, ge=2, le=65536, description="node disk for data from object stores"
    )
    mounts: list[Mount] = Field(min_length=1)
    secrets: list[KeySecret] = Field(default=[])
    queue: str | None = Field(default=None, pattern=DNS_LABEL, description="Kueue's LocalQueue")
    queue_priority: str | None = Field(default=None, pattern=DNS_LABEL, description="Kueue's class")
    priority_class: str | None = Field(default=None, pattern=DNS_NAME)
    topology: Label | None = Field(
        default=None, description="node label within one value of which Kueue places all pods"
    )
    node_selector: dict[Label, LabelValue] = Field(default={})
    tolerations: list[Toleration] = Field(default=[])
    user: int = Field(
        default=1000, ge=1, le=2**31 - 1, description="user and group of all processes"
    )

    @model_validator(mode="after")
    def _refuse_what_does_not_fit_together(self) -> "KubernetesProfile":
        if "/" not in self.gpu_resource:
            raise ValueError(
                f"gpu_resource: {self.gpu_resource!r} is wrong because names of devices have a "
                "domain, as nvidia.com/gpu has; correct it"
            )
        refuse_hiding(self.mounts)
        refuse_unmounted(self.workdir, {mount.path: mount.read_only for mount in self.mounts})
        if self.topology and not self.queue:
            raise ValueError("topology: is Kueue's to obey, but there is no queue; name one")
        return self


Profile = SlurmProfile | KubernetesProfile
_PROFILE = TypeAdapter(Annotated[Profile, Field(discriminator="kind")])


def load_profile(path: str | Path) -> Profile:
    """The profile of a cluster; errors say all that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise InputMissing(f"{path}: no such profile; `ls configs/cluster` shows those we ship.")
    return parse_profile(read_mapping(path), str(path))


def parse_profile(content: dict, origin: str) -> Profile:
    """A profile from plain data; `origin` begins each line of the error."""
    try:
        return _PROFILE.validate_python(content)
    except ValidationError as error:
        lines = [f"{origin}: {_explain(item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _explain(error) -> str:
    """One line for one pydantic error; a value is shown unless it may be a secret."""
    location = [str(part) for part in error["loc"]]
    if location[:1] in (["slurm"], ["kubernetes"]):
        del location[0]
    path = ".".join(location)
    match error["type"]:
        case "extra_forbidden":
            return f"{path}: unknown field; leave it out, or see docs/cluster.md for those known."
        case "missing":
            return f"{path}: missing; add it."
        case "union_tag_not_found" | "union_tag_invalid":
            known = error["ctx"].get("expected_tags") or "'slurm', 'kubernetes'"
            given = repr(error["ctx"]["tag"]) if "tag" in error["ctx"] else "missing, which"
            kind = f"{path}.kind" if path else "kind"
            return f"{kind}: {given} is wrong because it is none of {known}; correct it."
        case "value_error":
            message = error["msg"].removeprefix("Value error, ")
            return f"{path}: {message}." if path else f"{message}."
    value, reason = error.get("input"), error["msg"][:1].lower() + error["msg"][1:]
    shown = "value" if isinstance(value, str) and is_secret(path, value) else repr(value)
    return f"{path}: {shown} is wrong because {reason}; correct it."
