"""What may and what may not influence what in the network."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2v.engine.compute import determinism
from t2v.methods.hpdm.context import TokenGrid
from t2v.methods.hpdm.network import HPDM, PIXELS
from t2v.methods.hpdm.tiling import cut_tile
from t2v.recipe.recipe import RunConfig, load_config, method_of
from tests.tiny import THREE_LEVELS, class_condition, noise_batch, stirred_model, tiny_config

CONFIGS = Path(__file__).parent.parent / "configs"
BOTH_FUSIONS = pytest.mark.parametrize("fusion", ["deep", "shallow"])


def three_levels(**model: object) -> RunConfig:
    return tiny_config(**(THREE_LEVELS | {"model": THREE_LEVELS["model"] | model}))


def random_inputs(config: RunConfig, batch: int = 2, seed: int = 0) -> dict:
    """Inputs of a joint forward pass, self-conditioning included."""
    generator = torch.Generator().manual_seed(seed)
    levels, sizes = config.method.pyramid.levels, config.method.model
    shape = (batch, levels, 3, *config.method.pyramid.patch_size)
    latents = (batch, levels, sizes.num_latents, sizes.latent_dim)
    return {
        "x": torch.randn(shape, generator=generator),
        "noise": torch.randn(batch, levels, generator=generator),
        "offsets": noise_batch(config, list(range(seed, seed + batch))).offsets,
        "condition": class_condition([row % 3 for row in range(batch)]),
        "previous_latents": torch.randn(latents, generator=generator),
    }


@BOTH_FUSIONS
def test_a_level_does_not_see_finer_ones(fusion):
    config = three_levels(fusion=fusion)
    model, inputs = stirred_model(config), random_inputs(config)
    output, latents = model(**inputs)
    other = random_inputs(config, seed=9)
    for level in range(config.method.pyramid.levels - 1):
        finer = slice(level + 1, None)
        changed = {key: value for key, value in inputs.items() if key != "condition"}
        for key in changed:
            changed[key] = changed[key].clone()
            changed[key][:, finer] = other[key][:, finer]
        new_output, new_latents = model(**changed, condition=inputs["condition"])
        assert torch.equal(new_output[:, : level + 1], output[:, : level + 1])
        assert torch.equal(new_latents[:, : level + 1], latents[:, : level + 1])
        assert not torch.isclose(new_output[:, finer], output[:, finer]).any(dim=0).all()


def gradient_of(model: HPDM, inputs: dict, level: int) -> Tensor:
    """Size, per level, of the gradient that one level's loss sends to the tokenizer's outputs."""
    kept: list[Tensor] = []
    hook = model.tokenizer.register_forward_hook(
        lambda module, args, output: (output.retain_grad(), kept.append(output))[0]
    )
    output, _ = model(**inputs)
    output[:, level].square().mean().backward()
    hook.remove()
    return kept[0].grad.abs().sum(dim=(0, 2, 3))


@pytest.mark.parametrize("detached", [False, True])
def test_a_finer_loss_reaches_coarse_tokens_unless_detached(detached):
    config = three_levels(detach_context=detached)
    model, inputs = stirred_model(config), random_inputs(config)
    for level in range(config.method.pyramid.levels):
        sizes = gradient_of(model, inputs, level)
        assert sizes[level] > 0
        assert (sizes[level + 1 :] == 0).all()
        assert (sizes[:level] == 0).all() if detached else (sizes[:level] > 0).all()


def test_detaching_changes_gradients_and_not_outputs():
    attached, detached = three_levels(), three_levels(detach_context=True)
    inputs = random_inputs(attached)
    first, second = stirred_model(attached)(**inputs), stirred_model(detached)(**inputs)
    assert torch.equal(first[0], second[0])


def test_shallow_fusion_sees_the_previous_level_alone():
    config = three_levels(fusion="shallow")
    model, inputs = stirred_model(config), random_inputs(config)
    output, _ = model(**inputs)
    changed = inputs | {"x": inputs["x"].clone()}
    changed["x"][:, 0] += 1
    new_output, _ = model(**changed)
    assert not torch.allclose(new_output[:, 1], output[:, 1])
    assert torch.equal(new_output[:, 2], output[:, 2])


def test_forward_and_backward_give_the_same_bits_twice():
    config = three_levels()
    results = []
    for _ in range(2):
        model = stirred_model(config)
        with determinism(config.engine):
            output, latents = model(**random_inputs(config))
            (output.square().mean() + latents.square().mean()).backward()
        results.append([output, latents, *(p.grad for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_every_parameter_gets_a_gradient():
    config = three_levels(coarse_pixels=True)
    model = stirred_model(config)
    output, _ = model(**random_inputs(config))
    output.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def around(grid: TokenGrid, window: Tensor, offsets: Tensor, level: int) -> Tensor:
    """The features of a level of which only a window is known; zeros around it."""
    whole = window.new_zeros(len(window), *grid.level_shape(level), window.shape[-1])
    for row, low in enumerate((offsets // torch.tensor(grid.token_size)).tolist()):
        cut_tile(whole[row].movedim(3, 0), low, grid.shape).copy_(window[row].movedim(3, 0))
    return whole


@pytest.mark.parametrize(
    ("fusion", "pixels"), [("deep", False), ("shallow", False), ("deep", True)]
)
def test_level_by_level_equals_all_levels_at_once(fusion, pixels):
    """Sampling runs one level at a time on boxes of coarser features; training runs all jointly.

    Both see the same, if no window reaches past the border of its parent's.
    """
    config = tiny_config(
        pyramid={"levels": 3, "patch_size": [4, 8, 8], "clip_size": [16, 32, 32]},
        model={
            "levels_per_block": [1, 2, 3, 3],
            "token_size": [1, 2, 2],
            "fusion": fusion,
            "coarse_pixels": pixels,
        },
        sampling={"steps": [1, 1, 1]},
    )
    model, inputs = stirred_model(config), random_inputs(config)
    # Offsets of level 1 are multiples of the token size: its tokens are those of the whole level.
    inputs["offsets"] = torch.tensor([[[0, 0, 0], [2, 4, 6], [5, 13, 17]]] * 2)
    output, latents = model(**inputs)
    wholes: dict[tuple[int, int], Tensor] = {}
    for level in range(3):
        offsets, kept = inputs["offsets"][:, level], {}
        for block, coarser in model.config.context_features(level):
            grid = model.pixel_grid if block == PIXELS else model.grid
            low, shape = grid.support(level, offsets, coarser)
            whole = wholes[block, coarser].movedim(4, 1)
            boxes = [cut_tile(*pair, shape) for pair in zip(whole, low.tolist(), strict=True)]
            kept[block, coarser] = torch.stack(boxes).movedim(1, 4)

        def watch(block: int, features: Tensor, level: int = level, at: Tensor = offsets) -> None:
            window = features[:, 0].unflatten(1, model.grid.shape)
            wholes[block, level] = around(model.grid, window, at, level)

        patch = inputs["x"][:, level].movedim(1, 4)
        wholes[PIXELS, level] = around(model.pixel_grid, patch, offsets, level)
        own = {key: value[:, level, None] for key, value in inputs.items() if key != "condition"}
        alone, own_latents = model(
            **own, condition=inputs["condition"], level=level, kept=kept, watch=watch
        )
        # Batched with other levels, or other box sizes, matrix products round otherwise.
        torch.testing.assert_close(alone[:, 0], output[:, level], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own_latents[:, 0], latents[:, level], rtol=1e-4, atol=1e-4)


def shrunk(name: str) -> RunConfig:
    """A shipped recipe with its levels and block schedule, made small enough to run."""
    recipe = load_config(CONFIGS / f"{name}.yaml")
    growth, levels = recipe.method.pyramid.growth, recipe.method.pyramid.levels
    patch = (2, 6, 8)
    clip = [side * factor ** (levels - 1) for side, factor in zip(patch, growth, strict=True)]
    return tiny_config(
        pyramid={"levels": levels, "patch_size": list(patch), "clip_size": clip},
        model={"levels_per_block": recipe.method.model.levels_per_block},
        sampling={"steps": [1] * levels},
    )


@pytest.mark.parametrize("name", ["ucf101_s", "t2v_64x288x512", "t2v_16x576x1024"])
def test_level_0_of_a_warm_started_pyramid_is_its_base(name):
    config = shrunk(name)
    base_config = tiny_config(
        pyramid={"levels": 1, "clip_size": [2, 6, 8]},
        model={"levels_per_block": [1] * len(config.method.model.levels_per_block)},
        sampling={"steps": [1]},
    )
    base, pyramid = stirred_model(base_config), method_of(config).network()
    pyramid.init_weights(7)
    missing, unexpected = pyramid.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected
    assert all(".fusion." in key or key == "conditioning.level_embedding" for key in missing)

    inputs = random_inputs(config)
    # Level 0 of the pyramid shows every `stride`-th frame, the base all frames of a slower clip.
    stride = config.method.pyramid.stride(0)[0]
    slow = class_condition([0, 1], fps=24.0 / stride)
    only = {key: inputs[key][:, :1] for key in ("x", "noise", "offsets", "previous_latents")}
    expected, expected_latents = base(**only, condition=slow)
    output, latents = pyramid(**only, condition=inputs["condition"], level=0)
    assert torch.equal(output, expected)
    assert torch.equal(latents, expected_latents)
    # In a joint pass the same rows are part of larger matrix products, which may round otherwise.
    output, latents = pyramid(**inputs)
    torch.testing.assert_close(output[:, :1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents[:, :1], expected_latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pixels", [False, True])
def test_before_training_context_does_not_matter(pixels):
    """Fusion starts as the identity: at step 0 a finer level is its base without context."""
    config = three_levels(coarse_pixels=pixels)
    model, inputs = stirred_model(config), random_inputs(config)
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        if block.fusion is not None:
            block.fusion.init_weights(generator)
    if model.coarse_tokenizer is not None:
        torch.nn.init.zeros_(model.coarse_tokenizer.weight)
    output, _ = model(**inputs)
    changed = inputs | {"x": inputs["x"].clone()}
    changed["x"][:, 0] += 1
    assert torch.equal(model(**changed)[0][:, 1:], output[:, 1:])


def test_an_untrained_network_says_nothing_and_has_no_unset_value():
    config = three_levels()
    model = method_of(config).network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights(3)
    output, latents = model(**random_inputs(config))
    assert (output == 0).all()
    assert latents.isfinite().all()
    again = method_of(config).network()
    again.init_weights(3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_self_conditioning_can_be_left_out():
    config = three_levels(self_conditioning_rate=0.0)
    model, inputs = stirred_model(config), random_inputs(config)
    assert not [name for name, _ in model.named_parameters() if "self_conditioning" in name]
    plain = model(**(inputs | {"previous_latents": None}))
    assert torch.equal(model(**inputs)[0], plain[0])


@pytest.mark.parametrize("coordinates", [True, False])
def test_only_coordinates_tell_equally_nested_windows_apart(coordinates):
    config = three_levels(fusion="shallow", coordinates=coordinates)
    model, inputs = stirred_model(config), random_inputs(config, batch=1)
    here = torch.tensor([[[0, 0, 0], [0, 2, 3], [1, 5, 9]]])
    # Level 1 moves by one of its pixels, level 2 by the same way, which is two of its own.
    there = torch.tensor([[[0, 0, 0], [1, 3, 4], [3, 7, 11]]])
    outputs = [model(**(inputs | {"offsets": offsets}))[0][:, 2] for offsets in (here, there)]
    assert torch.equal(*outputs) is not coordinates


def test_adaptive_computation_leaves_late_levels_out_of_early_blocks():
    seen: list[int] = []
    config = three_levels()
    model = stirred_model(config)
    for block in model.blocks:
        block.rin.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model(**random_inputs(config, batch=2))
    assert seen == [2 * active for active in config.method.model.levels_per_block]
    assert [block.fusion is not None for block in model.blocks] == [False, True, True]
    everywhere = method_of(three_levels(levels_per_block=[3, 3, 3])).network()
    assert all(block.fusion is not None for block in everywhere.blocks)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("ucf101_s", 178),
        ("ucf101_m", 321),
        ("ucf101_l", 725),
        ("t2v_64x288x512", 3934),
        ("t2v_16x576x1024", 3934),
    ],
)
def test_published_variants_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = method_of(load_config(CONFIGS / f"{name}.yaml")).network()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
