"""SLURM batch scripts. Names and values reach the shell quoted, and sbatch only if they need no
quoting; the few lines of shell between them never change.
"""

import re
from shlex import join, quote

from cluster.checks import MEETING_SECONDS, STARTING_SECONDS
from cluster.containers import Apptainer, Pyxis
from cluster.job import DataJob, TrainingJob, run_folder
from cluster.names import DIRECTIVE_VALUE, refuse_unprintable
from cluster.profile import SlurmProfile
from cluster.requeue import HOPELESS
from cluster.slurm_shell import (
    BAD_NODES,
    FAILED_START,
    FOLLOW,
    avoid,
    go_on_ahead,
    requeue,
    take_over,
)
from data_pipeline.errors import ConfigError

# In these, sbatch replaces %x, %j and the like.
PATTERN_VALUE = DIRECTIVE_VALUE.replace("@", "@%")
PATTERNED = ("array", "output")
# Only names of the submitting shell that tell nothing and that every site needs.
EXPORTED = "HOME,LANG,PATH,USER"
# SLURM itself gives a job that is exported some names its user's login environment besides, which
# is neither the shell's that submits nor the profile's; functions are variables too.
KEPT = (
    "HOME|LANG|PATH|USER|LOGNAME|SHELL|PWD|OLDPWD|SHLVL|HOSTNAME|TMPDIR|_|SLURM_*|SLURMD_*"
    "|CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES|ZE_AFFINITY_MASK|GPU_DEVICE_ORDINAL"
)
FORGET = (
    "unalias -a; unset -f $(compgen -A function)",
    'for name in $(compgen -e); do case "$name" in',
    f"  {KEPT}) ;;",
    '  *) unset -v "$name" 2>/dev/null ;;',
    "esac; done",
)
SETUP_FAILED = (
    'local rc=$?; [ "$rc" = 0 ] || { echo "setup: \'$1\' is wrong because it ended with $rc; '
    'correct it." >&2; exit 78; }'
)
# Below 32768, where Linux takes ports for outgoing connections.
# Two ports of each job: its nodes meet at the first, and at the second before, for preflight.
FIRST_PORT, JOBS = 20000, 6000
# Usage, a program that cannot be run, and what else another attempt would meet again.
FATAL_CODES = sorted(HOPELESS | {2, 126, 127})
ALONE = ("srun", "--export=ALL", "--overlap", "--nodes=1", "--ntasks=1")

NODE_SHELL = 'exec t2v node --node-rank "$SLURM_NODEID" "$@"'
PREFLIGHT_SHELL = 'exec t2v preflight --node-rank "$SLURM_NODEID" "$@"'
# From the first node's end to that of one that hangs: one that fails at once must not take the
# others along before they have waited for it, and named it.
LINGER_SECONDS = MEETING_SECONDS + STARTING_SECONDS
# Before the third start; before the second SLURM itself waits two minutes.
LONG_PAUSE_SECONDS = 480


def training_script(job: TrainingJob, profile: SlurmProfile) -> str:
    """The script of a run: preflight, train, and what to do when it ends."""
    folder = run_folder(job.run_dir, profile)
    directives = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(profile.cpus_per_node),
        **_gpus(profile, profile.gpus_per_node),
        "mem": "0" if profile.exclusive else f"{profile.memory_gib}G",
        "time": _time(profile.limit_minutes),
        "signal": f"B:USR1@{job.grace.notice_seconds}",
        "requeue": None,
        "open-mode": "append",
        "output": f"{str(folder).replace('%', '%%')}/slurm/%x-%j.out",
        **_site(profile, (*profile.exclude, *job.bad_nodes)),
    }
    if profile.exclusive:
        directives["exclusive"] = None
    launch, alone = f"{folder}/launch/{job.snapshot}", _alone(profile)
    excluded = _quote("".join(f"{name}," for name in profile.exclude)) if profile.exclude else ""
    on_end = f" --on-end {_quote(profile.on_end)}" if profile.on_end else ""
    says = [
        f"Run {job.name} on {job.nodes} nodes of {job.ranks_per_node} ranks, as `t2v launch` wrote "
        "it; see docs/cluster.md.",
        f"Ranks have {job.grace.seconds} s to save and end: {job.grace.reason}.",
    ]
    lines = [
        *_head(directives, says),
        *_environment(profile),
        "",
        f"run_dir={_quote(str(folder))}",
        f"launch={_quote(launch)}",
        _array("step", _step(profile.cpus_per_node)),
        _array("container", _container(profile)),
        'T2V_NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd " " -)',
        "export T2V_NODE_NAMES",
        'export T2V_BAD_NODES="$run_dir/bad_nodes"',
        "attempt=${SLURM_RESTART_COUNT:-0}",
        *_head_node(profile),
        f"port=$(({FIRST_PORT} + SLURM_JOB_ID % {JOBS} * 2))",
        'mkdir -p -- "$run_dir/slurm"',
        "",
        "# The flag file reaches ranks that are still starting, and leaves SIGUSR1 to NCCL; where",
        "# the disk does not take it, the nodes' wrappers hear the signal.",
        """trap 'touch -- "$run_dir/PREEMPT-$SLURM_JOB_ID-$attempt" ||""",
        """  scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 TERM""",
        *FOLLOW,
        *BAD_NODES,
        *FAILED_START,
        *avoid(job.nodes, excluded),
        *(go_on_ahead(alone) if profile.jobs_ahead else requeue(profile.restart_limit)),
        "",
        "known=$(bad_nodes)",
        f'follow "${{step[@]}}" --kill-on-bad-exit=0 --wait={LINGER_SECONDS} \\',
        f"""  "${{container[@]}}" bash -c {_quote(PREFLIGHT_SHELL)} \\""",
        f"  preflight --nnodes {job.nodes} --nproc-per-node {job.ranks_per_node} \\",
        f'  --rdzv-endpoint "$head:$((port + 1))" --timeout-seconds {MEETING_SECONDS} \\',
        f"  {_join(profile.promise.words)} \\",
        '  -- "$launch/config.yaml"',
        "avoid",
        "may_avoid=$?",
        """# The code of a node that died may be higher than what the first one found of it.""",
        '[ "$rc" != 0 ] && [ "$bad" != "$known" ] && rc=69',
        'case "$rc" in',
        "0) ;;",
        "69)",
        *(["  tell_ahead"] if profile.jobs_ahead else take_over()),
        "  exit 69 ;;",
        f'{"|".join(map(str, FATAL_CODES))}) exit "$rc" ;;',
        "*)",
        "  failed_start preflight",
        f'  requeue "$((failed > 1 ? {LONG_PAUSE_SECONDS} : 0))"',
        '  exit "$rc" ;;',
        "esac",
        "",
        'lines() { cat -- "$run_dir/attempts.jsonl" 2>/dev/null | wc -l; }',
        "told=$(lines)",
        "# All nodes end by themselves, at the same step; --wait bounds how long one may linger.",
        f'follow "${{step[@]}}" --kill-on-bad-exit=0 --wait={job.grace.seconds} \\',
        f"""  "${{container[@]}}" bash -c {_quote(NODE_SHELL)} node \\""",
        f"  --nnodes {job.nodes} --nproc-per-node {job.ranks_per_node} "
        f"--gpus {profile.gpus_per_node}{on_end} \\",
        '  --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID-$attempt" \\',
        f'  --run-dir "$run_dir" --grace-seconds {job.grace.seconds} -- "$launch/config.yaml"',
        "",
        "# The scheduler's exit codes say little: the run folder says what to do.",
        f'read -r decision pause <<<"$({alone}t2v status "$run_dir" --decide)"',
        'case "$decision" in',
        "done) exit 0 ;;",
        "requeue)",
        '  if [ "$(lines)" != "$told" ]; then rm -f -- "$run_dir/slurm/failed_starts"',
        '  elif [ "$rc" != 75 ]; then failed_start training; fi',
        '  requeue "${pause:-0}" ;;',
        'stop) echo "not requeued: the next attempt would fail alike; see t2v status" >&2 ;;',
        "*)",
        "  failed_start training",
        "  requeue ;;",
        "esac",
        'exit "$((rc ? rc : 1))"',
    ]
    return "\n".join([*lines, ""])


def array_script(job: DataJob, profile: SlurmProfile) -> str:
    """The script of a data job: one task of an array for each part."""
    directives = {
        "job-name": job.name,
        "array": f"0-{job.tasks - 1}%{job.at_once}",
        "nodes": "1",
        "ntasks-per-node": "1",
        "cpus-per-task": str(job.cpus),
        **_gpus(profile, job.gpus),
        "mem": f"{job.memory_gib}G",
        "time": _time(profile.limit_minutes),
        "requeue": None,
        "open-mode": "append",
        "output": f"{profile.workdir}/logs/%x-%A-%a.out",
        **_site(profile, profile.exclude),
    }
    what = " ".join((*job.program, job.arguments[0]) if job.is_split else job.program[-1:])
    says = f"`{what}` in {job.tasks} tasks, at most {job.at_once} at once."
    task = ' --task "$SLURM_ARRAY_TASK_ID/$T2V_TASKS"' if job.is_split else ""
    inner = f'exec {_join(job.program)} "$@"{task}'
    lines = [
        *_head(directives, [says, "A task that is started again goes on where it stopped."]),
        *_environment(profile),
        "",
        _array("step", _step(job.cpus)),
        _array("container", _container(profile)),
        f"export T2V_TASKS={job.tasks}",
        f'exec "${{step[@]}}" "${{container[@]}}" bash -c {_quote(inner)} data \\',
        f"  {_join(job.arguments)}",
    ]
    return "\n".join([*lines, ""])


def _head(directives: dict[str, str | None], says: list[str]) -> list[str]:
    lines = ["#!/bin/bash", *(f"# {line}" for line in says)]
    for name, value in sorted(directives.items()):
        if value is None:
            lines.append(f"#SBATCH --{name}")
            continue
        if not re.fullmatch(PATTERN_VALUE if name in PATTERNED else DIRECTIVE_VALUE, value):
            raise ConfigError(
                f"--{name}: {value!r} is wrong because sbatch would read it otherwise; use "
                "letters, digits and . _ / - only."
            )
        lines.append(f"#SBATCH --{name}={value}")
    return [*lines, ""]


def _site(profile: SlurmProfile, excluded: tuple[str, ...] | list[str]) -> dict[str, str | None]:
    named = {
        "account": profile.account,
        "partition": profile.partition,
        "qos": profile.qos,
        "exclude": ",".join(dict.fromkeys(excluded)) or None,
    }
    given = {name: value for name, value in named.items() if value is not None}
    others = {name: None if value is True else value for name, value in profile.directives.items()}
    return {"chdir": profile.workdir, "export": EXPORTED, **given, **others}


def _gpus(profile: SlurmProfile, count: int) -> dict[str, str | None]:
    if not count:
        return {}
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    return {"gpus-per-node": f"{kind}{count}"}


def _environment(profile: SlurmProfile) -> list[str]:
    # Not -e: the waiting loop needs codes other than 0. Lines of a site may not stand -u.
    lines = [*FORGET, "umask 077", *_setup(profile.setup), "set -uo pipefail"]
    lines += [f"export {name}={_quote(value)}" for name, value in profile.variables.items()]
    for secret in profile.secrets:
        lines += _secret(secret.variable, secret.file)
    return lines


def _head_node(profile: SlurmProfile) -> list[str]:
    """The first node, where this script runs, by its name or by its address on an interface."""
    if profile.interface is None:
        return ["head=${T2V_NODE_NAMES%% *}"]
    problem = f"interface: {profile.interface} has no address on this node; correct the profile."
    return [
        f"head=$(ip -4 -o addr show dev {profile.interface} | awk '{{print $4; exit}}')",
        "head=${head%%/*}",
        f'[ -n "$head" ] || {{ echo {_quote(problem)} >&2; exit 78; }}',
    ]


def _setup(setup: list[str]) -> list[str]:
    """The lines of a site, each of which ends the job where it fails."""
    lines = ["set_up() {", f"  {SETUP_FAILED}", "}"] if setup else []
    for line in setup:
        lines.append(line)
        if not line.endswith("\\"):  # else it goes on
            lines.append(f"set_up {_quote(line)}")
    return lines


def _secret(variable: str, file: str) -> list[str]:
    # The value stays on the node: the script names only the file.
    problem = (
        f"secrets: {variable} is wrong because {file} is missing, empty or not readable on this "
        "node; put it there."
    )
    return [
        f'{variable}="$(cat -- {_quote(file)} 2>/dev/null)"',
        f'[ -n "${variable}" ] || {{ echo {_quote(problem)} >&2; exit 78; }}',
        f"export {variable}",
    ]


def _step(cpus: int) -> list[str]:
    """How a command is started once on every node."""
    # Since 22.05, srun does not take --cpus-per-task over from the job.
    return ["srun", "--export=ALL", "--cpu-bind=none", f"--cpus-per-task={cpus}"]


def _alone(profile: SlurmProfile) -> str:
    """What comes before a command that is run once, in the job's container."""
    match profile.container:
        case Pyxis():
            return _join(ALONE) + ' "${container[@]}" '
        case Apptainer():
            return '"${container[@]}" '
    return ""


def _container(profile: SlurmProfile) -> list[str]:
    match profile.container:
        case Apptainer(image=image, binds=binds):
            gpu = ["--nv"] if profile.gpus_per_node else []
            bound = [f"--bind={bind}" for bind in binds]
            return ["apptainer", "exec", *gpu, *bound, f"--pwd={profile.workdir}", image]
        case Pyxis(image=image, mounts=mounts):
            mounted = [f"--container-mounts={','.join(mounts)}"] if mounts else []
            # Else commands begin in the image's own folder, and relative paths there.
            return [
                f"--container-image={image}",
                *mounted,
                f"--container-workdir={profile.workdir}",
            ]
    return []


def _time(minutes: int) -> str:
    days, rest = divmod(minutes, 24 * 60)
    return f"{days}-{rest // 60:02d}:{rest % 60:02d}:00"


def _quote(text: str) -> str:
    try:
        refuse_unprintable("an argument", text, allowed="\n\t")
    except ValueError as problem:
        raise ConfigError(f"{problem}; remove it.") from None
    return quote(text)


def _array(name: str, words: list[str]) -> str:
    """An array of bash."""
    return f"{name}=({_join(words)})"


def _join(arguments: list[str] | tuple[str, ...]) -> str:
    for argument in arguments:
        _quote(argument)
    return join(arguments)
