"""Checked jobs handed to their scheduler: one, or a chain in which each waits for another."""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from cluster.crds import refuse_old
from cluster.job import TrainingJob, run_folder
from cluster.launch import Launch, log_folder, snapshot_folder
from cluster.profile import KubernetesProfile, SlurmProfile
from cluster.render import OBJECTS
from cluster.render_kubernetes import object_name
from cluster.slurm_shell import AHEAD, BEHIND, DEPENDENTS, SCRIPT
from data_pipeline.errors import ConfigError, InputMissing
from data_pipeline.printable import plain
from data_pipeline.store import storage

SUBMIT_SECONDS = 120
WATCH_SECONDS = 30.0


def submit(launches: Sequence[Launch]) -> list[str]:
    """Hand jobs to the scheduler, each to begin once the one before has ended well; returns how to
    watch, stop and resume them.

    SLURM keeps the order itself. Kubernetes has none: this waits for each, and may be run again.
    """
    taken: list[str] = []
    say: list[str] = []
    before: tuple[Launch, str] | None = None
    for launch in launches:
        if isinstance(launch.profile, SlurmProfile):
            try:
                job, told = _submit_slurm(launch, launch.profile, before, taken)
            except (ConfigError, InputMissing) as refusal:
                if not taken:
                    raise
                # Those wait and run all the same.
                remedy = f"Taken before: `scancel {' '.join(taken)}` ends them."
                raise type(refusal)(f"{refusal} {remedy}") from None
        else:
            if before:
                wait_for(before[0])
            job, told = _submit_kubernetes(launch, launch.profile, goes_on=len(launches) > 1)
        before = (launch, job)
        say += told
        if isinstance(launch.profile, KubernetesProfile) and launch is not launches[-1]:
            say.append("waiting for it: what follows is created then; run this again if stopped.")
            print(plain("\n".join(say)), flush=True)
            say = []
    return say


def _submit_slurm(
    launch: Launch, profile: SlurmProfile, before: tuple[Launch, str] | None, taken: list[str]
) -> tuple[str, list[str]]:
    """(number, how to watch, stop and resume it) of a job; `taken` gets that of each as SLURM takes
    it."""
    if not Path(profile.workdir).is_dir():
        raise InputMissing(
            f"workdir: {profile.workdir} is not on this machine; run this where the shared disk "
            "is, or use --out."
        )
    home = snapshot_folder(launch)
    if isinstance(launch.job, TrainingJob):
        refuse_second_job(log_folder(launch).parent, launch.job.name)
    for folder in (home, log_folder(launch)):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in launch.files.items():
        storage.write_atomic(home / name, text.encode())
    after = [f"--dependency=afterok:{before[1]}", "--kill-on-invalid-dep=yes"] if before else []
    number = _sbatch([*after, str(home / SCRIPT)])
    taken.append(number)
    if before and isinstance(before[0].job, TrainingJob):
        # A job that another one takes the place of tells those that wait for it.
        with (log_folder(before[0]) / DEPENDENTS).open("a", encoding="utf-8") as file:
            file.write(f"{number}\n")
    if not isinstance(launch.job, TrainingJob):
        lines = [
            f"job {number}: {launch.job.tasks} tasks.",
            f"watch:   squeue -j {number}; tail -F {log_folder(launch)}/*-{number}-*.out",
            f"stop:    scancel {number}",
            "resume:  the same command again; what is done is not done twice.",
        ]
        return number, lines
    ahead: list[str] = []
    for _ in range(profile.jobs_ahead):
        after = f"--dependency=afterany:{taken[-1]}"
        ahead.append(_sbatch([after, str(home / SCRIPT), BEHIND]))
        taken.append(ahead[-1])
        # Whom to avoid is told to those that still wait.
        storage.write_atomic(log_folder(launch) / AHEAD, "\n".join([*ahead, ""]).encode())
    run = run_folder(launch.job.run_dir, profile)
    save = f"scancel --signal=USR1 --batch {number}"
    lines = [
        f"job {number}: {launch.job.nodes} nodes; recipe and code are in {home}.",
        f"watch:   t2v status {run}; tail -F {run}/slurm/{launch.job.name}-{number}.out",
        f"restart: {save}   (saves, is requeued, goes on)",
        f"stop:    scontrol update JobId={number} Requeue=0 && {save}   (saves and ends)",
        "resume:  the same command again.",
    ]
    if ahead:
        lines[2:4] = [
            f"behind:  {len(ahead)} jobs go on where it stops, up to {ahead[-1]}.",
            f"restart: {save}   (saves and ends; the next one goes on)",
            f"stop:    scancel {' '.join(ahead)} && {save}   (saves and ends)",
        ]
    return taken[-1], lines


def refuse_second_job(run: Path, name: str) -> None:
    """ConfigError where a job of this run waits or runs: the two would fight over the folder."""
    try:
        asked = ["squeue", "--me", "--noheader", f"--name={name}", "--format=%i %T %o"]
        lines = _call(asked).splitlines()
    except (InputMissing, ConfigError):
        return  # sbatch will say what is wrong
    for line in lines:
        number, state, script, *_ = [*line.split(maxsplit=2), "", ""]
        if script.startswith(f"{run}/"):
            raise ConfigError(
                f"run_dir: {run} has job {number} ({state.lower()}) already, which goes on by "
                f"itself; `scancel {number}` first, or choose another run_dir."
            )


def _sbatch(words: list[str]) -> str:
    """The id of a new job."""
    return _call(["sbatch", "--parsable", *words]).strip().splitlines()[-1].partition(";")[0]


def _submit_kubernetes(
    launch: Launch, profile: KubernetesProfile, *, goes_on: bool
) -> tuple[str, list[str]]:
    """(name, how to watch, stop and resume it) of a job."""
    refuse_old(list(yaml.safe_load_all(launch.files[OBJECTS])), profile, _call)
    # create, not apply: a finished job of the same name would be left as it is, without a word.
    *support, workload = launch.files[OBJECTS].split("\n---\n")
    if support:
        _call(["kubectl", "apply", "-f", "-"], "\n---\n".join(support))
    name = object_name(launch.job.name, room=0)
    at = f"kubectl -n {profile.namespace}"
    kind = profile.flavour if isinstance(launch.job, TrainingJob) else "job"
    try:
        answer = _call(["kubectl", "create", "-f", "-"], workload).strip()
    except ConfigError as refusal:
        if "AlreadyExists" not in str(refusal) and "already exists" not in str(refusal):
            raise
        if not goes_on:
            raise ConfigError(
                f"{kind} {name}: is there already; where it lives, it goes on by itself; where it "
                f"has ended, `{at} delete {kind} {name}` first ({refusal})"
            ) from None
        answer = f"{kind} {name} is there already."
    pods = f"-l app.kubernetes.io/instance={name}"
    lines = [
        answer,
        f"watch:   {at} get pods {pods} -w; {at} logs {pods} --prefix -f",
        f"stop:    {at} delete {kind} {name}",
    ]
    if isinstance(launch.job, TrainingJob):
        run = run_folder(launch.job.run_dir, profile)
        lines.insert(2, f"status:  {at} exec POD -- t2v status {run}")
        lines[-1] += "   (its pods save before they end)"
    return name, [*lines, f"resume:  {at} delete {kind} {name}; then the same command again."]


def wait_for(launch: Launch) -> None:
    """Wait until a job on Kubernetes has ended; ConfigError if it failed."""
    profile = launch.profile
    assert isinstance(profile, KubernetesProfile)
    kind = profile.flavour if isinstance(launch.job, TrainingJob) else "job"
    name = object_name(launch.job.name, room=0)
    while True:
        asked = ["kubectl", "-n", profile.namespace, "get", kind, name, "-o", "json"]
        conditions = json.loads(_call(asked)).get("status", {}).get("conditions", [])
        told = {each["type"] for each in conditions if each.get("status") == "True"}
        if told & {"Complete", "Completed"}:
            return
        if "Failed" in told:
            raise ConfigError(
                f"{kind} {name}: has failed, and what follows it is not created; see its logs."
            )
        time.sleep(WATCH_SECONDS)


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
