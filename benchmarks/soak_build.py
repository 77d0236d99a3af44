"""Builds that everything happens to, beside one that nothing happens to: are the bytes the same?

    python -m benchmarks.soak_build [--faults 200] [--out benchmarks/results]

A user's command is started again until it ends well, and something drawn from a seed happens to
it each time, at a random instant: kill -9, Ctrl-C, a disk that is full (files may not grow past a
random size), a film or its caption that vanishes or becomes another and is put back afterwards, a
store that throttles, cuts its answers short, or refuses. Builds lie on disk and in a store, of
films with texts beside them or in a list, by one process or with workers; beside them, and among
their shards, lie a stranger's files. Attempts are forks of a process that has everything imported.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

from data_pipeline.making import build as _preloaded  # noqa: F401
from data_pipeline.making.toy import write_toy
from data_pipeline.store import storage
from t2v.cli import main as t2v

ROOT = Path(__file__).parent.parent
FILMS, SHARD = 18, 3
EVERYWHERE = ("kill", "Ctrl-C", "full disk", "film vanishes", "film changes", "caption changes")
IN_STORE = ("store throttles", "store cuts", "store refuses")
THEIRS = {"notes.txt": b"notes", "shards/their.idx": b"theirs", ".download.part": b"half",
          "shards/.their.part": b"half", "their folder/000000.tar": b"theirs"}  # fmt: skip
ENDS = {0, 65, 66, 74, 78, 130, -signal.SIGKILL}  # 78: the source is another while it is spoiled


@dataclass
class Tally:
    """What happened."""

    struck: Counter = field(default_factory=Counter)
    codes: Counter = field(default_factory=Counter)
    attempts: int = 0
    builds: int = 0
    wrong: list[str] = field(default_factory=list)


def serve(address: Any, weather: Any) -> None:
    """A store in this process, whose answers are as its weather is."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    app = DomainDispatcherApplication(create_backend_app)
    chance = random.Random(0)

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            pass

    def answer(environ: dict, start_response: Callable) -> Any:
        kind = weather.value.decode()
        if kind == "store refuses":
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code></Error>"]
        if kind == "store throttles" and chance.random() < 0.3:
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code></Error>"]
        parts = app(environ, start_response)
        if kind == "store cuts" and chance.random() < 0.3:
            whole = b"".join(parts)
            return iter([whole[: len(whole) // 2]])
        return parts

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Quiet)
    address.put(server.server_port)
    server.serve_forever()


class Attempt:
    """One start of the command, as a process of its own session."""

    def __init__(self, command: list[str], log: Path, *, max_file_bytes: int | None = None) -> None:
        self.code: int | None = None
        # Through a pipe, for what a full disk keeps from being written should be what is built.
        with log.open("ab") as file:
            sink = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        assert sink.stdin is not None
        self.process = os.fork()
        if self.process:
            sink.stdin.close()
            return
        code = 99
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(sink.stdin.fileno(), 1)
            os.dup2(sink.stdin.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
            if max_file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
            code = t2v(command)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def is_over(self) -> bool:
        """Whether it has ended, its code then being `code`."""
        if self.code is None:
            done, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code is not None

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.is_over():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def has_left_processes(self) -> bool:
        """Whether its workers outlive it."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.02)
        return True


def tree(out: str) -> dict[str, bytes]:
    """Every file or object of an output."""
    if storage.is_remote(out):
        store = storage.remote().store
        return {
            name: store.read_whole(storage.join(out, name)) for name, _ in store.list_below(out)
        }
    return {str(path.relative_to(out)): path.read_bytes()
            for path in Path(out).rglob("*") if path.is_file()}  # fmt: skip


def settle(out: str, names: Iterator[str] | tuple[str, ...]) -> None:
    """Put a stranger's files into a folder."""
    for name in names:
        storage.write_atomic(storage.join(out, name), THEIRS[name])


class Soak:
    """Builds under faults, until enough have struck."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.tally = folder, random.Random(seed), Tally()
        self.log = folder / "build.log"
        self.deck: list[str] = []
        self.kinds = [(remote, listed, workers) for remote in (False, False, True)
                      for listed in (False, True) for workers in (1, 1, 1, 2)]  # fmt: skip
        write_toy(folder / "toy", videos=FILMS, images=0, size=(8, 32, 48))
        for line in (folder / "toy/videos/captions.jsonl").read_text().splitlines():
            told = json.loads(line)
            (folder / "toy/videos" / told["file"]).with_suffix(".txt").write_text(told["caption"])
        spawned = multiprocessing.get_context("spawn")
        address, self.weather = spawned.Queue(), spawned.Array("c", 32)
        self.store = spawned.Process(target=serve, args=(address, self.weather), daemon=True)
        self.store.start()
        os.environ |= {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{address.get()}",
                       "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
                       "T2V_CACHE": str(folder / "cache")}  # fmt: skip
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")

    def source(self, *, listed: bool) -> Path:
        """Films of its own for a build."""
        folder = self.folder / "films"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "toy" / "videos", folder)
        for path in [folder / "captions.jsonl"] if not listed else folder.glob("*.txt"):
            path.unlink()
        return folder

    def command(self, out: str, workers: int) -> list[str]:
        films = str(self.folder / "films")
        return ["data", "build", films, out, "--size", "8x24x32", "--shard-samples", str(SHARD),
                "--max-drop-rate", "0", "--workers", str(workers)]  # fmt: skip

    def undisturbed(self, *, listed: bool) -> tuple[dict[str, bytes], float]:
        """The files of the build that nothing happens to, and its seconds."""
        self.source(listed=listed)
        out, begun = str(self.folder / f"undisturbed-{listed}"), time.monotonic()
        attempt = Attempt(self.command(out, 1), self.log)
        if not attempt.wait(300) or attempt.code:
            raise SystemExit(f"the undisturbed build ended with {attempt.code}; see {self.log}")
        return tree(out), time.monotonic() - begun

    def run(self, faults: int) -> None:
        """Build again and again."""
        wanted = {listed: self.undisturbed(listed=listed) for listed in (False, True)}
        while sum(self.tally.struck.values()) < faults and len(self.tally.wrong) < 5:
            number = self.tally.builds
            remote, listed, workers = self.kinds[number % len(self.kinds)]
            place = "s3://bucket" if remote else str(self.folder)
            out = f"{place}/mine-{number}/out"
            self.source(listed=listed)
            settle(f"{place}/mine-{number}", tuple(THEIRS))
            self.build(out, workers, wanted[listed][1] * (1.5 if remote or workers > 1 else 1.0))
            self.tally.builds += 1
            found, beside = tree(out), tree(f"{place}/mine-{number}")
            ours = {name: content for name, content in found.items() if name not in THEIRS}
            for name in sorted(ours.keys() | wanted[listed][0]):
                if ours.get(name) != wanted[listed][0].get(name):
                    self.tally.wrong.append(f"{out}/{name}: differs")
            theirs = {**beside, **{f"out/{n}": c for n, c in found.items() if n in THEIRS}}
            for name, content in THEIRS.items():
                for where in (name, f"out/{name}")[: 2 if "notes.txt" in found else 1]:
                    if theirs.get(where) != content:
                        self.tally.wrong.append(f"{out}: a stranger's {where} was touched")
            print(f"build {number} {out} workers {workers}: {dict(self.tally.struck)}, "
                  f"{dict(self.tally.codes)}, {self.tally.wrong}", flush=True)  # fmt: skip

    def build(self, out: str, workers: int, seconds: float) -> None:
        """Start the command until it ends well; something happens each time but the last."""
        for _ in range(60):
            kinds = [*EVERYWHERE, *(IN_STORE if storage.is_remote(out) else ())]
            if not self.deck:
                self.deck = self.random.sample(EVERYWHERE + IN_STORE, len(EVERYWHERE + IN_STORE))
            kind = self.deck.pop(next((n for n, k in enumerate(self.deck) if k in kinds), 0))
            kind = kind if kind in kinds else "kill"
            begun, size = self.log.stat().st_size, None
            if kind == "full disk":
                size = int(10 ** self.random.uniform(1.5, 5))
            attempt = Attempt(self.command(out, workers), self.log, max_file_bytes=size)
            struck = self.strike(attempt, kind, out, seconds)
            if not attempt.wait(120):
                os.killpg(attempt.process, signal.SIGKILL)
                self.tally.wrong.append(f"{out}: hung after {kind}")
                return
            said = self.log.read_bytes()[begun:].decode(errors="replace")
            self.tally.attempts += 1
            self.tally.struck[kind] += struck or attempt.code != 0
            self.tally.codes[f"{kind}: {attempt.code}"] += 1
            if attempt.has_left_processes():
                self.tally.wrong.append(f"{out}: workers outlive it after {kind}")
            if attempt.code not in ENDS or "Traceback" in said:
                self.tally.wrong.append(f"{out}: ended with {attempt.code} after {kind}: {said}")
                return
            if attempt.code == 0:
                return
            if storage.exists(f"{out}/shards/000000.idx"):
                settle(out, tuple(THEIRS))
        self.tally.wrong.append(f"{out}: does not end")

    def strike(self, attempt: Attempt, kind: str, out: str, seconds: float) -> bool:
        """Do to an attempt what must come from outside, at a random instant; whether it did."""
        if kind in ("film vanishes", "film changes", "caption changes"):
            while not storage.exists(f"{out}/build.json"):  # before, it is another source
                if attempt.wait(0.005):
                    return False
        if attempt.wait(self.random.uniform(0, seconds)):
            return False
        if kind == "kill":
            os.kill(attempt.process, signal.SIGKILL)
        elif kind == "Ctrl-C":
            os.killpg(attempt.process, signal.SIGINT)
        elif kind in IN_STORE:
            self.weather.value = kind.encode()
            attempt.wait(120)
            self.weather.value = b""
        elif kind != "full disk":
            self.spoil(attempt, kind)
        return kind != "full disk"  # which struck where the attempt failed

    def spoil(self, attempt: Attempt, kind: str) -> None:
        """Make a file of the source another while an attempt lasts."""
        folder = self.folder / "films"
        suffix = ".mp4" if kind.startswith("film") else ".txt"
        paths = sorted(folder.glob(f"*{suffix}")) or [folder / "captions.jsonl"]
        path = self.random.choice(paths)
        content, times = path.read_bytes(), path.stat()
        if kind == "film vanishes":
            path.unlink()
        else:
            path.write_bytes(content + content[: self.random.randrange(1, len(content))])
        attempt.wait(120)
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-build-") as name:
        begun = time.monotonic()
        soak = Soak(Path(name), options.seed)
        soak.run(options.faults)
        soak.store.kill()
    tally = soak.tally
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": re.sub(r"[^a-z0-9]+", "-", f"{platform.machine()}-{os.cpu_count()}cpu".lower()),
        "seed": options.seed,
        "faults": dict(tally.struck),
        "exit_codes": dict(tally.codes),
        "attempts": tally.attempts,
        "builds": tally.builds,
        "seconds": round(time.monotonic() - begun),
        "wrong": tally.wrong,
    }
    print(json.dumps(result, indent=1))
    if tally.wrong:
        raise SystemExit("the disturbed builds are not as they should be")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"soak-build-{options.faults}-{result['machine']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{path}: written.")


if __name__ == "__main__":
    main()
