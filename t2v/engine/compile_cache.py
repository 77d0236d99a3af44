"""torch's cache of compiled programs, used on as long as everyone who wrote into it has ended well.

Compilers write into the cache's own files. One that is killed leaves half a program there, which
every later start on that host would load, and die of.
"""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

PLACE = "TORCHINDUCTOR_CACHE_DIR"
PROGRAMS, USERS = "programs-", "users"


@contextlib.contextmanager
def sound_compile_cache() -> Iterator[Path]:
    """A folder of compiled programs of this host, inside of where torch keeps them; a new one where
    a process that used the last one was killed or failed."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # slow

    before = os.environ.get(PLACE)
    home = Path(cache_dir()) / f"t2v-{socket.gethostname()}"
    (home / USERS).mkdir(parents=True, exist_ok=True)
    mine = home / USERS / str(os.getpid())
    with _alone(home):
        programs = _programs(home)
        file = os.open(mine, os.O_RDWR | os.O_CREAT, 0o600)
        # Goes with the process, however that ends, and no child inherits it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.environ[PLACE] = str(programs)
    try:
        yield programs
        with _alone(home):
            mine.unlink()  # a failure leaves it there: it may have been a compiler's
    finally:
        os.close(file)
        os.environ.pop(PLACE) if before is None else os.environ.update({PLACE: before})


def _programs(home: Path) -> Path:
    """The present folder of programs; a new one where somebody did not end well. Old ones go once
    nobody uses any."""
    users = list((home / USERS).iterdir())
    dead = [path for path in users if path.name == str(os.getpid()) or not _lives(path)]
    folders = sorted(home.glob(f"{PROGRAMS}*"))
    number = int(folders[-1].name.removeprefix(PROGRAMS)) if folders else 0
    programs = home / f"{PROGRAMS}{number + bool(dead):06d}"
    programs.mkdir(exist_ok=True)
    for path in dead:
        path.unlink()
    if len(dead) == len(users):
        for folder in folders:
            if folder != programs:
                shutil.rmtree(folder, ignore_errors=True)
    return programs


def _lives(user: Path) -> bool:
    with user.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    with (home / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
