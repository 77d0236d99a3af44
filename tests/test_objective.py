"""The training loss: what it weighs, and that a sample's noise belongs to the sample."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from t2v.methods.hpdm.diffusion import c_in, c_nrm, c_out, v_target
from t2v.methods.hpdm.objective import draw_noise, level_losses, mix, to_patches
from t2v.recipe.recipe import RunConfig
from tests.tiny import THREE_LEVELS, noise_batch, stirred_model, tiny_config

CPU = torch.device("cpu")


class Knower(nn.Module):
    """Answers with the true velocity of clips it knows, plus a given error."""

    def __init__(self, config: RunConfig, x: Tensor, error: Tensor | float = 0.0) -> None:
        super().__init__()
        self.config, self.x, self.error = config, x, error

    def forward(self, scaled, told, offsets, condition, previous=None) -> tuple[Tensor, Tensor]:
        sigma = (4 * told).exp().flatten()
        scales = [self.config.method.diffusion.level_input_scale(n) for n in range(told.shape[1])]
        scale = torch.tensor(scales).expand_as(told).flatten()
        x, x_noisy = self.x.flatten(0, 1), scaled.flatten(0, 1) / wide(c_in(sigma, scale))
        noise = (x_noisy - x / wide(scale)) / wide(sigma)
        answer = wide(c_nrm(sigma)) * v_target(x, noise, sigma)
        return answer.unflatten(0, told.shape) + self.error, torch.zeros(*told.shape, 1, 1)


def wide(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]


def test_the_true_velocity_costs_nothing():
    config = tiny_config(diffusion={"input_scale": 2.0})
    batch = noise_batch(config, [0, 1, 2])
    losses = level_losses(Knower(config, to_patches(batch.patches)), batch, config, CPU)
    assert losses.shape == (2,)
    # The noise is recovered from fp32 sums.
    torch.testing.assert_close(losses, torch.zeros(2), rtol=0, atol=1e-6)


def test_an_error_costs_what_edm_charges_for_the_denoised_patch():
    """`(1 / sigma^2 + 1) * |denoised - x|^2`, averaged over pixels and samples of each level."""
    config = tiny_config(diffusion={"input_scale": 2.0, "input_scale_growth": 3.0})
    batch = noise_batch(config, [4, 5])
    x = to_patches(batch.patches)
    error = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    losses = level_losses(Knower(config, x, error), batch, config, CPU)
    _, sigma, _ = draw_noise(config, batch.numbers, x.shape[1:], CPU)
    for level in range(2):
        scale = torch.full((2,), config.method.diffusion.level_input_scale(level))
        of_denoised = wide(c_out(sigma[:, level], scale)) * error[:, level]
        charged = wide(1 / sigma[:, level] ** 2 + 1) * of_denoised.square()
        torch.testing.assert_close(losses[level], charged.mean(), rtol=1e-4, atol=1e-5)


def test_a_sample_s_loss_does_not_depend_on_its_company():
    config = tiny_config(**THREE_LEVELS)
    model, numbers = stirred_model(config), [7, 0, 3, 12]
    with torch.no_grad():
        together = level_losses(model, noise_batch(config, numbers), config, CPU)
        alone = [level_losses(model, noise_batch(config, [n]), config, CPU) for n in numbers]
        halves = [
            level_losses(model, noise_batch(config, part), config, CPU)
            for part in (numbers[:2], numbers[2:])
        ]
    # Matrix products of other batch sizes round otherwise.
    torch.testing.assert_close(torch.stack(alone).mean(0), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(halves).mean(0), together, rtol=1e-4, atol=1e-5)


def test_noise_is_bitwise_a_function_of_seed_and_sample_number():
    config = tiny_config(**THREE_LEVELS)
    shape = torch.Size((3, 3, 2, 6, 8))
    together = draw_noise(config, torch.tensor([5, 1, 9]), shape, CPU)
    alone = draw_noise(config, torch.tensor([1]), shape, CPU)
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[1:2], one)
    other_seed = draw_noise(tiny_config(**THREE_LEVELS, seed=4), torch.tensor([1]), shape, CPU)
    assert not torch.equal(other_seed[0], alone[0])


def test_levels_have_independent_noise_and_noise_levels():
    config = tiny_config(**THREE_LEVELS)
    numbers = torch.arange(400)
    noise, sigma, _ = draw_noise(config, numbers, torch.Size((3, 1, 1, 1, 8)), CPU)
    for drawn in (noise.flatten(2)[:, :, 0], sigma.log()):
        correlation = torch.corrcoef(drawn.T) - torch.eye(3)
        # Five standard errors of 400 draws.
        assert float(correlation.abs().max()) < 0.25


@pytest.mark.parametrize(("rate", "passes"), [(0.0, 1), (0.9, 2)])
def test_self_conditioning_costs_one_pass_without_gradient(rate, passes):
    config = tiny_config(model={"self_conditioning_rate": rate})
    model, with_gradient = stirred_model(config), []
    model.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    level_losses(model, noise_batch(config, [0]), config, CPU)
    assert with_gradient == [False, True][-passes:]


def test_the_share_of_self_conditioned_samples_is_the_rate():
    config = tiny_config(model={"self_conditioning_rate": 0.25})
    chosen = draw_noise(config, torch.arange(2_000), torch.Size((2, 1, 1, 1, 1)), CPU)[2]
    assert set(chosen.tolist()) == {0.0, 1.0}
    # Five standard errors.
    assert float(chosen.mean()) == pytest.approx(0.25, abs=0.05)


def test_a_sample_without_self_conditioning_gets_zeros():
    rare = tiny_config(model={"self_conditioning_rate": 0.5})
    model, seen = stirred_model(rare), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[4:]))
    batch = noise_batch(rare, list(range(12)))
    level_losses(model, batch, rare.method, seed=rare.seed, device=CPU)
    chosen = draw_noise(rare, batch.numbers, to_patches(batch.patches).shape[1:], CPU)[2]
    assert seen[0] == ()
    latents = seen[1][0]
    assert not latents.requires_grad
    assert (latents.abs().amax(dim=(1, 2, 3)) > 0).tolist() == chosen.bool().tolist()


def test_seeds_of_samples_do_not_collide():
    seeds = {mix(seed, number) for seed in range(20) for number in range(2_000)}
    assert len(seeds) == 40_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Neighbours differ in about half of their bits.
    differing = [(mix(0, n) ^ mix(0, n + 1)).bit_count() for n in range(1_000)]
    assert sum(differing) / 1_000 == pytest.approx(31.5, abs=1.0)


def test_bytes_become_values_from_minus_one_to_one():
    config = tiny_config()
    batch = noise_batch(config, [0])
    patches = to_patches(batch.patches)
    assert patches.shape == (1, 2, 3, *config.method.pyramid.patch_size)
    channel = batch.patches[..., 1]
    torch.testing.assert_close(patches[:, :, 1], (channel.double() / 255 * 2 - 1).float())
    ends = replace(batch, patches=torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 1, 2, 1))
    assert to_patches(ends.patches).flatten().tolist() == [-1, 1]
