"""What is exported computes what the checkpoint computes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.errors import ConfigError, StorageError
from t2v.checkpoint.export import export_checkpoint, load_exported, read_export
from t2v.checkpoint.finding import step_folder
from t2v.cli import main
from t2v.recipe.recipe import method_of
from tests.test_checkpoint import checkpoints, facts, save, shuffled_state, tensors_of
from tests.tiny import THREE_LEVELS, tiny_config

METHOD = method_of(tiny_config())


@pytest.fixture(scope="module")
def state():
    return shuffled_state(tiny_config())


@pytest.fixture
def checkpoint(state, tmp_path):
    return save(state, checkpoints(tmp_path / "run"), 3)[0]


@pytest.mark.parametrize(("weights", "prefix"), [("ema", "ema."), ("raw", "model.")])
def test_exported_weights_are_the_checkpoints(state, checkpoint, tmp_path, weights, prefix):
    export = export_checkpoint(checkpoint, tmp_path / "out", METHOD, weights=weights)
    assert export.self_test == "outputs equal"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    saved = tensors_of(state)
    assert {prefix + name for name in stored} == {n for n in saved if n.startswith(prefix)}
    for name, tensor in stored.items():
        assert torch.equal(tensor, saved[prefix + name]), name
    assert read_export(tmp_path / "out") == export


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype_rounds_once_and_loads_back(state, checkpoint, tmp_path, name, dtype):
    export_checkpoint(checkpoint, tmp_path / "out", METHOD, dtype=name)
    model = method_of(tiny_config()).network()
    load_exported(tmp_path / "out", model)
    saved = tensors_of(state)
    for parameter, value in model.named_parameters():
        assert torch.equal(value, saved["ema." + parameter].to(dtype).float()), parameter


def test_large_exports_are_cut_into_files_with_the_hubs_index(state, checkpoint, tmp_path):
    export_checkpoint(checkpoint, tmp_path / "out", METHOD, file_gib=20_000 / 2**30)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    saved = tensors_of(state)
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], saved["ema." + name])


def test_three_levels_are_tested_at_every_level(tmp_path):
    config = tiny_config(**THREE_LEVELS)
    made = checkpoints(tmp_path / "run")
    made.save(shuffled_state(config).slices(), facts(config, 1))
    made.finish()
    step = step_folder(made.folder, 1)
    export = export_checkpoint(step, tmp_path / "out", method_of(config))
    assert export.self_test == "outputs equal"


def test_damage_is_found_before_and_after(checkpoint, tmp_path, capsys):
    export_checkpoint(checkpoint, tmp_path / "out", METHOD)
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match="is not what was exported"):
        read_export(tmp_path / "out")
    tensors = checkpoint / "rank-00000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert main(["checkpoint", "export", str(checkpoint), str(tmp_path / "again")]) == 74
    assert "rank-00000" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_nothing_is_written_over(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        export_checkpoint(checkpoint, tmp_path / "out", METHOD)
    assert list((tmp_path / "out").iterdir()) == []


def test_diff_ends_with_0_for_equal_and_names_what_differs(state, tmp_path, capsys):
    first = save(state, checkpoints(tmp_path / "a"), 3)[0]
    save(state, checkpoints(tmp_path / "b"), 4)
    assert main(["checkpoint", "diff", str(first), str(tmp_path / "b")]) == 0
    count = len(tensors_of(state))
    assert f"{count} of {count} tensors are identical" in capsys.readouterr().out
    other = shuffled_state(tiny_config())
    tensors_of(other)["model.latents"][2, 3] += 0.5
    save(other, checkpoints(tmp_path / "c"), 3)
    assert main(["checkpoint", "diff", str(first), str(tmp_path / "c")]) == 1
    output = capsys.readouterr().out
    assert "model.latents" in output
    assert "5.000e-01" in output
    wider = tiny_config(model={"latent_dim": 24})
    made = checkpoints(tmp_path / "d")
    made.save(shuffled_state(wider).slices(), facts(wider, 3))
    made.finish()
    assert main(["checkpoint", "diff", str(first), str(tmp_path / "d")]) == 1
    assert "6x24" in capsys.readouterr().out


def test_export_is_one_command(checkpoint, tmp_path, capsys):
    arguments = ["checkpoint", "export", str(tmp_path / "run"), str(tmp_path / "out")]
    assert main([*arguments, "--dtype", "bf16"]) == 0
    assert "self-test: outputs equal" in capsys.readouterr().out
    assert main(arguments) == 78
    for size in ("nan", "inf", "0"):
        assert main([*arguments[:3], str(tmp_path / "new"), "--file-gib", size]) == 78
    assert main(["checkpoint", "export", str(tmp_path / "none"), str(tmp_path / "new")]) == 66


def test_an_export_samples_the_same_video(checkpoint, tmp_path, capsys):
    for weights in ("ema", "raw"):
        export_checkpoint(checkpoint, tmp_path / weights, METHOD, weights=weights)
        out = {name: tmp_path / f"{weights}-{name}" for name in ("checkpoint", "export")}
        asked = ["--label=1", "--seed=3"]
        chosen = f"--set=weights={weights}"
        run = str(tmp_path / "run")
        assert main(["sample", run, *asked, chosen, "--out", str(out["checkpoint"])]) == 0
        export = str(tmp_path / weights)
        assert main(["sample", export, *asked, chosen, "--out", str(out["export"])]) == 0
        first, second = (sorted(folder.glob("*.mp4")) for folder in out.values())
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
        assert len(first) == 1
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "raw"), *asked, "--out", str(tmp_path / "x")]) == 78
    assert "holds the raw weights only; set weights=raw" in capsys.readouterr().err
