"""What both kinds of clusters have: nodes, GPUs, disks and an environment."""

import re
import shlex

from pydantic import Field, field_validator, model_validator

from cluster.driver import Promise
from cluster.names import ENVIRONMENT_NAME, Folder, refuse_unprintable
from cluster.secrets import is_secret
from data_pipeline.strict import Strict


class Site(Strict):
    """What both kinds of clusters have."""

    nodes: int = Field(ge=1, le=4096, description="a job's nodes, unless told; never more")
    gpus_per_node: int = Field(ge=0, le=64, description="ranks of a node; 0: one rank on its CPUs")
    gpu_memory_gib: float = Field(
        default=0.0, ge=0, le=4096, description="of one GPU; 0 where none are"
    )
    gpu_model: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9 ._-]+$",
        description="part of the name that the "
        "driver shows, such as H100: a node with another is bad",
    )
    gpu_driver: str | None = Field(
        default=None, pattern=r"^\d+(\.\d+)*$", description="the oldest driver, such as '550'"
    )
    interface: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.-]{1,15}$",
        description="of the network by which nodes meet, such as eth0; by default the one that "
        "leads to the first node. For NCCL and gloo, unless `environment` names theirs",
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
    eviction_notice_seconds: int | None = Field(
        default=None,
        ge=0,
        le=86400,
        description="what the site gives a job it takes nodes from, such as 30 of spot nodes; by "
        "default as long as a step and a save take",
    )
    on_end: str | None = Field(
        default=None,
        description="a program with arguments that the first node runs when an attempt has ended; "
        "T2V_RUN_DIR, T2V_STATE, T2V_EXIT_CODE, T2V_REASON and T2V_DECISION tell of it",
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

    @field_validator("on_end")
    @classmethod
    def _refuse_no_program(cls, command: str | None) -> str | None:
        refuse_unprintable("on_end", command or "")
        if command is not None and not shlex.split(command):
            raise ValueError("no program is named; leave it out")
        return command

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
        """The environment with the object store's address and the interface of the fabric."""
        endpoint = {"AWS_ENDPOINT_URL_S3": self.s3_endpoint} if self.s3_endpoint else {}
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        interface = dict.fromkeys(names, self.interface) if self.interface else {}
        return {**interface, **self.environment, **endpoint}

    @property
    def promise(self) -> Promise:
        """What preflight holds each node to."""
        memory = self.gpu_memory_gib if self.gpus_per_node else None
        return Promise(self.gpus_per_node, self.gpu_model, memory, self.gpu_driver)
