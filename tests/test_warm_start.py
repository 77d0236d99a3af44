"""A pyramid begins exactly as its base, and nothing unexpected is taken over."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import ConfigError, InputMissing
from t2v.checkpoint.tensor_files import TensorKind
from t2v.engine.engine import Engine
from t2v.engine.world import ALONE, join_world
from t2v.network.conditioning import Condition
from t2v.recipe.recipe import RunConfig, method_of
from t2v.train.warm_start import WarmStart, plan_warm_start, resize_table, warm_start
from tests.distributed import run_distributed
from tests.test_checkpoint import checkpoints, facts, fresh_state, shuffled_state, tensors_of
from tests.tiny import noise_batch, tiny_config
from tests.training import engine_of

BASE = {
    "pyramid": {"levels": 1, "patch_size": [2, 6, 8], "clip_size": [2, 6, 8]},
    "model": {"levels_per_block": [1, 1]},
    "sampling": {"steps": [4]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The run folder of a base with values of its own in every tensor."""
    config = tiny_config(**BASE)
    run_dir = tmp_path_factory.mktemp("base")
    state = shuffled_state(config, seed=1)
    made = checkpoints(run_dir)
    made.save(state.slices(), facts(config, 9))
    made.finish()
    return run_dir


def pyramid_config(base: Path, **settings) -> RunConfig:
    return tiny_config(warm_start={"checkpoint": str(base), **settings})


def begin(config: RunConfig, engine: Engine) -> WarmStart:
    """Give an engine its recipe's base."""
    assert config.warm_start is not None
    return warm_start(config.warm_start, method_of(config), engine)


def weights_of(config: RunConfig, state) -> dict[str, torch.Tensor]:
    return {name: part.clone() for name, part in state.engine.parameters().items()}


@pytest.mark.parametrize(("weights", "prefix"), [("ema", "ema."), ("raw", "model.")])
def test_known_weights_are_the_bases_and_new_ones_keep_their_values(base, weights, prefix):
    config = pyramid_config(base, weights=weights)
    state = fresh_state(config)
    before = weights_of(config, state)
    plan = begin(config, state.engine)
    assert plan.new == [
        "conditioning.level_embedding",
        "blocks.1.fusion.linear.weight",
        "blocks.1.fusion.linear.bias",
    ]
    assert (plan.ignored, plan.resized) == ([], [])
    saved = tensors_of(shuffled_state(tiny_config(**BASE), seed=1))
    for name, value in weights_of(config, state).items():
        wanted = before[name] if name in plan.new else saved[prefix + name]
        assert torch.equal(value, wanted), name


def test_level_0_is_bitwise_the_bases_at_step_0(base):
    config = pyramid_config(base)
    state = fresh_state(config)
    begin(config, state.engine)
    base_state = shuffled_state(tiny_config(**BASE), seed=1)
    for name, part in base_state.engine.parameters().items():
        part.copy_(base_state.ema.averages[name])
    batch = noise_batch(config, [0, 1])
    # One in two frames of a clip is level 0's; the base is told that rate.
    condition = Condition.of(batch, torch.device("cpu"))
    x, noise = torch.randn(2, 2, 3, 2, 6, 8), torch.randn(2, 2)
    x0, noise0, offsets0 = x[:, :1], noise[:, :1], batch.offsets[:, :1]
    half_rate = replace(condition, fps=condition.fps / 2)
    ours, base_model = state.engine.model, base_state.engine.model
    found, latents = ours(x0, noise0, offsets0, condition, level=0)
    wanted, base_latents = base_model(x0, noise0, offsets0, half_rate)
    assert torch.equal(found, wanted)
    assert torch.equal(latents, base_latents)
    # In training all levels share one matrix product, whose size moves the last bit.
    together = ours(x, noise, batch.offsets, condition)[0][:, :1]
    torch.testing.assert_close(together, wanted, rtol=1e-5, atol=1e-5)


def warm_weights(config: RunConfig) -> dict:
    with join_world(config.engine) as world:
        engine = engine_of(config, world)
        begin(config, engine)
        places = engine.places()
        return {
            name: (places[name].offset, part.flatten().numpy())
            for name, part in engine.parameters().items()
        }


@pytest.mark.slow
@pytest.mark.dist
def test_sharded_warm_start_gives_bitwise_the_same_weights(base):
    config = pyramid_config(base)
    state = fresh_state(config)
    begin(config, state.engine)
    alone = weights_of(config, state)
    fsdp = tiny_config(engine={"kind": "fsdp"}, warm_start={"checkpoint": str(base)})
    for weights in run_distributed(warm_weights, 2, fsdp):
        for name, value in alone.items():
            offset, part = weights[name]
            assert (part == value.flatten()[offset:][: len(part)].numpy()).all(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"latent_dim": 24}}, r"read_norm\.bias +16 float32 +24 float32"),
        ({"model": {"latent_layers": 2}}, r"layers\.1\.\S+ +missing"),
        ({"model": {"self_conditioning_rate": 0.0}}, r"self_conditioning\S+ .*not in this model"),
        ({"model": {"token_head_dim": 4}}, r"token_head_dim: 4 is wrong because the base .* has 8"),
        ({"conditioning": {"kind": "class", "num_classes": 4}}, r"num_classes: 4 is wrong"),
        (
            {"pyramid": {"levels": 2, "patch_size": [2, 6, 16], "clip_size": [4, 12, 32]}},
            r"positions\.width +2x16 float32 +4x16 float32",
        ),
    ],
)
def test_another_network_is_refused(base, change, message):
    config = tiny_config(warm_start={"checkpoint": str(base)}, **change)
    engine = engine_of(config, ALONE)
    with pytest.raises(ConfigError, match=message):
        begin(config, engine)


def test_absent_base_is_named(tmp_path):
    config = pyramid_config(tmp_path / "nowhere")
    with pytest.raises(InputMissing, match="nowhere: no such checkpoint"):
        begin(config, fresh_state(config).engine)


def test_position_tables_of_another_grid_are_interpolated_when_asked(base):
    config = tiny_config(
        warm_start={"checkpoint": str(base), "resize_positions": True},
        pyramid={"levels": 2, "patch_size": [2, 6, 16], "clip_size": [4, 12, 32]},
    )
    state = fresh_state(config)
    plan = begin(config, state.engine)
    assert plan.resized == ["positions.width"]
    table = tensors_of(shuffled_state(tiny_config(**BASE), seed=1))["ema.positions.width"]
    expected = torch.nn.functional.interpolate(table.T[None], size=4, mode="linear")[0].T
    torch.testing.assert_close(state.engine.parameters()["positions.width"], expected)


def test_resized_table_agrees_with_a_ramp_inside():
    ramp = torch.arange(8.0)[:, None]
    space = resize_table(ramp, 16, aligned_start=False)[:, 0]
    assert torch.equal(space[1:-1], torch.arange(1, 15) / 2 - 0.25)
    time = resize_table(ramp, 16, aligned_start=True)[:, 0]
    assert torch.equal(time[:15], torch.arange(15) / 2)


def test_a_pyramids_own_keys_are_ignored_by_a_base():
    kind = TensorKind((2,), torch.float32)
    plan = plan_warm_start(
        Path("x"),
        {"latents": kind, "blocks.1.fusion.linear.bias": kind},
        {"latents": kind},
        method_of(tiny_config(**BASE)),
        resize_positions=False,
    )
    assert (plan.loaded, plan.ignored) == (["latents"], ["blocks.1.fusion.linear.bias"])
