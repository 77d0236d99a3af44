"""What is measured of a clip: features, class probabilities, agreement with its prompt, seams.

Networks are TorchScript files, which hold no pickle, or a transformers folder of safetensors.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from data_pipeline.errors import ConfigError, InputMissing
from data_pipeline.store.hub import reason_of, refuse_partial
from t2v.evaluation.clips import Shown
from t2v.evaluation.protocol import C3D, I3D, CLIPText
from t2v.evaluation.seam import Borders, seam_energies

Values = Float[np.ndarray, "clips dims"]
# Of CLIP's image preprocessing (Radford et al. 2021, their released code).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VideoFeatures:
    """Raw outputs of an I3D before its softmax, as Fréchet video distances use them.

    The call is that of the TorchScript copy of the original network (StyleGAN-V, section 4): clips
    in [-1, 1], resized here.
    """

    module: torch.jit.ScriptModule
    spec: I3D
    sha256: str
    device: torch.device

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "i3d": self.sha256,
            "resolution": self.spec.resolution,
            "resampling": self.spec.resampling,
        }

    def of(self, shown: Sequence[Shown]) -> Values:
        side, mode = self.spec.resolution, self.spec.resampling
        with torch.no_grad():
            frames = to_tensor(shown).to(self.device).float() / 127.5 - 1
            count = len(frames)
            frames = frames.transpose(1, 2).flatten(0, 1)
            if frames.shape[-2:] != (side, side):
                frames = functional.interpolate(frames, (side, side), mode=mode)
            x = frames.unflatten(0, (count, -1)).transpose(1, 2).contiguous()
            answer = self.module(x, rescale=False, resize=False, return_features=True)
        return answer.cpu().numpy()


@dataclass(frozen=True)
class ClassProbabilities:
    """Probabilities of UCF-101's classes by a C3D (TGAN2's, as a TorchScript that takes bytes)."""

    module: torch.jit.ScriptModule
    sha256: str
    device: torch.device

    @property
    def identity(self) -> dict[str, Any]:
        return {"c3d": self.sha256}

    def of(self, shown: Sequence[Shown]) -> Values:
        with torch.no_grad():
            return self.module(to_tensor(shown).to(self.device)).cpu().numpy()


class TextAgreement:
    """100 times the cosine of CLIP's image and text embeddings, mean over frames of a clip."""

    def __init__(self, spec: CLIPText, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.folder = Path(spec.path)
        weights = self.folder / "model.safetensors"
        if not weights.is_file():
            raise InputMissing(
                f"clip.path: {spec.path} is wrong because it holds no model.safetensors; give the "
                "folder of a CLIPModel."
            )
        self.sha256 = file_digest(weights, spec.sha256, "clip.sha256")

    @property
    def identity(self) -> dict[str, Any]:
        return {"clip": self.sha256, "frames": self.spec.frames}

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """(network, tokenizer), loaded at first use."""
        from transformers import AutoTokenizer, CLIPModel
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        disable_progress_bar()
        set_verbosity_error()
        try:
            loaded: Any = CLIPModel.from_pretrained(
                self.folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
            model, loading = loaded
            refuse_partial(loading, model)
            tokenizer = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever strangers' files make transformers raise
            raise ConfigError(
                f"clip.path: {self.spec.path} is wrong because it is no CLIPModel with its "
                f"tokenizer ({reason_of(error)}); give such a folder."
            ) from None
        return model.to(self.device).eval(), tokenizer

    def of(self, shown: Sequence[Shown]) -> Values:
        model, tokenizer = self.parts
        side = model.config.vision_config.image_size
        captions = [clip.caption for clip in shown]
        if None in captions:
            raise ConfigError("text_score: a clip has no prompt; leave the metric out of its view.")
        with torch.no_grad():
            pictures = torch.cat([self._frames(clip, side) for clip in shown])
            images = model.visual_projection(
                model.vision_model(pixel_values=pictures.to(self.device)).pooler_output
            )
            words = tokenizer(
                captions,
                padding=True,
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            texts = model.text_projection(
                model.text_model(
                    input_ids=words["input_ids"], attention_mask=words["attention_mask"]
                ).pooler_output
            )
            images = images.unflatten(0, (len(shown), -1))
            agreement = functional.cosine_similarity(images, texts[:, None], dim=-1).mean(1)
        return (100 * agreement[:, None]).float().cpu().numpy()

    def _frames(self, shown: Shown, side: int) -> Float[Tensor, "frames 3 height width"]:
        """Evenly spaced frames: shorter side resized, centre cropped, normalised."""
        chosen = np.linspace(0, len(shown.clip) - 1, self.spec.frames).round().astype(int)
        frames = torch.from_numpy(shown.clip[chosen]).movedim(-1, 1).float() / 255
        height, width = frames.shape[-2:]
        grown = [max(side, round(length * side / min(height, width))) for length in (height, width)]
        frames = functional.interpolate(frames, grown, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (grown[0] - side) // 2, (grown[1] - side) // 2
        frames = frames[..., top : top + side, left : left + side]
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        return (frames - mean) / std


@dataclass(frozen=True)
class Seams:
    """Roughness at the ends of tiles and elsewhere."""

    borders: Borders

    @property
    def identity(self) -> dict[str, Any]:
        return {"seam": self.borders}

    def of(self, shown: Sequence[Shown]) -> Values:
        return np.stack([seam_energies(clip.clip, self.borders) for clip in shown])


# Numbers of each clip; `identity` is all they follow from besides the clip.
Measure = VideoFeatures | ClassProbabilities | TextAgreement | Seams


def load_i3d(spec: I3D, shape: tuple[int, int, int], device: torch.device) -> VideoFeatures:
    """The network of a protocol, proven to take clips of a shape and to answer with features."""
    digest = file_digest(Path(spec.path), spec.sha256, "i3d.sha256")
    measure = VideoFeatures(load_script(spec.path, "i3d.path", device), spec, digest, device)
    _try(measure, shape, f"i3d.path: {spec.path}", "I3D (forward(x, rescale, resize, "
         "return_features) -> features)")  # fmt: skip
    return measure


def load_c3d(spec: C3D, shape: tuple[int, int, int], device: torch.device) -> ClassProbabilities:
    """The network of a protocol, proven to answer clips of a shape with probabilities."""
    digest = file_digest(Path(spec.path), spec.sha256, "c3d.sha256")
    measure = ClassProbabilities(load_script(spec.path, "c3d.path", device), digest, device)
    kind = "C3D (forward(x) -> class probabilities)"
    answer = _try(measure, shape, f"c3d.path: {spec.path}", kind)
    if (answer < 0).any() or not np.allclose(answer.sum(1), 1, atol=1e-3):
        raise ConfigError(
            f"c3d.path: {spec.path} is wrong because its answers are no probabilities; give a "
            f"{kind}."
        )
    return measure


def load_script(path: str, field: str, device: torch.device) -> torch.jit.ScriptModule:
    """A TorchScript module from a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["it cannot be read"])[0][:160]
        raise ConfigError(
            f"{field}: {path} is wrong because it is no TorchScript file ({reason}); give the file "
            "of torch.jit.save, not weights alone."
        ) from None
    return module.eval()


def file_digest(path: Path, expected: str | None, field: str) -> str:
    """sha256 of a file, which must be the expected one if any is."""
    if not path.is_file():
        raise InputMissing(f"{path}: no such file; give the path where {field.split('.')[0]} lies.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected not in (None, digest):
        raise ConfigError(
            f"{field}: is wrong because {path} has {digest}; give the file that the protocol was "
            "made with."
        )
    return digest


def to_tensor(shown: Sequence[Shown]) -> UInt8[Tensor, "clips 3 frames height width"]:
    """Clips as networks take them, still in bytes."""
    return torch.from_numpy(np.stack([clip.clip for clip in shown])).movedim(-1, 1).contiguous()


def _try(measure: Measure, shape: tuple[int, int, int], origin: str, kind: str) -> Values:
    """What a network says of one grey clip; ConfigError if that is no row of numbers."""
    grey = Shown(np.full((*shape, 3), 128, np.uint8), None)
    try:
        answer = measure.of([grey])
    except (RuntimeError, TypeError, AttributeError, torch.jit.Error) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines or ["it fails"])[-1][:160]
        raise ConfigError(
            f"{origin} is wrong because it takes no clips of {'x'.join(map(str, shape))} "
            f"({reason}); give a {kind}."
        ) from None
    if answer.ndim != 2 or len(answer) != 1 or not np.isfinite(answer).all():
        raise ConfigError(
            f"{origin} is wrong because it answers one clip with {answer.shape}, not one row of "
            f"numbers; give a {kind}."
        )
    return answer
