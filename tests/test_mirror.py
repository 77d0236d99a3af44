"""A checkpoint's second home gives back what the first one lost."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.store import storage
from t2v.checkpoint.checkpoints import Checkpoints
from t2v.checkpoint.config import CheckpointConfig
from t2v.checkpoint.finding import list_checkpoints
from t2v.checkpoint.mirror import Mirror
from t2v.checkpoint.proving import verify_checkpoint
from t2v.engine.world import ALONE
from tests.test_checkpoint import facts, fresh_state, shuffled_state, tensors_of
from tests.tiny import tiny_config


def mirrored(run_dir: Path, prefix: str, **settings) -> Checkpoints:
    config = CheckpointConfig(every_steps=1, keep_last=2, mirror=prefix, **settings)
    made = Checkpoints(run_dir, config, ALONE)
    made.clean()
    return made


def save(made: Checkpoints, *steps: int) -> None:
    for step in steps:
        made.save(shuffled_state(tiny_config(), seed=step).slices(), facts(tiny_config(), step))
    made.finish()


def test_a_bare_node_resumes_from_the_mirror(bucket, tmp_path):
    save(mirrored(tmp_path / "lost", f"{bucket}/run"), 1, 2, 3)
    kept = [name[:13] for name in storage.list_folders(f"{bucket}/run")]
    assert kept == ["step-00000002", "step-00000003"]
    folder, manifest = mirrored(tmp_path / "bare", f"{bucket}/run").newest()
    assert manifest.step == 3
    verify_checkpoint(folder)
    state = fresh_state(tiny_config())
    state.restore(folder, manifest)
    saved = tensors_of(shuffled_state(tiny_config(), seed=3))
    assert all((tensor == saved[name]).all() for name, tensor in tensors_of(state).items())


def test_copy_that_was_cut_short_is_no_checkpoint(bucket, tmp_path):
    save(mirrored(tmp_path / "run", f"{bucket}/run"), 1)
    (home,) = storage.list_folders(f"{bucket}/run")
    storage.remove(f"{bucket}/run/{home}/manifest.json")
    assert mirrored(tmp_path / "bare", f"{bucket}/run").newest() is None


def test_mirror_is_read_only_where_it_is_newer(bucket, tmp_path):
    made = mirrored(tmp_path / "run", f"{bucket}/run")
    save(made, 1, 2)
    before = [info.folder for info in list_checkpoints(tmp_path / "run")]
    shutil.rmtree(before[1])
    assert made.newest()[1].step == 2
    made.mirror.restore_newer(made.folder)
    assert [info.step for info in list_checkpoints(tmp_path / "run")] == [1, 2]


def test_two_contents_of_a_step_never_share_a_name(bucket, tmp_path):
    """A run that lost its disk and began again does not write into what the first one finished."""
    save(mirrored(tmp_path / "one", f"{bucket}/run"), 1)
    (home,) = storage.list_folders(f"{bucket}/run")
    before = storage.read_bytes(f"{bucket}/run/{home}/rank-00000.safetensors")
    other = mirrored(tmp_path / "two", f"{bucket}/run")
    other.save(shuffled_state(tiny_config(), seed=9).slices(), facts(tiny_config(), 1))
    other.finish()
    assert len(storage.list_folders(f"{bucket}/run")) == 2
    assert storage.read_bytes(f"{bucket}/run/{home}/rank-00000.safetensors") == before


def test_a_finished_copy_is_created_once(bucket):
    storage.create(f"{bucket}/run/manifest.json", b"one")
    storage.create(f"{bucket}/run/manifest.json", b"one")
    with pytest.raises(StorageError, match="is there already with other content"):
        storage.create(f"{bucket}/run/manifest.json", b"another")


def test_unreachable_mirror_does_not_fail_the_save(bucket, tmp_path, capsys):
    made = mirrored(tmp_path / "run", "s3://no-such-bucket/run")
    save(made, 1)
    assert [info.problem for info in list_checkpoints(tmp_path / "run")] == [None]
    assert "mirror: step-00000001 is not copied because" in capsys.readouterr().out


def test_step_that_is_damaged_in_the_mirror_is_passed_over(bucket, tmp_path, capsys):
    save(mirrored(tmp_path / "run", f"{bucket}/run"), 1, 2)
    home = storage.list_folders(f"{bucket}/run")[-1]
    storage.write_atomic(f"{bucket}/run/{home}/tensors.json", b"{}")
    _, manifest = mirrored(tmp_path / "bare", f"{bucket}/run").newest()
    assert manifest.step == 1
    assert f"mirror: {home} is refused because" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [[2], [1, 2]])
def test_step_that_is_damaged_here_comes_back_from_the_mirror(bucket, tmp_path, damaged):
    made = mirrored(tmp_path / "run", f"{bucket}/run")
    save(made, 1, 2)
    for info in list_checkpoints(tmp_path / "run"):
        if info.step in damaged:
            file = info.folder / "rank-00000.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    folder, manifest = made.newest()
    assert manifest.step == 2
    verify_checkpoint(folder)
    assert len(list((tmp_path / "run" / "checkpoints").glob("refused-step-00000002-*"))) == 1


def test_prefix_may_end_in_a_slash():
    assert Mirror("s3://bucket/run/", ALONE).prefix == "s3://bucket/run"
