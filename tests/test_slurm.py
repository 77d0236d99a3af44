"""Jobs of a real SLURM: launched, preempted, broken, and finished as if nothing had happened."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from t2v.recipe.recipe import dump_config
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster
from tests.test_loop import assert_same_tensors, config_of, dataset, status_of, tensors_at

__all__ = ["dataset"]  # a fixture

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40
# Reading it takes long enough to ask only once.
REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.dist,
    pytest.mark.timeout(900),  # on a machine that may be busy
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as running:
        yield running


def launch(cluster: SlurmCluster, dataset: Path, home: Path, **profile) -> tuple[str, Path]:
    """The id and run folder of a job of two nodes, by the command an operator would give."""
    run_dir = home / "run"
    recipe, site = home / "recipe.yaml", home / "site.yaml"
    config = config_of(
        dataset,
        run_dir,
        total_steps=STEPS,
        engine={"kind": "fsdp"},
        checkpoint={"every_steps": 10},
    )
    recipe.write_text(dump_config(config))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= profile.pop("environment", {})
    content = {
        "kind": "slurm",
        "nodes": 2,
        "gpus_per_node": 0,
        "cpus_per_node": 1,
        "memory_gib": 8,
        "exclusive": False,
        "time_limit_minutes": 30,
        "workdir": str(home),
        "environment": environment,
        **profile,
    }
    site.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "t2v.cli", "launch", str(recipe)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, "--cluster", str(site), "--submit"],
        env=cluster.environment | {"PATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("job "))
    return line.split()[1].rstrip(":"), run_dir


def wait_for_step(cluster: SlurmCluster, job_id: str, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "status.json").exists() or status_of(run_dir)["step"] < step:
        state = cluster.job(job_id)["JobState"]
        assert state in ("PENDING", "RUNNING"), story(cluster, run_dir)
        assert time.monotonic() < deadline, story(cluster, run_dir)
        time.sleep(0.1)


def wait_for_end(cluster: SlurmCluster, job_id: str, run_dir: Path, state: str) -> dict[str, str]:
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    job = cluster.wait_for(job_id, *ends, seconds=200)
    assert job["JobState"] == state, story(cluster, run_dir)
    return job


def story(cluster: SlurmCluster, run_dir: Path) -> str:
    logs = [*run_dir.glob("slurm/*.out"), *run_dir.glob("logs/*/*.log")]
    texts = [f"== {path}\n{path.read_text(errors='replace')[-4000:]}" for path in sorted(logs)]
    return "\n".join([*texts, cluster.logs()])


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The processes that train in a run folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and any(word.startswith(str(run_dir)) for word in words):
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


@pytest.fixture(scope="module")
def undisturbed(cluster, dataset, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The last checkpoint of a job that nothing befell."""
    job_id, run_dir = launch(cluster, dataset, tmp_path_factory.mktemp("undisturbed"))
    job = wait_for_end(cluster, job_id, run_dir, "COMPLETED")
    assert job["Restarts"] == "0"
    assert status_of(run_dir)["state"] == "done"
    return tensors_at(run_dir, STEPS)


def test_a_preempted_job_saves_is_requeued_and_ends_as_the_undisturbed_one(
    cluster, dataset, undisturbed, tmp_path
):
    """R09."""
    job_id, run_dir = launch(cluster, dataset, tmp_path)
    wait_for_step(cluster, job_id, run_dir, 10)
    cluster.run("scancel", "--signal=USR1", "--batch", job_id)
    cluster.wait_for(job_id, "PENDING", seconds=60)
    stopped = status_of(run_dir)
    assert stopped["state"] == "preempted", story(cluster, run_dir)
    assert 10 <= stopped["step"] < STEPS
    assert stopped["last_checkpoint"] == stopped["step"]
    job = wait_for_end(cluster, job_id, run_dir, "COMPLETED")
    assert job["Restarts"] == "1"
    log = next(run_dir.glob("slurm/*.out")).read_text()
    assert f"resumed from {run_dir}/checkpoints/step-{stopped['step']:08d}" in log
    assert "Traceback" not in log
    assert_same_tensors(tensors_at(run_dir, STEPS), undisturbed)


def test_a_requeued_job_avoids_a_node_that_was_found_bad_meanwhile(cluster, dataset, tmp_path):
    job_id, run_dir = launch(cluster, dataset, tmp_path, nodes=1)
    wait_for_step(cluster, job_id, run_dir, 5)
    first = cluster.job(job_id)["NodeList"]
    (run_dir / "bad_nodes").write_text(f"{first} 2999-01-01T00:00:00+00:00\n")
    cluster.run("scancel", "--signal=USR1", "--batch", job_id)
    cluster.wait_for(job_id, "PENDING", seconds=60)
    job = wait_for_end(cluster, job_id, run_dir, "COMPLETED")
    assert job["Restarts"] == "1"
    assert job["NodeList"] == ({"n1", "n2"} - {first}).pop()


def test_a_job_that_loses_a_rank_and_then_a_node_ends_as_the_undisturbed_one(
    cluster, dataset, undisturbed, tmp_path
):
    job_id, run_dir = launch(cluster, dataset, tmp_path)
    wait_for_step(cluster, job_id, run_dir, 15)
    ranks_of(run_dir)[-1].kill()
    cluster.wait_for(job_id, "PENDING", seconds=90)
    cluster.wait_for(job_id, "RUNNING")
    wait_for_step(cluster, job_id, run_dir, 25)
    cluster.kill_node("n2")
    cluster.wait_for(job_id, "PENDING", seconds=90)
    cluster.start_daemon("n2")
    job = wait_for_end(cluster, job_id, run_dir, "COMPLETED")
    assert job["Restarts"] == "2"
    assert_same_tensors(tensors_at(run_dir, STEPS), undisturbed)


def test_a_job_that_always_crashes_stops_at_the_restart_limit(cluster, dataset, tmp_path):
    """R28."""
    fault = {"T2V_FAULT": "step:1:3:kill"}
    job_id, run_dir = launch(cluster, dataset, tmp_path, environment=fault, restart_limit=1)
    job = wait_for_end(cluster, job_id, run_dir, "FAILED")
    assert job["Restarts"] == "1"
    log = next(run_dir.glob("slurm/*.out")).read_text()
    assert "not requeued because it has restarted 1 times" in log
