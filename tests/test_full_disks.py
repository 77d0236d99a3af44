"""A disk that refuses the words beside a run costs these words: neither the run nor how it ends."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import node, node_records
from cluster.gpu_events import GpuEvent, GpuWatch
from cluster.node import ask_to_stop, run_node
from data_pipeline.errors import ConfigError, exit_code_of
from data_pipeline.store import storage
from t2v.attempt import run_folder
from t2v.attempt.run_folder import StatusFile, locked
from t2v.cli import main
from t2v.engine.world import ALONE
from t2v.loop import train
from t2v.recipe.recipe import dump_config
from t2v.watching import stragglers
from t2v.watching.stragglers import Straggler, Stragglers
from tests.test_loop import config_of, dataset, leave_no_handlers, status_of
from tests.test_node import job_of

__all__ = ["dataset", "leave_no_handlers"]


def full(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 74),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 74),
        (OSError(errno.ESTALE, "Stale file handle"), 74),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 74),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 66),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 66),
        (OSError("of a library, which names neither"), 1),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1),
        (ConfigError("x"), 78),
        (KeyboardInterrupt(), 130),
        (ValueError("a bug"), 1),
    ],
)
def test_a_process_ends_with_what_its_record_says(dataset, tmp_path, monkeypatch, error, code):
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("t2v.loop.accumulate_gradients", fail)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config_of(dataset, tmp_path / "run")))
    if code == 1:
        with pytest.raises(type(error)):
            main(["train", str(recipe)])
    else:
        assert main(["train", str(recipe)]) == code
    assert exit_code_of(error) == code
    assert status_of(tmp_path / "run")["exit_code"] == code


def test_how_a_run_ended_is_told_on_a_disk_that_takes_no_new_file(tmp_path, monkeypatch):
    status = StatusFile(tmp_path, step=7, total_steps=9)
    status.write("running", note="x" * 500)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        status.write("running", step=8)
    status.write("failed", exit_code=74, reason="full", note="")
    told = status_of(tmp_path)
    assert (told["state"], told["exit_code"], told["step"]) == ("failed", 74, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_the_farewell_of_an_owner_changes_nothing(tmp_path, monkeypatch):
    with locked(tmp_path / "run"):
        monkeypatch.setattr(run_folder.os, "pwrite", full)
    monkeypatch.undo()
    with locked(tmp_path / "run"):
        pass


def test_a_straggler_that_cannot_be_written_down_is_named_all_the_same(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(stragglers, "append_attempt", full)
    watched = Stragglers(tmp_path, ALONE, StatusFile(tmp_path), 100)
    watched._tell(Straggler(rank=3, host="n\x1b[31m2", share=0.3, steps=100, step=900))
    assert r"rank 3 on n\x1b[31m2 is slow" in capsys.readouterr().out


def test_a_request_of_another_does_not_undo_the_end_of_a_run(dataset, tmp_path, monkeypatch):
    """An operator's flag in a folder where the run may delete nothing of theirs."""
    config = config_of(dataset, tmp_path / "run", total_steps=2)
    real = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name in ("PREEMPT", "failure.md"):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert train(config) == 0
    assert status_of(tmp_path / "run")["state"] == "done"


@pytest.mark.parametrize("code", [0, 75, 78])
def test_how_a_node_ends_does_not_depend_on_what_it_can_write_then(tmp_path, monkeypatch, code):
    def end(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(storage, "write_atomic", full)
        monkeypatch.setattr(node_records, "append_attempt", full)
        monkeypatch.setattr(node_records, "note_bad_nodes", full)
        return code, "as it ended"

    monkeypatch.setattr(node, "begin", end)
    before = {number: signal.getsignal(number) for number in node.SIGNALS}
    try:
        assert run_node(job_of(tmp_path / "run")) == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ranks_are_told_to_stop_where_the_flag_cannot_be_written(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as rank:
        ask_to_stop(job_of(tmp_path / "gone"), [psutil.Process(rank.pid)])
        assert rank.wait(timeout=30) == -signal.SIGTERM


def test_gpus_are_watched_on_though_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.gpu_events.KERNEL_LOG", str(tmp_path / "none"))
    monkeypatch.setattr(storage, "write_atomic", full)
    record = node.NodeRecord("node-00000", "n1", time.time())
    watch = GpuWatch(lambda events: node_records.tell(tmp_path, record))
    watch._note([GpuEvent("GPU 0: Xid 79", is_broken=True)])
    assert watch.close() == (("GPU 0: Xid 79",), True)


def test_a_clock_that_was_set_back_holds_no_start_up(tmp_path, monkeypatch):
    for number in (1, 2):
        node_records.tell_failed_start(tmp_path, number, 74, "nodes did not meet")
    lines = (tmp_path / "attempts.jsonl").read_text().splitlines()
    later = [json.dumps(json.loads(line) | {"at": "2999-01-01T00:00:00+00:00"}) for line in lines]
    (tmp_path / "attempts.jsonl").write_text("".join(line + "\n" for line in later))
    monkeypatch.setattr(node, "pause_seconds", lambda failures: 0.5)
    started = time.monotonic()
    node.pause_after_failures(job_of(tmp_path), lambda: False)
    assert 0.4 < time.monotonic() - started < 5


def test_a_node_says_that_it_is_one_to_be_avoided(tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad_nodes"
    bad.write_text("n1\nn2 2020-01-01T00:00:00+00:00\n")
    monkeypatch.setenv("T2V_BAD_NODES", str(bad))
    for name in ("n1", "n2", "n3"):
        node_records.tell_of_bad_place(name)
    assert capsys.readouterr().out.startswith("n1: was found bad, see ")
    monkeypatch.delenv("T2V_BAD_NODES")
    node_records.tell_of_bad_place("n1")
    assert capsys.readouterr().out == ""
