"""Whether an attempt that ended is worth another."""

from typing import Any, Literal

from t2v.attempt.record import FAILURES_IN_A_ROW, PREEMPTED

Decision = Literal["done", "requeue", "stop"]

# What another attempt at the same recipe, data and folder would meet again.
HOPELESS = frozenset({65, 66, 70, 73, 78})
# Starts in a row that failed alike, before the run owned its folder.
ALIKE_STARTS = 3


def decide(ending: dict[str, Any], failures: int) -> Decision:
    """What to do after an attempt has ended, however it did.

    Preemption, hangs, storage and deaths without a word are worth another attempt; what would come
    again is not, nor is a third failure in a row without a newer checkpoint.
    """
    code = ending["exit_code"]
    if ending["state"] == "done":
        return "done"
    is_hopeless = code in HOPELESS or failures >= FAILURES_IN_A_ROW
    return "stop" if is_hopeless and code != PREEMPTED else "requeue"
