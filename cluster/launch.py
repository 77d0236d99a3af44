"""From a recipe and a profile to a submitted job; every check comes before the queue."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import join, quote
from typing import Any

from cluster.job import DataJob, TrainingJob, grace_of, run_folder, shared_memory_of
from cluster.names import DIRECTIVE_VALUE
from cluster.profile import Profile, SlurmProfile, load_profile
from cluster.render import OBJECTS, refuse_secrets_in, render
from cluster.render_kubernetes import object_name
from cluster.render_slurm import SCRIPT
from data_pipeline.errors import ConfigError, InputMissing
from data_pipeline.store import storage
from t2v.plan.plan import Plan, plan
from t2v.recipe.recipe import RunConfig, dump_config, load_config

SUBMIT_SECONDS = 120


@dataclass(frozen=True)
class Launch:
    """A checked job and its files; nothing is written yet."""

    job: TrainingJob | DataJob
    profile: Profile
    files: dict[str, str]
    plan: Plan | None = None


def prepare_run(
    config_path: str, overrides: list[str], profile_path: str, *, nodes: int | None = None
) -> Launch:
    """The job of a recipe; ConfigError for one that cannot run on these nodes."""
    profile, config = load_profile(profile_path), load_config(config_path, overrides)
    nodes = _nodes(nodes, profile, profile_path)
    refuse_secrets_in(config_path, config.model_dump(mode="json"))
    forecast = _forecast(config, profile, nodes, profile_path)
    job = training_job(config, profile, forecast, nodes=nodes, code=code_version())
    return Launch(job, profile, render(job, profile), forecast)


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
        bad_nodes=_bad_nodes(run_folder(config.run_dir, profile)),
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


def submit(launch: Launch) -> list[str]:
    """Hand the job to the scheduler; returns how to watch, stop and resume it."""
    if isinstance(launch.profile, SlurmProfile):
        return _submit_slurm(launch, launch.profile)
    return _submit_kubernetes(launch)


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
    described = subprocess.run(command, capture_output=True, text=True, timeout=SUBMIT_SECONDS)
    return f"{package} ({described.stdout.strip()})" if described.returncode == 0 else package


def _submit_slurm(launch: Launch, profile: SlurmProfile) -> list[str]:
    if not Path(profile.workdir).is_dir():
        raise InputMissing(
            f"workdir: {profile.workdir} is not on this machine; run this where the shared disk "
            "is, or use --out."
        )
    home = snapshot_folder(launch)
    for folder in (home, log_folder(launch)):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in launch.files.items():
        storage.write_atomic(home / name, text.encode())
    answer = _call(["sbatch", "--parsable", str(home / SCRIPT)])
    number = answer.strip().splitlines()[-1].partition(";")[0]
    if not isinstance(launch.job, TrainingJob):
        return [
            f"job {number}: {launch.job.tasks} tasks.",
            f"watch:   squeue -j {number}; tail -F {log_folder(launch)}/*-{number}-*.out",
            f"stop:    scancel {number}",
            "resume:  the same command again; what is done is not done twice.",
        ]
    run = run_folder(launch.job.run_dir, profile)
    return [
        f"job {number}: {launch.job.nodes} nodes; recipe and code are in {home}.",
        f"watch:   t2v status {run}; tail -F {run}/slurm/{launch.job.name}-{number}.out",
        f"restart: scancel --signal=USR1 --batch {number}   (saves, is requeued, goes on)",
        f"stop:    scontrol update JobId={number} Requeue=0 && "
        f"scancel --signal=USR1 --batch {number}   (saves and ends)",
        "resume:  the same command again.",
    ]


def _submit_kubernetes(launch: Launch) -> list[str]:
    profile = launch.profile
    assert not isinstance(profile, SlurmProfile)
    # create, not apply: a finished job of the same name would be left as it is, without a word.
    *support, workload = launch.files[OBJECTS].split("\n---\n")
    if support:
        _call(["kubectl", "apply", "-f", "-"], "\n---\n".join(support))
    answer = _call(["kubectl", "create", "-f", "-"], workload)
    name = object_name(launch.job.name, room=0)
    at = f"kubectl -n {profile.namespace}"
    kind = profile.flavour if isinstance(launch.job, TrainingJob) else "job"
    pods = f"-l app.kubernetes.io/instance={name}"
    lines = [
        answer.strip(),
        f"watch:   {at} get pods {pods} -w; {at} logs {pods} --prefix -f",
        f"stop:    {at} delete {kind} {name}",
    ]
    if isinstance(launch.job, TrainingJob):
        run = run_folder(launch.job.run_dir, profile)
        lines.insert(2, f"status:  {at} exec POD -- t2v status {run}")
        lines[-1] += "   (its pods save before they end)"
    return [*lines, f"resume:  {at} delete {kind} {name}; then the same command again."]


def _call(command: list[str], text: str = "") -> str:
    """What a scheduler's command answers; its refusal as one line."""
    if shutil.which(command[0]) is None:
        raise InputMissing(
            f"{command[0]}: not found on this machine; run this where jobs are submitted, or use "
            "--out."
        )
    try:
        called = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=SUBMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{command[0]}: no answer in {SUBMIT_SECONDS} s; see whether the scheduler is up, and "
            "whether the job was taken, before trying again."
        ) from None
    if called.returncode:
        said = " ".join((called.stderr or called.stdout).split())
        raise ConfigError(f"{' '.join(command[:2])}: refused because '{said}'; correct it.")
    return called.stdout


def _nodes(asked: int | None, profile: Profile, origin: str) -> int:
    nodes = profile.nodes if asked is None else asked
    if not 1 <= nodes <= profile.nodes:
        raise ConfigError(
            f"--nodes: {nodes} is wrong because {origin} allows 1 to {profile.nodes}; choose one "
            "of these."
        )
    return nodes


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


def _bad_nodes(folder: Path) -> tuple[str, ...]:
    """Nodes that failed a preflight of this run, a name per line; the file is the operator's."""
    path = folder / "bad_nodes"
    names = path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else []
    for name in names:
        if not re.fullmatch(DIRECTIVE_VALUE, name):
            raise ConfigError(f"{path}: {name!r} is no node's name; write one name per line.")
    return tuple(sorted(set(names)))
