"""Whatever runs do and is made of them, and however it ends, the files of others stay."""

import json
import os
from pathlib import Path

import pytest

from cluster.heartbeat import beat
from cluster.node_checks import check_run_folder
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.store import storage
from t2v.checkpoint.keeping import REFUSED
from t2v.checkpoint.tensor_files import INDEX
from t2v.cli import main
from t2v.loop import train
from t2v.recipe.recipe import dump_config, load_config, parse_config
from tests.scenes import home, rules, run_evaluate, write_rules
from tests.strangers import Tree, alone, refused, settle, tree, untouched
from tests.test_checkpoint import checkpoints, save, shuffled_state
from tests.test_launch import SLURM, recipe, site
from tests.test_loop import config_of, dataset, leave_no_handlers
from tests.test_mirror import mirrored
from tests.test_mirror import save as save_mirrored
from tests.tiny import tiny_config

__all__ = ["dataset", "home", "leave_no_handlers", "recipe", "site"]
HEX = "0123456789abcdef" * 2


def test_pages_replace_pages_only(datasets, dataset, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(config_of(dataset, run, total_steps=1)) == 0
    out = tmp_path / "page.html"
    for command in (("data", "stats", datasets / "videos"), ("report", run)):
        out.write_text("their page")
        assert "page.html: is there already" in refused(capsys, *command, "--out", out)
        assert out.read_text() == "their page"
        out.unlink()
        for _ in range(2):
            assert main([*map(str, command), "--out", str(out)]) == 0
    theirs = settle(tmp_path / "mine")
    refused(capsys, "report", run, "--out", tmp_path / "mine", code=74)
    assert untouched(tmp_path / "mine", theirs)


@pytest.fixture(scope="module")
def state():
    return shuffled_state(tiny_config())


def test_what_others_keep_among_checkpoints_stays(state, tmp_path, capsys):
    made = checkpoints(tmp_path / "run", keep_last=2)
    first, second = save(state, made, 1, 2)
    theirs = settle(made.folder, f".staging-step-3-{HEX}/x", ".staging-step-00000003-mine/x")
    inside = settle(first, "manifest.txt")
    second.rename(tmp_path / "archived")
    second.symlink_to(tmp_path / "archived")
    (made.folder / f".staging-step-00000009-{HEX}").mkdir()
    made.clean()
    save(state, made, 3, 4, 5, 6)
    kept = {path.name for path in made.folder.glob("*step-*") if path.is_dir()}
    assert kept >= {f"step-{step:08d}" for step in (1, 2, 5, 6)}
    assert not kept & {"step-00000003", "step-00000004", f".staging-step-00000009-{HEX}"}
    assert untouched(made.folder, theirs)
    assert untouched(first, inside)
    assert len(tree(tmp_path / "archived")) == 3
    told = capsys.readouterr().out
    assert told.count("step-00000001: not retired because it holds more") == 1
    assert told.count("step-00000002: not retired because it is a link") == 1
    # A refused step is moved aside with all that is in it.
    (made.folder / "step-00000006" / INDEX).write_text("damaged")
    (made.folder / "step-00000006" / "notes.txt").write_text("notes")
    made.newest()
    (aside,) = made.folder.glob(f"{REFUSED}*")
    assert (aside / "notes.txt").read_text() == "notes"


def test_a_mirror_deletes_its_own_objects(bucket, tmp_path):
    made = mirrored(tmp_path / "run", f"{bucket}/runs/a")
    save_mirrored(made, 1)
    (home,) = storage.list_folders(f"{bucket}/runs/a")
    for path in (f"{home}/notes.txt", f"{home}/sub/x", "step-00000001-mine/manifest.json"):
        storage.write_atomic(f"{bucket}/runs/a/{path}", b"theirs")
    save_mirrored(made, 2, 3)
    assert storage.list_files(f"{bucket}/runs/a/{home}") == ["notes.txt"]
    for path in (f"{home}/notes.txt", f"{home}/sub/x", "step-00000001-mine/manifest.json"):
        assert storage.read_bytes(f"{bucket}/runs/a/{path}") == b"theirs"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "status.json", "failure.md"])
def test_training_begins_in_no_folder_of_such_files(dataset, tmp_path, name):
    theirs = settle(tmp_path / "run", name)
    with pytest.raises(ConfigError, match=rf"run/{name}: is there already, but .* is no run"):
        train(config_of(dataset, tmp_path / "run"))
    assert alone(tmp_path / "run", theirs)
    assert untouched(tmp_path / "run", theirs)


@pytest.mark.parametrize("kind", ["file", "dangling link", "pipe"])
def test_training_begins_in_nothing_but_a_folder(dataset, tmp_path, kind):
    run = tmp_path / "run"
    match kind:
        case "file":
            run.write_text("theirs")
        case "dangling link":
            run.symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(run)
    before = os.lstat(run)
    with pytest.raises(ConfigError, match="run: is no folder; choose another run_dir"):
        train(config_of(dataset, run))
    assert os.lstat(run) == before


@pytest.mark.parametrize("name", ["a run #1", "50%j", "über/läufe", "~run", " run ", "it's; $(x)"])
def test_training_begins_in_a_folder_of_any_name(dataset, tmp_path, name):
    config = config_of(dataset, tmp_path / name, total_steps=1)
    assert train(config) == 0
    assert (tmp_path / name / "status.json").exists()
    assert load_config(tmp_path / name / "config.yaml") == config


@pytest.mark.parametrize("run_dir", ["~/runs/a", "~", "s3://bucket/runs/a", "file:///runs/a"])
def test_a_run_folder_that_would_be_made_elsewhere_is_refused(run_dir):
    with pytest.raises(ConfigError, match=r"^recipe: run_dir: .* is wrong because"):
        parse_config(tiny_config().model_dump(mode="json") | {"run_dir": run_dir}, "recipe")


def test_training_leaves_what_lies_in_its_folder(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run", total_steps=2)
    theirs = settle(tmp_path / "run", "checkpoints/notes.txt", "logs/theirs/alarm.json")
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))  # as a launch leaves it
    assert train(config) == 0
    assert untouched(tmp_path / "run", theirs)


@pytest.mark.parametrize("with_strangers", [True, False])
def test_a_refused_first_start_takes_back_what_it_made(
    dataset, tmp_path, monkeypatch, with_strangers
):
    run, theirs = tmp_path / "new" / "run", Tree()

    def refuse(*arguments: object) -> None:
        if with_strangers:
            theirs.update(settle(run, "logs/attempt-0001/theirs.log", "checkpoints/notes.txt"))
        raise ConfigError("refused")

    monkeypatch.setattr("t2v.loop.warm_start", refuse)
    warm = {"checkpoint": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match="refused"):
        train(config_of(dataset, run, warm_start=warm))
    if with_strangers:
        assert untouched(run, theirs)
        assert alone(run, theirs)
    else:
        assert tree(tmp_path) == {}


def test_checks_of_a_node_leave_its_run_folder_as_it_was(tmp_path):
    theirs = settle(tmp_path / "run")
    check_run_folder(tmp_path / "run")
    assert untouched(tmp_path / "run", theirs)
    assert alone(tmp_path / "run", theirs)


def test_a_heartbeat_writes_through_no_link(tmp_path):
    theirs = settle(tmp_path / "mine")
    (tmp_path / "beat").symlink_to(tmp_path / "mine" / "notes.txt")
    (tmp_path / f"beat.{os.getpid()}").symlink_to(tmp_path / "mine" / "notes.txt")
    beat(tmp_path / "beat")
    assert untouched(tmp_path / "mine", theirs)
    assert json.loads((tmp_path / "beat").read_text())["pid"] == os.getpid()


@pytest.fixture
def step(state, tmp_path) -> Path:
    return save(state, checkpoints(tmp_path / "run"), 3)[0]


def test_sampling_writes_over_no_clip_of_others(step, tmp_path, monkeypatch, capsys):
    theirs = settle(tmp_path / "mine", "0000.mp4", "0000.json", "samples.json", "contact_sheet.png")
    command = ("sample", step, "--label", "0", "--label", "1", "--out")
    assert "no folder of samples of ours" in refused(capsys, *command, tmp_path / "mine")
    assert untouched(tmp_path / "mine", theirs)
    assert alone(tmp_path / "mine", theirs)
    out = tmp_path / "out"

    write = storage.write_atomic

    def interrupt(path: str, content: bytes) -> None:
        if path.endswith("0000.json"):
            raise KeyboardInterrupt  # a clip is there, but no record
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", interrupt)
        assert main([str(word) for word in (*command, out)]) == 130
    assert (out / "0000.mp4").exists()
    theirs = settle(out, "1000.mp4", "theirs.json")
    assert main([str(word) for word in (*command, out)]) == 0
    assert untouched(out, theirs)


def test_samples_beside_a_run_leave_those_of_others(step, tmp_path, capsys):
    run = tmp_path / "run"
    config = tiny_config(run_dir=str(run), samples={"every_steps": 1, "labels": [0]})
    (run / "config.yaml").write_text(dump_config(config))
    names = [f"step-{3:08d}/film.mp4", ".step-00000003/film.mp4", ".step-00000003-mine/film.mp4"]
    theirs = settle(run / "samples", *names)
    (run / "samples" / f".step-00000003-{HEX}").mkdir()
    assert main(["samples", str(run)]) == 78
    assert "samples/step-00000003 is there already" in capsys.readouterr().out
    assert untouched(run / "samples", theirs)
    assert f".step-00000003-{HEX}" not in tree(run / "samples")


@pytest.mark.parametrize("end", [DataError("damage"), KeyboardInterrupt()])
def test_an_export_replaces_nothing_and_leaves_nothing(step, tmp_path, monkeypatch, capsys, end):
    theirs = settle(tmp_path / "mine", "model.safetensors")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path)
    for out in ("mine", "dangling", "mine/notes.txt", "mine/empty folder"):
        assert "is there already" in refused(capsys, "checkpoint", "export", step, tmp_path / out)

    def fail(*arguments: object) -> None:
        raise end

    monkeypatch.setattr("t2v.checkpoint.export._refuse_other_outputs", fail)
    assert main(["checkpoint", "export", str(step), str(tmp_path / "mine" / "new")]) in (65, 130)
    assert tree(tmp_path) == before
    assert untouched(tmp_path / "mine", theirs)


@pytest.mark.parametrize("name", ["result.json", "result.md", "protocol.yaml"])
def test_an_evaluation_replaces_results_only(home, tmp_path, capsys, name):
    protocol = write_rules(tmp_path / "rules.yaml", rules(home))
    theirs = settle(tmp_path / "mine", name)
    assert run_evaluate(home / "other", protocol, tmp_path / "mine") == 78
    assert f"mine/{name}: is there already and of no evaluation" in capsys.readouterr().err
    assert alone(tmp_path / "mine", theirs)
    assert untouched(tmp_path / "mine", theirs)


def test_an_evaluation_leaves_what_is_beside_its_result(home, tmp_path):
    protocol = write_rules(tmp_path / "rules.yaml", rules(home))
    theirs = settle(tmp_path / "mine", "samples/0000.mp4")
    for _ in range(2):
        assert run_evaluate(home / "other", protocol, tmp_path / "mine") == 0
    assert untouched(tmp_path / "mine", theirs)


def test_a_launch_writes_over_no_file_that_says_something_else(recipe, site, tmp_path, capsys):
    theirs = settle(tmp_path / "mine", "config.yaml")
    command = ("launch", recipe, "--cluster", site(SLURM), "--out")
    said = refused(capsys, *command, tmp_path / "mine")
    assert "mine/config.yaml: is there already with other content" in said
    assert alone(tmp_path / "mine", theirs)
    assert untouched(tmp_path / "mine", theirs)
    theirs = settle(tmp_path / "free")
    for _ in range(2):
        assert main([str(word) for word in (*command, tmp_path / "free")]) == 0
    assert untouched(tmp_path / "free", theirs)
