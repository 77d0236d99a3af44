"""A checkpoint is complete and right, or it is not one."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.errors import ConfigError, InputMissing, RunLocked, StorageError
from data_pipeline.feeding.mixture import Mixture
from t2v.checkpoint import host_copy
from t2v.checkpoint.checkpoints import Checkpoints
from t2v.checkpoint.config import CheckpointConfig
from t2v.checkpoint.finding import (
    list_checkpoints,
    load_weights,
    print_checkpoints,
    resolve_checkpoint,
    step_folder,
)
from t2v.checkpoint.manifest import read_manifest
from t2v.checkpoint.proving import verify_checkpoint
from t2v.checkpoint.tensor_files import INDEX, file_of
from t2v.engine.world import ALONE
from t2v.recipe.recipe import RunConfig, method_of
from t2v.train.ema import Ema, half_life
from t2v.train.state import TrainState
from tests.tiny import tiny_config
from tests.training import engine_of

TENSORS = file_of(0)


def fresh_state(config: RunConfig) -> TrainState:
    engine = engine_of(config, ALONE)
    averages = Ema(engine.parameters(), half_life(config.ema_half_life_steps))
    return TrainState(engine, averages, config.global_batch_size)


def shuffled_state(config: RunConfig, seed: int = 0) -> TrainState:
    """A state in which every tensor has values of its own."""
    state = fresh_state(config)
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors_of(state).values():
        tensor.normal_(generator=generator)
    state.engine.updates = 7
    return state


def tensors_of(state: TrainState) -> dict[str, torch.Tensor]:
    """Everything a checkpoint of an unsplit state holds."""
    return {name: piece.part for name, piece in state.slices().items()}


def facts(config: RunConfig, step: int) -> dict:
    return {
        "step": step,
        "updates": 7,
        "engine": "single",
        "config": json.loads(config.model_dump_json()),
        "samples": 4 * step,
        "data_fingerprint": "data",
        "mixture": Mixture(parts=()),
        "text_encoder": None,
    }


@pytest.fixture(scope="module")
def state() -> TrainState:
    return shuffled_state(tiny_config())


def checkpoints(run_dir: Path, **settings) -> Checkpoints:
    made = Checkpoints(run_dir, CheckpointConfig(every_steps=1, **settings), ALONE)
    made.clean()
    return made


def save(state: TrainState, made: Checkpoints, *steps: int) -> list[Path]:
    for step in steps:
        made.save(state.slices(), facts(tiny_config(), step))
        made.finish()
    return [step_folder(made.folder, step) for step in steps]


def test_restored_state_is_bitwise_the_saved_one(state, tmp_path):
    made = checkpoints(tmp_path)
    save(state, made, 3)
    folder, manifest = made.newest()
    other = fresh_state(tiny_config())
    other.restore(folder, manifest)
    assert (other.step, other.engine.updates) == (3, 7)
    saved = tensors_of(state)
    for name, tensor in tensors_of(other).items():
        assert torch.equal(tensor, saved[name]), name


def test_checkpoint_holds_weights_averages_and_both_moments_of_every_parameter(state):
    names = [name for name, _ in state.engine.model.named_parameters()]
    prefixes = ("model", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert set(tensors_of(state)) == {f"{prefix}.{name}" for prefix in prefixes for name in names}


def flip_bit(folder: Path) -> None:
    path = folder / TENSORS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / TENSORS, 1000)


def delete_tensors(folder: Path) -> None:
    (folder / TENSORS).unlink()


def delete_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 100)


def swap_index(folder: Path) -> None:
    (folder / INDEX).write_bytes(b"\0" * (folder / INDEX).stat().st_size)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_bit, f"{TENSORS}: its bytes have changed"),
        (truncate, f"{TENSORS}: 1000 bytes instead of"),
        (delete_tensors, f"{TENSORS}: missing"),
        (delete_manifest, "manifest.json is missing"),
        (damage_manifest, "manifest.json: is wrong because it is damaged"),
        (swap_index, "tensors.json: its bytes have changed"),
    ],
)
def test_damaged_newest_is_refused_by_name_and_the_previous_is_used(
    state, tmp_path, capsys, damage, named
):
    made = checkpoints(tmp_path)
    first, second = save(state, made, 1, 2)
    damage(second)
    with pytest.raises(StorageError, match="use another checkpoint"):
        verify_checkpoint(second)
    folder, _ = made.newest()
    assert folder == first
    assert named in capsys.readouterr().out
    # The step can be saved again; the damaged one is kept aside.
    assert save(state, made, 2) == [second]
    verify_checkpoint(second)
    assert len(list(second.parent.glob("refused-step-00000002-*"))) == 1


def test_run_does_not_begin_anew_where_no_checkpoint_is_valid(state, tmp_path):
    made = checkpoints(tmp_path)
    (folder,) = save(state, made, 1)
    flip_bit(folder)
    with pytest.raises(StorageError, match=r"none of its 1 checkpoints is valid.*have changed"):
        made.newest()


def test_what_is_saved_is_the_state_at_the_call(state, tmp_path):
    """Training goes on while the copy is written."""
    made, own = checkpoints(tmp_path), shuffled_state(tiny_config(), seed=3)
    before = {name: tensor.clone() for name, tensor in tensors_of(own).items()}
    made.save(own.slices(), facts(tiny_config(), 1))
    made.wait_for_copy()
    for tensor in tensors_of(own).values():
        tensor.zero_()
    made.finish()
    own.restore(*made.newest())
    for name, tensor in tensors_of(own).items():
        assert torch.equal(tensor, before[name]), name


def test_the_table_of_steps_names_the_file_that_is_wrong(state, tmp_path, capsys):
    folder, _ = save(state, checkpoints(tmp_path), 1, 2)
    (folder / INDEX).unlink()
    print_checkpoints(list_checkpoints(tmp_path))
    told = capsys.readouterr().out
    assert f"{folder / INDEX}: missing" in told.splitlines()
    assert "refused" in told
    assert "committed" in told


def test_a_copy_that_the_host_cannot_hold_is_refused_before_training(state, tmp_path, monkeypatch):
    monkeypatch.setattr(host_copy, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"its copy takes [\d.]+ GiB .* and 0\.0 are left"):
        checkpoints(tmp_path).reserve(state.slices())


def test_a_save_that_cannot_start_is_no_save_to_wait_for(state, tmp_path, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made = checkpoints(tmp_path)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        made.save(state.slices(), facts(tiny_config(), 1))
    made.wait_for_copy()
    made.settle()
    assert list_checkpoints(tmp_path) == []


def test_files_are_plain_safetensors(state, tmp_path):
    (folder,) = save(state, checkpoints(tmp_path), 1)
    stored = load_file(folder / TENSORS)
    for name, tensor in tensors_of(state).items():
        assert torch.equal(stored[name], tensor.flatten()), name


def test_retention_keeps_the_lowest_held_out_loss(state, tmp_path):
    made = checkpoints(tmp_path, keep_last=2)
    for step, loss in enumerate([0.5, 0.3, None, 0.4, 0.6], start=1):
        made.save(state.slices(), facts(tiny_config(), step) | {"held_out_loss": loss})
    made.finish()
    assert [info.step for info in list_checkpoints(tmp_path)] == [2, 4, 5]


def test_an_attempt_that_lost_its_run_commits_nothing(state, tmp_path):
    """R23: what a zombie wrote never becomes a checkpoint."""

    def refuse() -> None:
        raise RunLocked("taken over")

    made = Checkpoints(tmp_path, CheckpointConfig(every_steps=1), ALONE, refuse)
    made.clean()
    made.save(state.slices(), facts(tiny_config(), 1))
    with pytest.raises(RunLocked):
        made.finish()
    assert list(made.folder.iterdir()) == []


def test_finished_checkpoint_is_never_written_again(state, tmp_path):
    made = checkpoints(tmp_path)
    (folder,) = save(state, made, 1)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    save(state, made, 1)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_retention_keeps_the_last_and_the_milestones(state, tmp_path):
    made = checkpoints(tmp_path, keep_last=2, milestone_every_steps=4)
    save(state, made, 1, 2, 3, 4, 5, 6, 7)
    assert [info.step for info in list_checkpoints(tmp_path)] == [4, 6, 7]


def test_retention_counts_finished_checkpoints_only(state, tmp_path):
    made = checkpoints(tmp_path, keep_last=2)
    folders = save(state, made, 1, 2)
    for step in (8, 9):
        (folders[0].parent / f"step-{step:08d}").mkdir()
    save(state, made, 3)
    infos = list_checkpoints(tmp_path)
    assert [info.step for info in infos if info.problem is None] == [2, 3]


def test_full_disk_leaves_the_previous_checkpoint_and_no_trace(state, tmp_path):
    made = checkpoints(tmp_path)
    save(state, made, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="too large"):
            save(state, made, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in made.folder.iterdir()] == ["step-00000001"]
    verify_checkpoint(made.folder / "step-00000001")


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
from t2v.checkpoint import writing as checkpoint
from tests.test_checkpoint import checkpoints, save, shuffled_state
from tests.tiny import tiny_config
state, made = shuffled_state(tiny_config()), checkpoints(Path(sys.argv[1]))
save(state, made, 1)
setattr(checkpoint, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
save(state, made, 2)
"""


@pytest.mark.dist
@pytest.mark.parametrize(
    "moment",
    ["join_index", *(pytest.param(one, marks=pytest.mark.slow)
                     for one in ("write_slices", "wrong_sizes"))],
)  # fmt: skip
def test_kill_in_the_middle_of_a_save_leaves_the_previous_valid(tmp_path, moment):
    command = [sys.executable, "-c", KILLED_SAVE, str(tmp_path), moment]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = {path.name.split("-")[0] for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step", ".staging"}
    made = checkpoints(tmp_path)
    folder, _ = made.newest()
    assert folder.name == "step-00000001"
    assert [path.name for path in made.folder.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(("weights", "prefix"), [("ema", "ema."), ("raw", "model.")])
def test_weights_load_without_a_process_group(state, tmp_path, weights, prefix):
    (folder,) = save(state, checkpoints(tmp_path), 1)
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(folder) == folder
    model = method_of(tiny_config()).network()
    load_weights(folder, model, weights=weights)
    saved = tensors_of(state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[prefix + name]), name


def test_absent_checkpoints_are_named(tmp_path):
    with pytest.raises(InputMissing, match="no such checkpoint"):
        resolve_checkpoint(tmp_path / "none")
    with pytest.raises(InputMissing, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path)


def test_manifest_tells_what_made_it(state, tmp_path):
    (folder,) = save(state, checkpoints(tmp_path), 5)
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.updates, manifest.engine) == (5, 7, "single")
    assert manifest.config["seed"] == 3
    assert set(manifest.files) == {INDEX, TENSORS}
