"""What NVIDIA's driver says of a job's own GPUs, by its program nvidia-smi."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ANSWER_SECONDS = 30.0
OWN = ("index", "uuid")  # what tells GPUs apart

Gpu = dict[str, str]


@dataclass(frozen=True)
class Promise:
    """What a profile says of each node; None where it says nothing."""

    gpus: int | None = None
    model: str | None = None  # part of the name that the driver shows
    memory_gib: float | None = None
    driver: str | None = None  # the oldest version

    @property
    def words(self) -> tuple[str, ...]:
        """Options of preflight that say the same."""
        options = {
            "--gpus": self.gpus,
            "--gpu-memory-gib": self.memory_gib,
            "--gpu-model": self.model,
            "--gpu-driver": self.driver,
        }
        return tuple(
            word
            for name, value in options.items()
            if value is not None
            for word in (name, f"{value:g}" if isinstance(value, float) else str(value))
        )


def ask_driver(fields: Sequence[str]) -> list[Gpu] | None:
    """Some fields of each GPU of this job; None without the program, empty where it does not
    answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join((*OWN, *fields))}"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError):
        return []
    return visible(parse_csv(done.stdout, fields), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_csv(text: str, fields: Sequence[str]) -> list[Gpu]:
    """The lines of nvidia-smi's answer that are whole."""
    names = (*OWN, *fields)
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def visible(gpus: Iterable[Gpu], chosen: str | None) -> list[Gpu]:
    """Those of a node's GPUs that `CUDA_VISIBLE_DEVICES` gives to this job: on a shared node the
    driver shows all. Of which GPU a part (MIG) is, its name does not say: then all may be."""
    if chosen is None or "MIG-" in chosen:
        return list(gpus)
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    indexes = {name for name in wanted if not name.startswith("GPU-")}
    own = tuple(name for name in wanted if name.startswith("GPU-"))
    return [gpu for gpu in gpus if gpu["index"] in indexes or gpu["uuid"].startswith(own)]
