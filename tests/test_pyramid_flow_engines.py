"""Every engine trains Pyramid Flow's numbers, though samples of a batch differ in length."""

import numpy as np
import pytest
import torch
import torch._dynamo

from t2v.recipe.recipe import RunConfig
from tests.distributed import run_distributed
from tests.test_engine import ADAMW, LAMB, ZERO, assert_same_training
from tests.tiny_flow import TEXT, flow_config
from tests.training import Outcome, train_all

STEPS = 8


def recipe(optimizer: dict, engine: dict, **changes) -> RunConfig:
    """Text of any length, and micro-batches that mix stages and units."""
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "conditioning": TEXT}
    return flow_config(optimizer=optimizer, engine=engine, **(sizes | changes))


@pytest.fixture(scope="module")
def adamw() -> Outcome:
    return train_all([recipe(ADAMW, {})], STEPS)[0]


def test_micro_batches_of_any_size_train_the_same(adamw):
    for size in (1, 8):
        assert_same_training(train_all([recipe(ADAMW, {}, micro_batch_size=size)], STEPS)[0], adamw)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_what_one_trains(adamw):
    configs = [recipe(ADAMW, {"kind": "fsdp"}), recipe(ADAMW, {"kind": "zero"})]
    for outcomes in run_distributed(train_all, 2, configs, STEPS):
        for found in outcomes:
            assert_same_training(found, adamw)


@pytest.mark.slow
@pytest.mark.dist
def test_four_processes_and_replicas_train_what_one_trains(adamw):
    lamb = train_all([recipe(LAMB, {})], STEPS)[0]
    engines = [{"kind": "fsdp"}, {"kind": "fsdp", "dp_replicate": 2},
               {"kind": "fsdp", "accumulate": "shards"}]  # fmt: skip
    configs = [recipe(optimizer, engine) for engine in engines for optimizer in (ADAMW, LAMB)]
    configs += [recipe(ADAMW, engine) for engine in ZERO]
    wanted = [adamw, lamb] * len(engines) + [adamw] * len(ZERO)
    for outcomes in run_distributed(train_all, 4, configs, STEPS, timeout_seconds=400):
        for found, each in zip(outcomes, wanted, strict=True):
            assert_same_training(found, each)


@pytest.mark.parametrize("what", ["blocks", pytest.param("selective", marks=pytest.mark.slow)])
def test_recomputing_changes_no_bit(adamw, what):
    found = train_all([recipe(ADAMW, {"activation_checkpointing": what})], STEPS)[0]
    assert np.array_equal(found.history, adamw.history)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_train_the_same_and_not_once_for_each_length():
    small = {"model": {"double_blocks": 1, "single_blocks": 1}, "micro_batch_size": 4}
    plain = train_all([recipe(ADAMW, {}, **small)], 6)[0]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = {"compile": True, "activation_checkpointing": "blocks"}
    assert_same_training(train_all([recipe(ADAMW, compiled, **small)], 6)[0], plain)
    # Before and after attention: one sample or more, a text of one token or more.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 16
