"""Held-out loss: fixed samples and noise, every bin once, equal at any world size, and harmless."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.held_out import held_out_reader
from data_pipeline.feeding.loader import Loader, sequences_of
from data_pipeline.feeding.order import GlobalOrder, held_out_rows
from data_pipeline.feeding.sources import open_sources
from t2v.checkpoint.finding import list_checkpoints
from t2v.loop import train
from t2v.methods.hpdm.held_out import fixed_noise, sigma_at
from t2v.methods.seeds import noise_bins
from t2v.recipe.recipe import RunConfig, method_of, parse_config
from t2v.train.held_out import passes
from tests.distributed import next_world, run_distributed
from tests.test_loop import (
    STEPS,
    TRUTH,
    assert_same_tensors,
    config_of,
    dataset,
    leave_no_handlers,
    tensors_at,
)
from tests.tiny import tiny_config, tiny_content

__all__ = ["dataset", "leave_no_handlers"]


def split_config(dataset: Path, run_dir: Path, *, held_out: dict | None, **changes) -> RunConfig:
    """A run of the split dataset, measured on its other part or not."""
    return tiny_config(
        run_dir=str(run_dir),
        data={"sources": [{"path": str(dataset)}], "held_out_share": 0.4},
        held_out=held_out,
        **{"total_steps": STEPS, "checkpoint": {"every_steps": 2}} | changes,
    )


def lines_of(run_dir: Path, key: str) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [values for line in lines if key in (values := json.loads(line))]


def test_a_checkpoint_knows_the_loss_measured_at_its_step(dataset, tmp_path):
    config = split_config(
        dataset, tmp_path / "run", held_out={"every_steps": 4, "samples": 4, "bins": 2},
        total_steps=4,
    )  # fmt: skip
    assert train(config) == 0
    (line,) = lines_of(tmp_path / "run", "held_out_loss")
    losses = {info.step: info.held_out_loss for info in list_checkpoints(tmp_path / "run")}
    assert losses == {2: None, 4: line["held_out_loss"]}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.999, 1.0])
def test_the_split_takes_its_share_of_the_whole_and_never_more_than_a_shard_has(share):
    sizes = np.array([5, 0, 3, 1, 7, 100, 1, 1])
    held_out = held_out_rows(sizes, share)
    assert held_out.sum() == round(share * sizes.sum())
    assert (held_out >= 0).all()
    assert (held_out <= sizes).all()


def test_training_and_held_out_samples_share_the_dataset_between_them(dataset):
    config = tiny_config(data={"sources": [{"path": str(dataset)}], "held_out_share": 0.4})
    (source,) = open_sources(config.data, config.method.pyramid, config.conditioning)
    count = int(source.dataset.shard_sizes.sum())
    training = GlobalOrder(3, sequences_of([source], config.data, seed=3), [1])
    held_out = round(0.4 * count)
    reader = held_out_reader(
        config.data, None, config.method.pyramid, config.conditioning,
        seed=3, samples=held_out, encoder=None,
    )  # fmt: skip
    trained = {training.place(n) for n in range(5 * count)}
    kept_apart = {reader.order.place(n) for n in range(held_out)}
    assert len(kept_apart) == held_out
    assert len(trained) == count - held_out
    assert not trained & kept_apart


def test_a_split_is_part_of_the_fingerprint_and_none_leaves_it_as_it_was(dataset):
    def fingerprint(**changes) -> str:
        config = tiny_config(data={"sources": [{"path": str(dataset)}], **changes})
        loader = Loader(
            config.data, config.method.pyramid, config.conditioning, seed=3, global_batch_size=4,
            micro_batch_size=1, rank=0, world_size=1,
        )  # fmt: skip
        return loader.fingerprint

    assert fingerprint() == fingerprint(held_out_share=0.0)
    assert fingerprint() != fingerprint(held_out_share=0.4)


def test_over_all_turns_each_level_visits_every_bin_once():
    drawn = {"parts": 2, "seed": 3}
    for number in range(5):
        table = [noise_bins([number], [turn], bins=8, **drawn)[0] for turn in range(8)]
        for of_level in zip(*table, strict=True):
            assert sorted(of_level) == list(range(8))
    meetings = {tuple(noise_bins([n], [0], bins=4, **drawn)[0]) for n in range(200)}
    assert len(meetings) == 16  # every pair of bins of two levels


def test_noise_falls_into_its_bin_and_is_a_function_of_sample_and_turn():
    config = tiny_config().method
    edges = sigma_at(torch.linspace(0, 1, 9), config.diffusion)
    numbers, turns = [3] * 8, list(range(8))
    places = noise_bins(numbers, turns, bins=8, parts=2, seed=3)
    noise, sigma, _ = fixed_noise(config, numbers, turns, places, bins=8, seed=3)
    for row, of_levels in enumerate(places):
        for level, place in enumerate(of_levels):
            assert edges[place] <= sigma[row, level] <= edges[place + 1]
    again = fixed_noise(config, [9, 3], [0, 5], [[0, 0], places[5]], bins=8, seed=3)
    assert torch.equal(again[0][1], noise[5])
    assert torch.equal(again[1][1], sigma[5])


def test_bins_are_equal_shares_of_the_training_noise():
    config = tiny_config()
    drawn = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    diffusion = config.method.diffusion
    logs = diffusion.sigma_mean + diffusion.sigma_std * drawn
    edges = torch.tensor(method_of(config).bin_edges(8))
    counts = torch.bincount(torch.bucketize(logs.exp(), edges), minlength=8)
    # 12,500 expected; five standard deviations of a binomial count
    assert (counts - 12_500).abs().max() < 5 * (100_000 / 8 * 7 / 8) ** 0.5


@pytest.mark.parametrize(("samples", "world_size"), [(1, 1), (5, 2), (7, 3), (2, 4), (64, 5)])
def test_ranks_do_the_same_number_of_passes_and_together_all_of_the_work(samples, world_size):
    bins, done, counts = 3, set(), set()
    for rank in range(world_size):
        mine = list(range(rank, samples, world_size)) or [0]
        plan = passes(len(mine), samples, world_size, bins, micro_batch_size=2)
        counts.add(tuple(len(some) for some in plan))
        done |= {(mine[row], turn) for some in plan for row, turn in some}
    assert len(counts) == 1
    assert done == {(sample, turn) for sample in range(samples) for turn in range(bins)}


def test_measuring_changes_nothing_of_the_run(dataset, tmp_path):
    held_out = {"every_steps": 2, "samples": 3, "bins": 2}
    # Weights that stay gathered after a forward pass are where averages could be left behind.
    engine = {"kind": "fsdp", "reshard_after_forward": False}
    with_it = split_config(dataset, tmp_path / "with", held_out=held_out, engine=engine)
    without = split_config(dataset, tmp_path / "without", held_out=None, engine=engine)
    assert train(with_it) == train(without) == 0
    assert_same_tensors(
        tensors_at(tmp_path / "with", STEPS), tensors_at(tmp_path / "without", STEPS)
    )
    found, wanted = lines_of(tmp_path / "with", "loss"), lines_of(tmp_path / "without", "loss")
    for name in TRUTH:
        assert [line[name] for line in found] == [line[name] for line in wanted]
    for line in found:
        assert 0 < line["goodput"] <= 1
        assert line["model_tflops_per_device"] > 0
        assert line["checkpoint_seconds"] >= 0
    measured = lines_of(tmp_path / "with", "held_out_loss")
    assert [line["step"] for line in measured] == [2, 4, 6]
    for line in measured:
        levels = [line[f"held_out_level_{level}"] for level in range(2)]
        assert line["held_out_loss"] == sum(levels)
        for level, value in enumerate(levels):
            assert value == pytest.approx(np.mean(line[f"held_out_level_{level}_bins"]))
        assert line["held_out_bin_axis"] == "sigma"
        assert line["held_out_bin_edges"] == method_of(with_it).bin_edges(2)
    # The last checkpoint, measured again, says the same.
    again = with_it.model_copy(update={"total_steps": STEPS + 1})
    assert train(again) == 0
    assert lines_of(tmp_path / "with", "held_out_loss")[2] == measured[2]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_measure_what_one_does_and_train_on_undisturbed(dataset, tmp_path):
    engine = {"kind": "fsdp", "reshard_after_forward": False}
    held_out = {"every_steps": 2, "samples": 5, "bins": 3}
    tame = {"optimizer": {"eps": 1.0e-2}, "engine": engine}  # see tests/test_engine.py
    one = split_config(dataset, tmp_path / "one", held_out=held_out, **tame)
    two = split_config(dataset, tmp_path / "two", held_out=held_out, **tame)
    bare = split_config(dataset, tmp_path / "bare", held_out=None, **tame)
    assert train(one) == 0
    run_distributed(train_both, 2, two, bare, worlds=2)
    assert_same_tensors(tensors_at(tmp_path / "two", STEPS), tensors_at(tmp_path / "bare", STEPS))
    for name in ("held_out_level_0_bins", "held_out_level_1_bins"):
        found, wanted = (
            torch.tensor([line[name] for line in lines_of(tmp_path / run, "held_out_loss")])
            for run in ("two", "one")
        )
        # Weights of two ranks differ from one's by rounding, and grow apart.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


def train_both(first: RunConfig, second: RunConfig) -> None:
    assert train(first) == 0
    next_world()
    assert train(second) == 0


def test_averages_are_what_is_measured_unless_raw_weights_are_asked_for(dataset, tmp_path):
    lines = {}
    for weights in ("ema", "raw"):
        held_out = {"every_steps": 6, "samples": 2, "bins": 2, "weights": weights}
        config = split_config(dataset, tmp_path / weights, held_out=held_out)
        assert train(config) == 0
        (lines[weights],) = lines_of(tmp_path / weights, "held_out_loss")
    assert lines["ema"]["held_out_loss"] != lines["raw"]["held_out_loss"]
    short = split_config(
        dataset,
        tmp_path / "short",
        held_out=held_out | {"weights": "ema"},
        ema_half_life_steps=1e-3,
    )
    # An average that forgets at once is the weights themselves.
    assert train(short) == 0
    (line,) = lines_of(tmp_path / "short", "held_out_loss")
    assert line["held_out_loss"] == lines["raw"]["held_out_loss"]


def test_captions_are_never_dropped_in_measuring(datasets, tmp_path):
    text = {"kind": "text", "encoder": "tiny", "width": 8, "max_tokens": 16, "dropout": 1.0}
    recipe = tiny_content(
        run_dir=str(tmp_path / "run"),
        total_steps=1,
        pyramid={"patch_size": [4, 12, 16], "clip_size": [8, 24, 32]},
        data={"sources": [{"path": str(datasets / "videos")}], "held_out_share": 0.3},
        held_out={"every_steps": 1, "samples": 3, "bins": 2},
    ) | {"conditioning": text}
    config = parse_config(recipe, "text")
    (source,) = open_sources(config.data, config.method.pyramid, config.conditioning)
    assert source.embeddings is not None
    reader = held_out_reader(
        config.data,
        None,
        config.method.pyramid,
        config.conditioning,
        seed=3,
        samples=3,
        encoder=None,
    )
    null = source.embeddings.null.view(torch.uint16).numpy()
    for number in range(3):
        place, (sample, bad) = reader.order.place(number), reader.read(number)
        own = source.embeddings.read(place.shard, place.row).view(torch.uint16).numpy()
        assert sample.text is not None
        assert np.array_equal(sample.text, own)
        assert not np.array_equal(sample.text, null)
        assert bad == []
    assert train(config) == 0
    (line,) = lines_of(tmp_path / "run", "held_out_loss")
    assert np.isfinite(line["held_out_loss"])


def test_a_split_that_cannot_be_is_refused_in_one_line(dataset, tmp_path):
    with pytest.raises(ConfigError, match="held_out: there is nothing to measure on"):
        config_of(dataset, tmp_path / "run", held_out={"every_steps": 1})
    many = split_config(dataset, tmp_path / "run", held_out={"every_steps": 1, "samples": 100})
    with pytest.raises(ConfigError, match=r"held_out\.samples: 100 is wrong because they need 100"):
        train(many)
    (tmp_path / "all").mkdir()
    config = many.model_copy(update={"data": many.data.model_copy(update={"held_out_share": 1.0})})
    with pytest.raises(ConfigError, match="leaves no sample"):
        train(config)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_measures_and_trains_on_undisturbed(dataset, tmp_path, stage):
    engine = {"kind": "zero", "zero_stage": stage}
    held_out = {"every_steps": 2, "samples": 5, "bins": 3}
    changes = {"engine": engine, "optimizer": {"eps": 1.0e-2}}
    two = split_config(dataset, tmp_path / "two", held_out=held_out, **changes)
    bare = split_config(dataset, tmp_path / "bare", held_out=None, **changes)
    one = split_config(dataset, tmp_path / "one", held_out=held_out, optimizer={"eps": 1.0e-2})
    for config in (two, bare):  # DeepSpeed joins one world in the life of a process
        assert run_distributed(train, 2, config, timeout_seconds=270) == [0, 0]
    assert train(one) == 0
    assert_same_tensors(tensors_at(tmp_path / "two", STEPS), tensors_at(tmp_path / "bare", STEPS))
    found, wanted = (
        torch.tensor([line["held_out_loss"] for line in lines_of(tmp_path / run, "held_out_loss")])
        for run in ("two", "one")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
