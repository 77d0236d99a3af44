"""The rank that others wait for is named with what it costs, and no rank where all are alike."""

import io
import json
import random
import threading
import time

import pytest

from cluster.status import run_status
from cluster.status_view import shown
from data_pipeline.terminal import Terminal
from t2v.attempt import collectives
from t2v.engine.world import ALONE, World
from t2v.watching.metrics import read_lines
from t2v.watching.stragglers import LEAST_SHARE, Waits, late_ranks
from tests.faulty_runs import run_job
from tests.test_loop import config_of, dataset

__all__ = ["dataset"]  # a fixture

LOOKS = 400


def test_who_waits_less_than_most_is_late_by_what_most_wait_more():
    assert late_ranks([0.5, 0.1], LOOKS) == {1: pytest.approx(0.4)}
    assert late_ranks([0.0, 0.5, 0.4, 0.5], LOOKS) == {0: pytest.approx(0.5)}
    assert list(late_ranks([0.2, 0.6, 0.0, 0.6, 0.6, 0.6], LOOKS)) == [2, 0]  # the worst first
    assert late_ranks([0.3, 0.3, 0.3], LOOKS) == {}  # a slow network makes all wait alike
    assert late_ranks([0.0, 0.0, 0.0, 0.6], LOOKS) == {}  # where most are slow, one is quick
    assert late_ranks([0.4], LOOKS) == late_ranks([], LOOKS) == {}
    assert late_ranks([LEAST_SHARE - 0.01, 0.0], 10**9) == {}


def test_the_order_of_ranks_does_not_matter():
    rng = random.Random(0)
    waited = [rng.random() for _ in range(9)]
    found = late_ranks(waited, LOOKS)
    assert found
    places = list(range(9))
    rng.shuffle(places)
    moved = late_ranks([waited[place] for place in places], LOOKS)
    assert {places[rank]: share for rank, share in moved.items()} == found


def test_chance_names_nobody():
    rng = random.Random(1)
    for looks in (20, 100, 400):
        for share in (0.05, 0.3, 0.6):
            waited = [sum(rng.random() < share for _ in range(looks)) / looks for _ in range(512)]
            assert late_ranks(waited, looks) == {}


def test_a_rank_waits_while_it_agrees_with_others_and_works_otherwise(monkeypatch):
    def slowly(self: World, values):
        time.sleep(2.0)
        return values

    # Whoever looks knows the method by its code.
    monkeypatch.setattr("t2v.watching.stragglers.AGREEING", {slowly.__code__})
    waits = Waits(World(device=ALONE.device))
    waits.is_cpu = False
    try:
        slowly(ALONE, 0)
        waited = waits.now()
        waits.begin_anew()
        threading.Event().wait(2.0)
        worked = waits.now()
    finally:
        waits.close()
    assert waited.looks > 5
    assert waited.share > 0.7
    assert worked.share < 0.3


def test_what_a_devices_recorder_tells_of_collectives(monkeypatch):
    """As NCCL's recorder writes it where it times; gloo's has no durations."""
    entries = [
        {"time_created_ns": int((10 + n) * 1e9), "duration_ms": 250.0, "state": "completed"}
        for n in range(5)
    ]
    entries.append({"time_created_ns": int(15e9), "state": "scheduled"})  # not yet over
    dump = json.loads(json.dumps({"_dump_nccl_trace_json": {"entries": entries}}))
    monkeypatch.setattr(collectives, "recorded", lambda: dump)
    assert collectives.collective_seconds(0) == (1.25, 4.0, int(14e9))
    assert collectives.collective_seconds(int(12e9)) == (0.5, 1.0, int(14e9))
    assert collectives.collective_seconds(int(14e9)) == (0.0, 0.0, int(14e9))
    monkeypatch.setattr(collectives, "recorded", dict)
    assert collectives.collective_seconds(7) == (0.0, 0.0, 7)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("site", ["data", "forward", "step"])
def test_a_slow_rank_is_named_with_its_share(dataset, tmp_path, site):
    job, log = run_job(slow_config(dataset, tmp_path), faults_at(site, ranks=[1]))
    assert job.exit_code == 0, log
    assert "rank 1 on " in log
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    found = status["straggler"]
    assert (found["rank"], found["steps"], found["host"]) == (1, 4, status["host"])
    assert 0.6 < found["share"] <= 1.0  # of every step five seconds, and others are quick
    lines = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [line["straggler_rank"] for line in lines if "straggler_rank" in line] == [1, 1]
    told = (tmp_path / "run" / "attempts.jsonl").read_text()
    assert told.count('"straggler"') == 1  # it is news once
    console = Terminal(width=160, file=io.StringIO(), record=True)
    console.print(shown([run_status(tmp_path / "run")]))
    assert f"rank 1 on {status['host']}" in console.export_text()


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_that_are_slow_alike_are_named_by_nobody(dataset, tmp_path):
    job, log = run_job(slow_config(dataset, tmp_path), faults_at("forward", ranks=[0, 1]))
    assert job.exit_code == 0, log
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["straggler"] is None
    lines = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [line["straggler_rank"] for line in lines if "straggler_rank" in line] == [-1, -1]
    assert '"straggler"' not in (tmp_path / "run" / "attempts.jsonl").read_text()


def faults_at(site: str, *, ranks: list[int]) -> str:
    return ";".join(f"{site}:{rank}:{step}:slow" for rank in ranks for step in range(1, 9))


def slow_config(dataset, tmp_path):
    metrics = {"every_steps": 1, "straggler_steps": 4}
    return config_of(
        dataset, tmp_path / "run", total_steps=8, metrics=metrics, engine={"kind": "fsdp"}
    )
