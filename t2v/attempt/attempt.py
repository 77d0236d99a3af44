"""One attempt at a run: who owns the folder, what it leaves behind, however it ends."""

import contextlib
import os
import re
import threading
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import ConfigError, InputMissing, UserError, exit_code_of
from data_pipeline.store import storage
from t2v.attempt import preemption
from t2v.attempt.alarm import heard_alarm, ring
from t2v.attempt.failure import Failure, first_failure, wait_until
from t2v.attempt.failure import record_failure as record
from t2v.attempt.last_word import write_page
from t2v.attempt.record import FILE as ATTEMPTS
from t2v.attempt.record import (
    append_attempt,
    end_line,
    failures_in_a_row,
    job_id,
    killed_line,
    next_number,
    read_attempts,
    refuse_if_overtaken,
    refuse_restart_storm,
    unfinished,
)
from t2v.attempt.run_folder import LOCK, State, StatusFile, locked, timestamp, whoami
from t2v.attempt.watchdog import Watchdog, failure_here
from t2v.checkpoint.finding import list_checkpoints
from t2v.checkpoint.manifest import fingerprint, present_versions, read_manifest
from t2v.engine.world import World

FOLLOW_SECONDS = 4.0
LONGEST_REASON = 4000  # characters; some libraries put whole files into their errors
RECORDS = ("status.json", "failure.md")
# What ranks leave in an attempt's folder.
OF_RANKS = re.compile(
    r"\.?alarm\.json(\.\d+)?|(failure|position|collectives)-rank-\d{5}\.(json|part)"
)


class Attempt:
    """All ranks have one; rank 0's writes the run record, the status and the page."""

    def __init__(
        self,
        run_dir: Path,
        number: int,
        world: World,
        watchdog: Watchdog,
        status: StatusFile | None,
        nonce: str,
    ) -> None:
        self.run_dir, self.number, self.world, self.watchdog = run_dir, number, world, watchdog
        self.logs = run_dir / "logs" / f"attempt-{number:04d}"
        self.status, self.nonce = status, nonce
        self.is_lost = False
        self._ending = threading.Lock()
        self._ended = self._failed = False

    def may_commit(self) -> None:
        """RunLocked where a newer attempt owns the run; asked right before each commit."""
        refuse_if_overtaken(self.run_dir, self.number, self.nonce)

    def is_overtaken(self) -> bool:
        """Whether the folder belongs to a newer attempt; training learns of it by `is_lost`."""
        try:
            self.may_commit()
        except UserError:
            self.is_lost = True
        return self.is_lost

    def finish(self, *, is_done: bool) -> int:
        """Training is over, or saved to go on another time; the exit code."""
        exit_code = 0 if is_done else preemption.EXIT_CODE
        if self.world.is_first:
            preemption.acknowledge(self.run_dir)
            if is_done:
                with contextlib.suppress(OSError):
                    (self.run_dir / "failure.md").unlink(missing_ok=True)
        self.end("done" if is_done else "preempted", exit_code=exit_code)
        return exit_code

    def end(self, state: State, *, exit_code: int, reason: str | None = None) -> None:
        """The last word of this attempt; only the first such call counts."""
        with self._ending:
            if self._ended or self.status is None:
                return
            self._ended = True
            # A full disk may be the very failure; a zombie has nothing to say.
            with contextlib.suppress(OSError):
                if self.is_overtaken():
                    return
                line = end_line(self.number, state, exit_code, reason, self.status.facts)
                line["step"] = max(self.watchdog.step, line["step"])
                append_attempt(self.run_dir, line)
                self.status.write(state, exit_code=exit_code, reason=reason)

    def fail(self, error: BaseException) -> None:
        """Say what failed, first of all ranks or after them; a rank that only follows another one
        raises that one's failure."""
        if self._failed:
            return
        self._failed = True
        leave_where_compilers_were_stopped(self, error)
        exit_code = exit_code_of(error)
        rank = getattr(error, "rank", None)
        at, reason = timestamp(), reason_of(error)
        is_ours = rank in (None, self.world.rank)
        if rank is None and from_a_collective(error):
            # Its peers are gone: the first to go has rung, or was killed.
            is_ours = not wait_until(lambda: heard_alarm(self.logs) is not None, FOLLOW_SECONDS)
            reason = f"another rank is gone without a word, killed or cut off: {reason}"
        if is_ours:
            at = ring(
                self.logs, rank=self.world.rank, is_hang=False, exit_code=exit_code, reason=reason
            )
            alarm = heard_alarm(self.logs)
            if isinstance(error, UserError) and alarm and alarm["reason"] == reason:
                # All ranks may find the same, and one is enough to say it.
                error.rank = alarm["rank"]
                is_ours = error.rank == self.world.rank
        if is_ours:
            stack = "".join(traceback.format_exception(error))
            record(self.logs, failure_here(self.watchdog, exit_code, reason, stack, at))
            self.watchdog.close(exit_code)
            self.conclude(first_failure(self.logs), exit_code)
            return
        wait_until(lambda: first_failure(self.logs) is not None, 2 * FOLLOW_SECONDS)
        first, alarm = first_failure(self.logs), heard_alarm(self.logs)
        exit_code = first.exit_code if first else alarm["exit_code"] if alarm else exit_code
        self.watchdog.close(exit_code, FOLLOW_SECONDS * 3)
        self.conclude(first, exit_code)
        if not isinstance(error, UserError):
            raise OtherRank(first, exit_code) from error

    def conclude(self, failure: Failure | None, exit_code: int) -> None:
        """Rank 0 tells of the failure that came first; also called on the way to a sudden end."""
        if self.status is None:
            return
        if failure is None and exit_code == preemption.EXIT_CODE:
            self._leave()
            return
        if failure is None:
            self.end("failed", exit_code=exit_code)
            return
        with contextlib.suppress(OSError):
            if not self.is_overtaken():
                write_page(failure, self.run_dir, self.logs, self.number)
        self.end("failed", exit_code=failure.exit_code, reason=failure.reason)

    def leave(self) -> None:
        """A request to stop came while there was nothing to save, or came twice."""
        exit_code = preemption.EXIT_CODE
        ring(self.logs, rank=self.world.rank, is_hang=False, exit_code=exit_code)
        if self.status is not None:
            self._leave()

    def _leave(self) -> None:
        preemption.acknowledge(self.run_dir)
        self.end("preempted", exit_code=preemption.EXIT_CODE)


class Preempted(UserError):
    """A request to stop was answered without a save."""

    exit_code = preemption.EXIT_CODE


class OtherRank(UserError):
    """Another rank's failure, which that rank has told."""

    def __init__(self, first: Failure | None, exit_code: int) -> None:
        reason = first.reason if first else "it left"
        super().__init__(f"rank {first.rank if first else 0}: {reason}")
        self.rank = first.rank if first else -1
        self.exit_code = exit_code


def reason_of(error: BaseException) -> str:
    """An error in a line or a few."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if len(text) <= LONGEST_REASON:
        return text
    return f"{text[: LONGEST_REASON - 20]} ... ({len(text):,} characters)"


def from_a_collective(error: BaseException) -> bool:
    """Whether an error came out of waiting for another rank."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("torch/distributed/" in frame.filename for frame in frames[-6:])


def came_of_compiling(error: BaseException) -> bool:
    """Whether torch's compilers failed."""
    kinds = (kind.__module__ for kind in type(error).__mro__)
    return any(module.startswith(("torch._dynamo", "torch._inductor")) for module in kinds)


def leave_where_compilers_were_stopped(attempt: Attempt, error: BaseException) -> None:
    """Preempted where that is what failed: a scheduler's signal reaches compilers, too, and nothing
    was computed that could be saved."""
    if preemption.requested(attempt.run_dir) and came_of_compiling(error):
        attempt.leave()
        raise Preempted(
            f"{attempt.run_dir}: was told to stop while it compiled; start it again."
        ) from error


@contextlib.contextmanager
def begin_attempt(
    run_dir: Path,
    world: World,
    watchdog: Watchdog,
    *,
    engine: str,
    total_steps: int,
    recipe: dict[str, Any],
    clear_failures: bool,
) -> Iterator[Attempt]:
    """Own the run folder; a failure leaves its reason, a refused first start leaves nothing.
    `recipe` tells apart restarts of the same from starts of something else."""
    with contextlib.ExitStack() as exits:
        status = StatusFile(run_dir, step=0, total_steps=total_steps)
        mine = status if world.is_first else None
        nonce = uuid.uuid4().hex

        def own() -> int:
            refuse_strangers(run_dir, recipe)
            made = storage.absent_folders(str(run_dir))
            exits.enter_context(locked(run_dir))
            if made:
                exits.push(lambda kind, error, trace: _leave_nothing(run_dir, made, error))
            told = {"nonce": nonce, "world_size": world.world_size, "engine": engine}
            told["config_fingerprint"] = fingerprint(recipe)
            return _begin(run_dir, status, told, clear_failures=clear_failures)

        number = world.on_first(own)
        attempt = Attempt(run_dir, number, world, watchdog, mine, nonce)
        status.is_mine = lambda: not attempt.is_overtaken()
        watchdog.serve(
            attempt.logs, rank=world.rank, world_size=world.world_size, on_end=attempt.conclude
        )
        exits.enter_context(preemption.leaving(run_dir, attempt.leave))
        try:
            yield attempt
        except BaseException as error:
            attempt.fail(error)
            raise


def _begin(run_dir: Path, status: StatusFile, told: dict[str, Any], *, clear_failures: bool) -> int:
    """Write the attempt's first line; its number. ConfigError where failures repeat."""
    lines = read_attempts(run_dir)
    for start in unfinished(lines):
        lines.append(killed_line(start))
        append_attempt(run_dir, lines[-1])
    number = next_number(lines)
    preemption.forget_old_requests(run_dir, number)
    committed = [info for info in list_checkpoints(run_dir) if info.problem is None]
    facts = {}
    if committed:
        facts = {
            "last_checkpoint": committed[-1].step,
            "last_checkpoint_at": committed[-1].saved_at,
        }
    status.note({"attempt": number, "job_id": job_id(), "world_size": told["world_size"], **facts})
    if clear_failures:
        lines.append({"attempt": number, "event": "clear", "at": timestamp()})
        append_attempt(run_dir, lines[-1])
    progress = read_manifest(committed[-1].folder).attempt if committed else 0
    try:
        failed = failures_in_a_row(lines, fingerprint=told["config_fingerprint"], progress=progress)
        refuse_restart_storm(run_dir, failed)
    except ConfigError as refusal:
        status.write("failed", exit_code=refusal.exit_code, reason=str(refusal))
        raise
    start = {
        "attempt": number,
        "event": "start",
        "at": timestamp(),
        **whoami(),
        **told,
        "job_id": job_id(),
        "versions": present_versions(),
        "step": committed[-1].step if committed else 0,
    }
    append_attempt(run_dir, start)
    status.write("starting")
    return number


def refuse_strangers(run_dir: Path, recipe: dict[str, Any]) -> None:
    """ConfigError where a folder that is no run has a file that a run would replace, and for what
    is no folder; the recipe itself may lie there."""
    if (run_dir / ATTEMPTS).exists():
        return
    if os.path.lexists(run_dir) and not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: is no folder; choose another run_dir, or move it away.")
    for name in ("config.yaml", "metrics.jsonl", "quarantine.jsonl", *RECORDS):
        path = run_dir / name
        if os.path.lexists(path) and not (name == "config.yaml" and _holds(path, recipe)):
            raise ConfigError(
                f"{path}: is there already, but {run_dir} is no run; choose another run_dir, or "
                "move the file away."
            )


def _holds(path: Path, recipe: dict[str, Any]) -> bool:
    try:
        return yaml.safe_load(path.read_bytes()) == recipe
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _leave_nothing(run_dir: Path, made: list[str], error: BaseException | None) -> None:
    """Take back what this start wrote, and the folders it made, where it was refused before it
    trained; the lock is held, so that no other start has written there."""
    trained = (run_dir / "metrics.jsonl").exists()
    if isinstance(error, (ConfigError, InputMissing)) and not trained:
        logs = run_dir / "logs" / "attempt-0001"
        records = [path for path in logs.glob("*") if OF_RANKS.fullmatch(path.name)]
        files = [run_dir / name for name in ("config.yaml", *RECORDS, ATTEMPTS, LOCK)]
        folders = [*made, run_dir / "checkpoints", logs.parent, logs]
        storage.take_back(map(str, [*records, *files]), map(str, folders))
