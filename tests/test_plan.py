"""The forecast: arithmetic that adds up, refusals that name the knob, and knobs that help."""

import io
import json
import re
from math import inf, nan
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.memory import CASES, compare
from data_pipeline.errors import ConfigError
from t2v.cli import main
from t2v.engine.config import BUCKET_ELEMENTS
from t2v.plan.footprint import Footprint, measure
from t2v.plan.memory import GIB, memory
from t2v.plan.plan import plan, print_plan
from t2v.plan.tune import tune
from t2v.recipe.recipe import RunConfig, load_config
from tests.tiny import tiny_config

CONFIGS = Path(__file__).parent.parent / "configs"


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


@pytest.fixture(scope="module")
def t2v_footprint() -> Footprint:
    return measure(recipe("t2v_64x288x512"))


def test_the_text_to_video_recipe_on_64_gpus():
    told = json.loads(plan(recipe("t2v_64x288x512"), gpus=64, gpu_memory_gib=80).to_json())
    assert told["parameters"] / 1e6 == pytest.approx(3934, rel=0.01)
    assert told["parameters"] == sum(told["parameters_by_part"].values())
    tflop = told["tflop_per_sample"]
    assert 12.5 < tflop["forward"] < 13
    assert tflop["training"] == 3 * tflop["forward"]
    # The recipe self-conditions and recomputes: two more forward passes.
    assert tflop["spent"] == pytest.approx(5 * tflop["forward"])
    assert told["pixel_share"] == pytest.approx(4 / 8**3)
    assert told["method"]["tokens per patch"] == 1536
    assert told["total_samples"] == 15_000 * 8192
    assert told["step"]["accumulation_steps"] * 4 * 64 == told["step"]["samples"] == 8192
    assert told["step"]["patch_gib"] == 8192 * 4 * 8 * 36 * 64 * 3 / GIB
    assert told["step"]["embedding_gib"] == 8192 * 128 * 1024 * 2 / GIB
    assert sum(told["method"]["network calls per sampled clip"]) == 36_479
    assert told["memory_gib"]["total"] < 80


def test_hours_are_operations_over_assumed_speed():
    forecast = plan(recipe("ucf101_s"), gpus=8, gpu_memory_gib=80)
    operations = 40_000 * 768 * forecast.tflop_per_sample.spent
    for row in forecast.forecasts:
        seconds = operations / (8 * 494.7 * row.utilisation)
        assert row.hours == pytest.approx(seconds / 3600)
        assert row.samples_per_second * row.step_seconds == pytest.approx(768)


def test_memory_adds_up_to_the_fullest_of_its_three_moments(t2v_footprint):
    for gpus in (2, 64):
        needed = memory(recipe("t2v_64x288x512"), t2v_footprint, gpus)
        always = needed.weights + needed.optimizer + needed.ema + needed.reserve
        backward = always + needed.gathered_weights + needed.batch
        begins = backward + needed.activations + needed.earlier_gradients
        ends = backward + needed.summed_gradients + needed.gradients
        update = always + needed.gradients + needed.optimizer_step
        assert needed.total == pytest.approx(max(begins, ends, update))


def test_shards_add_up_to_the_model_and_activations_follow_the_micro_batch(t2v_footprint):
    whole = 4 * sum(t2v_footprint.parameters.values()) / GIB
    sizes = {gpus: memory(recipe("t2v_64x288x512"), t2v_footprint, gpus) for gpus in (1, 8, 64)}
    for gpus, needed in sizes.items():
        assert needed.weights * gpus == pytest.approx(whole)
        assert needed.optimizer * gpus == pytest.approx(2 * whole)
        assert needed.summed_gradients == needed.earlier_gradients == pytest.approx(whole)
    for size in (1, 2, 8):
        needed = memory(recipe("t2v_64x288x512", f"micro_batch_size={size}"), t2v_footprint, 8)
        assert needed.activations / size == pytest.approx(sizes[8].activations / 4)
    lengths = ("ema_lengths=[0.05, 0.1]", "checkpoint.milestone_every_steps=1000")
    averaged = memory(recipe("t2v_64x288x512", *lengths), t2v_footprint, 8)
    assert averaged.ema == pytest.approx(3 * sizes[8].ema)
    assert averaged.host_copy == pytest.approx(6 / 4 * sizes[8].host_copy)
    assert averaged.weights == sizes[8].weights


@pytest.mark.slow
def test_recomputation_trades_operations_for_memory():
    without, recomputing = (
        plan(
            recipe("ucf101_l", f"engine.activation_checkpointing={what}"), gpus=8, gpu_memory_gib=80
        )
        for what in ("none", "blocks")
    )
    assert recomputing.memory_gib.activations < 0.4 * without.memory_gib.activations
    assert recomputing.tflop_per_sample.spent > without.tflop_per_sample.spent
    assert recomputing.tflop_per_sample.training == without.tflop_per_sample.training


@pytest.mark.parametrize(
    ("overrides", "gpus", "gib", "knob"),
    [
        ([], 8, 40, r"set engine\.activation_checkpointing=(selective|blocks)\.$"),
        ([], 8, 14, r"=blocks, engine\.accumulate=shards and micro_batch_size=\d\.$"),
        (["engine.kind=single", "method.model.latent_dim=3072"], 1, 60, r"use \d+ GPUs"),
    ],
)
def test_what_does_not_fit_is_refused_with_sums_and_a_knob_that_helps(overrides, gpus, gib, knob):
    config = recipe("ucf101_l", *overrides)
    with pytest.raises(ConfigError) as caught:
        plan(config, gpus=gpus, gpu_memory_gib=gib)
    message = str(caught.value)
    assert caught.value.exit_code == 78
    total, terms = re.fullmatch(
        rf"--gpu-memory-gib: {gib} is wrong because each GPU needs ([\d.]+) GiB \((.*)\); .*",
        message,
    ).groups()
    # Every term is rounded to a tenth, and those below a twentieth are left out.
    parts = [float(term.split()[0]) for term in terms.split(" + ")]
    assert sum(parts) == pytest.approx(float(total), abs=0.5)
    assert re.search(knob, message)
    more = re.search(r"use (\d+) GPUs", message)
    changes = re.findall(r"[a-z_.]+=[a-z0-9]+", message.partition(";")[2])
    changed = recipe("ucf101_l", *overrides, *changes)
    assert plan(changed, gpus=int(more[1]) if more else gpus, gpu_memory_gib=gib)


def test_what_no_number_of_gpus_can_hold_is_said():
    with pytest.raises(ConfigError, match="no number of GPUs helps"):
        plan(recipe("ucf101_s"), gpus=8, gpu_memory_gib=2.1)


def test_a_gpu_smaller_than_what_is_set_aside_is_no_fault_of_the_model():
    with pytest.raises(ConfigError, match="2 GiB are set aside: give a GPU that has more"):
        plan(tiny_config(), gpus=1, gpu_memory_gib=1.0)


def test_a_world_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ConfigError, match="global_batch_size: 768 is wrong because 7 ranks"):
        plan(recipe("ucf101_s"), gpus=7, gpu_memory_gib=80)


def test_one_process_does_not_use_two_gpus():
    with pytest.raises(ConfigError, match=r"engine\.kind: 'single' is wrong because there are 2"):
        plan(tiny_config(), gpus=2, gpu_memory_gib=80)
    with pytest.raises(ConfigError, match=r"engine\.kind: 'single' is wrong because there are 2"):
        tune(tiny_config(), gpus=2, gpu_memory_gib=80, gb_per_second=50)
    config = tiny_config(engine={"kind": "fsdp"})
    with pytest.raises(ConfigError, match=r"global_batch_size: 4 is wrong because 3 GPUs do not"):
        tune(config, gpus=3, gpu_memory_gib=80, gb_per_second=50)


@pytest.mark.parametrize(("gpus", "gib"), [(0, 80.0), (1, 0.0), (1, nan), (1, inf)])
def test_no_gpu_is_refused(gpus, gib):
    for forecast in (plan, tune):
        with pytest.raises(ConfigError, match=r"nothing runs on that|no GPU has that"):
            forecast(tiny_config(), gpus=gpus, gpu_memory_gib=gib, gb_per_second=50)


def test_choices_are_no_json():
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(CONFIGS / "base_36x64.yaml"), "--tune", "--json"])
    assert caught.value.code == 2


def test_the_tables_show_the_numbers_in_80_columns():
    told = plan(tiny_config(), gpus=1, gpu_memory_gib=8)
    out = io.StringIO()
    print_plan(told, Console(file=out, width=80))
    text = out.getvalue()
    assert "tiny, GPUs: 1 (single, fp32)" in text
    assert f"{told.memory_gib.total:,.2f} of 8" in text
    assert f"{told.forecasts[0].hours:,.1f}" in text
    assert f"{told.pixel_share:.2%} of the clip" in text
    assert max(map(len, text.splitlines())) <= 80


def test_zero_splits_more_at_each_stage(t2v_footprint):
    whole = 4 * sum(t2v_footprint.parameters.values()) / GIB

    def needed(stage: int, *changes: str):
        zero = ["optimizer.name=adamw", "engine.kind=zero", f"engine.zero_stage={stage}"]
        zero.append("engine.compile=false")
        return memory(recipe("t2v_64x288x512", *zero, *changes), t2v_footprint, 64)

    once = "global_batch_size=256"
    one, two, three = (needed(stage, once) for stage in (1, 2, 3))
    assert one.optimizer == two.optimizer == three.optimizer == pytest.approx(2 * whole / 64)
    bucket = 4 * BUCKET_ELEMENTS / GIB
    assert one.summed_gradients + one.gradients == pytest.approx(whole + bucket)
    assert two.summed_gradients == three.summed_gradients == pytest.approx(2 * bucket)
    assert two.weights - three.weights == pytest.approx(whole - whole / 64)
    assert one.total >= two.total > three.total  # activations outweigh what one splits later
    assert needed(2).summed_gradients == one.summed_gradients  # summed over micro-batches
    offloaded = needed(3, once, "engine.offload_optimizer=true")
    assert offloaded.optimizer == offloaded.ema == offloaded.gradients == 0
    assert offloaded.host == pytest.approx(6 * whole / 64)
    assert offloaded.total < three.total


def test_replicas_hold_as_much_as_fewer_gpus_do(t2v_footprint):
    replicated = recipe("t2v_64x288x512", "engine.dp_replicate=4")
    hybrid = memory(replicated, t2v_footprint, 64)
    assert hybrid == memory(recipe("t2v_64x288x512"), t2v_footprint, 16)
    with pytest.raises(ConfigError, match=r"engine\.dp_replicate: 4 is wrong because .* 6 GPUs"):
        plan(recipe("ucf101_s", "engine.dp_replicate=4"), gpus=6, gpu_memory_gib=80)


def test_selective_recomputation_lies_between_none_and_all(t2v_footprint):
    none, selective, blocks = (
        memory(
            recipe("t2v_64x288x512", f"engine.activation_checkpointing={what}"), t2v_footprint, 64
        ).activations
        for what in ("none", "selective", "blocks")
    )
    assert blocks < selective < none


def test_a_network_of_absurd_size_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"method\.model\.latent_dim") as caught:
        recipe("ucf101_s", "method.model.latent_dim=4294967296")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "name", ["wide, LAMB", "deep, recomputed", "deep, FSDP", "wide, ZeRO stage 3"]
)
def test_forecast_is_within_a_tenth_of_the_measured_peak(name):
    (case,) = (case for case in CASES if case.name == name)
    assert compare(case)["forecast_over_measured"] == pytest.approx(1, abs=0.1)


def test_weights_that_stay_are_gathered_once_a_step_whatever_the_micro_batches():
    config = load_config(CONFIGS / "t2v_64x288x512.yaml", ["engine.reshard_after_forward=false"])
    few, many = (
        plan(config.model_copy(update={"micro_batch_size": size}), gpus=64, gpu_memory_gib=500.0)
        for size in (64, 4)
    )
    assert few.communication == many.communication
    assert many.communication.models_gathered == 1
    # All of a fp32 model but this GPU's own 64th.
    assert many.communication.gathered_gib == pytest.approx(many.parameters * 4 * 63 / 64 / 2**30)


def test_tuning_finds_what_gathers_once_and_says_how_to_ask_for_it():
    config = load_config(CONFIGS / "t2v_64x288x512.yaml")
    choices = tune(config, gpus=64, gpu_memory_gib=80.0, gb_per_second=50.0)
    assert [c.step_seconds for c in choices] == sorted(c.step_seconds for c in choices)
    best = choices[0]
    assert all(choice.memory_gib <= 80 for choice in choices)
    overrides = [f"{name}={str(value).lower()}" for name, value in best.changes.items()]
    better = plan(
        load_config(CONFIGS / "t2v_64x288x512.yaml", overrides), gpus=64, gpu_memory_gib=80.0
    )
    assert better.memory_gib.total == pytest.approx(best.memory_gib)
    assert better.communication.seconds == pytest.approx(best.communication_seconds)
    assert better.communication.models_gathered == 1
    now = next(choice for choice in choices if not choice.changes)
    assert best.step_seconds < now.step_seconds


def test_a_deadline_that_a_healthy_micro_batch_exceeds_is_refused():
    config = load_config(CONFIGS / "t2v_64x288x512.yaml", ["watchdog.step_seconds=1"])
    with pytest.raises(ConfigError, match=r"watchdog.step_seconds: 1 is wrong because a micro"):
        plan(config, gpus=64, gpu_memory_gib=80.0)
