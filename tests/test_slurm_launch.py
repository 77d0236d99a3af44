"""More jobs of a real SLURM: arrays that make datasets, and runs that avoid a bad node."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data_pipeline.making.build import build
from data_pipeline.shards.dataset import open_dataset
from t2v.recipe.recipe import dump_config
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster
from tests.test_loop import config_of, dataset, status_of
from tests.test_render_slurm import NASTY

__all__ = ["dataset"]  # a fixture

ROOT = Path(__file__).resolve().parent.parent
# Reading it takes long enough to ask only once.
REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as running:
        yield running


def site(home: Path, **changes) -> str:
    """The path of a profile of the two nodes."""
    environment = {"PYTHONPATH": str(ROOT), **changes.pop("environment", {})}
    profile = {
        "kind": "slurm",
        "nodes": 2,
        "gpus_per_node": 0,
        "cpus_per_node": 1,
        "memory_gib": 8,
        "exclusive": False,
        "time_limit_minutes": 30,
        "workdir": str(home),
        "environment": environment,
        **changes,
    }
    (home / "site.yaml").write_text(yaml.safe_dump(profile))
    return str(home / "site.yaml")


def launch(cluster: SlurmCluster, *arguments: str, **environment: str) -> str:
    """The id of a job, by the command an operator would give."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    launched = subprocess.run(
        [sys.executable, "-m", "t2v.cli", *arguments],
        env=cluster.environment | environment | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr
    line = next(line for line in launched.stdout.splitlines() if line.startswith("job "))
    return line.split()[1].rstrip(":")


def wait_until_none_queues(cluster: SlurmCluster, home: Path) -> str:
    """What the jobs said."""
    deadline = time.monotonic() + 240
    while cluster.run("squeue", "--noheader"):
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.5)
    return "\n".join(log.read_text() for log in home.rglob("*.out"))


def test_an_array_builds_what_one_process_builds(cluster, media, tmp_path):
    environment = {f"NASTY_{number}": text for number, text in enumerate(NASTY)}
    (tmp_path / "secret").write_text("$(touch forged)\n")
    # The shell around each task writes down what it was given.
    (tmp_path / "tell").write_text('env -0 >"told-$SLURM_ARRAY_TASK_ID"\n')
    environment["BASH_ENV"] = str(tmp_path / "tell")
    secrets = [{"variable": "KEY", "file": str(tmp_path / "secret")}]
    profile = site(tmp_path, environment=environment, secrets=secrets)
    size = ["--size", "8x24x32", "--shard-samples", "6"]
    job = ["build", str(media / "videos"), "shards", *size, "--note", f"source={NASTY[3]}"]
    where = ["--cluster", profile, "--tasks", "2", "--cpus", "1", "--memory-gib", "1"]
    canary = {"HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz"}
    launch(cluster, "launch-data", *where, "--submit", "--", *job, **canary)
    logs = wait_until_none_queues(cluster, tmp_path)
    alone = tmp_path / "alone"
    build(media / "videos", alone, frames=8, height=24, width=32, shard_samples=6)
    found, wanted = open_dataset(str(tmp_path / "shards")).info, open_dataset(str(alone)).info
    assert found.shards == wanted.shards, logs
    assert found.notes == {"source": NASTY[3]}
    for task in range(2):
        told = (tmp_path / f"told-{task}").read_bytes().decode().split("\0")
        given = dict(entry.split("=", 1) for entry in told if entry)
        assert {name: given[name] for name in environment} == environment
        assert given["KEY"] == "$(touch forged)"
        assert "HF_TOKEN" not in given  # of the shell that submitted
    assert not (tmp_path / "forged").exists()


# As a node whose limits are too low for any run.
BAD_NODE = '[ "$SLURMD_NODENAME" = n1 ] && ulimit -n 200\n'


def test_a_node_that_fails_preflight_is_left_out_by_the_job_that_takes_over(
    cluster, dataset, tmp_path
):
    (tmp_path / "bad").write_text(BAD_NODE)
    recipe, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(dump_config(config_of(dataset, run_dir)))
    environment = {"BASH_ENV": str(tmp_path / "bad"), "OMP_NUM_THREADS": "1"}
    where = ["--cluster", site(tmp_path, environment=environment), "--nodes", "1", "--submit"]
    first = launch(cluster, "launch", str(recipe), *where)
    logs = wait_until_none_queues(cluster, tmp_path)
    assert status_of(run_dir)["state"] == "done", logs
    assert (run_dir / "bad_nodes").read_text().startswith("n1 2")
    assert f"job {int(first) + 1} avoids n1" in logs
    assert cluster.job(first)["NodeList"] == "n1"
    assert cluster.job(str(int(first) + 1))["NodeList"] == "n2"
    # The next launch of this run knows.
    assert launch(cluster, "launch", str(recipe), *where)
    scripts = list(run_dir.glob("launch/*/job.sbatch"))
    assert any("#SBATCH --exclude=n1" in script.read_text() for script in scripts)
    wait_until_none_queues(cluster, tmp_path)


def test_jobs_that_wait_already_avoid_a_node_that_is_found_bad(cluster, dataset, tmp_path):
    """None is added to their line. The folder's name is one that SLURM would replace a part of."""
    (tmp_path / "bad").write_text(BAD_NODE)
    recipe, run_dir = tmp_path / "recipe.yaml", tmp_path / "50%j"
    recipe.write_text(dump_config(config_of(dataset, run_dir)))
    environment = {"BASH_ENV": str(tmp_path / "bad"), "OMP_NUM_THREADS": "1"}
    profile = site(tmp_path, environment=environment, jobs_ahead=2)
    first = int(launch(cluster, "launch", str(recipe), "--cluster", profile, "--nodes", "1",
                       "--submit"))  # fmt: skip
    logs = wait_until_none_queues(cluster, tmp_path)
    assert status_of(run_dir)["state"] == "done", logs
    jobs = [cluster.job(str(first + number)) for number in range(3)]
    assert [job["NodeList"] for job in jobs[:2]] == ["n1", "n2"], logs
    assert [job["ExcNodeList"] for job in jobs[1:]] == ["n1", "n1"]
    names = sorted(path.name for path in (run_dir / "slurm").glob("*.out"))
    assert names == [f"tiny-{first + number}.out" for number in range(3)]


def test_a_job_that_may_not_be_requeued_saves_and_ends(cluster, dataset, tmp_path):
    recipe, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    config = config_of(dataset, run_dir, total_steps=100_000, checkpoint={"every_steps": 100_000})
    recipe.write_text(dump_config(config))
    where = ["--cluster", site(tmp_path, environment={"OMP_NUM_THREADS": "1"}), "--nodes", "1"]
    number = launch(cluster, "launch", str(recipe), *where, "--submit")
    deadline = time.monotonic() + 200
    while not (run_dir / "status.json").exists() or status_of(run_dir)["step"] < 3:
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.2)
    cluster.run("scontrol", "update", f"JobId={number}", "Requeue=0")
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    logs = wait_until_none_queues(cluster, tmp_path)
    status = status_of(run_dir)
    assert status["state"] == "preempted", logs
    assert status["last_checkpoint"] == status["step"]
    assert status["save_seconds"] > 0
    assert cluster.job(number)["Restarts"] == "0"
    assert cluster.job(number)["ExitCode"] == "75:0"
