"""A checkpoint that was tampered with, or belongs to another run or model, is refused by name."""

import json
import pickle
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, StorageError
from t2v.checkpoint.compatibility import refuse_other_run
from t2v.checkpoint.finding import resolve_checkpoint
from t2v.checkpoint.manifest import Manifest, record_file
from t2v.checkpoint.proving import verify_checkpoint
from t2v.checkpoint.tensor_files import INDEX
from t2v.train.state import TrainState
from tests.test_checkpoint import TENSORS, checkpoints, facts, fresh_state, save, shuffled_state
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def state() -> TrainState:
    return shuffled_state(tiny_config())


class Canary:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and its proof, as an attacker with the run folder could."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = record_file(folder / name).model_dump()
    sign(folder, manifest)


def sign(folder: Path, manifest: dict) -> None:
    """Write a manifest that agrees with itself."""
    proved = Manifest.model_validate_json(json.dumps(manifest)).proved()
    (folder / "manifest.json").write_text(proved.model_dump_json())


@pytest.mark.parametrize("name", [INDEX, TENSORS])
def test_no_code_in_a_checkpoint_is_run(state, tmp_path, name):
    """R25"""
    made = checkpoints(tmp_path)
    (folder,) = save(state, made, 1)
    canary = tmp_path / "canary"
    forge(folder, name, pickle.dumps(Canary(canary)))
    with pytest.raises(StorageError, match="use another checkpoint"):
        fresh_state(tiny_config()).restore(*made.newest())
    assert not canary.exists()


def test_any_changed_field_of_a_manifest_is_found(state, tmp_path):
    (folder,) = save(state, checkpoints(tmp_path), 1)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in {"updates": 8, "data_fingerprint": "other", "engine": "fsdp"}.items():
        path.write_text(json.dumps(manifest | {name: value}))
        with pytest.raises(StorageError, match="its fields have changed"):
            verify_checkpoint(folder)
    path.write_text(json.dumps(manifest))
    verify_checkpoint(folder)


def test_manifest_from_before_there_were_methods_is_refused_by_name(state, tmp_path):
    made = checkpoints(tmp_path)
    (folder,) = save(state, made, 1)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    old = manifest["config"] | manifest["config"].pop("method")
    path.write_text(json.dumps(manifest | {"format": 1, "config": old}))
    told = f"{path}: is wrong because it was written by an earlier t2v; read it with"
    for read in (verify_checkpoint, resolve_checkpoint):
        with pytest.raises(StorageError) as caught:
            read(folder)
        assert str(caught.value).startswith(told)
    # A run does not begin anew beside it either.
    with pytest.raises(StorageError, match="written by an earlier t2v"):
        made.newest()


def test_manifest_naming_a_file_outside_is_refused(state, tmp_path):
    (folder,) = save(state, checkpoints(tmp_path), 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = manifest["files"].pop(TENSORS)
    sign(folder, manifest)
    with pytest.raises(StorageError, match="outside its folder"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("spoil", ["gap", "overlap", "short"])
def test_index_whose_pieces_do_not_make_up_a_tensor_is_refused(state, tmp_path, spoil):
    made = checkpoints(tmp_path)
    (folder,) = save(state, made, 1)
    index = json.loads((folder / INDEX).read_text())
    (piece,) = index["tensors"]["model.latents"]["pieces"]
    change = {"gap": {"offset": 1}, "overlap": {"offset": -1}, "short": {"count": 5}}[spoil]
    piece |= change
    forge(folder, INDEX, json.dumps(index).encode())
    with pytest.raises(StorageError, match=r"the pieces of model\.latents do not make it up"):
        fresh_state(tiny_config()).restore(*made.newest())


def test_checkpoint_of_another_shape_is_refused_with_a_table(state, tmp_path):
    made = checkpoints(tmp_path)
    save(state, made, 1)
    other = tiny_config(model={"num_latents": 5})
    with pytest.raises(ConfigError) as failure:
        fresh_state(other).restore(*made.newest())
    lines = str(failure.value).splitlines()
    assert "does not fit the model because 4 tensors differ" in lines[0]
    assert lines[1].split() == ["tensor", "checkpoint", "model"]
    assert ["model.latents", "6x16", "float32", "5x16", "float32"] in [
        line.split() for line in lines
    ]


def test_missing_and_extra_tensors_are_refused_by_name(state, tmp_path):
    made = checkpoints(tmp_path)
    save(state, made, 1)
    other = tiny_config(model={"latent_layers": 2})
    with pytest.raises(ConfigError, match=r"rin\.layers\.1\.mlp\S+ +missing"):
        fresh_state(other).restore(*made.newest())
    other = tiny_config(model={"self_conditioning_rate": 0.0})
    with pytest.raises(ConfigError, match=r"self_conditioning\S+ +\S+ float32 +not in this model"):
        fresh_state(other).restore(*made.newest())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"ema_half_life_steps": 9.0}, "ema_half_life_steps: 3.0 -> 9.0"),
        ({"model": {"detach_context": True}}, "\n  method.model.detach_context: false -> true"),
        ({"optimizer": {"name": "lamb"}}, 'optimizer.name: "adamw" -> "lamb"'),
    ],
)
def test_resume_under_another_recipe_is_refused(state, tmp_path, change, named):
    made = checkpoints(tmp_path)
    save(state, made, 1)
    with pytest.raises(ConfigError, match="is of another recipe") as failure:
        refuse_other_run(*made.newest(), facts(tiny_config(**change), 1), told=False)
    assert named in str(failure.value)


def test_resume_on_other_data_is_refused_unless_told(state, tmp_path):
    made = checkpoints(tmp_path)
    save(state, made, 1)
    other = facts(tiny_config(), 1) | {"data_fingerprint": "other"}
    with pytest.raises(ConfigError, match="accept_data_change=true"):
        refuse_other_run(*made.newest(), other, told=False)
    with pytest.raises(ConfigError, match=r"goes on so:\n  a: is new"):
        refuse_other_run(*made.newest(), other, told=False, sources=["a: is new"])
    assert refuse_other_run(*made.newest(), other, told=True) == []


def test_engine_batches_and_length_of_a_run_may_change_and_are_told(state, tmp_path):
    made = checkpoints(tmp_path)
    save(state, made, 1)
    sizes = {"total_steps": 99, "micro_batch_size": 2, "global_batch_size": 8}
    other = tiny_config(engine={"kind": "fsdp"}, run_dir="moved", **sizes)
    told = refuse_other_run(*made.newest(), facts(other, 1), told=False)
    assert told == [
        "total_steps: 20 -> 99",
        "global_batch_size: 4 -> 8",
        "micro_batch_size: 1 -> 2",
        'engine.kind: "single" -> "fsdp"',
    ]
