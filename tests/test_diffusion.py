"""The identities of the preconditioning (section 5.2 of the specification)."""

import math
from importlib import import_module
from inspect import isfunction

import pytest
import torch
from jaxtyping import TypeCheckError
from pydantic import ValidationError

from t2v.methods.hpdm.diffusion import (
    DiffusionConfig,
    add_noise,
    c_in,
    c_noise,
    c_nrm,
    c_out,
    c_skip,
    denoised,
    loss_weight,
    lowered,
    training_sigmas,
    v_target,
)

BATCH = 64


@pytest.fixture
def sample():
    """(x, noise, sigma, input_scale) in fp64, so that identities hold to 1e-12."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, 3, 2, 4, 5)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    sigma = torch.logspace(math.log10(0.002), math.log10(80), BATCH, dtype=torch.float64)
    choices = torch.tensor([1.0, 8**0.5, 4.0, 64.0], dtype=torch.float64)
    return x, noise, sigma, choices.repeat(BATCH // 4)


def wide(values):
    return values[:, None, None, None, None]


def test_skip_and_output_of_the_true_velocity_make_the_clean_patch(sample):
    x, noise, sigma, input_scale = sample
    x_noisy = add_noise(x, noise, sigma, input_scale)
    output = wide(c_nrm(sigma)) * v_target(x, noise, sigma)
    skip, out = wide(c_skip(sigma, input_scale)), wide(c_out(sigma, input_scale))
    torch.testing.assert_close(skip * x_noisy + out * output, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(denoised(x_noisy, output, sigma, input_scale), x, rtol=0, atol=1e-10)


def test_loss_weight_is_that_of_edm_on_the_denoised_patch(sample):
    _, _, sigma, input_scale = sample
    edm = 1 / sigma**2 + 1
    torch.testing.assert_close(
        loss_weight(sigma, input_scale), edm * c_out(sigma, input_scale) ** 2
    )


def test_input_and_target_have_unit_variance(sample):
    # Both are linear in a patch and a noise of unit variance: the squared shares add to one.
    _, _, sigma, input_scale = sample
    one = torch.ones(BATCH, 1, 1, 1, 1, dtype=torch.float64)
    zero = torch.zeros_like(one)
    of_x, of_noise = (add_noise(*pair, sigma, input_scale) for pair in ((one, zero), (zero, one)))
    variance = wide(c_in(sigma, input_scale)) ** 2 * (of_x**2 + of_noise**2)
    torch.testing.assert_close(variance, one)
    of_x, of_noise = (v_target(*pair, sigma) for pair in ((one, zero), (zero, one)))
    torch.testing.assert_close(wide(c_nrm(sigma)) ** 2 * (of_x**2 + of_noise**2), one)


def test_without_input_scale_it_is_edm_with_unit_data():
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    one = torch.ones_like(sigma)
    torch.testing.assert_close(c_skip(sigma, one), 1 / (sigma**2 + 1))
    torch.testing.assert_close(c_out(sigma, one), -sigma / (sigma**2 + 1).sqrt())
    torch.testing.assert_close(c_in(sigma, one), 1 / (sigma**2 + 1).sqrt())
    torch.testing.assert_close(loss_weight(sigma, one), one)
    torch.testing.assert_close(c_noise(sigma), sigma.log() / 4)


def test_training_noise_levels_are_log_normal():
    config = DiffusionConfig(
        input_scale=1.0, input_scale_growth=1.0, sigma_mean=-1.2, sigma_std=1.2
    )
    normal = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    logs = training_sigmas(normal, config).log()
    # Five standard errors of 50,000 draws.
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.02)
    torch.testing.assert_close((logs + 1.2) / 1.2, normal, rtol=1e-5, atol=1e-5)


def test_input_scale_grows_as_designed_for_the_text_to_video_pyramid():
    config = DiffusionConfig(input_scale=8**0.5, input_scale_growth=8**0.5)
    scales = [config.level_input_scale(level) for level in range(4)]
    assert scales == pytest.approx([2.828, 8, 22.627, 64], rel=1e-3)


def test_an_empty_range_of_noise_levels_is_refused():
    with pytest.raises(ValidationError, match=r"sigma_min 2.0 is not below sigma_max 1.0"):
        DiffusionConfig(input_scale=1.0, input_scale_growth=1.0, sigma_min=2.0, sigma_max=1.0)


def test_noise_that_would_broadcast_over_the_batch_is_caught_while_testing(sample):
    x, noise, sigma, input_scale = sample
    with pytest.raises(TypeCheckError):
        add_noise(x, noise[:1], sigma, input_scale)


def test_every_module_named_for_it_is_checked_for_shapes(request):
    *names, checker = request.config.getoption("--jaxtyping-packages").split(",")
    assert checker == "beartype.beartype"
    for name in names:
        module = import_module(name)
        functions = [f for f in vars(module).values() if getattr(f, "__module__", "") == name]
        functions = [function for function in functions if isfunction(function)]
        assert functions, name
        assert all(hasattr(function, "__wrapped__") for function in functions), name


def test_what_follows_the_input_scale_is_the_same_in_pixels_at_every_level():
    """Noise of sigma at level l drowns a pixel as sigma * growth ** l does at level 0."""
    follow = ("noise_follows_scale", "weight_follows_scale", "range_follows_scale")
    config = DiffusionConfig(input_scale=2.0, input_scale_growth=3.0, **dict.fromkeys(follow, 1.0))
    in_pixels = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)
    normal = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None].expand(5, 3)
    sigma = training_sigmas(normal, config)
    torch.testing.assert_close(sigma * in_pixels, sigma[:, :1].expand(5, 3))
    for level in range(3):
        low, high = (end * 3.0**level for end in config.level_range(level))
        assert (low, high) == pytest.approx((config.sigma_min, config.sigma_max))
        assert config.sigma_at(0.3, level) * 3.0**level == pytest.approx(config.sigma_at(0.3, 0))
        scale = torch.full((5,), config.level_input_scale(level), dtype=torch.float64)
        weight = loss_weight(sigma[:, level], scale, 3.0**level)
        on_patch = weight / c_out(sigma[:, level], scale) ** 2
        torch.testing.assert_close(on_patch, 1 + 1 / sigma[:, 0] ** 2)


@pytest.mark.parametrize("quantile", [0.05, 0.5, 1.0])
def test_coarser_levels_are_lowered_below_a_quantile_and_no_other(quantile):
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(4000, 3, generator=generator)
    taught = torch.arange(4000).remainder(3).float()
    low = lowered(normal, taught, quantile)
    kept = torch.arange(3) >= taught[:, None]
    assert torch.equal(low[kept], normal[kept])
    share = torch.special.ndtr(low[~kept])
    # A draw from the lowest part of the distribution, spread evenly over it.
    assert float(share.max()) <= quantile * (1 + 1e-5)
    assert float(share.mean()) == pytest.approx(quantile / 2, rel=0.05)


def test_weightings_are_what_they_say_of_the_denoised_patch(sample):
    _, _, sigma, input_scale = sample
    snr = sigma**-2
    sigmoid = snr / (1 + snr * math.exp(-1.5))
    for name, expected in (("min_snr", snr.clamp(max=5)), ("sigmoid", sigmoid)):
        weight = loss_weight(sigma, input_scale, weighting=name, bias=1.5)
        torch.testing.assert_close(weight / c_out(sigma, input_scale) ** 2, expected)
    half = loss_weight(2 * sigma, input_scale, 0.5, weighting="min_snr")
    on_patch = half / c_out(2 * sigma, input_scale) ** 2
    torch.testing.assert_close(on_patch, snr.clamp(max=5))
