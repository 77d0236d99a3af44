"""A job before it is written down for a scheduler: what runs, on how much, with which grace."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.profile import Profile, SlurmProfile
from cluster.status import last_line, sound
from data_pipeline.errors import ConfigError
from data_pipeline.feeding.config import text_shape
from t2v.attempt.files import read_mapping
from t2v.plan.plan import GIB, Plan
from t2v.recipe.recipe import RunConfig

# A step and a save may each take twice as long on a bad day; then come goodbye and exit.
SLACK, MARGIN_SECONDS, LEAST_GRACE_SECONDS = 2.0, 60, 120
# What the wrapper needs after its last rank, to say how it ended before it is killed.
GOODBYE_SECONDS = 30
# Of work, at an eviction that leaves no time to save.
MOST_LOST_SECONDS = 1800.0
NCCL_SHM_GIB = 1  # an allowance for the buffers between ranks of a node
BYTES_PER_PARAMETER = 16  # of a checkpoint: weights, two moments, averaged weights, in fp32


@dataclass(frozen=True)
class Grace:
    """How long ranks may take from a request to stop to their end, and why so long."""

    seconds: int
    reason: str

    @property
    def notice_seconds(self) -> int:
        """How long before the end the scheduler must tell."""
        return self.seconds + GOODBYE_SECONDS


@dataclass(frozen=True)
class SharedMemory:
    """The size of /dev/shm, and why."""

    gib: int
    reason: str


@dataclass(frozen=True)
class TrainingJob:
    """One run on `nodes` whole nodes."""

    name: str
    run_dir: str
    nodes: int
    ranks_per_node: int
    recipe: str  # the resolved recipe as YAML
    record: dict[str, Any]  # version, image and where it all came from
    grace: Grace
    shared_memory: SharedMemory
    setup_seconds: float  # the recipe's deadline for the setup of its ranks
    bad_nodes: tuple[str, ...] = ()

    @property
    def snapshot(self) -> str:
        """Names this recipe and code; what a queued job reads is never replaced by another's."""
        return digest_of(self.recipe + record_text(self.record))


@dataclass(frozen=True)
class DataJob:
    """`t2v data VERB ...` split over `tasks` tasks; each is told its number by `--task I/N`."""

    name: str
    arguments: tuple[str, ...]
    tasks: int
    at_once: int
    cpus: int
    memory_gib: int
    gpus: int
    record: dict[str, Any]
    program: tuple[str, ...] = ("t2v", "data")

    @property
    def is_split(self) -> bool:
        """Whether each task is told its number."""
        return self.program == ("t2v", "data")

    @property
    def downloads(self) -> bool:
        """Whether tasks may fetch an encoder or autoencoder from the model hub."""
        return not self.is_split or self.arguments[:1] in (("embed",), ("encode",))

    @property
    def snapshot(self) -> str:
        """Names the arguments and the code."""
        return digest_of("\0".join(self.program + self.arguments) + record_text(self.record))


def run_folder(run_dir: str, profile: Profile) -> Path:
    """The run folder as the nodes see it."""
    return Path(profile.workdir, run_dir)


def grace_of(config: RunConfig, plan: Plan, profile: Profile) -> Grace:
    """Time for the slowest step and a save, twice over.

    What the run has measured before counts; else the plan's slowest forecast and the site's disk.
    """
    folder = run_folder(config.run_dir, profile)
    measured_step = sound(last_line(folder / "metrics.jsonl")).get("step_seconds")
    measured_save = sound(read_mapping(folder / "status.json")).get("save_seconds")
    size = plan.parameters * BYTES_PER_PARAMETER / GIB
    step = measured_step or max(forecast.step_seconds for forecast in plan.forecasts)
    save = measured_save or 2 * size / profile.storage_gib_per_second  # written, and read to prove
    needed = math.ceil(SLACK * (step + save) + MARGIN_SECONDS)
    how_step = "measured" if measured_step else "forecast"
    how_save = (
        "measured"
        if measured_save
        else f"{size:.1f} GiB written and proved at {profile.storage_gib_per_second:g} GiB/s"
    )
    seconds = max(needed, LEAST_GRACE_SECONDS)
    notice = profile.eviction_notice_seconds
    if notice is not None and notice < seconds + GOODBYE_SECONDS:
        short = _too_short(config, notice, step=step, needed=seconds)
        if not isinstance(profile, SlurmProfile):  # which tells of its time limit when we ask it to
            return short
    reason = (
        f"{SLACK:g} x ({step:.1f} s for a step, {how_step} + {save:.1f} s for a save, {how_save}) "
        f"+ {MARGIN_SECONDS} s; at least {LEAST_GRACE_SECONDS} s"
    )
    if isinstance(profile, SlurmProfile) and seconds * 2 > profile.limit_minutes * 60:
        raise ConfigError(
            f"time_limit_minutes: {profile.time_limit_minutes} is wrong because stopping takes "
            f"{seconds} s ({reason}), more than half of it; ask for more time."
        )
    return Grace(seconds, reason)


def _too_short(config: RunConfig, notice: int, *, step: float, needed: int) -> Grace:
    """The grace of a job whose nodes are taken before it could save: what was saved before counts,
    so that must not be long ago. ConfigError where it would be."""
    every = config.checkpoint.every_steps
    lost = every * step
    reason = (
        f"eviction_notice_seconds: {notice} are too few to save, which takes {needed} s; at an "
        f"eviction up to {lost / 60:.0f} min since the last checkpoint are lost"
    )
    if lost > MOST_LOST_SECONDS:
        most = max(int(MOST_LOST_SECONDS / step), 1)
        raise ConfigError(
            f"checkpoint.every_steps: {every} is wrong because {reason}; save at "
            f"least every {most} steps."
        )
    return Grace(max(notice - GOODBYE_SECONDS, 1), reason)


def shared_memory_of(config: RunConfig, profile: Profile) -> SharedMemory:
    """/dev/shm of a node: all batches that its workers may hold, and NCCL's buffers."""
    data, sample = config.data, sample_bytes(config)
    ranks, workers = profile.ranks_per_node, max(data.num_workers, 1)
    held = ranks * workers * data.prefetch_batches * config.micro_batch_size * sample
    gib = math.ceil(held / GIB) + NCCL_SHM_GIB
    reason = (
        f"{ranks} ranks x {workers} workers x {data.prefetch_batches} batches x "
        f"{config.micro_batch_size} samples x {sample} bytes = {held / GIB:.2f} GiB, "
        f"and {NCCL_SHM_GIB} GiB for NCCL"
    )
    if gib >= profile.memory_gib:
        raise ConfigError(
            f"memory_gib: {profile.memory_gib} is wrong because /dev/shm alone needs {gib} GiB "
            f"({reason}) and counts in it; lower data.prefetch_batches or take larger nodes."
        )
    return SharedMemory(gib, reason)


def sample_bytes(config: RunConfig) -> int:
    """What the loader ships of one sample: pixels of its patches, and its text."""
    view, text = config.method.view, text_shape(config.conditioning)
    pixels = view.levels * math.prod(view.patch_size) * 3
    return pixels + (2 * math.prod(text) if text else 0)


def record_text(record: dict[str, Any]) -> str:
    """launch.json: which code, image and profile a job was made of."""
    return json.dumps(record, indent=2, sort_keys=True) + "\n"


def digest_of(text: str) -> str:
    """Eight letters that tell texts apart."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
