"""The protocol of an evaluation: one YAML file that fixes everything a score depends on."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from data_pipeline.shards.dataset import digest_json
from data_pipeline.strict import Size, Strict
from t2v.recipe.reading import parse, read_mapping

FrameRule = Literal["first", "center", "random"]
Metric = Literal["fvd", "mmd", "inception_score", "text_score", "seam"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PATHS = {"real": ("dataset",), "i3d": ("path",), "c3d": ("path",), "clip": ("path",)}


class RealSet(Strict):
    """The clips that generated ones are held against."""

    dataset: str = Field(description="a dataset folder of t2v data build or index")
    fingerprint: Digest | None = Field(default=None, description="of that dataset; none: any")
    split: str | None = Field(default=None, description="as noted in dataset.json; none: any")
    clips: int | None = Field(default=None, ge=2, description="drawn by the seed; none: all")
    seed: int = Field(default=0, ge=0, description="of that draw and of random windows")


class GeneratedSet(Strict):
    """How many clips are judged, and how they are sampled where a run is given."""

    clips: int = Field(ge=4, description="scores of different numbers are not comparable")
    seed: int = Field(default=0, ge=0, description="of the first clip, of conditions and windows")


class View(Strict):
    """What of a clip is judged, and by what; real and generated clips are treated alike."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    level: int | None = Field(default=None, ge=0, description="of the pyramid; none: the finest")
    size: Size = Field(description="whole clips of the level; others are refused, or reduced to it")
    frames: int = Field(ge=1, description="frames that are judged")
    stride: int = Field(default=1, ge=1, description="of those frames in the clip")
    real_window: FrameRule = Field(default="random", description="where those frames begin")
    generated_window: FrameRule = "first"
    metrics: list[Metric] = Field(min_length=1)

    @property
    def span(self) -> int:
        """Frames of the clip from the first that is judged to the last."""
        return (self.frames - 1) * self.stride + 1

    @model_validator(mode="after")
    def _refuse_long_windows(self) -> "View":
        if self.span > self.size[0]:
            raise ValueError(
                f"frames: {self.frames} with stride {self.stride} is wrong because clips have "
                f"{self.size[0]} frames; lower one of them"
            )
        return self


class I3D(Strict):
    """Features of Fréchet video distances: raw outputs of a Kinetics-400 I3D in TorchScript."""

    path: str
    sha256: Digest | None = Field(default=None, description="of the file; none: any, but told")
    resolution: int = Field(default=224, ge=1, description="height and width that it is shown")
    resampling: Literal["bilinear", "bicubic"] = "bilinear"


class C3D(Strict):
    """Class probabilities for inception scores, from a C3D in TorchScript that resizes itself."""

    path: str
    sha256: Digest | None = Field(default=None, description="of the file; none: any, but told")
    splits: int = Field(default=10, ge=1, description="parts of the clips, scored apart")


class CLIPText(Strict):
    """Agreement of clips with their prompts: a CLIPModel's folder, weights in safetensors."""

    path: str
    sha256: Digest | None = Field(default=None, description="of its weights; none: any, but told")
    frames: int = Field(default=4, ge=1, description="frames of a clip, evenly spaced")


class Uncertainty(Strict):
    """Intervals from resamples of the generated clips."""

    resamples: int = Field(default=200, ge=2)
    seed: int = Field(default=0, ge=0)
    confidence: float = Field(default=0.95, gt=0, lt=1)


class Protocol(Strict):
    """All that a score depends on besides the generated clips themselves."""

    format: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    real: RealSet
    generated: GeneratedSet
    fps: float = Field(gt=0, description="of clips at the finest level")
    codec: Literal["as_stored", "h264"] = Field(
        default="as_stored", description="h264: each view of a clip is encoded once more, alike"
    )
    views: list[View] = Field(min_length=1)
    i3d: I3D | None = None
    c3d: C3D | None = None
    clip: CLIPText | None = None
    uncertainty: Uncertainty = Uncertainty()

    @model_validator(mode="after")
    def _refuse_what_does_not_fit_together(self) -> "Protocol":
        names = [view.name for view in self.views]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"views: name '{twice[0]}' is there twice; rename one")
        needs = {"fvd": "i3d", "mmd": "i3d", "inception_score": "c3d", "text_score": "clip"}
        for view in self.views:
            for metric in view.metrics:
                needed = needs.get(metric)
                if needed and getattr(self, needed) is None:
                    raise ValueError(f"{needed}: missing, but view '{view.name}' asks for {metric}")
        if self.c3d and self.generated.clips < 2 * self.c3d.splits:
            raise ValueError(
                f"c3d.splits: {self.c3d.splits} is wrong because {self.generated.clips} generated "
                "clips make parts of fewer than two; lower it"
            )
        return self

    def pinned(self) -> dict:
        """All of it but where files lie on this machine."""
        content = self.model_dump(mode="json")
        for section, names in PATHS.items():
            for name in names:
                if content[section] is not None:
                    del content[section][name]
        return content

    @property
    def fingerprint(self) -> str:
        """The digest that results are compared by; of a protocol whose digests are all given."""
        return digest_json(self.pinned())


def load_protocol(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Protocol:
    """The protocol at `path` with `dotted.key=value` overrides; errors say all that is wrong."""
    missing = "no such protocol; `ls configs/evaluation` shows ours."
    content = read_mapping(Path(path), overrides, missing=missing)
    return parse(Protocol, content, str(Path(path)))


def dump_protocol(protocol: Protocol) -> str:
    """The protocol as YAML; `load_protocol` reads it back to an equal one."""
    return yaml.safe_dump(protocol.model_dump(mode="json"), sort_keys=False)
