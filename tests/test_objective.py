"""The training loss: what it weighs, and that a sample's noise belongs to the sample."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from t2v.methods.hpdm.diffusion import c_in, c_nrm, c_out, v_target
from t2v.methods.hpdm.objective import draw_noise, to_patches
from t2v.methods.seeds import mix
from t2v.recipe.recipe import RunConfig, method_of
from tests.tiny import THREE_LEVELS, NoiseBatch, noise_batch, stirred_model, tiny_config

CPU = torch.device("cpu")


class Knower(nn.Module):
    """Answers with the true velocity of clips it knows, plus a given error."""

    def __init__(self, config: RunConfig, x: Tensor, error: Tensor | float = 0.0) -> None:
        super().__init__()
        self.config, self.x, self.error = config, x, error

    def forward(
        self, scaled, told, offsets, condition, previous=None, **_
    ) -> tuple[Tensor, Tensor]:
        sigma = (4 * told).exp().flatten()
        scales = [self.config.method.diffusion.level_input_scale(n) for n in range(told.shape[1])]
        scale = torch.tensor(scales).expand_as(told).flatten()
        x, x_noisy = self.x.flatten(0, 1), scaled.flatten(0, 1) / wide(c_in(sigma, scale))
        noise = (x_noisy - x / wide(scale)) / wide(sigma)
        answer = wide(c_nrm(sigma)) * v_target(x, noise, sigma)
        return answer.unflatten(0, told.shape) + self.error, torch.zeros(*told.shape, 1, 1)


def losses_of(network: nn.Module, batch: NoiseBatch, config: RunConfig) -> Tensor:
    return method_of(config).losses(network, batch, seed=config.seed, device=CPU)


def noise_of(config: RunConfig, numbers: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    return draw_noise(config.method, numbers, shape, seed=config.seed, device=CPU)


def wide(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]


def test_the_true_velocity_costs_nothing():
    config = tiny_config(diffusion={"input_scale": 2.0})
    batch = noise_batch(config, [0, 1, 2])
    losses = losses_of(Knower(config, to_patches(batch.patches)), batch, config)
    assert losses.shape == (2,)
    # The noise is recovered from fp32 sums.
    torch.testing.assert_close(losses, torch.zeros(2), rtol=0, atol=1e-6)


def test_an_error_costs_what_edm_charges_for_the_denoised_patch():
    """`(1 / sigma^2 + 1) * |denoised - x|^2`, averaged over pixels and samples of each level."""
    config = tiny_config(diffusion={"input_scale": 2.0, "input_scale_growth": 3.0})
    batch = noise_batch(config, [4, 5])
    x = to_patches(batch.patches)
    error = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    losses = losses_of(Knower(config, x, error), batch, config)
    _, sigma, _ = noise_of(config, batch.numbers, x.shape[1:])
    for level in range(2):
        scale = torch.full((2,), config.method.diffusion.level_input_scale(level))
        of_denoised = wide(c_out(sigma[:, level], scale)) * error[:, level]
        charged = wide(1 / sigma[:, level] ** 2 + 1) * of_denoised.square()
        torch.testing.assert_close(losses[level], charged.mean(), rtol=1e-4, atol=1e-5)


def test_a_sample_s_loss_does_not_depend_on_its_company():
    config = tiny_config(**THREE_LEVELS)
    model, numbers = stirred_model(config), [7, 0, 3, 12]
    with torch.no_grad():
        together = losses_of(model, noise_batch(config, numbers), config)
        alone = [losses_of(model, noise_batch(config, [n]), config) for n in numbers]
        halves = [
            losses_of(model, noise_batch(config, part), config)
            for part in (numbers[:2], numbers[2:])
        ]
    # Matrix products of other batch sizes round otherwise.
    torch.testing.assert_close(torch.stack(alone).mean(0), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(halves).mean(0), together, rtol=1e-4, atol=1e-5)


def test_noise_is_bitwise_a_function_of_seed_and_sample_number():
    config = tiny_config(**THREE_LEVELS)
    shape = torch.Size((3, 3, 2, 6, 8))
    together = noise_of(config, torch.tensor([5, 1, 9]), shape)
    alone = noise_of(config, torch.tensor([1]), shape)
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[1:2], one)
    other_seed = noise_of(tiny_config(**THREE_LEVELS, seed=4), torch.tensor([1]), shape)
    assert not torch.equal(other_seed[0], alone[0])


def test_levels_have_independent_noise_and_noise_levels():
    config = tiny_config(**THREE_LEVELS)
    numbers = torch.arange(400)
    noise, sigma, _ = noise_of(config, numbers, torch.Size((3, 1, 1, 1, 8)))
    for drawn in (noise.flatten(2)[:, :, 0], sigma.log()):
        correlation = torch.corrcoef(drawn.T) - torch.eye(3)
        # Five standard errors of 400 draws.
        assert float(correlation.abs().max()) < 0.25


@pytest.mark.parametrize(("rate", "passes"), [(0.0, 1), (0.9, 2)])
def test_self_conditioning_costs_one_pass_without_gradient(rate, passes):
    config = tiny_config(model={"self_conditioning_rate": rate})
    model, with_gradient = stirred_model(config), []
    model.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    losses_of(model, noise_batch(config, [0]), config)
    assert with_gradient == [False, True][-passes:]
    assert with_gradient.count(False) == method_of(config).passes_without_gradient


def test_the_share_of_self_conditioned_samples_is_the_rate():
    config = tiny_config(model={"self_conditioning_rate": 0.25})
    chosen = noise_of(config, torch.arange(2_000), torch.Size((2, 1, 1, 1, 1)))[2]
    assert set(chosen.tolist()) == {0.0, 1.0}
    # Five standard errors.
    assert float(chosen.mean()) == pytest.approx(0.25, abs=0.05)


def test_a_sample_without_self_conditioning_gets_zeros():
    rare = tiny_config(model={"self_conditioning_rate": 0.5})
    model, seen = stirred_model(rare), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[4:]))
    batch = noise_batch(rare, list(range(12)))
    losses_of(model, batch, rare)
    chosen = noise_of(rare, batch.numbers, to_patches(batch.patches).shape[1:])[2]
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
