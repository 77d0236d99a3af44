"""From a recipe and a profile to a submitted job; every check comes before the queue."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import join, quote
from typing import Any

from cluster.bad_nodes import FILE, read_bad_nodes
from cluster.job import DataJob, TrainingJob, grace_of, run_folder, shared_memory_of
from cluster.profile import Profile, SlurmProfile, load_profile
from cluster.render import OBJECTS, refuse_secrets_in, render
from cluster.slurm_shell import SCRIPT
from data_pipeline.errors import ConfigError
from data_pipeline.store import storage
from t2v.evaluation.protocol import load_protocol
from t2v.plan.plan import Plan, plan
from t2v.recipe.recipe import RunConfig, dump_config, load_config

GIT_SECONDS = 120


@dataclass(frozen=True)
class Launch:
    """A checked job and its files; nothing is written yet."""

    job: TrainingJob | DataJob
    profile: Profile
    files: dict[str, str]
    plan: Plan | None = None


def prepare_run(
    config_path: str,
    overrides: list[str],
    profile_path: str,
    *,
    nodes: int | None = None,
    avoid: Sequence[str] = (),
) -> Launch:
    """The job of a recipe; ConfigError for one that cannot run on these nodes."""
    profile, config = load_profile(profile_path), load_config(config_path, overrides)
    nodes = profile.nodes if nodes is None else nodes
    if not 1 <= nodes <= profile.nodes:
        raise ConfigError(
            f"--nodes: {nodes} is wrong because {profile_path} allows 1 to {profile.nodes}; choose "
            "one of these."
        )
    refuse_secrets_in(config_path, config.model_dump(mode="json"))
    forecast = _forecast(config, profile, nodes, profile_path)
    job = training_job(config, profile, forecast, nodes=nodes, code=code_version())
    job = replace(job, bad_nodes=tuple(sorted({*job.bad_nodes, *avoid})))
    return Launch(job, profile, render(job, profile), forecast)


def prepare_evaluation(protocol: str, run: Launch) -> Launch:
    """The job that judges a run by a protocol, on the GPUs of one node."""
    profile, training = run.profile, run.job
    assert isinstance(training, TrainingJob)
    load_protocol(protocol, [])  # whatever is wrong is told now
    folder = run_folder(training.run_dir, profile)
    ranks = f"--nproc-per-node={profile.ranks_per_node}"
    job = DataJob(
        name=f"{training.name[:30]}-evaluate",
        arguments=(
            *(str(folder), "--protocol", str(Path(protocol).resolve())),
            *("--out", str(folder / "scores" / Path(protocol).stem)),
        ),
        tasks=1,
        at_once=1,
        cpus=profile.cpus_per_node,
        memory_gib=profile.memory_gib,
        gpus=profile.gpus_per_node,
        record=_record(profile, code_version()) | {"protocol": protocol},
        program=("torchrun", "--standalone", ranks, "-m", "t2v.cli", "evaluate"),
    )
    return Launch(job, profile, render(job, profile))


def prepare_chain(
    first: Launch, then: Sequence[str], profile_path: str, *, nodes: int | None = None
) -> list[Launch]:
    """A run and what follows it: recipes with overrides, each warm-started from the run before
    where it has a warm start, and `evaluate:PROTOCOL` of that run."""
    chain, run = [first], first
    for stage in then:
        kind, colon, protocol = stage.partition(":")
        if colon and kind == "evaluate":
            chain.append(prepare_evaluation(protocol, run))
            continue
        recipe, *overrides = shlex.split(stage) or [""]
        before = run.job
        assert isinstance(before, TrainingJob)
        if load_config(recipe, overrides).warm_start is not None:
            folder = run_folder(before.run_dir, run.profile)
            overrides.append(f"warm_start.checkpoint={json.dumps(str(folder))}")
        run = prepare_run(recipe, overrides, profile_path, nodes=nodes)
        assert isinstance(run.job, TrainingJob)
        if run.job.run_dir in {e.job.run_dir for e in chain if isinstance(e.job, TrainingJob)}:
            raise ConfigError(f"--then: {stage!r} has the run_dir of one before; change it.")
        chain.append(run)
    return chain


def training_job(
    config: RunConfig, profile: Profile, forecast: Plan, *, nodes: int, code: str
) -> TrainingJob:
    """The typed job of a recipe whose forecast fits."""
    return TrainingJob(
        name=config.name,
        run_dir=config.run_dir,
        nodes=nodes,
        ranks_per_node=profile.ranks_per_node,
        recipe=dump_config(config),
        record=_record(profile, code) | {"nodes": nodes, "world_size": forecast.gpus},
        grace=grace_of(config, forecast, profile),
        shared_memory=shared_memory_of(config, profile),
        setup_seconds=config.watchdog.setup_seconds,
        bad_nodes=read_bad_nodes(run_folder(config.run_dir, profile) / FILE),
    )


def prepare_data(
    arguments: list[str],
    profile_path: str,
    *,
    name: str,
    tasks: int,
    at_once: int,
    cpus: int,
    memory_gib: int,
    gpus: int,
) -> Launch:
    """The job of `t2v data build`, `embed` or `encode` in `tasks` parts."""
    profile = load_profile(profile_path)
    for field, asked, there in (
        ("--cpus", cpus, profile.cpus_per_node),
        ("--memory-gib", memory_gib, profile.memory_gib),
        ("--gpus", gpus, profile.gpus_per_node),
    ):
        if asked > there:
            raise ConfigError(
                f"{field}: {asked} is wrong because a node of {profile_path} has {there}; ask for "
                "less."
            )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", name):
        raise ConfigError(
            f"--name: {name!r} is wrong because it names jobs and files; use up to 41 letters, "
            "digits and . _ -"
        )
    refuse_secrets_in("t2v launch-data", list(arguments))
    job = DataJob(
        name=name,
        arguments=tuple(arguments),
        tasks=tasks,
        at_once=min(at_once, tasks),
        cpus=cpus,
        memory_gib=memory_gib,
        gpus=gpus,
        record=_record(profile, code_version()) | {"arguments": arguments, "tasks": tasks},
    )
    return Launch(job, profile, render(job, profile))


def write_out(launch: Launch, folder: Path) -> list[str]:
    """Write the files for an operator to read, change and submit; returns what to do with them."""
    for name, text in launch.files.items():
        path = folder / name
        if os.path.lexists(path) and (path.is_dir() or path.read_bytes() != text.encode()):
            raise ConfigError(
                f"{path}: is there already with other content; remove it, or give --out another "
                "folder."
            )
    for name, text in launch.files.items():
        storage.write_atomic(folder / name, text.encode())
    written = ", ".join(str(folder / name) for name in launch.files)
    if isinstance(launch.profile, SlurmProfile):
        home, logs = snapshot_folder(launch), log_folder(launch)
        files = join(str(folder / name) for name in launch.files)
        steps = [
            f"{join(['mkdir', '-p', str(home), str(logs)])} && cp {files} {quote(str(home))}",
            f"sbatch {quote(str(home / SCRIPT))}",
        ]
    else:
        steps = [
            f"kubectl apply -f {quote(str(folder / OBJECTS))}   (once a finished job of this name "
            "is deleted)"
        ]
    return [f"{written}: written; nothing is submitted.", "submit:", *(f"  {s}" for s in steps)]


def snapshot_folder(launch: Launch) -> Path:
    """Where a SLURM job's files are kept: a run's in its run folder."""
    return log_folder(launch).parent / "launch" / launch.job.snapshot


def log_folder(launch: Launch) -> Path:
    """Where a SLURM job writes; SLURM does not make folders."""
    if isinstance(launch.job, TrainingJob):
        return run_folder(launch.job.run_dir, launch.profile) / "slurm"
    return Path(launch.profile.workdir, "logs")


def code_version() -> str:
    """The package's version, and the commit where it runs from a checkout."""
    try:
        package = version("t2v")
    except PackageNotFoundError:
        package = "unknown"
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return package
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
    described = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    return f"{package} ({described.stdout.strip()})" if described.returncode == 0 else package


def _forecast(config: RunConfig, profile: Profile, nodes: int, origin: str) -> Plan:
    try:
        return plan(
            config, gpus=nodes * profile.ranks_per_node, gpu_memory_gib=profile.rank_memory_gib
        )
    except ConfigError as problem:
        field = "gpu_memory_gib" if profile.gpus_per_node else "memory_gib"
        said = str(problem).replace("--gpu-memory-gib:", f"{origin}: {field}:")
        where = f"{nodes} nodes of {profile.ranks_per_node} ranks"
        raise ConfigError(f"{said} (this was for {where})") from None


def _record(profile: Profile, code: str) -> dict[str, Any]:
    container = profile.container if isinstance(profile, SlurmProfile) else profile
    return {"t2v": code, "image": container.image if container else None, "cluster": profile.kind}
