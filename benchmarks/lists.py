"""How fast lists are planned, in how much memory, and what a build asks of an object store.

    python -m benchmarks.lists --rows 10000 100000 1000000 --out lists.json

Each list names 1,000 files in clips by time, as Panda-70M does, with a caption of 18 words and a
score by which half of the rows is chosen. Each plan is made by a process of its own; seconds are
of the processor. Requests are those that a real server answers, of media and a text beside each.
"""

import argparse
import csv
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow
from pyarrow import parquet

FILES = 1000
WORDS = [
    "a",
    "red",
    "ball",
    "rolls",
    "over",
    "the",
    "wet",
    "floor",
    "while",
    "somebody",
    "who",
    "is",
    "not",
    "seen",
    "sings",
    "about",
    "the",
    "sea",
]
PLAN = """
import re, sys, time
from pathlib import Path
from data_pipeline.making.plan import open_plan, write_plan
from data_pipeline.making.presets import Columns
def peak(): # of this process: what getrusage tells is the parent's, where that is more
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, begun = peak(), time.process_time()
columns = Columns(where="score >= 0.5", times=("start", "end"))
with open(sys.argv[2], "wb") as file:
    write_plan(file, sys.argv[1], columns, root=sys.argv[3], kind=None)
planned = time.process_time()
plan = open_plan(sys.argv[2])
parts = (plan.items(begin, begin + 100) for begin in range(0, plan.files, 100))
clips = sum(len(item.rows) for part in parts for item in part)
print(planned - begun, clips, before, peak())
"""


def rows(count: int):
    for number in range(count):
        words = " ".join(WORDS[number % 7 :] + WORDS[: number % 7])
        start = number // FILES * 2
        yield {"file": f"{number % FILES:04d}.mp4", "caption": f"{number} {words}", "start": start,
               "end": start + 2, "score": number * 7 % 10 / 10}  # fmt: skip


def write_list(path: Path, count: int) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows(count))), path)
        return
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows(count))
        else:
            writer = csv.DictWriter(file, ["file", "caption", "start", "end", "score"])
            writer.writeheader()
            writer.writerows(rows(count))


def time_list(folder: Path, kind: str, count: int) -> dict:
    """Rows a second and memory of one list."""
    path = folder / f"list.{kind}"
    write_list(path, count)
    command = [sys.executable, "-c", PLAN, str(path), str(folder / "plan"), str(folder / "media")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    seconds, clips, before, peak = map(float, told)
    result = {
        "kind": kind,
        "rows": count,
        "list_mib": round(path.stat().st_size / 2**20, 1),
        "cpu_seconds": round(seconds, 2),
        "rows_per_cpu_second": round(count / seconds),
        "peak_mib": round(peak),
        "peak_mib_above_imports": round(peak - before),
        "clips": int(clips),
    }
    path.unlink()
    return result


def count_requests(files: int) -> dict:
    """Requests of a build of so many images with a text beside each, all in a store."""
    import boto3
    import numpy as np
    from moto.server import ThreadedMotoServer

    from data_pipeline.making.build import build
    from data_pipeline.media.codec import encode_image

    logging.getLogger("werkzeug").propagate = False
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key",
                   "AWS_SECRET_ACCESS_KEY": "secret"}  # fmt: skip
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    picture = encode_image(np.zeros((32, 32, 3), np.uint8))
    for number in range(files):
        client.put_object(Bucket="bucket", Key=f"media/{number:05d}.jpg", Body=picture)
        client.put_object(Bucket="bucket", Key=f"media/{number:05d}.txt", Body=f"{number}".encode())
    seen: Counter[str] = Counter()

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            plain = re.sub(r"\x1b\[\d*m", "", record.getMessage())
            method, path = plain.split('"')[1].split()[:2]
            if "/bucket" in path:
                seen["LIST" if "list-type=2" in path else method] += 1

    logging.getLogger("werkzeug").addHandler(Count())
    logging.getLogger("werkzeug").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as out:
        build("s3://bucket/media", f"{out}/data", frames=1, height=32, width=32)
    server.stop()
    return {"files": 2 * files, **seen, "per_file": round(sum(seen.values()) / (2 * files), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--files", type=int, default=200, help="images in the store")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lists = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "media").mkdir()
        for number in range(FILES):
            (folder / "media" / f"{number:04d}.mp4").touch()
        for kind in ("csv", "jsonl", "parquet"):
            for count in options.rows:
                lists.append(time_list(folder, kind, count))
                print(lists[-1], flush=True)
    requests = count_requests(options.files)
    print(requests)
    result = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
              "cpus": os.cpu_count(), "lists": lists, "requests": requests}  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
