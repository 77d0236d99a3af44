"""Settings that may change where a run goes on: batches, length, sources; samples are counted."""

import json
import shutil
import subprocess

import pytest

from data_pipeline.errors import ConfigError
from t2v.checkpoint.manifest import read_manifest
from t2v.cli import main
from t2v.loop import train
from t2v.recipe.recipe import RunConfig, dump_config
from tests.distributed import run_distributed
from tests.test_loop import (
    TRUTH,
    assert_same_tensors,
    command,
    config_of,
    dataset,
    leave_no_handlers,
    lines_of,
    tensors_at,
    train_until,
    wait_for_step,
)

__all__ = ["dataset", "leave_no_handlers"]
LARGER = {"global_batch_size": 8, "micro_batch_size": 2}
TAME = {"optimizer": {"eps": 1.0e-2}}  # keeps rounding what it is; see tests/test_engine.py


@pytest.mark.slow
def test_larger_batches_go_on_at_the_same_sample_with_moments_and_averages(dataset, tmp_path):
    """Killed in mid-run and gone on with larger batches is stopped there and gone on so."""
    stopped = config_of(dataset, tmp_path / "stopped")
    assert train(stopped, stop_at_step=2) == 75
    keep = {"every_steps": 2, "keep_last": 1000}
    killed = config_of(dataset, tmp_path / "killed", total_steps=5000, checkpoint=keep)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL)
    wait_for_step(tmp_path / "killed", 4, process)
    process.kill()
    process.wait()
    for step in tmp_path.glob("killed/checkpoints/step-*"):
        if step.name > "step-00000002":
            shutil.rmtree(step)  # however far it came: both go on from step 2
    longer = {**LARGER, "total_steps": 8}
    for name in ("stopped", "killed"):
        assert train(config_of(dataset, tmp_path / name, **longer)) == 0
    found, wanted = (tensors_at(tmp_path / name, 8) for name in ("killed", "stopped"))
    assert_same_tensors(found, wanted)
    at_two = tmp_path / "stopped" / "checkpoints" / "step-00000002"
    at_eight = tmp_path / "stopped" / "checkpoints" / "step-00000008"
    assert not at_two.exists() or read_manifest(at_two).samples == 8
    manifest = read_manifest(at_eight)
    assert (manifest.samples, manifest.updates) == (2 * 4 + 6 * 8, 8)
    assert manifest.config["global_batch_size"] == 8
    samples = [line[1] for line in lines_of(tmp_path / "stopped", "samples")]
    assert samples == [4, 8, 16, 24, 32, 40, 48, 56]


@pytest.mark.slow
@pytest.mark.dist
def test_changed_batches_are_the_same_on_two_ranks_to_rounding(dataset, tmp_path, capfd):
    alone, two = (config_of(dataset, tmp_path / name, **TAME) for name in ("alone", "two"))
    for config in (alone, two):
        assert train(config, stop_at_step=2) == 75
    assert train(config_of(dataset, tmp_path / "alone", **TAME, **LARGER)) == 0
    split = config_of(dataset, tmp_path / "two", **TAME, **LARGER, engine={"kind": "fsdp"})
    assert run_distributed(train_until, 2, split, 6) == [0, 0]
    assert lines_of(tmp_path / "two", "batch_digest") == lines_of(
        tmp_path / "alone", "batch_digest"
    )
    found, wanted = lines_of(tmp_path / "two", "loss"), lines_of(tmp_path / "alone", "loss")
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-5)
    told = capfd.readouterr().out
    assert "  from sample 8 on: global_batch_size: 4 -> 8\n" in told


def test_smaller_micro_batches_and_a_change_of_batches_are_stopped_and_resumed_bit_for_bit(
    dataset, tmp_path
):
    for name, stops in {"once": [], "often": [3, 4]}.items():
        assert train(config_of(dataset, tmp_path / name), stop_at_step=2) == 75
        changed = config_of(dataset, tmp_path / name, **LARGER)
        for stop in stops:
            assert train(changed, stop_at_step=stop) == 75
        assert train(changed) == 0
    assert lines_of(tmp_path / "often", *TRUTH) == lines_of(tmp_path / "once", *TRUTH)
    assert_same_tensors(tensors_at(tmp_path / "often", 6), tensors_at(tmp_path / "once", 6))


def test_an_added_source_is_refused_with_what_would_happen_and_then_goes_on(
    dataset, tmp_path, capsys
):
    config = config_of(dataset, tmp_path / "run")
    assert train(config, stop_at_step=3) == 75
    # Two folders of one dataset are one sequence: another needs samples of its own.
    other = shutil.copytree(dataset, tmp_path / "more")
    info = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(info | {"fingerprint": "0" * 64}))
    sources = [{"path": str(dataset)}, {"path": str(other)}]
    added = config.model_dump(mode="json") | {"data": {**config.data.model_dump(mode="json")}}
    added["data"]["sources"] = sources
    recipe = tmp_path / "added.yaml"
    recipe.write_text(dump_config(RunConfig.model_validate(added)))
    with pytest.raises(ConfigError, match=r"accept_data_change=true, and it goes on so") as refused:
        train(RunConfig.model_validate(added))
    goes_on = f"  {dataset}: goes on at sample 0 of 12 in its pass 2, nothing repeated or skipped"
    assert goes_on in str(refused.value)
    assert f"  {other}: is new and begins at its first" in str(refused.value)
    assert main(["train", str(recipe), "checkpoint.accept_data_change=true"]) == 0
    assert f"from sample 12 on: {other}: is new" in capsys.readouterr().out
    # Told once; from then on it is the run's own, and `data order` knows it by a checkpoint.
    assert train(RunConfig.model_validate(added | {"total_steps": 7})) == 0
    last = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert read_manifest(last).mixture.since == 12
    ask = ["data", "order", str(recipe), "--step", "7", "--json", "--checkpoint", str(last)]
    capsys.readouterr()
    assert main(ask) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [sample["n"] for sample in printed] == [24, 25, 26, 27]
    assert {sample["dataset"] for sample in printed} == {str(dataset), str(other)}
    assert main([*ask[:4], "6", *ask[5:]]) == 78


def test_a_length_below_the_step_is_told_and_nothing_is_done(dataset, tmp_path, capsys):
    config = config_of(dataset, tmp_path / "run")
    assert train(config, stop_at_step=4) == 75
    before = tensors_at(tmp_path / "run", 4)
    assert train(config_of(dataset, tmp_path / "run", total_steps=3)) == 0
    told = capsys.readouterr().out
    assert "which is past total_steps: nothing is left to do" in told
    assert "total_steps: 6 -> 3" in told
    assert_same_tensors(tensors_at(tmp_path / "run", 4), before)
