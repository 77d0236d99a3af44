"""The wrapper on a node: requests reach the ranks, and their exit codes the scheduler."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from cluster.bad_nodes import BROKEN_DAYS, SLOW_DAYS, read_bad_nodes
from cluster.ending import culprits, exit_code_of
from cluster.heartbeat import NoHeartbeat, beat, check_health
from cluster.node import (
    NodeJob,
    is_older,
    last_word,
    pause_after_failures,
    wait_for_name,
)
from cluster.node_records import tell_failed_start, tell_whom_to_avoid, write_record
from cluster.status import NodeRecord, run_status
from cluster.torchrun import launcher_command, split_endpoint
from data_pipeline.errors import ConfigError, StorageError
from t2v.attempt.failure import wait_until
from t2v.attempt.record import append_attempt, failed_starts, next_number, read_attempts
from t2v.recipe.recipe import dump_config
from tests.test_loop import assert_same_tensors, config_of, dataset, status_of, tensors_at

__all__ = ["dataset"]  # a fixture

STARTED = 1000.0
LAUNCHER_LOG = """\
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_12:00:00
  host      : n1
  rank      : 0 (local_rank: 0)
  exitcode  : {code} (pid: 4711)
  error_file: <N/A>
"""


def job_of(run_dir: Path, **changes) -> NodeJob:
    return NodeJob(run_dir=run_dir, train_arguments=("recipe.yaml", "seed=4"), **changes)


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def meant(run_dir: Path, returned: int, *, asked: bool = False) -> int:
    record = NodeRecord("node-00000", "n1", STARTED)
    return exit_code_of(run_dir, run_dir, record, returned, asked=asked)[0]


def write_status(run_dir: Path, at: float, **facts) -> None:
    (run_dir / "status.json").write_text(json.dumps({**facts, "updated": iso(at)}))


def two_nodes(run_dir: Path, hang: dict | None = None, straggler: dict | None = None) -> NodeRecord:
    """A run folder that is its own log folder, of two nodes of four ranks."""
    for number in range(2):
        node = NodeRecord(f"node-{number:05d}", f"host-{number}", STARTED, name=f"n{number + 1}")
        write_record(run_dir, node)
    if hang is not None:
        told = {"exit_code": 71, "at": iso(STARTED + 9), "section": "step", **hang}
        (run_dir / f"failure-rank-{hang['rank']:05d}.json").write_text(json.dumps(told))
    write_status(run_dir, STARTED + 9, state="failed", straggler=straggler)
    return NodeRecord("node-00000", "host-0", STARTED, name="n1")


def test_the_node_of_the_rank_that_hung_or_was_slow_to_the_end_is_avoided(tmp_path):
    def avoided(**told) -> dict[str, float]:
        for path in tmp_path.iterdir():
            path.unlink()
        return culprits(tmp_path, tmp_path, two_nodes(tmp_path, **told), 4)

    slow = {"rank": 6, "host": "host-1", "share": 0.4, "steps": 100, "step": 900}
    assert avoided() == {}
    assert avoided(hang={"rank": 5}) == {"n2": BROKEN_DAYS}
    assert avoided(hang={"rank": 3}) == {"n1": BROKEN_DAYS}
    assert avoided(straggler=slow) == {"n2": SLOW_DAYS}
    assert avoided(straggler=slow | {"share": 0.15}) == {}  # not worth another node
    assert avoided(straggler=slow | {"share": "[/"}) == avoided(straggler={}) == {}
    assert avoided(hang={"rank": 5, "section": "data"}) == {}  # storage, or a sample
    assert avoided(hang={"rank": 5, "exit_code": 74}) == {}
    assert avoided(hang={"rank": 5, "at": iso(STARTED - 9)}) == {}  # of an earlier attempt
    assert avoided(hang={"rank": 99}) == {}


def test_a_node_writes_itself_down_and_the_first_writes_others(tmp_path, monkeypatch):
    file = tmp_path / "bad_nodes"
    monkeypatch.setenv("T2V_BAD_NODES", str(file))
    first = two_nodes(tmp_path, hang={"rank": 1})
    job = job_of(tmp_path, nproc_per_node=1, nnodes=2, node_rank=1)
    tell_whom_to_avoid(job, tmp_path, tmp_path, first, is_broken=False)
    assert read_bad_nodes(file) == ()
    tell_whom_to_avoid(job, tmp_path, tmp_path, first, is_broken=True)
    assert read_bad_nodes(file) == ("n1",)
    job = job_of(tmp_path, nproc_per_node=1, nnodes=2)
    tell_whom_to_avoid(job, tmp_path, tmp_path, first, is_broken=False)
    assert read_bad_nodes(file) == ("n1", "n2")


def test_the_launchers_1_becomes_what_the_ranks_meant(tmp_path):
    write_status(tmp_path, STARTED + 5, state="preempted", step=7)
    assert meant(tmp_path, 1) == 75
    write_status(tmp_path, STARTED + 5, state="failed", exit_code=70, reason="no finite gradient")
    assert meant(tmp_path, 1) == 70
    write_status(tmp_path, STARTED + 5, state="done")
    assert meant(tmp_path, 1) == 0


def test_the_earliest_failure_record_counts(tmp_path):
    write_status(tmp_path, STARTED + 5, state="failed", exit_code=1, reason="peer is gone")
    for rank, (at, code) in enumerate([(STARTED + 4, 1), (STARTED + 2, 71), (STARTED - 9, 65)]):
        record = {"rank": rank, "exit_code": code, "reason": "hang in data", "at": iso(at)}
        (tmp_path / f"failure-rank-{rank:05d}.json").write_text(json.dumps(record))
    assert meant(tmp_path, 1) == 71


def test_the_word_of_an_earlier_attempt_does_not_count(tmp_path):
    write_status(tmp_path, STARTED - 60, state="preempted", step=7)
    (tmp_path / "launcher-node-00000.log").write_text(LAUNCHER_LOG.format(code=78))
    assert meant(tmp_path, 1) == 78


@pytest.mark.parametrize(("seen", "code"), [(-9, 137), (66, 66), (1, 1)])
def test_without_any_word_the_launcher_is_asked(tmp_path, seen, code):
    (tmp_path / "launcher-node-00000.log").write_text(LAUNCHER_LOG.format(code=seen))
    assert meant(tmp_path, 1) == code


def test_a_launcher_that_was_told_to_stop_is_preempted(tmp_path):
    assert meant(tmp_path, 1, asked=True) == 75
    assert meant(tmp_path, 1) == 1


def test_a_request_to_an_earlier_attempt_is_no_request(tmp_path):
    job = job_of(tmp_path, rdzv_id="17-0")
    assert not job.is_asked_to_stop(0.0)
    flag = tmp_path / "PREEMPT"
    flag.touch()
    assert job.is_asked_to_stop(flag.stat().st_mtime - 1)
    assert not job.is_asked_to_stop(flag.stat().st_mtime + 1)
    flag.rename(tmp_path / "PREEMPT-18-0")
    assert not job.is_asked_to_stop(0.0)  # another job's
    (tmp_path / "PREEMPT-18-0").rename(job.flag)
    assert job.is_asked_to_stop(0.0)


def test_a_start_that_fails_before_it_owns_the_run_counts_and_has_its_own_number(tmp_path):
    for number in (1, 2):
        assert next_number(read_attempts(tmp_path)) == number
        for reason in ("nodes did not meet", "so say others"):
            tell_failed_start(tmp_path, number, 74, reason)
    assert [line["attempt"] for line in read_attempts(tmp_path)] == [1, 2]
    (tmp_path / "logs").mkdir()
    assert (run_status(tmp_path).decision, run_status(tmp_path).pause_seconds) == ("requeue", 480)
    tell_failed_start(tmp_path, 3, 74, "nodes did not meet")
    assert run_status(tmp_path).decision == "stop"
    with pytest.raises(ConfigError, match=r"last 3 starts failed alike .*: nodes did not meet;"):
        pause_after_failures(job_of(tmp_path), lambda: True)
    assert run_status(tmp_path).decision == "requeue"  # it was told; the next one counts anew


@pytest.mark.parametrize("other", [{"exit_code": 1}, {"job_id": "18"}, {"event": "start"}])
def test_starts_that_failed_otherwise_or_in_another_job_do_not_add_up(tmp_path, other):
    for number in range(1, 4):
        tell_failed_start(tmp_path, number, 74, "nodes did not meet")
    last = {**read_attempts(tmp_path)[-1], "attempt": 4, **other}
    append_attempt(tmp_path, last)
    assert len(failed_starts(read_attempts(tmp_path))) == (other.get("event") is None)
    pause_after_failures(job_of(tmp_path), lambda: True)


def test_a_second_job_on_the_folder_fails_without_a_count_or_a_word_on_the_first(tmp_path):
    now = time.time()
    write_status(tmp_path, now, state="running", step=7, exit_code=None)
    append_attempt(tmp_path, {"attempt": 1, "event": "start", "step": 0})
    for number in range(2, 6):
        folder = tmp_path / "logs" / f"attempt-{number:04d}"
        folder.mkdir(parents=True)
        tell_failed_start(tmp_path, number, 73, "is in use by process 3")
        record = NodeRecord("node-00000", "n2", now - 9, now - 5, 73, "is in use by process 3")
        write_record(folder, record)
    status = run_status(tmp_path)
    assert (status.state, status.decision, status.failures_without_progress) == (
        "running",
        "requeue",
        0,
    )


def test_the_launcher_gets_the_grace_but_half_a_minute(tmp_path):
    job = job_of(tmp_path, nnodes=4, node_rank=2, grace_seconds=600)
    command = launcher_command(job, "cluster.rank", ["logs", "recipe.yaml"])
    assert "--shutdown-timeout=570" in command
    assert "--max-restarts=0" in command
    assert {"--rdzv-backend=static", "--node-rank=2"} <= set(command)  # ranks follow nodes
    assert command[-4:] == ["-m", "cluster.rank", "logs", "recipe.yaml"]


@pytest.mark.parametrize("endpoint", ["n1", "n1:", "n1:0", "n1:70000", "n1:29400;ls", "-n:1", ""])
def test_a_strange_endpoint_is_refused(endpoint):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        split_endpoint(endpoint)


def test_a_name_that_never_resolves_is_named():
    with pytest.raises(StorageError, match=r"nowhere\.invalid: is no known host"):
        wait_for_name("nowhere.invalid", 0.0, lambda: False)
    assert wait_for_name("localhost", 0.0, lambda: False)
    assert not wait_for_name("nowhere.invalid", 60.0, lambda: True)


def test_health_is_the_age_of_the_last_heartbeat(tmp_path):
    file = tmp_path / "heartbeat"
    with pytest.raises(NoHeartbeat, match="no heartbeat"):
        check_health(file, max_age_seconds=60)
    beat(file, state="starting", step=0)
    assert check_health(file, max_age_seconds=60)["state"] == "starting"
    with pytest.raises(NoHeartbeat, match="has not begun"):
        check_health(file, max_age_seconds=60, startup=True)
    beat(file, state="running", step=3)
    assert check_health(file, max_age_seconds=60, startup=True)["step"] == 3
    file.write_text(json.dumps({"at": time.time() - 100, "state": "running"}))
    with pytest.raises(NoHeartbeat, match="100 s old"):
        check_health(file, max_age_seconds=60)


def start_node(
    config, tmp_path: Path, *, ranks: int = 2, nnodes: int = 1, **environment: str
) -> subprocess.Popen:
    recipe = Path(config.run_dir).with_suffix(".yaml")
    recipe.write_text(dump_config(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "t2v.cli", "node", "--nproc-per-node", str(ranks)),
        *("--nnodes", str(nnodes)),
        *("--rdzv-endpoint", f"localhost:{port}", "--run-dir", config.run_dir),
        *("--grace-seconds", "60", "--", str(recipe)),
    ]
    heartbeat = {"T2V_HEARTBEAT": str(tmp_path / "heartbeat"), "OMP_NUM_THREADS": "1"}
    heartbeat |= {"T2V_RUN": config.run_dir}
    return subprocess.Popen(
        command,
        env=os.environ | heartbeat | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """All that live of a run: its ranks and what these have started."""
    mark = f"run_dir={json.dumps(str(run_dir))}"
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        told = [*(process.info["cmdline"] or []), (process.info["environ"] or {}).get("T2V_RUN")]
        if process.info["status"] != psutil.STATUS_ZOMBIE and {mark, str(run_dir)} & set(told):
            found.append(process)
    return found


def end_of(node: subprocess.Popen) -> tuple[int, str]:
    output, _ = node.communicate(timeout=200)
    return node.returncode, output


def wait_for_step(run_dir: Path, step: int, node: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    while True:
        assert node.poll() is None, node.communicate()[0]
        assert time.monotonic() < deadline
        if (run_dir / "status.json").exists() and status_of(run_dir)["step"] >= step:
            return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)  # three starts, on a machine that may be busy
def test_sigterm_to_the_wrapper_saves_and_the_next_attempt_is_bitwise_the_same_run(
    dataset, tmp_path
):
    """R08: SIGTERM as a kubelet sends it."""
    whole, parts = (
        config_of(dataset, tmp_path / name, total_steps=60, engine={"kind": "fsdp"})
        for name in ("whole", "parts")
    )
    assert end_of(start_node(whole, tmp_path))[0] == 0
    node = start_node(parts, tmp_path)
    wait_for_step(tmp_path / "parts", 3, node)
    assert check_health(tmp_path / "heartbeat", max_age_seconds=60)["pid"] == node.pid
    node.send_signal(signal.SIGTERM)
    code, output = end_of(node)
    assert code == 75
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("node-00000: preempted at step")
    assert not (tmp_path / "parts" / "PREEMPT").exists()
    assert status_of(tmp_path / "parts")["step"] < 60
    code, output = end_of(start_node(parts, tmp_path))
    assert code == 0, output
    assert "resumed from" in output
    found, wanted = (tensors_at(tmp_path / name, 60) for name in ("parts", "whole"))
    assert_same_tensors(found, wanted)
    logs = tmp_path / "parts" / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["attempt-0001", "attempt-0002"]
    assert (logs / "attempt-0001" / "rank-00001.log").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_to_every_process_of_a_node_is_one_request(dataset, tmp_path):
    """As `scancel --signal=USR1` sends it without --batch."""
    config = config_of(
        dataset,
        tmp_path / "run",
        total_steps=2000,
        engine={"kind": "fsdp"},
        checkpoint={"every_steps": 2000},
    )
    node = start_node(config, tmp_path, T2V_FAULT="checkpoint.write:0:1:slow")
    wait_for_step(tmp_path / "run", 3, node)
    for process in [node, *psutil.Process(node.pid).children(recursive=True)]:
        process.send_signal(signal.SIGUSR1)
    code, output = end_of(node)
    assert code == 75, output
    status = status_of(tmp_path / "run")
    assert f"node-00000: preempted at step {status['step']}, saved" in output
    assert status["last_checkpoint"] == status["step"]


@pytest.mark.slow
def test_a_node_that_waits_for_the_others_stops_at_once(dataset, tmp_path):
    """R10: a signal during rendezvous."""
    node = start_node(config_of(dataset, tmp_path / "run"), tmp_path, ranks=1, nnodes=2)
    deadline = time.monotonic() + 60
    while not (tmp_path / "heartbeat").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    node.send_signal(signal.SIGTERM)
    code, output = end_of(node)
    assert code == 75
    assert "before the ranks began" in output
    assert "Traceback" not in output
    # The next attempt is not stopped by what was asked of this one.
    (flag,) = (tmp_path / "run").glob("PREEMPT*")
    assert flag.name == "PREEMPT-t2v"
    assert is_older(flag, last_word(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_the_cause_whoever_tells_of_it(dataset, tmp_path, rank):
    config = config_of(dataset, tmp_path / "run", engine={"kind": "fsdp"}, total_steps=50)
    data = config.data.model_copy(update={"num_workers": 1})
    config = config.model_copy(update={"data": data})
    code, output = end_of(start_node(config, tmp_path, T2V_FAULT=f"forward:{rank}:4:kill"))
    assert code == 137, output
    said = f"rank {rank} on {socket.gethostname()} was killed by SIGKILL"
    assert output.splitlines()[-1].startswith(f"node-00000: {said}")
    end = read_attempts(tmp_path / "run")[-1]
    assert (end["event"], end["exit_code"], end["reason"][: len(said)]) == ("end", 137, said)
    assert status_of(tmp_path / "run")["exit_code"] == 137
    page = (tmp_path / "run" / "failure.md").read_text()
    assert f"| rank that failed first | {rank} on" in page
    file = tmp_path / "run" / "logs" / "attempt-0001" / f"failure-rank-{rank:05d}.json"
    record = json.loads(file.read_text())
    assert (record["section"], record["step"]) == ("step", 3)
    assert record["samples"]
    assert all(f"`{name}`" in page for name in record["samples"])
    assert wait_until(lambda: not processes_of(tmp_path / "run"), 15)


@pytest.mark.slow
@pytest.mark.dist
def test_what_the_recipe_got_wrong_is_the_exit_code_of_the_node(dataset, tmp_path):
    config = config_of(tmp_path / "no_such_dataset", tmp_path / "run")
    code, output = end_of(start_node(config, tmp_path, ranks=1))
    assert code == 66, output
    assert "no_such_dataset" in output
