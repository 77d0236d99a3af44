"""Nothing about an old step, or what stands in a new one's place, hurts a run or its start."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from t2v.checkpoint.finding import step_folder
from t2v.checkpoint.proving import verify_checkpoint
from tests.test_checkpoint import TENSORS, checkpoints, save, shuffled_state
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def state():
    return shuffled_state(tiny_config())


def refuse_names(monkeypatch, *names: str) -> None:
    """Have the disk refuse to rename some folders, as it does mount points and another's."""
    rename = Path.rename

    def maybe(path: Path, target: Path) -> Path:
        if path.name in names:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", maybe)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_one_old_step_that_cannot_be_looked_at_keeps_no_other(state, tmp_path, monkeypatch, capsys):
    """It is the oldest, so it is asked first, each time."""
    kept = checkpoints(tmp_path, keep_last=2)
    save(state, kept, 1)
    listed = os.listdir

    def refuse(path):
        if str(path).endswith("step-00000001"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    for step in (2, 3, 4, 5):
        save(state, kept, step)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    save(state, kept, 6)
    assert [saved.problem for saved in kept.news()] == [None] * 6
    assert steps_in(kept.folder) == [1, 5, 6]
    assert capsys.readouterr().out.count("step-00000001: not retired because") == 1


@pytest.mark.parametrize("kind", ["damaged", "dangling link", "file", "empty folder"])
def test_what_stands_in_the_place_of_a_step_is_no_step(state, tmp_path, kind):
    made = checkpoints(tmp_path, keep_last=9)
    save(state, made, 1)
    place = step_folder(made.folder, 2)
    match kind:
        case "damaged":
            shutil.copytree(step_folder(made.folder, 1), place)
        case "dangling link":
            place.symlink_to(tmp_path / "nowhere")
        case "file":
            place.write_text("theirs")
        case "empty folder":
            place.mkdir()
    save(state, made, 2)
    assert [saved.problem for saved in made.news()] == [None, None]
    assert verify_checkpoint(place).step == 2
    assert len(list(made.folder.glob("refused-step-00000002-*"))) == 1


def test_a_refused_step_that_cannot_be_moved_stops_no_start_and_is_taken_for_no_save(
    state, tmp_path, monkeypatch, capsys
):
    made = checkpoints(tmp_path, keep_last=9)
    for step in (1, 2):
        save(state, made, step)
    tensors = step_folder(made.folder, 2) / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    refuse_names(monkeypatch, "step-00000002")
    again = checkpoints(tmp_path, keep_last=9)
    again.clean()
    (found, _) = again.newest()
    assert found.name == "step-00000001"
    assert "step-00000002: cannot be set aside because" in capsys.readouterr().out
    with pytest.raises(StorageError, match="step-00000002"):
        save(state, again, 2)
    save(state, again, 3)
    assert [saved.problem is None for saved in again.news()] == [False, True]
    assert made.newest()[0].name == "step-00000003"


def test_a_step_that_cannot_be_removed_costs_neither_a_save_nor_a_start(
    state, tmp_path, monkeypatch, capsys
):
    """A reader's `.nfs` file, another owner: the old step is named, and everything goes on."""
    kept = checkpoints(tmp_path, keep_last=2)
    real = shutil.rmtree

    def refuse(path, *args, **kwargs):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", f"{path}/.nfs0001")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (1, 2, 3):
        save(state, kept, step)
    told = [saved.problem for saved in kept.news()]
    assert told == [None] * 3
    assert ".nfs0001" in capsys.readouterr().out
    again = checkpoints(tmp_path, keep_last=2)
    again.clean()
    assert "remove it by hand" in capsys.readouterr().out
    (found, _) = again.newest()
    assert found.name == "step-00000003"
    monkeypatch.setattr(shutil, "rmtree", real)
    again.clean()
    assert [path.name for path in (tmp_path / "checkpoints").glob(".staging*")] == []


def test_old_steps_make_room_on_a_full_disk_but_two_stay(state, tmp_path, monkeypatch):
    kept = checkpoints(tmp_path, keep_last=9)
    for step in (1, 2, 3, 4):
        save(state, kept, step)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    save(state, kept, 5)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert steps == ["step-00000003", "step-00000004", "step-00000005"]
