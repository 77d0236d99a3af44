"""Processes end with those they work for, however these end."""

import signal
import subprocess
import sys

import psutil
import pytest

from t2v.attempt.failure import wait_until

# A worker of a server process, as the loader's are, and a child; both would sleep for ever.
CODE = """
import multiprocessing, os, subprocess, sys, time
from data_pipeline.orphans import end_with, end_with_parent

def work(owner):
    end_with(owner)
    os.write(1, b"%d\\n" % os.getpid())  # at once, or two lines become one
    time.sleep(3600)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.Process(target=work, args=(os.getpid(),)).start()
    code = "import os, time; os.write(1, b'%d\\\\n' % os.getpid()); time.sleep(3600)"
    subprocess.Popen([sys.executable, "-c", code], preexec_fn=end_with_parent)
    time.sleep(3600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_and_children_end_with_their_owner(tmp_path, number):
    (tmp_path / "owner.py").write_text(CODE)
    owner = subprocess.Popen([sys.executable, tmp_path / "owner.py"], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    others = [psutil.Process(int(owner.stdout.readline())) for _ in range(2)]
    owner.send_signal(number)
    owner.wait()
    owner.stdout.close()
    assert wait_until(lambda: not any(other.is_running() for other in others), 30)
