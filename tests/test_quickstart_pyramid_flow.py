"""Pyramid Flow's quickstart: its bounds, and that stopping it changes nothing."""

import shutil

import pytest

from data_pipeline.making.toy import all_toys, write_toy
from t2v.cli import main
from t2v.quickstart import CONFIGS, prepare_data, sample, score, train
from t2v.recipe.recipe import load_config
from tests.test_quickstart import keep_bounds


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(2400)
def test_samples_keep_their_bounds(tmp_path):
    keep_bounds(tmp_path / "quickstart", "pyramid-flow")


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
