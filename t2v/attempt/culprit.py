"""Which rank hangs, found out by where all of them are."""

import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, ValidationError

from data_pipeline.printable import say
from data_pipeline.strict import Strict
from t2v.attempt.failure import HANG, LONGEST_QUOTE, Failure, record_failure
from t2v.attempt.run_folder import timestamp

# A shared disk may hide a new file from other hosts for half a minute.
ANSWER_SECONDS = 40.0
POSITION = "position-rank-{:05d}.json"


class Position(Strict):
    """Where a rank is."""

    rank: int
    host: str
    section: str
    step: int
    entered: int  # sections so far: all ranks pass the same ones in the same order
    seconds: float
    waits: bool
    collectives: dict[str, tuple[int, int, int]] = Field(
        default={}, strict=False, description="by group: launched, begun, ended"
    )
    memory_gib: float
    samples: tuple[str, ...]
    stack: str


def culprit(positions: Iterable[Position], world_size: int) -> int:
    """The rank that hangs: one that does not answer; else the one that is behind: in sections, then
    in what it has launched of the collectives that somebody waits for, then in what its device has
    begun of them; of those that are equally far, one that does not wait for others, and the longest
    there."""
    found = {position.rank: position for position in positions}
    awaited = {
        group
        for position in found.values()
        for group, (launched, _, ended) in position.collectives.items()
        if ended < launched
    }

    def done(position: Position) -> tuple[int, int]:
        counts = [position.collectives.get(group, (0, 0, 0)) for group in awaited]
        return sum(launched for launched, *_ in counts), sum(begun for _, begun, _ in counts)

    silent = [rank for rank in range(world_size) if rank not in found]
    if silent:
        return silent[0]

    def order(rank: int) -> tuple:
        at = found[rank]
        return at.entered, done(at), at.waits, -at.seconds

    return min(found, key=order)


def exchange(folder: Path, mine: Position, world_size: int) -> list[Position]:
    """Positions of all ranks that answer in time."""
    found = {mine.rank: mine}
    with contextlib.suppress(OSError):
        path = folder / POSITION.format(mine.rank)
        staging = path.with_suffix(".part")
        staging.write_text(mine.model_dump_json(), encoding="utf-8")
        staging.replace(path)
    deadline = time.monotonic() + ANSWER_SECONDS
    while len(found) < world_size and time.monotonic() < deadline:
        time.sleep(0.1)
        for rank in set(range(world_size)) - set(found):
            with contextlib.suppress(OSError, ValidationError):
                text = (folder / POSITION.format(rank)).read_text(encoding="utf-8")
                found[rank] = Position.model_validate_json(text)
    return list(found.values())


def tell_hang(
    folder: Path | None, position: Position, *, rank: int | None = None, at: str = ""
) -> None:
    """One line and the stack on stderr, and in `folder` the record of the rank that hangs."""
    rank = position.rank if rank is None else rank
    if rank == position.rank:
        step = position.step + (position.section != "checkpoint")
        reason = (
            f"rank {rank} on {position.host} hangs in section '{position.section}' of step "
            f"{step} since {position.seconds:.0f} s"
        )
        stack = position.stack
    else:
        reason = f"rank {rank} does not answer while others wait for it"
        stack = f"rank {rank} left none; rank {position.rank} waits at:\n{position.stack}"
    if folder is not None:
        record = Failure(
            rank=rank,
            host=position.host if rank == position.rank else "unknown",
            exit_code=HANG,
            reason=reason,
            section=position.section,
            step=position.step,
            at=at or timestamp(),
            stack=stack,
            samples=position.samples,
            memory_gib=position.memory_gib,
        )
        record_failure(folder, record)
    say(f"{reason}; its stack:\n{stack}", to=sys.stderr, most=LONGEST_QUOTE)
