"""The real wandb beside a run: it mirrors the lines once each, and nothing waits for it."""

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from t2v.watching import wandb_mirror
from t2v.watching.metrics import Metrics, MetricsConfig

CONFIG = MetricsConfig(wandb_project="t2v")
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    """Nobody's own login, and a home without one."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))


def write(run_dir: Path, first: int, last: int) -> Metrics:
    """An attempt that resumes before step `first` and writes lines up to `last`."""
    metrics = Metrics(run_dir, CONFIG, name="x", step=first - 1)
    for step in range(first, last + 1):
        metrics.write({"step": step, "loss": 1 / step})
    return metrics


def records(content: bytes) -> Iterator[bytes]:
    """Those of wandb's file: LevelDB's log of 32 KiB blocks, after 7 bytes of its own."""
    place, parts = 7, b""
    while place < len(content):
        if (left := -place % 32768) < 7 and left:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""


def logged(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of all that offline runs would send, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(
        run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_ctime
    ):
        for content in records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                found.append((json.loads(items["step"]), json.loads(items["loss"])))
    return found


def children(run_dir: Path) -> list[psutil.Process]:
    """Processes that mirror this run, or were started by one that does."""
    mine = psutil.Process().children(recursive=True)
    return [child for child in mine if str(run_dir) in " ".join(child.cmdline())]


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", ["offline with a key", "no key"])
def test_every_step_is_logged_once_though_some_were_done_twice(tmp_path, monkeypatch, mode, capsys):
    if mode == "offline with a key":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for first, last in ((1, 5), (4, 8)):
        write(run_dir, first, last).close()
    assert logged(run_dir) == [(step, 1 / step) for step in range(1, 9)]
    state = json.loads((run_dir / wandb_mirror.STATE).read_text())
    assert state["step"] == 8
    folders = {path.name.split("-")[-1] for path in run_dir.glob("wandb/offline-run-*")}
    assert folders == {state["id"]}
    assert children(run_dir) == []
    assert capsys.readouterr().out == ""


@pytest.fixture
def silent_server() -> Iterator[tuple[str, threading.Event]]:
    """Accepts connections and never answers; (its address, whether anyone has called)."""
    called, kept = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept())
                except OSError:
                    return
                called.set()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", called
        server.shutdown(socket.SHUT_RDWR)
    for connection, _ in kept:
        connection.close()


@pytest.mark.dist
@pytest.mark.parametrize("login", ["variable", "netrc"])
def test_a_network_that_never_answers_holds_nothing_up(
    tmp_path, monkeypatch, silent_server, capsys, login
):
    """The mirror is still waiting for an answer that never comes when the run is over."""
    address, called = silent_server
    monkeypatch.setenv("WANDB_BASE_URL", address)
    if login == "variable":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        netrc = tmp_path / "home" / ".netrc"
        netrc.write_text(
            f"machine {address.removeprefix('http://')}\n  login user\n  password {KEY}\n"
        )
        netrc.chmod(0o600)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    metrics = write(run_dir, 1, 3)
    assert called.wait(60)  # online: it has a key, whichever way it was given
    monkeypatch.setattr(wandb_mirror, "FINISH_SECONDS", 0.5)
    metrics.close()
    assert children(run_dir) == []
    assert "wandb: ends here because TimeoutError" in capsys.readouterr().out
    # What was not sent waits for the next attempt, which has no network either, and says so.
    assert json.loads((run_dir / wandb_mirror.STATE).read_text())["step"] == 0
    monkeypatch.setattr(wandb_mirror, "FINISH_SECONDS", 10.0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(run_dir, 3, 4).close()
    assert logged(run_dir) == [(step, 1 / step) for step in range(1, 5)]


@pytest.mark.dist
def test_a_mirror_that_dies_is_told_once_and_leaves_nothing(tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    metrics = write(run_dir, 1, 1)
    (view,) = metrics.views
    assert isinstance(view.view, wandb_mirror.WandbMirror)
    view.view.process.kill()
    view.view.process.wait()
    for step in (2, 3):
        metrics.write({"step": step, "loss": 1.0})
    metrics.close()
    told = capsys.readouterr().out
    assert told.count("wandb: ends here because ChildProcessError") == 1
    assert "logs/wandb.log" in told
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
