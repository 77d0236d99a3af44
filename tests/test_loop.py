"""A run that is stopped, killed or moved goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.errors import ConfigError, NumericError, RunLocked
from data_pipeline.making.build import build
from data_pipeline.making.toy import write_toy
from t2v import loop
from t2v.attempt import preemption
from t2v.attempt.run_folder import locked
from t2v.checkpoint.compatibility import average_prefix
from t2v.checkpoint.export import read_export
from t2v.checkpoint.finding import list_checkpoints
from t2v.checkpoint.manifest import read_manifest
from t2v.checkpoint.power_average import PowerAverage, power_of, shares_of, stored_averages
from t2v.checkpoint.proving import verify_checkpoint
from t2v.checkpoint.tensor_files import read_whole, tensor_kinds
from t2v.cli import main
from t2v.loop import train
from t2v.methods.hpdm.method import HPDMMethod
from t2v.recipe.recipe import RunConfig, dump_config, load_config
from tests.distributed import next_world, run_distributed
from tests.test_warm_start import BASE
from tests.tiny import tiny_config

STEPS = 6


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Real shards of a few toy clips, with labels."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder / "media", videos=12, images=4, size=(4, 24, 32))
    listing = folder / "media" / "videos" / "captions.jsonl"
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    lines = [line | {"label": number % 3} for number, line in enumerate(lines)]
    listing.write_text("".join(json.dumps(line) + "\n" for line in lines))
    build(folder / "media" / "videos", folder / "shards", frames=4, height=12, width=16, fps=8.0)
    return folder / "shards"


@pytest.fixture(autouse=True)
def leave_no_handlers():
    yield
    preemption.disarm()


def config_of(dataset: Path, run_dir: Path, **changes) -> RunConfig:
    """Six steps of four clips, saved every two."""
    changes.setdefault("total_steps", STEPS)
    changes.setdefault("checkpoint", {"every_steps": 2})
    return tiny_config(run_dir=str(run_dir), data={"sources": [{"path": str(dataset)}]}, **changes)


def tensors_at(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    verify_checkpoint(folder)
    return {name: read_whole(folder, name) for name in tensor_kinds(folder)}


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def lines_of(run_dir: Path, *names: str) -> list:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("step", *names)] for line in lines]


def status_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def train_in_parts(config: RunConfig, stops: list[int]) -> list[int]:
    """Exit codes of a run that is stopped at steps, then finished."""
    codes = [train(config, stop_at_step=stop) for stop in stops]
    return [*codes, train(config)]


AVERAGES = {
    "ema_lengths": [0.05, 0.1],
    "checkpoint": {"every_steps": 2, "milestone_every_steps": 1},
}
LEARNED = {"loss_weights": "uncertainty"}
TRUTH = ("loss", "loss_level_0", "loss_level_1", "grad_norm", "learning_rate", "batch_digest")


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_stopped_twice_and_resumed_is_bitwise_the_run_that_never_stopped(dataset, tmp_path, name):
    change = {"optimizer": {"name": name}, **AVERAGES, **LEARNED}
    whole, parts = (config_of(dataset, tmp_path / name, **change) for name in ("whole", "parts"))
    assert train(whole) == 0
    assert train_in_parts(parts, [1, 3]) == [75, 75, 0]
    assert lines_of(tmp_path / "parts", *TRUTH) == lines_of(tmp_path / "whole", *TRUTH)
    found, wanted = (tensors_at(tmp_path / name, STEPS) for name in ("parts", "whole"))
    assert_same_tensors(found, wanted)
    assert status_of(tmp_path / "parts")["state"] == "done"
    # A finished run has nothing left to do; a refused recipe leaves no trace in the folder.
    assert train(whole) == 0
    with pytest.raises(ConfigError, match="seed: 3 -> 4"):
        train(config_of(dataset, tmp_path / "whole", seed=4, **change))
    assert load_config(tmp_path / "whole" / "config.yaml") == whole
    assert [line[0] for line in lines_of(tmp_path / "whole")] == list(range(1, STEPS + 1))


def test_an_average_of_any_length_is_exported_after_training(dataset, tmp_path, capsys):
    """A stored one bit by bit, and another as near as its profile is to the one that was kept."""
    lengths = {"ema_lengths": [0.05, 0.08, 0.1], "total_steps": 12}
    run, out = tmp_path / "run", tmp_path / "out"
    assert train(config_of(dataset, run, **AVERAGES | lengths)) == 0
    folder, found = run / "checkpoints" / "step-00000012", tensors_at(run, 12)
    for number, length in enumerate((0.08, 0.06)):
        told = ["checkpoint", "export", str(run), f"{out}-{number}", f"--ema-length={length}"]
        assert main(told) == 0
        assert "self-test: outputs equal" in capsys.readouterr().out
    exported = load_file(f"{out}-0/model.safetensors")
    assert_same_tensors(exported, {n: found[average_prefix(0.08) + n] for n in exported})
    assert 0 < read_export(Path(f"{out}-1")).ema_error < 0.2
    stored = stored_averages(folder, read_manifest(folder))
    others = [one for one in stored if one.prefix != average_prefix(0.08)]
    assert (len(stored), len(others)) == (18, 12)
    shares, error = shares_of([one.profile for one in others], (12, power_of(0.08)))
    made = PowerAverage(list(zip(shares, others, strict=True)), error)
    for name, tensor in exported.items():
        apart = float((found[average_prefix(0.1) + name] - tensor).norm())
        assert float((made.read(name) - tensor).norm()) < 0.2 * apart + 1e-7, name
    assert main(["checkpoint", "export", str(run), str(tmp_path / "x"), "--ema-length=0.5"]) == 78
    assert "0.5 is wrong because it is a share of training" in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_resume_bitwise_and_other_worlds_to_rounding(dataset, tmp_path):
    fsdp = {"engine": {"kind": "fsdp"}}
    # A large eps keeps rounding what it is; see tests/test_engine.py.
    tame = {"optimizer": {"eps": 1.0e-2}, **LEARNED}
    whole, parts = (config_of(dataset, tmp_path / n, **fsdp, **tame) for n in ("whole", "parts"))
    run_distributed(train_all_parts, 2, [whole, parts, parts, parts], [6, 1, 3, 6], worlds=4)
    assert_same_tensors(tensors_at(tmp_path / "parts", 6), tensors_at(tmp_path / "whole", 6))
    assert lines_of(tmp_path / "parts", *TRUTH) == lines_of(tmp_path / "whole", *TRUTH)
    # One process goes on with what two have saved, and sees the same batches.
    moved = tmp_path / "moved"
    (moved / "checkpoints").mkdir(parents=True)
    source = tmp_path / "whole" / "checkpoints" / "step-00000002"
    os.symlink(source, moved / "checkpoints" / source.name)
    assert train(config_of(dataset, moved, **tame)) == 0
    assert lines_of(moved, "batch_digest") == lines_of(tmp_path / "whole", "batch_digest")[2:]
    found, wanted = lines_of(moved, "loss"), lines_of(tmp_path / "whole", "loss")[2:]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)


def train_all_parts(configs: list[RunConfig], stops: list[int]) -> None:
    for number, (config, stop) in enumerate(zip(configs, stops, strict=True)):
        if number:
            next_world()
        assert train(config, stop_at_step=stop) == (0 if stop == STEPS else 75)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_run_moves_from_two_ranks_to_one_to_three_to_four(dataset, tmp_path):
    """R05: the same batches in the same order, losses to rounding, at every world size."""
    changes = {
        "engine": {"kind": "fsdp"},
        "optimizer": {"eps": 1.0e-2},
        "global_batch_size": 12,
        "total_steps": 8,
    }
    whole, moved = (config_of(dataset, tmp_path / name, **changes) for name in ("whole", "moved"))
    assert train(whole) == 0
    for ranks, stop in ((2, 2), (1, 4), (3, 6), (4, 8)):
        code = 75 if stop < 8 else 0
        codes = run_distributed(train_until, ranks, moved, stop, timeout_seconds=300)
        assert codes == [code] * ranks
    assert lines_of(tmp_path / "moved", "batch_digest") == lines_of(
        tmp_path / "whole", "batch_digest"
    )
    found, wanted = (lines_of(tmp_path / name, "loss") for name in ("moved", "whole"))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)


def train_until(config: RunConfig, stop: int) -> int:
    return train(config, stop_at_step=stop)


def command(config: RunConfig) -> list[str]:
    recipe = Path(config.run_dir).with_suffix(".yaml")
    recipe.write_text(dump_config(config))
    return [sys.executable, "-m", "t2v.cli", "train", str(recipe)]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert process.poll() is None, process.returncode
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.dist
@pytest.mark.parametrize("request_stop", ["signal", "flag"])
def test_preempted_run_saves_the_step_it_is_at_and_exits_75(dataset, tmp_path, request_stop):
    run_dir = tmp_path / "run"
    config = config_of(dataset, run_dir, total_steps=5000, checkpoint={"every_steps": 5000})
    process = subprocess.Popen(command(config))
    wait_for_step(run_dir, 3, process)
    if request_stop == "signal":
        process.send_signal(signal.SIGTERM)
    else:
        (run_dir / "PREEMPT").touch()
    assert process.wait(timeout=30) == 75
    status = status_of(run_dir)
    (info,) = list_checkpoints(run_dir)
    assert status["state"] == "preempted"
    assert info.step == status["step"] == status["last_checkpoint"] >= 3
    assert lines_of(run_dir)[-1] == [info.step]
    assert not (run_dir / "PREEMPT").exists()


@pytest.mark.dist
def test_killed_run_loses_at_most_the_steps_since_its_checkpoint(dataset, tmp_path):
    changes = {"total_steps": 20, "checkpoint": {"every_steps": 5}}
    whole = config_of(dataset, tmp_path / "whole", **changes)
    killed = config_of(dataset, tmp_path / "killed", **changes)
    process = subprocess.Popen(command(killed))
    wait_for_step(tmp_path / "killed", 7, process)
    process.kill()
    process.wait()
    assert train(killed) == 0
    assert train(whole) == 0
    assert_same_tensors(tensors_at(tmp_path / "killed", 20), tensors_at(tmp_path / "whole", 20))
    assert lines_of(tmp_path / "killed", *TRUTH) == lines_of(tmp_path / "whole", *TRUTH)


def test_request_before_the_first_step_ends_without_a_checkpoint(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "PREEMPT").touch()
    assert train(config) == 75
    assert list_checkpoints(tmp_path / "run") == []
    assert train(config) == 0


def poison(monkeypatch, config: RunConfig, steps: set[int]) -> None:
    """Make the loss of whole steps NaN, as one bad clip or one bad chip would."""
    real = HPDMMethod.losses

    def poisoned(method, network, batch, **settings):
        step = int(batch.numbers[0]) // config.global_batch_size + 1
        losses = real(method, network, batch, **settings)
        return losses * float("nan") if step in steps else losses

    monkeypatch.setattr(HPDMMethod, "losses", poisoned)


def test_step_without_a_finite_gradient_changes_nothing_and_names_its_samples(
    dataset, tmp_path, monkeypatch
):
    config = config_of(dataset, tmp_path / "run", checkpoint={"every_steps": 1, "keep_last": 9})
    poison(monkeypatch, config, {3})
    assert train(config) == 0
    assert_same_tensors(tensors_at(tmp_path / "run", 3), tensors_at(tmp_path / "run", 2))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    third = json.loads(lines[2])
    assert (third["loss"], third["grad_norm"]) == (None, None)
    assert len(third["skipped_samples"]) == config.global_batch_size
    assert not torch.equal(
        tensors_at(tmp_path / "run", 4)["model.latents"],
        tensors_at(tmp_path / "run", 3)["model.latents"],
    )


def test_too_many_such_steps_in_a_row_end_the_run_without_saving(dataset, tmp_path, monkeypatch):
    config = config_of(
        dataset, tmp_path / "run", optimizer={"max_skips_in_a_row": 3}, total_steps=20
    )
    poison(monkeypatch, config, {4, 5, 6})
    with pytest.raises(NumericError, match="no finite gradient in 3 steps in a row up to step 6"):
        train(config)
    assert [info.step for info in list_checkpoints(tmp_path / "run")] == [2, 4]
    assert status_of(tmp_path / "run")["state"] == "failed"


def test_weights_that_are_not_finite_are_never_saved(dataset, tmp_path):
    config = config_of(
        dataset,
        tmp_path / "run",
        optimizer={"learning_rate": 1e38, "warmup_steps": 0, "weight_decay": 1e5},
        checkpoint={"every_steps": 1},
    )
    with pytest.raises(NumericError, match="not saved"):
        train(config)
    assert list_checkpoints(tmp_path / "run") == []


def test_second_run_in_the_same_folder_is_refused(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run")
    hold = "import sys; from pathlib import Path; from t2v.attempt.run_folder import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match="is in use by"):
            train(config)
        process.kill()
    with locked(tmp_path / "run"):
        pass


def test_pyramid_begins_from_its_base_once_and_then_from_itself(dataset, tmp_path, capsys):
    base = config_of(dataset, tmp_path / "base", **BASE)
    assert train(base) == 0
    start = {"checkpoint": str(tmp_path / "base")}
    pyramid = config_of(dataset, tmp_path / "run", warm_start=start)
    assert train_in_parts(pyramid, [2]) == [75, 0]
    output = capsys.readouterr().out
    assert output.count("warm start from") == 1
    assert "new: conditioning.level_embedding, blocks.1.fusion.linear.weight" in output
    assert output.count("resumed from") == 1


def test_batch_that_the_ranks_cannot_share_is_refused(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run", engine={"kind": "fsdp"}, micro_batch_size=4)
    with pytest.raises(ConfigError, match="3 ranks of micro_batch_size 4 do not divide it"):
        loop.accumulation_steps(config, 3)
