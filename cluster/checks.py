"""What a check of a node finds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

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
