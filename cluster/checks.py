"""What a check of a node finds, and how long nodes wait for it and for each other."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# Nodes start at different speeds; in a job's first step they also import the image.
MEETING_SECONDS = 600
# Longer than any check of a healthy node takes, and than ranks take to start: what is later hangs.
CHECK_SECONDS, STARTING_SECONDS = 120, 60
# From the first node's start to the judgement: they come, look at themselves and try the fabric.
PREFLIGHT_SECONDS = MEETING_SECONDS + 2 * CHECK_SECONDS + STARTING_SECONDS

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One finding. `exit_code` is what it means if every node says the same; 0: nothing but that
    all of them are bad. A node alone is at fault for what `is_of_node`."""

    name: str
    verdict: Verdict
    found: str
    exit_code: int = 0
    is_of_node: bool = False


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that stop a run."""
    return [check for check in checks if check.verdict == "failed"]
