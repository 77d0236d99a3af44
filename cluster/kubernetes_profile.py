"""What a Kubernetes site is: a namespace with its queues, devices, volumes and rules."""

import re
from typing import Literal

from pydantic import Field, model_validator

from cluster.containers import Mount, refuse_hiding, refuse_unmounted
from cluster.names import (
    DNS_LABEL,
    DNS_NAME,
    ENVIRONMENT_NAME,
    IMAGE_BY_DIGEST,
    LABEL,
    QUANTITY,
    Label,
    LabelValue,
)
from cluster.site import Site
from data_pipeline.strict import Strict

# Of labels and annotations, those that t2v, Kueue and JobSet read.
OUR_PREFIXES = ("app.kubernetes.io/", "kueue.x-k8s.io/", "jobset.sigs.k8s.io/", "t2v/")


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
    seconds: int | None = Field(default=None, ge=0, description="of NoExecute, before eviction")

    @model_validator(mode="after")
    def _refuse_seconds_of_other_effects(self) -> "Toleration":
        if self.seconds is not None and self.effect != "NoExecute":
            raise ValueError("seconds: are of the effect NoExecute alone; leave them out")
        return self


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
    resources: dict[str, int | str] = Field(
        default={},
        description="more of each node, by count or size: vpc.amazonaws.com/efa: 32, "
        "hugepages-2Mi: 5Gi; also the count of rdma_resource, which is 1 by default",
    )
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
    labels: dict[Label, LabelValue] = Field(default={}, description="more labels of pods")
    annotations: dict[Label, str] = Field(default={}, description="more annotations of pods")
    fs_group: bool = Field(
        default=True, description="false: volumes are not given to the pods' group, as some cannot"
    )
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
        for name, amount in self.resources.items():
            self._refuse_resource(name, amount)
        for field, given in (("labels", self.labels), ("annotations", self.annotations)):
            if ours := sorted(name for name in given if name.startswith(OUR_PREFIXES)):
                raise ValueError(f"{field}: {ours[0]!r} is set by t2v launch; leave it out")
        refuse_hiding(self.mounts)
        refuse_unmounted(self.workdir, {mount.path: mount.read_only for mount in self.mounts})
        if self.topology and not self.queue:
            raise ValueError("topology: is Kueue's to obey, but there is no queue; name one")
        return self

    def _refuse_resource(self, name: str, amount: int | str) -> None:
        is_pages = name.startswith("hugepages-")
        if name == self.gpu_resource or not (
            is_pages or (re.fullmatch(LABEL, name) and "/" in name)
        ):
            raise ValueError(
                f"resources: {name!r} is wrong because it is neither another device, with a "
                "domain, nor huge pages; CPUs, memory and GPUs have fields of their own"
            )
        wanted = QUANTITY if is_pages else r"[1-9]\d*"
        if not re.fullmatch(wanted, str(amount)) or str(amount) == "0":
            kind = "a size such as 5Gi" if is_pages else "a count from 1"
            raise ValueError(f"resources: {name} of {amount!r} is wrong; give {kind}")
