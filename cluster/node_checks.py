"""What one node can say of itself before a run: its GPUs, disks, memory, clock and its data."""

import os
import resource
import shutil
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from cluster.bad_nodes import node_name
from cluster.checks import Check, Verdict
from cluster.driver import Promise, ask_driver
from cluster.gpus import FIELDS, check_gpus
from cluster.job import BYTES_PER_PARAMETER, sample_bytes
from data_pipeline.errors import ConfigError, DataError, StorageError, UserError
from data_pipeline.feeding.sources import open_sources
from t2v.recipe.recipe import RunConfig, method_of

GIB = 2**30
LEAST_INODES = 10_000
LEAST_OPEN_FILES, LEAST_LOCKED_BYTES = 1024, 1 << 30
SKEW_WARNING_SECONDS, SKEW_LIMIT_SECONDS = 1.0, 10.0


def check_node(config: RunConfig, *, ranks: int, promise: Promise | None = None) -> list[Check]:
    """All checks of this node for `ranks` ranks of a run."""
    run_dir = Path(config.run_dir)
    return [
        check_versions(),
        *check_gpus(ask_driver(FIELDS), ranks=ranks, promise=promise or Promise()),
        check_limits(),
        check_shared_memory(config, ranks=ranks),
        _guarded("run folder", lambda: check_run_folder(run_dir)),
        _guarded("disk", lambda: check_disk(run_dir, needed_bytes=missing_bytes(config))),
        _guarded("data", lambda: check_data(config)),
    ]


def check_versions() -> Check:
    """Versions that all nodes must share, as one text."""
    versions = {"t2v": version("t2v"), "torch": torch.__version__}
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return Check("versions", "ok", ", ".join(f"{k} {v}" for k, v in versions.items()))


def check_limits() -> Check:
    """What the system allows this process, in the environment that training will have."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    has_rdma = any(Path("/sys/class/infiniband").glob("*"))
    problems = []
    if files != resource.RLIM_INFINITY and files < LEAST_OPEN_FILES:
        problems.append(f"{files} open files are less than {LEAST_OPEN_FILES} (ulimit -n)")
    if has_rdma and locked != resource.RLIM_INFINITY and locked < LEAST_LOCKED_BYTES:
        problems.append(f"{locked / GIB:.2f} GiB may be locked for RDMA (ulimit -l); unlimited is")
    if problems:
        found = "; ".join(problems)
        return Check("limits", "failed", found, ConfigError.exit_code, is_of_node=True)
    if core == resource.RLIM_INFINITY or core > GIB:
        found = "a crash may write all memory to the disk (ulimit -c 0 prevents it)"
        return Check("limits", "warning", found)
    return Check("limits", "ok", f"{files} open files")


def check_shared_memory(config: RunConfig, *, ranks: int) -> Check:
    """/dev/shm holds all batches that the loader's workers may have ready."""
    needed = loader_bytes(config, ranks=ranks)
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("/dev/shm", "warning", "there is none", StorageError.exit_code)
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.2f} GiB free, the loader may hold {needed / GIB:.2f} GiB"
    if free < needed:
        remedy = "raise the size of /dev/shm or lower data.prefetch_batches"
        return Check("/dev/shm", "failed", f"{found}; {remedy}", StorageError.exit_code)
    return Check("/dev/shm", "ok", found)


def loader_bytes(config: RunConfig, *, ranks: int) -> int:
    """Bytes of the batches that the workers of some ranks may hold at once."""
    held = config.data.num_workers * config.data.prefetch_batches
    return ranks * held * config.micro_batch_size * sample_bytes(config)


def check_run_folder(run_dir: Path) -> Check:
    """The run folder can be written durably, and its disk's clock is this node's."""
    run_dir.mkdir(parents=True, exist_ok=True)
    probe = run_dir / f".preflight-{node_name()}-{uuid.uuid4().hex}"
    started = time.perf_counter()
    try:
        with probe.open("xb") as file:
            file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        skew = probe.stat().st_mtime - time.time()
    finally:
        probe.unlink(missing_ok=True)
    found = f"1 MiB durable in {1000 * seconds:.0f} ms, its clock differs by {abs(skew):.1f} s"
    return Check("run folder", skew_verdict(skew), found, StorageError.exit_code)


def skew_verdict(seconds: float) -> Verdict:
    """Locks and requests are told from old ones by their times."""
    if abs(seconds) > SKEW_LIMIT_SECONDS:
        return "failed"
    return "warning" if abs(seconds) > SKEW_WARNING_SECONDS else "ok"


def check_disk(run_dir: Path, *, needed_bytes: int) -> Check:
    """Room, and inodes, for the checkpoints that are kept and the one being written."""
    disk = os.statvfs(run_dir)
    free, inodes = disk.f_bavail * disk.f_frsize, disk.f_favail
    found = f"{free / GIB:.1f} GiB free of {needed_bytes / GIB:.1f} needed"
    if disk.f_files:
        found += f", {inodes} inodes"
    too_few = disk.f_files > 0 and inodes < LEAST_INODES
    verdict: Verdict = "failed" if free < needed_bytes or too_few else "ok"
    return Check("disk", verdict, found, StorageError.exit_code)


def missing_bytes(config: RunConfig) -> int:
    """Bytes that a run will add: the checkpoints it keeps and one more, less those it has."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in method_of(config).network().parameters())
    one = parameters * BYTES_PER_PARAMETER
    folder = Path(config.run_dir) / "checkpoints"
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return max(one * (config.checkpoint.keep_last + 1) - held, one)


def check_data(config: RunConfig) -> Check:
    """Every dataset answers, what is cached belongs to it, and one sample of each can be read.

    A damaged sample is no reason to stop: training replaces it, and counts how many.
    """
    started = time.perf_counter()
    sources = open_sources(
        config.data, config.method.view, config.conditioning, config.method.cached_latents
    )
    samples = sum(source.dataset.info.samples for source in sources)
    try:
        for source in sources:
            for rows in (source.latents or source.dataset, source.embeddings):
                if rows is not None:
                    rows.read(0, 0)
    except DataError as damage:
        return Check("data", "warning", str(damage), damage.exit_code)
    seconds = time.perf_counter() - started
    found = f"{len(sources)} datasets, {samples} samples, first ones read in {seconds:.1f} s"
    return Check("data", "ok", found)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check whose own failure is a finding."""
    try:
        return check()
    except UserError as failure:
        return Check(name, "failed", str(failure), failure.exit_code)
    except OSError as failure:
        reason = f"{failure.filename or name}: {failure.strerror or failure}"
        return Check(name, "failed", reason, StorageError.exit_code)
