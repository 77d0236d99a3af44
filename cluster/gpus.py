"""The GPUs of a node: what its site promised, what the driver says, and what torch can use."""

from collections.abc import Iterable

import torch

from cluster.checks import Check
from cluster.driver import Gpu, Promise
from data_pipeline.errors import ConfigError

GIB = 2**30
IDLE_MEMORY_SHARE, IDLE_UTILISATION = 0.05, 10.0
# What a driver keeps for itself differs between versions.
MEMORY_SLACK = 0.97
FIELDS = ("name", "memory.total", "memory.used", "utilization.gpu", "driver_version",
          "ecc.errors.uncorrected.volatile.total")  # fmt: skip


def check_gpus(gpus: list[Gpu] | None, *, ranks: int, promise: Promise) -> list[Check]:
    """GPUs are there, one per rank, as promised, idle, and without memory errors."""
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if promise.gpus == 0 or (promise.gpus is None and gpus is None and not seen):
        return [Check("GPUs", "ok", "none: ranks compute on the CPU")]
    told = len(gpus) if gpus is not None else seen
    wanted = max(ranks, promise.gpus or 0)
    if told < wanted or seen < wanted:
        by_driver = "no nvidia-smi" if gpus is None else f"{told} by the driver"
        found = f"{by_driver}, {seen} by torch, for {wanted} ranks"
        remedy = "see the image's NVIDIA_VISIBLE_DEVICES, the driver and the job's binding of GPUs"
        return [_unfit(f"{found}; {remedy}")]
    if gpus is None:
        gpus = [_of_torch(number) for number in range(seen)]
    if broken := list(_broken_promises(gpus, promise)):
        return [_unfit("; ".join(broken))]
    drivers = sorted({gpu["driver_version"] for gpu in gpus})
    found = f"{len(gpus)} x {gpus[0]['name']}, driver {', '.join(drivers)}"
    if problems := list(_problems(gpus)):
        return [Check("GPUs", "failed", f"{'; '.join(problems)} ({found})")]
    return [Check("GPUs", "ok", f"{found}, idle")]


def _unfit(found: str) -> Check:
    return Check("GPUs", "failed", found, ConfigError.exit_code, is_of_node=True)


def _of_torch(number: int) -> Gpu:
    device = torch.cuda.get_device_properties(number)
    unknown = dict.fromkeys(FIELDS, "[N/A]")
    memory = str(device.total_memory / 2**20)
    return unknown | {"index": str(number), "name": device.name, "memory.total": memory}


def _broken_promises(gpus: Iterable[Gpu], promise: Promise) -> Iterable[str]:
    for gpu in gpus:
        name, gib = gpu["name"], number_in(gpu["memory.total"]) * 2**20 / GIB
        if promise.model and promise.model.lower() not in name.lower():
            yield f"GPU {gpu['index']} is a {name}, not a {promise.model}"
        if promise.memory_gib and gib < MEMORY_SLACK * promise.memory_gib:
            yield f"GPU {gpu['index']} has {gib:.1f} GiB, not {promise.memory_gib:g}"
        driver = gpu["driver_version"]
        if promise.driver and _version(driver) < _version(promise.driver):
            yield f"GPU {gpu['index']} has driver {driver}, older than {promise.driver}"


def _problems(gpus: Iterable[Gpu]) -> Iterable[str]:
    for gpu in gpus:
        used, total = number_in(gpu["memory.used"]), number_in(gpu["memory.total"])
        busy = number_in(gpu["utilization.gpu"])
        errors = number_in(gpu["ecc.errors.uncorrected.volatile.total"])
        if used > IDLE_MEMORY_SHARE * total:
            yield f"GPU {gpu['index']} holds {used:.0f} of {total:.0f} MiB"
        elif busy > IDLE_UTILISATION:
            yield f"GPU {gpu['index']} is busy at {busy:.0f} %"
        if errors:
            yield f"GPU {gpu['index']} has {errors:.0f} uncorrected memory errors"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def number_in(text: str) -> float:
    """A number of the driver's; 0 for `[N/A]`: this GPU does not count it."""
    try:
        return float(text)
    except ValueError:
        return 0.0
