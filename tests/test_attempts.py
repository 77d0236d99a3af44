"""The run record: numbers that rise, ends that killed attempts could not write, and the breaker."""

import pytest

from data_pipeline.errors import ConfigError, RunLocked
from t2v.attempt.record import (
    append_attempt,
    failures_in_a_row,
    killed_line,
    next_number,
    read_attempts,
    refuse_if_overtaken,
    refuse_restart_storm,
    unfinished,
)


def start(number: int, recipe: str = "r") -> dict:
    return {"attempt": number, "event": "start", "config_fingerprint": recipe, "nonce": str(number)}


def end(number: int, state: str = "failed", **fields) -> dict:
    return {"attempt": number, "event": "end", "state": state, "exit_code": 1, "step": 5, **fields}


def attempts(*states: str, recipe: str = "r") -> list[dict]:
    pairs = [[start(n, recipe), end(n, state)] for n, state in enumerate(states, start=1)]
    return [line for pair in pairs for line in pair]


def numbers(lines: list[dict]) -> list[int]:
    return [line["attempt"] for line in lines]


def test_half_lines_cost_only_themselves(tmp_path):
    append_attempt(tmp_path, start(1))
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(b'{"attempt": 1, "event": "en')
    append_attempt(tmp_path, start(2))
    lines = read_attempts(tmp_path)
    assert lines == [start(1), start(2)]
    assert next_number(lines) == 3
    assert next_number(read_attempts(tmp_path / "none")) == 1


def test_attempt_without_an_end_was_killed():
    lines = [start(1), end(1, "preempted"), start(2), start(3)]
    assert numbers(unfinished(lines)) == [2, 3]
    lines += [killed_line(line) for line in unfinished(lines)]
    assert unfinished(lines) == []
    assert numbers(failures_in_a_row(lines, fingerprint="r", progress=0)) == [2, 3]


def test_failures_count_since_the_last_progress_and_for_this_recipe():
    """R28."""

    def count(lines, recipe="r", progress=0):
        return numbers(failures_in_a_row(lines, fingerprint=recipe, progress=progress))

    lines = attempts("failed", "failed", "preempted", "failed")
    assert count(lines) == [1, 2, 4]
    assert count(lines, progress=1) == [2, 4]
    assert count(lines, progress=4) == []
    assert count(lines, recipe="another") == []
    assert count([*lines, {"attempt": 5, "event": "clear"}]) == []
    assert count(attempts("failed", "done", "failed")) == [3]
    assert count([start(1), end(1, exit_code=130)]) == []


def test_third_failure_in_a_row_is_the_last(tmp_path):
    """R28."""
    lines = attempts("failed", "failed")
    failed = failures_in_a_row(lines, fingerprint="r", progress=0)
    refuse_restart_storm(tmp_path, failed)
    failed.append(end(3, reason="rank 1: out of paper"))
    with pytest.raises(ConfigError, match="the last one at step 5: rank 1: out of paper") as found:
        refuse_restart_storm(tmp_path, failed)
    assert "--clear-failures" in str(found.value)
    assert found.value.exit_code == 78


def test_only_the_newest_attempt_may_commit(tmp_path):
    """R23: fencing."""
    append_attempt(tmp_path, start(1))
    refuse_if_overtaken(tmp_path, 1, "1")
    append_attempt(tmp_path, start(2))
    refuse_if_overtaken(tmp_path, 2, "2")
    with pytest.raises(RunLocked, match="attempt 1 may not commit because attempt 2"):
        refuse_if_overtaken(tmp_path, 1, "1")
