"""What clips are sampled from: a checkpoint of a run, or weights that were exported from one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.errors import ConfigError
from data_pipeline.latents.latents import Provenance as Autoencoder
from data_pipeline.text.embeddings import Provenance as TextEncoder
from t2v.checkpoint.compatibility import changes
from t2v.checkpoint.export import EXPORT, load_exported, read_export
from t2v.checkpoint.finding import load_weights, resolve_checkpoint
from t2v.checkpoint.manifest import read_manifest
from t2v.engine.world import World
from t2v.network.network import Network
from t2v.recipe.recipe import RunConfig, method_of, parse_config


@dataclass(frozen=True)
class Source:
    """Proved weights, and what must be known to use them."""

    folder: Path
    config: RunConfig
    text_encoder: TextEncoder | None
    latents: Autoencoder | None
    step: int
    digest: str
    exported: Literal["ema", "raw"] | None = None

    def load(self, model: Network, weights: Literal["ema", "raw"]) -> None:
        """Give an unsharded model the averaged or the raw weights."""
        if self.exported is None:
            load_weights(self.folder, model, weights=weights)
            return
        if weights != self.exported:
            raise ConfigError(
                f"method.sampling.weights: {weights} is wrong because {self.folder} holds the "
                f"{self.exported} weights only; set weights={self.exported}."
            )
        load_exported(self.folder, model)


def open_source(path: str | Path, world: World) -> Source:
    """An export, a step folder, or the newest valid step of a run; every byte is proved."""
    folder = Path(path)
    if (folder / EXPORT).is_file():
        export = world.on_first(lambda: read_export(folder))
        config = parse_config(export.config, str(folder))
        digest = f"{export.checkpoint_proof}-{export.dtype}"
        digest += f"-{export.ema_length:g}" if export.ema_length else ""
        made = export.text_encoder, export.latents
        return Source(folder, config, *made, export.step, digest, export.weights)
    folder = resolve_checkpoint(path, world)
    manifest = read_manifest(folder)
    config = parse_config(manifest.config, str(folder))
    made = manifest.text_encoder, manifest.latents
    return Source(folder, config, *made, manifest.step, manifest.proof)


def open_guide(config: RunConfig, world: World) -> Source | None:
    """What holds the network that guides sampling, if the settings name a checkpoint for it;
    ConfigError where that is another network than the recipe's."""
    path = method_of(config).guide_checkpoint
    if path is None:
        return None
    guide = open_source(path, world)
    old, new = (
        one.model_dump(mode="json", include={"method": True, "conditioning": True})
        for one in (guide.config, config)
    )
    for content in (old, new):
        del content["method"]["sampling"]
    for section in new:
        for change in changes(section, old[section], new[section]):
            raise ConfigError(
                f"method.sampling.guide_checkpoint: {path} is wrong because it is another network "
                f"({change}); give an older checkpoint of the run."
            )
    return guide
