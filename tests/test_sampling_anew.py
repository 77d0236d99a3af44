"""Features kept from finished levels against a joint pass over coarse clip and tiles together."""

import contextlib

import torch

from t2v.methods.hpdm.diffusion import c_in, c_noise, c_out, c_skip
from t2v.methods.hpdm.level_network import LevelNetwork
from t2v.methods.hpdm.memory import plan_memory
from t2v.methods.hpdm.sampling import ALONE
from t2v.methods.hpdm.settings import level_tilings
from t2v.methods.hpdm.store import Store
from t2v.methods.hpdm.tiled_denoiser import TiledDenoiser, read_level
from t2v.methods.hpdm.tiling import Slab
from tests.tiny import class_condition, stirred_model, tiny_config


def test_context_kept_from_a_finished_level_equals_context_computed_anew():
    """A tile denoised with kept features is the joint network's answer, which reads the coarse
    clip again at the smallest noise level."""
    settings = {"steps": [1, 1], "overlap": "hw", "tile_batch": 100, "guidance_scale": 1.0}
    config = tiny_config(sampling=settings)
    model, diffusion = stirred_model(config), config.method.diffusion
    sampling = config.method.sampling
    condition, sigma = class_condition([0, 1]), 0.7
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, *config.method.pyramid.size(0), generator=generator) * 2 - 1
    x_noisy = torch.randn(2, 3, *config.method.pyramid.size(1), generator=generator)
    rooms = plan_memory(model, sampling, clips=2, device_bytes=1 << 62)
    store = Store(torch.device("cpu"))
    shared = {
        "branches": [(condition, None)],
        "diffusion": diffusion,
        "store": store,
        "team": ALONE,
    }
    with torch.no_grad(), contextlib.closing(store):
        first, second = (level_tilings(sampling, config.method.pyramid, n)[0] for n in (0, 1))
        reader = LevelNetwork(model, 0, volumes={}, room=rooms[0], **shared)
        volumes = read_level(reader, first, coarse, diffusion.sigma_min)
        network = LevelNetwork(model, 1, volumes=volumes, room=rooms[1], **shared)
        whole = Slab(0, 0, second.size[0])
        found = TiledDenoiser(network, second, whole, sampling=sampling)(x_noisy, sigma)

        sigmas = torch.tensor([diffusion.sigma_min, sigma])
        scales = torch.tensor([diffusion.level_input_scale(level) for level in (0, 1)])
        factors, told = c_in(sigmas, scales), c_noise(sigmas)
        skip, out = c_skip(sigmas, scales)[1], c_out(sigmas, scales)[1]
        expected, count = torch.zeros_like(x_noisy), torch.zeros_like(x_noisy)
        for offset in second.offsets:
            place = (
                ...,
                *(slice(o, o + side) for o, side in zip(offset, second.patch, strict=True)),
            )
            tiles = x_noisy[place]
            x = torch.stack([coarse / scales[0] * factors[0], tiles * factors[1]], dim=1)
            windows = torch.stack([torch.zeros_like(offset), offset]).expand(2, 2, 3)
            latents = model(x, told.expand(2, 2), windows, condition)[1]
            latents[:, 1] = 0  # the coarse clip is read twice, the tile for the first time
            output, _ = model(x, told.expand(2, 2), windows, condition, latents)
            expected[place] += skip * tiles + out * output[:, 1]
            count[place] += 1
    # Matrix products of other shapes round otherwise.
    average = (expected / count).clamp(-1, 1)
    torch.testing.assert_close(found, average, rtol=1e-4, atol=1e-4)
    assert float((average.abs() < 1).float().mean()) > 0.3
