"""The loader's own account of its speed."""

import json
import time

import pytest
import yaml
from test_loader import NONE, PYRAMID, TEXT, config
from tiny import tiny_content

from data_pipeline import stages
from data_pipeline.errors import ConfigError
from data_pipeline.feeding.bench import bench
from data_pipeline.shards.dataset import open_dataset
from t2v.cli import main


@pytest.mark.dist
def test_stages_account_for_the_time_and_bytes_of_the_samples(datasets):
    data = config(datasets / "videos", datasets / "images", workers=2)
    begin = time.perf_counter()
    speed = bench(data, PYRAMID, TEXT, seed=5, samples=20)
    elapsed = time.perf_counter() - begin
    assert speed.samples == 21  # whole periods of the mixture
    spent = speed.milliseconds_by_stage
    assert set(spent) == set(stages.STAGES)
    # Media are read, decoded and converted, so none of their latents are read.
    assert {name for name, milliseconds in spent.items() if milliseconds == 0} == {"latents"}
    assert sum(spent.values()) < 1e3 * elapsed / 21
    assert len(speed.process_mib) == 2
    assert speed.machine_samples_per_second >= speed.cores * 21 / elapsed
    largest = max(
        int(row["media"]["size"] + row["json"]["size"] + row["txt"]["size"])
        for folder in ("videos", "images")
        for row in open_dataset(datasets / folder).index(0)
    )
    assert 0 < speed.megabytes_per_second / speed.samples_per_second < 1.5 * largest / 1e6


def test_no_samples_are_refused(datasets):
    with pytest.raises(ConfigError, match="--samples: 0 is wrong"):
        bench(config(datasets / "videos"), PYRAMID, NONE, seed=0, samples=0)


def test_the_command_says_how_many_gpus_are_fed(datasets, tmp_path, capsys):
    content = tiny_content(
        data={"sources": [{"path": str(datasets / "videos")}]},
        pyramid={"patch_size": [4, 12, 16], "clip_size": [8, 24, 32]},
    ) | {"conditioning": {"kind": "none"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert main(["data", "bench", str(recipe), "--samples", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus_fed"] > 0
    assert main(["data", "bench", str(recipe), "--samples", "8"]) == 0
    assert "GPUs that take" in " ".join(capsys.readouterr().out.split())
