"""Every engine trains the same numbers."""

import numpy as np
import pytest

from t2v.recipe.recipe import RunConfig
from tests.distributed import run_distributed
from tests.tiny import tiny_config
from tests.training import Outcome, train_all

STEPS = 10
# Adam divides by |g| + eps: with a usual eps, rounding of near-zero gradients becomes whole steps.
ADAMW, LAMB, MUON = ({"name": name, "eps": 1.0e-2} for name in ("adamw", "lamb", "muon"))
WARM = {
    "checkpoint": "none",
    "freeze_base_steps": 4,
    "new_learning_rate_scale": 2.0,
    "new_warmup_steps": 3,
}
ZERO = [
    {"kind": "zero", "zero_stage": stage, "offload_optimizer": offload}
    for stage in (1, 2, 3)
    for offload in (False, True)
]


def recipe(optimizer: dict, engine: dict, **changes) -> RunConfig:
    return tiny_config(optimizer=optimizer, engine=engine, **changes)


@pytest.fixture(scope="module")
def adamw() -> Outcome:
    return train_all([recipe(ADAMW, {})], STEPS)[0]


@pytest.fixture(scope="module")
def lamb() -> Outcome:
    return train_all([recipe(LAMB, {})], STEPS)[0]


def assert_same_training(found: Outcome, wanted: Outcome) -> None:
    for name, values in wanted.start.items():
        assert np.array_equal(found.start[name], values), f"initial {name}"
    # Sums over ranks are taken in another order: fp32 rounding, grown by the steps.
    np.testing.assert_allclose(found.history, wanted.history, rtol=5e-6)
    for kind in ("weights", "averages"):
        for name, values in getattr(wanted, kind).items():
            np.testing.assert_allclose(
                getattr(found, kind)[name], values, rtol=1e-4, atol=1e-5, err_msg=f"{kind} {name}"
            )
    for name, values in found.unsplit_averages.items():
        assert np.array_equal(found.averages[name], values), f"average {name}"


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_train_what_one_trains(adamw, lamb):
    configs = [
        recipe(ADAMW, {"kind": "fsdp"}),
        recipe(LAMB, {"kind": "fsdp"}),
        *(recipe(ADAMW, {"kind": "zero", "zero_stage": stage}) for stage in (2, 3)),
    ]
    for outcomes in run_distributed(train_all, 2, configs, STEPS):
        for found, wanted in zip(outcomes, [adamw, lamb, adamw, adamw], strict=True):
            assert_same_training(found, wanted)


@pytest.mark.slow
@pytest.mark.dist
def test_four_processes_and_two_replicas_of_two_train_what_one_trains(adamw, lamb):
    configs = [
        recipe(optimizer, {"kind": "fsdp", "dp_replicate": replicas})
        for replicas in (1, 2)
        for optimizer in (ADAMW, LAMB)
    ]
    configs += [recipe(ADAMW, engine) for engine in ZERO]
    wanted = [adamw, lamb, adamw, lamb] + [adamw] * len(ZERO)
    for outcomes in run_distributed(train_all, 4, configs, STEPS, timeout_seconds=400):
        for found, each in zip(outcomes, wanted, strict=True):
            assert_same_training(found, each)


@pytest.mark.slow
@pytest.mark.dist
def test_muon_puts_matrices_together_from_their_parts():
    """On two processes and, where some have no part of small tensors, on three."""
    for processes in (2, 3):
        config = {"global_batch_size": 4 * processes}
        wanted = train_all([recipe(MUON, {}, **config)], 6)[0]
        sharded = [recipe(MUON, {"kind": "fsdp"}, **config)]
        for [found] in run_distributed(train_all, processes, sharded, 6):
            assert_same_training(found, wanted)


@pytest.mark.slow
@pytest.mark.dist
def test_three_processes_cut_tensors_unevenly(adamw):
    # Some ranks are left without a slice of small tensors.
    twelve = {"global_batch_size": 12}
    wanted = {
        name: train_all([recipe(optimizer, {}, **twelve)], 6)[0]
        for name, optimizer in (("adamw", ADAMW), ("lamb", LAMB))
    }
    configs = [recipe(optimizer, {"kind": "fsdp"}, **twelve) for optimizer in (ADAMW, LAMB)]
    configs += [recipe(ADAMW, engine, **twelve) for engine in ZERO]
    configs.append(recipe(LAMB, {"kind": "fsdp", "accumulate": "shards"}, **twelve))
    for outcomes in run_distributed(train_all, 3, configs, 6, timeout_seconds=400):
        for config, found in zip(configs, outcomes, strict=True):
            assert_same_training(found, wanted[config.optimizer.name])


@pytest.mark.slow
@pytest.mark.dist
def test_groups_freeze_and_learn_at_their_own_rates_under_every_engine():
    engines = [{"kind": "fsdp"}, *ZERO]
    wanted = train_all([recipe(ADAMW, {}, warm_start=WARM)], 8)[0]
    configs = [recipe(ADAMW, engine, warm_start=WARM) for engine in engines]
    for outcomes in run_distributed(train_all, 2, configs, 8, timeout_seconds=400):
        for found in outcomes:
            assert_same_training(found, wanted)


@pytest.mark.parametrize("optimizer", [ADAMW, LAMB], ids=["adamw", "lamb"])
def test_a_frozen_base_does_not_move_a_bit(optimizer):
    config = recipe(optimizer, {}, warm_start=WARM)
    frozen, later = (train_all([config], steps)[0] for steps in (4, 12))
    moved = {n for n, start in frozen.start.items() if not np.array_equal(frozen.weights[n], start)}
    assert moved
    assert all("fusion" in name for name in moved)
    for name, start in later.start.items():
        assert not np.array_equal(later.weights[name], start), name


def test_every_parameter_and_every_average_moves(adamw, lamb):
    for outcome in (adamw, lamb):
        for name, start in outcome.start.items():
            assert not np.array_equal(outcome.weights[name], start), name
            assert not np.array_equal(outcome.averages[name], start), name


@pytest.mark.parametrize("what", ["blocks", "selective"])
def test_recomputing_changes_no_bit(adamw, what):
    found = train_all([recipe(ADAMW, {"activation_checkpointing": what})], 6)[0]
    assert np.array_equal(found.history, adamw.history[:6])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_bf16_stays_near_fp32_with_fp32_weights(adamw, kind):
    config = recipe(
        ADAMW, {"kind": kind, "precision": "bf16", "activation_checkpointing": "blocks"}
    )
    if kind == "single":
        outcomes = [train_all([config], 6)]
    else:
        outcomes = run_distributed(train_all, 2, [config], 6)
    for (outcome,) in outcomes:
        # bf16 has 8 bits: products are off by 0.4 %, losses by less.
        np.testing.assert_allclose(outcome.history[:, :2], adamw.history[:6, :2], rtol=2e-2)
        assert not np.array_equal(outcome.history, adamw.history[:6])
        assert {values.dtype for values in outcome.weights.values()} == {np.dtype(np.float32)}


@pytest.mark.slow
@pytest.mark.dist
def test_zero_recomputes_and_computes_in_bf16(adamw):
    configs = [
        recipe(ADAMW, {"kind": "zero", "zero_stage": stage, **changes})
        for stage in (1, 3)
        for changes in (
            {"activation_checkpointing": "blocks" if stage == 3 else "selective"},
            {"precision": "bf16", "activation_checkpointing": "blocks"},
        )
    ]
    for outcomes in run_distributed(train_all, 2, configs, 6, timeout_seconds=400):
        for config, found in zip(configs, outcomes, strict=True):
            rtol = 2e-2 if config.engine.precision == "bf16" else 5e-6
            np.testing.assert_allclose(found.history[:, :2], adamw.history[:6, :2], rtol=rtol)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["single", "fsdp", "zero"])
def test_compiled_blocks_train_the_same_to_rounding(adamw, kind):
    configs = [recipe(ADAMW, {"kind": kind, "compile": True})]
    # One process of its own, too: here, shapes are checked at run time, which no graph can hold.
    ranks = 1 if kind == "single" else 2
    for (outcome,) in run_distributed(train_all, ranks, configs, STEPS, timeout_seconds=400):
        assert_same_training(outcome, adamw)
