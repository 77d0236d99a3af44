"""What the audit says of a batch is what the loader reads, at any scale."""

import json

import psutil
import pytest
import yaml
from test_loader import config, make
from tiny import RECIPE

from data_pipeline.feeding.batches import planned_samples
from data_pipeline.feeding.order import GlobalOrder
from data_pipeline.shards.dataset import open_dataset
from t2v.cli import main


def test_the_audit_names_the_samples_that_the_loader_reads(datasets):
    data = config(datasets / "videos", datasets / "images")
    steps = [[n for batch in step for n in batch.ids] for step in make(data).steps(3, 6)]
    planned = list(planned_samples(data, seed=5, global_batch_size=12, step=4, count=3))
    assert [sample["id"] for sample in planned] == [name for step in steps for name in step]
    assert [sample["n"] for sample in planned] == list(range(36, 72))
    assert [sample["step"] for sample in planned] == [4] * 12 + [5] * 12 + [6] * 12
    for sample in planned:
        source, shard, row = sample["id"].split("/")
        assert sample["dataset"] == data.sources[int(source)].path
        assert (sample["shard"], sample["row"]) == (shard, int(row))


def test_any_step_costs_no_more_than_its_batch(datasets, monkeypatch):
    data = config(datasets / "videos", datasets / "images")
    asked = []
    place = GlobalOrder.place
    monkeypatch.setattr(GlobalOrder, "place", lambda self, n: asked.append(n) or place(self, n))
    list(planned_samples(data, seed=5, global_batch_size=12, step=10**12))
    assert asked == list(range(12 * 10**12 - 12, 12 * 10**12))


def test_the_command_prints_the_batch(datasets, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    path = str(datasets / "videos")
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": {"sources": [{"path": path}]}}))
    assert main(["data", "order", str(recipe), "--step", "7", "--count", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    data = config(datasets / "videos", weights=(1,))
    assert printed == list(planned_samples(data, seed=3, global_batch_size=4, step=7, count=2))
    assert main(["data", "order", str(recipe), "--step", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == [sample["id"] for sample in printed[:4]]
    with pytest.raises(SystemExit):
        main(["data", "order", str(recipe), "--step", "0"])


@pytest.mark.slow
def test_a_hundred_million_samples_are_opened_in_little_memory(tmp_path):
    shards = [{"name": f"{i:06d}", "samples": 1000, "index_sha256": ""} for i in range(100_000)]
    info = {
        "format": 1, "kind": "video", "fingerprint": "f", "samples": 10**8, "fps": 24.0,
        "clip": [64, 288, 512], "folder": "shards", "shards": shards,
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    del shards, info
    process = psutil.Process()
    before = process.memory_info().rss
    dataset = open_dataset(tmp_path)
    data = config(tmp_path, weights=(1,))
    batch = list(planned_samples(data, seed=0, global_batch_size=64, step=10**6))
    added = (process.memory_info().rss - before) / 2  # it was opened twice
    assert dataset.info.samples == 10**8
    assert len({sample["id"] for sample in batch}) == 64
    assert added < 100e6
