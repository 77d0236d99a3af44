"""How many graphs the blocks of every recipe are compiled into: as many as are stated, and no more
after held-out passes, which are given a batch too small."""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from t2v.engine import compute
from t2v.engine.compute import prepare_blocks
from t2v.engine.config import EngineConfig
from t2v.methods.hpdm.objective import drawn_latents
from t2v.methods.pyramid_flow.objective import Lesson, errors
from t2v.recipe.recipe import RunConfig, load_config, method_of, parse_config
from t2v.train.held_out import passes
from tests.distributed import run_distributed
from tests.tiny import NoiseBatch, noise_batch
from tests.tiny_flow import FLOW, TEXT, flow_config
from tests.tiny_flow import noise_batch as flow_batch

CONFIGS = Path(__file__).parents[1] / "configs"
# docs/engines.md has this table. With gradients and without.
STATED = {
    "base_36x64": 2,
    "t2v_16x576x1024": 2,
    "t2v_64x288x512": 8,
    "ucf101_m": 6,
}
SMALL_HPDM = {
    "token_size": "[1, 2, 2]", "token_dim": 16, "num_latents": 3, "latent_dim": 16,
    "latent_layers": 1, "token_head_dim": 8, "latent_head_dim": 8, "conditioning_dim": 16,
}  # fmt: skip


def small(name: str) -> RunConfig:
    """A recipe with its blocks and levels, in miniature."""
    config = load_config(CONFIGS / f"{name}.yaml")
    levels = config.method.pyramid.levels
    clip = [side * 2 ** (levels - 1) for side in (2, 4, 4)]
    changes = [f"method.model.{key}={value}" for key, value in SMALL_HPDM.items()]
    changes += [f"method.pyramid.patch_size={[2, 4, 4]}", f"method.pyramid.clip_size={clip}"]
    if config.conditioning.kind == "text":
        changes += ["conditioning.width=8", "conditioning.max_tokens=4"]
    return load_config(CONFIGS / f"{name}.yaml", changes)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def count_only() -> None:
    """Generate nothing from graphs, so that counting is quick."""
    torch.compile = partial(torch.compile, backend="eager")


def built(config: RunConfig, **engine: Any) -> torch.nn.Module:
    network = method_of(config).network()
    network.init_weights(0)
    settings = config.engine.model_dump() | engine
    prepare_blocks(network.blocks, EngineConfig.model_validate(settings))
    return network


def batch_of(config: RunConfig, numbers: list[int]) -> NoiseBatch:
    """Samples with whatever the recipe is conditioned on."""
    batch = noise_batch(config, numbers)
    if config.conditioning.kind == "text":
        text = torch.ones(len(numbers), config.conditioning.max_tokens, config.conditioning.width)
        batch = replace(batch, text_tokens=text.bfloat16(), text_mask=text[..., 0] > 0)
    return batch


def step(network: torch.nn.Module, config: RunConfig, numbers: list[int], number: int = 0) -> None:
    batch = replace(batch_of(config, numbers), step=number)
    device = torch.device("cpu")
    method_of(config).losses(network, batch, seed=0, device=device).sum().backward()


def held_out(network: torch.nn.Module, config: RunConfig, samples: int, size: int) -> None:
    for some in passes(samples, samples, 1, 3, size):
        batch = batch_of(config, [row for row, _ in some])
        with torch.no_grad():
            method_of(config).held_out(
                network, batch, turns=[turn for _, turn in some], bins=3, seed=0,
                device=torch.device("cpu"),
            )  # fmt: skip


def counted(name: str) -> list[int]:
    """Graphs of a recipe after three steps; then after a held-out pass and a step more; and of a
    run that goes on, which builds its network anew."""
    count_only()
    config = small(name)
    network = built(config)
    for number in range(3):
        step(network, config, [2 * number, 2 * number + 1])
    found = [graphs()]
    held_out(network, config, samples=5, size=2)
    step(network, config, [0, 1])
    found.append(graphs())
    torch.compiler.reset()
    counters.clear()
    again = built(config)
    step(again, config, [0, 1])
    held_out(again, config, samples=5, size=2)
    return [*found, graphs()]


# In processes of their own: here, shapes are checked at run time, which no graph can hold.
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", STATED)
def test_every_recipe_has_the_graphs_that_are_stated_held_out_or_not(name):
    (found,) = run_distributed(counted, 1, name, timeout_seconds=600)
    # Self-conditioning's passes have no gradients, as held-out ones.
    assert found == [STATED[name]] * 3


@pytest.mark.parametrize("name", ["ucf101_s", "ucf101_l"])
def test_recipes_that_differ_in_width_alone_have_the_graphs_of_one(name):
    own, other = small(name), small("ucf101_m")
    assert (own.method, own.engine, own.conditioning) == (
        other.method, other.engine, other.conditioning
    )  # fmt: skip
    assert own.method != load_config(CONFIGS / f"{name}.yaml").method


def counted_with_budget() -> int:
    """Graphs of the text-to-video recipe where a step's latents are of four sizes."""
    count_only()
    budget, content = [4, 3, 2, 1], small("t2v_64x288x512").model_dump(mode="json")
    content["method"]["latent_budget"] = budget
    content["method"]["model"]["num_latents"] = max(budget)
    config = parse_config(content, "budget")
    network, known = built(config), set()
    for number in range(50):
        drawn = drawn_latents(budget, seed=0, step=number)
        if drawn not in known:
            step(network, config, [2 * number, 2 * number + 1], number)
            known.add(drawn)
    held_out(network, config, samples=5, size=2)
    assert known == set(budget)
    return graphs()


@pytest.mark.dist
@pytest.mark.slow
def test_a_latent_budget_multiplies_graphs_by_its_sizes_and_may_have_four():
    found = run_distributed(counted_with_budget, 1, timeout_seconds=600)
    assert found == [4 * STATED["t2v_64x288x512"]]


def counted_flow(name: str) -> tuple[list[int], set[str]]:
    """Graphs of a Pyramid Flow recipe's blocks, in miniature but with its stages, units and kinds
    of blocks: after all their lengths; also of groups of one sample, and of captions of one token;
    also without gradients; and once more. And where graphs end."""
    count_only()
    recipe = load_config(CONFIGS / f"{name}.yaml").method
    units, device = len(recipe.units), torch.device("cpu")
    assert recipe.flow.stages == len(FLOW["flow"]["joints"]) + 1
    size = {"clip_size": [units, 16, 24], "unit_frames": 1}
    config = flow_config(conditioning=TEXT, model={"double_blocks": 2, "single_blocks": 2}, **size)
    network, found = built(config, activation_checkpointing="blocks", compile=True), []
    every = list(product(range(units), range(recipe.flow.stages)))

    def learn(kinds: list[tuple[int, int]], *text: int, grad: bool = True) -> None:
        batch = flow_batch(config, list(range(len(text))))
        mask = torch.arange(TEXT["max_tokens"]) < torch.tensor(text)[:, None]
        lessons = [
            Lesson(row, s, u, seed=9 * u + row) for u, s in kinds for row in range(len(text))
        ]
        with torch.set_grad_enabled(grad):
            loss = errors(network, replace(batch, text_mask=mask), config.method, lessons, device)
            if grad:
                loss.sum().backward()

    for kind in every:
        learn([kind], 3, 5)
    found.append(graphs())
    for text in ((4,), (1, 1), (1,)):
        learn(every[::7], *text)
    found.append(graphs())
    for text in ((3, 5), (4,), (1, 1), (1,)):
        learn(every[::7], *text, grad=False)
    found.append(graphs())
    for text in ((6, 2), (2,)):
        learn(every[::5], *text)
    return [*found, graphs()], set(counters["graph_break"])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["pyramid_flow_384p", "pyramid_flow_768p"])
def test_pyramid_flow_has_the_graphs_that_are_stated_at_every_length(name):
    ((found, breaks),) = run_distributed(counted_flow, 1, name, timeout_seconds=600)
    assert found == [6, 20, 40, 40]
    (only,) = breaks  # nothing else runs uncompiled
    assert "function attend" in only


def one_too_many() -> str:
    count_only()
    compute.MOST_GRAPHS = 2
    config = small("base_36x64")
    network = built(config, activation_checkpointing="none")
    step(network, config, [0, 1])
    assert graphs() == 2
    try:
        step(network, config, [0, 1, 2])
    except FailOnRecompileLimitHit:
        return "an error"
    return f"{graphs()} graphs"


@pytest.mark.dist
@pytest.mark.slow
def test_one_graph_too_many_is_an_error_and_never_uncompiled_code():
    assert run_distributed(one_too_many, 1) == ["an error"]


@pytest.mark.parametrize("samples", [1, 4, 5, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_passes_are_all_of_one_size_and_leave_nothing_out(samples, world_size):
    for rank in range(world_size):
        own = len(range(rank, samples, world_size))
        some = passes(own, samples, world_size, 3, 4)
        assert {len(work) for work in some} == {4}
        assert {work for one in some for work in one} >= {
            (row, turn) for row in range(own) for turn in range(3)
        }
