"""The pods of a rendered Job train together and outlive the loss of one."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster.job import Grace, SharedMemory, TrainingJob
from cluster.profile import parse_profile
from cluster.render import OBJECTS, render
from t2v.recipe.recipe import dump_config
from tests.local_pods import Cluster, local_cluster, missing
from tests.test_loop import assert_same_tensors, config_of, dataset, status_of, tensors_at
from tests.test_profile import KUBERNETES

__all__ = ["dataset"]  # a fixture

STEPS = 60
REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.dist,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


def manifest(run: str) -> list[dict]:
    """What `kubectl` would be given for a run of two nodes without GPUs, read back from YAML."""
    config = config_of(
        Path("/data"),
        Path("runs", run),
        total_steps=STEPS,
        engine={"kind": "fsdp"},
        checkpoint={"every_steps": 20},
        optimizer={"eps": 1.0e-2},
    )
    mounts = [
        {"claim": "shared", "path": "/shared"},
        {"claim": "data", "path": "/data", "read_only": True},
    ]
    cpus = {"gpus_per_node": 0, "gpu_memory_gib": 0.0}
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    profile = parse_profile(
        {**KUBERNETES, **cpus, "flavour": "job", "mounts": mounts, "environment": environment},
        "site",
    )
    job = TrainingJob(
        name=run,
        run_dir=config.run_dir,
        nodes=2,
        ranks_per_node=1,
        recipe=dump_config(config),
        record={},
        grace=Grace(120, "a test"),
        shared_memory=SharedMemory(1, "a test"),
        setup_seconds=config.watchdog.setup_seconds,
    )
    return list(yaml.safe_load_all(render(job, profile)[OBJECTS]))


def told(cluster: Cluster, shared: Path) -> str:
    logs = [pod.log for pod in cluster.pods] + sorted(shared.rglob("*.log"))
    return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)


def test_pods_train_together_and_go_on_after_one_is_told_to_stop(dataset, tmp_path):
    if Path(sys.executable).is_relative_to("/tmp"):
        pytest.skip("a pod has a /tmp of its own, which hides this environment")
    shared = tmp_path / "shared"
    (shared / "t2v").mkdir(parents=True)
    for folder in (shared, shared / "t2v"):
        os.chown(folder, 1000, 1000)
    image = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    claims = {"shared": shared, "data": dataset}
    with local_cluster(tmp_path, claims, image) as cluster:
        whole, parts = manifest("whole"), manifest("parts")

        pods = [cluster.start(whole, index) for index in (1, 0)]
        assert [pod.end(200) for pod in pods] == [0, 0], told(cluster, shared)

        run_dir = shared / "t2v" / "runs" / "parts"
        pods = [cluster.start(parts, index) for index in (0, 1)]
        deadline = time.monotonic() + 200
        while not (run_dir / "status.json").exists() or status_of(run_dir)["step"] < 5:
            assert time.monotonic() < deadline, told(cluster, shared)
            assert all(pod.process.poll() is None for pod in pods), told(cluster, shared)
            time.sleep(0.05)
        pods[1].process.send_signal(signal.SIGTERM)
        assert [pod.end(150) for pod in pods] == [75, 75], told(cluster, shared)
        stopped = status_of(run_dir)
        assert stopped["state"] == "preempted"
        assert 5 <= stopped["step"] < STEPS

        # The Job makes both anew: its policy does not count pods that ended with 75.
        pods = [cluster.start(parts, index) for index in (0, 1)]
        assert [pod.end(200) for pod in pods] == [0, 0], told(cluster, shared)
        assert f"step-{stopped['step']:08d}" in told(cluster, shared)
    assert status_of(run_dir)["state"] == "done"
    assert_same_tensors(tensors_at(run_dir, STEPS), tensors_at(run_dir.parent / "whole", STEPS))
