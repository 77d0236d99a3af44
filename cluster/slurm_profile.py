"""What a SLURM site is: its partitions, limits, containers and files of secrets."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cluster.containers import Apptainer, Pyxis, mounted, refuse_unmounted
from cluster.names import (
    DIRECTIVE_VALUE,
    ENVIRONMENT_NAME,
    Directive,
    Folder,
    refuse_unprintable,
)
from cluster.secrets import holds_secret
from cluster.site import Site
from data_pipeline.strict import Strict

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
            *("gpus", "gpu-bind", "tres-bind", "gpus-per-socket", "gpus-per-task"),
            *("cpus-per-gpu", "mem-per-cpu", "mem-per-gpu", "overcommit", "oversubscribe"),
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
    *("SHELLOPTS", "UID", "T2V_BAD_NODES", "T2V_NODE_NAMES", "T2V_TASKS"),
    *("attempt", "avoided", "bad", "container", "decision", "failed", "head", "job"),
    *("known", "launch", "may_avoid", "name", "new", "pause", "pid", "port", "rc", "run_dir"),
    *("step", "told"),
}
SCHEDULER_NAMES = ("SBATCH_", "SLURM_", "SLURMD_", "SRUN_")


# minutes, minutes:seconds, hours:minutes:seconds; days-hours, and minutes and seconds after it.
SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")


def minutes_of(text: str) -> float:
    """A time in one of SLURM's formats in minutes; ValueError for another."""
    match = SLURM_TIME.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} is no time of SLURM's; write minutes, H:MM:SS or D-HH:MM:SS in quotes"
        )
    numbers = [int(number) for number in match["rest"].split(":")]
    if match["days"]:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return (int(match["days"] or 0) * 24 + hours) * 60 + minutes + seconds / 60


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
    time_limit_minutes: int | str = Field(
        description="minutes, or text in SLURM's formats: '30', '24:00:00', '1-00:00:00'"
    )
    exclude: list[Directive] = Field(default=[], description="nodes that are never used")
    directives: dict[str, str | Literal[True]] = Field(
        default={},
        description="other sbatch options by their long name, such as switches: 1@10:00; "
        "true for one without a value, such as contiguous",
    )
    jobs_ahead: int = Field(
        default=0,
        ge=0,
        le=100,
        description="where nodes may neither requeue nor submit: so many more jobs are submitted "
        "at once, each of which goes on where the one before stopped",
    )
    container: Annotated[Apptainer | Pyxis, Field(discriminator="kind")] | None = None
    setup: list[str] = Field(
        default=[], description="shell lines run first, such as `module load cuda`"
    )
    secrets: list[FileSecret] = Field(default=[])

    @field_validator("time_limit_minutes")
    @classmethod
    def _refuse_strange_times(cls, limit: int | str) -> int | str:
        minutes = limit if isinstance(limit, int) else minutes_of(limit)
        if not 5 <= minutes <= 366 * 24 * 60:
            raise ValueError(
                f"{limit!r} is wrong because it is {minutes:g} minutes; give 5 minutes to 366 days"
            )
        return limit

    @property
    def limit_minutes(self) -> int:
        """The time limit in whole minutes."""
        limit = self.time_limit_minutes
        return limit if isinstance(limit, int) else int(minutes_of(limit))

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
            refuse_unmounted(self.workdir, mounted(self.container))
        return self
