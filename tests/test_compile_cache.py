"""A run that is stopped or killed while it compiles hurts neither itself nor the next start."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from t2v.attempt.attempt import came_of_compiling
from t2v.engine.compile_cache import sound_compile_cache
from tests.test_loop import command, config_of, dataset, leave_no_handlers, lines_of, status_of

__all__ = ["dataset", "leave_no_handlers"]
USE = """
import sys
from t2v.engine.compile_cache import sound_compile_cache

with sound_compile_cache() as folder:
    print(folder.name, flush=True)
    if sys.stdin.read(1) == "x":
        raise SystemExit("failed")
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    """Starts a process that uses the cache and tells which folder; all are ended."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    started = []

    def start() -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", USE], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen, *, well: bool) -> None:
    process.communicate("." if well else "x")


@pytest.mark.slow
def test_programs_are_used_again_until_one_that_wrote_them_did_not_end_well(users, tmp_path):
    first, folder = users()
    second, same = users()
    assert folder == same
    end(first, well=True)
    third, same = users()
    assert folder == same
    second.kill()
    second.wait()
    # `third` may have programs of it loaded, so the old folder stays as long as it lives.
    fourth, other = users()
    assert other != folder
    folders = next(tmp_path.glob("t2v-*"))
    assert (folders / folder).is_dir()
    end(third, well=True)
    end(fourth, well=True)
    fifth, last = users()
    assert last == other
    assert not (folders / folder).exists()
    end(fifth, well=False)
    _, newest = users()
    assert newest not in (folder, other)


def test_a_failure_in_this_process_leaves_the_environment_and_no_trust(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    used = []

    def fail() -> None:
        with sound_compile_cache() as folder:
            used.append(folder)
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    with sound_compile_cache() as second:
        assert second not in used
    with sound_compile_cache() as third:
        assert third == second


def compilers(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.name().startswith(("cc1plus", "g++"))]


def wait_for_compiler(process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not compilers(process):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_preempted_in_a_compiler_is_preempted_and_half_a_program_is_not_loaded(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = {"levels_per_block": [2], "self_conditioning_rate": 0.0}  # few programs are enough
    config = config_of(
        dataset, tmp_path / "run", model=model, engine={"compile": True}, total_steps=2
    )
    # As a scheduler does: the signal goes to all processes of the job, compilers among them.
    process = subprocess.Popen(command(config), start_new_session=True)
    wait_for_compiler(process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert status_of(tmp_path / "run")["state"] == "preempted"
    # Killed in mid-write: every program is cut in half.
    process = subprocess.Popen(command(config), start_new_session=True)
    wait_for_compiler(process)
    while not list((tmp_path / "cache").rglob("*.so")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    programs = list((tmp_path / "cache").rglob("*.so"))
    for program in programs:
        os.truncate(program, program.stat().st_size // 2)
    assert subprocess.run(command(config), check=False).returncode == 0
    assert [line[0] for line in lines_of(tmp_path / "run")] == [1, 2]


def test_only_a_compilers_failure_is_one():
    from torch._dynamo.exc import TorchDynamoException

    assert came_of_compiling(TorchDynamoException("g++ was terminated"))
    assert not came_of_compiling(RuntimeError("g++ was terminated"))
