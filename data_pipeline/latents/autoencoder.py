"""A causal video autoencoder: clips to normalised latents and back, whole or in tiles.

Its class is one of diffusers' own, named by its `config.json`; nothing is assumed of it but that
`encode` and `decode` take clips in [-1, 1]. Its factors, and the lengths of clips that it gives
back, are found out by passes on the meta device, which compute nothing.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.latents.latents import Normalisation, Provenance, Statistics
from data_pipeline.pyramid import Clip
from data_pipeline.shards.dataset import digest_json
from data_pipeline.store.hub import digest_files, fetch_model, reason_of, refuse_partial
from data_pipeline.strict import Size

Pixels = Float[Tensor, "clips 3 frames height width"]
LatentClips = Float32[Tensor, "clips channels latent_frames latent_height latent_width"]

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model*.safetensors"
SUBFOLDER = "vae"  # of a whole pipeline, as diffusers lays it out
PROBE_SIDE = 128
MOST_FRAMES = 16  # that any known autoencoder takes at a time


class Autoencoder:
    """A video autoencoder of diffusers, from a local folder or a hub id, in float32.

    Clips pass one at a time, so that what becomes of one does not depend on its neighbours.
    `normalisation` is by default that of its own configuration.
    """

    def __init__(
        self,
        vae: str | Path,
        *,
        normalisation: Normalisation | None = None,
        device: str | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.name = Path(vae).resolve().name if Path(vae).is_dir() else str(vae)
        folder = _fetch(str(vae))
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            self.class_name = str(config["_class_name"])
            self.model = _load(folder, self.class_name).to(self.device)
            with torch.device("meta"):
                self.outline = type(self.model).from_config(config).eval()
            self.channels, self.factors, self.unit_frames = _measure(self.outline)
            own = _own_normalisation(self.model, self.channels)
        except Exception as error:  # whatever a stranger's configuration makes diffusers raise
            reason = reason_of(error)
            raise ConfigError(
                f"{vae}: is no video autoencoder because {reason}; give a folder or hub id of one "
                "of diffusers' classes, with safetensors."
            ) from None
        self.normalisation = normalisation or own
        for part in (self.normalisation.first, self.normalisation.later):
            if not len(part.mean) == len(part.std) == self.channels or min(part.std) <= 0:
                raise ConfigError(
                    f"normalisation: is wrong because it is not {self.channels} means and positive "
                    f"deviations, one of each for each channel of {vae}; measure it again."
                )
        self._weights = digest_files(folder, [WEIGHTS])
        kept = {k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"}
        self._config = digest_json(kept)

    def provenance(self, clip: Size, tile: int | None) -> Provenance:
        """What latents of clips of a size are a function of."""
        return Provenance(
            autoencoder=self.name,
            class_name=self.class_name,
            weights_sha256=self._weights,
            config_sha256=self._config,
            normalisation=self.normalisation,
            channels=self.channels,
            factors=self.factors,
            clip=clip,
            tile=tile,
            posterior="mode",
            dtype="bfloat16",
            compute_dtype="float32",
        )

    @torch.inference_mode()
    def encode(self, clips: Pixels, *, tile: int | None = None) -> LatentClips:
        """Normalised latents, in main memory: the modes of the posteriors."""
        with self._tiled(tile):
            latents = [
                self.model.encode(clip.to(self.device, torch.float32)).latent_dist.mode().cpu()
                for clip in clips.split(1)
            ]
        return self.normalise(torch.cat(latents))

    @torch.inference_mode()
    def decode(self, latents: LatentClips, *, tile: int | None = None) -> Pixels:
        """Clips in [-1, 1], in main memory."""
        with self._tiled(tile):
            clips = [
                self.model.decode(one.to(self.device)).sample.clamp(-1, 1).cpu()
                for one in self.denormalise(latents.float()).split(1)
            ]
        return torch.cat(clips)

    def normalise(self, latents: LatentClips) -> LatentClips:
        """The autoencoder's own latents as those that are cached and generated."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: LatentClips) -> LatentClips:
        """The inverse of `normalise`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: LatentClips) -> tuple[Tensor, Tensor]:
        parts = [self.normalisation.first, self.normalisation.later]
        parts = parts[:1] + parts[1:] * (latents.shape[2] - 1)
        mean, std = (
            torch.tensor([getattr(part, name) for part in parts], device=latents.device)
            for name in ("mean", "std")
        )
        return rearrange(mean, "t c -> c t 1 1"), rearrange(std, "t c -> c t 1 1")

    @contextmanager
    def _tiled(self, tile: int | None) -> Iterator[None]:
        """Run the model in tiles of a side; ConfigError where memory is not enough."""
        set_tiles(self.model, tile)
        try:
            yield
        except RuntimeError as error:
            is_full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not is_full:
                raise
            raise ConfigError(
                f"{self.name}: a clip does not fit the memory of {self.device}; give --memory-gib "
                "less than it has."
            ) from None


def pixels_of(clip: Clip) -> Pixels:
    """A clip of bytes as one of numbers in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(clip)).float() / 127.5 - 1
    return rearrange(pixels, "t h w c -> 1 c t h w")


def _fetch(vae: str) -> Path:
    """The folder of an autoencoder: as given, or the part `vae` of a whole pipeline."""
    parts = vae.split("/")
    is_part = not Path(vae).is_dir() and len(parts) == 3 and all(parts)
    model, part = ("/".join(parts[:2]), parts[2]) if is_part else (vae, SUBFOLDER)
    files = [CONFIG, WEIGHTS, f"{WEIGHTS}.index.json"]
    folder = fetch_model(model, [*files, *(f"{part}/{file}" for file in files)], what="autoencoder")
    return folder / part if (folder / part / CONFIG).is_file() else folder


def _load(folder: Path, class_name: str) -> Any:
    """The model with its weights, complete; safetensors only, and only classes of diffusers."""
    import diffusers
    from diffusers.utils.logging import disable_progress_bar, set_verbosity_error

    kind: Any = getattr(diffusers, class_name, None)
    if not class_name.startswith("Autoencoder") or kind is None:
        raise ValueError(f"its class {class_name!r} is no autoencoder of diffusers")
    disable_progress_bar()
    set_verbosity_error()
    model, loading = kind.from_pretrained(
        folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    refuse_partial(loading, model)
    return model.eval()


def _measure(outline: Any) -> tuple[int, Size, int]:
    """(channels, factors, unit): the shortest unit of frames that may be added to the first one so
    that clips come back as they are."""
    channels, frames, height, width = _round_trip(outline, 1)
    if frames != 1:
        raise ValueError(f"it makes {frames} latent frames of an image")
    for unit in range(1, MOST_FRAMES + 1):
        try:
            after, twice = (_round_trip(outline, 1 + n * unit)[1] - 1 for n in (1, 2))
        except (ValueError, RuntimeError):
            continue
        if after >= 1 and twice == 2 * after and not unit % after:
            return channels, (unit // after, PROBE_SIDE // height, PROBE_SIDE // width), unit
    raise ValueError(f"no clip of 2 to {MOST_FRAMES + 1} frames comes back with as many")


@torch.inference_mode()
def _round_trip(outline: Any, frames: int) -> tuple[int, ...]:
    """The shape of a clip's latents; ValueError where the clip does not come back as it was."""
    shape = (1, 3, frames, PROBE_SIDE, PROBE_SIDE)
    latents = outline.encode(torch.empty(shape, device="meta")).latent_dist.mode()
    back = outline.decode(latents).sample.shape
    if latents.ndim != 5 or back != shape:
        raise ValueError(f"a clip of shape {shape[1:]} comes back as {tuple(back[1:])}")
    return tuple(latents.shape[1:])


def _own_normalisation(model: Any, channels: int) -> Normalisation:
    """As diffusers' pipelines scale latents: by means and deviations per channel, in the
    configuration or beside the weights, and by one shift and factor for all."""
    config, buffers = model.config, dict(model.named_buffers())
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    mean, std = (
        buffers[name].tolist() if name in buffers else config.get(name)
        for name in ("latents_mean", "latents_std")
    )
    both = Statistics(
        mean=[float(value) for value in mean or [shift] * channels],
        std=[float(value) / scale for value in std or [1.0] * channels],
    )
    return Normalisation(first=both, later=both)


def set_tiles(model: Any, tile: int | None) -> None:
    """Tell a model to work in tiles that overlap by a quarter; each class has its own words."""
    if tile is None:
        model.disable_tiling()
        return
    words: dict[str, float] = {}
    for axis in ("height", "width"):
        words[f"tile_sample_min_{axis}"] = tile
        words[f"tile_sample_stride_{axis}"] = tile * 3 // 4
        words[f"tile_overlap_factor_{axis}"] = 0.25
    known = inspect.signature(model.enable_tiling).parameters
    model.enable_tiling(**{name: value for name, value in words.items() if name in known})
