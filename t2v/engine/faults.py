"""Faults on demand, so that tests can break a run where it hurts: the only such mechanism.

`T2V_FAULT="site:rank:nth:action[;...]"`, unset in real runs: `forward:1:7:hang` has rank 1 hang in
the forward pass of step 7. `nth` is the step where a site belongs to one, else a count of the times
this process came by. The file that `T2V_FAULT_LOG` names gets a line for each fault.
"""

import errno
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import ConfigError

STEP_SITES = ("data", "forward", "collective", "step")
COUNTED_SITES = (
    *("setup", "checkpoint.copy", "checkpoint.write", "checkpoint.manifest"),
    *("checkpoint.rename", "checkpoint.retire"),
)
ACTIONS = ("kill", "term", "hang", "slow", "crash", "nan", "enospc", "eio")
SLOW_SECONDS = 5.0


class Fault(NamedTuple):
    """What happens at a site, on a rank, at its nth time."""

    site: str
    rank: int
    nth: int
    action: str


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Faults of a `T2V_FAULT`; ConfigError names what is unknown."""
    return tuple(_parse(part) for part in text.split(";") if part)


def _parse(text: str) -> Fault:
    fields = text.split(":")
    if len(fields) != 4 or not fields[1].isdecimal() or not fields[2].isdecimal():
        raise ConfigError(
            f"T2V_FAULT: {text!r} is wrong because it is not site:rank:nth:action; correct it, or "
            "unset T2V_FAULT."
        )
    site, rank, nth, action = fields
    sites = STEP_SITES + COUNTED_SITES
    for name, value, known in (("site", site, sites), ("action", action, ACTIONS)):
        if value not in known:
            raise ConfigError(
                f"T2V_FAULT: {name} {value!r} is wrong because it is none of {', '.join(known)}; "
                "correct it, or unset T2V_FAULT."
            )
    if action == "nan" and site != "forward":
        raise ConfigError(
            f"T2V_FAULT: action 'nan' is wrong at site {site!r} because only 'forward' makes "
            "numbers; use forward."
        )
    return Fault(site, int(rank), int(nth), action)


_faults: tuple[Fault, ...] = ()
_times: Counter[str] = Counter()


def arm_faults() -> None:
    """Take the faults of the environment, which a run does once as it begins."""
    global _faults
    _times.clear()
    _faults = parse_faults(os.environ.get("T2V_FAULT", ""))


def fault(site: str, step: int = 0) -> bool:
    """Break this process if it is its turn; true asks the caller to make its numbers NaN."""
    if not _faults:
        return False
    _times[site] += 1
    nth = step if site in STEP_SITES else _times[site]
    rank = int(os.environ.get("RANK", "0"))
    for planned in _faults:
        if planned[:3] == (site, rank, nth):
            return _break(planned)
    return False


def _break(planned: Fault) -> bool:
    if path := os.environ.get("T2V_FAULT_LOG"):
        with Path(path).open("a", encoding="utf-8") as log:
            log.write(f"{time.time()} {':'.join(map(str, planned))}\n")
    match planned.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            while True:
                time.sleep(3600)
        case "slow":
            time.sleep(SLOW_SECONDS)
        case "crash":
            raise RuntimeError(f"a fault was asked for: {':'.join(map(str, planned))}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), planned.site)
        case "eio":
            raise OSError(errno.EIO, os.strerror(errno.EIO), planned.site)
    return planned.action == "nan"
