"""Between the pixels of clips and the latents that a recipe may be of."""

import torch

from data_pipeline.errors import ConfigError
from data_pipeline.latents.autoencoder import Autoencoder
from data_pipeline.latents.latents import Provenance
from data_pipeline.latents.tiles import tile_within
from t2v.methods.method import Clips, Room
from t2v.recipe.recipe import RunConfig


class Codec:
    """The autoencoder of a recipe's latents, checked against the one that made them; a recipe of
    pixels has none, and its clips stay as they are."""

    def __init__(
        self,
        config: RunConfig,
        vae: str | None,
        trained_with: Provenance | None,
        device: torch.device,
    ) -> None:
        self.clip_size, self.device = config.method.view.clip_size, device
        self.tile: int | None = getattr(config.method.sampling, "decode_tile", None)
        self.autoencoder, self.made = None, trained_with
        latents = config.method.cached_latents
        if latents is None:
            if vae is not None:
                raise ConfigError(
                    "--vae: is wrong because the checkpoint makes pixels; leave it out."
                )
            return
        if vae is None:
            raise ConfigError(
                "--vae: missing because the checkpoint makes latents; give the folder or hub id of "
                f"the autoencoder that made those of its training set, '{latents.name}'."
            )
        assert trained_with is not None
        autoencoder = Autoencoder(vae, normalisation=trained_with.normalisation, device=str(device))
        if not autoencoder.provenance(self.clip_size, None).same_autoencoder(trained_with):
            raise ConfigError(
                f"--vae: {vae} is wrong because the checkpoint was trained on latents of another "
                f"one, {trained_with.autoencoder}; give that."
            )
        self.autoencoder = autoencoder

    def refuse_more_than(self, room: Room) -> None:
        """ConfigError where clips are not decoded in this room."""
        if self.autoencoder is None:
            return
        weights = sum(part.nbytes for part in self.autoencoder.model.state_dict().values())
        most = tile_within(
            self.autoencoder, weights + room.device_bytes, self.clip_size, decoding=True
        )
        if most is not None and (self.tile is None or self.tile > most):
            how = "whole" if self.tile is None else f"in tiles of {self.tile}"
            raise ConfigError(
                f"method.sampling.decode_tile: {how} is wrong because there is no memory to decode "
                f"a clip so; set decode_tile={most}, or give --memory-gib more."
            )

    def encode(self, given: Clips) -> Clips:
        """The first frames of clips as the method goes on from them."""
        if self.autoencoder is None or self.made is None:
            return given
        return self.autoencoder.encode(given, tile=self.made.tile).to(self.device)

    def decode(self, made: Clips, given: Clips | None) -> Clips:
        """Clips in [-1, 1]; given frames as they were, not as the autoencoder gives them back."""
        if self.autoencoder is None:
            return made
        pixels = self.autoencoder.decode(made, tile=self.tile)
        if given is None:
            return pixels
        return torch.cat([given.to(pixels.device), pixels[:, :, given.shape[2] :]], dim=2)
