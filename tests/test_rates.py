"""Rates against hand counts, and peaks of devices by the names that drivers give them."""

import json

import pytest
import torch

from t2v.plan.footprint import forward_flops, training_tflop
from t2v.plan.plan import compute_per_sample, measure
from t2v.recipe.recipe import method_of
from t2v.watching.rates import Rates, first_start, peak_tflops
from tests.tiny import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A1000 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_peaks_go_by_the_device_s_name(name, bf16):
    assert peak_tflops(name, "bf16") == bf16


@pytest.mark.parametrize("self_conditioning_rate", [0.0, 0.9])
def test_training_costs_what_the_plan_says_without_recomputation(self_conditioning_rate):
    model = {"self_conditioning_rate": self_conditioning_rate}
    config = tiny_config(model=model, engine={"activation_checkpointing": "blocks"})
    compute = compute_per_sample(config, measure(config))
    expected = compute.training + compute.without_gradient
    assert training_tflop(method_of(config)) == pytest.approx(expected)


def test_speed_is_shared_by_the_devices_and_has_no_mfu_on_a_cpu():
    method = method_of(tiny_config(model={"self_conditioning_rate": 0.0}))
    rates = Rates(training_tflop(method), "fp32", 4, CPU).of(8.0)
    expected = 3 * forward_flops(method) * 8.0 / 4 / 1e12
    assert rates == {"model_tflops_per_device": pytest.approx(expected), "mfu": None}


def test_a_run_began_with_its_first_attempt(tmp_path):
    assert first_start(tmp_path) is None
    at = ("2026-01-01T00:00:10+00:00", "2026-01-02T00:00:00+00:00")
    lines = [json.dumps({"attempt": n, "event": "start", "at": when}) for n, when in enumerate(at)]
    (tmp_path / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    assert first_start(tmp_path) == 1767225610.0
    (tmp_path / "attempts.jsonl").write_text("not json\n")
    assert first_start(tmp_path) is None
