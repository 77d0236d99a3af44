"""Counts of a recipe's cost against counts taken while a real network runs."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from t2v.network.layers import Attention
from t2v.plan.footprint import measure
from t2v.recipe.recipe import RunConfig, load_config, method_of
from tests.tiny import THREE_LEVELS, class_condition, tiny_config

CONFIGS = Path(__file__).parent.parent / "configs"


def run(config: RunConfig, model: nn.Module) -> None:
    levels = config.method.pyramid.levels
    model(
        torch.zeros(1, levels, 3, *config.method.pyramid.patch_size),
        torch.zeros(1, levels),
        torch.zeros(1, levels, 3, dtype=torch.long),
        class_condition([0]),
    )


def test_operations_of_a_base_are_those_of_its_products():
    config = tiny_config(
        pyramid={"levels": 1, "clip_size": [2, 6, 8]},
        model={"levels_per_block": [1, 1]},
        sampling={"steps": [1]},
    )
    model, counted = method_of(config).network(), []
    model.init_weights(0)

    def of_linear(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        counted.append(2 * output.numel() * module.in_features)

    def of_attention(module: Attention, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        queries, keys, inner = inputs[0].shape[1], inputs[1].shape[1], module.out.in_features
        counted.append(2 * 2 * queries * keys * inner)  # scores, and their use

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(of_linear)
        if isinstance(module, Attention):
            module.register_forward_hook(of_attention)
    run(config, model)
    assert measure(config).forward_flops == sum(counted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_bytes_are_those_that_a_real_forward_pass_keeps(precision):
    config = tiny_config(**THREE_LEVELS, engine={"precision": precision})
    model, kept = method_of(config).network(), {}
    model.init_weights(0)
    if precision == "bf16":
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    halved = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with halved, saved_tensors_hooks(note, lambda tensor: tensor):
        run(config, model)
    footprint = measure(config)
    # On a CPU, norms keep their weights, and so their statistics, in fp32.
    rounding = 0.002 if precision == "bf16" else 0
    assert footprint.kept_bytes == pytest.approx(sum(kept.values()), rel=rounding, abs=0)
    assert footprint.kept_bytes >= footprint.kept_between_blocks_bytes
    assert footprint.kept_bytes >= footprint.kept_by_largest_block_bytes


@pytest.mark.parametrize(
    ("name", "millions", "tflop"),
    [("t2v_64x288x512", 3934, 12.85), ("ucf101_l", 725, 2.80)],
)
def test_published_recipes_cost_what_was_counted_by_hand(name, millions, tflop):
    footprint = measure(load_config(CONFIGS / f"{name}.yaml"))
    assert footprint.forward_flops / 1e12 == pytest.approx(tflop, rel=0.01)
    assert sum(footprint.parameters.values()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_parts_add_up_to_the_network():
    config = tiny_config(**THREE_LEVELS)
    model, footprint = method_of(config).network(), measure(config)
    assert sum(footprint.parameters.values()) == sum(p.numel() for p in model.parameters())
    fusion = [p.numel() for name, p in model.named_parameters() if "fusion" in name]
    assert footprint.parameters["fusion"] == sum(fusion)
    assert footprint.largest_block_parameters == max(
        sum(p.numel() for p in block.parameters()) for block in model.blocks
    )


def test_adaptive_computation_saves_operations():
    adaptive = measure(tiny_config(**THREE_LEVELS)).forward_flops
    everywhere = measure(tiny_config(**(THREE_LEVELS | {"model": {"levels_per_block": [3, 3, 3]}})))
    # 6 of 9 block evaluations, and no fusion in the first block.
    assert 0.5 < adaptive / everywhere.forward_flops < 6 / 9 + 0.05
