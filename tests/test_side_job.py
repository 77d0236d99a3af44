"""Sampling beside a run: what is due, one job at a time, failures told and never passed on."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, InputMissing
from t2v.loop import train
from t2v.recipe.recipe import dump_config, parse_config
from t2v.watching.side_job import (
    SamplesConfig,
    SideJob,
    due_steps,
    read_state,
    sample_command,
    sample_run,
    samples_config,
)
from tests.test_loop import config_of, dataset, leave_no_handlers
from tests.tiny import RECIPE, tiny_config

__all__ = ["dataset", "leave_no_handlers"]
LABELS = {"every_steps": 2, "labels": [0, 2]}


def commit(run_dir: Path, folder: str, step: int) -> None:
    """An empty stand-in for a finished step."""
    proof = {"checkpoints": "manifest.json", "samples": "samples.json"}[folder]
    path = run_dir / folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / proof).write_text("[]")


def run_of(run_dir: Path, **samples) -> None:
    run_dir.mkdir(exist_ok=True)
    config = tiny_config(run_dir=str(run_dir), samples=LABELS | samples)
    (run_dir / "config.yaml").write_text(dump_config(config))


def test_due_are_committed_steps_far_enough_from_those_sampled_newest_first(tmp_path):
    for step in (100, 150, 200, 300, 320, 400):
        commit(tmp_path, "checkpoints", step)
    commit(tmp_path, "samples", 200)
    (tmp_path / "checkpoints" / "step-00000500").mkdir()  # not committed
    (tmp_path / "checkpoints" / "refused-step-00000600-1").mkdir()
    assert due_steps(tmp_path, 100) == [400, 300, 100]
    assert due_steps(tmp_path, 1) == [400, 320, 300, 150, 100]
    assert due_steps(tmp_path, 1000) == []


def test_prompts_reach_the_command_as_they_are():
    prompts = ["--out=/etc", "two\nlines; rm -rf ~", "'quoted'"]
    config = SamplesConfig(every_steps=1, prompts=prompts, settings=["steps=[2]"], encoder="t5")
    command = sample_command(Path("c"), Path("o"), config, None)
    assert [word for word in command if word.startswith("--prompt=")] == [
        f"--prompt={prompt}" for prompt in prompts
    ]
    assert "--encoder=t5" in command
    assert "--encoder=other" in sample_command(Path("c"), Path("o"), config, "other")


def test_samples_that_cannot_be_are_refused_in_one_line(tmp_path):
    text = {"kind": "text", "encoder": "tiny", "width": 8, "max_tokens": 4}
    for conditioning, samples, said in (
        (None, {"every_steps": 1}, "samples: give prompts, labels or"),
        (None, {"every_steps": 1, "labels": [3]}, r"samples\.labels: \[3\] given; use classes 0"),
        (None, {"every_steps": 1, "prompts": ["a"]}, "samples.labels: none given"),
        (text, {"every_steps": 1, "labels": [1]}, "samples.prompts: missing"),
        (text, {"every_steps": 1, "prompts": ["a"]}, "samples.encoder: missing"),
        ({"kind": "none"}, {"every_steps": 1, "prompts": ["a"]}, "samples.count: missing"),
    ):
        changes = {"samples": samples} | ({"conditioning": conditioning} if conditioning else {})
        with pytest.raises(ConfigError, match=said):
            parse_config(RECIPE | changes, "tiny")
    with pytest.raises(InputMissing, match=r"config\.yaml: missing"):
        samples_config(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config()))
    with pytest.raises(ConfigError, match="has no samples section"):
        samples_config(tmp_path)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_sampled_is_told_and_left(tmp_path, capsys):
    run_of(tmp_path)
    commit(tmp_path, "checkpoints", 2)
    assert sample_run(tmp_path, follow=False, parent=None, encoder=None) == 74
    state = read_state(tmp_path)
    assert (state["state"], state["step"]) == ("failed", 2)
    assert "manifest" in state["reason"]
    assert "step 2: not sampled because" in capsys.readouterr().out
    assert not list((tmp_path / "samples").glob("*step-*"))


def test_there_is_never_a_second_job(tmp_path):
    run_of(tmp_path)
    (tmp_path / "samples").mkdir()
    hold = "import sys; from pathlib import Path; from t2v.watching.side_job import alone\n"
    hold += "with alone(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "samples")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        command = [sys.executable, "-m", "t2v.cli", "samples", str(tmp_path)]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        holder.kill()
    assert second.returncode == 73
    assert "another job is sampling this run" in second.stderr


def test_a_job_that_dies_is_told_and_closing_it_is_harmless(tmp_path):
    job = SideJob(tmp_path, SamplesConfig(every_steps=1, labels=[0]))  # no config.yaml: it ends
    assert job.process is not None
    job.process.wait(timeout=60)
    job.looked = -1e9
    assert job.state()["state"] == "failed"
    assert "exit code 66" in job.state()["reason"]
    job.close()


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_is_sampled_beside_it_and_what_is_missing_afterwards(dataset, tmp_path):
    run_dir = tmp_path / "run"
    plain = config_of(dataset, tmp_path / "plain")
    assert train(plain) == 0
    config = config_of(dataset, run_dir, samples=LABELS | {"settings": ["steps=[1,1]"]})
    assert train(config) == 0
    same = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "run")]
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in same]
    assert losses[0] == losses[1]
    sample_run(run_dir, follow=True, parent=None, encoder=None)  # ends, because the run is done
    for step in (2, 4, 6):
        folder = run_dir / "samples" / f"step-{step:08d}"
        records = json.loads((folder / "samples.json").read_text())
        assert [record["prompt"] for record in records] == [0, 2]
        assert all((folder / record["file"]).stat().st_size for record in records)
    assert read_state(run_dir)["state"] == "done"


@pytest.mark.slow
@pytest.mark.dist
def test_the_automatic_job_follows_a_run_and_ends_with_it(dataset, tmp_path):
    run_of(tmp_path)
    with closing(SideJob(tmp_path, SamplesConfig.model_validate(LABELS))) as job:
        assert job.process is not None
        commit(tmp_path, "checkpoints", 2)
        deadline = time.monotonic() + 1200  # it gives way to all others
        while read_state(tmp_path).get("state") != "failed":
            assert time.monotonic() < deadline
            assert job.process.poll() is None
            time.sleep(0.2)
        assert os.getpriority(os.PRIO_PROCESS, job.process.pid) == 19
    assert job.process.poll() is not None
