"""Mistakes at the command line: one clear line, the documented exit code, nothing half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import ConfigError
from data_pipeline.making.toy import write_toy
from data_pipeline.media.codec import decode_clip
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.text.embed import make_tiny_encoder
from t2v.cli import is_mine, main
from t2v.watching.metrics import sample_digest
from tests.tiny import RECIPE


@pytest.fixture
def recipe(tmp_path):
    """A writer of recipe files that differ from the tiny one."""

    def write(**changes) -> str:
        content = json.loads(json.dumps(RECIPE))
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = content
            for parent in parents:
                node = node[parent]
            node[last] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


@pytest.fixture
def few(tmp_path):
    """A few toy videos with captions."""
    write_toy(tmp_path / "media", videos=3, images=1, size=(4, 24, 32))
    return tmp_path / "media" / "videos"


def refusal(capsys, *arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of a command that is refused."""
    code = main(list(arguments))
    return code, capsys.readouterr().err


def test_an_unknown_key_names_the_one_that_was_meant(recipe, capsys):
    code, error = refusal(capsys, "train", recipe(total_step=3))
    assert code == 78
    assert "total_step: unknown field; did you mean 'total_steps'?" in error
    assert "Traceback" not in error


def test_a_patch_that_tokens_do_not_divide_is_refused(recipe, capsys):
    code, error = refusal(capsys, "plan", recipe(method__model__token_size=[1, 4, 4]))
    assert code == 78
    assert "method.pyramid.patch_size: 6 (height) is wrong because it is no multiple of" in error


def test_a_clip_that_the_pyramid_does_not_reach_is_refused(recipe, capsys):
    code, error = refusal(capsys, "train", recipe(method__pyramid__clip_size=[4, 13, 16]))
    assert code == 78
    assert "method.pyramid.clip_size: 13 (height)" in error


def test_a_recipe_that_is_not_there_is_missing_input(capsys):
    code, error = refusal(capsys, "train", "nowhere.yaml")
    assert code == 66
    assert error.startswith("nowhere.yaml: no such recipe")


def test_a_dataset_that_is_not_there_is_missing_input(recipe, tmp_path, capsys):
    absent = str(tmp_path / "absent")
    code, error = refusal(
        capsys, "train", recipe(run_dir=str(tmp_path / "run"), data__sources=[{"path": absent}])
    )
    assert code == 66
    assert absent in error
    assert error.count("\n") == 1


def test_a_caption_of_a_missing_clip_is_refused_and_nothing_is_written(few, tmp_path, capsys):
    with (few / "captions.jsonl").open("a") as captions:
        captions.write(json.dumps({"file": "ghost.mp4", "caption": "a ghost"}) + "\n")
    code, error = refusal(
        capsys, "data", "build", str(few), str(tmp_path / "out"), "--size", "4x24x32"
    )
    assert code == 66
    assert "ghost.mp4" in error
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_an_empty_folder_is_missing_input(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, error = refusal(
        capsys, "data", "build", str(tmp_path / "empty"), str(tmp_path / "out"), "--size", "4x24x32"
    )
    assert code == 66
    assert str(tmp_path / "empty") in error


def test_a_truncated_mp4_is_named(few, tmp_path, capsys):
    clip = few / "000001.mp4"
    clip.write_bytes(clip.read_bytes()[:200])
    code, error = refusal(
        capsys, "data", "build", str(few), str(tmp_path / "out"), "--size", "4x24x32"
    )
    assert code == 65
    assert "000001.mp4" in error
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(("option", "value", "said"), [
    ("--size", "4x24", "is no size; give FRAMESxHEIGHTxWIDTH, such as 64x288x512"),
    ("--size", "axbxc", "is no size"),
    ("--size", "4,24,32", "is no size"),
    ("--task", "3", "is no task; give I/N, such as 0/4"),
    ("--note", "licence", "is no note; give KEY=TEXT"),
    ("--caption-column", "text=nan", "is no column; give NAME or NAME=WEIGHT, with a weight above"),
])  # fmt: skip
def test_words_of_another_form_are_a_usage_error(few, tmp_path, option, value, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "build", str(few), str(tmp_path / "out"), option, value])
    assert stop.value.code == 2
    assert f"argument {option}: '{value}' {said}" in capsys.readouterr().err


def test_sampling_from_no_checkpoint_is_missing_input(tmp_path, capsys):
    arguments = ("sample", str(tmp_path / "none"), "--prompt", "a cat", "--out", str(tmp_path))
    code, error = refusal(capsys, *arguments)
    assert code == 66
    assert "no such checkpoint; give a step folder or a run folder" in error


def test_every_command_shows_an_example(capsys):
    for words in (
        ["quickstart"],
        ["data", "toy"],
        ["data", "build"],
        ["data", "index"],
        ["data", "embed"],
        ["train"],
        ["plan"],
        ["sample"],
        ["checkpoint", "ls"],
        ["checkpoint", "verify"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert stop.value.code == 0
        assert (
            f"example:\n  {'torchrun' if words == ['train'] else 't2v'}" in capsys.readouterr().out
        )


def test_help_starts_without_torch():
    """A signal must find its handler armed: `t2v train` may not import torch before that."""
    program = "import sys, t2v.cli; t2v.cli.build_parser(); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


@pytest.fixture(scope="module")
def run(datasets, tmp_path_factory) -> Path:
    """A run of two steps on the shared toy videos, with its encoder beside them."""
    folder = tmp_path_factory.mktemp("run")
    content = json.loads(json.dumps(RECIPE)) | {"total_steps": 2, "run_dir": str(folder / "run")}
    pyramid = {"levels": 2, "patch_size": [4, 12, 16], "clip_size": [8, 24, 32]}
    content["method"]["pyramid"] = pyramid
    content["conditioning"] = {"kind": "text", "encoder": "tiny", "width": 8, "max_tokens": 8}
    content["data"]["sources"] = [{"path": str(datasets / "videos")}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def test_a_prompt_becomes_a_clip_and_the_record_of_how(run, datasets, tmp_path):
    out = tmp_path / "samples"
    arguments = ["sample", str(run), "--prompt", "a red circle", "--prompt", "ein grüner Kreis"]
    arguments += ["--encoder", str(datasets / "encoder"), "--out", str(out), "--seed", "7"]
    assert main([*arguments, "--set", "guidance_scale=2"]) == 0
    records = json.loads((out / "samples.json").read_text())
    assert [(r["prompt"], r["seed"]) for r in records] == [
        ("a red circle", 7),
        ("ein grüner Kreis", 8),
    ]
    assert records[0]["settings"]["guidance_scale"] == 2
    clips = [decode_clip((out / record["file"]).read_bytes()) for record in records]
    assert [clip.shape for clip in clips] == [(8, 24, 32, 3)] * 2
    before = [(out / record["file"]).read_bytes() for record in records]
    assert main([*arguments, "--set", "guidance_scale=2"]) == 0
    assert before == [(out / record["file"]).read_bytes() for record in records]


def test_sampling_refuses_an_encoder_that_did_not_embed_the_training_set(run, tmp_path, capsys):
    make_tiny_encoder(tmp_path / "other", ["a red circle"], width=8, seed=1)
    arguments = ["sample", str(run), "--prompt", "a cat", "--out", str(tmp_path / "out")]
    code, error = refusal(capsys, *arguments, "--encoder", str(tmp_path / "other"))
    assert code == 78
    assert "the checkpoint was trained with another one, encoder; give that." in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--prompt", ""], 78, "prompt 1: 0 characters is wrong"),
        (["--prompt", "a" * 10_000], 78, "prompt 1: 10000 characters is wrong"),
        ([], 78, "--prompt: missing"),
        (["--prompt", "a cat", "--set", "overlap=xyz"], 78, "method.sampling.overlap: value 'xyz'"),
        (
            ["--prompt", "a cat", "--set", "nonsense=1"],
            78,
            "method.sampling.nonsense: unknown field",
        ),
        (
            ["--prompt", "a cat", "--set", "steps=[1]"],
            78,
            "method.sampling.steps: [1] has 1 entries",
        ),
    ],
)
def test_sampling_settings_and_prompts_are_checked(
    run, datasets, tmp_path, more, code, words, capsys
):
    arguments = ["sample", str(run), "--encoder", str(datasets / "encoder")]
    found, error = refusal(capsys, *arguments, "--out", str(tmp_path / "out"), *more)
    assert (found, "Traceback" in error) == (code, False)
    assert words in error
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_shape_is_refused_before_training(run, tmp_path, capsys):
    changes = [
        "method.model.token_dim=24",
        f"run_dir={tmp_path / 'new'}",
        f"warm_start.checkpoint={run}",
    ]
    code, error = refusal(capsys, "train", str(run.parent / "recipe.yaml"), *changes)
    assert code == 78
    assert "does not fit the model because" in error
    assert "tokenizer.weight" in error
    assert not list((tmp_path / "new" / "checkpoints").glob("step-*"))


def test_embeddings_of_another_width_are_refused(run, tmp_path, capsys):
    changes = ["conditioning.width=16", f"run_dir={tmp_path / 'new'}"]
    code, error = refusal(capsys, "train", str(run.parent / "recipe.yaml"), *changes)
    assert code == 78
    assert "conditioning.width: value 16 is wrong" in error


def test_the_audit_of_a_step_has_the_digest_that_its_metrics_line_has(run, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        arguments = ["data", "order", str(run / "config.yaml"), "--step", str(line["step"])]
        assert main([*arguments, "--json"]) == 0
        samples = json.loads(capsys.readouterr().out)
        digest = sum(sample_digest(sample["n"], sample["id"]) for sample in samples)
        assert f"{digest % 2**64:016x}" == line["batch_digest"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "spiece.model").unlink(), "it has no vocabulary (spiece.model, "),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace('"num_layers": 2', '"num_layers": 3')
            ),
            "of its weights are missing",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 50),
            "is no text encoder because",
        ),
    ],
)
def test_an_incomplete_encoder_is_refused(datasets, tmp_path, damage, words, capsys):
    shutil.copytree(datasets / "encoder", tmp_path / "encoder")
    damage(tmp_path / "encoder")
    arguments = ["data", "embed", str(datasets / "videos"), "--name", "new"]
    code, error = refusal(capsys, *arguments, "--encoder", str(tmp_path / "encoder"))
    assert (code, "Traceback" in error) == (78, False)
    assert words in error
    assert not (datasets / "videos" / "embeddings" / "new").exists()


def test_a_run_goes_on_with_its_own_diffusion_only(run, capsys):
    changes = ["method.diffusion.input_scale=7.0", "total_steps=4"]
    code, error = refusal(capsys, "train", str(run.parent / "recipe.yaml"), *changes)
    assert code == 78
    assert "method.diffusion.input_scale: 1.0 -> 7.0" in error


def test_a_base_of_another_input_scale_is_refused(run, tmp_path, capsys):
    changes = [f"run_dir={tmp_path / 'new'}", f"warm_start.checkpoint={run}"]
    changes.append("method.diffusion.input_scale=7.0")
    code, error = refusal(capsys, "train", str(run.parent / "recipe.yaml"), *changes)
    assert code == 78
    assert "method.diffusion.input_scale: 7.0 is wrong because the base" in error


def test_a_run_beyond_its_last_step_is_done(run):
    """Not preempted: a scheduler would start it for ever."""
    assert main(["train", str(run.parent / "recipe.yaml"), "total_steps=1"]) == 0


def test_a_replaced_shard_is_noticed_at_its_first_sample(datasets, tmp_path):
    for name in ("videos", "copy"):
        shutil.copytree(datasets / "videos", tmp_path / name)
    shard = next((tmp_path / "copy" / "shards").glob("*.idx"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-8] + bytes(255 - byte for byte in content[-8:]))
    with pytest.raises(ConfigError, match=r"is not the index that dataset\.json was made with"):
        open_dataset(tmp_path / "copy").read(int(shard.stem), 0)
    open_dataset(tmp_path / "videos").read(int(shard.stem), 0)


def test_folders_without_checkpoints_are_told_in_one_line(tmp_path, capsys):
    assert main(["checkpoint", "ls", str(tmp_path)]) == 66
    assert main(["checkpoint", "verify", str(tmp_path)]) == 66
    assert main(["checkpoint", "diff", str(tmp_path), str(tmp_path)]) == 66
    (tmp_path / "step-00000005").mkdir()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 74
    first, second, third, fourth = capsys.readouterr().err.splitlines()
    assert first == f"{tmp_path}: holds no checkpoint; give a run folder."
    assert second == f"{tmp_path}: holds no checkpoint; give a step folder or a run folder."
    assert third == second
    assert fourth.endswith("it was never finished; use another checkpoint.")


def test_checkpoints_of_nowhere_are_missing_input(tmp_path, capsys):
    assert main(["checkpoint", "ls", str(tmp_path / "nowhere")]) == 66
    assert main(["checkpoint", "verify", str(tmp_path / "nowhere")]) == 66
    assert capsys.readouterr().err.count("no such") == 2


@pytest.mark.parametrize(
    ("met_by", "rank", "local_rank", "tells"),
    [(None, "9", "1", False), (None, "8", "0", True), (9, "9", "1", True), (9, "8", "0", False)],
)
def test_one_process_tells_an_error(monkeypatch, met_by, rank, local_rank, tells):
    """The rank that met it; of what all find before they meet, the first of each machine."""
    error = ConfigError("wrong")
    error.rank = met_by
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert is_mine(error) is tells
