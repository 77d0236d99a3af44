"""Tiny autoencoders of diffusers' real classes, randomly initialised: they lose nearly all of a
clip, and show everything but quality."""

from pathlib import Path

import torch

KINDS = {
    "wan": (
        "AutoencoderKLWan",
        {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [True, True],
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [0.5, 1.0, 2.0, 0.7],
            "scale_factor_spatial": 4,
        },
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        {
            "down_block_types": ["CogVideoXDownBlock3D"] * 3,
            "up_block_types": ["CogVideoXUpBlock3D"] * 3,
            "block_out_channels": [8, 8, 8],
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        {
            "block_out_channels": [8, 8, 8, 8],
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
}


def write_autoencoder(folder: Path, kind: str = "wan", *, seed: int = 0, **changes: object) -> Path:
    """Save one as users have theirs."""
    import diffusers

    name, config = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, name)(**config | changes)
    model.save_pretrained(folder)
    return folder
