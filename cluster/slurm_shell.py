"""The bash functions of a run's script: who is avoided, which failures count, what goes on."""

from cluster.requeue import ALIKE_STARTS

SCRIPT = "job.sbatch"
# What the jobs of a run tell each other in `slurm/` of its folder: those that wait until it has
# ended well, and those submitted ahead, to go on where one stops.
DEPENDENTS, AHEAD = "dependents", "ahead"
BEHIND = "behind"  # the argument of a job that was submitted ahead

FOLLOW = (
    "# Traps run only while bash itself waits, and interrupt that.",
    "follow() {",
    '  "$@" &',
    "  local pid=$!",
    '  while :; do wait "$pid"; rc=$?; kill -0 "$pid" 2>/dev/null || break; done',
    "}",
)
# Of bad nodes those whose time is not over; a name without a time is an operator's.
BAD_NODES = (
    "bad_nodes() {",
    "  awk -v now=\"$(date -u +%Y-%m-%dT%H:%M:%S)\" 'NF == 1 || $2 > now {print $1}' \\",
    '    "$T2V_BAD_NODES" 2>/dev/null | sort -u',
    "}",
)
# Starts that fail before anything could write them into the run record are counted here.
FAILED_START = (
    "failed_start() {",
    '  echo "$SLURM_JOB_ID $1 $rc" >>"$run_dir/slurm/failed_starts"',
    f'  failed=$(tail -n {ALIKE_STARTS} -- "$run_dir/slurm/failed_starts" |'
    ' grep -cx "$SLURM_JOB_ID $1 $rc")',
    f'  [ "$failed" -lt {ALIKE_STARTS} ] && return',
    '  echo "not requeued because three starts in a row ended alike: $1 with $rc; see above" >&2',
    '  exit "$rc"',
    "}",
)


def avoid(nodes: int, excluded: str) -> list[str]:
    """Finds out whom the next job must not get, besides those that the site excludes."""
    return [
        "# Which nodes the next one must not get; where more are bad than it needs, none is told.",
        "avoid() {",
        "  bad=$(bad_nodes)",
        f'  [ -n "$bad" ] && [ "$(wc -l <<<"$bad")" -le {nodes} ] &&',
        f'    avoided={excluded}"$(paste -sd, - <<<"$bad")"',
        "}",
    ]


def requeue(restart_limit: int) -> list[str]:
    """This job once more, on other nodes where some are bad; $1 seconds later."""
    return [
        "requeue() {",
        f'  if [ "$attempt" -lt {restart_limit} ]; then',
        "    avoid",
        "    local may_avoid=$?",
        "    trap '' TERM  # which comes with the requeue, to whoever is about to tell of the rest",
        '    if scontrol requeue "$SLURM_JOB_ID"; then',
        '      [ "$may_avoid" = 0 ] &&',
        '        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$avoided"',
        '      [ "${1:-0}" -gt 120 ] &&',
        '        scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$1"',
        "      sleep 120",
        "    fi",
        "    exit 75",
        "  fi",
        '  echo "not requeued because it has restarted $attempt times; see t2v status" >&2',
        "}",
    ]


def go_on_ahead(alone: str) -> list[str]:
    """The same where jobs wait already: one that has nothing left to do ends, and one that stops
    tells the others whom to avoid. Where nodes may not tell it, a job that gets a bad one says so.
    """
    return [
        f'if [ "${{1-}}" = {BEHIND} ]; then',
        f"""  case $({alone}t2v status "$run_dir" --decide) in""",
        "  done) exit 0 ;;",
        '  stop) echo "not started: the run would fail alike; see t2v status" >&2; exit 1 ;;',
        "  esac",
        "fi",
        "tell_ahead() {",
        "  avoid || return 0",
        f'  for job in $(cat -- "$run_dir/slurm/{AHEAD}" 2>/dev/null); do',
        '    scontrol update JobId="$job" ExcNodeList="$avoided" 2>/dev/null',
        "  done",
        "}",
        "requeue() { tell_ahead; exit 75; }  # the next of the jobs that wait goes on",
    ]


def take_over() -> list[str]:
    """What is done where a job may not begin on a node."""
    return [
        "  # Only a pending job can be told to avoid nodes, so a new one takes this one's place.",
        '  if [ "$may_avoid" = 0 ]; then',
        f'    new=$(sbatch --parsable --exclude="$avoided" "$launch/{SCRIPT}")',
        f'    for job in $(cat -- "$run_dir/slurm/{DEPENDENTS}" 2>/dev/null); do',
        '      [ -n "$new" ] && scontrol update JobId="$job" Dependency="afterok:${new%%;*}"',
        "    done",
        '    echo "job ${new:-none: submit it anew} avoids $bad" >&2',
        "  fi",
    ]
