"""The quickstart keeps the bounds that the README states, by either method."""

import json
import shutil

import pytest

from data_pipeline.making.toy import all_toys, write_toy
from t2v.cli import main
from t2v.quickstart import CONFIGS, STORIES, prepare_data, sample, score, train
from t2v.recipe.recipe import load_config


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("method", STORIES)
def test_quickstart_samples_keep_their_bounds(tmp_path, method):
    workdir = tmp_path / "quickstart"
    assert main(["quickstart", "--workdir", str(workdir), "--method", method]) == 0
    result = json.loads((workdir / "quickstart.json").read_text())
    for name, bound in result["bounds"].items():
        assert result["scores"][name] >= bound, result
    assert (workdir / "samples" / "contact_sheet.png").stat().st_size > 0
    assert len(json.loads((workdir / "samples" / "samples.json").read_text())) == 40
    if method == "hpdm":
        # Sampled while it trained; where others use the cores, that may not come to its end.
        samples = workdir / "runs" / "quickstart_base" / "samples"
        assert json.loads((samples / "state.json").read_text())["state"] in ("done", "sampling")


@pytest.mark.slow
@pytest.mark.dist
def test_pyramid_flow_stopped_in_the_middle_is_the_one_that_never_stopped(tmp_path, capsys):
    recipe = "quickstart_pyramid_flow"
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    write_toy(stopped / "media", videos=20, images=0, size=(9, 48, 64))
    prepare_data(stopped, load_config(CONFIGS / f"{recipe}.yaml"))
    shutil.copytree(stopped, straight)
    short = ("total_steps=40", "optimizer.warmup_steps=5")
    train(stopped, recipe, *short, preempt_at=3)
    [middle] = (stopped / "runs" / recipe / "checkpoints").iterdir()
    assert 3 <= int(middle.name.removeprefix("step-")) < 40
    train(stopped, recipe, *short)
    train(straight, recipe, *short)
    runs = [str(folder / "runs" / recipe) for folder in (stopped, straight)]
    assert main(["checkpoint", "diff", *runs]) == 0, capsys.readouterr().out
    scores = score(sample(stopped, recipe, all_toys()[:2]), all_toys()[:2])
    assert set(scores) == {"colour", "direction", "in one piece", "shape"}


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    assert main(["quickstart", "--workdir", str(tmp_path)]) == 78
    assert "is not empty; remove it or give --workdir another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
