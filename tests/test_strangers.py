"""Whatever a command does, and however it ends, the files of others stay as they are."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset

from cluster.heartbeat import beat
from cluster.node_checks import check_run_folder
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.making import build as building
from data_pipeline.making.build import build, index
from data_pipeline.making.verify import repair, verify
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.store import storage
from data_pipeline.store.cache import BLOCK_BYTES
from data_pipeline.text.embed import embed
from t2v.checkpoint.checkpoints import REFUSED
from t2v.checkpoint.tensor_files import INDEX
from t2v.cli import main
from t2v.loop import train
from t2v.recipe.recipe import dump_config
from tests.scenes import home, rules, run_evaluate, write_rules
from tests.test_cache import cache
from tests.test_checkpoint import checkpoints, save, shuffled_state
from tests.test_launch import SLURM, recipe, site
from tests.test_loop import config_of, dataset, leave_no_handlers
from tests.test_mirror import mirrored
from tests.test_mirror import save as save_mirrored
from tests.tiny import tiny_config

__all__ = ["dataset", "home", "leave_no_handlers", "recipe", "site"]
SIZE = {"frames": 8, "height": 24, "width": 32}
HEX = "0123456789abcdef" * 2

Tree = dict[str, str | bytes]


def tree(folder: Path) -> Tree:
    """All that lies below a folder: a file's bytes, a link's target, of a folder nothing."""
    found: Tree = {}
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = f"-> {os.readlink(path)}"
            else:
                found[name] = "" if path.is_dir() else path.read_bytes()
    return found


def seen(folder: Path) -> Tree:
    """A folder's tree, and that of the folder outside to which `settle` leads links."""
    outside = folder.parent / f"outside {folder.name}"
    return tree(folder) | {f"../{outside.name}/{k}": v for k, v in tree(outside).items()}


def settle(folder: Path, *names: str) -> Tree:
    """Put a stranger's files, folders and links into a folder, and some under given names."""
    before, outside = tree(folder), folder.parent / f"outside {folder.name}"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "film.mp4").write_bytes(b"a film")
    (folder / "their folder" / "shards").mkdir(parents=True)
    (folder / "their folder" / "shards" / "000000.idx").write_bytes(b"theirs")
    (folder / "empty folder").mkdir()
    (folder / "link").symlink_to(outside, target_is_directory=True)
    (folder / ".staging-mine").symlink_to(outside, target_is_directory=True)
    (folder / "notes.txt").write_bytes(b"notes")
    (folder / ".download.part").write_bytes(b"half of theirs")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"their {name}".encode())
    return {name: content for name, content in seen(folder).items() if name not in before}


def untouched(folder: Path, theirs: Tree) -> bool:
    """Whether all that strangers had is there as it was."""
    return theirs.items() <= seen(folder).items()


def alone(folder: Path, theirs: Tree) -> bool:
    """Whether that is all there is, and folders that lead to it."""
    return all(any(f"{own}/".startswith(f"{name}/") for own in theirs) for name in seen(folder))


def refused(capsys, *command: str | Path, code: int = 78) -> str:
    """The one line with which a command refuses."""
    capsys.readouterr()
    assert main([str(word) for word in command]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


# build


def only_file(out: Path) -> None:
    (out / "notes.txt").write_text("notes")


def only_folder(out: Path) -> None:
    (out / "raw").mkdir()


def only_link(out: Path) -> None:
    (out / "link").symlink_to(out.parent)


def only_hidden(out: Path) -> None:
    (out / ".film.mp4.part").write_bytes(b"half")


@pytest.mark.parametrize("content", [only_file, only_folder, only_link, only_hidden, settle])
def test_a_folder_that_is_not_empty_is_not_built_in(media, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    content(out)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"out: is not empty and no build of ours; give a new"):
        build(media / "videos", out, **SIZE)
    assert tree(tmp_path) == before
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ConfigError, match=r"notes\.txt: is no folder"):
        build(media / "videos", tmp_path / "notes.txt", **SIZE)


@pytest.mark.parametrize("broken", [True, False])
def test_a_source_and_its_dataset_do_not_overlap(media, tmp_path, broken):
    raw, link = tmp_path / "mine" / "raw", tmp_path / "link"
    shutil.copytree(media / "videos", raw)
    link.symlink_to(raw)
    (tmp_path / "mine" / "poems").mkdir()
    if broken:
        (raw / "000000.mp4").write_bytes(b"no film")
    before = tree(tmp_path)
    for source, out, how in (
        (raw, tmp_path / "mine", "contains"),
        (raw, raw, "lies inside"),
        (raw, raw / "shards" / "new", "lies inside"),
        (raw, link / "new", "lies inside"),
        (link, raw / "new", "lies inside"),
        (raw / "captions.jsonl", tmp_path / "mine", "contains"),
    ):
        with pytest.raises(ConfigError, match=f"is wrong because it {how} the source") as error:
            build(source, out, **SIZE)
        assert "\n" not in str(error.value)
        assert tree(tmp_path) == before


def test_prefixes_of_a_store_overlap_by_whole_names():
    for source, out in (
        ("s3://b/raw", "s3://b"),
        ("s3://b/raw/", "s3://b/raw"),
        ("s3://b/raw", "s3://b/raw/x"),
    ):
        with pytest.raises(ConfigError, match="the source"):
            storage.refuse_overlap(source, out)
    for source, out in (("s3://b/raw", "s3://b/rawer"), ("s3://b/raw", "s3:/b/raw/x")):
        storage.refuse_overlap(source, out)


ENDS = {"damage": DataError("damage"), "interrupt": KeyboardInterrupt(), "disk": OSError("full")}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("with_strangers", [True, False])
@pytest.mark.parametrize("moment", ["write_tar", "write_index"])
def test_a_failed_build_takes_back_what_it_made(
    media, tmp_path, monkeypatch, end, with_strangers, moment
):
    """Strangers come while it is at work, for before it would refuse them."""
    out = tmp_path / "new" / "parent" / "out"
    theirs: Tree = {}

    def fail(*arguments: object) -> None:
        if with_strangers:
            theirs.update(settle(out, "shards/their.tar", "shards/their.idx", "000000.tar"))
        raise ENDS[end]

    monkeypatch.setattr(building, moment, fail)
    with pytest.raises(type(ENDS[end])):
        build(media / "videos", out, **SIZE)
    if with_strangers:
        assert untouched(out, theirs)
        assert alone(out, theirs)
    else:
        assert tree(tmp_path) == {}


def test_an_empty_folder_of_the_user_stays(media, tmp_path, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(building, "write_tar", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(media / "videos", tmp_path / "out", **SIZE)
    assert tree(tmp_path) == {"out": ""}


def test_strangers_beside_a_build_outlive_its_failure_and_its_success(media, tmp_path, monkeypatch):
    out, write = tmp_path / "out", building.write_tar

    def fail_later(path: str, *arguments: object) -> None:
        if path.endswith("000002.tar"):
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(building, "write_tar", fail_later)
    with pytest.raises(KeyboardInterrupt):
        build(media / "videos", out, **SIZE, shard_samples=6)
    left = f"shards/.000002.tar.{HEX}.part"
    (out / left).write_bytes(b"left by a killed build of ours")
    theirs = settle(out, "shards/their.tar", "shards/.their.part", "contact_sheet.png")
    monkeypatch.undo()
    build(media / "videos", out, **SIZE, shard_samples=6)
    assert untouched(out, theirs)
    assert left not in tree(out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_spare_what_is_beside_a_build(media, datasets, tmp_path, number):
    mine = tmp_path / "mine"
    mine.mkdir()
    theirs = settle(mine)
    command = ["data", "build", str(media / "videos"), str(mine / "out"), "--size", "8x24x32"]
    command = [sys.executable, "-m", "t2v.cli", *command, "--shard-samples", "6", "--workers", "1"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (mine / "out").exists() and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(number)
    job.wait(timeout=60)
    assert untouched(mine, theirs)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert untouched(mine, theirs)
    assert tree(mine / "out" / "shards") == tree(datasets / "videos" / "shards")


def test_objects_of_others_outlive_a_build_in_a_store(media, bucket, monkeypatch):
    objects = {f"{bucket}/mine/raw/film.mp4": b"film", f"{bucket}/half/x.part": b"half"}
    for path, content in objects.items():
        storage.write_atomic(path, content)
    for out in (f"{bucket}/mine", f"{bucket}/half", bucket):
        with pytest.raises(ConfigError, match="is not empty and no build of ours"):
            build(media / "videos", out, **SIZE)

    def fail(folder: str, *arguments: object) -> None:
        for name in ("their.idx", "000000.txt"):
            storage.write_atomic(f"{folder}/{name}", objects.setdefault(f"{folder}/{name}", b"x"))
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "write_index", fail)
    with pytest.raises(KeyboardInterrupt):
        build(media / "videos", f"{bucket}/new", **SIZE)
    assert storage.list_files(f"{bucket}/new") == []
    assert storage.list_files(f"{bucket}/new/shards") == ["000000.txt", "their.idx"]
    assert all(storage.read_bytes(path) == content for path, content in objects.items())


# the other verbs of data


def test_unfinished_writes_of_others_are_not_ours(tmp_path):
    theirs = settle(tmp_path, ".film.part", ".x.0123.part", f"film.{HEX}.part", "a.part")
    (tmp_path / f".link.{HEX}.part").symlink_to(tmp_path / "notes.txt")
    (tmp_path / f".folder.{HEX}.part").mkdir()
    before = tree(tmp_path)
    (tmp_path / f".000000.tar.{HEX}.part").write_bytes(b"ours")
    storage.remove_partial(str(tmp_path))
    assert tree(tmp_path) == before
    assert untouched(tmp_path, theirs)


@pytest.mark.parametrize("command", [("data", "toy"), ("quickstart", "--workdir")])
def test_what_begins_in_a_new_folder_refuses_another(tmp_path, capsys, command):
    theirs = settle(tmp_path / "mine", "videos/000000.mp4", "videos/captions.jsonl")
    assert "mine: is not empty" in refused(capsys, *command, tmp_path / "mine")
    assert "notes.txt: is no folder" in refused(capsys, *command, tmp_path / "mine" / "notes.txt")
    assert untouched(tmp_path / "mine", theirs)
    assert alone(tmp_path / "mine", theirs)


@pytest.fixture
def foreign(media, tmp_path) -> Path:
    """A shard of others."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar")) as tar:
        for number in range(3):
            content = (media / "videos" / f"{number:06d}.mp4").read_bytes()
            tar.write({"__key__": f"{number}", "mp4": content, "txt": "a film"})
    return folder


@pytest.mark.parametrize("name", ["0.idx", "dataset.json"])
def test_index_replaces_no_file_of_others(foreign, name):
    """Other loaders, too, keep an index beside a tar."""
    theirs = settle(foreign, name)
    with pytest.raises(ConfigError, match=r"is there already and no .* move it away, then index"):
        index(foreign)
    assert untouched(foreign, theirs)
    (foreign / name).unlink()
    theirs.pop(name)
    index(foreign)
    assert index(foreign).info.samples == 3
    (foreign / "0.idx").write_bytes(b"damaged")  # but of a dataset of ours
    assert index(foreign).info.samples == 3
    assert untouched(foreign, theirs)


def test_repair_keeps_every_tar_that_it_replaces(foreign):
    index(foreign)
    theirs = settle(foreign, "0.tar.damaged", "embeddings/mine/0.idx", "embeddings/mine/0.tar")
    originals = []
    for _ in range(2):
        tar = foreign / "0.tar"
        content = bytearray(tar.read_bytes())
        content[content.index(b"ftyp") + 40] ^= 255
        tar.write_bytes(content)
        originals.append(bytes(content))
        repair(foreign, verify(foreign))
    assert open_dataset(foreign).info.samples == 1
    assert untouched(foreign, theirs)
    assert [(foreign / f"0.tar.damaged{n}").read_bytes() for n in (1, 2)] == originals


def test_a_manifest_names_no_shard_elsewhere(datasets, tmp_path):
    content = json.loads((datasets / "videos" / "dataset.json").read_text())
    content["shards"][0]["name"] = "../../elsewhere"
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="name: is wrong because"):
        open_dataset(tmp_path)


def test_embed_fills_no_folder_of_others(datasets, tmp_path):
    data = tmp_path / "videos"
    shutil.copytree(datasets / "videos", data)
    theirs = settle(data / "embeddings" / "mine", "000000.tar", "null.safetensors")
    beside = settle(data / "embeddings" / "tiny", "their.tar")
    with pytest.raises(ConfigError, match="mine: is not empty and no embedding set of ours"):
        embed(data, datasets / "encoder", name="mine", max_tokens=16)
    assert alone(data / "embeddings" / "mine", theirs)
    embed(data, datasets / "encoder", name="tiny", max_tokens=16)
    assert untouched(data / "embeddings" / "mine", theirs)
    assert untouched(data / "embeddings" / "tiny", beside)


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


def test_a_cache_in_a_folder_of_others_evicts_its_own_entries_only(tmp_path):
    full = 64 * "a"
    theirs = settle(tmp_path / "cache", "en/film.mp4", f"aa/{full}", "aa/.half", f"zz/{full}.bin")
    (tmp_path / "cache" / "aa" / f"{full}.t2v").symlink_to(tmp_path / "cache" / "notes.txt")
    (tmp_path / "cache" / "bb" / f"{full}.t2v").mkdir(parents=True)
    theirs |= tree(tmp_path / "cache")
    small = cache(tmp_path, quota=BLOCK_BYTES)
    for number in range(40):
        small.read(f"s3://b/{number}", 0, 10)
    assert untouched(tmp_path / "cache", theirs)
    entries = [name for name in tree(tmp_path / "cache").keys() - theirs if name.endswith(".t2v")]
    assert len(entries) <= 16  # the quota is looked at every 16 new ones


# runs


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
    assert capsys.readouterr().out.count("step-00000001: not retired because it holds more") == 1
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


# what is made of runs


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
