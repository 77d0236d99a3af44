"""Fewer latents, in training and in sampling, and guidance by what they know less well."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import ConfigError
from t2v.methods.hpdm.cost import sampling_flops
from t2v.methods.hpdm.memory import latents_of, plan_memory
from t2v.methods.hpdm.network import HPDM
from t2v.methods.hpdm.objective import drawn_latents
from t2v.methods.hpdm.sampling import generate
from t2v.methods.hpdm.settings import level_tilings
from t2v.methods.hpdm.store import Store
from t2v.methods.hpdm.tiled_denoiser import rescaled
from t2v.plan.footprint import forward_flops
from t2v.recipe.recipe import RunConfig, method_of
from tests.test_hpdm import random_inputs
from tests.test_sampling import Painter, gentle_model, random_clips, sample, three_levels
from tests.tiny import THREE_LEVELS, class_condition, noise_batch, stirred_model, tiny_config

CPU = torch.device("cpu")
ALL, FEW = 6, 2
SCALES = {"input_scale": 2.0, "input_scale_growth": 2.0}


def budgeted(**sampling: object) -> RunConfig:
    """Three levels trained with six latents or fewer."""
    changes = THREE_LEVELS | {"sampling": THREE_LEVELS["sampling"] | sampling}
    return tiny_config(**changes, diffusion=SCALES, latent_budget=[ALL, ALL, 4, FEW])


def sliced(model: HPDM, config: RunConfig, latents: int) -> HPDM:
    """A network that never had more latents."""
    small = config.method.model.model_copy(update={"num_latents": latents})
    other = HPDM(small, config.method.pyramid, config.conditioning)
    state = model.state_dict()
    other.load_state_dict(state | {"latents": state["latents"][:latents]})
    return other


@pytest.mark.parametrize("latents", [1, 4, ALL])
def test_a_network_without_its_last_latents_is_one_that_never_had_them(latents):
    config = budgeted()
    model, inputs = stirred_model(config), random_inputs(config)
    inputs["previous_latents"] = inputs["previous_latents"][:, :, :latents]
    found, expected = model(**inputs, num_latents=latents), sliced(model, config, latents)(**inputs)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    found[0].square().mean().backward()
    used = model.latents.grad.abs().sum(1) > 0
    assert used.tolist() == [True] * latents + [False] * (ALL - latents)


def test_the_number_of_latents_is_a_function_of_seed_and_step():
    budget = [ALL, ALL, 4, FEW]
    drawn = [drawn_latents(budget, seed=3, step=step) for step in range(4_000)]
    assert drawn == [drawn_latents(budget, seed=3, step=step) for step in range(4_000)]
    assert drawn != [drawn_latents(budget, seed=4, step=step) for step in range(4_000)]
    # Each entry as likely as another: five standard errors.
    for number, share in ((ALL, 0.5), (4, 0.25), (FEW, 0.25)):
        assert drawn.count(number) / 4_000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("config", [budgeted(), three_levels()], ids=["budget", "all"])
def test_every_micro_batch_of_a_step_works_with_the_number_drawn_for_it(config):
    model, seen = stirred_model(config), []
    model.register_forward_hook(lambda module, args, output: seen.append(output[1].shape[2]))
    for step in range(6):
        seen.clear()
        for numbers in ([7, 0], [3]):
            batch = replace(noise_batch(config, numbers), step=step)
            method_of(config).losses(model, batch, seed=config.seed, device=CPU)
        budget = config.method.latent_budget or [ALL]
        assert set(seen) == {drawn_latents(budget, seed=config.seed, step=step)}


def test_held_out_losses_are_those_of_all_latents():
    found = []
    for config in (budgeted(), three_levels()):
        batch, model = replace(noise_batch(config, [0, 1]), step=5), stirred_model(config)
        told = {"turns": [0, 1], "bins": 2, "seed": 0, "device": CPU}
        found.append(method_of(config).held_out(model, batch, **told)[0])
    assert torch.equal(*found)


def counted(model: HPDM, call: Callable[[], object]) -> int:
    model.requires_grad_(False)  # the counter follows gradients, and there are none
    # A CPU's fused attention is not counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_training_is_forecast_by_what_its_passes_take_on_average():
    config = budgeted()
    method, model = method_of(config), stirred_model(config)
    inputs = method.inputs()
    taken = [
        counted(model, lambda n=n: model(**inputs, num_latents=n))
        for n in config.method.latent_budget
    ]
    assert forward_flops(method) == round(sum(taken) / len(taken)) < max(taken)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"latents": [ALL, 4, 3], "overlap": "w"},
        pytest.param(
            {"guidance_scale": 3.0, "guide_latents": FEW, "solver": ["heun", "unipc"]},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"guidance_scale": [3.0, 1.0, 2.0], "guide": "prompt", "guide_latents": [2, 3, 4]},
            marks=pytest.mark.slow,
        ),
        {
            "guidance_scale": 2.0,
            "guidance_interval": [0.5, 40.0],
            "guide_latents": 3,
            "churn": 5.0,
            "shifted": "w",
            "steps": [3, 2, 2],
        },
    ],
)
def test_the_operations_of_sampling_are_those_that_are_forecast(settings):
    config = budgeted(**{"steps": [2, 1, 1], "overlap": "", "tile_batch": 500} | settings)
    sampling, model = config.method.sampling, gentle_model(config)
    taken = counted(model, lambda: sample(model, config, [1], [5]))
    with torch.device("meta"):
        network = method_of(config).network()
    told = sampling_flops(network, sampling, config.method.diffusion, config.conditioning)
    assert sum(told) == taken
    facts = method_of(config).facts()["TFLOP per sampled clip"]
    assert facts == pytest.approx([one / 1e12 for one in told], rel=1e-3)


def test_samples_with_fewer_latents_are_those_of_a_network_that_has_no_more():
    settings = {"steps": [2, 2, 1], "overlap": "w", "guidance_scale": 2.0}
    config = budgeted(**settings)
    model = gentle_model(config)
    whole = sample(model, config, [0, 1], [1, 2])
    for latents, network in ((ALL, model), (4, sliced(model, config, 4))):
        found = sample(model, budgeted(**settings, latents=latents), [0, 1], [1, 2])
        expected = sample(network, config, [0, 1], [1, 2])
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert torch.equal(found[2], whole[2]) == (latents == ALL)


class Expert(Painter):
    """Knows the clip of a label with all latents, and with fewer the one of the label before."""

    def __call__(self, x, noise, offsets, condition, previous, *, num_latents, **rest):
        label = condition.label - int(num_latents < ALL)
        return super().__call__(
            x, noise, offsets, replace(condition, label=label), previous, **rest
        )


@pytest.mark.parametrize(("guide", "away"), [("null", 2), ("prompt", 0)])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.0])
def test_guidance_leads_away_from_what_the_guide_says(guide, away, guidance_scale):
    """With fewer latents: of the null condition, label 3, or of the prompt itself."""
    config = budgeted(guide=guide, guide_latents=FEW, guidance_scale=guidance_scale)
    clips = random_clips(config, 4)
    found = sample(Expert(config, clips), config, labels=[1], seeds=[0])
    for level, canvas in enumerate(found):
        weak, told = clips[level][away], clips[level][1]
        expected = (weak + guidance_scale * (told - weak)).clamp(-1, 1)
        # A single step from sigma 80 at input scale 8 leaves 80 * 8 roundings of fp32.
        torch.testing.assert_close(canvas[0], expected, rtol=0, atol=1e-3)


def test_without_guidance_no_setting_of_the_guide_changes_a_byte():
    settings = {"steps": [2, 1, 1], "overlap": "h"}
    model = gentle_model(budgeted(**settings))
    plain = sample(model, budgeted(**settings), [0], [1])
    for guide in ({"guide": "prompt"}, {"guide_latents": FEW}, {"guidance_rescale": 1.0}):
        found = sample(model, budgeted(**settings, guidance_scale=1.0, **guide), [0], [1])
        assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


@pytest.mark.parametrize("guide", ["null", "prompt"])
def test_branches_of_unlike_latents_are_kept_apart_wherever_they_are_kept(guide, tmp_path):
    settings = {"steps": [2, 2, 2], "overlap": ["", "fw", "h"], "guide": guide}
    settings |= {"guide_latents": [FEW, 3, 4], "guidance_scale": [2.0, 1.0, 2.0]}
    settings |= {"guidance_interval": [0.0, 50.0]}
    config = budgeted(**settings, tile_batch=32)
    model = gentle_model(config)
    free = sample(model, config, [0, 2], [1, 2])
    rooms = plan_memory(model, config.method.sampling, clips=1, device_bytes=1 << 62)
    rooms = [replace(room, volumes="disk", latents="disk", tile_batch=7) for room in rooms]
    with contextlib.closing(Store(CPU, tmp_path)) as store:
        found = generate(
            model, condition=class_condition([2]), null=class_condition([3]), seeds=[2],
            rooms=rooms, store=store, sampling=config.method.sampling,
            diffusion=config.method.diffusion,
        )  # fmt: skip
    for alone, together in zip(found, free, strict=True):
        # Matrix products of other batch sizes round otherwise.
        torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_latents_are_kept_for_as_many_as_work(monkeypatch):
    """Those that tiles hand to their next step: one by one, so that no batch has room to spare."""
    settings = {"guidance_scale": 2.0, "tile_batch": 2, "overlap": "h"}
    kept: list[int] = []
    keep = Store.keep

    def noted(self: Store, shape: tuple[int, ...], *rest: Any) -> Any:
        kept.extend([prod(shape)] if len(shape) == 3 else [])
        return keep(self, shape, *rest)

    monkeypatch.setattr(Store, "keep", noted)
    for few in ({"guide_latents": FEW}, {"latents": [4, 4, 2]}, {}):
        config = budgeted(**settings, **few)
        model, sampling = gentle_model(config), config.method.sampling
        kept.clear()
        sample(model, config, [0, 1], [0, 1])
        pyramid, dim = config.method.pyramid, config.method.model.latent_dim
        expected = []
        for level in range(3):
            tiles = len(level_tilings(sampling, pyramid, level)[0])
            expected.append(2 * tiles * sum(latents_of(model, sampling, level)) * dim)
        assert sum(kept) == sum(expected)


def test_rescaling_gives_a_guided_tile_its_contrast_back_and_leaves_its_mean():
    generator = torch.Generator().manual_seed(0)
    plain = 0.3 * torch.randn(2, 3, 2, 4, 4, generator=generator) + 0.5
    guided = plain + 2 * torch.randn(plain.shape, generator=generator)
    axes = (1, 2, 3, 4)
    assert torch.equal(rescaled(guided, plain, 0.0), guided)
    whole, half = rescaled(guided, plain, 1.0), rescaled(guided, plain, 0.5)
    torch.testing.assert_close(whole.std(axes), plain.std(axes))
    torch.testing.assert_close(half.std(axes), (plain.std(axes) + guided.std(axes)) / 2)
    for moved in (whole, half):
        torch.testing.assert_close(moved.mean(axes), guided.mean(axes))
    flat = torch.full_like(plain, 0.8)
    torch.testing.assert_close(rescaled(flat, flat, 1.0), flat)


def test_sampled_tiles_have_their_contrast_back():
    """A level of one tile, whose unguided answer the network says at every step."""
    config = budgeted(guidance_scale=[2.0, 1.0, 1.0], guidance_rescale=[1.0, 0.0, 0.0])
    clips = [0.5 * clip for clip in random_clips(config, 4)]
    found = sample(Painter(config, clips), config, labels=[1], seeds=[0])[0]
    told, null = clips[0][1], clips[0][3]
    guided = 2 * told - null
    expected = guided.mean() + (guided - guided.mean()) * told.std() / guided.std()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("budget", "sampling", "message"),
    [
        ([4, 2], {}, "latent_budget: [4, 2] is wrong because its largest number is not"),
        ([6, 5, 4, 3, 2], {}, "for each of 5 sizes; give at most 4"),
        ([6, 2], {"latents": 1}, "latents: 1 is wrong because the network is trained with 2 to 6"),
        (None, {"latents": 4}, "latents: 4 is wrong because the network is trained with 6 latents"),
        ([6, 2], {"guide_latents": 7}, "guide_latents: 7 is wrong because"),
        ([6, 2], {"latents": [6, 4, 4]}, "latents: [6, 4, 4] has 3 entries for 2 levels"),
        ([6, 2], {"guidance_rescale": [0.5]}, "guidance_rescale: [0.5] has 1 entries for 2"),
        (
            [6, 2],
            {"guide": "prompt", "guidance_scale": [1.0, 2.0], "guide_latents": [2, 6]},
            "guide: 'prompt' is wrong because at level 1 its 6 latents are no fewer than the 6",
        ),
    ],
)
def test_numbers_that_were_never_trained_are_refused_in_a_line(budget, sampling, message):
    with pytest.raises(ConfigError) as caught:
        tiny_config(latent_budget=budget, sampling=sampling)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
