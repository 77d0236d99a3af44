"""How a run is, and what a scheduler should do with it, told by its folder alone."""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.requeue import HOPELESS
from cluster.status import NodeRecord, run_status
from cluster.status_view import print_statuses, spell, to_json
from data_pipeline.errors import InputMissing
from data_pipeline.terminal import Terminal
from t2v.attempt.record import append_attempt
from t2v.cli import main

NOW = 1_800_000_000.0


def iso(seconds_ago: float) -> str:
    return datetime.fromtimestamp(NOW - seconds_ago, UTC).isoformat()


def write_status(run_dir: Path, state: str, *, seconds_ago: float = 1.0, **facts) -> None:
    facts = {"step": 10, "total_steps": 100, "samples_per_second": 8.0, **facts}
    status = {"state": state, **facts, "updated": iso(seconds_ago)}
    (run_dir / "status.json").write_text(json.dumps(status))


def write_node(run_dir: Path, attempt: int, *, started_ago: float, **facts) -> None:
    folder = run_dir / "logs" / f"attempt-{attempt:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"node": "node-00000", "host": "n1", "started": NOW - started_ago, **facts}
    (folder / "node-00000.json").write_text(json.dumps(record))


def write_attempts(run_dir: Path, *ends: dict | None) -> None:
    """Attempts that begin at step 0; None ends without a word."""
    for number, end in enumerate(ends, start=1):
        start = {"attempt": number, "event": "start", "step": 0, "config_fingerprint": "x"}
        append_attempt(run_dir, start)
        if end is not None:
            append_attempt(run_dir, {"attempt": number, "event": "end", "step": 3, **end})


def write_checkpoint(run_dir: Path, step: int, *, attempt: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"attempt": attempt}))
    os.utime(folder / "manifest.json", (NOW - 60, NOW - 60))


FAILED = {"state": "failed", "exit_code": 1}


def test_a_running_run_tells_rate_time_left_and_data(tmp_path):
    write_status(tmp_path, "running")
    write_checkpoint(tmp_path, 8, attempt=1)
    line = {"step": 10, "samples_per_second": 8.0, "step_seconds": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + '{"step": 11, "sam')
    (tmp_path / "quarantine.jsonl").write_text("{}\n{}\n")
    status = run_status(tmp_path, now=NOW)
    assert (status.state, status.step, status.last_checkpoint) == ("running", 10, 8)
    assert status.eta_seconds == 90 * 0.5
    assert status.last_checkpoint_age_seconds == pytest.approx(60)
    assert status.quarantined_share == 2 / (10 * 4)
    assert not status.is_stale


def test_neither_a_clock_that_is_ahead_nor_fewer_steps_give_a_time_below_zero(tmp_path):
    write_status(tmp_path, "running", seconds_ago=-3600.0, step=10, total_steps=5)
    metrics = {"step": 10, "step_seconds": 2.0, "samples_per_second": 4.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    manifest = tmp_path / "checkpoints" / "step-00000010" / "manifest.json"
    manifest.write_text("{}")
    os.utime(manifest, (NOW + 60, NOW + 60))
    status = run_status(tmp_path, now=NOW)
    assert (status.silent_seconds, status.last_checkpoint_age_seconds, status.eta_seconds) == (
        0.0,
        0.0,
        0.0,
    )
    assert not status.is_stale


def test_a_running_run_that_is_silent_is_called_stale(tmp_path):
    write_status(tmp_path, "running", seconds_ago=4000)
    status = run_status(tmp_path, now=NOW)
    assert status.is_stale
    console = Terminal(record=True, width=200)
    print_statuses([status], console)
    assert "silent for 67 min" in console.export_text()
    write_status(tmp_path, "done", seconds_ago=4000)
    assert not run_status(tmp_path, now=NOW).is_stale


@pytest.mark.parametrize(
    ("state", "facts", "decision"),
    [
        ("done", {}, "done"),
        ("preempted", {}, "requeue"),
        *[("failed", {"exit_code": code}, "stop") for code in sorted(HOPELESS)],
        *[("failed", {"exit_code": code}, "requeue") for code in (1, 71, 74, 137)],
        ("failed", {}, "requeue"),
        ("running", {}, "requeue"),
        ("starting", {}, "requeue"),
    ],
)
def test_the_decision_follows_the_exit_code(tmp_path, state, facts, decision):
    write_status(tmp_path, state, **facts)
    write_node(tmp_path, 1, started_ago=100.0)
    assert run_status(tmp_path, now=NOW).decision == decision


def test_the_third_failure_without_a_newer_checkpoint_is_the_last(tmp_path):
    write_status(tmp_path, "failed", exit_code=1)
    write_attempts(tmp_path, FAILED, None)
    assert run_status(tmp_path, now=NOW).decision == "requeue"
    write_attempts(tmp_path, FAILED, None, FAILED)
    assert run_status(tmp_path, now=NOW).decision == "stop"


def test_a_newer_checkpoint_begins_the_count_anew(tmp_path):
    write_status(tmp_path, "failed", exit_code=1)
    write_attempts(tmp_path, FAILED, FAILED, FAILED)
    write_checkpoint(tmp_path, 5, attempt=2)
    status = run_status(tmp_path, now=NOW)
    assert (status.failures_without_progress, status.decision) == (1, "requeue")
    assert status.restarts == 2


def test_an_attempt_that_goes_on_is_no_failure(tmp_path):
    write_status(tmp_path, "running")
    write_attempts(tmp_path, FAILED, None)
    assert run_status(tmp_path, now=NOW).failures_without_progress == 1


def test_an_attempt_that_never_owned_the_folder_has_its_wrappers_word(tmp_path):
    write_status(tmp_path, "preempted", seconds_ago=1000)
    write_node(tmp_path, 2, started_ago=50, ended=NOW - 20, exit_code=78, reason="seed: 3 -> 4")
    status = run_status(tmp_path, now=NOW)
    assert (status.state, status.exit_code, status.decision) == ("failed", 78, "stop")
    assert status.reason == "seed: 3 -> 4"


def test_a_folder_that_says_nothing_is_worth_another_attempt(tmp_path):
    (tmp_path / "status.json").write_text("not json")
    assert run_status(tmp_path, now=NOW).decision == "requeue"


def test_node_records_of_another_version_are_read_as_far_as_known(tmp_path):
    write_node(tmp_path, 1, started_ago=1, invented=3)
    (tmp_path / "logs" / "attempt-0002").mkdir()
    assert run_status(tmp_path, now=NOW).state == "starting"
    assert NodeRecord("node-00000", "n1", 0.0).exit_code is None


def test_the_command_answers_in_one_word_or_in_json(tmp_path, capsys):
    write_status(tmp_path, "done", seconds_ago=NOW - time.time())
    assert main(["status", str(tmp_path), "--decide"]) == 0
    assert capsys.readouterr().out == "done\n"
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "done"
    assert json.loads(to_json(run_status(tmp_path)))["total_steps"] == 100


def test_many_runs_are_one_table_or_a_line_of_json_each(tmp_path, capsys):
    for name, state in (("a", "running"), ("b", "failed")):
        (tmp_path / name).mkdir()
        write_status(tmp_path / name, state, reason="no finite [/]", seconds_ago=NOW - time.time())
    (tmp_path / "notes").mkdir()  # as the shell's runs/* may give it
    folders = [str(tmp_path / name) for name in ("a", "b", "notes")]
    assert main(["status", *folders, "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [status["state"] for status in told] == ["running", "failed"]
    assert main(["status", *folders]) == 0
    (tmp_path / "a" / "status.json").write_text("")
    print_statuses([run_status(Path(folder)) for folder in folders[:2]])
    out = capsys.readouterr().out
    assert (out.count("failed"), out.count(" ago")) == (2, 3)  # `a` has said nothing by then
    assert main(["status", folders[1], "--watch"]) == 0  # has ended: shown once
    assert "failed" in capsys.readouterr().out
    assert main(["status", *folders, "--decide"]) == 78
    assert main(["status", folders[2]]) == 66


def test_no_run_folder_is_missing_input(tmp_path):
    with pytest.raises(InputMissing, match="no such run folder"):
        run_status(tmp_path / "none")


def test_spells_of_time_are_short():
    assert [spell(s) for s in (None, 5, 600, 11520)] == ["", "5 s", "10 min", "3 h 12 min"]
    assert spell(3 * 3600 - 2) == "3 h 0 min"


@pytest.mark.parametrize(
    "damaged",
    [
        {"step": "x", "total_steps": "many", "samples_per_second": "fast"},
        {"step": float("nan"), "total_steps": float("inf"), "samples_per_second": float("nan")},
        {"state": 5, "exit_code": "75", "updated": 3, "reason": ["a"], "host": {}},
    ],
)
def test_what_a_damaged_file_says_is_left_out(tmp_path, damaged):
    content = {"state": "running", "updated": "2026-01-01T00:00:00+00:00", **damaged}
    (tmp_path / "status.json").write_text(json.dumps(content))
    (tmp_path / "metrics.jsonl").write_text('{"step_seconds": NaN, "samples_per_second": "x"}\n')
    write_node(tmp_path, 1, started_ago=1)
    record = {"node": "node-00001", "host": "n", "started": "soon"}
    (tmp_path / "logs" / "attempt-0001" / "node-00001.json").write_text(json.dumps(record))
    status = run_status(tmp_path, now=NOW)
    assert (status.step, status.eta_seconds, status.decision) == (0, None, "requeue")
    print_statuses([status], Terminal(record=True))
    assert "NaN" not in to_json(status)


def test_a_folder_of_something_else_is_no_run(tmp_path):
    (tmp_path / "some_run").mkdir()
    with pytest.raises(InputMissing, match="holds no run; give a run's own folder"):
        run_status(tmp_path)


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [
        ("node", "--nproc-per-node", "0"),
        ("node", "--node-rank", "-1"),
        ("node", "--grace-seconds", "nan"),
        ("preflight", "--nnodes", "0"),
        ("preflight", "--timeout-seconds", "inf"),
        ("health", "--max-age", "nan"),
        ("launch-data", "--tasks", "0"),
        ("launch-data", "--gpus", "-1"),
    ],
)
def test_numbers_that_mean_nothing_are_usage_errors(capsys, verb, option, value):
    with pytest.raises(SystemExit) as caught:
        main([verb, option, value])
    assert caught.value.code == 2
    assert f"argument {option}: '{value}' is no " in capsys.readouterr().err
